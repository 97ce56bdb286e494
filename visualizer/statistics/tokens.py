"""`Tokens`: what is known of a batch's tokens, so that padding does not count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..analysis.layers import real_tokens
from ..intercept import Maps
from ..layout import Layout
from ..maps import AttentionMap

__all__ = ["Tokens"]


@dataclass
class Tokens:
    """What is known of a batch's tokens, (batch, tokens) each; None: nothing, as of images."""

    mask: Tensor | None = None
    """0 for padding."""
    ids: Tensor | None = None
    """The tokens' numbers."""
    key_mask: Tensor | None = None
    """The mask of the keys where these are other tokens, as a decoder's cross-attention looks at its encoder."""

    def queries(self, layer: AttentionMap) -> Tensor | None:
        """Which queries are not padding, (batch, queries) as bool; None where nothing is known."""
        return _are_real(self.mask, layer.query_layout, layer.shape[0], layer.shape[2])

    def keys(self, layer: AttentionMap) -> Tensor | None:
        """Which keys are not padding, (batch, keys) as bool; None where nothing is known."""
        mask = self.key_mask if layer.kind == "cross" else self.mask
        return _are_real(mask, layer.layout, layer.shape[0], layer.shape[3])

    def of_images(self, chosen: Tensor) -> Tokens:
        """The tokens of some images or texts, by a bool for each of the batch."""
        masks = (self.mask, self.ids, self.key_mask)
        return Tokens(
            *(one[chosen.to(one.device)] if one is not None and len(one) == len(chosen) else one for one in masks)
        )


def _are_real(mask: Tensor | None, layout: Layout | None, batch: int, tokens: int) -> Tensor | None:
    return mask != 0 if mask is not None and mask.shape[-1] == tokens else real_tokens(layout, batch, tokens)


def tokens_of_call(layer: AttentionMap, maps: Maps[Any], batch: Tokens) -> Tokens:
    """What is known of the tokens of the call that is being recorded: by the map's layouts, else from the batch.

    An encoder and a decoder have padding of their own, or none.
    """
    images, _, queries, keys = layer.shape
    mask = batch.mask if layer.query_layout is None else real_tokens(layer.query_layout, images, queries)
    return Tokens(mask, _ids_of_call(maps, images, batch.ids), real_tokens(layer.layout, images, keys))


def _ids_of_call(maps: Maps[Any], batch: int, known: Tensor | None) -> Tensor | None:
    """The ids that the innermost module was given that takes any, (batch, tokens); else those of the batch."""
    for value in maps.call_arguments("input_ids"):
        if value is None or (isinstance(value, Tensor) and value.ndim == 2 and len(value) == batch):
            return None if value is None else value.detach()
    return known

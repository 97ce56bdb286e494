"""`Tokens`: what is known of a batch's tokens, so that padding does not count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..analysis.layers import real_tokens
from ..intercept import Maps
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
        real = _is_real(self.mask, layer.shape[2])
        return real_tokens(layer.query_layout, layer.shape[0], layer.shape[2]) if real is None else real

    def keys(self, layer: AttentionMap) -> Tensor | None:
        """Which keys are not padding, (batch, keys) as bool; None where nothing is known."""
        real = _is_real(self.key_mask if layer.kind == "cross" else self.mask, layer.shape[3])
        return real_tokens(layer.layout, layer.shape[0], layer.shape[3]) if real is None else real

    def of_images(self, chosen: Tensor) -> Tokens:
        """The tokens of some images or texts, by a bool for each of the batch."""
        masks = (self.mask, self.ids, self.key_mask)
        return Tokens(
            *(one[chosen.to(one.device)] if one is not None and len(one) == len(chosen) else one for one in masks)
        )


def _is_real(mask: Tensor | None, tokens: int) -> Tensor | None:
    return mask != 0 if mask is not None and mask.shape[-1] == tokens else None


def tokens_of_call(layer: AttentionMap, maps: Maps[Any], batch: Tokens) -> Tokens:
    """What is known of the tokens of the call that is being recorded: from its modules' arguments, else from the batch.

    The innermost module decides: an encoder and a decoder get masks of their own, or None where nothing is padding.
    """
    from_batch = {"attention_mask": batch.mask, "input_ids": batch.ids, "encoder_attention_mask": None}
    return Tokens(
        *(_of_arguments(maps.call_arguments(name), layer.shape[0], name, known) for name, known in from_batch.items())
    )


def _of_arguments(arguments: Sequence[Any], batch: int, name: str, known: Tensor | None) -> Tensor | None:
    """The first argument that is a mask or ids, (batch, tokens); None where a module was given None before that."""
    for value in arguments:
        if value is None:
            return None
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) == batch:
            value = value.detach()
            # A mask with other numbers than 0 and 1 is added to scores, and says nothing of tokens.
            if name == "input_ids" or bool(((value == 0) | (value == 1)).all()):
                # With as many texts as tokens, (batch, tokens) cannot be told from (tokens, tokens): trust the batch.
                is_unclear = known is not None and known.shape == value.shape and batch == value.shape[1]
                return known if is_unclear else value
    return known

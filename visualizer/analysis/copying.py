"""Which heads copy: how much of an answer each finds where it stands in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..maps import AttentionMap, without_autograd
from .layers import for_each_token, per_layer

__all__ = ["retrieval"]

Tokens = slice | Sequence[int]
"""Some tokens of a text, by their numbers."""


def retrieval(attention: Any, ids: Any, *, needle: Tokens, answer: Tokens) -> Any:
    """How much of an answer each head copies out of a text: the share of its tokens that the head looks at, 0 to 1.

    >>> import torch
    >>> from visualizer.analysis import retrieval
    >>> ids = [5, 7, 8, 1, 2, 5, 7, 8]                       # the needle, 7 8, comes again as the answer
    >>> copies, first = torch.eye(8)[[0, 0, 0, 0, 0, 1, 2, 0]], torch.eye(8)[[0] * 8]
    >>> retrieval(torch.stack([copies, first])[None], ids, needle=slice(1, 3), answer=slice(6, 8))
    tensor([[1., 0.]])

    Wu et al. 2024 (https://arxiv.org/abs/2404.15574): a head copies a token where the query that predicts it, the one
    before it, attends most to the same token inside the needle. On text that repeats, the score "induction" of
    `head_patterns` is its relative: it asks how much of the attention goes to what followed the same token before.

    Args:
        attention: one map, or layers of one shape, whose queries and keys are the tokens `ids`. The answer is part of
            the text: run the model once over all of it.
        ids: the tokens' numbers, (batch, tokens) or (tokens,).
        needle: which tokens hold what is to be found.
        answer: which tokens repeat it, without the first of the text, before which there is no query.

    Returns:
        (batch, heads); several layers are the first axis.

    Raises:
        ValueError: queries are not keys, `ids` does not fit the maps, or needle or answer has no token.
        IndexError: there is no such token.
    """
    return per_layer(attention, lambda layer: retrieval_of(layer, ids, needle, answer))


@without_autograd
def retrieval_of(layer: AttentionMap, ids: Any, needle: Tokens, answer: Tokens) -> Tensor:
    """The retrieval score of one layer's heads, (batch, heads)."""
    batch, _, queries, keys = layer.shape
    if queries != keys:
        raise ValueError(f"retrieval needs queries and keys that are the same tokens, not {queries} and {keys} of them")
    numbers = for_each_token("ids", ids, batch, keys).to(layer.device)
    source, target = layer.key_indices(needle), layer.key_indices(answer)
    if not len(source) or not len(target) or bool((target == 0).any()):
        raise ValueError(
            f"needle={needle!r} and answer={answer!r} are tokens of the text, at least one each, and the answer has a "
            "token before it"
        )
    rows = layer.rows(target - 1)  # (batch, heads, answer, keys)
    best = rows.argmax(-1)
    in_needle = torch.isin(best, source) & (rows.amax(-1) > 0)
    copied = numbers[:, None].expand(-1, best.shape[1], -1).gather(-1, best) == numbers[:, None, target]
    return (in_needle & copied).to(layer.dtype).mean(-1)

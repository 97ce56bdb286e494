"""What the rows of a map say: how broadly a query looks, how far, how surely, and at what.

Each analysis is two functions: `..._of` has the formula for one layer, which a statistic can use too, and the public
one applies it to every layer by `per_layer`, which raises ValueError for layers of different shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import few
from ..maps import AttentionMap, without_autograd
from ..places import grid_of
from ..reading import Reduction
from .layers import as_floats, check_heads, fused, layer_label, layers_of, like_input, per_layer

__all__ = [
    "TopKey",
    "attention_distance",
    "cls_attention",
    "confidence",
    "entropy",
    "mass_mask",
    "received",
    "sink",
    "top_keys",
]

_ROUNDING = 1e-12


def entropy(attention: Any) -> Any:
    """How broadly each query attends: the entropy of its row in nats, from 0 (one key) to ln(keys) (all keys alike).

    >>> import torch
    >>> from visualizer.analysis import entropy
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.0000, 0.6931]]])

    - sum_j A_ij ln A_ij, with 0 ln 0 = 0.

    Returns:
        (batch, heads, queries); several layers, of one shape, are the first axis.
    """
    return per_layer(attention, entropy_of)


def entropy_of(layer: AttentionMap) -> Tensor:
    """The entropy of each row, (batch, heads, queries)."""
    return layer.reduce(_entropies)


def _entropies(weights: Tensor) -> Tensor:
    # torch.special.entr takes three times as long. A weight below the smallest normal number adds nothing either way.
    return 0 - weights.clamp(min=torch.finfo(weights.dtype).tiny).log_().mul_(weights).sum(-1)


def received(attention: Any) -> Any:
    """How much attention each key gets: the mean of its column, from 0 to 1; over all keys the sum is 1.

    >>> import torch
    >>> from visualizer.analysis import received
    >>> received(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.7500, 0.2500]]])

    A first token that gets far more than 1/keys is an attention sink; `sink` gives the share of one key. Queries whose
    keys are all masked attend to nothing and do not count.

    Returns:
        (batch, heads, keys); several layers, of one shape, are the first axis.
    """
    return per_layer(attention, received_of)


def received_of(layer: AttentionMap, counts: Tensor | None = None) -> Tensor:
    """What each key of one layer gets, (batch, heads, keys), from the queries that count, (batch, queries), or all."""
    batch, _, queries, _ = layer.shape
    counts = torch.ones(batch, queries) if counts is None else counts
    columns = layer.row_product(counts.to(layer.device, layer.dtype))
    total = columns.sum(-1, keepdim=True)  # how many queries attend to something
    return columns / total.masked_fill_(total == 0, 1)


def sink(attention: Any, key: int = 0) -> Any:
    """How much attention one key gets: the mean over the queries of the weights that they give it, from 0 to 1.

    >>> import torch
    >>> from visualizer.analysis import sink
    >>> sink(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[0.7500]])

    In trained models a head sends attention that it has no use for to the first token (Xiao et al. 2023,
    https://arxiv.org/abs/2309.17453), in BERT to [SEP]. A head with a large sink does little.

    Args:
        attention: one map, or layers of one shape.
        key: which key; -1 is the last.

    Returns:
        (batch, heads); several layers are the first axis.

    Raises:
        ValueError: the layers differ in shape.
        IndexError: there is no such key.
    """
    return per_layer(attention, lambda layer: sink_of(layer, key))


def sink_of(layer: AttentionMap, key: int) -> Tensor:
    """What one key of one layer receives, (batch, heads)."""
    keys = layer.shape[3]
    if not -keys <= operator.index(key) < keys:
        raise IndexError(f"there is no key {key}: the map has {keys} keys")
    return received_of(layer)[..., key]


def confidence(attention: Any) -> Any:
    """How sure a head is: the mean over the queries of the largest weight in the row, from 1/keys to 1.

    >>> import torch
    >>> from visualizer.analysis import confidence
    >>> confidence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[0.7500]])

    Voita et al. 2019 (https://arxiv.org/abs/1905.09418). Queries whose keys are all masked attend to nothing and do not
    count.

    Returns:
        (batch, heads); several layers, of one shape, are the first axis.
    """
    return per_layer(attention, confidence_of)


def confidence_of(layer: AttentionMap) -> Tensor:
    """How sure the heads of one layer are, (batch, heads)."""
    largest = layer.reduce(lambda rows: rows.amax(-1))
    return largest.sum(-1) / (largest > 0).sum(-1).clamp(min=1)


def cls_attention(attention: Any, query: int = 0, *, prefix_tokens: int = 1) -> Any:
    """What the class token attends to among the patches: its row without the prefix tokens.

    >>> import torch
    >>> from visualizer.analysis import cls_attention
    >>> cls_attention(torch.randn(1, 6, 197, 197).softmax(-1)).shape
    torch.Size([1, 6, 196])

    The weights are not scaled: they sum to one minus what the prefix tokens get.

    Args:
        attention: one map, or layers of one shape.
        query: the token whose row is wanted.
        prefix_tokens: how many keys come before the patches.

    Returns:
        (batch, heads, keys - prefix_tokens); several layers are the first axis.

    Raises:
        ValueError: no patch is left, or the layers differ in shape.
        IndexError: there is no such query.
    """
    return per_layer(attention, lambda layer: cls_attention_of(layer, query, prefix_tokens))


def cls_attention_of(layer: AttentionMap, query: int, prefix_tokens: int) -> Tensor:
    """One row of one layer without the prefix tokens, (batch, heads, patches)."""
    keys = layer.shape[3]
    if not 0 <= prefix_tokens < keys:
        raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {keys} keys")
    return layer.rows([query])[:, :, 0, prefix_tokens:]


def attention_distance(
    attention: Any,
    grid: tuple[int, int] | None = None,
    *,
    patch_size: float = 1,
    prefix_tokens: int | None = None,
    renormalise: bool = True,
) -> Any:
    """How far a head looks over the picture: the mean distance between a patch and the patches that it attends to.

    >>> import torch
    >>> from visualizer.analysis import attention_distance
    >>> everywhere = torch.full((1, 1, 197, 197), 1 / 197)
    >>> attention_distance(everywhere, patch_size=16).round()  # in pixels of a picture of 224 x 224
    tensor([[116.]])
    >>> attention_distance(torch.eye(196).expand(1, 1, 196, 196))  # each patch sees itself
    tensor([[0.]])

    The mean over the patches i of sum_j A_ij * patch_size * |x_i - x_j|, where x is a patch's (row, column):
    Dosovitskiy et al. 2021, fig. 7 (https://arxiv.org/abs/2010.11929); Raghu et al. 2021
    (https://arxiv.org/abs/2108.08810).

    Args:
        attention: one map of self-attention over patches, or layers of one shape.
        grid: (rows, columns) of patches; None: the square that is left behind `prefix_tokens`.
        patch_size: the side of a patch in pixels, for a distance in pixels; 1 gives patches.
        prefix_tokens: how many tokens come before the patches; None: those that the grid leaves over; without a grid 0
            or 1, whichever leaves a square. They are left out, as queries and as keys.
        renormalise: whether a row's weights are scaled to sum to one over the patches. A row that gives the patches
            nothing is then left out of the mean; a head with no other rows has NaN. If False, attention to prefix
            tokens counts as distance 0.

    Returns:
        (batch, heads), in the unit of `patch_size`; several layers are the first axis.

    Raises:
        ValueError: queries and keys are not the same tokens, the grid does not fit them, or the layers differ in shape.
    """
    check_patch_size(patch_size)
    return per_layer(attention, lambda layer: distance_of(layer, grid, patch_size, prefix_tokens, renormalise))


def check_patch_size(patch_size: float) -> None:
    """Raise ValueError unless this is one number above 0."""
    if not isinstance(patch_size, (int, float)) or patch_size <= 0:
        raise ValueError(f"patch_size={patch_size!r} is one number above 0: the side of a square patch")


@without_autograd
def distance_of(
    layer: AttentionMap, grid: tuple[int, int] | None, patch_size: float, prefix_tokens: int | None, renormalise: bool
) -> Tensor:
    """The mean distance of one layer's heads, (batch, heads); see `attention_distance`."""
    batch, heads, queries, keys = layer.shape
    if queries != keys:
        raise ValueError(
            f"distances need queries and keys that are the same patches, not {queries} queries and {keys} keys"
        )
    places = grid_of(keys, {"grid": grid, "prefix_tokens": prefix_tokens})
    prefix = len(places.prefix)
    row = torch.arange(places.rows, device=layer.device, dtype=layer.dtype).repeat_interleave(places.columns)
    column = torch.arange(places.columns, device=layer.device, dtype=layer.dtype).repeat(places.rows)
    total = torch.zeros(batch, heads, dtype=layer.dtype, device=layer.device)
    counted = torch.zeros_like(total)
    for part, weights in layer.chunks():
        patch = slice(max(part.start - prefix, 0), max(part.stop - prefix, 0))  # these queries, counted as patches
        weights = weights[:, :, max(prefix - part.start, 0) :, prefix:]
        apart = torch.hypot(row[patch, None] - row, column[patch, None] - column)  # (some queries, patches)
        # One product gives both sums, so that the weights are read once. Its batch axis is the queries.
        factors = torch.stack([apart, torch.ones_like(apart)], -1)
        distances, mass = torch.bmm(weights.flatten(0, 1).transpose(0, 1), factors).unbind(-1)
        if renormalise:
            distances = torch.where(mass > 0, distances / mass, 0)
            counted += (mass > 0).sum(0).view(batch, heads)
        else:
            counted += len(distances)
        total += distances.sum(0).view(batch, heads)
    return patch_size * total / counted


@without_autograd
def mass_mask(weights: Any, share: float = 0.6) -> Any:
    """Which patches hold most of the attention: the fewest patches that together have a given share of it.

    >>> import torch
    >>> from visualizer.analysis import mass_mask
    >>> mass_mask(torch.tensor([0.1, 0.5, 0.2, 0.2]))
    tensor([False,  True,  True, False])

    Caron et al. 2021 (https://arxiv.org/abs/2104.14294) show what a class token looks at in this way, with share 0.6.

    Args:
        weights: (..., patches), none of them negative: from `cls_attention`, or a row of a rollout or relevance without
            the prefix tokens. They need not sum to one: the share is a share of their sum.
        share: above 0, at most 1.

    Returns:
        bool, with the shape of the weights and on their device. Of equal patches the first are taken; where all weights
        are 0, no patch is.

    Raises:
        ValueError: a weight is negative, NaN or infinite, or the share is out of its range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} is a share from above 0 to 1")
    values, is_array = as_floats(weights)
    values = values.double()
    if values.ndim == 0 or not bool((values >= 0).all()) or not bool(values.isfinite().all()):
        raise ValueError(
            f"weights are (..., patches) and not negative; these, of the shape {tuple(values.shape)}, "
            + ("have no axis" if values.ndim == 0 else "hold a negative number, NaN or infinity")
        )
    ordered = values.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    total = ordered.values.sum(-1, keepdim=True)
    # 0.6 of ten equal weights are six of them, whatever the last bit of their sum is.
    is_needed = (before < total * (share - _ROUNDING)) & (ordered.values > 0)
    return like_input(torch.zeros_like(is_needed).scatter(-1, ordered.indices, is_needed), is_array)


class TopKey(NamedTuple):
    """One of the keys that a query attends to most."""

    token: str
    """Its text; its number if no tokens were passed."""
    weight: float
    """How much the query attends to it, from 0 to 1."""
    key: int
    """Its number among the keys."""


@without_autograd
def top_keys(
    attention: Any,
    query: int | str,
    tokens: Sequence[str] | None = None,
    *,
    k: int = 3,
    heads: Reduction | int = "mean",
    batch: int = 0,
) -> list[list[TopKey]]:
    """The keys that a token attends to most, for each layer, best first.

    >>> import torch
    >>> from visualizer.analysis import top_keys
    >>> attention = torch.tensor([[0.8, 0.1, 0.1], [0.0, 0.3, 0.7], [0.2, 0.5, 0.3]]).expand(2, 1, 4, 3, 3)
    >>> [best] = top_keys(attention, "cat", ["the", "cat", "sat"], k=1)[0]
    >>> best.token, round(best.weight, 4), best.key
    ('sat', 0.7, 2)

    Args:
        attention: one map, or several as layers.
        query: the token's number (-1 is the last), or its text if `tokens` are passed.
        tokens: the text of each key.
        k: how many keys, or all if there are fewer.
        heads: how the heads of a layer become one map, or the number of one head.
        batch: which image or text.

    Returns:
        For each layer (a single map is one) a list of (token, weight, key).

    Raises:
        ValueError: there is not one token for each key, or not exactly one token with the query's text.
        IndexError: there is no such query, head or batch.
    """
    if isinstance(heads, str):
        check_heads(heads)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: pass how many keys, 1 or more")
    best_keys = []
    for number, layer in enumerate(layers_of(attention).layers):
        images, count, queries, keys = layer.shape
        if tokens is not None and len(tokens) != keys:
            raise ValueError(f"there are {len(tokens)} tokens for the {keys} keys of {layer_label(number, layer)}")
        for axis, index, size in (("batch", batch, images), ("head", heads, count)):
            if not isinstance(index, str) and not -size <= operator.index(index) < size:
                raise IndexError(f"there is no {axis} {index}: {layer_label(number, layer)} has {size} of them")
        rows = layer.rows([_query_number(query, tokens, queries)])
        row = fused(rows, heads)[batch, 0] if isinstance(heads, str) else rows[batch, heads, 0]
        best = row.topk(min(k, keys))
        best_keys.append(
            [
                TopKey(str(key) if tokens is None else str(tokens[key]), weight, key)
                for weight, key in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        )
    return best_keys


def _query_number(query: int | str, tokens: Sequence[str] | None, queries: int) -> int:
    """The number of a query, which was chosen by its number or by its text."""
    if not isinstance(query, str):
        return operator.index(query)
    if tokens is None or len(tokens) != queries:
        raise ValueError(f"query={query!r} is a text: pass the tokens of the {queries} queries, or a number")
    places = [place for place, token in enumerate(tokens) if token == query]
    if not places:
        raise ValueError(f"there is no token {query!r} among {few(tokens, 30)}")
    if len(places) > 1:
        raise ValueError(f"there are {len(places)} tokens {query!r}, at {places}: pass one of these numbers")
    return places[0]

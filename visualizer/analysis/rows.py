"""What the rows of a map say: how broadly a query looks, how far, how surely, and at what."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maps import AttentionMap, without_autograd
from .reading import Fusion, as_tensor, check_heads, each, fused, given, layers_of, name, patches

_ROUNDING = 1e-12


def entropy(attention: Any) -> Any:
    """How broadly each query attends: the entropy of its row in nats, 0 for one key to ln(keys) for all alike.

    >>> import torch
    >>> from visualizer.analysis import entropy
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.0000, 0.6931]]])

    - sum_j A_ij ln A_ij, with 0 ln 0 = 0.

    Returns:
        (batch, heads, queries); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
    """
    return each(attention, entropy_of)


def entropy_of(layer: AttentionMap) -> Tensor:
    """The entropy of each row, (batch, heads, queries)."""
    return layer.reduce(_entropies)


def _entropies(weights: Tensor) -> Tensor:
    # entr takes three times as long. Below the least normal number a weight's own share is nothing too.
    return 0 - weights.clamp(min=torch.finfo(weights.dtype).tiny).log_().mul_(weights).sum(-1)


def received(attention: Any) -> Any:
    """How much attention each key gets: the mean of its column, from 0 to 1; the keys' shares sum to one.

    >>> import torch
    >>> from visualizer.analysis import received
    >>> received(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.7500, 0.2500]]])

    A first token that gets far more than 1/keys is an attention sink; `sink` has its share alone. Queries that attend
    to nothing, because all keys are masked, do not count.

    Returns:
        (batch, heads, keys); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
    """

    return each(attention, received_of)


def received_of(layer: AttentionMap, counts: Tensor | None = None) -> Tensor:
    """What keys receive, (batch, heads, keys), from the queries that count, (batch, queries); None: from all."""
    batch, _, queries, _ = layer.shape
    counts = torch.ones(batch, queries) if counts is None else counts
    columns = layer.row_product(counts.to(layer.device, layer.dtype))
    total = columns.sum(-1, keepdim=True)  # as many as there are queries that attend to something
    return columns / total.masked_fill_(total == 0, 1)


def sink(attention: Any, key: int = 0) -> Any:
    """How much attention one key gets: the mean over the queries of what they give it, 0 to 1.

    >>> import torch
    >>> from visualizer.analysis import sink
    >>> sink(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[0.7500]])

    Trained models send what a head has no use for to the first token (Xiao et al. 2023,
    https://arxiv.org/abs/2309.17453), BERT to its [SEP]: heads with a large sink do little.

    Args:
        attention: one map, or layers of one shape.
        key: which key; -1 is the last.

    Returns:
        (batch, heads); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
        IndexError: there is no such key.
    """

    def share(layer: AttentionMap) -> Tensor:
        keys = layer.shape[3]
        if not -keys <= operator.index(key) < keys:
            raise IndexError(f"there is no key {key}: the map has {keys} keys")
        return received_of(layer)[..., key]

    return each(attention, share)


def confidence(attention: Any) -> Any:
    """How sure a head is: the largest weight of each row, in the mean over the queries, 1/keys to 1.

    >>> import torch
    >>> from visualizer.analysis import confidence
    >>> confidence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[0.7500]])

    Voita et al. 2019 (https://arxiv.org/abs/1905.09418). Queries that attend to nothing, because all keys are masked,
    do not count.

    Returns:
        (batch, heads); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
    """

    def surest(layer: AttentionMap) -> Tensor:
        largest = layer.reduce(lambda rows: rows.amax(-1))
        return largest.sum(-1) / (largest > 0).sum(-1).clamp(min=1)

    return each(attention, surest)


def cls_attention(attention: Any, query: int = 0, *, prefix_tokens: int = 1) -> Any:
    """What the class token attends to among the patches: its row without the tokens before them.

    >>> import torch
    >>> from visualizer.analysis import cls_attention
    >>> cls_attention(torch.randn(1, 6, 197, 197).softmax(-1)).shape
    torch.Size([1, 6, 196])

    The weights are as the layer has them, so they sum to one less what goes to the tokens that are left out.

    Args:
        attention: one map, or layers of one shape.
        query: the token whose row it is.
        prefix_tokens: how many keys come before the patches.

    Returns:
        (batch, heads, keys - prefix_tokens); with the layers first where there are several.

    Raises:
        ValueError: no patch is left, or the layers differ in shape.
        IndexError: there is no such query.
    """

    def row(layer: AttentionMap) -> Tensor:
        keys = layer.shape[3]
        if not 0 <= prefix_tokens < keys:
            raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {keys} keys")
        return layer.rows([query])[:, :, 0, prefix_tokens:]

    return each(attention, row)


def attention_distance(
    attention: Any,
    grid: tuple[int, int] | None = None,
    *,
    patch_size: float = 1,
    prefix_tokens: int | None = None,
    renormalise: bool = True,
) -> Any:
    """How far a head looks over the picture: the mean distance of a patch to what it attends to, weighted.

    >>> import torch
    >>> from visualizer.analysis import attention_distance
    >>> everywhere = torch.full((1, 1, 197, 197), 1 / 197)
    >>> attention_distance(everywhere, patch_size=16).round()  # in pixels of a picture of 224 x 224
    tensor([[116.]])
    >>> attention_distance(torch.eye(196).expand(1, 1, 196, 196))  # each patch sees itself
    tensor([[0.]])

    The mean over the patches i of sum_j A_ij * patch_size * |x_i - x_j|, with x a patch's (row, column): Dosovitskiy et
    al. 2021, fig. 7 (https://arxiv.org/abs/2010.11929); Raghu et al. 2021 (https://arxiv.org/abs/2108.08810).

    Args:
        attention: one map of self-attention over patches, or layers of one shape.
        grid: (rows, columns) of patches; None: the square that `prefix_tokens` leave.
        patch_size: the side of a patch, in the unit that the distance is to have: pixels; 1 gives patches.
        prefix_tokens: how many tokens come before the patches; None: what the grid leaves over, or none or one where
            that leaves a square. They are left out, as queries and as keys.
        renormalise: whether a row's weights are scaled to sum to one over the patches; a row that gives them nothing
            then stays out of the mean (and a head where all are so has NaN). Else what goes to the tokens before them
            counts as distance 0.

    Returns:
        (batch, heads), in the unit of `patch_size`; with the layers first where there are several.

    Raises:
        ValueError: queries and keys are not the same tokens, the grid does not fit them, or the layers differ in shape.
    """

    check_patch_size(patch_size)
    return each(attention, lambda layer: distance_of(layer, grid, patch_size, prefix_tokens, renormalise))


def check_patch_size(patch_size: float) -> None:
    """Raise ValueError unless this is the side of a patch."""
    if not isinstance(patch_size, (int, float)) or patch_size <= 0:
        raise ValueError(f"patch_size={patch_size!r} is one number above 0: the side of a square patch")


@without_autograd
def distance_of(
    layer: AttentionMap, grid: tuple[int, int] | None, patch_size: float, prefix_tokens: int | None, renormalise: bool
) -> Tensor:
    """The mean distance of one layer's heads, (batch, heads); see `attention_distance`."""
    batch, heads, queries, keys = layer.shape
    if queries != keys:
        raise ValueError(f"distances are those within one grid of patches, not of {queries} queries to {keys} keys")
    rows, columns, prefix = patches(keys, grid, prefix_tokens)
    row = torch.arange(rows, device=layer.device, dtype=layer.dtype).repeat_interleave(columns)
    column = torch.arange(columns, device=layer.device, dtype=layer.dtype).repeat(rows)
    total = torch.zeros(batch, heads, dtype=layer.dtype, device=layer.device)
    counted = torch.zeros_like(total)
    for part, weights in layer.chunks():
        own = slice(max(part.start - prefix, 0), max(part.stop - prefix, 0))  # as patches
        weights = weights[:, :, max(prefix - part.start, 0) :, prefix:]
        apart = torch.hypot(row[own, None] - row, column[own, None] - column)  # (some queries, patches)
        # Both sums in one reading of the weights: of what they are a product with, queries are the batch.
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
    """Which patches hold most of the attention: the fewest that together have a share of it.

    >>> import torch
    >>> from visualizer.analysis import mass_mask
    >>> mass_mask(torch.tensor([0.1, 0.5, 0.2, 0.2]))
    tensor([False,  True,  True, False])

    So DINO shows what a class token looks at, with 0.6: Caron et al. 2021 (https://arxiv.org/abs/2104.14294).

    Args:
        weights: (..., patches), none of them negative: what `cls_attention` gives, or a row of a rollout or relevance
            without its prefix tokens. They need not sum to one: the share is one of what there is.
        share: from above 0 to 1.

    Returns:
        bool, of the shape of the weights and on their device. Of patches that are alike the first are taken; where
        all weights are 0 there are none.

    Raises:
        ValueError: a weight is negative or no number, or the share is out of its range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} is a share from above 0 to 1")
    values, is_array = as_tensor(weights)
    values = values.double()
    if values.ndim == 0 or not bool((values >= 0).all()) or not bool(values.isfinite().all()):
        raise ValueError(
            f"weights are (..., patches) and not negative, and these, of the shape {tuple(values.shape)}, "
            + ("have no axis" if values.ndim == 0 else "hold a negative number, NaN or infinity")
        )
    ordered = values.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    total = ordered.values.sum(-1, keepdim=True)
    # Six tenths of ten that are alike are six of them, whatever the last bit of their sum is.
    is_needed = (before < total * (share - _ROUNDING)) & (ordered.values > 0)
    return given(torch.zeros_like(is_needed).scatter(-1, ordered.indices, is_needed), is_array)


class TopKey(NamedTuple):
    """One of the keys that a query attends to most."""

    token: str
    """Its text, or its number where no tokens were given."""
    weight: float
    """What the query gives it, from 0 to 1."""
    key: int
    """Where it is among the keys."""


@without_autograd
def top_keys(
    attention: Any,
    query: int | str,
    tokens: Sequence[str] | None = None,
    *,
    k: int = 3,
    heads: Fusion | int = "mean",
    batch: int = 0,
) -> list[list[TopKey]]:
    """What a token attends to most in each layer: for every layer its best keys, best first.

    >>> import torch
    >>> from visualizer.analysis import top_keys
    >>> attention = torch.tensor([[0.8, 0.1, 0.1], [0.0, 0.3, 0.7], [0.2, 0.5, 0.3]]).expand(2, 1, 4, 3, 3)
    >>> [best] = top_keys(attention, "cat", ["the", "cat", "sat"], k=1)[0]
    >>> best.token, round(best.weight, 4), best.key
    ('sat', 0.7, 2)

    Args:
        attention: one map, or several as layers.
        query: the token's number, or its text where there are tokens; -1 is the last.
        tokens: the text of each key.
        k: how many keys; where there are fewer, all.
        heads: how the heads of a layer become one map, or the number of one head.
        batch: which image or text.

    Returns:
        For each layer (one for a single map) a list of (token, weight, key).

    Raises:
        ValueError: there is not one token for each key, or none of the text, or more than one.
        IndexError: there is no such query, head or batch.
    """
    maps, _, _ = layers_of(attention)
    if isinstance(heads, str):
        check_heads(heads)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: pass how many keys, 1 or more")
    found = []
    for number, layer in enumerate(maps):
        images, own_heads, queries, keys = layer.shape
        if tokens is not None and len(tokens) != keys:
            raise ValueError(f"there are {len(tokens)} tokens for the {keys} keys of {name(number, layer)}")
        for what, index, size in (("batch", batch, images), ("head", heads, own_heads)):
            if not isinstance(index, str) and not -size <= operator.index(index) < size:
                raise IndexError(f"there is no {what} {index}: {name(number, layer)} has {size} of them")
        rows = layer.rows([_the_query(query, tokens, queries)])
        row = fused(rows, heads)[batch, 0] if isinstance(heads, str) else rows[batch, heads, 0]
        best = row.topk(min(k, keys))
        found.append(
            [
                TopKey(str(key) if tokens is None else str(tokens[key]), weight, key)
                for weight, key in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        )
    return found


def _the_query(query: int | str, tokens: Sequence[str] | None, queries: int) -> int:
    """The number of a query that is told by number or by its text."""
    if not isinstance(query, str):
        return operator.index(query)
    if tokens is None or len(tokens) != queries:
        raise ValueError(f"query={query!r} is a text: pass the tokens of the {queries} queries, or a number")
    places = [place for place, token in enumerate(tokens) if token == query]
    if not places:
        listing = ", ".join(map(repr, tokens[:30])) + (" ..." if len(tokens) > 30 else "")
        raise ValueError(f"there is no token {query!r} among {listing}")
    if len(places) > 1:
        raise ValueError(f"the token {query!r} is there {len(places)} times, as numbers {places}: pass one of these")
    return places[0]

"""What the rows of a map say: how broadly a query looks, how far, how surely, and at what.

Padding that a map knows, as recorded maps do where the model was given a mask, does not count.

Each analysis is two functions: `..._of` has the formula for one layer, which a statistic can use too, and the public
one applies it to every layer by `per_layer`, which raises ValueError for layers of different shapes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ALL_WORDS
from ..layout import Layout, Patches, layout_of
from ..maps import AttentionMap, without_autograd
from ..reading import Reduction
from ..words import readable, word_index, word_list
from .layers import (
    as_floats,
    check_heads,
    fused,
    layer_label,
    layers_of,
    like_input,
    per_layer,
    pools_patches,
    real_tokens,
)

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

Along: TypeAlias = Literal["space", "time"]
"""What distances are measured along."""

_ROUNDING = 1e-12


def entropy(attention: Any) -> Any:
    """How broadly each query attends: the entropy of its row in nats, from 0 (one key) to ln(keys) (all keys alike).

    >>> import torch
    >>> from visualizer.analysis import entropy
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.0000, 0.6931]]])

    - sum_j A_ij ln A_ij, with 0 ln 0 = 0. A query whose keys are all masked attends to nothing: NaN; so is one that is
    known to be padding.

    Returns:
        (batch, heads, queries); take means with `nanmean`. Several layers, of one shape, are the first axis.
    """
    return per_layer(attention, entropy_of)


def entropy_of(layer: AttentionMap, counts: Tensor | None = None) -> Tensor:
    """The entropy of each row, (batch, heads, queries); NaN for the queries that do not count."""
    entropies, counts = layer.reduce(_entropies), _counting(layer, counts)
    return entropies if counts is None else entropies.masked_fill(~counts.to(entropies.device)[:, None], math.nan)


def _counting(layer: AttentionMap, counts: Tensor | None) -> Tensor | None:
    """The queries that count, (batch, queries); where nobody says it, those that are known not to be padding."""
    return real_tokens(layer.query_layout, layer.shape[0], layer.shape[2]) if counts is None else counts


def _entropies(weights: Tensor) -> Tensor:
    # torch.special.entr takes three times as long. A weight below the smallest normal number adds nothing either way.
    sums = weights.clamp(min=torch.finfo(weights.dtype).tiny).log_().mul_(weights).sum(-1)
    # Only a row with one key, or with none, has a sum of 0.
    is_empty = (sums == 0) & (_largest(weights) == 0) if bool((sums == 0).any()) else None
    return 0 - sums if is_empty is None else (0 - sums).masked_fill_(is_empty, math.nan)


def _largest(weights: Tensor) -> Tensor:
    """The largest weight of each row; 0 where there are no keys."""
    return weights.amax(-1) if weights.shape[-1] else weights.sum(-1)


def received(attention: Any) -> Any:
    """How much attention each key gets: the mean of its column, from 0 to 1; over all keys the sum is 1.

    >>> import torch
    >>> from visualizer.analysis import received
    >>> received(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.7500, 0.2500]]])

    A first token that gets far more than 1/keys is an attention sink; `sink` gives the share of one key. Queries whose
    keys are all masked attend to nothing and do not count; where no query is left there is NaN.

    Returns:
        (batch, heads, keys); several layers, of one shape, are the first axis.
    """
    return per_layer(attention, received_of)


def received_of(layer: AttentionMap, counts: Tensor | None = None) -> Tensor:
    """What each key of one layer gets from the queries that count, (batch, heads, keys)."""
    batch, _, queries, _ = layer.shape
    counts = _counting(layer, counts)
    counts = torch.ones(batch, queries) if counts is None else counts
    columns = layer.row_product(counts.to(layer.device, layer.dtype))
    return columns / columns.sum(-1, keepdim=True)  # how many queries attend to something


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
    return per_layer(attention, lambda layer: received_of(layer)[..., int(layer.key_indices(operator.index(key))[0])])


def confidence(attention: Any) -> Any:
    """How sure a head is: the mean over the queries of the largest weight in the row, from 1/keys to 1.

    >>> import torch
    >>> from visualizer.analysis import confidence
    >>> confidence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[0.7500]])

    Voita et al. 2019 (https://arxiv.org/abs/1905.09418). Queries whose keys are all masked attend to nothing and do not
    count; where no query is left there is NaN.

    Returns:
        (batch, heads); several layers, of one shape, are the first axis.
    """
    return per_layer(attention, confidence_of)


def confidence_of(layer: AttentionMap, counts: Tensor | None = None) -> Tensor:
    """How sure the heads of one layer are in the queries that count, (batch, heads)."""
    largest, counts = layer.reduce(_largest), _counting(layer, counts)
    if counts is not None:
        largest = largest * counts.to(largest.device)[:, None]
    return largest.sum(-1) / (largest > 0).sum(-1)


def cls_attention(attention: Any, query: int = 0, *, prefix_tokens: int | None = None) -> Any:
    """What the class token attends to among the patches: its row without the prefix tokens.

    >>> import torch
    >>> from visualizer.analysis import cls_attention
    >>> cls_attention(torch.randn(1, 6, 197, 197).softmax(-1)).shape
    torch.Size([1, 6, 196])

    The weights are not scaled: they sum to one minus what the prefix tokens get.

    Args:
        attention: one map, or layers of one shape.
        query: the token whose row is wanted.
        prefix_tokens: how many keys come before the patches; None: those that the map knows, or else 1.

    Returns:
        (batch, heads, keys - prefix_tokens); several layers are the first axis.

    Raises:
        ValueError: no patch is left, or the layers differ in shape.
        IndexError: there is no such query.
    """
    return per_layer(attention, lambda layer: cls_attention_of(layer, query, prefix_tokens))


def cls_attention_of(layer: AttentionMap, query: int, prefix_tokens: int | None) -> Tensor:
    """One row of one layer without the prefix tokens, (batch, heads, patches)."""
    count, keys = prefix_of(layer, prefix_tokens), layer.shape[3]
    if not 0 <= count < keys:
        raise ValueError(f"prefix_tokens={count!r} does not leave a patch among {keys} keys")
    return layer.rows([query])[:, :, 0, count:]


def prefix_of(layer: AttentionMap, prefix_tokens: int | None) -> int:
    """How many keys come before the patches: as many as is said, or else those that the map knows, or else 1."""
    if prefix_tokens is not None:
        return prefix_tokens
    return 1 if layer.layout is None or layer.layout.patches is None else layer.layout.first_patch


def attention_distance(
    attention: Any,
    grid: tuple[int, int] | None = None,
    *,
    patch_size: float = 1,
    prefix_tokens: int | None = None,
    renormalise: bool = True,
    layout: Layout | None = None,
    along: Along = "space",
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
        grid: (rows, columns) of patches; None: what the map knows, or else the square that is left behind
            `prefix_tokens`.
        patch_size: the side of a patch in pixels, for a distance in pixels; 1 gives patches.
        prefix_tokens: how many tokens come before the patches; None: those that the grid leaves over; without a grid 0
            or 1, whichever leaves a square. They are left out, as queries and as keys.
        renormalise: whether a row's weights are scaled to sum to one over the patches. A row that gives the patches
            nothing is then left out of the mean; a head with no other rows has NaN. If False, attention to prefix
            tokens counts as distance 0; a row that attends to nothing at all is left out.
        layout: what the tokens are, in place of `grid` and `prefix_tokens`.
        along: of a video, whose patches are (frames, rows, columns): "space": rows and columns only; "time": frames
            only, in frames of the model. A volume has its depth in their place.

    Returns:
        (batch, heads), in the unit of `patch_size`; several layers are the first axis. Layers that attend within
        windows measure within these: the batch is that of the images. A head that pools the patches, as SigLIP's, has
        no place to measure from, and is left out.

    Raises:
        ValueError: queries and keys are not the same tokens, the grid does not fit them, or the layers differ in shape.
    """
    check_patch_size(patch_size)
    where: Patches = {"layout": layout, "grid": grid, "prefix_tokens": prefix_tokens}
    if isinstance(attention, Sequence) and len(attention) > 1 and all(isinstance(a, AttentionMap) for a in attention):
        attention = [layer for layer in attention if not pools_patches(layer, attention[0])]
    return per_layer(attention, lambda layer: distance_of(layer, where, patch_size, renormalise, along))


def check_patch_size(patch_size: float) -> None:
    """Raise ValueError unless this is one number above 0."""
    if not isinstance(patch_size, (int, float)) or patch_size <= 0:
        raise ValueError(f"patch_size={patch_size!r} is one number above 0: the side of a square patch")


@without_autograd
def distance_of(
    layer: AttentionMap, where: Patches, patch_size: float, renormalise: bool, along: Along = "space"
) -> Tensor:
    """The mean distance of one layer's heads, (batch, heads); see `attention_distance`."""
    queries, keys = layer.shape[2:]
    if queries != keys:
        raise ValueError(
            f"distances need queries and keys that are the same patches, not {queries} queries and {keys} keys"
        )
    layout = layout_of(keys, where, None, layer.layout)
    patches, prefix = layout.patches, layout.first_patch
    if patches is None or prefix + patches.count != layout.count:
        raise ValueError(f"distances are those between the patches of a picture, and these tokens are {layout}")
    if along not in ("space", "time") or (along == "time" and len(patches.shape) == 2):
        raise ValueError(f"along={along!r}: pass 'space', or of a video 'time'; these tokens are {layout}")
    axes = layout.coordinates()
    axes = axes[:, :1] if along == "time" else axes[:, -2:]
    unit = 1 if along == "time" else patch_size
    if layout.windows is not None:
        return unit * _distance_in_windows(layer, layout.windows.places(*patches.shape), axes, renormalise)
    return unit * _distance(layer, torch.from_numpy(axes), prefix, renormalise)


def _distance_in_windows(
    layer: AttentionMap, places: npt.NDArray[np.intp], axes: npt.NDArray[np.float64], renormalise: bool
) -> Tensor:
    """The mean distance over the windows of each image, (images, heads), by the patch that each token is; -1: none."""
    if layer.shape[0] % len(places):
        raise ValueError(f"there are {layer.shape[0]} windows, not a multiple of the {len(places)} of the grid")
    is_patch = torch.from_numpy(places >= 0).to(layer.device)[:, None]  # (windows, 1, tokens)
    at = torch.from_numpy(axes[places]).to(layer.device, layer.dtype)
    apart = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")[:, None]
    weights = layer.dense().view(-1, len(places), *layer.shape[1:])  # (images, windows, heads, queries, keys)
    weights = weights * is_patch[..., None, :]
    mass, distances = weights.sum(-1), (weights * apart).sum(-1)
    counts = is_patch & (mass > 0)
    distances = torch.where(counts, distances / mass if renormalise else distances, 0)
    return distances.sum((1, 3)) / counts.sum((1, 3))


def _distance(layer: AttentionMap, axes: Tensor, prefix: int, renormalise: bool) -> Tensor:
    """The mean distance between tokens at these places, (tokens behind the prefix, axes), by each head."""
    batch, heads = layer.shape[:2]
    axes = axes.to(layer.device, layer.dtype)
    total = torch.zeros(batch, heads, dtype=layer.dtype, device=layer.device)
    counted = torch.zeros_like(total)
    for part, weights in layer.chunks():
        patch = slice(max(part.start - prefix, 0), max(part.stop - prefix, 0))  # these queries, counted as patches
        weights = weights[:, :, max(prefix - part.start, 0) :]
        attends = weights[..., :prefix].sum(-1).flatten(0, 1).T > 0
        weights = weights[..., prefix:]
        apart = torch.cdist(axes[patch], axes, compute_mode="donot_use_mm_for_euclid_dist")  # (some queries, patches)
        # One product gives both sums, so that the weights are read once. Its batch axis is the queries.
        factors = torch.stack([apart, torch.ones_like(apart)], -1)
        distances, mass = torch.bmm(weights.flatten(0, 1).transpose(0, 1), factors).unbind(-1)
        if renormalise:
            distances = torch.where(mass > 0, distances / mass, 0)
            counted += (mass > 0).sum(0).view(batch, heads)
        else:
            counted += (attends | (mass > 0)).sum(0).view(batch, heads)
        total += distances.sum(0).view(batch, heads)
    return total / counted


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
    """Its text or its name; its number where these are not known."""
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
        query: the token's number (-1 is the last), or its text.
        tokens: the text of each key; None: what the map knows, as that of `attention(model, tokenizer=...)` does, or
            numbers. Padding that it knows is left out.
        k: how many keys, or all if there are fewer.
        heads: how the heads of a layer become one map, or the number of one head.
        batch: which image or text.

    Returns:
        For each layer (a single map is one) a list of (token, weight, key); an empty one if the query attends to
        nothing.

    Raises:
        ValueError: there is not one token for each key, or not exactly one token with the query's text.
        IndexError: there is no such query, head or batch.
    """
    if isinstance(heads, str):
        check_heads(heads)
    tokens = None if tokens is None else word_list(tokens)
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}: pass how many keys, 1 or more")
    best_keys = []
    for number, layer in enumerate(layers_of(attention).layers):
        images, count, queries, keys = layer.shape
        if tokens is not None and len(tokens) != keys:
            what = f"there are {len(tokens)} tokens for the {keys} keys of {layer_label(number, layer)}"
            raise ValueError(f"{what}: {ALL_WORDS}")
        for axis, index, size in (("batch", batch, images), ("head", heads, count)):
            if axis == "batch" and isinstance(index, str):
                raise TypeError(f"batch={index!r}: pass the number of one image or text")
            if not isinstance(index, str) and not -size <= operator.index(index) < size:
                raise IndexError(f"there is no {axis} {index}: {layer_label(number, layer)} has {size} of them")
        known, of_queries = (
            layout.of(batch) if layout is not None and not layout.windows else None
            for layout in (layer.layout, layer.query_layout)
        )
        names = readable(tokens) if tokens is not None else None if known is None else known.names
        asked = names if tokens is not None or of_queries is None else of_queries.names
        rows = layer.rows([_query_number(query, asked, queries)])
        row = fused(rows, heads)[batch, 0] if isinstance(heads, str) else rows[batch, heads, 0]
        count = min(k, keys) if bool(row.any()) else 0
        if known is not None:  # a model may let words look at padding
            padding = torch.from_numpy(known.are("padding")).to(row.device)
            row, count = row.masked_fill(padding, -1), min(count, int((~padding).sum()))
        best = row.topk(count)
        best_keys.append(
            [
                TopKey(str(key) if names is None else names[key], weight, key)
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
    return word_index(query, tokens)

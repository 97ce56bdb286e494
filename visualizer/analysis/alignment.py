"""Which keys each query of an encoder-decoder belongs to, where both run in the same order: words and their sound."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ..maps import AttentionMap, generated_maps, is_generation, without_autograd
from .layers import layer_label, layers_of, per_layer

__all__ = ["Alignment", "align", "monotony"]

Chosen = int | slice | Sequence[int] | Tensor
"""Some queries or keys, as `AttentionMap.rows` takes them."""

_SHARE = 0.5  # of the best head's monotony: more heads average their errors out, and fewer are no better


@dataclass(repr=False, eq=False)
class Alignment:
    """Which keys each query belongs to; made by `align`."""

    path: npt.NDArray[np.int64]
    """(steps, 2): the path through all queries and keys, a (query, key) a step. Both begin at 0 and never go back."""
    spans: npt.NDArray[np.float64]
    """(queries, 2): where each query begins and ends among the keys, in seconds if `seconds_per_key` was passed."""
    heads: list[tuple[int, int]]
    """The heads that were read, as (layer, head)."""
    weights: npt.NDArray[np.float64]
    """(queries, keys): what the path makes as large as it can. Not shares: a number is high where a query gives a key
    more than other queries do."""

    def __repr__(self) -> str:
        queries, keys = self.weights.shape
        return f"<Alignment of {queries} queries and {keys} keys by {len(self.heads)} heads>"


@without_autograd
def align(
    attention: Any,
    heads: Sequence[tuple[int, int]] | Literal["find"] = "find",
    *,
    queries: Chosen = slice(None),
    keys: Chosen = slice(None),
    seconds_per_key: float = 1,
    median: int = 7,
    batch: int = 0,
) -> Alignment:
    """Which keys each query belongs to, where both run in the same order, as the words of a text and their sound.

    >>> import torch
    >>> from visualizer.analysis import align
    >>> sound = torch.eye(3).repeat_interleave(2, 1) + 0.1       # each of three words has two frames of the sound
    >>> found = align((sound / sound.sum(-1, keepdim=True))[None, None], [(0, 0)], seconds_per_key=0.02, median=1)
    >>> found.spans
    array([[0.  , 0.04],
           [0.04, 0.08],
           [0.08, 0.12]])

    As Whisper times its words (https://github.com/openai/whisper): the rows of some heads are scaled to sum to one over
    `keys`, each key's column is standardised over all queries of the map (what every query gives to a key says
    nothing), a median filter smooths the rows, the heads are averaged, and dynamic time warping finds the path of
    the largest sum. Whisper's own heads are in its `generation_config.alignment_heads`.

    Args:
        attention: layers, or one map. Where some are cross attention, only these are read and counted: layer 0 is the
            first of them. Where a module was called for one query after another, as in `generate`, its calls are one
            layer, with the queries in their order.
        heads: (layer, head) of those to read, or "find": the heads whose `monotony` over `queries` and `keys` is at
            least half of that of the best. They are not always Whisper's, and not worse.
        queries: which queries to align, in their order: those of the words, without the tokens that start the output.
        keys: which keys to align, in their order: those of the sound, without the padding behind it.
        seconds_per_key: how long a key lasts, for spans in seconds; 0.02 for Whisper. By default spans are in keys.
        median: the width of the median filter in keys, an odd number; 1 smooths nothing.
        batch: which sequence.

    Returns:
        The path, each query's span, and the heads. The `queries` and `keys` are counted from 0.

    Raises:
        ValueError: `heads` is empty, no head follows the order, `median` is even, no query or no key is left, or the
            layers differ in their queries and keys.
        IndexError: there is no such layer, head, batch, query or key.
    """
    layers = _cross_layers(attention)
    if isinstance(heads, str) and heads != "find":
        raise ValueError(f'heads={heads!r}: pass "find", or (layer, head) pairs')
    if median < 1 or median % 2 == 0:
        raise ValueError(f"median={median!r} is the width of a filter around a key: an odd number, 1 for none")
    sequences = layers[0].shape[0]
    if not -sequences <= operator.index(batch) < sequences:
        raise IndexError(f"there is no batch {batch}: there are {sequences}")
    wanted, kept = layers[0].query_indices(queries).cpu(), layers[0].key_indices(keys).cpu()
    if not len(wanted) or not len(kept):
        raise ValueError(f"there is nothing to align: {len(wanted)} queries and {len(kept)} keys are left")
    chosen = _found(layers, queries, keys, batch) if isinstance(heads, str) else _checked(heads, layers)
    total: Tensor | int = 0
    of_layer: dict[int, Tensor] = {}  # one layer at a time
    for layer, head in chosen:
        if layer not in of_layer:
            of_layer = {layer: layers[layer].rows(slice(None))[batch].cpu()}
        rows = of_layer[layer][head][:, kept].double()  # (all queries, the chosen keys)
        rows = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        deviation = rows.std(0, correction=0)
        rows = (rows - rows.mean(0)) / deviation.masked_fill(deviation == 0, 1)
        total = total + _median_filtered(rows, median)[wanted]
    weights = np.asarray(total / len(chosen))
    path = _best_path(weights)
    first = np.searchsorted(path[:, 0], np.arange(len(weights)))
    last = np.searchsorted(path[:, 0], np.arange(len(weights)), side="right") - 1
    spans = np.stack([path[first, 1], path[last, 1] + 1], 1) * float(seconds_per_key)
    return Alignment(path, spans, chosen, weights)


def monotony(attention: Any, *, queries: Chosen = slice(None), keys: Chosen = slice(None)) -> Any:
    """How surely later queries attend to later keys: 1 always, 0 as often as not, -1 always to earlier ones.

    >>> import torch
    >>> from visualizer.analysis import monotony
    >>> monotony(torch.stack([torch.eye(5), torch.eye(5).flip(0), torch.full((5, 5), 0.2)])[None])
    tensor([[ 1., -1.,  0.]])

    Of two queries each picks a key, by its weights. The score is the probability that the later query's key is the
    later one, minus that it is the earlier one, as a mean over all pairs of queries: Kendall's tau, of picks. A head
    that sends all queries to one key has 0. Queries that give `keys` nothing do not count.

    Args:
        attention: one map, or layers of one shape.
        queries, keys: which of them; see `align`.

    Returns:
        (batch, heads); several layers are the first axis. NaN where fewer than two queries count.

    Raises:
        ValueError: the layers differ in shape.
        IndexError: there is no such query or key.
    """
    return per_layer(attention, lambda layer: monotony_of(layer, queries, keys))


@without_autograd
def monotony_of(layer: AttentionMap, queries: Chosen, keys: Chosen) -> Tensor:
    """The monotony of one layer's heads, (batch, heads)."""
    rows = layer.rows(queries)[..., layer.key_indices(keys)]  # (batch, heads, queries, keys)
    mass = rows.sum(-1, keepdim=True)
    counts = (mass[..., 0] > 0).to(rows.dtype)
    rows = torch.where(mass > 0, rows / mass, 0)
    before = rows.cumsum(-1) - rows  # what each query gives to the keys before each key
    is_later = rows @ before.mT  # entry i, j: the probability that the key of query i is after that of query j
    pairs = (counts.sum(-1) * (counts.sum(-1) - 1)) / 2
    total = (is_later - is_later.mT).tril(-1).sum((-2, -1))
    return torch.where(pairs > 0, total / pairs, math.nan)


def _cross_layers(attention: Any) -> list[AttentionMap]:
    """The layers of cross attention, or all if none is known to be; ValueError unless their queries and keys match."""
    layers = layers_of(attention).layers
    layers = [layer for layer in layers if layer.kind == "cross"] or layers
    calls: dict[str, list[AttentionMap]] = {}
    for layer in layers:
        calls.setdefault(layer.path, []).append(layer)
    if is_generation(calls):  # steps that were picked out of what was recorded
        layers = [*itertools.chain(*generated_maps(calls, are_new=False).values())]
    for number, layer in enumerate(layers):
        if layer.shape[0] != layers[0].shape[0] or layer.shape[2:] != layers[0].shape[2:]:
            raise ValueError(
                f"an alignment reads heads of the same queries and keys, and {layer_label(0, layers[0])} has the shape "
                f"{layers[0].shape}, {layer_label(number, layer)} {layer.shape}. Leave such layers out"
            )
    return layers


def _found(layers: list[AttentionMap], queries: Chosen, keys: Chosen, batch: int) -> list[tuple[int, int]]:
    """The heads that follow the order best, from the first layer to the last."""
    scores = [monotony_of(layer, queries, keys)[batch].cpu() for layer in layers]
    best = max((float(one) for score in scores for one in score.nan_to_num(0)), default=0)
    if best <= 0:
        raise ValueError("no head follows the order of the queries along the keys: pass heads=[(layer, head), ...]")
    return [
        (layer, head)
        for layer, score in enumerate(scores)
        for head in range(len(score))
        if float(score[head]) >= _SHARE * best
    ]


def _checked(heads: Sequence[tuple[int, int]], layers: list[AttentionMap]) -> list[tuple[int, int]]:
    chosen = [(operator.index(layer), operator.index(head)) for layer, head in heads]
    if not chosen:
        raise ValueError('heads is empty: pass (layer, head) pairs, or "find"')
    for layer, head in chosen:
        if not 0 <= layer < len(layers) or not 0 <= head < layers[layer].shape[1]:
            have = f"{len(layers)} layers" if not 0 <= layer < len(layers) else f"{layers[layer].shape[1]} heads"
            raise IndexError(f"there is no head {(layer, head)}: there are {have}")
    return chosen


def _median_filtered(rows: Tensor, width: int) -> Tensor:
    """Each number replaced by the median of those around it in its row, which is mirrored at its ends."""
    reach = width // 2
    if not reach or rows.shape[-1] <= reach:  # a row that cannot be mirrored so far is left as it is
        return rows
    return F.pad(rows[None], (reach, reach), mode="reflect")[0].unfold(-1, width, 1).median(-1).values


def _best_path(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The path with the largest sum from the first query and key to the last, by one query, one key or both a step.

    Dynamic programming over the antidiagonals, whose entries do not depend on each other.
    """
    queries, keys = weights.shape
    best = np.full((queries + 1, keys + 1), -np.inf)
    best[0, 0] = 0
    step = np.zeros((queries, keys), np.int8)
    for diagonal in range(queries + keys - 1):
        query = np.arange(max(0, diagonal - keys + 1), min(queries, diagonal + 1))
        key = diagonal - query
        # From both one before, the query before, the key before. Of equal ones the last is taken, as Whisper does.
        before = np.stack([best[query, key], best[query, key + 1], best[query + 1, key]])
        step[query, key] = 2 - before[::-1].argmax(0)
        best[query + 1, key + 1] = weights[query, key] + before.max(0)
    query, key = queries - 1, keys - 1
    path = [(query, key)]
    while query or key:
        move = step[query, key]
        query, key = query - int(move != 2), key - int(move != 1)
        path.append((query, key))
    return np.array(path[::-1], np.int64)

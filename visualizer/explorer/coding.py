"""Attention maps as the bytes that a page carries: one byte a weight, and the largest weights of each row exactly.

A weight p in a row with the largest weight m becomes the byte round(-ln(p / m) / STEP). Equal steps of the logarithm
have equal relative errors: at most 1.5 %, and half of that in the median. Equal steps of p or of its root would lose
the small weights. A weight below m / 2000 has code 255 and counts as zero. The largest weights are sent unchanged too,
so their values and their order are exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..analysis.sinks import common_sinks
from ..maps import AttentionMap
from ..reading import RowCheck, check_least
from .sides import Side

STEP = 0.03
"""By how much the logarithm of a weight falls from one code to the next."""
NOTHING = 255
"""The code of a weight that counts as zero."""
TOP = 6
"""How many weights of each row are sent exactly."""
_SAMPLE = 1_000_000
"""How many codes tell how well the others can be packed."""
MAX_CODES = 160_000_000
"""The most bytes that one example may take in a browser's memory; above it, neighbouring tokens are pooled."""

Array: TypeAlias = npt.NDArray[np.float32]

WEIGHTS: Array = np.where(np.arange(256) == NOTHING, 0, np.exp(-STEP * np.arange(256))).astype(np.float32)
"""The weight of each code, as a share of the largest weight of its row."""


@dataclass(frozen=True)
class Example:
    """One text or picture with its coded maps."""

    title: str
    layers: list[str]
    """The path of each layer's module, or ""."""
    sides: tuple[Side, Side]
    """Queries and keys; one object if both are the same tokens."""
    is_one_space: bool
    """Whether all layers attend within the same tokens, so that their maps can be multiplied."""
    codes: npt.NDArray[np.uint8]
    """(layers, heads, queries, keys)."""
    top: Array
    """(layers, heads, queries, TOP or fewer): the largest weights of each row, best first."""
    top_keys: npt.NDArray[np.uint16]
    """The keys of these weights."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the page must know about the numbers."""
    sinks: list[int] = field(default_factory=list)
    """Keys that are sinks in the mean of all heads: a scale that reached their weights would show nothing else."""
    has_sinks: bool = True
    """Whether sinks are among the weights; else they were removed."""
    part: str = ""
    """Where all keys lie that the page has, if the rows have others too."""
    has_mean: bool = False
    """Whether the last layer is the mean of the others."""
    opens: int = 0
    """Whether the page opens on a query, 0, or on a key, 1."""


def code_maps(
    layers: Sequence[AttentionMap],
    images: Sequence[int],
    sides: Sequence[tuple[Side, Side]],
    titles: Sequence[str],
    part: str = "",
) -> list[Example]:
    """An example for each of the chosen images of the batch.

    `part` says where the keys lie, where these are some of those that the rows are shared among.

    Raises ValueError for weights that are negative or infinite. Warns of rows with NaN and of rows that do not sum to
    one.
    """
    _, heads, queries, keys = layers[0].shape
    factor, most_keys = 1, np.iinfo(np.uint16).max
    while (
        len(layers) * heads * -(-queries // factor) * -(-keys // factor) > MAX_CODES or -(-keys // factor) > most_keys
    ):
        factor += 1
    pooled, examples = [], []
    for query_side, key_side in sides:
        first = query_side.pool(factor)
        pooled.append((first, first if key_side is query_side else key_side.pool(factor)))
    for title, ((query_side, _), (key_side, _)) in zip(titles, pooled, strict=True):
        shape = len(layers), heads, query_side.size, key_side.size
        count = min(TOP, shape[3])
        examples.append(
            Example(
                title,
                [layer.path for layer in layers],
                (query_side, key_side),
                queries == keys and query_side is key_side and all(layer.kind in (None, "self") for layer in layers),
                np.empty(shape, np.uint8),
                np.empty((*shape[:3], count), np.float32),
                np.empty((*shape[:3], count), np.uint16),
                _pooling_notes(factor, query_side, key_side),
                part=part,
            )
        )
    are_sinks = common_sinks(layers).numpy()
    for image, example, (_, (_, groups)) in zip(images, examples, pooled, strict=True):
        example.sinks.extend(sorted({int(group) for group in groups[are_sinks[image]]}))
    check = RowCheck()
    for number, layer in enumerate(layers):
        sums: list[Array] = [np.zeros(example.codes.shape[1:], np.float32) for example in examples if factor > 1]
        for queried, rows in layer.chunks():
            for at, image in enumerate(images):
                weights = rows[image].cpu().numpy().astype(np.float32)  # (heads, some queries, keys)
                weights = _without_nan(weights, check, f"layer {number}", layer.may_lack_weight)
                if factor > 1:
                    (_, query_groups), (_, key_groups) = pooled[at]
                    _add_pooled(sums[at], weights, query_groups, key_groups, queried)
                else:
                    _code(examples[at], number, queried, weights)
        for example, whole in zip(examples, sums, strict=False):
            _code(example, number, slice(0, whole.shape[1]), whole)
    if not part:
        check.warn("shown as zeros", "shown")
    return examples


def _pooling_notes(factor: int, queries: Side, keys: Side) -> list[str]:
    if factor == 1:
        return []
    what = {
        f"{factor} x {factor} neighbouring patches" if side.grid else f"{factor} neighbouring tokens"
        for side in (queries, keys)
    }
    return [
        f"The maps are too large for one page: {' and '.join(sorted(what))} are shown as one, queries by the mean of "
        "their rows, keys by the sum of their weights. Fewer layers leave them apart."
    ]


def _without_nan(weights: Array, check: RowCheck, name: str, may_lack: bool) -> Array:
    """The weights, with zeros for rows that hold NaN and for what rounding left below zero."""
    missing = check.look(weights, name, may_lack)
    if missing.any():
        weights = np.where(missing[..., None], np.float32(0), weights)
    check_least(float(weights.min()), name)
    return np.maximum(weights, 0)


def _add_pooled(
    whole: Array, weights: Array, query_groups: npt.NDArray[np.intp], key_groups: npt.NDArray[np.intp], part: slice
) -> None:
    """Add some queries' rows to the pooled map: the weights of a group of keys are summed, rows of queries averaged."""
    order = np.argsort(key_groups, kind="stable")
    starts = np.searchsorted(key_groups[order], np.arange(whole.shape[2]))
    summed = np.add.reduceat(weights[..., order], starts, axis=-1)
    shares = (1 / np.bincount(query_groups))[query_groups[part]].astype(np.float32)
    for row, (group, share) in enumerate(zip(query_groups[part], shares, strict=True)):
        whole[:, group] += share * summed[:, row]


def _code(example: Example, layer: int, part: slice, weights: Array) -> None:
    """Put the rows of some queries, (heads, queries, keys), into the example."""
    count = example.top.shape[3]
    keys = weights.shape[-1]
    largest = (
        np.argpartition(-weights, count - 1, axis=-1)[..., :count]
        if count < keys
        else np.broadcast_to(np.arange(keys), weights.shape)
    )
    values = np.take_along_axis(weights, largest, -1)
    order = np.lexsort((largest, -values), axis=-1)
    example.top[layer, :, part] = np.take_along_axis(values, order, -1)
    example.top_keys[layer, :, part] = np.take_along_axis(largest, order, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.log(weights / weights.max(-1, keepdims=True))
    steps *= -1 / STEP
    example.codes[layer, :, part] = np.rint(np.fmin(steps, NOTHING))  # fmin, because a row of zeros gives NaN


def pack(example: Example, budget: int) -> tuple[bytes, list[str]]:
    """The example's numbers in gzip, at most `budget` bytes, and notes that say what had to be left out for that.

    In this order: the exact weights, float32; their keys, uint16; the codes, with NOTHING for the exact weights. Of the
    first two, the first bytes of all numbers come first, then the second bytes: gzip packs these better.

    Raises ValueError if the example does not fit in any case.
    """
    exact = _planes(example.top.astype("<f4")) + _planes(example.top_keys.astype("<u2"))
    keys = example.codes.shape[3]
    codes, top_keys = example.codes.reshape(-1, keys), example.top_keys.reshape(-1, example.top_keys.shape[3])

    def packed_with(kept: int) -> bytes:
        at_once = max(1, 4_000_000 // keys)
        parts = (slice(start, start + at_once) for start in range(0, len(codes), at_once))
        return _gzip([exact, *(_sent(codes[part], top_keys[part], kept) for part in parts)])

    # A sample of the rows shows how many keys of each fit; codes that are cut off become runs of one byte.
    left = budget - len(_gzip([exact]))
    every = max(1, codes.size // _SAMPLE)
    sample, sample_keys = codes[::every], top_keys[::every]
    kept = keys
    while True:
        is_sure = every == 1 and kept == keys  # the sample is everything
        size = 0.0 if is_sure else len(_gzip([_sent(sample, sample_keys, kept)])) * len(codes) / len(sample)
        if size <= left * (1 if kept == keys else 0.97) or kept <= TOP:
            packed = packed_with(kept)
            if len(packed) <= budget:
                break
            if kept <= TOP:
                raise ValueError(
                    f"{example.title or 'the maps'}: the page would have more than its 30 MB even with {kept} weights "
                    f"in each row: choose some images with batch=, or some layers, maps[-4:]"
                )
            size = max(size, float(len(packed)))
        kept = max(TOP, min(kept - 1, int(kept * min(0.95, max(0.5, left / max(1, size))))))
    if kept == keys:
        return packed, []
    share = float((WEIGHTS[_cut(sample, kept)].sum(1) / np.maximum(WEIGHTS[sample].sum(1), 1e-9)).mean())
    return packed, [
        f"The maps are too large for one page: of each row the {kept} largest of {keys} weights are here, "
        f"{100 * share:.3g} % of the attention; the others count as zero. Fewer layers leave more."
    ]


def _sent(codes: npt.NDArray[np.uint8], top_keys: npt.NDArray[np.uint16], kept: int) -> bytes:
    """Rows of codes as the page carries them: NOTHING for what is cut off and for weights that are sent exactly."""
    sent = _cut(codes, kept)
    np.put_along_axis(sent, top_keys.astype(np.intp), NOTHING, 1)
    return sent.tobytes()


def _cut(codes: npt.NDArray[np.uint8], kept: int) -> npt.NDArray[np.uint8]:
    """A copy with the codes of the largest weights of each row, and of all that tie with the last of these."""
    if kept >= codes.shape[1]:
        return codes.copy()
    last = np.partition(codes, kept - 1, axis=1)[:, kept - 1 : kept]
    return np.where(codes <= last, codes, np.uint8(NOTHING))


def _planes(array: npt.NDArray[Any]) -> bytes:
    """The first bytes of all numbers, then the second bytes, and so on."""
    return array.reshape(-1, 1).view(np.uint8).T.tobytes()


def _gzip(parts: Iterable[bytes]) -> bytes:
    # Z_RLE: Huffman codes and runs of one byte. Codes of weights hardly ever repeat a longer text, and looking for one
    # takes four times as long, for files of the same size. 31: with a gzip header, which has no time in it.
    engine = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_RLE)
    return b"".join([*map(engine.compress, parts), engine.flush()])

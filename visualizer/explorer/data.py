"""Attention maps as the bytes that a page carries: one per weight, and the largest weights of each row exactly.

A weight p in a row whose largest is m becomes the byte round(-ln(p / m) / STEP): equal steps of the logarithm have
equal relative errors, 1.5 % at most and half of that in the median, where steps of p or of its root lose the small
weights. What is below m / 2000 (code 255) counts as zero. The largest weights follow as they are, so their values
and their order are exact.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import warn
from ..maps import AttentionMap, maps_of

STEP = 0.03
NOTHING = 255
TOP = 6
"""How many weights of each row are exact."""
MAX_CODES = 160_000_000
"""Bytes of one example in a browser's memory; beyond them, neighbouring tokens are pooled."""

_ROW_SUM_TOLERANCE = 0.02  # rounding of a whole row in bfloat16 stays below this; logits and dropout do not

Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Side:
    """What the queries or the keys are: words, or named tokens and then the patches of a picture, row by row."""

    labels: list[str]
    """Of every word; or of the tokens before the patches."""
    special: list[int]
    """Tokens that stand for no word and no patch."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches."""
    picture: bytes | None = None
    """A JPEG file."""
    pooled: int = 1
    """How many words, or patches a side, are one."""

    @property
    def size(self) -> int:
        """How many tokens."""
        return len(self.labels) + (math.prod(self.grid) if self.grid else 0)

    def pool(self, factor: int) -> tuple[Side, npt.NDArray[np.intp]]:
        """The side with that many words, or patches a side, in one; and which one each of its tokens is in."""
        if self.grid is None:
            places = np.arange(self.size) // factor
            parts = [self.labels[start : start + factor] for start in range(0, self.size, factor)]
            labels = [part[0] if len(part) == 1 else f"{part[0]} … {part[-1]}" for part in parts]
            return Side(labels, [], pooled=factor), places
        rows, columns = self.grid
        coarse = -(-rows // factor), -(-columns // factor)
        row, column = np.divmod(np.arange(rows * columns), columns)
        prefix = len(self.labels)
        places = np.concatenate([np.arange(prefix), prefix + row // factor * coarse[1] + column // factor])
        return Side(self.labels, self.special, coarse, self.picture, factor), places


@dataclass(frozen=True)
class Example:
    """One text or picture with its maps, coded."""

    title: str
    layers: list[str]
    """The path of each layer's module, or ""."""
    sides: tuple[Side, Side]
    """Queries and keys; the same object where both are the same tokens."""
    is_one_space: bool
    """Whether all layers attend among the same tokens, so that they can be multiplied."""
    codes: npt.NDArray[np.uint8]
    """(layers, heads, queries, keys)."""
    top: Array
    """(layers, heads, queries, TOP or fewer): the largest weights of each row, best first."""
    top_keys: npt.NDArray[np.uint16]
    """Whose they are."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the page must know about the numbers."""


def read_maps(maps: Any) -> list[AttentionMap]:
    """The layers in whatever holds attention, all of one shape.

    Raises ValueError where there are none, where their shapes differ, and for shapes that are no maps; TypeError for
    what holds no maps.
    """
    if isinstance(maps, (np.ndarray, Tensor)) and maps.ndim in (2, 3):
        maps = maps[(None,) * (4 - maps.ndim)]
    if maps is None or (isinstance(maps, (list, tuple, dict)) and (not maps or any(one is None for one in maps))):
        raise ValueError(
            "there are no attention maps here: a transformers model with a fused kernel (the default) does not return "
            'its weights. Load it with attn_implementation="eager" and call it with output_attentions=True, or use '
            "visualizer.attention(model)"
        )
    layers = maps_of(maps)[0]
    for number, layer in enumerate(layers):
        if 0 in layer.shape:
            raise ValueError(f"layer {number} is empty: its shape is {layer.shape}")
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"a page shows layers of one shape, (batch, heads, queries, keys): layer 0 has {layers[0].shape}, "
                f"layer {number} has {layer.shape}. Make a page of each kind, and add them: explore(some) "
                "+ explore(others)"
            )
    return layers


def code_maps(
    layers: Sequence[AttentionMap], images: Sequence[int], sides: Sequence[tuple[Side, Side]], titles: Sequence[str]
) -> list[Example]:
    """An example for each of the chosen images of the batch.

    Raises ValueError for weights that are below zero or infinite. Warns of NaN and of rows that do not sum to one.
    """
    _, heads, queries, keys = layers[0].shape
    factor, most_keys = 1, np.iinfo(np.uint16).max
    while (
        len(layers) * heads * -(-queries // factor) * -(-keys // factor) > MAX_CODES or -(-keys // factor) > most_keys
    ):
        factor += 1
    pooled = [_pooled(pair, factor) for pair in sides]
    examples = []
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
            )
        )
    blank = doubtful = 0
    for number, layer in enumerate(layers):
        done: list[Array] = (
            [np.zeros(example.codes.shape[1:], np.float32) for example in examples] if factor > 1 else []
        )
        for part, rows in layer.chunks():
            for at, image in enumerate(images):
                weights = rows[image].cpu().numpy().astype(np.float32)  # (heads, some queries, keys)
                weights, missing, odd = _checked(weights, number)
                blank, doubtful = blank + missing, doubtful + odd
                if factor > 1:
                    (_, into), (_, onto) = pooled[at]
                    _add_pooled(done[at], weights, into, onto, part)
                else:
                    _code(examples[at], number, part, weights)
        for example, whole in zip(examples, done, strict=False):
            _code(example, number, slice(0, whole.shape[1]), whole)
    rows_of_all = len(layers) * heads * queries * len(images)
    if blank:
        warn(f"{blank} of {rows_of_all} rows hold NaN and are shown as zeros (a fully masked row in a softmax)")
    if doubtful:
        warn(
            f"{doubtful} of {rows_of_all} rows do not sum to 1: are these weights after dropout, or before a "
            "normalisation? They are shown as they are"
        )
    return examples


def _pooled(
    pair: tuple[Side, Side], factor: int
) -> tuple[tuple[Side, npt.NDArray[np.intp]], tuple[Side, npt.NDArray[np.intp]]]:
    if factor == 1:
        nowhere = np.empty(0, np.intp)
        return (pair[0], nowhere), (pair[1], nowhere)
    first = pair[0].pool(factor)
    return first, first if pair[1] is pair[0] else pair[1].pool(factor)


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


def _checked(weights: Array, layer: int) -> tuple[Array, int, int]:
    """The weights, how many rows had NaN and are zeros now, and how many others do not sum to one."""
    sums = weights.sum(-1, dtype=np.float64)
    missing = np.isnan(sums)
    if missing.any():
        if np.isinf(weights).any():
            sums = np.where(missing, np.inf, sums)
        weights = np.where(missing[..., None], np.float32(0), weights)
    low = float(weights.min())
    if low < -1e-6 or np.isinf(sums).any():
        raise ValueError(
            f"layer {layer} holds {'infinite values' if np.isinf(sums).any() else f'the weight {low:.3g}'}, and "
            "weights of attention are at least 0: these look like logits, take their softmax over the keys first"
        )
    # A fully masked row is all zeros in torch's fused attention: rightly so.
    odd = ~missing & (np.abs(sums - 1) > _ROW_SUM_TOLERANCE) & weights.any(-1)
    return np.maximum(weights, 0), int(missing.sum()), int(odd.sum())


def _add_pooled(
    whole: Array, weights: Array, into: npt.NDArray[np.intp], onto: npt.NDArray[np.intp], part: slice
) -> None:
    """Add rows to the pooled map: keys summed, queries by their share of the group's mean."""
    groups = whole.shape[2]
    order = np.argsort(onto, kind="stable")
    starts = np.searchsorted(onto[order], np.arange(groups))
    summed = np.add.reduceat(weights[..., order], starts, axis=-1)
    shares = (1 / np.bincount(into))[into[part]].astype(np.float32)
    for row, (group, share) in enumerate(zip(into[part], shares, strict=True)):
        whole[:, group] += share * summed[:, row]


def _code(example: Example, layer: int, part: slice, weights: Array) -> None:
    count = example.top.shape[3]
    keys = weights.shape[-1]
    found = (
        np.argpartition(-weights, count - 1, axis=-1)[..., :count]
        if count < keys
        else np.broadcast_to(np.arange(keys), weights.shape)
    )
    values = np.take_along_axis(weights, found, -1)
    order = np.lexsort((found, -values), axis=-1)
    example.top[layer, :, part] = np.take_along_axis(values, order, -1)
    example.top_keys[layer, :, part] = np.take_along_axis(found, order, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.log(weights / weights.max(-1, keepdims=True))
    steps *= -1 / STEP
    example.codes[layer, :, part] = np.rint(np.fmin(steps, NOTHING))  # fmin: a row of zeros has NaN


def pack(example: Example, budget: int) -> tuple[bytes, list[str]]:
    """The example's numbers in gzip, at most `budget` bytes long, and what had to be left out for that, in words.

    In this order: the exact weights, float32; their keys, uint16; the codes, NOTHING for the exact weights. Of the
    first two, all first bytes come first, then all second ones: gzip finds more in common so.
    """
    exact = _planes(example.top.astype("<f4")) + _planes(example.top_keys.astype("<u2"))
    keys = example.codes.shape[3]
    codes, top_keys = example.codes.reshape(-1, keys), example.top_keys.reshape(-1, example.top_keys.shape[3])
    left = budget - len(_gzip([exact]))
    # A sample tells how many keys of each row fit; what is cut off becomes runs of one byte.
    every, at_once = max(1, codes.size // 4_000_000), max(1, 4_000_000 // keys)
    sample, sample_keys = codes[::every], top_keys[::every]
    kept = keys
    while True:
        size = len(_gzip([_carried(sample, sample_keys, kept)])) * len(codes) / len(sample)
        if size <= left * (1 if kept == keys else 0.97) or kept <= TOP:
            parts = (slice(start, start + at_once) for start in range(0, len(codes), at_once))
            packed = _gzip([exact, *(_carried(codes[part], top_keys[part], kept) for part in parts)])
            if len(packed) <= budget:
                break
            if kept <= TOP:
                raise ValueError(
                    f"{example.title or 'the maps'}: the page would have more than its 30 MB even with {kept} weights "
                    f"in each row: choose some images with batch=, or some layers, maps[-4:]"
                )
        kept = max(TOP, min(kept - 1, int(kept * min(0.95, max(0.5, left / max(1, size))))))
    if kept == keys:
        return packed, []
    table = np.exp(-STEP * np.arange(256, dtype=np.float32))
    table[NOTHING] = 0
    share = float((table[_cut(sample, kept)].sum(1) / np.maximum(table[sample].sum(1), 1e-9)).mean())
    return packed, [
        f"The maps are too large for one page: of each row the {kept} largest of {keys} weights are here, "
        f"{100 * share:.3g} % of the attention; the others count as zero. Fewer layers leave more."
    ]


def _carried(codes: npt.NDArray[np.uint8], top_keys: npt.NDArray[np.uint16], kept: int) -> bytes:
    """Rows of codes as they are sent: nothing for what is cut off, nor for what is known exactly."""
    sent = _cut(codes, kept)
    np.put_along_axis(sent, top_keys.astype(np.intp), NOTHING, 1)
    return sent.tobytes()


def _cut(codes: npt.NDArray[np.uint8], kept: int) -> npt.NDArray[np.uint8]:
    """The codes of the largest weights of each row, and of those that tie with the last of them; a copy."""
    if kept >= codes.shape[1]:
        return codes.copy()
    last = np.partition(codes, kept - 1, axis=1)[:, kept - 1 : kept]
    return np.where(codes <= last, codes, np.uint8(NOTHING))


def _planes(array: npt.NDArray[Any]) -> bytes:
    return array.reshape(-1, 1).view(np.uint8).T.tobytes()


def _gzip(parts: Iterable[bytes]) -> bytes:
    engine = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: with the header of gzip, and no time of day in it
    return b"".join([*(engine.compress(part) for part in parts), engine.flush()])


SPECIAL = r"\[[A-Z]+\d*\]|<[^<>\s]{1,40}>|<\|.{1,40}\|>"
"""Tokens that stand for no word, as tokenizers write them: [CLS], <s>, <|endoftext|>."""


def shown(token: Any, longest: int = 200) -> str:
    """A token as text that is seen: controls of all kinds by their sign or number, no line breaks, no endless words.

    >>> shown("a\\u202eb"), shown("\\0"), shown("  "), shown("x" * 10_000, longest=3)
    ('a‹202E›b', '␀', '␣␣', 'xxx… (10000 characters)')
    """
    text = str(token)
    more = f"… ({len(text)} characters)" if len(text) > longest else ""
    text = text[:longest]
    if not text.strip(" "):
        return "␣" * len(text) + more if text else "‹empty›"
    return "".join(_signs(text)) + more


def _signs(text: str) -> Iterator[str]:
    for sign in text:
        number = ord(sign)
        if number < 32:
            yield chr(0x2400 + number)
        elif number == 127:
            yield "␡"
        elif not sign.isprintable() and sign != " ":  # bidi controls, zero width, lone surrogates, private use
            yield f"‹{number:04X}›"
        else:
            yield sign

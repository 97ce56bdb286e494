"""What the queries and the keys on a page are: words, or the patches of a picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import ALL_WORDS
from ..images import picture_of
from ..layout import Layout, Patches, layout_of
from ..reading import Array
from ..words import is_special, readable
from ..words import printable as printable

_PICTURE_SIDE = 768  # pixels, more than the page gives to a picture

Part: TypeAlias = tuple[int, int, int, int]
"""Of a grid: the first row and column, and how many."""


@dataclass(frozen=True)
class Side:
    """What the queries or the keys are: words; or named tokens followed by the patches of a picture, row by row."""

    labels: list[str]
    """The words; or the names of the tokens before the patches."""
    special: list[int]
    """Tokens that are neither a word nor a patch."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches; of several pictures those of the sheet that they lie on."""
    picture: bytes | None = None
    """A JPEG file."""
    pooled: int = 1
    """How many words are pooled into one; of patches, how many along each side."""
    pictures: tuple[Part, ...] = ()
    """Where each of several pictures lies on the sheet; their patches are the tokens, one picture after the other."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The pictures as parts of the grid."""
        return self.pictures or (() if self.grid is None else ((0, 0, *self.grid),))

    @property
    def size(self) -> int:
        """How many tokens."""
        return len(self.labels) + sum(rows * columns for _, _, rows, columns in self.parts)

    def on_sheet(self, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Weights (..., tokens) of the patches as (..., *grid); 0 between pictures."""
        assert self.grid is not None
        sheet, first = np.zeros((*weights.shape[:-1], *self.grid), weights.dtype), len(self.labels)
        for top, left, rows, columns in self.parts:
            own = weights[..., first : first + rows * columns]
            sheet[..., top : top + rows, left : left + columns] = own.reshape(*own.shape[:-1], rows, columns)
            first += rows * columns
        return sheet

    def pool(self, factor: int) -> tuple[Side, npt.NDArray[np.intp]]:
        """The side with that many words (or patches along each side) in one; and for each token its group."""
        if factor == 1:
            return self, np.arange(self.size)
        if self.grid is None:
            groups = np.arange(self.size) // factor
            parts = [self.labels[start : start + factor] for start in range(0, self.size, factor)]
            labels = [part[0] if len(part) == 1 else f"{part[0]} … {part[-1]}" for part in parts]
            return Side(labels, [], pooled=factor), groups
        first, sizes, of_each = len(self.labels), list[tuple[int, int]](), [np.arange(len(self.labels))]
        for _, _, rows, columns in self.parts:
            row, column = np.divmod(np.arange(rows * columns), columns)
            sizes.append((-(-rows // factor), -(-columns // factor)))
            of_each.append(first + row // factor * sizes[-1][1] + column // factor)
            first += math.prod(sizes[-1])
        grid, places = _sheet(sizes)
        pictures = places if self.pictures else ()
        return Side(self.labels, self.special, grid, self.picture, factor, pictures), np.concatenate(of_each)


def _sheet(grids: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[Part, ...]]:
    """The (rows, columns) of a sheet with these grids side by side, in about as many rows as columns, and their
    places on it; a row or a column of cells between them stays empty."""
    across = math.ceil(math.sqrt(len(grids)))
    rows = [grids[start : start + across] for start in range(0, len(grids), across)]
    wide = [max(row[at][1] for row in rows if at < len(row)) for at in range(across)]
    parts, top = [], 0
    for row in rows:
        parts += [(top, sum(wide[:at]) + at, *grid) for at, grid in enumerate(row)]
        top += max(high for high, _ in row) + 1
    return (top - 1, sum(wide) + across - 1), tuple(parts)


def beside(sides: Sequence[Side]) -> Side:
    """One side with the patches of several pictures, each of which is a side; these lie on one sheet."""
    if len(sides) == 1:
        return sides[0]
    grid, parts = _sheet([side.grid for side in sides if side.grid is not None])
    picture = None
    if all(side.picture is not None for side in sides):
        cell = max(1, 2 * _PICTURE_SIDE // max(grid))
        sheet = Image.new("RGB", (grid[1] * cell, grid[0] * cell), "white")
        for side, (top, left, rows, columns) in zip(sides, parts, strict=True):
            own = Image.open(io.BytesIO(side.picture or b"")).resize((columns * cell, rows * cell))
            sheet.paste(own, (left * cell, top * cell))
        picture = _as_jpeg(sheet)
    return Side([], [], grid, picture, pictures=parts)


def chosen_images(batch: int | Sequence[int] | None, size: int) -> list[int]:
    """The numbers of the chosen images or texts of a batch; IndexError for one that is not there."""
    if batch is None:
        return list(range(size))
    chosen = [batch] if isinstance(batch, int) else list(batch)
    for number in chosen:
        if not isinstance(number, (int, np.integer)):
            raise TypeError(f"batch={batch!r}: pass the number of one image or text, or of several")
        if not -size <= number < size:
            raise IndexError(f"batch={batch!r}: there are {size} images or texts, 0 to {size - 1}")
    if not chosen:
        raise ValueError("batch=[] chooses nothing")
    return [number % size for number in chosen]


def for_each(name: str, value: Any, images: Sequence[int], size: int) -> list[Any]:
    """The argument of that name for each chosen image: entries of a list for the whole batch, or the value for one."""
    if value is None:
        return [None] * len(images)
    if isinstance(value, (list, tuple)) and len(value) == size and not isinstance(value[0], (str, int, float)):
        return [value[number] for number in images]
    if len(images) > 1:
        raise ValueError(
            f"{name}= must be a list of {size}, one for each image or text of the batch; or choose one by batch=0"
        )
    return [value]


def read_sides(
    queries: int,
    keys: int,
    *,
    tokens: Sequence[Any] | None,
    query_tokens: Sequence[Any] | None,
    key_tokens: Sequence[Any] | None,
    image: Any,
    where: Patches,
    known: tuple[Layout | None, Layout | None] = (None, None),
) -> tuple[Side, Side]:
    """What the queries and the keys of one example are; the same object if both are the same tokens.

    `known` are the layouts of queries and keys that the maps carry. Raises ValueError if the words or the grid do not
    fit.
    """
    has_picture = image is not None or any(value is not None for value in where.values())

    def patches(size: int, layout: Layout | None) -> Side:
        picture = picture_of(image)
        layout = layout_of(size, where, picture, layout)
        return patches_of(layout, picture) or _named(layout)

    if query_tokens is not None or key_tokens is not None:
        if query_tokens is not None and key_tokens is not None and has_picture:
            raise ValueError("query_tokens= and key_tokens= name both sides: no side is left for the picture")
        query_is_picture = query_tokens is None and has_picture
        key_is_picture = key_tokens is None and has_picture
        return (
            patches(queries, known[0])
            if query_is_picture
            else side_of_words("query_tokens", query_tokens, queries, known[0]),
            patches(keys, known[1]) if key_is_picture else side_of_words("key_tokens", key_tokens, keys, known[1]),
        )
    if tokens is not None and queries != keys:
        raise ValueError(
            f"tokens= names both queries and keys, but these are {queries} queries over {keys} keys: pass "
            "query_tokens= and key_tokens="
        )
    side = patches(keys, known[1]) if has_picture else side_of_words("tokens", tokens, keys, known[1])
    return (side if queries == keys else side_of_words("query_tokens", None, queries, known[0])), side


def patches_of(layout: Layout, picture: Array | None) -> Side | None:
    """A side of named tokens and the patches behind them, the frames of a video from above; None for other tokens."""
    patches = layout.patches
    if patches is None or layout.first_patch + patches.count != layout.count:
        return None
    prefix = [printable(name) for name in layout.names[: layout.first_patch]]
    rows = patches.count // patches.shape[-1]
    shown = None if picture is None else _jpeg(layout.on(picture, frames_across=1))
    return Side(prefix, list(range(len(prefix))), (rows, patches.shape[-1]), shown)


def side_of_patches(layout: Layout, picture: Array | None) -> Side:
    """A side of the patches of a picture, where a layout has nothing else."""
    side = patches_of(layout, picture)
    assert side is not None
    return side


def _named(layout: Layout) -> Side:
    """A side of words, and of what else a layout names."""
    is_word = layout.are("text") | layout.are("patches")
    return Side(list(map(printable, layout.labels)), np.flatnonzero(~is_word).tolist())


def side_of_words(name: str, words: Sequence[Any] | None, size: int, known: Layout | None) -> Side:
    """A side of words, passed as the argument of that name; without words, of what is known, or of numbers."""
    if words is None:
        if known is not None and known.count == size:
            return patches_of(known, None) or _named(known)
        return Side([str(number) for number in range(size)], [])
    if len(words) != size:
        raise ValueError(
            f"{name} has {len(words)} words, and there are {size} "
            f"{'keys' if name == 'key_tokens' else 'queries'}: {ALL_WORDS}"
        )
    labels = [printable(word) for word in readable(words)]
    return Side(labels, [at for at, word in enumerate(words) if is_special(str(word))])


def _jpeg(picture: Any) -> bytes:
    pixels = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
    pixels.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    return _as_jpeg(pixels)


def _as_jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()

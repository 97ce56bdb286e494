"""Where queries and keys lie on a picture: the patch grid, the windows of a Swin layer, and the picture itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..reading import Array, as_numbers, is_array

Size: TypeAlias = int | tuple[int, int]

# What tokenizers put before a word, or before its continuation.
_MARKERS = "Ġ▁#␣ "


@dataclass(frozen=True)
class Grid:
    """How the keys lie on a picture: named prefix tokens first, then the patches row by row."""

    rows: int
    columns: int
    prefix: tuple[str, ...]

    def token(self, query: int | tuple[int, int], queries: int, keys: int) -> int:
        """The token of a patch (row, column), or of an index among all tokens; from the front."""
        if isinstance(query, str) or not isinstance(query, Sequence):
            try:
                index = operator.index(query)
            except TypeError:
                hint = "; a word needs query_tokens=, the words of all queries" if isinstance(query, str) else ""
                raise TypeError(f"query={query!r}: pass a patch (row, column) or a token's index{hint}") from None
            if not -queries <= index < queries:
                raise IndexError(
                    f"query={index} is out of range: {queries} queries, the first {len(self.prefix)} of them prefix "
                    f"tokens; pass 0 to {queries - 1}, or a patch (row, column)"
                )
            return index % queries
        if len(query) == 2 and queries != keys:
            raise ValueError(
                f"query={query!r} names a patch, but these are {queries} queries over {keys} keys (cross-attention?), "
                "so queries are no patches: pass the query's index"
            )
        row, column = self.patch(query)
        return len(self.prefix) + row * self.columns + column

    def patch(self, query: Any) -> tuple[int, int]:
        """A patch's (row, column), counted from the front."""
        if not isinstance(query, Sequence) or isinstance(query, str) or len(query) != 2:
            count = f" has {len(query)} numbers" if isinstance(query, Sequence) and not isinstance(query, str) else ""
            raise ValueError(f"query={query!r}{count}: pass a patch (row, column) or a token's index")
        row, column = (operator.index(place) for place in query)
        if not (-self.rows <= row < self.rows and -self.columns <= column < self.columns):
            raise IndexError(
                f"query={query!r} is out of range: the grid has {self.rows} rows and {self.columns} columns of "
                f"patches, counted from 0; query is (row, column)"
            )
        return row % self.rows, column % self.columns

    def name(self, token: int) -> str:
        """A prefix token's name, or "patch (row, column)"."""
        count = len(self.prefix)
        return self.prefix[token] if token < count else f"patch {divmod(token - count, self.columns)}"


def read_grid(
    keys: int,
    *,
    grid: tuple[int, int] | None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix_tokens: int | Sequence[str] | None,
    picture: tuple[int, int] | None = None,
) -> Grid:
    """The patch grid of that many keys, as told or, where only one is possible, worked out.

    >>> read_grid(197, grid=None, prefix_tokens=None)
    Grid(rows=14, columns=14, prefix=('CLS',))

    Without prefix_tokens, what the grid leaves over are prefix tokens; without a grid either, the keys, or the keys
    but one, must be a square. patch_size without image_size takes the picture's own (height, width).
    Raises ValueError when the numbers do not fit, with all of them.
    """
    names = None
    if isinstance(prefix_tokens, str):
        names = [prefix_tokens]
    elif isinstance(prefix_tokens, Sequence):
        names = [str(name) for name in prefix_tokens]
    count = len(names) if names is not None else None if prefix_tokens is None else operator.index(prefix_tokens)  # type: ignore[arg-type]
    if count is not None and not 0 <= count < keys:
        raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {keys} keys")
    given = f"{keys} keys" + ("" if count is None else f", {count} of them prefix tokens")
    if grid is not None:
        rows, columns = pair_of("grid", grid)
        how = f"grid={grid}"
    elif patch_size is not None:
        if image_size is None and picture is None:
            raise ValueError(f"patch_size={patch_size} alone gives no grid: pass image_size= too, or an image")
        high, wide = pair_of("image_size", image_size) if image_size is not None else picture  # type: ignore[misc]
        patch_high, patch_wide = pair_of("patch_size", patch_size)
        how = f"an image of {high} x {wide} pixels in patches of {patch_high} x {patch_wide}"
        if high % patch_high or wide % patch_wide:
            raise ValueError(f"{how} does not come out even: image_size= is the size the model saw")
        rows, columns = high // patch_high, wide // patch_wide
    elif image_size is not None:
        raise ValueError(f"image_size={image_size} alone gives no grid: pass patch_size= too")
    else:
        rows = columns = _square_side(keys, count, given)
        how = f"a square grid of side {rows}"
    left = keys - rows * columns
    if left < 0 or (count is not None and left != count):
        raise ValueError(
            f"{how} makes {rows} x {columns} = {rows * columns} patches, which does not fit {given}: "
            f"grid=(rows, columns) and prefix_tokens= must add up to {keys}"
        )
    return Grid(rows, columns, tuple(names if names is not None else _names(left)))


def _square_side(keys: int, count: int | None, given: str) -> int:
    for prefix in (0, 1) if count is None else (count,):
        side = math.isqrt(max(0, keys - prefix))
        if side > 0 and side * side == keys - prefix:
            return side
    tried = f"neither {keys} nor {keys - 1} is" if count is None else f"{keys - count} is not"
    raise ValueError(
        f"cannot tell the patch grid of {given}: {tried} a square number. Pass grid=(rows, columns), or image_size= "
        "and patch_size= in pixels; prefix_tokens= says how many tokens come before the patches"
    )


def _names(count: int) -> list[str]:
    """Names for a bare count: the first is nearly always the class token, the others differ by model."""
    return ["CLS", *(f"token {number}" for number in range(1, count))][:count]


def pair_of(name: str, size: Size) -> tuple[int, int]:
    """(height, width) of whole numbers from 1, both the same where one number is given."""
    pair = (size, size) if not isinstance(size, Sequence) else tuple(size)
    try:
        high, wide = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={size!r}: pass (height, width) as two whole numbers") from None
    if high < 1 or wide < 1:
        raise ValueError(f"{name}={size!r}: both must be at least 1")
    return high, wide


def word_index(word: str, tokens: Sequence[str]) -> int:
    """The place of a word among the tokens, with or without what its tokenizer puts before it.

    >>> word_index("cat", ["Ġthe", "Ġcat"])
    1
    """
    found = [place for place, token in enumerate(tokens) if token == word]
    found = found or [place for place, token in enumerate(tokens) if token.strip(_MARKERS) == word.strip(_MARKERS)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"query={word!r} stands {len(found)} times in query_tokens: pass its index, one of {found}")
    few = ", ".join(map(repr, tokens[:12])) + (f" and {len(tokens) - 12} more" if len(tokens) > 12 else "")
    raise ValueError(f"query={word!r} is not in query_tokens: {few}")


@dataclass(frozen=True)
class Window:
    """The window that a patch attends in, and where its keys lie on the whole grid."""

    number: int
    """Which of the image's windows."""
    count: int
    """How many windows the image has."""
    token: int
    """The query's index in its window."""
    places: npt.NDArray[np.intp]
    """The place of each key on the grid, row by row; -1 where it is padding."""


def read_window(patch: tuple[int, int], grid: Grid, keys: int, window: Size, shift: Size) -> Window:
    """The window of a patch where the grid was rolled by -shift and cut into windows row by row.

    >>> read_window((0, 0), Grid(4, 4, ()), keys=4, window=2, shift=1).places  # the four corners
    array([15, 12,  3,  0])

    A side that one window covers is not shifted, as in the models. Raises ValueError where the numbers do not fit.
    """
    sides = pair_of("window", window)
    if sides[0] * sides[1] != keys:
        raise ValueError(
            f"window={window} makes {sides[0]} x {sides[1]} = {sides[0] * sides[1]} keys, and this layer has {keys}: "
            "maps of windows are (windows, heads, window * window, window * window)"
        )
    steps = (shift, shift) if not isinstance(shift, Sequence) else tuple(shift)
    if len(steps) != 2 or any(not 0 <= operator.index(step) < side for step, side in zip(steps, sides, strict=True)):
        raise ValueError(f"shift={shift!r}: pass 0 to {min(sides) - 1} patches, half a window in most models")
    sizes = grid.rows, grid.columns
    steps = tuple(0 if size <= side else step for size, side, step in zip(sizes, sides, steps, strict=True))
    padding = [-size % side for size, side in zip(sizes, sides, strict=True)]
    if any(steps) and any(padding):
        raise ValueError(
            f"windows of {sides[0]} x {sides[1]} do not fill the grid of {sizes[0]} x {sizes[1]} patches, and models "
            "differ in whether they shift or pad first: pass the padded grid="
        )
    places = np.roll(np.arange(sizes[0] * sizes[1]).reshape(sizes), [-step for step in steps], axis=(0, 1))
    places = np.pad(places, [(0, more) for more in padding], constant_values=-1)
    down, across = (size // side for size, side in zip(places.shape, sides, strict=True))
    windows = places.reshape(down, sides[0], across, sides[1]).swapaxes(1, 2).reshape(down * across, keys)
    [[number, token]] = np.argwhere(windows == patch[0] * grid.columns + patch[1])
    return Window(int(number), down * across, int(token), windows[number])


def read_image(image: Any) -> Array:
    """The picture as (height, width, 3) floats from 0 to 1, from an array, a tensor or a PIL image.

    >>> read_image(np.full((2, 3), 255, np.uint8)).shape
    (2, 3, 3)

    Takes (height, width), (height, width, channels) and, as torch has it, (channels, height, width); 1, 3 or 4
    channels, integers to 255 or floats to 1. What is transparent becomes white. Raises ValueError for anything else.
    """
    if hasattr(image, "convert"):
        image = image.convert("RGBA")  # a palette's indices are not colours
    if not (is_array(image) or hasattr(image, "__array__") or hasattr(image, "__array_interface__")):
        raise TypeError(f"image is a {type(image).__name__}: pass an array, a tensor or an opened PIL image")
    whole = not hasattr(image, "detach") and np.asarray(image).dtype.kind in "iu"
    if hasattr(image, "detach"):
        whole = not image.is_floating_point()
    pixels = as_numbers(image, "image")
    shape = pixels.shape
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"image has shape {shape}; expected one picture: (height, width), (height, width, 3) or (3, height, width)"
            + ("; pass image[0] for the first of a batch" if len(shape) == 4 else "")
        )
    low, high = float(pixels.min()), float(pixels.max())
    top = 255 if whole else 1
    if not (-0.01 * top <= low and high <= 1.01 * top):  # NaN fails, a resize's overshoot passes
        raise ValueError(
            f"image has values from {low:.3g} to {high:.3g}; expected integers from 0 to 255 or floats from 0 to 1. "
            "Undo the model's normalisation first (image * std + mean), or divide by 255"
        )
    pixels = np.clip(pixels / top, 0, 1)
    if pixels.shape[-1] == 4:
        pixels = pixels[:, :, :3] * pixels[:, :, 3:] + 1 - pixels[:, :, 3:]
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))

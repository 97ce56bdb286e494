"""Where tokens lie on a picture: the patch grid, the windows of a Swin layer, and the picture itself.

`grid_of` and `whole_grid` read the keywords that say so, for analyses, plots and the explorer; the `Grid` that they
give answers everything else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from .errors import few
from .reading import Array, as_numbers, is_array

Size: TypeAlias = int | tuple[int, int]

# What tokenizers put before a word, or before its continuation.
_MARKERS = "Ġ▁#␣ "


class Patches(TypedDict, total=False):
    """The keywords that say where the patches lie; `plot.query` explains them."""

    grid: tuple[int, int] | None
    image_size: Size | None
    patch_size: Size | None
    prefix_tokens: int | Sequence[str] | None


@dataclass(frozen=True)
class Grid:
    """How tokens lie on a picture: named prefix tokens first, then the patches row by row.

    >>> grid = Grid(rows=2, columns=3, prefix=("CLS",))
    >>> grid.name(0), grid.name(5), grid.place(5), grid.token((1, 1), queries=7, keys=7)
    ('CLS', 'patch (1, 1)', (1, 1), 5)
    """

    rows: int
    columns: int
    prefix: tuple[str, ...] = ()

    def token(self, query: Any, queries: int, keys: int) -> int:
        """The index, from 0, of the token that a user names by a patch (row, column) or by an index."""
        is_sequence = isinstance(query, Sequence) and not isinstance(query, str)
        if not is_sequence:
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
                "so the queries are not patches: pass the query's index"
            )
        row, column = self.patch(query)
        return len(self.prefix) + row * self.columns + column

    def patch(self, query: Any) -> tuple[int, int]:
        """The (row, column), from 0, of the patch that a user names."""
        is_sequence = isinstance(query, Sequence) and not isinstance(query, str)
        if not is_sequence or len(query) != 2:
            count = f" has {len(query)} numbers" if is_sequence else ""
            raise ValueError(f"query={query!r}{count}: pass a patch (row, column) or a token's index")
        row, column = (operator.index(place) for place in query)
        if not (-self.rows <= row < self.rows and -self.columns <= column < self.columns):
            raise IndexError(
                f"query={query!r} is out of range: the grid has {self.rows} rows and {self.columns} columns of "
                f"patches, counted from 0; query is (row, column)"
            )
        return row % self.rows, column % self.columns

    def place(self, token: int) -> tuple[int, int] | None:
        """The (row, column) of a token that is a patch; None for a prefix token."""
        number = token - len(self.prefix)
        return divmod(number, self.columns) if number >= 0 else None

    def name(self, token: int) -> str:
        """A prefix token's name, or "patch (row, column)"."""
        place = self.place(token)
        return self.prefix[token] if place is None else f"patch {place}"

    def patches(self, weights: Array) -> Array:
        """The patches' weights (..., rows, columns) of those of all tokens (..., tokens)."""
        return weights[..., len(self.prefix) :].reshape(*weights.shape[:-1], self.rows, self.columns)

    def size(self, picture: Array | None) -> tuple[int, int]:
        """(height, width) of what is drawn: the picture's in pixels; without one, in patches."""
        return (self.rows, self.columns) if picture is None else (picture.shape[0], picture.shape[1])


def grid_of(count: int, options: Patches, picture: Array | None = None) -> Grid:
    """The grid of that many tokens: the one that the keywords describe, or else the only square one.

    >>> grid_of(197, {"prefix_tokens": None})
    Grid(rows=14, columns=14, prefix=('CLS',))

    `patch_size` without `image_size` divides the picture, (height, width, channels). Without `prefix_tokens`, the
    tokens that the grid leaves over are prefix tokens. Without a grid either, all tokens, or all but one, must form a
    square: with more prefixes to choose from, many grids that are no square would become one.

    Raises ValueError where the numbers do not fit; the message has all of them.
    """
    prefix_tokens = options.get("prefix_tokens")
    names, prefix = _read_prefix(prefix_tokens)
    if prefix is not None and not 0 <= prefix < count:
        raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {count} tokens")
    tokens = f"{count} tokens" + ("" if prefix is None else f", {prefix} of them prefix tokens")
    rows, columns, source = _read_sides(options, picture) or _square(count, prefix, tokens)
    left = count - rows * columns
    if left < 0 or (prefix is not None and left != prefix):
        raise ValueError(
            f"{source} makes {rows} x {columns} = {rows * columns} patches, which does not fit {tokens}: "
            f"grid=(rows, columns) and prefix_tokens= must add up to {count}"
        )
    if names is None:  # the first is the class token in nearly every model; what the others are called differs
        names = ["CLS", *(f"token {number}" for number in range(1, left))][:left]
    return Grid(rows, columns, tuple(names))


def whole_grid(options: Patches, picture: Array | None) -> Grid:
    """The grid of a picture that was cut into windows; the keys of one window do not show it."""
    if (prefix_tokens := options.get("prefix_tokens")) not in (None, 0):
        raise ValueError(f"prefix_tokens={prefix_tokens!r}: windows have patches only")
    sides = _read_sides(options, picture)
    if sides is None:
        raise ValueError("window= needs grid=(rows, columns) of the whole picture's patches in this layer")
    return Grid(*sides[:2])


def _read_prefix(prefix_tokens: int | Sequence[str] | None) -> tuple[list[str] | None, int | None]:
    """The names and the number of prefix tokens, None where the user does not say."""
    if prefix_tokens is None:
        return None, None
    if not isinstance(prefix_tokens, Sequence):
        return None, operator.index(prefix_tokens)
    names = [prefix_tokens] if isinstance(prefix_tokens, str) else [str(name) for name in prefix_tokens]
    return names, len(names)


def _read_sides(options: Patches, picture: Array | None) -> tuple[int, int, str] | None:
    """The rows and columns that the user describes, and the words for the source of these numbers."""
    grid, image_size, patch_size = options.get("grid"), options.get("image_size"), options.get("patch_size")
    if grid is not None:
        return *pair_of("grid", grid), f"grid={grid}"
    if patch_size is None:
        if image_size is not None:
            raise ValueError(f"image_size={image_size} alone gives no grid: pass patch_size= too")
        return None
    if image_size is not None:
        size = pair_of("image_size", image_size)
    elif picture is not None:
        size = picture.shape[0], picture.shape[1]
    else:
        raise ValueError(f"patch_size={patch_size} alone gives no grid: pass image_size= too, or an image")
    high, wide = pair_of("patch_size", patch_size)
    source = f"an image of {size[0]} x {size[1]} pixels in patches of {high} x {wide}"
    if size[0] % high or size[1] % wide:
        raise ValueError(f"{source} leaves a remainder: image_size= is the size that the model saw")
    return size[0] // high, size[1] // wide, source


def _square(count: int, prefix: int | None, tokens: str) -> tuple[int, int, str]:
    """The square that the tokens form, or all tokens but one."""
    for left in (0, 1) if prefix is None else (prefix,):
        side = math.isqrt(count - left)
        if side > 0 and side * side == count - left:
            return side, side, f"a square grid of side {side}"
    tried = f"neither {count} nor {count - 1} is" if prefix is None else f"{count - prefix} is not"
    raise ValueError(
        f"cannot tell the patch grid of {tokens}: {tried} a square number. Pass grid=(rows, columns); "
        "prefix_tokens= says how many tokens come before the patches"
    )


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
    """The index of a word among the tokens, with or without the marker that its tokenizer puts before it.

    >>> word_index("cat", ["Ġthe", "Ġcat"])
    1
    """
    places = [place for place, token in enumerate(tokens) if token == word]
    places = places or [place for place, token in enumerate(tokens) if token.strip(_MARKERS) == word.strip(_MARKERS)]
    if len(places) == 1:
        return places[0]
    if places:
        raise ValueError(f"query={word!r} occurs {len(places)} times in query_tokens: pass its index, one of {places}")
    raise ValueError(f"query={word!r} is not in query_tokens: {few(tokens, 12)}")


@dataclass(frozen=True)
class Window:
    """The window in which a patch attends, and where the window's keys lie on the whole grid."""

    number: int
    """The window's index among those of the image."""
    count: int
    """How many windows the image has."""
    token: int
    """The query's index in its window."""
    places: npt.NDArray[np.intp]
    """The index of each key among the patches of the grid, row by row; -1 where the key is padding."""

    def spread(self, weights: Array, grid: Grid) -> Array:
        """The weights of the window's keys as a row over the whole grid, NaN outside the window."""
        row = np.full(grid.rows * grid.columns, np.nan, weights.dtype)
        is_patch = self.places >= 0
        row[self.places[is_patch]] = weights[is_patch]
        return row


def read_window(patch: tuple[int, int], grid: Grid, keys: int, window: Size, shift: Size) -> Window:
    """The window of a patch, where the model rolls the grid by -shift and cuts it into windows row by row.

    >>> read_window((0, 0), Grid(4, 4), keys=4, window=2, shift=1).places  # the four corners
    array([15, 12,  3,  0])

    As in the models, a side that one window covers is not shifted. Raises ValueError where the numbers do not fit.
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


def picture_of(image: Any) -> Array | None:
    """The picture as `read_image` reads it; None where the user passes none."""
    return None if image is None else read_image(image)


def read_image(image: Any) -> Array:
    """The picture as (height, width, 3) floats from 0 to 1, from an array, a tensor or a PIL image.

    >>> read_image(np.full((2, 3), 255, np.uint8)).shape
    (2, 3, 3)

    Takes (height, width), (height, width, channels) and, as torch has it, (channels, height, width); 1, 3 or 4
    channels, integers to 255 or floats to 1. Transparent pixels become white. Raises TypeError or ValueError for
    anything else.
    """
    if hasattr(image, "convert"):
        image = image.convert("RGBA")  # a palette's indices are not colours
    if not (is_array(image) or hasattr(image, "__array__") or hasattr(image, "__array_interface__")):
        raise TypeError(f"image is a {type(image).__name__}: pass an array, a tensor or an opened PIL image")
    is_tensor = hasattr(image, "detach")
    is_whole = not image.is_floating_point() if is_tensor else np.asarray(image).dtype.kind in "iu"
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
    top = 255 if is_whole else 1
    if not (-0.01 * top <= low and high <= 1.01 * top):  # NaN fails; the slight overshoot of a resize passes
        raise ValueError(
            f"image has values from {low:.3g} to {high:.3g}; expected integers from 0 to 255 or floats from 0 to 1. "
            "Undo the model's normalisation first (image * std + mean), or divide by 255"
        )
    pixels = np.clip(pixels / top, 0, 1)
    if pixels.shape[-1] == 4:
        pixels = pixels[:, :, :3] * pixels[:, :, 3:] + 1 - pixels[:, :, 3:]
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))

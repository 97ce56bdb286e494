"""What every picture is made of: axes and panels, colour bars, titles, mosaics, labels that do not overlap."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import warn
from ..reading import Array
from ..words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = "attention weight"
# matplotlib tries those that are installed in this order, so that a label in another script is not a row of boxes.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("Microsoft YaHei", "PingFang SC", "SimHei", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans"),
)
# Of scripts that DejaVu Sans, which matplotlib brings, has no letters of: first and last character, and a font.
_SCRIPTS = ((0x2E80, 0x9FFF, "Noto Sans CJK"), (0xAC00, 0xD7AF, "Noto Sans CJK"), (0x1F000, 0x1FAFF, "Noto Emoji"))
_CELL = 256  # the largest side of a mosaic's cell, in pixels: 144 such cells are 38 MB


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The user's axes, or those of a new figure of (width, height) in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    # Not "constrained", which cuts off labels where one side of the axes depends on the other, as under a picture.
    return plt.figure(figsize=size, layout="compressed").add_subplot()


def full_rows(count: int, columns: int | None, wanted: int) -> int:
    """How many of that many panels stand in a row: `columns`, or else about as many as wanted, with all rows full.

    >>> full_rows(7, None, 6), full_rows(24, None, 6)
    (4, 6)
    """
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}: pass at least 1, or None for what suits {count} panels")
    return min(count, columns or math.ceil(count / math.ceil(count / wanted)))


def panels(count: int, columns: int, size: tuple[float, float], shared: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels of (width, height) in inches; `shared` panels have the same axes."""
    from matplotlib import pyplot as plt

    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(size[0] * columns + 1, size[1] * rows + 0.4), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).ravel().tolist()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def panel_size(size: tuple[int, ...], side: float) -> tuple[float, float]:
    """(width, height) in inches of the panel for a picture of (height, width), `side` wide.

    One that is more than twice as high as wide gets a narrower panel.
    """
    ratio = size[0] / size[1]
    return side * min(1.0, 2 / ratio), side * min(2.0, ratio)


def colour_bar(figure: Any, image: Any, where: Any, is_cut: bool, label: str = LABEL) -> None:
    """Draw a colour bar beside some axes, pointed where weights lie past its end."""
    aspect = max(20.0, 4.5 * getattr(figure, "figure", figure).get_size_inches()[1])  # not broader on a high figure
    bar = figure.colorbar(image, ax=where, extend="max" if is_cut else "neither", shrink=0.9, aspect=aspect)
    bar.set_label(label, parse_math=False)


def write_title(drawn: Any, title: str | None, default: str | None = None) -> None:
    """Write a title above axes or a figure: the user's, else the default, else none."""
    text = default if title is None else title
    if text is not None:
        write = drawn.set_title if hasattr(drawn, "set_title") else drawn.suptitle
        write(with_letters(text), parse_math=False, fontfamily=_fonts())


def shrunk(cell: Array, size: int = _CELL) -> Array:
    """Shrink (height, width, ...) to at most `size` pixels a side, each the mean of the area that it covers."""
    for axis in (0, 1):
        count = cell.shape[axis]
        if count > size:
            edges = np.linspace(0, count, size + 1)
            places = np.arange(count)
            shares = np.clip(np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places), 0, None)
            shares = (shares * size / count).astype(cell.dtype)  # (size, count), rows sum to one
            cell = np.moveaxis(np.tensordot(shares, cell, (1, axis)), 0, axis)
    return cell


def mosaic(
    ax: Axes, cells: Array, ticks: tuple[Sequence[Any] | None, Sequence[Any] | None] = (None, None), **options: Any
) -> Any:
    """One image of cells (rows, columns, height, width) or, in colours, (rows, columns, height, width, 3).

    The middle of cell (row, column) is at x = column, y = row. `ticks` are the names of the rows and of the columns,
    None for their numbers. Small cells are magnified, so that the gaps stay thin.
    """
    rows, columns, high, wide = cells.shape[:4]
    zoom = math.ceil(32 / max(high, wide))
    cells = cells.repeat(zoom, 2).repeat(zoom, 3)
    high, wide = high * zoom, wide * zoom
    margin = max(1, round(0.03 * max(high, wide)))
    # Cells continue under the gaps. Otherwise, where a screen has fewer pixels than the image, the edge of a cell,
    # perhaps an attention sink, would be averaged with the gap.
    wider = np.pad(cells, [(0, 0), (0, 0), (margin, margin), (margin, margin), *[(0, 0)] * (cells.ndim - 4)], "edge")
    whole = wider.swapaxes(1, 2).reshape(rows * wider.shape[2], columns * wider.shape[3], *cells.shape[4:])
    image = ax.imshow(
        whole,
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        aspect=wider.shape[2] / wider.shape[3],
        origin="upper",
        interpolation="antialiased",
        interpolation_stage="data",
        **options,
    )
    _gaps(ax, rows, columns, 0.6 * margin / wider.shape[2], 0.6 * margin / wider.shape[3])
    ax.tick_params(length=0)
    names = [range(count) if side is None else side for count, side in zip((rows, columns), ticks, strict=True)]
    label_ticks(ax, *([str(name) for name in side] for side in names), rotation=0)
    ax.spines[:].set_visible(False)
    return image


def _gaps(ax: Axes, rows: int, columns: int, high: float, wide: float) -> None:
    """Draw white bars between the cells and round them, twice as high and as wide as the numbers say."""
    from matplotlib.collections import PolyCollection

    left, right, top, bottom = -0.5, columns - 0.5, -0.5, rows - 0.5
    bars = [(x - wide, x + wide, top, bottom) for x in np.arange(columns + 1) - 0.5]
    bars += [(left, right, y - high, y + high) for y in np.arange(rows + 1) - 0.5]
    corners = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, x1, y0, y1 in bars]
    ax.add_collection(PolyCollection(corners, facecolor="white", edgecolor="none", snap=False), autolim=False)


def label_ticks(ax: Axes, down: Sequence[str] | None, across: Sequence[str] | None, *, rotation: int = 90) -> None:
    """Write words along the y axis and along the x axis, as many as fit once the figure is laid out.

    None leaves an axis as it is; an empty list removes its ticks.
    """
    sides = [(ax.yaxis, down, 0), (ax.xaxis, across, rotation)]
    for _ in range(2):  # words take room from the axes, so that fewer words fit
        lay_out(ax.figure)
        ax.apply_aspect()
        for axis, words, turned in sides:
            if not words:
                if words is not None:
                    axis.set_ticks([])
                continue
            box = ax.get_window_extent()
            points = (box.height if axis is ax.yaxis else box.width) / ax.figure.dpi * 72
            if axis is ax.xaxis and not turned:
                size, room = 9.0, 6.0 * max(map(len, words)) + 4
                step = max(1, math.ceil(room * len(words) / points))
            else:
                step = max(1, math.ceil(6.5 * len(words) / points))
                size = min(10.0, max(5.5, 0.8 * step * points / len(words)))
            places = range(0, len(words), step)
            axis.set_ticks(list(places), [with_letters(printable(words[place])) for place in places])
            for label in axis.get_ticklabels():
                label.set(fontsize=size, rotation=turned, parse_math=False, fontfamily=_fonts())


def lay_out(figure: Any) -> None:
    """Give axes their final places: drawing alone does one pass too few where an aspect ratio is fixed."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters that no font has: drawing warns of them again
            engine.execute(getattr(figure, "figure", figure))


@functools.cache
def _fonts() -> list[str]:
    """The installed font families that cover many scripts, in order of preference."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed] or ["sans-serif"]


@functools.cache
def _letters() -> frozenset[int]:
    """The characters that the fonts have with which labels are written."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset[int]().union(*(get_font(findfont(name)).get_charmap() for name in _fonts()))


def with_letters(text: str) -> str:
    """The text with a box for each character that no installed font has; a warning names a font that has them.

    Without it matplotlib would warn of each character at each drawing, and name no font.
    """
    missing = [character for character in dict.fromkeys(text) if ord(character) not in _letters() and character != "\n"]
    if not missing:
        return text
    codes = [ord(character) for character in missing]
    fonts = [font for low, high, font in _SCRIPTS if any(low <= code <= high for code in codes)] or ["Noto Sans"]
    _warn_once(" and ".join(dict.fromkeys(fonts)), "".join(missing))
    return "".join("□" if character in missing else character for character in text)


_warned_of: set[str] = set()


def _warn_once(fonts: str, characters: str) -> None:
    if fonts not in _warned_of:
        _warned_of.add(fonts)
        what = f"no installed font has {characters}, and others like it: they are drawn as boxes. Install {fonts}"
        warn(what, "missing-font")

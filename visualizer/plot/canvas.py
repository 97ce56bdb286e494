"""What the pictures are made of: axes, colour scales, labels that do not overlap, mosaics, weights over a picture."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ..reading import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

Style = Literal["overlay", "mask"]

LABEL = "attention weight"
# Tried in this order where they are installed, so that a label in another script is no row of boxes.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("Microsoft YaHei", "PingFang SC", "SimHei", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans"),
)
_VISIBLE = {" ": "␣", "Ġ": "␣", "\n": "⏎", "Ċ": "⏎", "\t": "⇥"}
_CELL = 256  # pixels that a cell of a mosaic has at most: 144 of them are 38 MB


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes to draw on: those given, or those of a new figure of that size in inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    # Not "constrained": where a side is bound to another, as a picture's are, it loses count and cuts off labels.
    return plt.figure(figsize=size, layout="compressed").add_subplot()


def panels(
    count: int, columns: int | None, wanted: int, cell: tuple[float, float], shared: bool = False
) -> tuple[Figure, list[Axes], int]:
    """A figure with that many panels, and how many stand in a row: `columns`, or about `wanted` and all rows full."""
    from matplotlib import pyplot as plt

    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}: pass at least 1, or None for what suits {count} panels")
    columns = min(count, columns or math.ceil(count / math.ceil(count / wanted)))
    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(cell[0] * columns + 1, cell[1] * rows + 0.4), layout="compressed")
    found = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared).ravel().tolist()
    for empty in found[count:]:
        empty.set_axis_off()
    return figure, found[:count], columns


def panel_size(high: int, wide: int, side: float) -> tuple[float, float]:
    """Inches (across, down) of a panel for a picture: `side` across, or less where it is more than twice as high."""
    ratio = high / wide
    return side * min(1.0, 2 / ratio), side * min(2.0, ratio)


def colour_bar(figure: Any, image: Any, where: Any, is_cut: bool, label: str = LABEL) -> None:
    """A colour bar, pointed where weights go past its end."""
    slim = max(20.0, 4.5 * getattr(figure, "figure", figure).get_size_inches()[1])  # no broader on a high figure
    bar = figure.colorbar(image, ax=where, extend="max" if is_cut else "neither", shrink=0.9, aspect=slim)
    bar.set_label(label, parse_math=False)


def matrix_top(weights: Array) -> float:
    """The end of a matrix' colour scale: nearly its largest weight, and no less than four times an even share."""
    top, share = float(np.percentile(np.nan_to_num(weights), 99.5)), 4 / weights.shape[-1]
    largest = float(np.max(np.nan_to_num(weights)))
    return min(max(top, share), largest) if largest > 0 else 1.0


def row_top(weights: Array, keys: int, vmin: float | None, share: float = 100) -> float:
    """The end of a row's colour scale: its largest weight, or that of a share of the weights in percent.

    Without the floor, four times an even share, a row that attends to everything alike would be painted solid.
    """
    return max(float(np.percentile(np.nan_to_num(weights), share)), 4 / keys, 0 if vmin is None else vmin)


def check_style(style: str) -> None:
    """Raise ValueError unless it is a way of laying weights over a picture."""
    if style not in get_args(Style):
        raise ValueError(f"style={style!r}: pass one of {', '.join(map(repr, get_args(Style)))}")


def scale_of(cmap: Any, vmin: float | None, vmax: float, style: str = "overlay") -> ScalarMappable:
    """The colours of weights, as a colour bar shows them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0 if vmin is None else vmin, vmax), "gray" if style == "mask" else cmap)


def lay_over(ax: Axes, patches: Array, picture: Array | None, scale: ScalarMappable, style: str, smooth: bool) -> None:
    """Draw patches, over a picture where there is one; what is NaN lets it through, and is hatched."""
    high, wide = patches.shape if picture is None else picture.shape[:2]
    extent = (0.0, float(wide), float(high), 0.0)
    if picture is None:
        low, top = scale.get_clim()
        blend = "bilinear" if smooth else "nearest"
        ax.imshow(patches, cmap=scale.cmap, vmin=low, vmax=top, extent=extent, interpolation=blend, origin="upper")
    else:
        blended = blend_over(patches, picture, scale, style, smooth)
        ax.imshow(blended, extent=extent, interpolation="nearest", origin="upper")
    ax.set_xticks([])
    ax.set_yticks([])
    if np.isnan(patches).any():
        _hatch(ax, np.isnan(patches), picture is not None, (wide / patches.shape[1], high / patches.shape[0]))


def blend_over(patches: Array, picture: Array, scale: ScalarMappable, style: str, smooth: bool) -> Array:
    """The picture with the patches' weights on it, (height, width, 3)."""
    blank = np.isnan(spread(patches, picture.shape[:2], False))[..., None]
    weights = np.asarray(scale.norm(spread(np.nan_to_num(patches), picture.shape[:2], smooth)))
    strength = np.clip(weights, 0, 1)
    # Darkened, so that what is white in the picture does not bleach the colours laid over it.
    grey = 0.6 * (picture @ np.array([0.299, 0.587, 0.114], picture.dtype))[..., None]
    if style == "mask":
        return np.where(blank, grey, picture * strength[..., None])
    # The square root lets middling weights be seen; the colours are those of the weights themselves.
    colours = np.asarray(scale.cmap(strength))[..., :3]
    alpha = np.where(blank, 0, 0.85 * np.sqrt(strength)[..., None])
    return np.asarray((1 - alpha) * grey + alpha * colours)


def _hatch(ax: Axes, blank: npt.NDArray[np.bool_], is_over: bool, size: tuple[float, float]) -> None:
    """Hatch patches: no weight is known of them, which is not a weight of zero."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    runs = []
    for row, cells in enumerate(blank):
        edges = np.flatnonzero(np.diff(np.pad(cells.astype(int), 1)))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            corners = [(start, row), (stop, row), (stop, row + 1), (start, row + 1), (start, row)]
            runs.append(Path([(x * size[0], y * size[1]) for x, y in corners], closed=True))
    whole = Path.make_compound_path(*runs)
    ax.add_patch(
        PathPatch(whole, facecolor="none", edgecolor=(1, 1, 1, 0.35) if is_over else "0.75", hatch="//", linewidth=0)
    )


def spread(patches: Any, size: tuple[int, int], smooth: bool) -> Any:
    """The patches at the picture's size: each pixel its patch's weight, or interpolated between patches' centres."""
    places = []
    for count, pixels in zip(patches.shape, size, strict=True):
        centre = (np.arange(pixels) + 0.5) * count / pixels  # in patches, from the edge
        places.append(np.clip(centre - 0.5, 0, count - 1) if smooth else np.floor(centre))
    (y, x), (high, wide) = places, patches.shape
    y0, x0 = y.astype(int), x.astype(int)
    if not smooth:
        return patches[np.ix_(y0, x0)]
    y1, x1 = np.minimum(y0 + 1, high - 1), np.minimum(x0 + 1, wide - 1)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    upper = patches[np.ix_(y0, x0)] * (1 - fx) + patches[np.ix_(y0, x1)] * fx
    lower = patches[np.ix_(y1, x0)] * (1 - fx) + patches[np.ix_(y1, x1)] * fx
    return upper * (1 - fy) + lower * fy


def frame(ax: Axes, corner: tuple[float, float], size: tuple[float, float]) -> None:
    """A frame in black and white: one of the two is seen on any ground."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 3.0), ("white", 1.2)):
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width, zorder=3))


def shrunk(cell: Array, size: int = _CELL) -> Array:
    """A (height, width, ...) array with no more than `size` pixels a side, each the mean of the area that it covers."""
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

    Cell (row, column) has its middle at x = column and y = row. `ticks` are the names of the rows and of the columns,
    None for their numbers. Small cells are magnified, so that the gaps stay thin.
    """
    rows, columns, high, wide = cells.shape[:4]
    zoom = math.ceil(32 / max(high, wide))
    cells = cells.repeat(zoom, 2).repeat(zoom, 3)
    high, wide = high * zoom, wide * zoom
    margin = max(1, round(0.03 * max(high, wide)))
    # Cells go on into the gaps: where a screen has fewer pixels than the image, an edge, perhaps an attention sink,
    # would otherwise be averaged with emptiness.
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
    names = [range(count) if given is None else given for count, given in zip((rows, columns), ticks, strict=True)]
    label_ticks(ax, *([str(name) for name in side] for side in names), rotation=0)
    ax.spines[:].set_visible(False)
    return image


def _gaps(ax: Axes, rows: int, columns: int, high: float, wide: float) -> None:
    """White bars between the cells and round them, half as wide as given."""
    from matplotlib.collections import PolyCollection

    left, right, top, bottom = -0.5, columns - 0.5, -0.5, rows - 0.5
    bars = [(x - wide, x + wide, top, bottom) for x in np.arange(columns + 1) - 0.5]
    bars += [(left, right, y - high, y + high) for y in np.arange(rows + 1) - 0.5]
    corners = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, x1, y0, y1 in bars]
    ax.add_collection(PolyCollection(corners, facecolor="white", edgecolor="none", snap=False), autolim=False)


def label_ticks(ax: Axes, down: Sequence[str] | None, across: Sequence[str] | None, *, rotation: int = 90) -> None:
    """Write words along the y axis and along the x axis, as many as fit in the figure as it will be drawn."""
    sides = [(ax.yaxis, down, 0), (ax.xaxis, across, rotation)]
    for _ in range(2):  # words take room from the axes, and fewer of them less
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
            axis.set_ticks(list(places), [shown(words[place]) for place in places])
            for label in axis.get_ticklabels():
                label.set(fontsize=size, rotation=turned, parse_math=False, fontfamily=fonts())


def lay_out(figure: Any) -> None:
    """Give axes the places that they will have; what is as high as its axes allow takes one pass more than drawing."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that no font has: drawing says it again
            engine.execute(getattr(figure, "figure", figure))


def shown(word: str) -> str:
    """A token with its white space, and whatever else would not be seen, made visible."""
    text = "".join(_VISIBLE.get(c, c) for c in str(word))
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) or "∅"


@functools.cache
def fonts() -> list[str]:
    """The families to write words in: those of a list of wide coverage that are installed."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed] or ["sans-serif"]

"""Weights laid over the picture that their patches cover, with a swatch for each special token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..layout import Layout
from ..reading import Array
from .canvas import LABEL, axes_of, colour_bar, panel_size, panels
from .look import Look, exceeds, row_top

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_MOST_SWATCHES = 16  # more special tokens, such as those between the tiles of a picture, would be too small


def draw_row(
    row: Array,
    layout: Layout,
    picture: Array | None,
    look: Look,
    *,
    ax: Axes | None,
    framed: int | None = None,
    label: str = LABEL,
) -> Axes:
    """Draw the weights (tokens,) over the picture, as `Layout.on` gives it, with a frame round one token."""
    patches = layout.spread(row)
    top = row_top(patches, int(np.count_nonzero(~np.isnan(row))), look.vmin) if look.vmax is None else look.vmax
    high, wide = sheet_size(layout, picture)
    ax = axes_of(ax, figure_size(high, wide))
    scale = look.scale(top)
    lay_over(ax, patches, picture, scale, look)
    frame_patch(ax, layout, framed, (high, wide))
    special: list[int] = np.flatnonzero(layout.are("special")).tolist()
    if 0 < len(special) <= _MOST_SWATCHES:
        names = [layout.name(token) for token in special]
        _draw_swatches(ax, row[special], names, scale, special.index(framed) if framed in special else None)
    if look.cbar:
        colour_bar(ax.figure, scale, ax, exceeds(row, top), label)
    return ax


def sheet_size(layout: Layout, picture: Array | None) -> tuple[int, int]:
    """(height, width) of what is drawn: the picture's in pixels; without one, in patches."""
    rows, columns = layout.sheet.shape
    return (rows, columns) if picture is None else (picture.shape[0], picture.shape[1])


def figure_size(high: int, wide: int) -> tuple[float, float]:
    """Inches (across, down) of a figure for one picture: a long strip gets a long figure, but not an endless one."""
    ratio = min(4.0, max(0.25, wide / high))
    return 5 * min(1.5, ratio) + 1, 5 * min(1.5, ratio) / ratio + 0.4


def lay_over(ax: Axes, patches: Array, picture: Array | None, scale: ScalarMappable, look: Look) -> None:
    """Draw weights (rows, columns), over a picture where there is one. NaN lets the picture through and is hatched."""
    high, wide = patches.shape if picture is None else picture.shape[:2]
    extent = (0.0, float(wide), float(high), 0.0)
    if picture is None:
        low, top = scale.get_clim()
        blend = "bilinear" if look.smooth else "nearest"
        ax.imshow(patches, cmap=scale.cmap, vmin=low, vmax=top, extent=extent, interpolation=blend, origin="upper")
    else:
        blended = blend_over(patches, picture, scale, look)
        image = ax.imshow(blended, extent=extent, interpolation="nearest", origin="upper")
        image.set(cmap=scale.cmap, norm=scale.norm)  # for a colour bar of the user's own: these are colours already
    ax.set_xticks([])
    ax.set_yticks([])
    if np.isnan(patches).any():
        _hatch(ax, np.isnan(patches), picture is not None, (high / patches.shape[0], wide / patches.shape[1]))


def blend_over(patches: Array, picture: Array, scale: ScalarMappable, look: Look) -> Array:
    """The picture with the weights of its patches on it, (height, width, 3)."""
    size = picture.shape[0], picture.shape[1]
    blank = np.isnan(spread(patches, size))[..., None]
    weights = np.asarray(scale.norm(spread(np.nan_to_num(patches), size, look.smooth)))
    strength = np.clip(weights, 0, 1)
    # Darkened, so that white in the picture does not bleach the colours laid over it.
    grey = 0.6 * (picture @ np.array([0.299, 0.587, 0.114], picture.dtype))[..., None]
    if look.style == "mask":
        return np.where(blank, grey, picture * strength[..., None])
    # The square root makes middling weights visible; the colours are those of the weights themselves.
    colours = np.asarray(scale.cmap(strength))[..., :3]
    alpha = np.where(blank, 0, 0.85 * np.sqrt(strength)[..., None])
    return np.asarray((1 - alpha) * grey + alpha * colours)


def spread(patches: Any, size: tuple[int, int], smooth: bool = False) -> Any:
    """Patches at a picture's size: each pixel has its patch's value, or one interpolated between patches' centres."""
    sides = list(zip(patches.shape, size, strict=True))
    centres = [(np.arange(pixels) + 0.5) * count / pixels for count, pixels in sides]  # in patches, from the edge
    if not smooth:
        return patches[np.ix_(*(centre.astype(int) for centre in centres))]
    # (patches, pixels): how much of each patch is in a pixel, by its place between the two nearest patches' centres.
    down, across = (
        np.array([np.interp(centre - 0.5, range(count), one) for one in np.eye(count)], patches.dtype)
        for centre, (count, _) in zip(centres, sides, strict=True)
    )
    return down.T @ patches @ across


def frame_patch(ax: Axes, layout: Layout, token: int | None, size: tuple[int, int]) -> None:
    """Draw a frame round a token, where it is a patch, on a picture of (height, width)."""
    rows, columns = layout.sheet.shape
    high, wide = size[0] / rows, size[1] / columns
    for row, column in np.argwhere(layout.sheet == (-2 if token is None else token)):
        _frame(ax, (column * wide, row * high), (wide, high))


def _frame(ax: Axes, corner: tuple[float, float], size: tuple[float, float]) -> None:
    """A frame in black and white: one of the two shows on any ground."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 3.0), ("white", 1.2)):
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width, zorder=3))


def _draw_swatches(ax: Axes, weights: Array, names: list[str], scale: ScalarMappable, framed: int | None) -> None:
    """Draw each special token's weight as a square below the picture, on the patches' scale, and write the number."""
    count = len(weights)
    strip = ax.inset_axes((0.0, -0.08, min(1.0, 0.2 * count), 0.05))
    low, high = scale.get_clim()
    strip.imshow(
        weights[None],
        cmap=scale.cmap,
        vmin=low,
        vmax=high,
        aspect="auto",
        extent=(0, count, 1, 0),
        interpolation="nearest",
        origin="upper",
    )
    strip.set_yticks([])
    labels = [f"{name}\n{weight:.2g}" for name, weight in zip(names, weights, strict=True)]
    strip.set_xticks(np.arange(count) + 0.5, labels, fontsize=8 if count < 6 else 6, parse_math=False)
    strip.tick_params(length=0)
    if framed is not None:
        _frame(strip, (framed, 0), (1, 1))


def _hatch(ax: Axes, blank: npt.NDArray[np.bool_], has_picture: bool, size: tuple[float, float]) -> None:
    """Hatch the patches, of (height, width), whose weight is not known: unknown is not zero."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    runs = []
    for row, cells in enumerate(blank):
        edges = np.flatnonzero(np.diff(np.pad(cells.astype(int), 1)))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            corners = [(start, row), (stop, row), (stop, row + 1), (start, row + 1), (start, row)]
            runs.append(Path([(x * size[1], y * size[0]) for x, y in corners], closed=True))
    whole = Path.make_compound_path(*runs)
    colour = (1, 1, 1, 0.35) if has_picture else "0.75"
    ax.add_patch(PathPatch(whole, facecolor="none", edgecolor=colour, hatch="//", linewidth=0))


def panels_over_picture(
    maps: list[Array],
    names: list[str],
    layout: Layout,
    picture: Array | None,
    look: Look,
    *,
    keys: int,
    share: bool,
    columns: int,
    framed: int | None,
) -> Figure:
    """A panel for each row of weights (tokens,), over the picture, with a frame round one token.

    `keys` is how many tokens the weights are shared among. Shared scales end at the 99.5th percentile: one patch in one
    panel must not leave the others dark.
    """
    sheets = [layout.spread(row) for row in maps]
    size = sheet_size(layout, picture)
    width, height = panel_size(size, 2.0)
    has_bars = look.cbar and not share
    figure, axes = panels(len(sheets), columns, (width + (0.7 if has_bars else 0.0), height + 0.25))
    whole = np.stack(sheets)
    tops = [
        look.vmax
        if look.vmax is not None
        else row_top(whole if share else sheet, keys, look.vmin, 99.5 if share else 100)
        for sheet in sheets
    ]
    scales = [look.scale(top) for top in tops]
    is_cut = [exceeds(sheet, top) for sheet, top in zip(sheets, tops, strict=True)]
    for number, ax in enumerate(axes):
        lay_over(ax, sheets[number], picture, scales[number], look)
        frame_patch(ax, layout, framed, size)
        ax.set_title(names[number])
        if has_bars:
            colour_bar(figure, scales[number], ax, is_cut[number])
    if look.cbar and share:
        colour_bar(figure, scales[0], axes, any(is_cut))
    return figure

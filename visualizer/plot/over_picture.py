"""Weights laid over the picture that their patches cover, with a swatch for each special token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..layout import Layout
from ..reading import Array
from .canvas import (
    LABEL,
    OWN_SCALE,
    axes_of,
    colour_bar,
    draw_image,
    font_size,
    name_panels,
    panel_size,
    panels,
    shrunk,
    width_of,
    write_ticks,
)
from .look import Look, exceeds, row_top

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

_MOST_SWATCHES = 16  # more special tokens, such as those between the tiles of a picture, would be too small
_FINE = 1600  # pixels of the longer side of a picture in print: 300 dots per inch across 5 inches
_PIXELS_A_PATCH = 16  # of a picture with few pixels: with fewer, the edges of patches lie beside those of pixels


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
    scale = look.scale(top, over_picture=picture is not None)
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


def lay_over(
    ax: Axes, patches: Array, picture: Array | None, scale: ScalarMappable, look: Look, most: int = _FINE
) -> None:
    """Draw weights (rows, columns), over a picture where there is one. NaN lets the picture through and is hatched.

    The picture is drawn with at most `most` pixels a side.
    """
    high, wide = patches.shape if picture is None else picture.shape[:2]
    extent = (0.0, float(wide), float(high), 0.0)
    if picture is None:
        blend = "bilinear" if look.smooth else "antialiased"
        draw_image(ax, patches, extent=extent, cmap=scale.cmap, norm=scale.norm, interpolation=blend)
    else:
        blended = blend_over(patches, shrunk(picture, most, keep_ratio=True), scale, look, _PIXELS_A_PATCH)
        image = draw_image(ax, blended, extent=extent)
        image.set(cmap=scale.cmap, norm=scale.norm)  # for a colour bar of the user's own: these are colours already
    ax.set_xticks([])
    ax.set_yticks([])
    if np.isnan(patches).any():
        _hatch(ax, np.isnan(patches), picture is not None, (high / patches.shape[0], wide / patches.shape[1]))


def blend_over(patches: Array, picture: Array, scale: ScalarMappable, look: Look, least: int = 2) -> Array:
    """The picture with the weights of its patches on it, (height, width, 3).

    A small picture is magnified, to more than half of `least` pixels for a side of each patch.
    """
    for axis, count in enumerate(patches.shape):  # else a picture that is smaller than its patches would hide some
        picture = picture.repeat(max(1, least * count // picture.shape[axis]), axis)
    size = picture.shape[0], picture.shape[1]
    weights = np.asarray(scale.norm(spread(np.nan_to_num(patches), size, look.smooth)))
    strength = np.where(np.isnan(spread(patches, size)), 0, np.clip(weights, 0, 1))
    return np.clip(look.blend(strength, picture), 0, 1)


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
    from .artists import length_of

    count = len(weights)
    labels = [f"{name}\n{weight:.2g}" for name, weight in zip(names, weights, strict=True)]
    longest = max(width_of(line) for label in labels for line in label.split("\n"))
    wide = max(0.2, (longest + 1) * font_size() / length_of(ax.xaxis))  # its label is as large as other text
    strip = ax.inset_axes((0.0, -0.08, min(1.0, wide * count), 0.05))
    draw_image(strip, weights[None], aspect="auto", extent=(0, count, 1, 0), cmap=scale.cmap, norm=scale.norm)
    strip.set_yticks([])
    write_ticks(strip.xaxis, labels, [place + 0.5 for place in range(count)])
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
    colour = (0, 0, 0, 0.22) if has_picture else "0.75"
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
    share = share or look.vmax is not None
    sheets = [layout.spread(row) for row in maps]
    size = sheet_size(layout, picture)
    figure, axes = panels(len(sheets), columns, panel_size(size, 2.0), lines=1 if share else 2, has_bar=look.cbar)
    percent = 99.5 if share else 100
    tops = [row_top(np.stack(sheets) if share else sheet, keys, look.vmin, percent) for sheet in sheets]
    tops = tops if look.vmax is None else [look.vmax] * len(tops)
    scales = [look.scale(top, over_picture=picture is not None) for top in tops]
    is_cut = any(exceeds(sheet, top) for sheet, top in zip(sheets, tops, strict=True))
    for ax, sheet, scale in zip(axes, sheets, scales, strict=True):
        lay_over(ax, sheet, picture, scale, look, _FINE // 2)
        frame_patch(ax, layout, framed, size)
    name_panels(axes, names, None if share else tops)
    if look.cbar and share:
        colour_bar(figure, scales[0], axes, is_cut)
    elif look.cbar:
        ends = replace(look, vmin=0).scale(1, over_picture=picture is not None)
        colour_bar(figure, ends, axes, is_cut, OWN_SCALE)
    return figure

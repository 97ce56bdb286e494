"""All layers of a model at once: `layers`, as a canvas of layers x heads or as a strip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reading import Array
from .canvas import (
    LABEL,
    Style,
    blend_over,
    check_style,
    colour_bar,
    lay_over,
    matrix_top,
    mosaic,
    panel_size,
    panels,
    row_top,
    scale_of,
    shrunk,
)
from .matrices import matrices
from .pictures import frame_patch
from .places import Grid, Size, read_grid, read_image
from .reading import Choice, head_words, read_layers, same_shape, select_layers, token_axes

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_THUMBNAIL = 96  # pixels that the picture has in a cell of the canvas


def layers(
    maps: Any,
    image: Any = None,
    *,
    head: Choice | None = None,
    query: int | tuple[int, int] | None = None,
    batch: Choice = 0,
    grid: tuple[int, int] | None = None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    style: Style = "overlay",
    smooth: bool = False,
    columns: int | None = None,
    share: bool = True,
    cmap: str | Colormap | None = None,
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    title: str | None = None,
) -> Figure:
    """All layers at once: the canvas of layers x heads, or one head's (or the mean head's) map in each layer.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> layers(maps).axes[0].get_ylabel()                                   # 12 x 6 matrices in one image
    'layer'
    >>> strip = layers(maps, np.zeros((56, 56, 3)), query=0, head="mean")  # what the class token attends to, 12 times
    >>> strip.axes[11].get_title()
    'layer 11'

    Args:
        maps, batch, cmap, vmin, title: as in `head`. The layers have one number of heads and of tokens.
        image: the picture that the patches cover, where `query` is given.
        head: None: the canvas of all heads; an index, "mean", "max" or "min": a strip of one map for each layer.
        query: None: whole matrices. A patch (row, column) or a token's index (0: the class token): only what it attends
            to, over the grid of patches; prefix tokens are left out.
        grid, image_size, patch_size, prefix_tokens, style, smooth: as in `query`.
        columns: how many panels of a strip stand side by side; None: six, or a few less where that fills the rows.
        share: one colour scale for all maps; else each has its own, which a canvas shows as shares of its end.
        vmax: None: the 99.5th percentile, of a query's map with its own scale the largest weight; but no less than
            4 / number of keys.

    On the canvas, maps of more than 256 tokens are shrunk to that size: each pixel is the mean of what it covers.

    Raises what `head` and `query` raise.
    """
    check_style(style)
    found = read_layers(maps)
    same_shape(found, "the canvas" if head is None else "the strip")
    picture = None if image is None else read_image(image)
    if query is None and picture is not None:
        raise ValueError(
            "an image shows what one query attends to: pass query= too, a patch (row, column) or a token's index; "
            "query=0 is the class token"
        )
    queries, keys = token_axes(found, 0)
    shape, token = None, None
    words = []
    if query is not None:
        shape = read_grid(
            keys,
            grid=grid,
            image_size=image_size,
            patch_size=patch_size,
            prefix_tokens=prefix_tokens,
            picture=None if picture is None else picture.shape[:2],
        )
        token = shape.token(query, queries, keys)
        words.append(f"query: {shape.name(token) if queries == keys else f'token {token}'}")
    cells = []  # of each layer (heads, rows, columns)
    for weights in select_layers(found, batch=batch, head=head, query=token):
        if shape is not None:
            cells.append(weights[:, 0, len(shape.prefix) :].reshape(-1, shape.rows, shape.columns))
        else:
            cells.append(weights if head is not None else np.stack([shrunk(one) for one in weights]))
    scale = _Scale(
        cmap or ("viridis" if shape is None else "inferno"), vmin, vmax, share, cbar, keys, shape is not None
    )
    if head is None:
        figure = _canvas(np.stack(cells), picture, scale, style, smooth)
    elif shape is None:
        names = [f"layer {number}" for number in range(len(cells))]
        strip = [weights[0] for weights in cells]
        figure = matrices(strip, names, (columns, 6, (2.2, 2.3)), share, scale.cmap, vmin, vmax, cbar)
    else:
        framed = token if queries == keys else None
        figure = _strip([weights[0] for weights in cells], picture, scale, style, smooth, columns, shape, framed)
    if head is not None and (which := head_words(found[0], head)):
        words.append(which)
    if words or title:
        figure.suptitle(", ".join(words) if title is None else title, parse_math=False)
    return figure


@dataclass(frozen=True)
class _Scale:
    """How weights become colours."""

    cmap: Any
    vmin: float | None
    vmax: float | None
    share: bool
    cbar: bool
    keys: int
    is_row: bool

    def top(self, weights: Array) -> float:
        """Where the colours of one map, or of all, end; one patch in one layer must not leave the others dark."""
        if self.vmax is not None:
            return self.vmax
        return (
            row_top(weights, self.keys, self.vmin, 99.5 if self.share else 100) if self.is_row else matrix_top(weights)
        )


def _canvas(cells: Array, picture: Array | None, scale: _Scale, style: str, smooth: bool) -> Figure:
    """Cells (layers, heads, rows, columns) as one image."""
    from matplotlib import pyplot as plt

    count, heads, high, wide = cells.shape
    label = LABEL
    if scale.share:
        top = scale.top(cells)
    else:
        own = [[scale.top(cell) for cell in row] for row in cells]
        cells, top, label = (
            cells / np.array(own, cells.dtype)[..., None, None],
            1.0,
            "attention weight, as a share of the map's own scale",
        )
    ratio = high / wide if picture is None else picture.shape[0] / picture.shape[1]
    side = min(1.0, max(0.4, 11 / max(heads, count * ratio)))  # inches across
    size = max(2.5, side * heads) + 1.7, max(2.0, side * ratio * count) + 0.9
    figure = plt.figure(figsize=size, layout="compressed")
    ax = figure.add_subplot(xlabel="head", ylabel="layer")
    colours = scale_of(scale.cmap, scale.vmin, top, style)
    if scale.cbar:
        colour_bar(figure, colours, ax, bool(np.max(np.nan_to_num(cells)) > top), label)
    if picture is None:
        mosaic(ax, cells, cmap=scale.cmap, vmin=colours.get_clim()[0], vmax=top)
    else:
        small = shrunk(np.ascontiguousarray(picture), _THUMBNAIL)
        mosaic(ax, np.array([[blend_over(cell, small, colours, style, smooth) for cell in row] for row in cells]))
    return figure


def _strip(
    maps: list[Array],
    picture: Array | None,
    scale: _Scale,
    style: str,
    smooth: bool,
    columns: int | None,
    shape: Grid,
    framed: int | None,
) -> Figure:
    """A panel for each layer's (rows, columns)."""
    high, wide = (shape.rows, shape.columns) if picture is None else picture.shape[:2]
    across, down = panel_size(high, wide, 2.0)
    own_bar = 0.7 if scale.cbar and not scale.share else 0.0
    figure, axes, _ = panels(len(maps), columns, 6, (across + own_bar, down + 0.25))
    tops = [scale.top(np.stack(maps) if scale.share else patches) for patches in maps]
    cut = [bool(np.max(np.nan_to_num(patches)) > top) for patches, top in zip(maps, tops, strict=True)]
    for number, ax in enumerate(axes):
        colours = scale_of(scale.cmap, scale.vmin, tops[number], style)
        lay_over(ax, maps[number], picture, colours, style, smooth)
        frame_patch(ax, shape, framed, (wide, high))
        ax.set_title(f"layer {number}")
        if scale.cbar and not scale.share:
            colour_bar(figure, colours, ax, cut[number])
    if scale.cbar and scale.share:
        colour_bar(figure, colours, axes, any(cut))
    return figure

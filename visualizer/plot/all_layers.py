"""All layers of a model at once: `layers`, as a canvas of layers x heads or as a strip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..images import picture_of
from ..layout import layout_of
from ..reading import Array
from .canvas import LABEL, colour_bar, font_size, full_rows, mosaic, new_figure, shrunk, widest, write_title
from .look import Keywords, Look, OverPicture, exceeds, matrix_top, row_top, without_future
from .matrices import matrices
from .over_picture import blend_over, panels_over_picture
from .selection import (
    QUERY_NEEDED,
    Choice,
    batch_over,
    find_query,
    head_words,
    note_of,
    read_layers,
    same_shape,
    select_layers,
    token_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layers"]

_OPTIONS = Keywords(OverPicture, cmap=None)
_THUMBNAIL = 96  # pixels: the largest side of the picture in a cell of the canvas


@_OPTIONS.show
def layers(
    maps: Any,
    image: Any = None,
    *,
    head: Choice | None = None,
    query: int | tuple[int, ...] | str | None = None,
    batch: Choice | None = None,
    columns: int | None = None,
    share: bool = True,
    **options: Unpack[OverPicture],
) -> Figure:
    """All layers at once: the canvas of layers x heads, or one head's (or the mean head's) map in each layer.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> layers(maps).axes[0].get_ylabel()                                   # 12 x 6 matrices in one image
    'layer'
    >>> strip = layers(maps, np.zeros((56, 56, 3)), query=0, head="mean")  # what the class token attends to, 12 times
    >>> strip.axes[11].get_title()
    'layer 11'

    Args:
        maps, batch, vmin, cbar, sinks: as in `head`. All layers have the same number of heads and of tokens.
        image: the picture that the patches cover, where `query` is given.
        head: None: the canvas of all heads; an index, "mean", "max" or "min": a strip of one map for each layer.
        query: None: whole matrices. A patch (row, column) or a token's index (0: the class token): only what it attends
            to, over the grid of patches; prefix tokens are left out.
        layout, grid, image_size, patch_size, prefix_tokens, style, smooth: as in `query`.
        columns: the number of a strip's panels in a row; None: six, or about as many where that fills the rows.
        share: True: one colour scale for all maps; False: one for each, in shares of its end, which a strip writes
            above each panel.
        cmap: None: "viridis" for matrices, "YlOrRd" for what a query attends to.
        vmax: None: the 99.5th percentile; of a query's map with a scale of its own the largest weight; but no less
            than 4 / number of keys.
        title: None: the query and the head.

    On the canvas, maps of more than 256 tokens are shrunk to that size: each pixel is the mean of what it covers.

    Raises what `head` and `query` raise.
    """
    look = _OPTIONS.look(options)
    maps = [
        one if query is None or not hasattr(one, "stitched") else one.stitched() for one in read_layers(maps, batch)
    ]
    same_shape(maps, "the canvas" if head is None else "the strip")
    picture = picture_of(image)
    batch = batch_over(picture, maps, batch)
    if query is None and picture is not None:
        raise ValueError(QUERY_NEEDED)
    words = []
    layout, token, framed, end = None, None, None, matrix_top
    axes = token_axes(maps, 0, batch)
    if query is not None:
        layout = layout_of(axes.keys, options, picture, axes.layout)
        if layout.windows is not None:
            raise ValueError(f"these layers attend within windows, {layout}: plot.query shows one layer")
        token, name, framed = find_query(axes, layout, query)
        picture = layout.on(picture)
        words.append(f"query: {name}")
        # Where the scale is shared, one patch in one layer must not leave the others dark.
        end = functools.partial(row_top, keys=axes.keys, vmin=look.vmin, percent=99.5 if share else 100)
    share = share or look.vmax is not None
    look = replace(look, cmap=look.cmap or ("viridis" if layout is None else "YlOrRd"))
    chosen = list(select_layers(maps, batch=batch, head=head, query=token))  # of each layer (heads, queries, keys)
    if head is None:
        if layout is not None:
            cells = [layout.spread(weights[:, 0]) for weights in chosen]
        else:
            cells = [_cells(weights) for weights in chosen]
        figure = _canvas(np.stack(cells), picture, look, share, end)
    else:
        columns = full_rows(len(chosen), columns, 6)
        names = [f"layer {number}" for number in range(len(chosen))]
        if layout is None:
            strip = [weights[0] for weights in chosen]
            figure = matrices(strip, names, look, share=share, columns=columns)
        else:
            rows = [weights[0, 0] for weights in chosen]
            figure = panels_over_picture(
                rows, names, layout, picture, look, keys=axes.keys, share=share, columns=columns, framed=framed
            )
        if reduction := head_words(maps[0], head):
            words.append(reduction)
    if note := note_of(maps):
        words.append(note)
    if words or look.title:
        write_title(figure, look.title, ", ".join(words))
    return figure


def _cells(maps: Array) -> Array:
    """The matrices of a layer's heads, (heads, queries, keys), as small as a cell of the canvas; NaN is not seen."""
    seen = without_future(maps)
    cells = np.stack([shrunk(np.nan_to_num(one)) for one in seen])
    blank = shrunk(np.isnan(seen[0]).astype(maps.dtype)) > 0.999  # of the keys after a query, alike in all heads
    cells[:, blank] = np.nan
    return cells


def _canvas(cells: Array, picture: Array | None, look: Look, share: bool, end: Callable[[Array], float]) -> Figure:
    """Cells (layers, heads, rows, columns) as one image, in colours up to `vmax` or else to the end of the weights."""
    count, heads, high, wide = cells.shape
    if share:
        top, label = end(cells) if look.vmax is None else look.vmax, LABEL
    else:
        tops = [[end(cell) for cell in row] for row in cells]
        cells = cells / np.array(tops, cells.dtype)[..., None, None]
        top, label = 1.0, "attention weight, as a share of the map's own scale"
    ratio = high / wide if picture is None else picture.shape[0] / picture.shape[1]
    line = 1.2 * font_size() / 72
    side = min(1.0, max(0.4, 11 / max(heads, count * ratio)))  # inches across
    side = min(side, max(0.1, (widest() - 10 * line) / heads))
    least = min(2.5, widest() - 10 * line), 8 * line
    figure = new_figure(max(least[0], side * heads) + 10 * line, max(least[1], side * ratio * count) + 5 * line)
    ax = figure.add_subplot(xlabel="head", ylabel="layer")
    scale = look.matrix_scale(top) if end is matrix_top else look.scale(top, over_picture=picture is not None)
    if look.cbar:
        colour_bar(figure, scale, ax, exceeds(cells, top), label)
    if picture is None:
        mosaic(ax, cells, cmap=scale.cmap, norm=scale.norm)
    else:
        small = shrunk(np.ascontiguousarray(picture), _THUMBNAIL, keep_ratio=True)
        image = mosaic(ax, np.array([[blend_over(cell, small, scale, look) for cell in row] for row in cells]))
        image.set(cmap=scale.cmap, norm=scale.norm)  # for a colour bar of the user's own
    return figure

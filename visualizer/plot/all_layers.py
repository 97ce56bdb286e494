"""All layers of a model at once: `layers`, as a canvas of layers x heads or as a strip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..places import Grid, grid_of, picture_of
from ..reading import Array
from .canvas import LABEL, colour_bar, full_rows, mosaic, panel_size, panels, shrunk, write_title
from .look import Keywords, Look, OverPicture, exceeds, matrix_top, row_top
from .matrices import matrices
from .over_picture import blend_over, frame_patch, lay_over
from .selection import Choice, head_words, read_layers, same_shape, select_layers, token_axes

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
    query: int | tuple[int, int] | None = None,
    batch: Choice = 0,
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
        maps, batch, vmin, cbar: as in `head`. All layers have the same number of heads and of tokens.
        image: the picture that the patches cover, where `query` is given.
        head: None: the canvas of all heads; an index, "mean", "max" or "min": a strip of one map for each layer.
        query: None: whole matrices. A patch (row, column) or a token's index (0: the class token): only what it attends
            to, over the grid of patches; prefix tokens are left out.
        grid, image_size, patch_size, prefix_tokens, style, smooth: as in `query`.
        columns: the number of a strip's panels in a row; None: six, or a few less where that fills the rows.
        share: True: one colour scale for all maps; False: one for each, which a canvas shows as shares of its end.
        cmap: None: "viridis" for matrices, "inferno" for what a query attends to.
        vmax: None: the 99.5th percentile; of a query's map with a scale of its own the largest weight; but no less
            than 4 / number of keys.
        title: None: the query and the head.

    On the canvas, maps of more than 256 tokens are shrunk to that size: each pixel is the mean of what it covers.

    Raises what `head` and `query` raise.
    """
    look = _OPTIONS.look(options)
    maps = read_layers(maps)
    same_shape(maps, "the canvas" if head is None else "the strip")
    picture = picture_of(image)
    if query is None and picture is not None:
        raise ValueError(
            "an image shows what one query attends to: pass query= too, a patch (row, column) or a token's index; "
            "query=0 is the class token"
        )
    queries, keys = token_axes(maps, 0)
    words = []
    if query is None:
        grid, token, end = None, None, matrix_top
    else:
        grid = grid_of(keys, options, picture)
        token = grid.token(query, queries, keys)
        words.append(f"query: {grid.name(token) if queries == keys else f'token {token}'}")
        # Where the scale is shared, one patch in one layer must not leave the others dark.
        end = functools.partial(row_top, keys=keys, vmin=look.vmin, percent=99.5 if share else 100)
    look = replace(look, cmap=look.cmap or ("viridis" if grid is None else "inferno"))
    chosen = select_layers(maps, batch=batch, head=head, query=token)  # of each layer (heads, queries, keys)
    if grid is not None:
        cells = [grid.patches(weights[:, 0]) for weights in chosen]
    elif head is None:
        cells = [np.stack([shrunk(one) for one in weights]) for weights in chosen]
    else:
        cells = list(chosen)
    if head is None:
        figure = _canvas(np.stack(cells), picture, look, share, end)
    else:
        strip = [weights[0] for weights in cells]
        columns = full_rows(len(strip), columns, 6)
        if grid is None:
            names = [f"layer {number}" for number in range(len(strip))]
            figure = matrices(strip, names, look, share=share, columns=columns, size=(2.2, 2.3))
        else:
            figure = _strip(strip, picture, look, share, end, columns, grid, token if queries == keys else None)
        if reduction := head_words(maps[0], head):
            words.append(reduction)
    if words or look.title:
        write_title(figure, look.title, ", ".join(words))
    return figure


def _canvas(cells: Array, picture: Array | None, look: Look, share: bool, end: Callable[[Array], float]) -> Figure:
    """Cells (layers, heads, rows, columns) as one image, in colours up to `vmax` or else to the end of the weights."""
    from matplotlib import pyplot as plt

    count, heads, high, wide = cells.shape
    if share:
        top, label = look.vmax if look.vmax is not None else end(cells), LABEL
    else:
        tops = [[look.vmax if look.vmax is not None else end(cell) for cell in row] for row in cells]
        cells = cells / np.array(tops, cells.dtype)[..., None, None]
        top, label = 1.0, "attention weight, as a share of the map's own scale"
    ratio = high / wide if picture is None else picture.shape[0] / picture.shape[1]
    side = min(1.0, max(0.4, 11 / max(heads, count * ratio)))  # inches across
    size = max(2.5, side * heads) + 1.7, max(2.0, side * ratio * count) + 0.9
    figure = plt.figure(figsize=size, layout="compressed")
    ax = figure.add_subplot(xlabel="head", ylabel="layer")
    scale = look.scale(top)
    if look.cbar:
        colour_bar(figure, scale, ax, exceeds(cells, top), label)
    if picture is None:
        mosaic(ax, cells, cmap=look.cmap, vmin=scale.get_clim()[0], vmax=top)
    else:
        small = shrunk(np.ascontiguousarray(picture), _THUMBNAIL)
        mosaic(ax, np.array([[blend_over(cell, small, scale, look) for cell in row] for row in cells]))
    return figure


def _strip(
    maps: list[Array],
    picture: Array | None,
    look: Look,
    share: bool,
    end: Callable[[Array], float],
    columns: int,
    grid: Grid,
    framed: int | None,
) -> Figure:
    """A panel for the (rows, columns) of each layer, with a frame round the query."""
    size = grid.size(picture)
    width, height = panel_size(size, 2.0)
    has_bars = look.cbar and not share
    figure, axes = panels(len(maps), columns, (width + (0.7 if has_bars else 0.0), height + 0.25))
    tops = [end(np.stack(maps) if share else patches) if look.vmax is None else look.vmax for patches in maps]
    scales = [look.scale(top) for top in tops]
    is_cut = [exceeds(patches, top) for patches, top in zip(maps, tops, strict=True)]
    for number, ax in enumerate(axes):
        lay_over(ax, maps[number], picture, scales[number], look)
        frame_patch(ax, grid, framed, size)
        ax.set_title(f"layer {number}")
        if has_bars:
            colour_bar(figure, scales[number], ax, is_cut[number])
    if look.cbar and share:
        colour_bar(figure, scales[0], axes, any(is_cut))
    return figure

"""Weights over the picture that their patches cover: `query`, `class_token`, `rollout`, `overlay`, `highlight`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..images import picture_of
from ..layout import Layout, Patches, Size, layout_of
from ..reading import Array, Reduction, as_numbers, is_array
from .canvas import LABEL, axes_of, draw_image, lay_out, name_panels, panel_size, panels, write_title
from .look import Blend, Colours, Keywords, Look, OfMaps, OverPicture, Scale
from .over_picture import draw_row, figure_size, sheet_size, spread
from .selection import (
    Choice,
    Row,
    batch_over,
    head_words,
    note_of,
    read_layers,
    select_mean_row,
    select_row,
    token_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_token", "highlight", "overlay", "query", "rollout"]


class _OnPicture(Blend, Scale, total=False):
    """The keywords of `overlay`, which takes weights of patches."""


class _Beside(Patches, Blend, Colours, OfMaps, total=False):
    """The keywords of `rollout`, whose panels have a colour scale each."""


_OPTIONS = Keywords(OverPicture, cmap="YlOrRd")
_OVERLAY = Keywords(_OnPicture, cmap="YlOrRd")
_ROLLOUT = Keywords(_Beside, cmap="YlOrRd")


@_OPTIONS.show
def query(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, ...] | str,
    query_tokens: Sequence[str] | None = None,
    layer: Choice | None = -1,
    head: Choice | None = "mean",
    batch: Choice | None = None,
    window: Size | None = None,
    shift: Size = 0,
    ax: Axes | None = None,
    **options: Unpack[OverPicture],
) -> Axes:
    """What one patch, or one word, attends to, over the picture; a patch has a black and white frame.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> query(maps, np.zeros((56, 56, 3)), query=(2, 1)).get_title()
    'query: patch (2, 1), layer 11, mean of 6 heads'

    Where the patches lie, maps that `attention` records know. Of other maps the keywords say it, or the picture, where
    only one grid makes square patches on it; without a picture the patches must form a square.

    Args:
        maps, layer, head, batch, ax, cmap, vmin, cbar, sinks, title: as in `head`; by default the mean of the last
            layer's heads.
        image: the picture that the patches cover: an array, a tensor, a PIL image or a file's path, or the frames of a
            video; None: the weights alone. It is the picture as the model saw it, at any size: a warning says where it
            has other proportions. Of a batch whose image is not chosen, the map is that of the image which the model
            saw as this picture, where maps know it, or else of the first.
        query: a patch as (row, column), of a video as (frame, row, column); or a token's index, prefix tokens included;
            or a word or a name, such as "CLS", where these are known.
        query_tokens: the words of the queries, where the queries are a text's and only the keys are patches.
        window, shift: for Swin's layers, whose maps are (batch x windows, heads, window x window, window x window): the
            sides of a window and of its shift in patches, one number or (rows, columns). `query` is a patch and `grid`
            the whole grid; keys outside the window are hatched. Every second block has a shift, of half a window.
        layout: what the tokens are, a `visualizer.Layout`, in place of the five below.
        grid: (rows, columns) of patches.
        image_size, patch_size: in pixels, one number or (height, width); image_size=None: the picture's own.
        prefix_tokens: the number of tokens before the patches, or their names; None: as many as the grid leaves over.
            Each has a swatch below the picture, on the patches' scale, with its weight.
        style: "overlay": the picture in grey, with colours that cover it the more, the larger the weight; "mask": the
            picture in its own colours, which fades to white where the weight is low. The colour bar has the colours
            that weights have on an empty picture.
        smooth: interpolate between patches instead of showing their edges.
        vmax: None: the largest weight of a patch, but no less than 4 / number of keys, so that a row that attends to
            everything alike does not look like one that attends to something.

    Raises what `head` raises, and ValueError where grid, picture and tokens do not fit together; the message lists the
    grids that would.
    """
    look, picture = _OPTIONS.look(options), picture_of(image)
    which: dict[str, Any] = {"layer": layer, "batch": batch, "head": head}
    row = select_row(maps, query, picture, options, query_tokens=query_tokens, window=window, shift=shift, **which)
    return _draw(row, picture, look, ax)


def _draw(row: Row, picture: Array | None, look: Look, ax: Axes | None) -> Axes:
    """Draw what a query attends to; the title says what the query is."""
    ax = draw_row(row.weights, row.layout, row.layout.on(picture), look, ax=ax, framed=row.framed)
    write_title(ax, look.title, ", ".join(part for part in (f"query: {row.name}", row.label) if part))
    return ax


@_OPTIONS.show
def class_token(
    maps: Any,
    image: Any = None,
    *,
    token: int = 0,
    layer: Choice | None = -1,
    head: Choice | None = "mean",
    batch: Choice | None = None,
    ax: Axes | None = None,
    **options: Unpack[OverPicture],
) -> Axes:
    """What the class token attends to, over the picture.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> class_token(maps, np.zeros((56, 56, 3))).get_title()
    'query: CLS, layer 11, mean of 6 heads'

    Of a model that is known to have no class token, such as a Swin, it is what all patches attend to in the mean: its
    output is the mean of all patches.

    `token` is the class token's index, 0 in nearly every model. The other arguments, and what is raised, as in `query`.
    """
    look = _OPTIONS.look(options)
    layers, picture = read_layers(maps, batch), picture_of(image)
    at = batch_over(picture, layers, batch)
    axes = token_axes(layers, layer, at)
    layout = layout_of(axes.keys, options, picture, axes.layout)
    is_known = axes.layout is not None or options.get("layout") is not None
    if axes.is_self or not is_known:
        is_patch = layout.windows is not None or layout.place(layout.token(token)) is not None
        if is_known and token == 0 and (is_patch or layout.name(0).startswith("REG")):
            row = select_mean_row(layers, layout, layer=layer, batch=at, head=head)
            return _draw(row, picture, look, ax)
        if is_patch:
            raise ValueError(
                f"token {token} of {axes.keys} is a patch, as the tokens are {layout}: these maps have no class token "
                "there. Use plot.query for a patch, or say by prefix_tokens= how many tokens come before the "
                "patches"
            )
    batch = at if is_array(maps) else batch  # of one array, its axes were asked about above
    return query(layers, picture, query=token, layer=layer, head=head, batch=batch, ax=ax, **options)


@_ROLLOUT.show
def rollout(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, ...] | str | None = None,
    heads: Reduction = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    batch: int | None = None,
    **options: Unpack[_Beside],
) -> Figure:
    """The picture, what the last layer's class token attends to, and its rollout through all layers, side by side.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> [ax.get_title() for ax in rollout(maps, np.zeros((56, 56, 3)), cbar=False).axes]
    ['picture', 'layer 11, mean of 6 heads', 'rollout of 12 layers']

    The rollout is `analysis.rollout`. The two have a colour scale each, as a rollout spreads over more patches.

    Args:
        maps: the layers from the first to the last, as in `head`, with one number of tokens.
        image, layout, grid, image_size, patch_size, prefix_tokens, style, smooth, cmap, cbar: as in `query`.
        query: as in `query`; None: the class token, or what all patches attend to in the mean where the model is known
            to have none.
        heads, residual, discard: as in `analysis.rollout`; `heads` reduces the last layer too.
        sinks: as in `head`: "remove" shows what a few patches that draw most of a rollout hide.
        batch: the index of one image.
        title: above all panels; None: the query.

    Raises what `query` and `analysis.rollout` raise.
    """
    from .. import analysis

    look = _ROLLOUT.look(options)
    analysis.layers.check_heads(heads)
    if isinstance(batch, str):
        raise TypeError(f"batch={batch!r}: pass the index of one image")
    layers, picture = read_layers(maps, batch), picture_of(image)
    batch = int(batch_over(picture, layers, batch))
    while len(layers) > 1 and getattr(layers[-1], "kind", None) == "cross":
        layers.pop()  # a head that pools the patches, behind the layers
    axes = token_axes(layers, -1, batch)
    layout = layout_of(axes.keys, options, picture, axes.layout)
    if query is None and axes.layout is not None and layout.first_patch == 0:
        row = select_mean_row(layers, layout, layer=-1, batch=batch, head=heads)
        tokens: Any = list(range(layout.count))
    else:
        row = select_row(layers, query or 0, picture, options, layer=-1, batch=batch, head=heads)
        tokens = row.framed
    rolled = as_numbers(analysis.rollout(layers, query=tokens, heads=heads, residual=residual, discard=discard))[batch]
    rolled = rolled.mean(0) if rolled.ndim == 2 else rolled
    # The rollout's keys are the patches of the first layer, which may have been merged since.
    at_first = row.layout if len(rolled) == row.layout.count else token_axes(layers, 0, batch).layout or row.layout

    behind = layout.on(picture)
    width, height = panel_size(sheet_size(layout, behind), 2.6)
    count = 2 + (picture is not None)
    figure, axes_drawn = panels(count, count, (width, 1.08 * height), lines=3, has_bar=False, bars_below=look.cbar)
    if behind is not None:
        draw_image(axes_drawn[0], behind)
        axes_drawn[0].set(xticks=[], yticks=[])
    source = ", ".join(filter(None, (f"layer {len(layers) - 1}", head_words(layers[-1], heads))))
    titles = (source, f"rollout of {len(layers)} layers")
    for ax, weights, place, label in zip(
        axes_drawn[-2:], (row.weights, rolled), (row.layout, at_first), (LABEL, "rollout"), strict=True
    ):
        framed = row.framed if place is row.layout else None
        draw_row(weights, place, behind, look, ax=ax, framed=framed, label=label)
    for ax in axes_drawn:
        ax.set_anchor("N")  # the photograph has no bar below it; a bar would have moved the others down
    name_panels(axes_drawn, ["picture", *titles][-count:])
    write_title(figure, look.title, ", ".join(filter(None, (f"query: {row.name}", note_of(layers)))))
    lay_out(figure)
    return figure


@_OVERLAY.show
def overlay(
    weights: Any,
    image: Any = None,
    *,
    layout: Layout | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    ax: Axes | None = None,
    label: str = LABEL,
    **options: Unpack[_OnPicture],
) -> Axes:
    """Any weights of patches over the picture: a rollout, a relevance, a firing rate.

    >>> ax = overlay(np.eye(4), np.zeros((56, 56, 3)), label="relevance")
    >>> len(ax.images)
    1

    Args:
        weights: (rows, columns) of patches, or (tokens,), with `layout`, `grid` and `prefix_tokens` as in `query`;
            `maps.layout` is that of recorded maps. NaN is hatched.
        image, ax, style, smooth, cmap, cbar: as in `query`.
        label: the words at the colour bar.
        vmin, vmax: the ends of the colour scale; vmax=None: the largest weight of a patch.
        title: None: none.

    Raises:
        ValueError: a shape or content that cannot be the weights of a picture, or a grid that does not fit.
        TypeError: a mask of True and False, which `highlight` draws.
    """
    look = _OVERLAY.look(options)
    picture = picture_of(image)
    values = as_numbers(weights, "weights")
    if _is_mask(weights):
        raise TypeError("weights is a mask of True and False: plot.highlight draws it")
    row, place = _on_grid(values, "weights", {"layout": layout, "grid": grid, "prefix_tokens": prefix_tokens}, picture)
    if np.isinf(row).any() or np.isnan(row).all():
        raise ValueError("weights holds infinite values, or nothing but NaN: there is no colour for these")
    if look.vmax is None:
        largest, lowest = float(np.max(np.nan_to_num(place.spread(row)))), look.vmin or 0.0
        look = replace(look, vmax=largest if largest > lowest else lowest + 1)
    ax = draw_row(row, place, place.on(picture), look, ax=ax, label=label)
    write_title(ax, look.title)
    return ax


def highlight(
    mask: Any,
    image: Any = None,
    *,
    layout: Layout | None = None,
    grid: tuple[int, int] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Chosen patches on the picture: as they are inside, faded outside, with an outline round them.

    >>> ax = highlight(np.eye(4, dtype=bool), np.ones((56, 56, 3)))
    >>> len(ax.collections[0].get_segments())  # pieces of the outline, white on black
    16

    Args:
        mask: True where a patch is chosen, (rows, columns), or (patches,) with `grid` as in `query`, or (tokens,) with
            `layout`; for example what `analysis.mass_mask` gives.
        image: the picture that the patches cover; None: the mask alone.
        ax, title: as in `overlay`.

    Raises:
        TypeError: the mask is not of True and False.
        ValueError: mask and grid do not fit together.
    """
    from matplotlib.collections import LineCollection

    if not _is_mask(mask):
        raise TypeError(
            f"mask is {getattr(mask, 'dtype', type(mask).__name__)}, not of True and False: pass "
            "analysis.mass_mask(weights), or weights > threshold"
        )
    picture = picture_of(image)
    where: Patches = {"grid": grid, "prefix_tokens": 0} if layout is None else {"layout": layout, "grid": grid}
    values, place = _on_grid(as_numbers(mask, "mask"), "mask", where, picture)
    picture = place.on(picture)
    chosen = place.spread(values) > 0
    high, wide = sheet_size(place, picture)
    ax = axes_of(ax, figure_size(high, wide))
    lit = np.full((*chosen.shape, 3), 0.5) if picture is None else picture
    inside = spread(chosen, (high, wide))[..., None]
    draw_image(ax, np.where(inside, lit, 0.7 + 0.3 * lit), extent=(0, wide, high, 0))
    ax.set(xticks=[], yticks=[])
    lines = _outline(chosen) * np.array([wide / chosen.shape[1], high / chosen.shape[0]])
    for colour, width in (("black", 3.0), ("white", 1.2)):
        ax.add_collection(LineCollection(list(lines), colors=colour, linewidths=width, capstyle="round"), autolim=False)
    write_title(ax, title)
    return ax


def _is_mask(value: Any) -> bool:
    """Whether an array or tensor is of True and False."""
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    return str(value.dtype).removeprefix("torch.") == "bool"


def _on_grid(values: Array, name: str, where: Patches, picture: Array | None) -> tuple[Array, Layout]:
    """The values as one row of tokens, and the layout of these."""
    grid, prefix_tokens = where.get("grid"), where.get("prefix_tokens")
    if values.ndim == 1 and len(values):
        return values, layout_of(len(values), where, picture)
    fits = values.ndim == 2 and 0 not in values.shape and where.get("layout") is None
    if not fits or grid not in (None, values.shape) or (len(values) == 1 and grid is None and values.shape[1] > 1):
        raise ValueError(
            f"{name} has shape {values.shape}"
            + ("" if grid is None else f" and grid={grid}")
            + "; expected one picture's (rows, columns) of patches, or (tokens,)"
            + (f"; pass {name}[0] for the first of a batch" if values.ndim > 1 and values.shape[0] else "")
        )
    if prefix_tokens not in (None, 0):
        raise ValueError(f"prefix_tokens={prefix_tokens!r}, but {name} of shape {values.shape} has patches only")
    return values.ravel(), Layout.picture(values.shape)


def _outline(chosen: Any) -> Any:
    """The edges between chosen and other cells, (edges, 2 ends, 2), as (x, y) in cells."""
    padded = np.pad(chosen, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])[:, ::-1]  # left of (x, y)
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])[:, ::-1]  # above (x, y)
    down, right = np.array([0, 1]), np.array([1, 0])
    return np.concatenate([np.stack([upright, upright + down], 1), np.stack([level, level + right], 1)])

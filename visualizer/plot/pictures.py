"""Weights over the picture that their patches cover: `query`, `class_token`, `rollout`, `overlay`, `highlight`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..places import Grid, Patches, Size, Window, grid_of, picture_of, read_window, whole_grid, word_index
from ..reading import Array, Reduction, as_numbers
from .canvas import LABEL, axes_of, lay_out, panel_size, panels, write_title
from .look import Blend, Colours, Keywords, OverPicture, Scale
from .over_picture import draw_row, figure_size, spread
from .selection import Choice, Selection, head_words, read_layers, select, token_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["class_token", "highlight", "overlay", "query", "rollout"]


class _OnPicture(Blend, Scale, total=False):
    """The keywords of `overlay`, which takes weights of patches."""


class _Beside(Patches, Blend, Colours, total=False):
    """The keywords of `rollout`, whose panels have a colour scale each."""


_OPTIONS = Keywords(OverPicture, cmap="inferno")
_OVERLAY = Keywords(_OnPicture, cmap="inferno")
_ROLLOUT = Keywords(_Beside, cmap="inferno")


@_OPTIONS.show
def query(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, int] | str,
    query_tokens: Sequence[str] | None = None,
    layer: Choice | None = -1,
    head: Choice | None = "mean",
    batch: Choice = 0,
    window: Size | None = None,
    shift: Size = 0,
    ax: Axes | None = None,
    **options: Unpack[OverPicture],
) -> Axes:
    """What one patch, or one word, attends to, over the picture; a patch has a black and white frame.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> query(maps, np.zeros((56, 56, 3)), query=(2, 1)).get_title()
    'query: patch (2, 1), layer 11, mean of 6 heads'

    Args:
        maps, layer, head, batch, ax, cmap, vmin, cbar, title: as in `head`; by default the mean of the last layer's
            heads.
        image: the picture that the patches cover: an array, a tensor or a PIL image; None: the weights alone.
        query: a patch as (row, column), or a token's index, prefix tokens included; with `query_tokens` also a word.
        query_tokens: the words of the queries, where the queries are a text's and only the keys are patches.
        window, shift: for Swin's layers, whose maps are (batch x windows, heads, window x window, window x window): the
            sides of a window and of its shift in patches, one number or (rows, columns). `query` is a patch and `grid`
            the whole grid; keys outside the window are hatched. Every second block has a shift, of half a window.
        grid: (rows, columns) of patches. You can leave it out where you pass `patch_size`, or where the patches form a
            square.
        image_size, patch_size: in pixels, one number or (height, width); image_size=None: the picture's own.
        prefix_tokens: the number of tokens before the patches, or their names; None: as many as the grid leaves over.
            Each has a swatch below the picture, on the patches' scale, with its weight.
        style: "overlay": the picture in grey, coloured by weight; "mask": the picture itself, dark where the weight is
            low.
        smooth: interpolate between patches instead of showing their edges.
        vmax: None: the largest weight of a patch, but no less than 4 / number of keys, so that a row that attends to
            everything alike does not look like one that attends to something.

    Raises what `head` raises, and ValueError where grid, picture and tokens do not fit together.
    """
    look = _OPTIONS.look(options)
    layers, picture = read_layers(maps), picture_of(image)
    queries, keys = token_axes(layers, layer)
    word = None
    if window is not None:
        if isinstance(layer, str) or isinstance(batch, str):
            raise ValueError(
                f"layer={layer!r}, batch={batch!r}: with window=, pass the index of one layer and one image"
            )
        grid = whole_grid(options, picture)
        patch = grid.patch(query)
        token, is_key = patch[0] * grid.columns + patch[1], True
        place = read_window(patch, grid, keys, window, shift)
        chosen = _select_in_window(layers, layer, head, batch, place, grid)
    else:
        grid = grid_of(keys, options, picture)
        if query_tokens is not None:
            if isinstance(query_tokens, str) or len(query_tokens) != queries:
                raise ValueError(
                    f"query_tokens are the words of the {queries} queries, a list: got {query_tokens!r:.80}"
                )
            query = word_index(query, query_tokens) if isinstance(query, str) else query
        token = grid.token(query, queries, keys)
        word = None if query_tokens is None else repr(query_tokens[token])
        is_key = word is None and queries == keys
        chosen = select(layers, layer=layer, batch=batch, head=head, query=token)
    row = chosen.weights[0]
    _check_row(row, token)
    ax = draw_row(row, grid, picture, look, ax=ax, framed=token if is_key else None)
    name = word or (grid.name(token) if is_key else f"token {token}")
    write_title(ax, look.title, ", ".join(part for part in (f"query: {name}", chosen.label) if part))
    return ax


@_OPTIONS.show
def class_token(
    maps: Any,
    image: Any = None,
    *,
    token: int = 0,
    layer: Choice | None = -1,
    head: Choice | None = "mean",
    batch: Choice = 0,
    ax: Axes | None = None,
    **options: Unpack[OverPicture],
) -> Axes:
    """What the class token attends to, over the picture.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> class_token(maps, np.zeros((56, 56, 3))).get_title()
    'query: CLS, layer 11, mean of 6 heads'

    `token` is the class token's index, 0 in nearly every model. The other arguments, and what is raised, as in `query`.
    """
    layers, picture = read_layers(maps), picture_of(image)
    queries, keys = token_axes(layers, layer)
    grid = grid_of(keys, options, picture)
    if grid.place(grid.token(token, queries, keys)) is not None:
        raise ValueError(
            f"token {token} of {keys} is a patch of the {grid.rows} x {grid.columns} grid: these maps have no class "
            "token there. Use plot.query for a patch, or say by prefix_tokens= how many tokens come before the patches"
        )
    return query(layers, picture, query=token, layer=layer, head=head, batch=batch, ax=ax, **options)


@_ROLLOUT.show
def rollout(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, int] = 0,
    heads: Reduction = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    batch: int = 0,
    **options: Unpack[_Beside],
) -> Figure:
    """The picture, what the last layer's class token attends to, and its rollout through all layers, side by side.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> [ax.get_title() for ax in rollout(maps, np.zeros((56, 56, 3)), cbar=False).axes]
    ['picture', 'layer 11, mean of 6 heads', 'rollout of 12 layers']

    The rollout is `analysis.rollout`. The two have a colour scale each, as a rollout spreads over more patches.

    Args:
        maps: the layers from the first to the last, as in `head`, with one number of tokens.
        image, grid, image_size, patch_size, prefix_tokens, style, smooth, cmap, cbar: as in `query`.
        query: 0: the class token; or another token's index, or a patch (row, column).
        heads, residual, discard: as in `analysis.rollout`; `heads` reduces the last layer too.
        batch: the index of one image.
        title: above all panels; None: the query.

    Raises what `query` and `analysis.rollout` raise.
    """
    from .. import analysis

    look = _ROLLOUT.look(options)
    if isinstance(batch, str):
        raise TypeError(f"batch={batch!r}: pass the index of one image")
    layers, picture = read_layers(maps), picture_of(image)
    queries, keys = token_axes(layers, -1)
    grid = grid_of(keys, options, picture)
    token = grid.token(query, queries, keys)
    last = select(layers, layer=-1, batch=batch, head=heads, query=token).weights[0]
    rolled = analysis.rollout(layers, query=token, heads=heads, residual=residual, discard=discard)
    rolled = as_numbers(rolled)[batch]

    width, height = panel_size(grid.size(picture), 3.2)
    count = 2 + (picture is not None)
    figure, axes = panels(count, count, (width + 0.5 * look.cbar, height + 0.6))
    if picture is not None:
        axes[0].imshow(picture, interpolation="nearest", origin="upper")
        axes[0].set(title="picture", xticks=[], yticks=[])
    source = ", ".join(filter(None, (f"layer {len(layers) - 1}", head_words(layers[-1], heads))))
    titles = (source, f"rollout of {len(layers)} layers")
    for ax, row, text, label in zip(axes[-2:], (last, rolled), titles, (LABEL, "rollout"), strict=True):
        _check_row(row, token)
        draw_row(row, grid, picture, look, ax=ax, framed=token, label=label)
        ax.set_title(text)
    write_title(figure, look.title, f"query: {grid.name(token)}")
    lay_out(figure)
    return figure


@_OVERLAY.show
def overlay(
    weights: Any,
    image: Any = None,
    *,
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
        weights: (rows, columns) of patches, or (tokens,), with `grid` and `prefix_tokens` as in `query`. NaN is
            hatched.
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
    row, place = _on_grid(values, "weights", grid, prefix_tokens)
    if np.isinf(row).any() or np.isnan(row).all():
        raise ValueError("weights holds infinite values, or nothing but NaN: there is no colour for these")
    if look.vmax is None:
        largest, lowest = float(np.max(np.nan_to_num(place.patches(row)))), look.vmin or 0.0
        look = replace(look, vmax=largest if largest > lowest else lowest + 1)
    ax = draw_row(row, place, picture, look, ax=ax, label=label)
    write_title(ax, look.title)
    return ax


def highlight(
    mask: Any,
    image: Any = None,
    *,
    grid: tuple[int, int] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Chosen patches on the picture: bright inside, dimmed outside, with an outline round them.

    >>> ax = highlight(np.eye(4, dtype=bool), np.ones((56, 56, 3)))
    >>> len(ax.collections[0].get_segments())  # pieces of the outline, white on black
    16

    Args:
        mask: True where a patch is chosen, (rows, columns), or (patches,) with `grid` as in `query`; for example what
            `analysis.mass_mask` gives.
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
    values, place = _on_grid(as_numbers(mask, "mask"), "mask", grid, 0)
    chosen = place.patches(values) > 0
    high, wide = place.size(picture)
    ax = axes_of(ax, figure_size(high, wide))
    lit = np.full((*chosen.shape, 3), 0.8) if picture is None else picture
    inside = spread(chosen, (high, wide))[..., None]
    ax.imshow(np.where(inside, lit, 0.3 * lit), extent=(0, wide, high, 0), interpolation="nearest", origin="upper")
    ax.set(xticks=[], yticks=[])
    lines = _outline(chosen) * np.array([wide / place.columns, high / place.rows])
    for colour, width in (("black", 3.0), ("white", 1.2)):
        ax.add_collection(LineCollection(list(lines), colors=colour, linewidths=width, capstyle="round"), autolim=False)
    write_title(ax, title)
    return ax


def _check_row(row: Array, token: int) -> None:
    if np.isnan(row).all():
        raise ValueError(
            f"the row of query {token} holds nothing but NaN: there is nothing to draw (is it fully masked?)"
        )


def _select_in_window(
    layers: list[Any], layer: int | None, head: Choice | None, batch: int, window: Window, grid: Grid
) -> Selection:
    """What the query attends to in its window, as one row over the whole grid."""
    maps = layers[layer or 0]
    images, left = divmod(int(maps.shape[0]), window.count)
    if left or not -images <= batch < images:
        raise ValueError(
            f"maps of {images * window.count + left} windows, shape {tuple(maps.shape)}, and {window.count} windows an "
            f"image of {grid.rows} x {grid.columns} patches: "
            + (f"batch={batch} is not among its {images} images" if not left else "the grid= does not fit this layer")
        )
    number = batch % images * window.count + window.number
    chosen = select(layers, layer=layer, batch=number, head=head, query=window.token)
    return replace(chosen, weights=window.spread(chosen.weights[0], grid)[None])


def _is_mask(value: Any) -> bool:
    """Whether an array or tensor is of True and False."""
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    return str(value.dtype).removeprefix("torch.") == "bool"


def _on_grid(
    values: Array, name: str, grid: tuple[int, int] | None, prefix_tokens: int | Sequence[str] | None
) -> tuple[Array, Grid]:
    """The values as one row of tokens, and the grid on which these lie."""
    if values.ndim == 1 and len(values):
        return values, grid_of(len(values), {"grid": grid, "prefix_tokens": prefix_tokens})
    fits = values.ndim == 2 and 0 not in values.shape
    if not fits or grid not in (None, values.shape) or (len(values) == 1 and grid is None and values.shape[1] > 1):
        raise ValueError(
            f"{name} has shape {values.shape}"
            + ("" if grid is None else f" and grid={grid}")
            + "; expected one picture's (rows, columns) of patches, or (tokens,)"
            + (f"; pass {name}[0] for the first of a batch" if values.ndim > 1 and values.shape[0] else "")
        )
    if prefix_tokens not in (None, 0):
        raise ValueError(f"prefix_tokens={prefix_tokens!r}, but {name} of shape {values.shape} has patches only")
    rows, columns = values.shape
    return values.ravel(), Grid(rows, columns)


def _outline(chosen: Any) -> Any:
    """The edges between chosen and other cells, (edges, 2 ends, 2), as (x, y) in cells."""
    padded = np.pad(chosen, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])[:, ::-1]  # left of (x, y)
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])[:, ::-1]  # above (x, y)
    down, right = np.array([0, 1]), np.array([1, 0])
    return np.concatenate([np.stack([upright, upright + down], 1), np.stack([level, level + right], 1)])

"""Weights over the picture that their patches cover: `query`, `class_token`, `rollout`, `overlay`, `highlight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reading import Array, as_numbers
from .canvas import (
    LABEL,
    Style,
    axes_of,
    check_style,
    colour_bar,
    frame,
    lay_out,
    lay_over,
    panel_size,
    panels,
    row_top,
    scale_of,
    spread,
)
from .places import Grid, Size, Window, pair_of, read_grid, read_image, read_window, word_index
from .reading import Choice, Reduction, head_words, read_layers, select, token_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


def query(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, int] | str,
    query_tokens: Sequence[str] | None = None,
    layer: Choice | None = -1,
    head: Choice | None = "mean",
    batch: Choice = 0,
    grid: tuple[int, int] | None = None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    window: Size | None = None,
    shift: Size = 0,
    style: Style = "overlay",
    smooth: bool = False,
    ax: Axes | None = None,
    cmap: str | Colormap = "inferno",
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    title: str | None = None,
) -> Axes:
    """What one patch, or one word, attends to, over the picture; a patch has a black and white frame.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> query(maps, np.zeros((56, 56, 3)), query=(2, 1)).get_title()
    'query: patch (2, 1), layer 11, mean of 6 heads'

    Args:
        maps, layer, head, batch: as in `head`; the last layer and the mean of its heads unless told otherwise.
        image: the picture that the patches cover: array, tensor or PIL image; None: the weights alone.
        query: a patch as (row, column), or a token's index, prefix tokens counted; with `query_tokens` a word.
        query_tokens: the words of the queries, where these are a text's and only the keys are patches.
        grid: (rows, columns) of patches. It can be left out where `patch_size` in pixels is given (with `image_size`,
            or the picture's own size), or where the patches form a square.
        prefix_tokens: how many tokens come before the patches, or their names; each has a swatch of its own below the
            picture, on the patches' scale, with its weight. None: what the grid leaves over.
        window, shift: of Swin's layers, whose maps are (batch x windows, heads, window x window, window x window): the
            sides of a window and of its shift in patches, one number or (rows, columns). `query` is a patch and `grid`
            the whole grid; keys outside the window are hatched. Every second block has a shift, of half a window.
        style: "overlay": the picture in grey, coloured by weight; "mask": the picture itself, dark where the weight is
            low.
        smooth: interpolate between patches instead of showing their edges.
        vmax: None: the largest weight of a patch, but no less than 4 / number of keys, so that a row that attends to
            everything alike does not look like one that attends to something.

    Raises what `head` raises, and ValueError where grid, picture and tokens do not fit together.
    """
    check_style(style)
    found, picture = read_layers(maps), None if image is None else read_image(image)
    queries, keys = token_axes(found, layer)
    where: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "prefix_tokens": prefix_tokens}
    where["picture"] = None if picture is None else picture.shape[:2]
    colours = (style, smooth, ax, cmap, vmin, vmax, cbar)
    if window is not None:
        return _in_window(found, picture, query, (layer, head, batch), (grid, window, shift), where, colours, title)
    shape = read_grid(keys, grid=grid, **where)
    word = None
    if query_tokens is not None:
        if isinstance(query_tokens, str) or len(query_tokens) != queries:
            raise ValueError(f"query_tokens are the words of the {queries} queries, a list: got {query_tokens!r:.80}")
        index = word_index(query, query_tokens) if isinstance(query, str) else query
        token = shape.token(index, queries, keys)
        word = repr(query_tokens[token])
    else:
        token = shape.token(query, queries, keys)  # type: ignore[arg-type]  # a word is refused, and told what to pass
    chosen = select(found, layer=layer, batch=batch, head=head, query=token)
    row, is_self = chosen.weights[0], queries == keys and word is None
    _check_row(row, token)
    ax = _draw(row, shape, picture, token if is_self else None, *colours)
    name = word or (shape.name(token) if is_self else f"token {token}")
    text = ", ".join(part for part in (f"query: {name}", chosen.label) if part)
    ax.set_title(text if title is None else title, parse_math=False)
    return ax


def class_token(
    maps: Any,
    image: Any = None,
    *,
    token: int = 0,
    layer: Choice | None = -1,
    head: Choice | None = "mean",
    batch: Choice = 0,
    grid: tuple[int, int] | None = None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    style: Style = "overlay",
    smooth: bool = False,
    ax: Axes | None = None,
    cmap: str | Colormap = "inferno",
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    title: str | None = None,
) -> Axes:
    """What the class token attends to, over the picture.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> class_token(maps, np.zeros((56, 56, 3))).get_title()
    'query: CLS, layer 11, mean of 6 heads'

    `token` is the class token's index, 0 in nearly every model. The other arguments, and what is raised, as in `query`.
    """
    found = read_layers(maps)
    queries, keys = token_axes(found, layer)
    picture = None if image is None else read_image(image)
    where: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "prefix_tokens": prefix_tokens}
    shape = read_grid(keys, grid=grid, picture=None if picture is None else picture.shape[:2], **where)
    if shape.token(token, queries, keys) >= len(shape.prefix):
        raise ValueError(
            f"token {token} of {keys} is a patch of the {shape.rows} x {shape.columns} grid: these maps have no class "
            "token there. Use plot.query for a patch, or say by prefix_tokens= how many tokens come before the patches"
        )
    drawn: dict[str, Any] = {"style": style, "smooth": smooth, "ax": ax, "cmap": cmap, "vmin": vmin, "vmax": vmax}
    chosen: dict[str, Any] = {"layer": layer, "head": head, "batch": batch, "grid": grid, "cbar": cbar, "title": title}
    return query(found, picture, query=token, **where, **drawn, **chosen)


def rollout(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, int] = 0,
    heads: Reduction = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    batch: int = 0,
    grid: tuple[int, int] | None = None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    style: Style = "overlay",
    smooth: bool = False,
    cmap: str | Colormap = "inferno",
    cbar: bool = True,
    title: str | None = None,
) -> Figure:
    """The picture, what the last layer's class token attends to, and its rollout through all layers, side by side.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> [ax.get_title() for ax in rollout(maps, np.zeros((56, 56, 3)), cbar=False).axes]
    ['picture', 'layer 11, mean of 6 heads', 'rollout of 12 layers']

    The rollout is `analysis.rollout`. Each of the two has its own colour scale, since the rollout spreads over more.

    Args:
        maps: the layers from the first to the last, as in `head`; all of one number of tokens.
        image, grid, image_size, patch_size, prefix_tokens, style, smooth: as in `query`.
        query: 0: the class token; or another token's index, or a patch (row, column).
        heads, residual, discard: as in `analysis.rollout`; `heads` holds for the last layer too.
        batch: which image.

    Raises what `query` and `analysis.rollout` raise.
    """
    from .. import analysis

    check_style(style)
    if isinstance(batch, str):
        raise TypeError(f"batch={batch!r}: pass the index of one image")
    found, picture = read_layers(maps), None if image is None else read_image(image)
    queries, keys = token_axes(found, -1)
    where: dict[str, Any] = {"image_size": image_size, "patch_size": patch_size, "prefix_tokens": prefix_tokens}
    shape = read_grid(keys, grid=grid, picture=None if picture is None else picture.shape[:2], **where)
    token = shape.token(query, queries, keys)
    last = select(found, layer=-1, batch=batch, head=heads, query=token).weights[0]
    rolled = analysis.rollout(found, query=token, heads=heads, residual=residual, discard=discard)
    rolled = as_numbers(rolled)[batch]

    high, wide = (shape.rows, shape.columns) if picture is None else picture.shape[:2]
    across, down = panel_size(high, wide, 3.2)
    figure, axes, _ = panels(2 + (picture is not None), 3, 3, (across + 0.5 * cbar, down + 0.6))
    if picture is not None:
        axes[0].imshow(picture, interpolation="nearest", origin="upper")
        axes[0].set(title="picture", xticks=[], yticks=[])
    attended = ", ".join(filter(None, (f"layer {len(found) - 1}", head_words(found[-1], heads))))
    titles = (attended, f"rollout of {len(found)} layers")
    for ax, row, text, label in zip(axes[-2:], (last, rolled), titles, (LABEL, "rollout"), strict=True):
        _check_row(row, token)
        _draw(row, shape, picture, token, style, smooth, ax, cmap, 0, None, cbar, label)
        ax.set_title(text)
    figure.suptitle(f"query: {shape.name(token)}" if title is None else title, parse_math=False)
    lay_out(figure)
    return figure


def overlay(
    weights: Any,
    image: Any = None,
    *,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    style: Style = "overlay",
    smooth: bool = False,
    ax: Axes | None = None,
    cmap: str | Colormap = "inferno",
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    label: str = LABEL,
    title: str | None = None,
) -> Axes:
    """Any weights of patches over the picture: a rollout, a relevance, a firing rate.

    >>> ax = overlay(np.eye(4), np.zeros((56, 56, 3)), label="relevance")
    >>> len(ax.images)
    1

    Args:
        weights: (rows, columns) of patches, or (tokens,), with `grid` and `prefix_tokens` as in `query`. What is NaN
            is hatched.
        image, style, smooth: as in `query`.
        vmin, vmax: the ends of the colour scale; vmax=None: the largest weight of a patch.
        label: what the weights are, at the colour bar.

    Raises:
        ValueError: a shape or content that is no picture's weights, or grid and weights that do not fit together.
        TypeError: a mask of True and False, which `highlight` draws.
    """
    check_style(style)
    picture = None if image is None else read_image(image)
    values = as_numbers(weights, "weights")
    if _is_mask(weights):
        raise TypeError("weights is a mask of True and False: plot.highlight draws it")
    row, shape = _on_grid(values, "weights", grid, prefix_tokens)
    if np.isinf(row).any() or np.isnan(row).all():
        raise ValueError("weights holds infinite values, or nothing but NaN: there is no colour for these")
    patches = row[len(shape.prefix) :]
    largest, lowest = float(np.max(np.nan_to_num(patches))), 0.0 if vmin is None else vmin
    top = vmax if vmax is not None else largest if largest > lowest else lowest + 1
    ax = _draw(row, shape, picture, None, style, smooth, ax, cmap, vmin, top, cbar, label)
    if title is not None:
        ax.set_title(title, parse_math=False)
    return ax


def highlight(
    mask: Any,
    image: Any = None,
    *,
    grid: tuple[int, int] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Chosen patches on the picture: inside as it is, outside dimmed, with an outline round them.

    >>> ax = highlight(np.eye(4, dtype=bool), np.ones((56, 56, 3)))
    >>> len(ax.collections[0].get_segments())  # pieces of the outline, white on black
    16

    Args:
        mask: True where a patch is chosen, (rows, columns), or (patches,) with `grid` as in `query`; such as
            `analysis.mass_mask` gives.
        image: the picture that the patches cover; None: the mask alone.

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
    picture = None if image is None else read_image(image)
    values, shape = _on_grid(as_numbers(mask, "mask"), "mask", grid, 0)
    chosen = values.reshape(shape.rows, shape.columns) > 0
    high, wide = (shape.rows, shape.columns) if picture is None else picture.shape[:2]
    ax = axes_of(ax, _size(wide / high))
    lit = np.full((*chosen.shape, 3), 0.8) if picture is None else picture
    inside = chosen if picture is None else spread(chosen, picture.shape[:2], False)
    drawn = np.where(inside[..., None], lit, 0.3 * lit)
    ax.imshow(drawn, extent=(0, wide, high, 0), interpolation="nearest", origin="upper")
    ax.set(xticks=[], yticks=[])
    lines = _outline(chosen) * np.array([wide / shape.columns, high / shape.rows])
    for colour, width in (("black", 3.0), ("white", 1.2)):
        ax.add_collection(LineCollection(list(lines), colors=colour, linewidths=width, capstyle="round"), autolim=False)
    if title is not None:
        ax.set_title(title, parse_math=False)
    return ax


def frame_patch(ax: Axes, grid: Grid, token: int | None, size: tuple[int, int]) -> None:
    """A frame round a token, where it is a patch, on a picture of (width, height)."""
    if token is not None and token >= len(grid.prefix):
        row, column = divmod(token - len(grid.prefix), grid.columns)
        wide, high = size[0] / grid.columns, size[1] / grid.rows
        frame(ax, (column * wide, row * high), (wide, high))


def _check_row(row: Array, token: int) -> None:
    if np.isnan(row).all():
        raise ValueError(
            f"the row of query {token} holds nothing but NaN: there is nothing to draw (is it fully masked?)"
        )


def _size(ratio: float) -> tuple[float, float]:
    """Inches of a figure for one picture: a long strip gets a long figure, but not an endless one."""
    ratio = min(4.0, max(0.25, ratio))
    return 5 * min(1.5, ratio) + 1, 5 * min(1.5, ratio) / ratio + 0.4


def _draw(
    row: Array,
    shape: Grid,
    picture: Array | None,
    framed: int | None,
    style: str,
    smooth: bool,
    ax: Axes | None,
    cmap: Any,
    vmin: float | None,
    vmax: float | None,
    cbar: bool,
    label: str = LABEL,
) -> Axes:
    """A row of weights over the picture, with a swatch for each prefix token and a frame round one token."""
    count = len(shape.prefix)
    patches = row[count:].reshape(shape.rows, shape.columns)
    top = row_top(patches, int(np.count_nonzero(~np.isnan(row))), vmin) if vmax is None else vmax
    high, wide = (shape.rows, shape.columns) if picture is None else picture.shape[:2]
    ax = axes_of(ax, _size(wide / high))
    scale = scale_of(cmap, vmin, top, style)
    lay_over(ax, patches, picture, scale, style, smooth)
    frame_patch(ax, shape, framed, (wide, high))
    if count:
        _swatches(ax, row[:count], shape.prefix, scale, framed)
    if cbar:
        colour_bar(ax.figure, scale, ax, bool(np.max(np.nan_to_num(row)) > top), label)
    return ax


def _in_window(
    layers: list[Any],
    picture: Array | None,
    query: Any,
    choice: tuple[Choice | None, Choice | None, Choice],
    windows: tuple[tuple[int, int] | None, Size, Size],
    where: dict[str, Any],
    colours: tuple[Any, ...],
    title: str | None,
) -> Axes:
    """What a patch attends to in its window, at the window's place on the whole grid."""
    (layer, head, batch), (grid, window, shift) = choice, windows
    if isinstance(layer, str) or isinstance(batch, str):
        raise ValueError(f"layer={layer!r}, batch={batch!r}: with window=, pass the index of one layer and one image")
    whole = _whole_grid(grid, where)
    patch = whole.patch(query)
    one = layers[0 if layer is None else layer]
    found: Window = read_window(patch, whole, token_axes(one, None)[1], window, shift)
    images, left = divmod(int(one.shape[0]), found.count)
    if left or not -images <= batch < images:
        raise ValueError(
            f"maps of {images * found.count + left} windows, shape {tuple(one.shape)}, and {found.count} windows an "
            f"image of {whole.rows} x {whole.columns} patches: "
            + (f"batch={batch} is not among its {images} images" if not left else "the grid= does not fit this layer")
        )
    number = batch % images * found.count + found.number
    chosen = select(layers, layer=layer, batch=number, head=head, query=found.token)
    row = np.full(whole.rows * whole.columns, np.nan, chosen.weights.dtype)
    real = found.places >= 0
    row[found.places[real]] = chosen.weights[0][real]
    _check_row(row, found.token)
    token = patch[0] * whole.columns + patch[1]
    ax = _draw(row, whole, picture, token, *colours)
    text = ", ".join(part for part in (f"query: patch {patch}", chosen.label) if part)
    ax.set_title(text if title is None else title, parse_math=False)
    return ax


def _whole_grid(grid: tuple[int, int] | None, where: dict[str, Any]) -> Grid:
    """The grid of a picture that windows are cut from; it cannot be told from the keys of one window."""
    if where["prefix_tokens"] not in (None, 0):
        raise ValueError(f"prefix_tokens={where['prefix_tokens']!r}: windows have patches only")
    if grid is None:
        size = where["picture"] if where["image_size"] is None else pair_of("image_size", where["image_size"])
        if size is None or where["patch_size"] is None:
            raise ValueError("window= needs grid=(rows, columns) of the whole picture's patches in this layer")
        high, wide = pair_of("patch_size", where["patch_size"])
        grid = size[0] // high, size[1] // wide
    rows, columns = pair_of("grid", grid)
    return Grid(rows, columns, ())


def _swatches(ax: Axes, weights: Array, names: Sequence[str], scale: ScalarMappable, framed: int | None) -> None:
    """Each prefix token's weight as a square below the picture, on the patches' colour scale, in figures too."""
    count = len(names)
    strip = ax.inset_axes((0.0, -0.08, min(1.0, 0.14 * count), 0.05))
    low, high = scale.get_clim()
    place = (0, count, 1, 0)
    strip.imshow(
        weights[None],
        cmap=scale.cmap,
        vmin=low,
        vmax=high,
        aspect="auto",
        extent=place,
        interpolation="nearest",
        origin="upper",
    )
    strip.set_yticks([])
    labels = [f"{name}\n{weight:.2g}" for name, weight in zip(names, weights, strict=True)]
    strip.set_xticks(np.arange(count) + 0.5, labels, fontsize=8, parse_math=False)
    strip.tick_params(length=0)
    if framed is not None and framed < count:
        frame(strip, (framed, 0), (1, 1))


def _is_mask(value: Any) -> bool:
    """Whether an array or tensor is of True and False."""
    if not hasattr(value, "dtype"):
        value = np.asarray(value)
    return str(value.dtype).removeprefix("torch.") == "bool"


def _on_grid(
    values: Array, name: str, grid: tuple[int, int] | None, prefix_tokens: int | Sequence[str] | None
) -> tuple[Array, Grid]:
    """Values of patches, or of tokens, in one row, and their grid."""
    if values.ndim == 1 and len(values):
        return values, read_grid(len(values), grid=grid, prefix_tokens=prefix_tokens)
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
    return values.ravel(), Grid(rows, columns, ())


def _outline(chosen: Any) -> Any:
    """The edges between chosen and other cells, (edges, 2 ends, 2): (x, y) in cells."""
    padded = np.pad(chosen, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])[:, ::-1]  # left of (x, y)
    level = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])[:, ::-1]  # above (x, y)
    down, right = np.array([0, 1]), np.array([1, 0])
    return np.concatenate([np.stack([upright, upright + down], 1), np.stack([level, level + right], 1)])

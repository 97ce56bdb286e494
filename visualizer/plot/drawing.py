"""Attention maps as pictures: arrays in, matplotlib's Axes or Figure out.

One-panel functions draw on `ax=` and return it; they make a figure only where none is given. Nothing here shows a
window or touches a global style. Queries run down, keys across; layers, heads and patches are counted from 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .reading import Array, Choice, Grid, Size, read_grid, read_image, select, select_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Style = Literal["overlay", "mask"]

_LABEL = "attention weight"
# Tried in this order where they are installed, so that a label in another script is no row of boxes.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("Microsoft YaHei", "PingFang SC", "SimHei", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans"),
)
_VISIBLE = {" ": "␣", "Ġ": "␣", "\n": "⏎", "Ċ": "⏎", "\t": "⇥"}


def head(
    maps: Any,
    *,
    layer: Choice | None = None,
    head: Choice | None = None,
    batch: Choice = 0,
    ax: Axes | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    xticklabels: Sequence[str] | None = None,
    yticklabels: Sequence[str] | None = None,
    title: str | None = None,
) -> Axes:
    """One head's map as a matrix, queries down and keys across.

    >>> maps = [np.full((1, 6, 5, 5), 0.2)] * 12
    >>> head(maps, layer=3, head=0).get_title()
    'layer 3, head 0'

    Args:
        maps: (queries, keys), (heads, queries, keys), (batch, heads, queries, keys), (layers, batch, heads, queries,
            keys), or a list with one of the first three per layer, such as `get_local.cache["Attention.forward"]`.
        layer, head, batch: an index, negative ones from the end, or "mean", "max" or "min" over all. May be left out
            where there is only one.
        ax: where to draw; None: on a new figure.
        cmap, vmin, vmax, cbar: colours, as in matplotlib. vmax=None: the 99.5th percentile, so that a few large
            weights do not leave the others dark; the colour bar is pointed where weights go past it.
        xticklabels, yticklabels: what to write at the keys and at the queries; None: their numbers. `tokens` writes
            words on both sides.
        title: None: which layer and head it is.

    Raises:
        ValueError: a shape or content that is no attention map, or a choice left open; the message says what would do.
        IndexError, TypeError: a choice that is out of range, or neither an index nor a reduction.
    """
    chosen = select(maps, layer=layer, batch=batch, head=head)
    ax = _axes(ax, (6, 5))
    _matrix(ax, chosen.weights, cmap, vmin, _matrix_top(chosen.weights) if vmax is None else vmax, cbar)
    for axis, rotation, labels in ((ax.yaxis, 0, yticklabels), (ax.xaxis, 90, xticklabels)):
        if labels is not None:
            name = "xticklabels" if rotation else "yticklabels"
            _check_count(name, labels, chosen.weights.shape[bool(rotation)])
            _word_labels(ax, axis, labels, rotation)
    ax.set_title(chosen.label if title is None else title, parse_math=False)
    return ax


def heads(
    maps: Any,
    *,
    layer: Choice | None = -1,
    batch: Choice = 0,
    columns: int | None = None,
    share: bool = True,
    cmap: str | Colormap = "viridis",
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    title: str | None = None,
) -> Figure:
    """All heads of a layer as a grid of matrices.

    >>> maps = [np.full((1, 6, 5, 5), 0.2)] * 12
    >>> [ax.get_title() for ax in heads(maps, layer=3, cbar=False).axes[:2]]
    ['head 0', 'head 1']

    Args:
        maps, layer, batch, cmap, vmin, vmax: as in `head`; the last layer unless told otherwise.
        columns: how many panels stand side by side; None: about as many as rows.
        share: one colour scale, and one colour bar, for all heads; else one each.
        title: above all panels; None: which layer it is.

    Raises what `head` raises.
    """
    from matplotlib import pyplot as plt

    chosen = select_all(maps, layer=layer, batch=batch)
    count = len(chosen.weights)
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}: pass at least 1, or None for about as many columns as rows")
    columns = min(count, columns or math.ceil(math.sqrt(count * 1.3)))
    rows = math.ceil(count / columns)
    figure = plt.figure(figsize=(2.6 * columns + 1, 2.7 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    top = _matrix_top(chosen.weights) if vmax is None else vmax
    for number, ax in enumerate(panels.flat):
        if number >= count:
            ax.set_axis_off()
            continue
        weights = chosen.weights[number]
        own = top if share or vmax is not None else _matrix_top(weights)
        image = _matrix(ax, weights, cmap, vmin, own, cbar and not share)
        ax.set_title(f"head {number}")
        ax.label_outer()
        if number + columns >= count:  # nothing below it
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("key")
    if cbar and share:
        _colour_bar(figure, image, panels.ravel().tolist(), bool(np.nanmax(chosen.weights) > top))
    figure.suptitle(chosen.label if title is None else title, parse_math=False)
    return figure


def query(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, int],
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
    """What one patch attends to, over the picture, with the patch in a black and white frame.

    >>> maps = [np.full((1, 6, 17, 17), 1 / 17)] * 12
    >>> query(maps, np.zeros((56, 56, 3)), query=(2, 1)).get_title()
    'query: patch (2, 1), layer 11, mean of 6 heads'

    Args:
        maps, layer, head, batch: as in `head`; the last layer and the mean of its heads unless told otherwise.
        image: the picture that the patches cover: array, tensor or PIL image; None: the weights alone.
        query: a patch as (row, column), or a token's index, prefix tokens counted.
        grid: (rows, columns) of patches. It can be left out where `patch_size` in pixels is given (with `image_size`,
            or the picture's own size), or where the patches form a square.
        prefix_tokens: how many tokens come before the patches, or their names; each has a swatch of its own below the
            picture, on the patches' scale, with its weight. None: what the grid leaves over.
        style: "overlay": the picture in grey, coloured by weight; "mask": the picture itself, dark where the weight is
            low.
        smooth: interpolate between patches instead of showing their edges.
        vmax: None: the largest weight of a patch, but no less than 4 / number of keys, so that a row that attends to
            everything alike does not look like one that attends to something.

    Raises what `head` raises, and ValueError where grid, picture and tokens do not fit together.
    """
    where = (grid, image_size, patch_size, prefix_tokens)
    return _attended(maps, image, query, (layer, head, batch), where, style, smooth, ax, cmap, vmin, vmax, cbar, title)


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
    where = (grid, image_size, patch_size, prefix_tokens)
    return _attended(
        maps, image, token, (layer, head, batch), where, style, smooth, ax, cmap, vmin, vmax, cbar, title, True
    )


def tokens(
    maps: Any,
    tokens: Sequence[str],
    *,
    key_tokens: Sequence[str] | None = None,
    layer: Choice | None = None,
    head: Choice | None = None,
    batch: Choice = 0,
    ax: Axes | None = None,
    cmap: str | Colormap = "viridis",
    vmin: float | None = 0,
    vmax: float | None = None,
    cbar: bool = True,
    title: str | None = None,
) -> Axes:
    """Which token attends to which: a matrix with the words at its sides.

    >>> ax = tokens(np.full((1, 2, 3, 3), 1 / 3), ["[CLS]", "cat", "$5"], head=1)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['[CLS]', 'cat', '$5']

    Args:
        maps, layer, head, batch, ax, cmap, vmin, cbar, title: as in `head`.
        tokens: the words of the queries, and of the keys unless `key_tokens` has others (cross-attention). White space
            is made visible; where not all fit, every second, third ... is written.
        vmax: None: the largest weight.

    Raises what `head` raises, and ValueError where there are more or fewer tokens than rows or columns.
    """
    chosen = select(maps, layer=layer, batch=batch, head=head)
    queries, keys = chosen.weights.shape
    if isinstance(tokens, str) or isinstance(key_tokens, str):
        raise TypeError(
            "tokens are a list of words, not one text: pass tokenizer.convert_ids_to_tokens(ids), or text.split()"
        )
    rows = list(tokens)
    columns = rows if key_tokens is None else list(key_tokens)
    _check_count("tokens", rows, queries)
    _check_count("key_tokens" if key_tokens is not None else "tokens", columns, keys)
    side = [min(14.0, max(4.0, 0.26 * count + 1.5)) for count in (keys, queries)]
    ax = _axes(ax, (side[0] + 1, side[1]))
    top = float(np.nanmax(chosen.weights)) if vmax is None else vmax
    _matrix(ax, chosen.weights, cmap, vmin, top, cbar)
    _word_labels(ax, ax.yaxis, rows, 0)
    _word_labels(ax, ax.xaxis, columns, 90)
    ax.set_title(chosen.label if title is None else title, parse_math=False)
    return ax


def _check_count(name: str, words: Sequence[str], count: int) -> None:
    if len(words) != count:
        raise ValueError(
            f"{name} has {len(words)} entries for {count} rows or columns of the map: pass one for each, special "
            "tokens included; where keys and queries are different tokens (cross-attention), each side its own"
        )


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.figure(figsize=size, layout="constrained").add_subplot()


def _matrix(ax: Axes, weights: Array, cmap: Any, vmin: Any, vmax: float, cbar: bool) -> Any:
    # Nearest where there is a pixel for each weight; where there is not, it would leave out whole columns, perhaps an
    # attention sink, and "antialiased" takes means: of the weights, for a mean of colours would leave a sink dark.
    image = ax.imshow(
        weights,
        cmap=cmap,
        vmin=vmin,
        vmax=vmax,
        interpolation="antialiased",
        aspect="equal",
        origin="upper",
        interpolation_stage="data",
    )
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    if cbar:
        _colour_bar(ax.figure, image, ax, bool(np.max(np.nan_to_num(weights)) > vmax))
    return image


def _colour_bar(figure: Any, image: Any, where: Any, is_cut: bool) -> None:
    figure.colorbar(image, ax=where, label=_LABEL, extend="max" if is_cut else "neither", shrink=0.9)


def _matrix_top(weights: Array) -> float:
    """The end of the colour scale: nearly the largest weight, and no less than four times an even share."""
    top, share = float(np.percentile(np.nan_to_num(weights), 99.5)), 4 / weights.shape[-1]
    largest = float(np.max(np.nan_to_num(weights)))
    return min(max(top, share), largest) if largest > 0 else 1.0


def _attended(
    maps: Any,
    image: Any,
    asked: int | tuple[int, int],
    choice: tuple[Choice | None, Choice | None, Choice],
    where: tuple[Any, Any, Any, Any],
    style: str,
    smooth: bool,
    ax: Axes | None,
    cmap: Any,
    vmin: float | None,
    vmax: float | None,
    cbar: bool,
    title: str | None,
    is_prefix: bool = False,
) -> Axes:
    """One token's row of weights, laid over the picture."""
    if style not in get_args(Style):
        raise ValueError(f"style={style!r}: pass one of {', '.join(map(repr, get_args(Style)))}")
    layer, head, batch = choice
    chosen = select(maps, layer=layer, batch=batch, head=head)
    picture = None if image is None else read_image(image)
    grid, image_size, patch_size, prefix_tokens = where
    queries, keys = chosen.weights.shape
    shape = read_grid(
        keys,
        grid=grid,
        image_size=image_size,
        patch_size=patch_size,
        prefix_tokens=prefix_tokens,
        picture=None if picture is None else picture.shape[:2],
    )
    token = shape.token(asked, queries, keys)
    row = chosen.weights[token]
    if np.isnan(row).all():
        raise ValueError(
            f"the row of query {token} holds nothing but NaN: there is nothing to draw (is it fully masked?)"
        )
    count = len(shape.prefix)
    if is_prefix and token >= count:
        raise ValueError(
            f"token {token} of {keys} is a patch of the {shape.rows} x {shape.columns} grid: these maps have no class "
            "token there. Use plot.query for a patch, or say by prefix_tokens= how many tokens come before the patches"
        )
    patches = row[count:].reshape(shape.rows, shape.columns)
    # Without the floor a row that attends to everything alike would be painted solid.
    largest = float(np.max(np.nan_to_num(patches)))
    top = max(largest, 4 / keys, 0 if vmin is None else vmin) if vmax is None else vmax
    high, wide = (shape.rows, shape.columns) if picture is None else picture.shape[:2]

    ratio = min(4.0, max(0.25, wide / high))  # a long strip gets a long figure, but not an endless one
    ax = _axes(ax, (5 * min(1.5, ratio) + 1, 5 * min(1.5, ratio) / ratio + 0.4))
    scale = _lay_over(ax, patches, picture, (0.0, float(wide), float(high), 0.0), style, smooth, cmap, vmin, top)
    ax.set_xticks([])
    ax.set_yticks([])
    is_self = queries == keys
    if is_self and token >= count:
        patch_row, patch_column = divmod(token - count, shape.columns)
        size = wide / shape.columns, high / shape.rows
        _frame(ax, (patch_column * size[0], patch_row * size[1]), size)
    if count:
        _swatches(ax, row[:count], shape.prefix, scale, token if is_self else None)
    if cbar:
        _colour_bar(ax.figure, scale, ax, bool(np.max(np.nan_to_num(row)) > top))
    name = _token_name(token, shape) if is_self else f"token {token}"
    text = ", ".join(part for part in (f"query: {name}", chosen.label) if part)
    ax.set_title(text if title is None else title, parse_math=False)
    return ax


def _lay_over(
    ax: Axes,
    patches: Array,
    picture: Array | None,
    extent: tuple[float, float, float, float],
    style: str,
    smooth: bool,
    cmap: Any,
    vmin: float | None,
    top: float,
) -> ScalarMappable:
    """Draw patches over a picture, and return what the colour bar is of."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(0 if vmin is None else vmin, top), "gray" if style == "mask" else cmap)
    if picture is None:
        low, high = scale.get_clim()
        blend = "bilinear" if smooth else "nearest"
        ax.imshow(patches, cmap=scale.cmap, vmin=low, vmax=high, extent=extent, interpolation=blend, origin="upper")
        return scale
    strength = np.clip(scale.norm(np.nan_to_num(_spread(patches, picture.shape[:2], smooth))), 0, 1)
    if style == "mask":
        ax.imshow(picture * strength[..., None], extent=extent, interpolation="nearest", origin="upper")
        return scale
    # Darkened, so that what is white in the picture does not bleach the colours laid over it.
    grey = 0.6 * (picture @ np.array([0.299, 0.587, 0.114], picture.dtype))
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", origin="upper")
    # The square root lets middling weights be seen; the colours are those of the weights themselves.
    colours = scale.cmap(strength)
    colours[..., 3] = 0.85 * np.sqrt(strength)
    ax.imshow(colours, extent=extent, interpolation="nearest", origin="upper")
    return scale


def _spread(patches: Array, size: tuple[int, int], smooth: bool) -> Array:
    """The patches at the picture's size: each pixel its patch's weight, or interpolated between patches' centres."""
    places = []
    for count, pixels in zip(patches.shape, size, strict=True):
        centre = (np.arange(pixels) + 0.5) * count / pixels  # in patches, from the edge
        places.append(np.clip(centre - 0.5, 0, count - 1) if smooth else np.floor(centre))
    (y, x), (high, wide) = places, patches.shape
    y0, x0 = y.astype(int), x.astype(int)
    y1, x1 = np.minimum(y0 + 1, high - 1), np.minimum(x0 + 1, wide - 1)
    fy, fx = (y - y0)[:, None], (x - x0)[None, :]
    upper = patches[np.ix_(y0, x0)] * (1 - fx) + patches[np.ix_(y0, x1)] * fx
    lower = patches[np.ix_(y1, x0)] * (1 - fx) + patches[np.ix_(y1, x1)] * fx
    return np.asarray(upper * (1 - fy) + lower * fy)


def _frame(ax: Axes, corner: tuple[float, float], size: tuple[float, float]) -> None:
    """A frame in black and white: one of the two is seen on any ground."""
    from matplotlib.patches import Rectangle

    for colour, width in (("black", 3.0), ("white", 1.2)):
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width, zorder=3))


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
        _frame(strip, (framed, 0), (1, 1))


def _token_name(token: int, grid: Grid) -> str:
    count = len(grid.prefix)
    return grid.prefix[token] if token < count else f"patch {divmod(token - count, grid.columns)}"


def _word_labels(ax: Axes, axis: Any, words: Sequence[str], rotation: int) -> None:
    """Write words along an axis, as many as fit."""
    box = ax.get_window_extent()
    points = (box.height if rotation == 0 else box.width) / ax.figure.dpi * 72
    step = max(1, math.ceil(6 * len(words) / points))
    size = min(10.0, max(5.5, 0.8 * step * points / len(words)))
    places = range(0, len(words), step)
    axis.set_ticks(list(places), [_shown(words[place]) for place in places])
    for label in axis.get_ticklabels():
        label.set(fontsize=size, rotation=rotation, parse_math=False, fontfamily=_fonts())


def _shown(word: str) -> str:
    """A token with its white space, and whatever else would not be seen, made visible."""
    text = "".join(_VISIBLE.get(c, c) for c in str(word))
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) or "∅"


@functools.cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed] or ["sans-serif"]

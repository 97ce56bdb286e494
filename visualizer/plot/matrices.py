"""Maps as matrices, queries down and keys across: `head`, `heads`, `tokens`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..errors import ALL_WORDS
from ..images import picture_of
from ..layout import Indices
from ..reading import Array
from ..words import readable, word_list
from .canvas import (
    LABEL,
    LONGEST,
    OWN_SCALE,
    axes_of,
    colour_bar,
    draw_image,
    font_size,
    full_rows,
    label_ticks,
    name_panels,
    panels,
    write_title,
)
from .look import Keywords, Look, Matrix, OverPicture, exceeds, matrix_top, without_future
from .over_picture import panels_over_picture
from .selection import QUERY_NEEDED, Choice, select, select_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["head", "heads", "tokens"]

_OPTIONS = Keywords(Matrix)
_HEADS = Keywords(OverPicture, cmap=None)
_MOST_CELLS = 500  # of a matrix with words, across and down: more would be smaller than a dot of a screen


@_OPTIONS.show
def head(
    maps: Any,
    *,
    layer: Choice | None = None,
    head: Choice | None = None,
    batch: Choice | None = None,
    ax: Axes | None = None,
    xticklabels: Sequence[str] | None = None,
    yticklabels: Sequence[str] | None = None,
    **options: Unpack[Matrix],
) -> Axes:
    """One head's map as a matrix, queries down and keys across.

    >>> maps = [np.full((1, 6, 5, 5), 0.2)] * 12
    >>> head(maps, layer=3, head=0).get_title()
    'layer 3, head 0'

    Args:
        maps: (queries, keys), (heads, queries, keys), (batch, heads, queries, keys), (layers, batch, heads, queries,
            keys), or a list with one of the first three per layer, such as `get_local.cache["Attention.forward"]`. Of
            `AttentionMap`s, only the layer that is drawn is computed.
        layer, head, batch: an index, where negative ones count from the end; or "mean", "max" or "min" over all. You
            can leave it out where there is only one; batch=None: the first. What is known to be padding is not drawn.
        ax: the axes to draw on; None: those of a new figure.
        xticklabels, yticklabels: the labels of the keys and of the queries; None: their numbers. `tokens` writes words
            on both sides.
        cmap, vmin, vmax, cbar: colours, as in matplotlib. vmax=None: they are even in the weights' square roots, up to
             the 99.5th percentile, so that a few large weights, such as those of a sink, do not leave the others dark;
             the colour bar says so, and is pointed where weights lie past its end. With vmax= they are even in the
             weights. Keys that no query sees before its own place, as in a causal model, are left white.
        sinks: "remove": without the attention sinks of each head, see `analysis.sinks`, each row rescaled to its sum;
            the title says so.
        title: None: the layer and the head.

    Raises:
        ValueError: a shape or content that is not an attention map, or a choice left open; the message says what to
            pass.
        IndexError, TypeError: a choice that is out of range, or neither an index nor a reduction.
    """
    look = _OPTIONS.look(options)
    chosen = select(maps, layer=layer, batch=batch, head=head)
    ax = axes_of(ax, (6, 5))
    weights = without_future(chosen.weights)
    _draw_matrix(ax, weights, look, matrix_top(weights))
    down = None if yticklabels is None else _of_drawn("yticklabels", yticklabels, chosen.queries, chosen.axes.queries)
    across = None if xticklabels is None else _of_drawn("xticklabels", xticklabels, chosen.keys, chosen.axes.keys)
    write_title(ax, look.title, chosen.label)
    if down is not None or across is not None:
        label_ticks(ax, down, across)
    return ax


@_HEADS.show
def heads(
    maps: Any,
    image: Any = None,
    *,
    query: int | tuple[int, ...] | str | None = None,
    layer: Choice | None = -1,
    batch: Choice | None = None,
    columns: int | None = None,
    share: bool = True,
    **options: Unpack[OverPicture],
) -> Figure:
    """All heads of a layer: a grid of matrices, or of what one query attends to, over the picture.

    >>> maps = [np.full((1, 6, 5, 5), 0.2)] * 12
    >>> [ax.get_title() for ax in heads(maps, layer=3, cbar=False).axes[:2]]
    ['head 0', 'head 1']
    >>> over = heads([np.full((1, 6, 17, 17), 1 / 17)], np.zeros((56, 56, 3)), query=0)  # of the class token

    Args:
        maps, layer, batch, vmin, vmax, cbar, sinks: as in `head`; by default the last layer.
        image: the picture that the patches cover, where `query` is given.
        query: None: whole matrices. Else only what it attends to, over the patches; a patch, a token's index or a word.
        layout, grid, image_size, patch_size, prefix_tokens, style, smooth: as in `query`.
        cmap: None: "viridis" for matrices, "YlOrRd" over the picture.
        columns: the number of panels in a row; None: about as many as rows.
        share: True: one colour scale for all heads; False: one for each, whose end stands above it, and a colour bar
            in shares of that. With vmax= all have one.
        title: above all panels; None: the layer, and the query.

    Raises what `head` and `query` raise.
    """
    look = _HEADS.look(options)
    look = replace(look, cmap=look.cmap or ("viridis" if query is None else "YlOrRd"))
    picture = picture_of(image)
    if query is not None:
        row = select_row(maps, query, picture, options, layer=layer, batch=batch, all_heads=True)
        chosen, title = list(row.weights), ", ".join(filter(None, (f"query: {row.name}", row.label)))
    elif image is not None:
        raise ValueError(QUERY_NEEDED)
    else:
        whole = select(maps, layer=layer, batch=batch, all_heads=True)
        chosen, title = list(whole.weights), whole.label
    names = [f"head {number}" for number in range(len(chosen))]
    columns = full_rows(len(names), columns, math.ceil(math.sqrt(len(names) * 1.3)))
    if query is None:
        figure = matrices(chosen, names, look, share=share, columns=columns)
    else:
        layout, framed = row.layout, row.framed
        figure = panels_over_picture(
            chosen, names, layout, layout.on(picture), look, keys=row.keys, share=share, columns=columns, framed=framed
        )
    write_title(figure, look.title, title)
    return figure


@_OPTIONS.show
def tokens(
    maps: Any,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    layer: Choice | None = None,
    head: Choice | None = None,
    batch: Choice | None = None,
    ax: Axes | None = None,
    **options: Unpack[Matrix],
) -> Axes:
    """Which token attends to which: a matrix with the words at its sides.

    >>> ax = tokens(np.full((1, 2, 3, 3), 1 / 3), ["[CLS]", "cat", "$5"], head=1)
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['[CLS]', 'cat', '$5']

    Args:
        maps, layer, head, batch, ax, cmap, vmin, cbar, sinks, title: as in `head`.
        tokens: the words of the queries, and of the keys too unless `key_tokens` has those (cross-attention). None:
            what the maps know, as those of `attention(model, tokenizer=...)` do. Pieces of a tokenizer become text, and
            white space is made visible. Where not all words fit, every second or third and so on is written. Arabic and
            Hebrew need matplotlib 3.11 or newer, which joins letters and writes them from the right. In a generation a
            white line divides the prompt from the answer.

    Of more than 500 tokens, a cell is the largest weight of a block of them, as the colour bar says.

    Raises what `head` raises, and ValueError where there are more or fewer tokens than rows or columns.
    """
    look = _OPTIONS.look(options)
    chosen = select(maps, layer=layer, batch=batch, head=head)
    tokens = None if tokens is None else word_list(tokens)
    key_tokens = None if key_tokens is None else word_list(key_tokens, "key_tokens")
    axes = chosen.axes
    if tokens is None:
        if axes.query_layout is None or (axes.layout is None and key_tokens is None):
            raise ValueError("the words are not known: pass tokens=, or record with attention(model, tokenizer=...)")
        tokens = axes.query_layout.labels
        key_tokens = axes.layout.labels if key_tokens is None and axes.layout is not None else key_tokens
    rows = _of_drawn("tokens", tokens, chosen.queries, axes.queries)
    name, words = ("tokens", tokens) if key_tokens is None else ("key_tokens", key_tokens)
    columns = _of_drawn(name, words, chosen.keys, axes.keys)
    weights, label = without_future(chosen.weights), LABEL
    queries, keys = weights.shape
    letter = 0.55 * font_size() / 72
    size = [
        min(9.0, max(2.2, 0.2 * count)) + 0.6 + letter * min(LONGEST, max(map(len, words)))
        for count, words in ((keys, rows), (queries, columns))
    ]
    ax = axes_of(ax, (size[0] + 1, size[1]))
    block = math.ceil(max(queries, keys) / _MOST_CELLS)
    if block > 1:
        for axis in (0, 1):
            weights = np.fmax.reduceat(weights, range(0, weights.shape[axis], block), axis)
        label = f"largest {LABEL} of {block} x {block} tokens"
    image = _draw_matrix(ax, weights, look, matrix_top(weights), label)
    # Blocks at the end may be of fewer tokens.
    image.set_extent((-0.5, weights.shape[1] * block - 0.5, weights.shape[0] * block - 0.5, -0.5))
    ax.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5))
    write_title(ax, look.title, chosen.label)
    label_ticks(ax, rows, columns)
    for known, drawn, line in (
        (axes.query_layout, chosen.queries, ax.axhline),
        (axes.layout, chosen.keys, ax.axvline),
    ):
        if known is not None and known.generated.any():  # where the answer begins
            line(float(np.argmax(known.generated[drawn])) - 0.5, color="white", linewidth=0.8)
    return ax


def matrices(maps: Sequence[Array], names: list[str], look: Look, *, share: bool, columns: int) -> Figure:
    """A panel for each matrix; the outer ones have the numbers of queries and keys."""
    share = share or look.vmax is not None
    seen = list(without_future(np.stack(maps)))
    figure, axes = panels(len(seen), columns, (2.1, 2.1), lines=1 if share else 2, has_bar=look.cbar, has_ticks=True)
    tops = [matrix_top(np.stack(seen))] * len(seen) if share else [matrix_top(weights) for weights in seen]
    tops = tops if look.vmax is None else [look.vmax] * len(tops)
    for number, (ax, weights, top) in enumerate(zip(axes, seen, tops, strict=True)):
        is_left, is_low = number % columns == 0, number + columns >= len(axes)  # no panel is below it
        image = _draw_matrix(ax, weights, replace(look, cbar=False), top)
        ax.set(xlabel="key" if is_low else "", ylabel="query" if is_left else "")
        ax.tick_params(labelbottom=is_low, labelleft=is_left)
    name_panels(axes, names, None if share else tops)
    is_cut = any(exceeds(weights, top) for weights, top in zip(seen, tops, strict=True))
    if look.cbar and share:
        colour_bar(figure, image, axes, is_cut)
    elif look.cbar:
        colour_bar(figure, look.matrix_scale(1), axes, is_cut, OWN_SCALE)
    return figure


def _draw_matrix(ax: Axes, weights: Array, look: Look, top: float, label: str = LABEL) -> Any:
    """Draw a matrix in colours up to the user's `vmax`, or else to `top`; return the image."""
    scale = look.matrix_scale(top)
    image = draw_image(ax, weights, cmap=scale.cmap, norm=scale.norm)
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    if look.cbar:
        colour_bar(ax.figure, image, ax, exceeds(weights, scale.get_clim()[1]), label)
    return image


def _of_drawn(name: str, words: Sequence[str], drawn: Indices, count: int) -> list[str]:
    """The words of the rows or columns that are drawn, of words for these or for all `count` tokens, with padding."""
    if len(words) not in (len(drawn), count):
        size, way_out = len(words), ""
        if name.endswith("tokens") and size < count:
            way_out = f". {ALL_WORDS}; without the padding at the end draw a part, weights[..., :{size}, :{size}]"
        raise ValueError(
            f"{name} has {size} entries for {count} rows or columns of the map: pass one for each, special "
            "tokens included; where keys and queries are different tokens (cross-attention), give each side its own"
            + way_out
        )
    shown = readable(words)
    return shown if len(shown) == len(drawn) else [shown[place] for place in drawn]

"""Maps as matrices, queries down and keys across: `head`, `heads`, `tokens`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reading import Array
from .canvas import axes_of, colour_bar, label_ticks, matrix_top, panels
from .reading import Choice, select, select_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


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
            keys), or a list with one of the first three per layer, such as `get_local.cache["Attention.forward"]`;
            `AttentionMap`s, of which only the layer that is drawn is computed.
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
    ax = axes_of(ax, (6, 5))
    _matrix(ax, chosen.weights, cmap, vmin, matrix_top(chosen.weights) if vmax is None else vmax, cbar)
    queries, keys = chosen.weights.shape
    for name, labels, count in (("yticklabels", yticklabels, queries), ("xticklabels", xticklabels, keys)):
        if labels is not None:
            _check_count(name, labels, count)
    ax.set_title(chosen.label if title is None else title, parse_math=False)
    if xticklabels is not None or yticklabels is not None:
        label_ticks(ax, yticklabels, xticklabels)
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
    chosen = select_all(maps, layer=layer, batch=batch)
    names = [f"head {number}" for number in range(len(chosen.weights))]
    layout = columns, math.ceil(math.sqrt(len(names) * 1.3)), (2.6, 2.7)
    figure = matrices(list(chosen.weights), names, layout, share, cmap, vmin, vmax, cbar)
    figure.suptitle(chosen.label if title is None else title, parse_math=False)
    return figure


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
            is made visible; where not all fit, every second, third ... is written. Arabic and Hebrew need matplotlib
            3.11 or newer, which joins letters and writes them from the right.
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
    ax = axes_of(ax, (side[0] + 1, side[1]))
    top = float(np.nanmax(chosen.weights)) if vmax is None else vmax
    _matrix(ax, chosen.weights, cmap, vmin, top, cbar)
    ax.set_title(chosen.label if title is None else title, parse_math=False)
    label_ticks(ax, rows, columns)
    return ax


def _check_count(name: str, words: Sequence[str], count: int) -> None:
    if len(words) != count:
        raise ValueError(
            f"{name} has {len(words)} entries for {count} rows or columns of the map: pass one for each, special "
            "tokens included; where keys and queries are different tokens (cross-attention), each side its own"
        )


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
        colour_bar(ax.figure, image, ax, bool(np.max(np.nan_to_num(weights)) > vmax))
    return image


def matrices(
    maps: list[Array],
    names: list[str],
    layout: tuple[int | None, int, tuple[float, float]],
    share: bool,
    cmap: Any,
    vmin: float | None,
    vmax: float | None,
    cbar: bool,
) -> Figure:
    """A panel for each matrix, with the numbers of queries and keys at the outer ones."""
    figure, axes, columns = panels(len(maps), *layout, shared=True)
    tops = [matrix_top(weights) if vmax is None else vmax for weights in maps]
    if share and vmax is None:
        tops = [matrix_top(np.stack(maps))] * len(maps)
    for number, (ax, weights, top, name) in enumerate(zip(axes, maps, tops, names, strict=True)):
        is_left, is_low = number % columns == 0, number + columns >= len(axes)  # nothing below it
        image = _matrix(ax, weights, cmap, vmin, top, cbar and not share)
        ax.set(title=name, xlabel="key" if is_low else "", ylabel="query" if is_left else "")
        ax.tick_params(labelbottom=is_low, labelleft=is_left)
    if cbar and share:
        colour_bar(figure, image, axes, any(np.nanmax(weights) > tops[0] for weights in maps))
    return figure

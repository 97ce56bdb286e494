"""Pictures of what was measured of a model: `distance`, `filters`, `positions`, `spikes`, `patterns`, `statistic`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from ..layout import layout_of
from ..reading import Array, as_numbers
from .canvas import (
    at_whole_numbers,
    axes_of,
    colour_bar,
    draw_image,
    fit_label,
    font_size,
    full_rows,
    keep_fitting,
    label_ticks,
    lay_out,
    mosaic,
    name_panels,
    panel_size,
    panels,
    widest,
    width_of,
    write_title,
)
from .look import Colours, Keywords, Scale, exceeds
from .matrices import heads
from .selection import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..statistics import Collected

__all__ = ["distance", "filters", "patterns", "positions", "spikes", "statistic"]

_POSITIONS = Keywords(Scale, vmin=-1, vmax=1)
_SPIKES = Keywords(Colours, cmap="inferno")

# Okabe and Ito's colours can be told apart with any colour vision (https://jfly.uni-koeln.de/color/), and a wine red in
# place of their black. Each label of analysis.head_patterns has the same colour in every picture; other labels take the
# colours that are left.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#882255")
_KNOWN = ("previous", "next", "self", "local", "special", "induction", "broad", "vertical")
_NONE = ("mixed", "other", "none", "")
_GREY = "#D0D0D0"


def distance(distances: Any, *, unit: str = "pixels", ax: Axes | None = None, title: str | None = None) -> Axes:
    """How far each head looks, layer by layer: a dot per head, as in fig. 7 right of the ViT paper.

    >>> ax = distance(np.arange(24.0).reshape(4, 6))
    >>> len(ax.collections[0].get_offsets()), ax.get_ylabel()
    (24, 'mean attention distance (pixels)')

    Args:
        distances: the result of `analysis.attention_distance`, (layers, heads) or (layers, batch, heads); the mean over
            the images is drawn. Or a list with an array (heads,) or (batch, heads) for each layer; layers may differ in
            their number of heads. Heads without a distance (NaN) have no dot. Or what `statistics.collect` gives with
            `Distance` in it.
        unit: of distances that are numbers alone: "pixels" if `attention_distance` had `patch_size`, else "patches".
        ax: the axes to draw on; None: a new figure.
        title: None: no title.

    Raises:
        ValueError: another shape, or distances below zero.
    """
    label = f"mean attention distance ({unit})"
    if hasattr(distances, "labels") and "distance" in distances:
        label, distances = distances.labels["distance"], distances["distance"]
    if isinstance(getattr(distances, "mean", None), np.ndarray):  # moments
        distances = distances.mean
    if len(getattr(distances, "shape", (0, 0))) not in (2, 3):
        raise ValueError(
            f"distances has shape {tuple(distances.shape)}; expected (layers, heads) or (layers, batch, heads): give "
            "analysis.attention_distance all layers, and they come first"
        )
    layers = [as_numbers(one, "distances") for one in distances]
    if not layers or any(one.ndim not in (1, 2) or not one.size for one in layers):
        shapes = ", ".join(str(one.shape) for one in layers) or "none"
        raise ValueError(
            f"distances has layers of shape {shapes}; expected (heads,) or (batch, heads) for each, as "
            "analysis.attention_distance(maps) gives them"
        )
    # The mean over the images that have a value.
    dots = [one if one.ndim == 1 else np.ma.masked_invalid(one).mean(0).filled(np.nan) for one in layers]
    every = np.concatenate(dots)
    known = every[np.isfinite(every)]
    if not known.size or known.min() < 0:
        raise ValueError("distances are numbers from 0, and these are " + ("below" if known.size else "all NaN"))
    ax = _dots(dots, label, ax)
    write_title(ax, title)
    return ax


def _dots(layers: Sequence[Array], label: str, ax: Axes | None) -> Axes:
    """A dot for each head over its layer, from (heads,) for each layer; NaN has none."""
    y, x = np.concatenate(layers), np.repeat(np.arange(len(layers)), [len(one) for one in layers])
    known = np.isfinite(y)
    ax = axes_of(ax, (6, 4))
    ax.scatter(x[known], y[known], s=18, color=_COLOURS[0], alpha=0.8, linewidths=0)
    at_whole_numbers(ax.xaxis)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    if y[known].min() >= 0:
        ax.set_ylim(0, 1.05 * float(y[known].max()) or 1)
    ax.set_xlabel("network depth (layer)")
    ax.set_ylabel(label, parse_math=False)
    keep_fitting(ax.figure, functools.partial(fit_label, ax.yaxis, label, whole_figure=True))
    return ax


def filters(components: Any, *, columns: int = 7, ax: Axes | None = None, title: str | None = None) -> Axes:
    """Patch-embedding filters, or their principal components, as tiles in colour: fig. 7 left of the ViT paper.

    >>> ax = filters(np.random.default_rng(0).normal(size=(28, 3, 14, 14)))
    >>> ax.get_title()
    '28 filters, each from its lowest value to its highest'

    Args:
        components: the result of `analysis.filter_components`, (count, channels, height, width), with one channel
            (grey) or three (red, green, blue). Each is scaled to 0..1 by its own lowest and highest value, so the
            strengths of two tiles cannot be compared.
        columns: the number of tiles in a row.
        ax: as in `distance`.
        title: None: a title that says what the tiles are.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    values = as_numbers(components, "components")
    if values.ndim != 4 or values.shape[1] not in (1, 3) or 0 in values.shape:
        raise ValueError(f"components has shape {values.shape}; expected (count, 1 or 3 channels, height, width)")
    if not np.isfinite(values).all():
        raise ValueError("components holds NaN or infinite values")
    if columns < 1:
        raise ValueError(f"columns={columns}: pass at least 1")
    count, _, high, wide = values.shape
    low = values.min((1, 2, 3), keepdims=True)
    span = values.max((1, 2, 3), keepdims=True) - low
    tiles = np.where(span > 0, (values - low) / np.where(span > 0, span, 1), 0.5)  # a flat filter is grey
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    cells = np.ones((rows * columns, high, wide, 3))
    cells[:count] = np.moveaxis(tiles, 1, -1)  # one channel is broadcast to three
    ax = axes_of(ax, (0.9 * columns + 0.3, 0.9 * rows * high / wide + 0.6))
    mosaic(ax, cells.reshape(rows, columns, high, wide, 3), ([], []))
    text = f"{count} filters, each from its lowest value to its highest"
    write_title(ax, title, text)
    return ax


@_POSITIONS.show
def positions(similarity: Any, *, every: int = 1, ax: Axes | None = None, **options: Unpack[Scale]) -> Axes:
    """How alike position embeddings are, as a grid of grids: fig. 7 centre of the ViT paper.

    >>> ax = positions(np.random.default_rng(0).uniform(-1, 1, (4, 4, 4, 4)))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('input patch column', 'input patch row')

    The tile at (row, column) shows how similar that patch's embedding is to the embedding of each patch.

    Args:
        similarity: the result of `analysis.position_similarity`, cosine similarities (rows, columns, rows, columns). Or
            a part of it along the first two axes; the tiles then have no numbers.
        every: 5 shows the tile of every fifth patch of a large grid, from the third on; each tile has all patches.
        ax, title: as in `distance`.
        cmap, cbar: as in `head`.
        vmin, vmax: the ends of the colour scale, by default -1 and 1; None: the lowest and the highest value.

    Raises:
        ValueError: another shape, or no tile left.
    """
    look = _POSITIONS.look(options)
    values = as_numbers(similarity, "similarity")
    if values.ndim != 4 or 0 in values.shape or any(np.greater(values.shape[:2], values.shape[2:])):
        raise ValueError(
            f"similarity has shape {values.shape}; expected (rows, columns, rows, columns), as "
            "analysis.position_similarity gives it"
        )
    is_whole = values.shape[:2] == values.shape[2:]
    if not 1 <= every <= min(values.shape[:2]):
        raise ValueError(f"every={every}: pass 1 to {min(values.shape[:2])}, the side of the grid")
    chosen = [range(count)[every // 2 :: every] for count in values.shape[:2]]
    values = values[np.ix_(*chosen)]
    rows, columns = values.shape[:2]
    low = float(np.nanmin(values)) if look.vmin is None else look.vmin
    top = float(np.nanmax(values)) if look.vmax is None else look.vmax
    side = min(9.0, max(4.0, 0.4 * max(rows, columns)))
    ax = axes_of(ax, (side * min(1, columns / rows) + 1.2, side * min(1, rows / columns) + 0.4))
    scale = replace(look, vmin=low).scale(top)
    if look.cbar:
        colour_bar(ax.figure, scale, ax, exceeds(values, top + 1e-5), "cosine similarity")
    ax.set_xlabel("input patch column")
    ax.set_ylabel("input patch row")
    write_title(ax, look.title)
    mosaic(ax, values, (chosen[0], chosen[1]) if is_whole else ([], []), cmap=scale.cmap, norm=scale.norm)
    return ax


@_SPIKES.show
def spikes(
    rates: Any,
    *,
    grid: tuple[int, int] | None = None,
    columns: int | None = None,
    vmax: float | None = None,
    **options: Unpack[Colours],
) -> Figure:
    """Firing rates of patches, a map per block, with each map's mean.

    >>> figure = spikes({"before": np.full((8, 64), 0.5), "after": np.full((8, 64), 0.1)})
    >>> [ax.get_title() for ax in figure.axes[7:9]]
    ['block 7\\nmean 0.50', 'mean 0.10']

    All maps share one colour scale from 0, so that before and after can be compared.

    Args:
        rates: the results of `analysis.spike_rate` for all blocks, from 0 to 1: (blocks, tokens) or (blocks, rows,
            columns), or a list with an array (tokens,) or (rows, columns) for each block. A dict of these by name has
            its names one below another.
        grid: (rows, columns) of patches; None: the square that the tokens form.
        columns: the number of maps in a row; None: up to eight, or all maps of a name where they fit.
        vmax: the end of the colour scale; None: the highest rate.
        cmap, cbar: as in `head`.
        title: the title above all maps; None: no title.

    Raises:
        ValueError: another shape, tokens that do not form a grid, or values that are not rates.
    """
    look = _SPIKES.look(options)
    series = dict(rates) if isinstance(rates, Mapping) else {"": rates}
    maps = {str(name): _blocks(name, values, grid) for name, values in series.items()}
    counts = {name: len(blocks) for name, blocks in maps.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"rates has different numbers of blocks under its names: {counts}")
    first, count = next(iter(counts.items()))
    # Letters of "mean 0.25", written small.
    columns = full_rows(count, columns, 8 if len(maps) == 1 else count, 7)
    # Where the blocks take several rows, the names take turns: each block stands above itself.
    starts = range(0, count, columns)
    cells = [(name, number) for start in starts for name in maps for number in range(start, start + columns)]
    width, height = panel_size(maps[first][0].shape, 1.5 if len(cells) > 4 else 2.2)
    figure, axes = panels(len(cells), columns, (max(1.0, width), height), lines=2, has_bar=look.cbar)
    highest = max(float(block.max()) for blocks in maps.values() for block in blocks)
    top = vmax if vmax is not None else highest or 1.0
    scale = look.scale(top)
    names = {}
    for ax, (name, number) in zip(axes, cells, strict=True):
        if number >= count:
            ax.set_axis_off()
            continue
        block = maps[name][number]
        image = draw_image(ax, block, cmap=scale.cmap, norm=scale.norm)
        ax.set(xticks=[], yticks=[])
        names[ax] = f"block {number}\n" * (name == first) + f"mean {block.mean():.2f}"
        if len(maps) > 1 and number % columns == 0:
            ax.set_ylabel(name, parse_math=False)
            keep_fitting(figure, functools.partial(fit_label, ax.yaxis, name))
    name_panels(list(names), list(names.values()))
    if look.cbar:
        colour_bar(figure, image, list(names), highest > top, "firing rate")
    write_title(figure, look.title)
    return figure


def _blocks(name: Any, values: Any, grid: tuple[int, int] | None) -> list[Array]:
    """Each block's firing rates, (rows, columns)."""
    what = f"rates[{name!r}]" if name else "rates"
    blocks = []
    for number, one in enumerate(values):
        block = as_numbers(one, what)
        if block.ndim == 1 and block.size:
            block = layout_of(block.size, {"grid": grid, "prefix_tokens": 0}).spread(block)
        if block.ndim != 2 or not block.size or (grid is not None and block.shape != tuple(grid)):
            raise ValueError(
                f"{what} has shape {block.shape} for block {number}"
                + ("" if grid is None else f" and grid={grid}")
                + "; expected one picture's (tokens,) or (rows, columns) per block"
            )
        if not (block.min() >= 0 and block.max() <= 1.000001):  # false for NaN
            raise ValueError(
                f"{what} has values from {block.min():.3g} to {block.max():.3g} for block {number}; firing rates are "
                "from 0 to 1: pass what analysis.spike_rate makes of the spikes"
            )
        blocks.append(block)
    if not blocks:
        raise ValueError(f"{what} has no blocks")
    return blocks


def patterns(found: Any, *, ax: Axes | None = None, title: str | None = None) -> Axes:
    """The pattern of each head, in a table of layers x heads: a colour and a name for each pattern, with a legend.

    A head that is mixed has the name of the pattern that it is nearest to, behind a sign ≈. Where the cells are small,
    as in one column of a paper, they have the first letters of the names.

    >>> ax = patterns([["previous", "broad"], ["special", "induction"]])
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['previous (1)', 'special (1)', 'induction (1)', 'broad (1)']

    Args:
        found: the result of `analysis.head_patterns`, or its labels alone, (layers, heads) of text.

    Raises:
        ValueError: labels that are not a table of text, or more than eight different labels.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    labels = np.asarray(getattr(found, "labels", found))
    if labels.ndim != 2 or not labels.size or labels.dtype.kind not in "UO":
        raise ValueError(
            f"labels have shape {labels.shape} and type {labels.dtype}; expected (layers, heads) of text, as "
            "analysis.head_patterns gives them; plot.statistic draws the scores that collect gives"
        )
    labels = labels.astype(str)
    colours = _colours_of(sorted(set(labels.ravel().tolist())))
    count, heads = labels.shape
    names = labels.astype(object)
    if hasattr(found, "nearest"):
        for layer, head in np.argwhere(labels == "mixed").tolist():
            names[layer, head] = "≈" + (found.nearest(layer, head) or "nothing")
    longest = max(map(len, names.ravel().tolist()))
    # Cells in which the longest name is as large as other text, and no more: on paper the figure is not made smaller.
    em = font_size() / 72
    wide = min(0.56 * em * longest + 0.1, 10 / heads)
    high = min(2.2 * em, 9 / count)
    size = [max(1.5, wide * heads) + 12 * em, max(1.0, high * count + 5 * em, 1.8 * em * len(colours))]
    where: dict[str, Any] = {"bbox_to_anchor": (1.01, 1)}
    is_below = ax is None and size[0] > widest()
    if is_below:  # the table has the whole width
        each = full_rows(len(colours), None, max(1, int((widest() - 5 * em) / (10 * em))))
        size = [widest(), size[1] + 1.5 * em * math.ceil(len(colours) / each)]
    ax = axes_of(ax, (size[0], size[1]))
    if is_below:
        under = ax.transAxes + ScaledTranslation(0, -3.5 * em, ax.figure.dpi_scale_trans)
        where = {"bbox_to_anchor": (0, 0), "bbox_transform": under, "ncols": each}
    draw_image(
        ax,
        np.array([[to_rgb(colours[label]) for label in row] for row in labels]),
        aspect="auto",
    )
    ax.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("head")
    ax.set_ylabel("layer")
    entries = []
    for label, colour in colours.items():
        near = ", ≈ nearest" if (names[labels == label] != label).any() else ""
        entries.append(Patch(color=colour, label=f"{label or 'none'}{near} ({int((labels == label).sum())})"))
    ax.legend(handles=entries, loc="upper left", frameon=False, borderaxespad=0, **where)
    write_title(ax, title)
    label_ticks(ax, [str(number) for number in range(count)], [str(number) for number in range(heads)], turned=False)
    _write_in_cells(ax, names, labels, colours)
    return ax


def _colours_of(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, the labels of `head_patterns` first."""
    colours = {label: colour for label, colour in zip(_KNOWN, _COLOURS, strict=False) if label in labels}
    others = [label for label in labels if label not in _KNOWN and label not in _NONE]
    left = [colour for colour in reversed(_COLOURS) if colour not in colours.values()]
    if len(others) > len(left):
        raise ValueError(
            f"{len(labels)} different labels are more than can be told apart by colour: {', '.join(labels)}"
        )
    colours |= dict(zip(others, left, strict=False))
    return colours | {label: _GREY for label in labels if label in _NONE}


def _write_in_cells(ax: Axes, names: Any, labels: Any, colours: Mapping[str, str]) -> None:
    """Write each cell's name, or its first letters, as large as fits, on the colour of its label."""
    from matplotlib.colors import to_rgb

    texts = []
    for row, column in np.ndindex(labels.shape):
        label = labels[row, column]
        luminance = float(np.dot(to_rgb(colours[label]), [0.299, 0.587, 0.114]))
        ink = "0.35" if label in _NONE else "white" if luminance < 0.5 else "black"
        texts.append(ax.text(column, row, names[row, column], ha="center", va="center", parse_math=False, color=ink))
        texts[-1].set_in_layout(False)
    lay_out(ax.figure)
    keep_fitting(ax.figure, functools.partial(_fit_cells, ax, names, texts, font_size()))


def _fit_cells(ax: Axes, cells: Any, texts: Sequence[Any], medium: float) -> bool:
    """Write the names in their cells: whole, or else as few first letters as tell them apart, or else not at all."""
    box = ax.get_window_extent()
    high, wide = (side * 72 / ax.figure.dpi for side in (box.height / cells.shape[0], box.width / cells.shape[1]))
    names = sorted(set(cells.ravel().tolist()))
    length = next(count for count in range(2, 99) if len({name[:count] for name in names}) == len(names))
    for short in ({name: name for name in names}, {name: name[:length] for name in names}):
        size = min(0.9 * medium, 0.7 * high, 0.95 * wide / max(0.6, *map(width_of, short.values())))
        if size >= 0.6 * medium:
            break
    for text, name in zip(texts, cells.ravel().tolist(), strict=True):
        text.set(text=short[name], fontsize=size, visible=size >= 0.6 * medium)
    return False  # the axes stay as they are


def statistic(
    found: Collected, name: str, *, layer: Choice | None = None, ax: Axes | None = None, title: str | None = None
) -> Axes | Figure:
    """The means of one statistic over a data set, for each head.

    >>> import torch
    >>> from visualizer.statistics import Entropy, collect
    >>> encoder = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(encoder, num_layers=3)
    >>> found = collect(model, torch.randn(10, 8, 5, 16), Entropy())  # or visualizer.load("entropy.safetensors")
    >>> ax = statistic(found, "entropy")
    >>> ax.get_ylabel(), ax.get_title(), len(ax.collections[0].get_offsets())
    ('mean entropy (nats)', 'mean of 80 samples', 6)

    - One number a head, such as `Entropy` and `Distance`: a dot for each head, layer by layer; Axes.
    - A number for each position, `Received`: layers down, positions across, the mean over the heads; Axes.
    - Named numbers, `Patterns`: a panel for each, layers down, heads across; Figure.
    - Whole maps, `MeanMap`: the heads of one layer as matrices, as by `heads`; Figure.

    Args:
        found: what `statistics.collect` gives, or `visualizer.load`.
        name: which statistic of these.
        layer: of `MeanMap`, as in `heads`; None: the last.
        ax: where to draw; None: on a new figure. Only for the pictures that are one Axes.
        title: None: how many samples it is the mean of, or which layer.

    Raises:
        KeyError: there is no statistic of that name.
        ValueError: no sample has a number; or `layer` or `ax` was passed for a picture that has none.
    """
    if not hasattr(found, "number_names"):
        raise TypeError(f"found is a {type(found).__name__}: pass what statistics.collect gives, or visualizer.load")
    means = found[name].mean
    names = found.number_names.get(name, ())
    is_map = means.ndim == 4
    if layer is not None and not is_map:
        raise ValueError(f"layer={layer!r}: the picture of {name!r} has all layers; leave layer= out")
    if ax is not None and (is_map or names):
        raise ValueError(f"the picture of {name!r} is a figure of several panels: leave ax= out")
    if not np.isfinite(means).any():
        raise ValueError(f"no sample has a number of {name!r}")
    if is_map:
        # heads() takes (layers, batch, heads, queries, keys).
        return heads(means[:, None], layer=-1 if layer is None else layer, title=title)
    title = f"mean of {found.samples:,} samples" if title is None else title
    if names:
        return _of_names(means, names, found.labels[name], title)
    label = found.labels[name]
    ax = _dots(list(means), label, ax) if means.ndim == 2 else _of_positions(means, label, ax)
    write_title(ax, title)
    return ax


def _of_positions(means: Array, label: str, ax: Axes | None) -> Axes:
    """(layers, heads, positions): layers down, positions across, in the mean over the heads."""
    shares = np.ma.masked_invalid(means).mean(1).filled(np.nan)
    ax = axes_of(ax, (7, max(2.5, 0.6 + 0.25 * len(shares))))
    # One position often gets most of the attention: colours that are even would hide all others.
    scale = "log" if np.nanmin(shares) >= 0 and np.nanmax(shares) > 0 else "linear"
    image = ax.imshow(shares, aspect="auto", interpolation="none", norm=scale, cmap="viridis")
    ax.figure.colorbar(image, ax=ax).set_label(label, parse_math=False)
    at_whole_numbers(ax.yaxis)
    ax.set_xlabel("position")
    ax.set_ylabel("layer")
    return ax


def _of_names(means: Array, names: tuple[str, ...], label: str, title: str) -> Figure:
    """(layers, heads, names): a panel for each name, layers down, heads across."""
    from matplotlib.colors import Normalize

    layers, count, _ = means.shape
    columns = min(4, len(names))
    figure, axes = panels(len(names), columns, (2.2, max(0.8, min(4.0, 2.2 * layers / count)) + 0.3))
    low, high = min(0.0, float(np.nanmin(means))), max(1.0, float(np.nanmax(means)))
    for ax, scores in zip(axes, means.transpose(2, 0, 1), strict=True):
        image = draw_image(ax, np.ma.masked_invalid(scores), norm=Normalize(low, high), cmap="viridis")
        ax.set(xlabel="head", ylabel="layer")
        at_whole_numbers(ax.yaxis)
    name_panels(axes, names)
    figure.colorbar(image, ax=axes).set_label(label, parse_math=False)
    write_title(figure, title)
    return figure

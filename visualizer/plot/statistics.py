"""Statistics over a data set as pictures: `statistic`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..reading import Array
from .canvas import axes_of
from .matrices import heads
from .selection import Choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..statistics import Collected

__all__ = ["statistic"]


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
    means = found[name].mean
    panels = found.number_names.get(name, ())
    is_map = means.ndim == 4
    if layer is not None and not is_map:
        raise ValueError(f"layer={layer!r}: the picture of {name!r} has all layers; leave layer= out")
    if ax is not None and (is_map or panels):
        raise ValueError(f"the picture of {name!r} is a figure of several panels: leave ax= out")
    if not np.isfinite(means).any():
        raise ValueError(f"no sample has a number of {name!r}")
    if is_map:
        # heads() takes (layers, batch, heads, queries, keys).
        return heads(means[:, None], layer=-1 if layer is None else layer, title=title)
    title = f"mean of {found.samples:,} samples" if title is None else title
    if panels:
        return _panels(means, panels, found.labels[name], title)
    draw = _dots if means.ndim == 2 else _positions
    return draw(means, found.labels[name], title, ax)


def _dots(means: Array, label: str, title: str, ax: Axes | None) -> Axes:
    """(layers, heads): a dot for each head, over its layer."""
    ax = axes_of(ax, (6, 4))
    layers = np.indices(means.shape)[0]
    known = np.isfinite(means)
    ax.scatter(layers[known], means[known], s=18, color="#0072B2", alpha=0.8, linewidths=0)
    _count_layers(ax.xaxis)
    ax.set_xlim(-0.5, len(means) - 0.5)
    if means[known].min() >= 0:
        ax.set_ylim(0, 1.05 * float(means[known].max()) or 1)
    ax.set_xlabel("network depth (layer)")
    ax.set_ylabel(label, parse_math=False)
    ax.set_title(title, parse_math=False)
    return ax


def _positions(means: Array, label: str, title: str, ax: Axes | None) -> Axes:
    """(layers, heads, positions): layers down, positions across, in the mean over the heads."""
    shares = np.ma.masked_invalid(means).mean(1).filled(np.nan)
    ax = axes_of(ax, (7, max(2.5, 0.6 + 0.25 * len(shares))))
    # One position often gets most of the attention: colours that are even would hide all others.
    scale = "log" if np.nanmin(shares) >= 0 and np.nanmax(shares) > 0 else "linear"
    image = ax.imshow(shares, aspect="auto", interpolation="none", norm=scale, cmap="viridis")
    ax.figure.colorbar(image, ax=ax).set_label(label, parse_math=False)
    _count_layers(ax.yaxis)
    ax.set_xlabel("position")
    ax.set_ylabel("layer")
    ax.set_title(title, parse_math=False)
    return ax


def _panels(means: Array, names: tuple[str, ...], label: str, title: str) -> Figure:
    """(layers, heads, names): a panel for each name, layers down, heads across."""
    from matplotlib import pyplot as plt

    layers, count, _ = means.shape
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    size = (2.5 * columns, rows * (0.8 + 2 * layers / count))
    low, high = min(0.0, float(np.nanmin(means))), max(1.0, float(np.nanmax(means)))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="compressed", squeeze=False)
    for ax, name, scores in zip(axes.flat, names, means.transpose(2, 0, 1), strict=False):
        image = ax.imshow(scores, vmin=low, vmax=high, cmap="viridis", interpolation="none")
        ax.set_title(name, parse_math=False)
        _count_layers(ax.yaxis)
        ax.set_xlabel("head")
        ax.set_ylabel("layer")
    for empty in axes.flat[len(names) :]:
        empty.set_axis_off()
    figure.colorbar(image, ax=axes).set_label(label, parse_math=False)
    figure.suptitle(title, parse_math=False)
    return figure


def _count_layers(axis: Any) -> None:
    """Ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))

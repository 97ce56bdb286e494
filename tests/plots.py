"""What the tests of pictures share: made-up attention, and readers of what was drawn."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle


@pytest.fixture(autouse=True)
def no_figure_left():
    yield
    plt.close("all")


def maps_of(*shape, seed=0):
    """Random attention: rows over the last axis sum to one."""
    logits = np.random.default_rng(seed).normal(size=shape) * 2
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def hot(row, column, grid=(4, 4), prefix=1):
    """Maps (1, 1, N, N) whose every query attends to one patch only."""
    count = prefix + grid[0] * grid[1]
    maps = np.zeros((1, 1, count, count))
    maps[..., prefix + row * grid[1] + column] = 1
    return maps


def frames(ax):
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def pixel(ax, x, y):
    """The colour that lies on top at a place of the picture, from the layers that were drawn."""
    colour = np.zeros(3)
    for image in ax.images:
        left, right, bottom, top = image.get_extent()
        data = image.to_rgba(image.get_array()) if image.get_array().ndim == 2 else np.asarray(image.get_array())
        rows, columns = data.shape[:2]
        layer = data[int((y - top) / (bottom - top) * rows), int((x - left) / (right - left) * columns)]
        alpha = layer[3] if layer.shape[0] == 4 else 1.0
        colour = (1 - alpha) * colour + alpha * layer[:3]
    return colour


def marked(ax, rows, columns):
    """The patches of a picture of one colour that do not look as most of its patches do."""
    _, right, bottom, _ = ax.images[0].get_extent()
    colours = {
        (row, column): pixel(ax, (column + 0.5) * right / columns, (row + 0.5) * bottom / rows)
        for row, column in np.ndindex(rows, columns)
    }
    usual = np.median(list(colours.values()), axis=0)
    return [place for place, colour in colours.items() if np.abs(colour - usual).max() > 0.1]


def places_of_text(ax):
    """The boxes of the labels along an axes' two sides, as they are drawn, and the figure's own."""
    ax.figure.canvas.draw()
    sides = [[label.get_window_extent() for label in axis.get_ticklabels()] for axis in (ax.xaxis, ax.yaxis)]
    return sides, ax.figure.bbox


def cell(ax, row, column, rows, columns):
    """One cell of a mosaic, gaps and magnification undone, as far as it goes by looking: its own pixels."""
    whole = np.asarray(ax.images[0].get_array())
    high, wide = whole.shape[0] // rows, whole.shape[1] // columns
    return whole[row * high : (row + 1) * high, column * wide : (column + 1) * wide]


def resampled(cell, rows, columns, margin=0.06):
    """The values in the middles of a cell's rows x columns patches, where gaps take up to `margin` of each side."""
    places = [
        ((np.arange(count) + 0.5) / count * (1 - 2 * margin) + margin) * size
        for count, size in zip((rows, columns), cell.shape, strict=False)
    ]
    return cell[np.ix_(*(place.astype(int) for place in places))]

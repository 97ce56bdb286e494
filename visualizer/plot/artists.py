"""What matplotlib has no class of: images for screen and print, ticks and texts that fit a figure of any size.

Imported where something is drawn, and not before: it imports matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import Locator
from matplotlib.transforms import Affine2D, Transform

_PRINT = 300  # dots per inch: more are not seen on paper


class Picture(AxesImage):
    """An image that is right on a screen and in a file of vectors (PDF, SVG, EPS).

    On a screen a pixel shows the mean of what it covers: the nearest value alone would leave out whole columns, perhaps
    an attention sink. In a file of vectors, for which matplotlib would draw 100 dots per inch, the image has its own
    pixels: the means of these where they are finer than print; repeated where they are few, as many viewers blur such.
    """

    def draw(self, renderer: Any) -> None:
        """Draw; called by the axes."""
        if self.get_interpolation() != "bilinear":
            self.set_interpolation("none" if renderer.option_scale_image() else "antialiased")
        super().draw(renderer)

    def make_image(self, renderer: Any, magnification: float = 1.0, unsampled: bool = False) -> Any:
        """The pixels to draw, and where; called by `draw`."""
        place: Transform
        pixels, x, y, place = super().make_image(renderer, magnification, unsampled=unsampled)
        if not unsampled or pixels is None:
            return pixels, x, y, place
        times, block = max(1, _PRINT // max(pixels.shape[:2])), int(self._dots_per_inch() // _PRINT)
        values = self.get_array()
        if block > 1 and values is not None and values.shape[:2] == pixels.shape[:2]:  # not a part that is zoomed into
            # Of weights the means, as a mean of colours is no colour of the scale.
            means = _block_means(pixels if values.ndim > 2 else values, block)
            pixels = means.astype(np.uint8) if values.ndim > 2 else self.to_rgba(means, bytes=True)
            place = Affine2D().scale(block) + place
        elif times > 1:
            pixels = pixels.repeat(times, 0).repeat(times, 1)
            place = Affine2D().scale(1 / times) + place
        return pixels, x, y, place

    def _dots_per_inch(self) -> float:
        (left, bottom), (right, top) = self.get_transform().transform(np.reshape(self.get_extent(), (2, 2)).T)
        (high, wide), dpi = self.get_size(), self.axes.figure.dpi
        return float(min(high / abs(top - bottom), wide / abs(right - left)) * dpi)


def _block_means(values: Any, block: int) -> Any:
    """The means of blocks of (rows, columns, ...), of what is not masked; the last go on with the value at the edge."""
    more = [(0, -size % block) for size in values.shape[:2]] + [(0, 0)] * (values.ndim - 2)
    whole = np.pad(np.ma.filled(values.astype(float), np.nan), more, "edge")
    high, wide = (size // block for size in whole.shape[:2])
    return np.ma.masked_invalid(whole.reshape(high, block, wide, block, *whole.shape[2:])).mean((1, 3))


class Words(Locator):
    """Ticks at places that have words, so few that the words do not overlap on the axis as it is when it is drawn."""

    def __init__(self, places: Sequence[float], angles: Sequence[int], room: float, fonts: Sequence[str]) -> None:
        self.places, self.angles, self.room, self.fonts = places, angles, room, fonts

    def __call__(self) -> list[float]:
        """The places; called whenever the figure is laid out or drawn."""
        axis: Any = self.axis
        size = axis.get_major_ticks(1)[0].label1.get_fontsize()  # the user may have set another
        step = max(1, math.ceil(self.room * size * len(self.places) / max(1.0, length_of(axis))))
        places, angles = self.places[::step], self.angles[::step]
        # Matplotlib uses a tick again for another word, and each word has an angle of its own.
        for tick, angle in zip(axis.get_major_ticks(len(places)), angles, strict=True):
            tick.label1.set(rotation=angle, parse_math=False, fontfamily=self.fonts, linespacing=1.0)
        return list(places)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """All places, whether they fit or not."""
        return list(self.places)


class Roots(Locator):
    """Ticks at round numbers from 0 whose square roots are about evenly spaced, so few that they do not overlap."""

    def __call__(self) -> list[float]:
        """The places; called whenever the figure is laid out or drawn."""
        axis: Any = self.axis
        letters = 1.6 if axis.axis_name == "y" else 4
        room = letters * axis.get_major_ticks(1)[0].label1.get_fontsize() / max(1.0, length_of(axis))
        return self.tick_values(0, axis.get_view_interval()[1], max(0.11, room))

    def tick_values(self, vmin: float, vmax: float, apart: float = 0.11) -> list[float]:
        """The places from 0 to `vmax` whose roots are more than a share `apart`."""
        ticks = [0.0]
        for power in range(-6, 1):
            for digit in (1, 2, 5):
                tick = digit * 10.0 ** (power + math.floor(math.log10(vmax)))
                if tick <= vmax * 1.000001 and math.sqrt(tick / vmax) - math.sqrt(ticks[-1] / vmax) > apart:
                    ticks.append(tick)
        return ticks


class Fitting(ConstrainedLayoutEngine):
    """The layout of a figure whose texts are fitted to it again before each drawing, as a figure may change its size.

    Its axes are "compressed": plain "constrained" cuts off labels where one side of the axes depends on the other, as
    under a picture.
    """

    def __init__(self, bars_below: bool = False) -> None:
        super().__init__(compress=True)
        self.bars_below = bars_below
        """Whether each panel has its own colour bar, below it."""
        self.fits: list[Callable[[], bool]] = []
        """Each fits one text, or some of one size, to its place and says whether it changed."""

    def execute(self, fig: Any) -> None:
        """Place the axes, fit the texts, and do both again if a text takes another room now."""
        super().execute(fig)
        for _ in range(2):  # a third time, a text could only go to and fro
            changed = [fit() for fit in self.fits]
            if any(changed):
                super().execute(fig)


def length_of(axis: Any) -> float:
    """The length of an axis in points."""
    box = axis.axes.get_window_extent()
    return float((box.height if axis.axis_name == "y" else box.width) / axis.axes.figure.dpi * 72)

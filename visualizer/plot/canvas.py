"""What every picture is made of: axes and panels, images, colour bars, titles, mosaics, labels that do not overlap."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import warn
from ..reading import Array
from ..words import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

LABEL = "attention weight"
OWN_SCALE = "share of each panel's scale"
# matplotlib tries those that are installed in this order, so that a label in another script is not a row of boxes.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("Microsoft YaHei", "PingFang SC", "SimHei", "Arial Unicode MS", "Noto Sans Arabic", "Noto Sans"),
)
# Of scripts that DejaVu Sans, which matplotlib brings, has no letters of: first and last character, and a font.
_SCRIPTS = (
    *((low, high, "Noto Sans CJK") for low, high in ((0x2E80, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF))),
    *((0xFE30, 0xFE4F, "Noto Sans CJK"), (0xFF00, 0xFFEF, "Noto Sans CJK"), (0x20000, 0x3FFFF, "Noto Sans CJK")),
    *((0x0900, 0x097F, "Noto Sans Devanagari"), (0x0980, 0x09FF, "Noto Sans Bengali")),
    *((0x0B80, 0x0BFF, "Noto Sans Tamil"), (0x0C00, 0x0C7F, "Noto Sans Telugu"), (0x0E00, 0x0E7F, "Noto Sans Thai")),
    *((0x1F000, 0x1FAFF, "Noto Emoji"), (0x2600, 0x27BF, "Noto Sans Symbols")),
)
# Scripts that are set in columns, and their signs that lie on their side there.
_UPRIGHT = tuple((low, high) for low, high, font in _SCRIPTS if font == "Noto Sans CJK")
_SET_UPRIGHT = str.maketrans("ー（）「」『』《》〈〉【】", "︱︵︶﹁﹂﹃﹄︽︾︿﹀︻︼")
LONGEST = 24  # letters of a word at an axis
_CELL = 256  # the largest side of a mosaic's cell, in pixels: 144 such cells are 38 MB


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The user's axes, or those of a new figure of (width, height) in inches, smaller where the style is narrower.

    Raises TypeError for other objects.
    """
    from matplotlib.axes import Axes

    if isinstance(ax, Axes):
        return ax
    if ax is not None:
        raise TypeError(
            f"ax is a {type(ax).__name__}: pass one Axes, such as figure.add_subplot(), or axes[0, 0] of many"
        )
    scale = min(1, widest() / size[0])
    return new_figure(size[0] * scale, size[1] * scale).add_subplot()


def new_figure(wide: float, high: float, *, bars_below: bool = False) -> Figure:
    """An empty figure of that many inches, whose texts are fitted again whenever its size is another."""
    from matplotlib import pyplot as plt

    from .artists import Fitting

    return plt.figure(figsize=(wide, high), layout=Fitting(bars_below))


def widest() -> float:
    """How many inches wide a figure may be: as wide as `figure.figsize`, if the user's style has its own."""
    import matplotlib as mpl

    size = mpl.rcParams["figure.figsize"]
    return math.inf if list(size) == list(mpl.rcParamsDefault["figure.figsize"]) else float(size[0])


def keep_fitting(figure: Any, fit: Callable[[], bool]) -> None:
    """Fit a text to its place: now, and whenever a figure of ours is laid out. `fit` says whether it changed it."""
    from .artists import Fitting

    fit()
    engine = figure.get_layout_engine()
    if isinstance(engine, Fitting):
        engine.fits.append(fit)


def full_rows(count: int, columns: int | None, wanted: int, letters: float = 13) -> int:
    """How many of that many panels stand in a row: `columns`, or else about as many as wanted, with all rows full.

    In a narrow figure there are fewer, so that each has room for a name of so many letters.

    >>> full_rows(3, None, 2), full_rows(11, None, 6), full_rows(24, None, 6), full_rows(32, None, 7)
    (3, 6, 6, 8)
    """
    if columns is not None and (not isinstance(columns, Integral) or columns < 1):
        raise ValueError(f"columns={columns!r}: pass a whole number from 1, or None for what suits {count} panels")
    em = font_size() / 72
    room = (widest() - 8 * em) / (0.58 * em * letters)
    wanted = max(1, int(min(wanted, room)))
    close = [near for near in (wanted, wanted - 1, wanted + 1, wanted - 2) if 1 < near <= room and count % near == 0]
    return int(min(count, columns or [*close, math.ceil(count / math.ceil(count / wanted))][0]))


def panels(
    count: int,
    columns: int,
    size: tuple[float, float],
    *,
    lines: int = 1,
    has_bar: bool = True,
    has_ticks: bool = False,
    bars_below: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels of (width, height) in inches, each with so many lines above it.

    They are smaller where the style's figures are narrow. Panels with ticks share both axes. There is one colour bar on
    the right, or, `bars_below`, room for one below each panel.
    """
    rows = math.ceil(count / columns)
    line = 1.2 * font_size() / 72
    beside = has_bar * (0.4 + 4 * line) + has_ticks * 4 * line
    scale = min(1.0, ((widest() - beside) / columns - 0.1) / size[0])
    if scale <= 0:
        raise ValueError(f"{columns} columns do not fit on {widest():g} inches, the style's figure.figsize")
    wide = columns * (size[0] * scale + 0.1) + beside
    high = rows * (size[1] * scale + 0.08 + (1.1 * lines + 4 * bars_below) * line) + has_ticks * 3 * line + 2 * line
    figure = new_figure(wide, high, bars_below=bars_below)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=has_ticks, sharey=has_ticks).ravel().tolist()
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def name_panels(axes: Sequence[Axes], names: Sequence[str], ends: Sequence[float] | None = None) -> None:
    """Write a name above each panel, and where its scale ends if it has one of its own."""
    titles = []
    for number, (ax, name) in enumerate(zip(axes, names, strict=True)):
        text = name if ends is None else f"{name}\nto {ends[number]:.2g}"
        titles.append(ax.set_title(with_letters(text), fontsize="medium", parse_math=False, fontfamily=_fonts()))
    texts = [title.get_text() for title in titles]
    keep_fitting(axes[0].figure, functools.partial(_fit_names, titles, texts, font_size()))


def _fit_names(titles: Sequence[Any], texts: Sequence[str], size: float) -> bool:
    """Break the names of panels after commas where they are wider than these, and write them all smaller if need be."""
    was = [(title.get_text(), title.get_fontsize()) for title in titles]
    room = 1.06 * min(title.axes.get_window_extent().width / title.figure.dpi * 72 for title in titles)
    names = [
        _broken(text, room, size) if _plain(text) == _plain(shown) else shown
        for text, (shown, _) in zip(texts, was, strict=True)
    ]
    longest = max(width_of(line) for name in names for line in name.split("\n"))
    size = min(size, max(0.7 * size, room / max(1.0, longest)))
    for title, name in zip(titles, names, strict=True):
        title.set(text=name, fontsize=size)
    return was != [(title.get_text(), title.get_fontsize()) for title in titles]


def panel_size(size: tuple[int, ...], side: float) -> tuple[float, float]:
    """(width, height) in inches of the panel for a picture of (height, width), `side` wide.

    One that is more than twice as high as wide gets a narrower panel.
    """
    ratio = size[0] / size[1]
    return side * min(1.0, 2 / ratio), side * min(2.0, ratio)


def colour_bar(figure: Any, image: Any, where: Any, is_cut: bool, label: str = LABEL) -> None:
    """Draw a colour bar beside some axes, or below them if the figure has its bars there.

    It is pointed where weights lie past its end.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import StrMethodFormatter

    from .artists import Roots

    high = getattr(figure, "figure", figure).get_size_inches()[1]
    aspect = max(20.0, 45 * high / font_size())  # not broader on a high figure
    options: dict[str, Any] = {"shrink": 0.9, "aspect": aspect, "extend": "max" if is_cut else "neither"}
    if isinstance(where, Sequence):
        options["pad"] = 0.03  # of many panels a twentieth of the width is too far
    elif getattr(figure.get_layout_engine(), "bars_below", False):
        options["location"] = "bottom"
    bar = figure.colorbar(image, ax=where, **options)
    if isinstance(image.norm, PowerNorm):
        label += " (√ scale)"
        bar.set_ticks(Roots())
        bar.long_axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bar.minorticks_off()
    bar.set_label(label, parse_math=False)
    is_beside = bar.long_axis.axis_name == "y"
    if not is_beside and bar.long_axis.get_scale() == "linear":
        keep_fitting(figure, functools.partial(_fit_numbers, bar))
    keep_fitting(figure, functools.partial(fit_label, bar.long_axis, label, whole_figure=is_beside))


def _fit_numbers(bar: Any) -> bool:
    """Put so few numbers below a colour bar that they do not touch: where matplotlib chooses, long ones do."""
    from matplotlib.ticker import MaxNLocator

    from .artists import length_of

    bar.set_ticks(MaxNLocator(3 if length_of(bar.long_axis) > 13 * font_size() else 2))
    return False  # they take no other room


def fit_label(axis: Any, label: str, *, whole_figure: bool = False) -> bool:
    """Break the label of an axis where it is longer than the axis, or would go past an end of the figure."""
    from .artists import length_of

    figure, box = axis.axes.figure, axis.axes.get_window_extent()
    middle, high = (box.y0 + box.y1) / 2 - figure.bbox.y0, figure.bbox.height
    room = 2 * min(middle, high - middle) / figure.dpi * 72 if whole_figure else 1.2 * length_of(axis)
    return _rewrite(axis.label, label, _broken(label, room, axis.label.get_fontsize(), " "))


def _rewrite(text: Any, written: str, new: str) -> bool:
    """Write a text anew unless the user has written another; say whether it is another now."""
    shown = text.get_text()
    if _plain(shown) == _plain(written):
        text.set_text(new)
    return bool(text.get_text() != shown)


def write_title(drawn: Any, title: str | None, default: str | None = None) -> None:
    """Write a title above axes or a figure, broken where it is wider: the user's, else the default, else none."""
    text = default if title is None else title
    if text is None:
        return
    is_axes = hasattr(drawn, "set_title")
    text = with_letters(str(text))
    written = (drawn.set_title if is_axes else drawn.suptitle)(text, parse_math=False, fontfamily=_fonts())
    gap = ", " if title is None else " "
    keep_fitting(drawn.figure if is_axes else drawn, functools.partial(_fit_title, written, drawn, text, gap))


def _fit_title(written: Any, drawn: Any, text: str, gap: str) -> bool:
    """Break a title where it is wider than its axes, if others are beside them, or than the figure."""
    is_axes = hasattr(drawn, "set_title")
    figure = drawn.figure if is_axes else drawn
    whole = figure.bbox
    others = [ax for ax in figure.axes if ax is not drawn and ax.get_label() != "<colorbar>"]
    if is_axes and others:
        wide = 1.05 * drawn.get_window_extent().width
    else:
        middle = drawn.get_window_extent() if is_axes else whole
        wide = min(middle.x0 + middle.x1 - 2 * whole.x0, 2 * whole.x1 - middle.x0 - middle.x1)
    return _rewrite(written, text, _broken(text, float(wide / figure.dpi * 72), written.get_fontsize(), gap))


def _broken(text: str, room: float, size: float, gap: str = ", ") -> str:
    """The text with a line break for the space of a gap, wherever a line would be wider than the room, in points."""
    if "\n" in text:
        return "\n".join(_broken(line, room, size, gap) for line in text.split("\n"))
    lines = [""]
    for part in re.split(gap + r"(?![^(]*\))", text):  # "(2, 1)" stays whole
        longer = f"{lines[-1]}{gap}{part}" if lines[-1] else part
        if lines[-1] and width_of(longer) * size > room:
            lines[-1] += gap.rstrip()
            lines.append(part)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def width_of(line: str) -> float:
    """About how wide a line is, in units of its font's size."""
    # Letters of DejaVu Sans, which matplotlib brings, are 0.58 of its size wide in the mean.
    return sum(1.0 if ord(letter) > 0x2E80 else 0.58 for letter in line)


def _plain(text: str) -> str:
    """A text as it is without line breaks."""
    return text.replace("\n", " ")


def draw_image(
    ax: Axes, values: Array, *, aspect: float | Literal["auto", "equal"] = "equal", **options: Any
) -> AxesImage:
    """Draw weights (rows, columns) or colours (rows, columns, 3), row 0 on top; options as in `Axes.imshow`.

    A style sheet of the user's neither blurs it nor draws a grid across.
    """
    from .artists import Picture

    # Means are those of weights, as a mean of colours leaves a sink dark.
    drawn: dict[str, Any] = {"interpolation": "antialiased", "interpolation_stage": "data"} | options
    image = Picture(ax, origin="upper", **drawn)
    image.set_data(values)
    image.set_clip_path(ax.patch)
    image.set_extent(image.get_extent())  # the axes now end where the image does
    ax.set_aspect(aspect)
    ax.add_image(image)
    ax.grid(False)
    for axis in (ax.xaxis, ax.yaxis):
        at_whole_numbers(axis)
    return image


def at_whole_numbers(axis: Any) -> None:
    """Put ticks at whole numbers alone: tokens, heads and layers are counted."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=(1, 2, 5, 10)))


def shrunk(cell: Array, most: int = _CELL, *, keep_ratio: bool = False) -> Array:
    """Shrink (height, width, ...) to at most so many pixels a side, each the mean of the area that it covers."""
    longest = max(cell.shape[:2])
    for axis in (0, 1):
        count = cell.shape[axis]
        size = max(1, round(most * count / longest)) if keep_ratio and longest > most else most
        if count > size:
            edges = np.linspace(0, count, size + 1)
            places = np.arange(count)
            shares = np.clip(np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places), 0, None)
            shares = (shares * size / count).astype(cell.dtype)  # (size, count), rows sum to one
            cell = np.moveaxis(np.tensordot(shares, cell, (1, axis)), 0, axis)
    return cell


def mosaic(
    ax: Axes, cells: Array, ticks: tuple[Sequence[Any] | None, Sequence[Any] | None] = (None, None), **options: Any
) -> Any:
    """One image of cells (rows, columns, height, width) or, in colours, (rows, columns, height, width, 3).

    The middle of cell (row, column) is at x = column, y = row. `ticks` are the names of the rows and of the columns,
    None for their numbers. Small cells are magnified, so that the gaps stay thin.
    """
    rows, columns, high, wide = cells.shape[:4]
    zoom = math.ceil(32 / max(high, wide))
    cells = cells.repeat(zoom, 2).repeat(zoom, 3)
    high, wide = high * zoom, wide * zoom
    margin = max(1, round(0.03 * max(high, wide)))
    # Cells continue under the gaps. Otherwise, where a screen has fewer pixels than the image, the edge of a cell,
    # perhaps an attention sink, would be averaged with the gap.
    wider = np.pad(cells, [(0, 0), (0, 0), (margin, margin), (margin, margin), *[(0, 0)] * (cells.ndim - 4)], "edge")
    whole = wider.swapaxes(1, 2).reshape(rows * wider.shape[2], columns * wider.shape[3], *cells.shape[4:])
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    image = draw_image(ax, whole, extent=extent, aspect=wider.shape[2] / wider.shape[3], **options)
    _gaps(ax, rows, columns, 0.4 * margin / wider.shape[2], 0.4 * margin / wider.shape[3])
    ax.tick_params(length=0)
    names = [range(count) if side is None else side for count, side in zip((rows, columns), ticks, strict=True)]
    label_ticks(ax, *([str(name) for name in side] for side in names), turned=False)
    ax.spines[:].set_visible(False)
    return image


def _gaps(ax: Axes, rows: int, columns: int, high: float, wide: float) -> None:
    """Draw white bars between the cells and round them, twice as high and as wide as the numbers say."""
    from matplotlib.collections import PolyCollection

    left, right, top, bottom = -0.5, columns - 0.5, -0.5, rows - 0.5
    bars = [(x - wide, x + wide, top, bottom) for x in np.arange(columns + 1) - 0.5]
    bars += [(left, right, y - high, y + high) for y in np.arange(rows + 1) - 0.5]
    corners = [[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, x1, y0, y1 in bars]
    ax.add_collection(PolyCollection(corners, facecolor="white", edgecolor="none", snap=False), autolim=False)


def label_ticks(ax: Axes, down: Sequence[str] | None, across: Sequence[str] | None, *, turned: bool = True) -> None:
    """Write words along the y axis and along the x axis, as many as fit whenever the figure is drawn.

    None leaves an axis as it is; an empty list removes its ticks. The words of the x axis are `turned` to run upwards.
    """
    ax.apply_aspect()
    for axis, words, is_turned in ((ax.yaxis, down, False), (ax.xaxis, across, turned)):
        if words:
            write_ticks(axis, words, range(len(words)), is_turned=is_turned)
        elif words is not None:
            axis.set_ticks([])


def write_ticks(axis: Any, words: Sequence[str], places: Sequence[float], *, is_turned: bool = False) -> None:
    """Write a word at each place of an axis; where not all fit, every second or third and so on."""
    from matplotlib.ticker import FuncFormatter

    from .artists import Words, length_of

    texts = [with_letters("\n".join(_short(line) for line in word.split("\n"))) for word in words]
    columns = [_as_column(text) if is_turned else None for text in texts]
    by_place = {float(place): column or text for place, text, column in zip(places, texts, columns, strict=True)}
    angles = [90 if is_turned and column is None else 0 for column in columns]
    longest = max(len(line) for text in texts for line in text.split("\n"))
    # How much of the axis a word takes, in units of its font's size.
    room = 1.2 if is_turned or axis.axis_name == "y" else 0.62 * longest + 0.6
    room = max([room, *(0.2 + width_of(line) for column in columns if column for line in column.split("\n"))])
    medium = font_size()
    size = min(0.9 * medium, max(0.6 * medium, length_of(axis) / (room * len(words))))
    axis.set_tick_params(labelsize=size)
    axis.set_major_locator(Words(list(by_place), angles, room, _fonts()))
    axis.set_major_formatter(FuncFormatter(lambda place, _: by_place.get(place, "")))


def font_size() -> float:
    """The size of ordinary text in points, as the user's style has it."""
    import matplotlib as mpl

    return float(mpl.rcParams["font.size"])


def _short(word: str) -> str:
    """The word as visible text, cut where it would take half of the picture."""
    word = printable(word)
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def _as_column(word: str) -> str | None:
    """A word of Chinese, Japanese or Korean with its letters one below another, as these are set; None for others."""
    letters = re.findall(r"(.)([₁-₉]?)", word)  # a number says which piece of a letter a token is
    is_upright = all(one == "□" or any(low <= ord(one) <= high for low, high in _UPRIGHT) for one, _ in letters)
    return "\n".join(one.translate(_SET_UPRIGHT) + number for one, number in letters) if is_upright else None


def lay_out(figure: Any) -> None:
    """Give axes their final places: drawing alone does one pass too few where an aspect ratio is fixed."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters that no font has: drawing warns of them again
            engine.execute(getattr(figure, "figure", figure))


def _fonts() -> list[str]:
    """The font families in which texts are written, matplotlib's own first."""
    return [*_usual_fonts(), *_more_fonts] or ["sans-serif"]


_more_fonts: list[str] = []  # that were found to have letters which the usual ones have not
_warned_of: set[str] = set()  # fonts that a warning has named


@functools.cache
def _usual_fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


@functools.cache
def _letters() -> frozenset[int]:
    """The characters that the usual fonts have."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset[int]().union(*(get_font(findfont(name)).get_charmap() for name in _usual_fonts()))


@functools.cache
def _fonts_by_letter() -> dict[int, str]:
    """For each character that any installed font has, a family that has it; read once, as that takes a while."""
    from matplotlib.font_manager import fontManager, get_font

    found: dict[int, str] = {}
    for name, path in {font.name: font.fname for font in fontManager.ttflist if font.style == "normal"}.items():
        with contextlib.suppress(OSError, RuntimeError):  # a font that has gone or cannot be read
            glyphs = get_font(path).get_charmap()
            # Matplotlib's own Last Resort has a box in place of each letter of a script.
            if len(glyphs) < 10 * len(set(glyphs.values())):
                found = dict.fromkeys(glyphs, name) | found
    return found


def with_letters(text: str) -> str:
    """The text with a box for each character that no installed font has; a warning names a font that has them.

    Without it matplotlib would warn of each character at each drawing, and name no font.
    """
    missing = []
    for letter in dict.fromkeys(text.replace("\n", "")):
        if ord(letter) not in _letters():
            font = _fonts_by_letter().get(ord(letter))
            if font is None:
                missing.append(letter)
            elif font not in _more_fonts:
                _more_fonts.append(font)
    if not missing:
        return text
    scripts = [font for low, high, font in _SCRIPTS if any(low <= ord(letter) <= high for letter in missing)]
    fonts = " and ".join(dict.fromkeys(scripts or ["Noto Sans"]))
    if fonts not in _warned_of:
        _warned_of.add(fonts)
        what = f"no installed font has {''.join(missing)}, and others like it: they are drawn as boxes. Install {fonts}"
        warn(what, "missing-font")
    return "".join("□" if letter in missing else letter for letter in text)

"""How weights become colours: `Look`, and the keywords that many plots share.

A plot names a group of keywords once in its header and reads them in one line:

    _OPTIONS = Keywords(OverPicture, cmap="inferno")

    @_OPTIONS.show
    def class_token(maps: Any, image: Any = None, *, token: int = 0, **options: Unpack[OverPicture]) -> Axes:
        look = _OPTIONS.look(options)

Type checkers and editors read the names and types from the group. `show` writes them with their defaults into the
signature that `help` and `inspect.signature` give, and `look` refuses any other name. A plot of maps is handed them as
`read_maps` reads them, so that it knows nothing of `sinks`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast, get_args

import numpy as np

from ..errors import did_you_mean
from ..layout import Patches
from ..reading import Array
from .selection import read_maps

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap

    from ..analysis.sinks import Sinks

_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue
Style = Literal["overlay", "mask"]

_Plot = TypeVar("_Plot", bound=Callable[..., Any])


class Colours(TypedDict, total=False):
    """The keywords of any plot in colours."""

    cmap: str | Colormap | None
    cbar: bool
    title: str | None


class Scale(Colours, total=False):
    """And the ends of the colour scale."""

    vmin: float | None
    vmax: float | None


class Blend(TypedDict, total=False):
    """How weights lie over a picture."""

    style: Style
    smooth: bool


class OfMaps(TypedDict, total=False):
    """The keyword of any plot of maps: whether sinks stay in them."""

    sinks: Sinks


class Matrix(Scale, OfMaps, total=False):
    """All keywords of a plot of maps as matrices."""


class OverPicture(Patches, Blend, Scale, OfMaps, total=False):
    """All keywords of a plot of weights over the picture that their patches cover."""


@dataclass(frozen=True)
class Look:
    """How a plot shows weights, whatever they are."""

    cmap: str | Colormap | None = "viridis"
    vmin: float | None = 0
    vmax: float | None = None
    cbar: bool = True
    title: str | None = None
    style: Style = "overlay"
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise ValueError(f"style={self.style!r}: pass one of {', '.join(map(repr, get_args(Style)))}")
        for name, end in (("vmin", self.vmin), ("vmax", self.vmax)):
            if end is not None and not hasattr(end, "__float__"):
                raise TypeError(f"{name}={end!r}: pass a number")
        if self.vmin is not None and self.vmax is not None and not self.vmin <= self.vmax:
            raise ValueError(
                f"vmax={self.vmax} is where the colours end, and must not be smaller than vmin={self.vmin}"
            )

    def scale(self, top: float, *, over_picture: bool = False) -> ScalarMappable:
        """The colours of weights from `vmin` to `top`; over a picture, those that they have on an empty one."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        colours = self._colours
        if over_picture or self.style == "mask":
            empty = 0.0 if self.style == "mask" or self._ends_light else 1.0
            ramp = self.blend(np.linspace(0, 1, 256), np.full((256, 3), empty))
            colours = ListedColormap(ramp, f"{colours.name} {self.style}")
        return ScalarMappable(Normalize(0 if self.vmin is None else self.vmin, top), colours)

    def matrix_scale(self, top: float) -> ScalarMappable:
        """The colours of the weights of a matrix, up to the user's `vmax`, or else, by their square roots, to `top`.

        A few keys, such as the first of a text, often get nearly all attention: on an even scale the rest is dark.
        """
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize, PowerNorm

        colours = self._colours.with_extremes(bad="white")
        if self.has_roots:
            return ScalarMappable(PowerNorm(0.5, 0, top), colours)
        top = self.vmax if self.vmax is not None else top if self.vmin is None else max(top, self.vmin)
        return ScalarMappable(Normalize(self.vmin, top), colours)

    @property
    def has_roots(self) -> bool:
        """Whether a matrix' colours are even in the weights' square roots: unless the user says where they end."""
        return self.vmax is None and self.vmin == 0

    def blend(self, strength: Array, picture: Array) -> Array:
        """The colours (..., 3) of a picture with weights on it, these (...) from 0 to 1.

        The picture is seen everywhere. As an overlay it becomes grey, and lighter where the colours end in dark ones,
        darker where they end in light ones; colours cover it the more, the larger the weight. As a mask it keeps its
        own colours, and fades to white where the weight is low.
        """
        # Most weights are far below the largest: an even opacity would show that alone.
        opacity = strength[..., None] ** 0.7
        if self.style == "mask":
            return np.asarray(1 - (1 - picture) * (0.15 + 0.85 * opacity))
        grey = (picture @ np.array(_LUMINANCE, picture.dtype))[..., None]
        ground = 0.1 + 0.6 * grey if self._ends_light else 0.35 + 0.65 * grey
        over = np.asarray(self._colours(strength))[..., :3]
        return np.asarray((1 - 0.9 * opacity) * ground + 0.9 * opacity * over)

    @property
    def _colours(self) -> Colormap:
        from matplotlib.pyplot import get_cmap

        return get_cmap(self.cmap)

    @property
    def _ends_light(self) -> bool:
        """Whether the colour of the largest weight is lighter than middle grey."""
        return float(np.dot(self._colours(1.0)[:3], _LUMINANCE)) > 0.5


class Keywords:
    """The shared keywords of a plot: a group such as `OverPicture`, and defaults where they differ from `Look`'s.

    >>> keywords = Keywords(Scale, cmap="inferno")
    >>> keywords.look({"vmax": 1})
    Look(cmap='inferno', vmin=0, vmax=1, cbar=True, title=None, style='overlay', smooth=False)
    """

    def __init__(self, group: type, **defaults: Any) -> None:
        defaults = {"sinks": "keep"} | {field.name: field.default for field in fields(Look)} | defaults
        self._annotations = {
            name: getattr(annotation, "__forward_arg__", annotation)
            for name, annotation in group.__annotations__.items()
        }
        self._defaults = {name: defaults.get(name) for name in self._annotations}
        self._names = list(self._defaults)

    def show(self, plot: _Plot) -> _Plot:
        """Decorate a plot: its signature shows these keywords in place of `**options`, and its maps are read."""
        signature = inspect.signature(plot)
        drawn: Any = _of_maps(plot) if "sinks" in self._annotations else plot
        named = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=self._annotations[name])
            for name, default in self._defaults.items()
        ]
        self._names += [one.name for one in named]
        drawn.__signature__ = signature.replace(parameters=named + shared)
        return cast(_Plot, drawn)

    def look(self, options: Mapping[str, Any]) -> Look:
        """The look that a call asks for. Raises TypeError for a keyword that the plot does not have."""
        for name in options:
            if name not in self._defaults:
                raise TypeError(f"unexpected keyword argument {name!r}{did_you_mean(self._names, name)}")
        chosen = {**self._defaults, **options}
        return Look(**{field.name: chosen[field.name] for field in fields(Look) if field.name in chosen})


def _of_maps(plot: Callable[..., Any]) -> Callable[..., Any]:
    """The plot, which draws its maps with or without their sinks."""

    @functools.wraps(plot)
    def draw(maps: Any, *args: Any, sinks: Sinks = "keep", **options: Any) -> Any:
        return plot(read_maps(maps, sinks, options), *args, **options)

    return draw


def matrix_top(weights: Array) -> float:
    """The end of a matrix's colour scale: nearly its largest weight, but no less than four times an even share."""
    top, largest = (float(np.nanpercentile(weights, percent)) for percent in (99.5, 100))
    return min(max(top, 4 / weights.shape[-1]), largest) if largest > 0 else 1.0


def without_future(weights: Array) -> Array:
    """Weights (..., queries, keys) with NaN for the keys after their query, where no query sees these."""
    queries, keys = weights.shape[-2:]
    behind = np.arange(queries)[:, None] + keys - queries - np.arange(keys)  # how many tokens a key is before its query
    numbers = np.nan_to_num(weights)
    if queries < 2 or keys < queries or numbers[..., behind < 0].any() or not numbers[..., behind > 0].any():
        return weights
    return np.where(behind < 0, np.array(np.nan, weights.dtype), weights)


def row_top(weights: Array, keys: int, vmin: float | None, percent: float = 100) -> float:
    """The end of a row's colour scale: its largest weight, or another percentile of its weights.

    It is no less than four times an even share; else a row that attends to everything alike would be painted solid.
    """
    return max(float(np.percentile(np.nan_to_num(weights), percent)), 4 / keys, 0 if vmin is None else vmin)


def exceeds(weights: Array, top: float) -> bool:
    """Whether a weight lies past the end of the colour scale."""
    return bool(np.max(np.nan_to_num(weights)) > top)

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

    from ..analysis.shares import Sinks

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

    def scale(self, top: float) -> ScalarMappable:
        """The colours of weights from `vmin` to `top`, for the picture and for its colour bar."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        colours = "gray" if self.style == "mask" else self.cmap
        return ScalarMappable(Normalize(0 if self.vmin is None else self.vmin, top), colours)


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

    def show(self, plot: _Plot) -> _Plot:
        """Decorate a plot: its signature shows these keywords in place of `**options`, and its maps are read."""
        signature = inspect.signature(plot)
        drawn: Any = _of_maps(plot) if "sinks" in self._annotations else plot
        named = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=self._annotations[name])
            for name, default in self._defaults.items()
        ]
        drawn.__signature__ = signature.replace(parameters=named + shared)
        return cast(_Plot, drawn)

    def look(self, options: Mapping[str, Any]) -> Look:
        """The look that a call asks for. Raises TypeError for a keyword that the plot does not have."""
        for name in options:
            if name not in self._defaults:
                raise TypeError(f"unexpected keyword argument {name!r}{did_you_mean(self._defaults, name)}")
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
    top, share = float(np.percentile(np.nan_to_num(weights), 99.5)), 4 / weights.shape[-1]
    largest = float(np.max(np.nan_to_num(weights)))
    return min(max(top, share), largest) if largest > 0 else 1.0


def row_top(weights: Array, keys: int, vmin: float | None, percent: float = 100) -> float:
    """The end of a row's colour scale: its largest weight, or another percentile of its weights.

    It is no less than four times an even share; else a row that attends to everything alike would be painted solid.
    """
    return max(float(np.percentile(np.nan_to_num(weights), percent)), 4 / keys, 0 if vmin is None else vmin)


def exceeds(weights: Array, top: float) -> bool:
    """Whether a weight lies past the end of the colour scale."""
    return bool(np.max(np.nan_to_num(weights)) > top)

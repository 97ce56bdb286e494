"""See inside models while they run: any local variable of a function, by its name.

from visualizer import get_local

class Attention(nn.Module):
    @get_local("attn")                       # stays in the code for ever; does nothing until activated
    def forward(self, x): ...

get_local.activate()
model(images)
get_local.cache["Attention.forward"]         # one array per call

from visualizer import capture               # code that is not yours, by module path

with capture(model, "attn") as found:
    model(images)
found["blocks.3.attn"]                       # [array]

from visualizer import attention             # the weights of fused kernels too

with attention(model) as maps:
    model(images)
maps["blocks.3.attn"].dense()                # (batch, heads, queries, keys)

from visualizer import plot, word_maps       # where a word looks on a picture, or goes in one that is made

with word_maps(pipeline) as maps:
    picture = pipeline("a cat on a mat").images[0]
plot.words(maps, "cat", picture)
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import display
from .errors import (
    FileFormatError,
    RewriteError,
    UnknownKeyError,
    UnknownLocalError,
    UnsupportedPythonError,
    VisualizerError,
    VisualizerWarning,
)
from .instrument import capture, get_local

if TYPE_CHECKING:
    from . import analysis, models, plot
    from . import statistics as statistics
    from .explorer import explore
    from .grounding import word_maps
    from .intercept.attention import attention
    from .layout import Layout
    from .loading import load
    from .maps import AttentionMap

__version__ = "0.1.0"

__all__ = [
    "AttentionMap",
    "FileFormatError",
    "Layout",
    "RewriteError",
    "UnknownKeyError",
    "UnknownLocalError",
    "UnsupportedPythonError",
    "VisualizerError",
    "VisualizerWarning",
    "analysis",
    "attention",
    "capture",
    "explore",
    "get_local",
    "load",
    "models",
    "plot",
    "word_maps",
]  # without statistics, whose extra may be missing: `from visualizer import *` would fail

_LAZY = {
    "AttentionMap": ".maps",
    "Layout": ".layout",
    "attention": ".intercept",
    "explore": ".explorer",
    "load": ".loading",
    "word_maps": ".grounding",
}
_ROOMS = ("analysis", "models", "plot", "statistics")

# The original Visualizer was imported as `from visualizer.visualizer import get_local`.
sys.modules[f"{__name__}.visualizer"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    # These load on first use: they import torch and matplotlib, which capture does not need.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name == "visualizer":
        return sys.modules[__name__]
    if name in display.__all__:  # as forks of it had
        return getattr(display, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_ROOMS})

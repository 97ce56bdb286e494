"""What forks of the original Visualizer had here: functions whose place `visualizer.plot` has taken.

To import or use one is an ImportError that says what to write instead.
"""

from __future__ import annotations

from typing import Any

_REPLACEMENTS = {
    "visualize_head": "plot.head(map)",
    "visualize_heads": "plot.heads(map, columns=4)",
    "visualize_grid_to_grid": "plot.query(map, image, query=index, prefix_tokens=0)",
    "visualize_grid_to_grid_with_cls": "plot.query(map, image, query=index)",
    "highlight_grid": "plot.query(map, image, query=index)",
    "cls_padding": "plot.query(map, image, query=index)",
    "grid_show": "plot.layers(maps) or plot.heads(map)",
    "gray2rgb": "plot.overlay(weights, image)",
}

__all__ = list(_REPLACEMENTS)  # so that `from visualizer.display import *` says it too


def __getattr__(name: str) -> Any:
    if name in _REPLACEMENTS:
        raise ImportError(
            f"visualizer has no {name}: `from visualizer import plot` and write {_REPLACEMENTS[name]}. "
            "A map is what get_local.cache has for a call, such as get_local.cache['Attention.forward'][-1]."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

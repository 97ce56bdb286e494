"""Attention maps as pictures: arrays in, matplotlib's Axes or Figure out.

    from visualizer import get_local, plot

    plot.heads(get_local.cache["Attention.forward"], layer=11)

One-panel functions draw on `ax=` and return it; they make a figure only where none is given. The others return a
Figure. Nothing here shows a window or touches a global style. They take tensors, arrays, lists with one of these per
layer, what `get_local.cache` and `capture` hold, what `attention(model)` found, and transformers' tuple of attentions;
`statistic` takes what `statistics.collect` gives. Queries run down, keys across; layers, heads and patches are counted
from 0.
"""

from .all_layers import layers
from .matrices import head, heads, tokens
from .pictures import class_token, highlight, overlay, query, rollout
from .statistics import statistic
from .summaries import distance, filters, patterns, positions, spikes

__all__ = [
    "class_token",
    "distance",
    "filters",
    "head",
    "heads",
    "highlight",
    "layers",
    "overlay",
    "patterns",
    "positions",
    "query",
    "rollout",
    "spikes",
    "statistic",
    "tokens",
]

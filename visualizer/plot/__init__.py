"""Attention maps as pictures: arrays in, matplotlib's Axes or Figure out.

    from visualizer import get_local, plot

    plot.heads(get_local.cache["Attention.forward"], layer=11)

One-panel functions draw on `ax=` and return it; without it, on a new figure. The others return a Figure. Nothing here
shows a window or changes a global style. All take tensors, arrays, lists with one of these per layer, what
`get_local.cache`, `capture` and `attention(model)` hold, and transformers' tuple of attentions; `statistic` takes what
`statistics.collect` gives. Queries run down, keys across; layers, heads and patches are counted from 0.

A plot is public as soon as a file below names it in its `__all__`.
"""

from . import all_layers, matrices, pictures, summaries, word_panels
from .all_layers import *  # noqa: F403
from .matrices import *  # noqa: F403
from .pictures import *  # noqa: F403
from .summaries import *  # noqa: F403
from .word_panels import *  # noqa: F403

__all__ = sorted(all_layers.__all__ + matrices.__all__ + pictures.__all__ + summaries.__all__ + word_panels.__all__)

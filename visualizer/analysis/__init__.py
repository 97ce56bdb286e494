"""What attention maps say: where all layers together look, how far, how broadly, and at what.

All functions about maps take whatever holds them: an `AttentionMap`, a tensor or an array with the axes (batch, heads,
queries, keys), or several of these as layers: a list, one tensor or array with the layers before these four axes, or
the result of `attention` or `capture`. Three axes are the (heads, queries, keys) of one layer, two those of one head.
Rows sum to one. Results are detached, on the device of the maps, float64 for float64, else float32; arrays alone give
arrays. Maps are read some rows at a time, so that the attention of a fused kernel is analysed in the memory of some
rows: no function makes the N x N map of a head, but for `align`, `monotony` and `contacts`, which make those of a layer
at a time (a `rollout` with `discard` makes that of all heads together).

- `flow`: what all layers do together, by rollout, by maximum flow, and by the gradients of one output of the model.
- `rows`: what each row says: how broadly a query looks, how far, how surely, and at what.
- `patterns`: what each head does; `copying`: how much of an answer a head finds in the text.
- `alignment`: which sound belongs to which word; `proteins`: which residues touch.
- `sinks`: what draws far more than its share, and maps without it.
- `weights`, of a vision transformer, and `spikes`, of spiking neurons, are not about maps.

Each file names its public functions in `__all__`, and these are the functions of `visualizer.analysis`: `help()` and
the reference list them.
"""

# ruff: noqa: F403

from .alignment import *
from .copying import *
from .flow import *
from .patterns import *
from .proteins import *
from .rows import *
from .sinks import *
from .spikes import *
from .weights import *

# What the files above name in their `__all__`. The file sinks.py has the name of its function, which stays.
__all__ = [name for name, value in [*globals().items()] if getattr(value, "__module__", "").startswith(__name__)]

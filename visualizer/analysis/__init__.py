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
- `shares`: what draws far more than its share, and maps without it.
- `weights`, of a vision transformer, and `spikes`, of spiking neurons, are not about maps.

Each file names its public functions in `__all__`, and these are the functions of `visualizer.analysis`: `help()` and
the reference list them.
"""

from . import alignment, copying, flow, patterns, proteins, rows, shares, spikes, weights
from .alignment import *  # noqa: F403
from .copying import *  # noqa: F403
from .flow import *  # noqa: F403
from .patterns import *  # noqa: F403
from .proteins import *  # noqa: F403
from .rows import *  # noqa: F403
from .shares import *  # noqa: F403
from .spikes import *  # noqa: F403
from .weights import *  # noqa: F403

__all__ = (
    alignment.__all__
    + copying.__all__
    + flow.__all__
    + patterns.__all__
    + proteins.__all__
    + rows.__all__
    + shares.__all__
    + spikes.__all__
    + weights.__all__
)

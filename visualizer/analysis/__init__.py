"""What attention maps say: where all layers together look, how far, how broadly, and at what.

All functions about maps take whatever holds them: an `AttentionMap`, a tensor or an array with the axes (batch, heads,
queries, keys), or several of these as layers: a list, one tensor or array with the layers before these four axes, or
the result of `attention` or `capture`. Three axes are the (heads, queries, keys) of one layer, two those of one head.
Rows sum to one. Results are detached, on the device of the maps, float64 for float64, else float32; arrays alone give
arrays. Maps are read some rows at a time, so that the attention of a fused kernel is analysed in the memory of some
rows: no function makes the N x N map of a head, but for `align`, `monotony` and `contacts`, which make those of a layer
at a time (a `rollout` with `discard` makes that of all heads together).

- `flow`, all layers together: `rollout`, `attention_flow`; for one output of the model, by its gradients,
  `gradient_rollout`, `relevance`, and `cross_relevance` for two streams.
- `rows`, row by row: `entropy`, `received`, `sink`, `confidence`, `cls_attention`, `attention_distance`, `top_keys`;
  `mass_mask` of a row.
- `patterns`, what each head does: `head_patterns`; `copying`, how much of an answer it finds in the text: `retrieval`.
- `alignment`, which sound belongs to which word: `align`, and `monotony`, which heads show it; `proteins`, which
  residues touch: `contacts`.
- `shares`, what draws far more than its share: `sinks`, and maps `without_sinks`.
- Not about maps: `position_similarity` and `filter_components` of a vision transformer's weights (`weights`);
  `spike_rate` and `spike_scores` of spiking neurons (`spikes`).

Each file names its public functions in `__all__`, and these are the functions of `visualizer.analysis`.
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

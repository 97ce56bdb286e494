"""What attention maps say: where the layers together look, how far, how broadly, and at what.

Everything reads the maps some rows at a time, so that what a fused kernel attends to is analysed in the memory of some
rows; no function makes an N x N map of a head. The axes of a map are (batch, heads, queries, keys), and its rows sum to
one. All functions take an `AttentionMap`, a tensor or an array with these axes, or several of them as layers: a list,
one tensor or array with the layers before the other axes, or what `attention` and `capture` found. What they give is
detached, on the device of the maps, float64 for float64 and else float32; arrays alone give arrays.

- Through all layers: `rollout`, `attention_flow`; for one output of the model, by its gradients, `gradient_rollout`,
  `relevance`, and `cross_relevance` where there are two streams.
- Row by row: `entropy`, `received`, `sink`, `confidence`, `cls_attention`, `attention_distance`, `top_keys`;
  `mass_mask` of a row.
- What a head does: `head_patterns`.
- Not of maps: `position_similarity` and `filter_components` of a vision transformer's weights; `spike_rate` and
  `spike_scores` of spiking neurons.
"""

from .flow import attention_flow, cross_relevance, gradient_rollout, relevance, rollout
from .patterns import HeadPatterns, head_patterns
from .rows import (
    TopKey,
    attention_distance,
    cls_attention,
    confidence,
    entropy,
    mass_mask,
    received,
    sink,
    top_keys,
)
from .spikes import spike_rate, spike_scores
from .weights import filter_components, position_similarity

__all__ = [
    "HeadPatterns",
    "TopKey",
    "attention_distance",
    "attention_flow",
    "cls_attention",
    "confidence",
    "cross_relevance",
    "entropy",
    "filter_components",
    "gradient_rollout",
    "head_patterns",
    "mass_mask",
    "position_similarity",
    "received",
    "relevance",
    "rollout",
    "sink",
    "spike_rate",
    "spike_scores",
    "top_keys",
]

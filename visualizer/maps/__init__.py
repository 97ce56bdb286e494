"""`AttentionMap`: the weights of one attention call, or the query and key that they are computed from, part by part.

A fused kernel never makes its N x N weights, and a reader need not either: each row is
softmax(scale * q_i . K^T + bias), so what reads a map row by row (a rollout, an entropy, the best keys of each query)
runs in the memory of a few rows. `Maps`, what `attention(model)` returns, is in intercept/attention.py.
"""

from .attention_map import AttentionMap, joined_map
from .generated import generated_maps, is_generation
from .gradients import Gradient
from .joined import Block, Joined, JoinedGradient, Source, stitched_rows
from .samples import Samples
from .sources import Factors, HeadRows, Keys, Modifiers, Weights, may_be_autocast, tokens_of, without_autograd

__all__ = [
    "AttentionMap",
    "Block",
    "Factors",
    "Gradient",
    "HeadRows",
    "Joined",
    "JoinedGradient",
    "Keys",
    "Modifiers",
    "Samples",
    "Source",
    "Weights",
    "generated_maps",
    "is_generation",
    "joined_map",
    "may_be_autocast",
    "stitched_rows",
    "tokens_of",
    "without_autograd",
]

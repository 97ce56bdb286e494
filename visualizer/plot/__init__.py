"""Attention maps as pictures: `head`, `heads`, `query`, `class_token`, `tokens`.

    from visualizer import get_local, plot

    plot.heads(get_local.cache["Attention.forward"], layer=11)

They take tensors, arrays, lists with one of these per layer, what `get_local.cache` holds, and transformers' tuple of
attentions. `reading` makes one array of it, `drawing` draws.
"""

from .drawing import class_token, head, heads, query, tokens

__all__ = ["class_token", "head", "heads", "query", "tokens"]

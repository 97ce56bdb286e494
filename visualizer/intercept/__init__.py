"""`attention(model)`: finds the attention weights as a model runs, and makes maps of them.

While it records, hooks on the modules say which one is running, and a mode of torch sees the calls of torch's functions
that modules make. A fused call is kept as its query and key. Compiled modules run uncompiled meanwhile.
"""

from .recorded import Maps, attention, given

__all__ = ["Maps", "attention", "given"]

"""`attention(model)`: finds the attention weights as a model runs, and makes maps of them.

Hooks on the modules say which one is running, and a mode of torch sees the functions of torch that they call. A fused
call is kept as its query and key. Compiled modules run uncompiled meanwhile.
"""

from .attention import Maps, attention
from .recorder import Recorder
from .snapshots import AttentionCall

__all__ = ["AttentionCall", "Maps", "Recorder", "attention"]

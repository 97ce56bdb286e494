"""Where captured values are kept, and how they are read: records, the cache, limits and the byte budget.

`files`, which writes and reads them, is loaded by whoever saves or loads: most programs do neither.
"""

from .channel import Channel, listener, receive
from .records import Cache, Record, as_html, as_text, human
from .store import Store

__all__ = [
    "Cache",
    "Channel",
    "Record",
    "Store",
    "as_html",
    "as_text",
    "human",
    "listener",
    "receive",
]

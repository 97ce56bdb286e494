"""Where captured values are kept, and how they are read: records, the cache, limits, the byte budget, and files."""

from .channel import Channel, listener, receive
from .files import load, restored_cache, write
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
    "load",
    "receive",
    "restored_cache",
    "write",
]

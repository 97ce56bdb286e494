"""Where captured values are kept, and how they are read: records, the cache, limits, the byte budget, and files."""

from .channel import Channel, listener, receive
from .records import Cache, Record
from .store import Store

__all__ = ["Cache", "Channel", "Record", "Store", "listener", "receive"]

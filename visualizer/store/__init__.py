"""Keeps captured values, and how they are read: records, the cache, limits and the byte budget.

`files`, which writes and reads them, is loaded on the first save or load: most programs do neither.
"""

from .budget import NO_LIMIT, Budget, bytes_by_device, memory_of
from .cache import Cache, Stack
from .channel import Channel, is_recorded, listener, receive, unrecorded
from .destination import check_destination
from .locks import ForkSafeLock
from .printing import Printed, human
from .records import Record, Saved
from .results import Recorded, RecordedMaps
from .stacking import stacked
from .store import Store

__all__ = [
    "NO_LIMIT",
    "Budget",
    "Cache",
    "Channel",
    "ForkSafeLock",
    "Printed",
    "Record",
    "Recorded",
    "RecordedMaps",
    "Saved",
    "Stack",
    "Store",
    "bytes_by_device",
    "check_destination",
    "human",
    "is_recorded",
    "listener",
    "memory_of",
    "receive",
    "stacked",
    "unrecorded",
]

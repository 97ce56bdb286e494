"""Where captured values are kept, and how they are read: records, the cache, limits and the byte budget.

`files`, which writes and reads them, is loaded by whoever saves or loads: most programs do neither.
"""

from .cache import Cache
from .channel import Channel, listener, receive
from .records import Record, Saved
from .results import Recorded
from .stacking import stacked
from .store import Store
from .tables import as_html, as_text, human

__all__ = [
    "Cache",
    "Channel",
    "Record",
    "Recorded",
    "Saved",
    "Store",
    "as_html",
    "as_text",
    "human",
    "listener",
    "receive",
    "stacked",
]

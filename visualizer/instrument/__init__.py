"""What is instrumented now, for whom, and the way back: `get_local` and `capture`."""

from .capturing import Captured, capture
from .decorator import Activation, GetLocal, get_local

__all__ = ["Activation", "Captured", "GetLocal", "capture", "get_local"]

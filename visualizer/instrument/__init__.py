"""What is instrumented now, for whom, and the way back: `get_local` and `capture`."""

from .arguments import check_max_bytes
from .capturing import Captured, capture
from .compiled import Uncompiled
from .decorator import Activation, GetLocal, get_local
from .targets import named_modules

__all__ = [
    "Activation",
    "Captured",
    "GetLocal",
    "Uncompiled",
    "capture",
    "check_max_bytes",
    "get_local",
    "named_modules",
]

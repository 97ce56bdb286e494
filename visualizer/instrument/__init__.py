"""`get_local` and `capture`: which functions are captured, for which objects, and how they get their own code back."""

from .arguments import check_max_bytes
from .capturing import Captured, capture
from .compiler import Uncompiled, compiler_trouble
from .decorator import Activation, GetLocal, get_local
from .module_paths import named_modules
from .reruns import mark_reruns

__all__ = [
    "Activation",
    "Captured",
    "GetLocal",
    "Uncompiled",
    "capture",
    "check_max_bytes",
    "compiler_trouble",
    "get_local",
    "mark_reruns",
    "named_modules",
]

"""`never_compiled` marks our own functions, which torch's compiler must neither trace nor compile.

When a graph has ended, the compiler takes each call that follows for the beginning of another graph. It would trace
into the hook and into what switches capture.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

from ..store import receive

T = TypeVar("T")

DISABLED = "disabled"
"""With an older release of torch `receive` has, under this name, a copy of itself that the compiler does not trace."""

_skipped: list[Any] = []


def never_compiled(function: T) -> T:
    """The same function, marked so that torch's compiler neither traces it nor compiles what it runs."""
    vars(function)["_torchdynamo_disable"] = True
    _skipped.append(function)
    return function


never_compiled(receive)  # the last resort, where the compiler cannot be made to know the hook


def skip_own_code() -> None:
    """Make torch's compiler, which is loaded, skip the marked functions."""
    try:
        types = import_module("torch._dynamo.types")
        skip = types.FrameExecStrategy(types.FrameAction.SKIP, types.FrameAction.SKIP)
        for function in _skipped:
            import_module("torch._dynamo.eval_frame").set_code_exec_strategy(function.__code__, skip)
    except (ImportError, AttributeError):  # an older release
        vars(receive)[DISABLED] = sys.modules["torch._dynamo"].disable(receive)
        for rules in ("trace_rules", "skipfiles"):
            with suppress(ImportError, AttributeError):
                for room in ("errors", "instrument", "store", "tensors"):
                    import_module(f"torch._dynamo.{rules}").add(f"{__name__.partition('.')[0]}.{room}")

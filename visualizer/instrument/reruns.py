"""Where torch runs a model's code a second time for its own purposes: those calls are no calls of the model.

Gradient checkpointing computes layers again in the backward pass, and `torch.jit.trace` runs a function again to
compare. Both are Python functions of torch's. They are wrapped when the first capture starts, so that a captured call
need not ask. There is no public way to be told: a release of torch without one of these inner names is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from ..store import unrecorded
from .imports import after_import
from .untraced import never_compiled


def mark_reruns() -> None:
    """See to it that what torch runs again is not recorded: now, or as soon as these parts of torch are loaded."""
    after_import("torch.utils.checkpoint", _mark_checkpoint)
    after_import("torch.jit._trace", _mark_trace)


def _mark_checkpoint(module: ModuleType) -> None:
    _wrap(module, "_run_fn_with_dynamo_disabled", _rerun)
    _wrap(getattr(module, "CheckpointFunction", None), "backward", _rerun_within)


def _mark_trace(module: ModuleType) -> None:
    _wrap(module, "_check_trace", _rerun)


_wrappers: list[Any] = []


def _wrap(holder: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    function = getattr(holder, name, None)
    if function is not None and function not in _wrappers:
        wrapper = never_compiled(wrap(function))
        _wrappers.append(wrapper)
        setattr(holder, name, staticmethod(wrapper) if isinstance(holder, type) else wrapper)


def _rerun(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in which nothing is recorded."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unrecorded():
            return function(*args, **kwargs)

    return run


def _rerun_within(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The same backward function of a checkpoint, in which the layers that it runs again are not recorded.

    The gradients are computed with recording on, because that may run code of the model.
    """

    @wraps(backward)
    def run(ctx: Any, *args: Any) -> Any:
        function = ctx.run_function
        ctx.run_function = _rerun(function)
        try:
            return backward(ctx, *args)
        finally:
            ctx.run_function = function

    return run

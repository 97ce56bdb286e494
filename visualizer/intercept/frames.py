"""What the frames of Python tell of the calls under way in this thread, without any hook."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType

from torch import nn

from .modules import ModuleCall

_CALL: CodeType | None = getattr(nn.Module._call_impl, "__code__", None)
"""Of the function of torch that runs each call of a module, with its hooks; its variables say which one that is."""


def has_ended(frame: FrameType | None) -> bool:
    """Whether a frame has run to its end, such as that of a call that was interrupted: what follows is not of it.

    Only clearing a frame tells. It is a frame of torch's, whose locals nobody reads afterwards.
    """
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:  # it is running
        return False
    return True


def frame_of_call() -> FrameType | None:
    """The frame that runs the innermost call of a module."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def module_under_way() -> nn.Module | None:
    """The module whose call is the innermost one of this thread; None outside of any."""
    frame = frame_of_call()
    return None if frame is None else frame.f_locals.get("self")


def calls_under_way(path_of: Callable[[nn.Module], str | None]) -> list[ModuleCall]:
    """The calls of those modules that have a path, the outermost first."""
    calls = list[ModuleCall]()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            given = frame.f_locals
            path = path_of(given["self"])
            if path is not None:
                calls.append(ModuleCall(path, given["self"], given["args"], given["kwargs"]))
        frame = frame.f_back
    return calls[::-1]

"""What the frames of Python tell of a call under way."""

from __future__ import annotations

import sys
from types import FrameType

_PACKAGE = __name__.rpartition(".")[0]


def frame_of_call() -> FrameType | None:
    """The frame that runs the call of a module which one of our hooks belongs to: that behind our own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return frame


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

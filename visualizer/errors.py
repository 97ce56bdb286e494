"""What can go wrong, and what is worth a warning: one small family.

VisualizerError
├── UnknownLocalError      (also NameError)     the function has no such local
├── UnknownKeyError        (also KeyError)      nothing was captured under that key
├── FileFormatError        (also ValueError)    the file is damaged, or none that `save` wrote
├── RewriteError           (also RuntimeError)  the function's code cannot be rewritten with proof
└── UnsupportedPythonError (also RuntimeError)  this interpreter's bytecode is not known
VisualizerWarning          (a UserWarning)      something is missing from what was recorded, and why

A value of the wrong type or out of range is a plain TypeError or ValueError.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable


class VisualizerError(Exception):
    """Base of every error that is this package's own."""


class UnknownLocalError(VisualizerError, NameError):
    """The function has no local of that name; the message lists those it has."""


class UnknownKeyError(VisualizerError, KeyError):
    """Nothing was captured under that key; the message says which keys there are and whether capture is active."""

    # KeyError shows the repr of its argument, which is unreadable for a sentence.
    __str__ = Exception.__str__


class FileFormatError(VisualizerError, ValueError):
    """The file is damaged, cut short, or none that `save` wrote; the message says which and what to do."""


class RewriteError(VisualizerError, RuntimeError):
    """The function's code cannot be rewritten with proof that it stays the same; it was left untouched."""


class UnsupportedPythonError(VisualizerError, RuntimeError):
    """This interpreter's bytecode is not one the engine knows."""


class VisualizerWarning(UserWarning):
    """Something is missing from what was recorded, or looks wrong; the message says why and what to do."""


def warn(message: str) -> None:
    """Issue a VisualizerWarning at the innermost line that is not this package's."""
    package = __name__.rpartition(".")[0] + "."
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, VisualizerWarning, stacklevel=level)


def did_you_mean(known: Iterable[str], *names: str) -> str:
    """The end of a sentence about names that are not known: known ones like them, or nothing.

    >>> did_you_mean(["attn", "query"], "atn"), did_you_mean(["attn"], "x")
    ("; did you mean 'attn'?", '')
    """
    from difflib import get_close_matches  # which takes its time to load, and most programs make no such error

    known = list(known)
    close = [match for name in names for match in get_close_matches(name, known, n=1)]
    return f"; did you mean {' and '.join(map(repr, close))}?" if close else ""

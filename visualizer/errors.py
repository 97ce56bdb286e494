"""What can go wrong, and what is worth a warning: one small family.

VisualizerError
├── UnknownLocalError      (also NameError)     the function has no such local
├── UnknownKeyError        (also KeyError)      nothing was captured under that key
├── RewriteError           (also RuntimeError)  the function's code cannot be rewritten with proof
└── UnsupportedPythonError (also RuntimeError)  this interpreter's bytecode is not known
VisualizerWarning          (a UserWarning)      something is missing from what was recorded, and why

A value of the wrong type or out of range is a plain TypeError or ValueError.
"""


class VisualizerError(Exception):
    """Base of every error that is this package's own."""


class UnknownLocalError(VisualizerError, NameError):
    """The function has no local of that name; the message lists those it has."""


class UnknownKeyError(VisualizerError, KeyError):
    """Nothing was captured under that key; the message says which keys there are and whether capture is active."""

    # KeyError shows the repr of its argument, which is unreadable for a sentence.
    __str__ = Exception.__str__


class RewriteError(VisualizerError, RuntimeError):
    """The function's code cannot be rewritten with proof that it stays the same; it was left untouched."""


class UnsupportedPythonError(VisualizerError, RuntimeError):
    """This interpreter's bytecode is not one the engine knows."""


class VisualizerWarning(UserWarning):
    """Something is missing from what was recorded, or looks wrong; the message says why and what to do."""

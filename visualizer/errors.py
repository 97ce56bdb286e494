"""The errors and the warning of this package: one small family.

VisualizerError
├── UnknownLocalError      (also NameError)     the function has no such local
├── UnknownKeyError        (also KeyError)      nothing was captured under that key
├── FileFormatError        (also ValueError)    the file is damaged, or `save` did not write it
├── RewriteError           (also RuntimeError)  the function's code cannot be rewritten with proof
└── UnsupportedPythonError (also RuntimeError)  this interpreter's bytecode is not known
VisualizerWarning          (a UserWarning)      something is missing or looks wrong, and why

A value of the wrong type or out of range is a plain TypeError or ValueError.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

_PAGE = "docs/errors.md"
"""Where errors and warnings are explained, each under its own heading."""

Section: TypeAlias = str
"""A heading of that page about a kind of warning, as it stands in its address: "rows-of-nan"."""


class VisualizerError(Exception):
    """Base of this package's own errors. A note below the message names the section of docs/errors.md about it."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.add_note(f"{_PAGE}#{type(self).__name__.lower()} says more.")


class UnknownLocalError(VisualizerError, NameError):
    """The function has no local of that name; the message lists those it has."""


class UnknownKeyError(VisualizerError, KeyError):
    """Nothing was captured under that key; the message says which keys there are and whether capture is active."""

    # KeyError shows the repr of its argument, and a sentence in quotes is hard to read.
    __str__ = Exception.__str__


class FileFormatError(VisualizerError, ValueError):
    """The file is damaged, cut short, or not written by `save`; the message says which and what to do."""


class RewriteError(VisualizerError, RuntimeError):
    """Nothing proves that the rewritten code does the same as the function, so the function stays as it was."""


class UnsupportedPythonError(VisualizerError, RuntimeError):
    """The engine does not know the bytecode of this interpreter."""


class VisualizerWarning(UserWarning):
    """Something is missing from what was recorded, or looks wrong; the message says why and what to do.

    `section` is the heading of docs/errors.md about it, and ends the message.
    """

    def __init__(self, message: object = "", section: Section = "warnings") -> None:
        super().__init__(message, section)  # what copies and pickles are made of
        self.message, self.section = message, section

    def __str__(self) -> str:
        return f"{self.message} ({_PAGE}#{self.section})"


class News(NamedTuple):
    """A warning to be given later: what `warn` takes."""

    message: str
    section: Section


def warn(message: str, section: Section) -> None:
    """Issue a VisualizerWarning at the innermost line outside this package."""
    package = __name__.rpartition(".")[0] + "."
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(VisualizerWarning(message, section), stacklevel=level)


class WarningsInCalls:
    """Warnings given from within a call of the user's code, which does not see them: where warnings are errors, they
    wait."""

    def __init__(self) -> None:
        self._waiting: list[News] = []

    def warn(self, message: str, section: Section) -> None:
        """Warn at once, or keep it for `take`."""
        try:
            warn(message, section)
        except Exception:
            self._waiting.append(News(message, section))

    def take(self) -> list[News]:
        """Those that wait, which are to be given now."""
        waiting, self._waiting = self._waiting, []
        return waiting


ALL_WORDS = "tokenizer.convert_ids_to_tokens(ids) names special tokens and padding too"
"""The way out where there are fewer words than tokens, for a message."""


def not_installed(distribution: str, install: str = '"get-local[demo]"') -> ImportError:
    """The error for a missing package; its message says what to give to `pip install`."""
    return ImportError(f"{distribution} is not installed: pip install {install}", name=distribution)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, for a message.

    >>> few(["a", "b", "c"]), few("abcde")
    ("'a', 'b', 'c'", "'a', 'b', 'c' and 2 more")
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def shown(show: Callable[[Any], str], value: Any) -> str:
    """`repr` or `str` of a user's object for a message, or the name of its class where that fails."""
    try:
        return show(value)
    except Exception:
        return f"<{type(value).__name__}>"


def did_you_mean(known: Iterable[str], *names: str) -> str:
    """The end of a message about unknown names: similar known names, or an empty string.

    >>> did_you_mean(["attn", "query"], "atn"), did_you_mean(["attn"], "x")
    ("; did you mean 'attn'?", '')
    """
    from difflib import get_close_matches  # slow to load, and most programs never need it

    known = list(known)
    close = [match for name in names for match in get_close_matches(name, known, n=1)]
    return f"; did you mean {' and '.join(map(repr, close))}?" if close else ""

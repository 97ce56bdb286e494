"""How a command ends and what it says: results go to stdout, everything else to stderr, one line each."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..store import check_destination

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command adds its parser to."""


class Mistake(Exception):
    """The command was used wrongly. The message is the one line that the user sees."""

    status = 2


class Failure(Mistake):
    """The command was used rightly, and the work failed or brought no result."""

    status = 1


def reason(error: Exception) -> str:
    """The system's words for an error, without its number and the file's name; else the error's message."""
    return str(getattr(error, "strerror", None) or error)


def say(message: object) -> None:
    """Print a message on stderr, in one line."""
    print(f"visualizer: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def trying_to(task: str) -> Iterator[None]:
    """Turn an error of the system, or a wrong value, into a Mistake: "cannot {task}: {reason}"."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise Mistake(f"cannot {task}: {reason(error)}") from error


def destination(name: str, suffix: str) -> Path:
    """The path of that name; Mistake unless a file of the format `suffix` can be written there."""
    path = Path(name)
    with trying_to(f"write {name}"):
        check_destination(path, suffix)
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            return path


def save(figure: Figure, path: Path) -> None:
    """Save a picture; Mistake where it cannot be written.

    One line names all characters that no font has, in place of a warning for each.
    """
    with trying_to(f"write {path}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_destination(path, "png")
        figure.savefig(path, dpi=150)
    glyphs: dict[str, None] = {}
    for warning in caught:
        missing = re.match(r"Glyph (\d+) .* missing from", str(warning.message))
        if missing:
            glyphs[chr(int(missing[1]))] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if glyphs:
        say(f"{path.name} shows boxes for {''.join(glyphs)}: no installed font has them")


@contextlib.contextmanager
def warnings_as_lines(quiet: bool = False) -> Iterator[None]:
    """Print the package's warnings as plain lines: the place in the code means nothing to users of the command.

    `quiet` drops them. Other warnings appear as Python shows them.
    """
    from ..errors import VisualizerWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VisualizerWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, VisualizerWarning) and not quiet:
                    say(warning.message)
    for warning in caught:
        if not issubclass(warning.category, VisualizerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

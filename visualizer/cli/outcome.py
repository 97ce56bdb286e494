"""How a command ends, and what it says meanwhile: results on stdout, everything else, in lines of ours, on stderr."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


class Mistake(Exception):
    """What the user asked for cannot be done; the message is the one line to say so."""

    status = 2


class Fruitless(Mistake):
    """It was asked for rightly, and failed or brought nothing."""

    status = 1


def tell(message: object) -> None:
    """Say something on stderr, in one line."""
    print(f"visualizer: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def writable(name: str) -> Path:
    """The folder, made if need be, in which files can be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise Mistake(f"cannot write to {name}: {getattr(error, 'strerror', None) or error}") from error
    return folder


def write(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Have a file written; Mistake where it cannot be."""
    try:
        write_to(path)
    except OSError as error:
        raise Mistake(f"cannot write {path}: {error.strerror or error}") from error


def save(figure: Figure, path: Path) -> None:
    """Save a picture; characters that no font has are said in one line, not in one warning each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=150)
    glyphs: dict[str, None] = {}
    for warning in caught:
        missing = re.match(r"Glyph (\d+) .* missing from", str(warning.message))
        if missing:
            glyphs[chr(int(missing[1]))] = None
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if glyphs:
        tell(f"{path.name} has boxes for {''.join(glyphs)}: no installed font has them")


@contextlib.contextmanager
def told_plainly(quiet: bool = False) -> Iterator[None]:
    """Have the package's own warnings said as lines of ours, without the place in the code that nobody here wrote."""
    from ..errors import VisualizerWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VisualizerWarning)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, VisualizerWarning) and not quiet:
                    tell(warning.message)
    for warning in caught:
        if not issubclass(warning.category, VisualizerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

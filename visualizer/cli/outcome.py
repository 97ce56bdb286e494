"""How a command ends and what it says: results go to stdout, everything else to stderr, one line each."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import VisualizerWarning
from ..store import check_destination

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    if name == "-":
        raise Mistake(f"-o - would be the standard output: name a file, such as out.{suffix}")
    path = Path(name)
    with trying_to(f"write {name}"):
        check_destination(path, suffix)
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            return path


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Save a picture; Mistake where it cannot be written."""
    from matplotlib import rc_context

    with trying_to(f"write {path}"), warnings_as_lines():
        check_destination(path, "png")
        with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):  # text stays text, in fonts that journals take
            figure.savefig(path, dpi=dpi)


@contextlib.contextmanager
def warnings_as_lines(quiet: bool = False) -> Iterator[None]:
    """Print the package's warnings as plain lines: a place in the code means nothing to users of the command.

    `quiet` drops them. One line names all characters that no font has. Other warnings appear as Python shows them.
    """
    glyphs: dict[str, None] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VisualizerWarning)
        warnings.filterwarnings("always", "Glyph")
        try:
            yield
        finally:
            for warning in caught:
                if isinstance(warning.message, VisualizerWarning) and not quiet:
                    say(warning.message)
    for warning in caught:
        if missing := re.match(r"Glyph (\d+) .* missing from", str(warning.message)):
            glyphs[chr(int(missing[1]))] = None
        elif not issubclass(warning.category, VisualizerWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if glyphs:
        say(f"the picture shows boxes for {''.join(glyphs)}: no installed font has them")


def why_import_failed(error: BaseException | None) -> str | None:
    """One line about an error that an installed package raised while it was imported; None for any other error.

    The package that fails is the one that was imported last: timm fails where torchvision does, which it imports.
    """
    while error is not None:
        packages = list(dict.fromkeys(_being_imported(error.__traceback__)))
        if packages:
            first, last = packages[0], packages[-1]
            through = "" if first == last else f", which {first} imports,"
            what = f"{last}{_release_of(last)} is installed{through} and cannot be imported"
            return f"{what}: {type(error).__name__}: {error}{_what_fits(last)}"
        error = error.__cause__ or error.__context__
    return None


def _being_imported(traceback: TracebackType | None) -> Iterator[str]:
    """The packages whose top level a traceback passes through, ours and the program's own left out."""
    while traceback is not None:
        frame = traceback.tb_frame
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        is_installed = "-packages" in frame.f_code.co_filename
        if frame.f_code.co_name == "<module>" and package not in ("visualizer", "__main__") and is_installed:
            yield package
        traceback = traceback.tb_next


def _release_of(package: str) -> str:
    names = metadata.packages_distributions().get(package, [package])
    try:
        return f" {metadata.version(names[0])}"
    except metadata.PackageNotFoundError:
        return ""


def _what_fits(package: str) -> str:
    """For torchvision, which is compiled for one release of torch: which of its releases fits the installed torch."""
    torch = re.match(r" 2\.(\d+)", _release_of("torch"))
    if torch is None or package != "torchvision":
        return ""
    vision = f"0.{int(torch[1]) + 15}"  # torch 2.0 came with torchvision 0.15, and so on
    return f'. torch{torch[0]} needs torchvision {vision}: pip install "torchvision=={vision}.*"'

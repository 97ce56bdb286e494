"""Files that `run` or `save` wrote, as commands are given them."""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..errors import FileFormatError
from ..loading import load
from ..store import Cache
from ..tensors import is_array
from .outcome import Mistake

if TYPE_CHECKING:
    from ..intercept import Maps

Found: TypeAlias = "Cache | Maps"


def read(path: str) -> Found:
    """The values or maps in a file; Mistake where it cannot be read or has none."""
    found, statistics = read_any(path)
    if found is None:
        kind = next(iter(statistics or ())).replace("_", "-")
        raise Mistake(f"{path} has statistics, and no map to explore: visualizer plot {path} --kind {kind}")
    return found


def read_any(path: str) -> tuple[Found | None, Any]:
    """What is in a file, or in all that are like a pattern: values or maps, or else statistics (a `Collected`).

    Raises Mistake where it cannot be read.
    """
    try:
        found: Any = load(path)
    except FileFormatError as error:
        raise Mistake(error) from error
    except (OSError, ValueError) as error:
        raise Mistake(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return (None, found) if type(found).__name__ == "Collected" else (found, None)  # its class needs torchmetrics


def keys_of(found: Found) -> tuple[str, ...]:
    """The keys of a file, or the paths of its modules."""
    return tuple(found) if isinstance(found, Cache) else found.paths


def values_of(found: Found, key: str) -> list[Any]:
    """What was captured under a key, in call order."""
    return found[key] if isinstance(found, Cache) else found.calls(key)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which file and which of its maps."""
    parser.add_argument("file", metavar="FILE", help="what visualizer run, or save() in Python, wrote")
    parser.add_argument(
        "--key", metavar="PATTERN", help="only these keys of visualizer info, such as 'encoder.*.self'; default: all"
    )
    parser.add_argument("--call", type=int, metavar="N", help="which call of each key, if there were several: 0, -1")
    parser.add_argument("--image", metavar="FILE", help="the picture as the model saw it: cut out alike")
    parser.add_argument("--tokens", nargs="+", metavar="TOKEN", help="the words; default: those saved in the file")


def choose(found: Found, options: argparse.Namespace) -> list[Any]:
    """The layers that --key and --call mean, in order; Mistake where there are none or too many."""
    keys = [key for key in keys_of(found) if values_of(found, key)]
    if not keys:
        raise Mistake(f"there is nothing in {options.file}: no call was recorded")
    if options.key is None:
        chosen = [key for key in keys if not any(_passes_on(found, key, other) for other in keys)]
    else:
        chosen = [key for key in keys if fnmatch.fnmatchcase(key, options.key)]
    if not chosen:
        raise Mistake(f"no key is like {options.key!r}: there are {few(keys)}")
    if len(chosen) == 1 and options.call is None:
        return values_of(found, chosen[0])  # get_local's: one function that ran in every layer
    layers = []
    for key in chosen:
        values = values_of(found, key)
        if options.call is None and len(values) > 1:
            raise Mistake(f"{key!r} was called {len(values)} times: --call 0 to {len(values) - 1} chooses, -1 the last")
        try:
            layers.append(values[options.call or 0])
        except IndexError:
            raise Mistake(f"{key!r} has no call {options.call}: it was called {len(values)} times") from None
    return layers


def _passes_on(found: Found, key: str, other: str) -> bool:
    """Whether a module only has what one within it made: BERT's attention has that of attention.self once more."""
    if not isinstance(found, Cache) or not other.startswith(f"{key}.") or len(found[key]) != len(found[other]):
        return False
    pairs = zip(found[key], found[other], strict=True)
    return all(is_array(one) and is_array(two) and np.array_equal(one, two, equal_nan=True) for one, two in pairs)


def tokens_of(found: Found, options: argparse.Namespace) -> list[str] | None:
    """The words that were given, or that the file has in its `about`."""
    if options.tokens is not None:
        given: list[str] = options.tokens
        return given
    saved = found.about.get("tokens")
    if isinstance(saved, (list, tuple)) and all(isinstance(token, str) for token in saved):
        return list(saved)
    return None


def picture_of(path: str | None) -> Any:
    """The picture, upright, in colour; None where none was given."""
    if path is None:
        return None
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise Mistake("--image needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError as error:
        raise Mistake(f"there is no picture {path}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Mistake(f"cannot read {path} as a picture: {error}") from error


def grid_of(text: str) -> tuple[int, ...]:
    """(rows, columns), from "14x14"."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 14x14, ROWSxCOLUMNS")
    return tuple(map(int, text.split("x")))


def few(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def as_options(message: str) -> str:
    """A message about arguments in Python, in those of the command."""
    message = re.sub(r"Pass grid=\(rows, columns\).*", "Pass --grid ROWSxCOLUMNS", message)
    return re.sub(r"\b(layer|head|batch|query|grid|image|tokens|title)=", r"--\1 ", message)

"""Saved results, as commands read them, and the arguments that choose among their maps."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import FileFormatError, did_you_mean, few
from ..images import as_pil
from ..loading import load
from ..store import bytes_by_device
from ..tensors import is_array
from .outcome import Mistake, trying_to

if TYPE_CHECKING:
    from ..store import Recorded


def read(path: str) -> Recorded:
    """The results in a file, or in all files that match a pattern; Mistake where they cannot be read."""
    with trying_to(f"read {path}"):
        try:
            return load(path)
        except FileFormatError as error:
            raise Mistake(error) from error


def values_by_key(results: Recorded) -> dict[str, list[Any]]:
    """The values of every key, in call order; keys without values too."""
    values: dict[str, list[Any]] = {key: [] for key in results.saved().keys}
    for record in results.records:
        values[record.key].append(record.value)
    return values


def is_map(value: Any) -> bool:
    """Whether it is an `AttentionMap`. Its class needs torch, which a file of arrays is read without."""
    maps = sys.modules.get("visualizer.maps")
    return maps is not None and isinstance(value, maps.AttentionMap)


def has_words(value: Any) -> bool:
    """Whether it is a map whose words are known."""
    return is_map(value) and value.layout is not None and value.layout.has_words


def size_of(value: Any) -> int:
    """The bytes of a value, on all devices together."""
    return value.nbytes if is_map(value) else sum(bytes_by_device(value).values())


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a file and maps in it."""
    parser.add_argument("file", metavar="FILE", help="a file that visualizer run, or save() in Python, wrote")
    parser.add_argument(
        "--key", metavar="PATTERN", help="only these keys of visualizer info, such as 'encoder.*.self'; default: all"
    )
    parser.add_argument("--call", type=int, metavar="N", help="which call of each key, where there were several: 0, -1")
    parser.add_argument("--image", metavar="FILE", help="the picture, cropped as the model saw it")
    parser.add_argument("--tokens", nargs="+", metavar="TOKEN", help="the tokens; default: those saved in the file")
    parser.add_argument("--sinks", choices=("keep", "remove"), help="tokens that draw far more than their share")


def choose(results: Recorded, options: argparse.Namespace) -> list[Any]:
    """The maps that --key and --call choose, a layer each, in order; Mistake where there are none or too many."""
    if results.saved().kind == "statistics":
        kind = next(iter(values_by_key(results))).replace("_", "-")
        raise Mistake(f"{options.file} has statistics and no maps: visualizer plot {options.file} --kind {kind}")
    if options.call is None and getattr(results, "is_generation", False):
        results = cast(Any, results).generated()  # the whole text is a call of each module
    values = {key: called for key, called in values_by_key(results).items() if called}
    if not values:
        raise Mistake(f"there is nothing in {options.file}: no call was recorded")
    if options.key is None:
        chosen = [key for key in values if not any(_passes_on(values, key, other) for other in values)]
    else:
        chosen = [key for key in values if fnmatch.fnmatchcase(key, options.key)]
    if not chosen:
        raise Mistake(
            f"no key matches {options.key!r}: there are {few([*values], 8)}{did_you_mean(values, options.key)}"
        )
    if len(chosen) == 1 and options.call is None:
        return values[chosen[0]]  # a function decorated by get_local, which every layer calls
    layers = []
    for key in chosen:
        calls = len(values[key])
        if options.call is None and calls > 1:
            raise Mistake(f"{key!r} was called {calls} times: choose --call 0 to {calls - 1}, or -1 for the last")
        try:
            layers.append(values[key][options.call or 0])
        except IndexError:
            raise Mistake(f"{key!r} has no call {options.call}: it was called {calls} times") from None
    return layers


def _passes_on(values: dict[str, list[Any]], outer: str, inner: str) -> bool:
    """Whether a module only returns what a module inside it made, as BERT's attention does with attention.self."""
    if not inner.startswith(f"{outer}.") or len(values[outer]) != len(values[inner]):
        return False
    pairs = zip(values[outer], values[inner], strict=True)
    return all(is_array(one) and is_array(two) and np.array_equal(one, two, equal_nan=True) for one, two in pairs)


def tokens_of(results: Recorded, options: argparse.Namespace) -> list[str] | None:
    """The tokens of --tokens, or those that were saved in the file's `about`."""
    tokens = results.about.get("tokens") if options.tokens is None else options.tokens
    if isinstance(tokens, (list, tuple)) and all(isinstance(token, str) for token in tokens):
        return list(tokens)
    return None


def picture_of(path: str | None) -> Any:
    """The picture of --image, upright and in RGB; None where there is no --image."""
    if path is None:
        return None
    with reading_picture(path):
        return as_pil(path)


@contextlib.contextmanager
def reading_picture(path: str) -> Iterator[None]:
    """Turn whatever Pillow raises for a picture into a Mistake, and drop what it warns of."""
    if not path:
        raise Mistake("the picture has no name: --image takes a file")
    try:
        from PIL import Image
    except ImportError as error:
        raise Mistake("a picture is read by Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError as error:
        raise Mistake(f"there is no picture {path}") from error
    except Image.DecompressionBombError as error:
        raise Mistake(f"{path} is too large: {error}") from error
    except (OSError, ValueError, TypeError, SyntaxError) as error:  # SyntaxError: what Pillow raises for a broken PNG
        raise Mistake(f"cannot read {path} as a picture: {error}") from error


def whole_number(least: int, most: float = math.inf) -> Callable[[str], int]:
    """A function that reads a number of this range from an argument."""

    def read_number(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or not least <= int(text) <= most:
            end = "on" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} {end}")
        return int(text)

    return read_number


def grid_of(text: str) -> tuple[int, ...]:
    """(rows, columns), from "14x14"."""
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 14x14, ROWSxCOLUMNS")
    return tuple(map(int, text.split("x")))


def as_options(message: str) -> str:
    """A message about Python's arguments, with the command's options in their place."""
    message = re.sub(r"Pass grid=\(rows, columns\)[^.]*", "Pass --grid ROWSxCOLUMNS", message)
    message = re.sub(r"(grid=)?\((\d+), (\d+)\)( with prefix_tokens=\d+)?", _as_grid, message)
    message = re.sub(r"\bplot\.(\w+)", lambda found: f"visualizer plot --kind {found[1].replace('_', '-')}", message)
    return re.sub(r"\b(layer|head|batch|query|grid|image|tokens|title|style|cmap)=", r"--\1 ", message)


def _as_grid(found: re.Match[str]) -> str:
    """A grid in a message as the option --grid takes it; other pairs of numbers as they are."""
    name, rows, columns, behind = found.groups()
    return f"{'--grid ' * bool(name)}{rows}x{columns}" if name or behind else found[0]

"""`visualizer info`: what is in a saved file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..store import Cache, bytes_by_device
from ..tensors import is_array, is_tensor
from .saved import Found, keys_of, read_any, values_of

if TYPE_CHECKING:
    from ..statistics import Collected
    from .outcome import Commands


def add_to(commands: Commands) -> None:
    """Add the command to the parser's."""
    info = commands.add_parser(
        "info",
        help="list what is in a saved file",
        description="Lists the keys of a saved file with their calls, shapes, types and bytes.",
    )
    info.add_argument("file", metavar="FILE", help="what visualizer run, or save() in Python, wrote")
    info.add_argument("--json", action="store_true", help="as JSON, every value with its shape")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    found, statistics = read_any(options.file)
    if found is None:
        text = json.dumps(_moments(statistics), indent=2) if options.json else _statistics(options.file, statistics)
        print(text)
        return
    if options.json:
        print(json.dumps(_content(found), indent=2, default=_about, skipkeys=True))
        return
    table = repr(found)[1:-1]  # without the brackets of a repr, and what a session in Python would call it
    print(f"{options.file}: {table.removeprefix(f'load({options.file!r}): ')}")
    for name, value in found.about.items():
        print(f"about {name}: {_about(value)}")


def _statistics(file: str, found: Collected) -> str:
    lines = [f"{file}: {repr(found)[1:-1]}", f"layers: {', '.join(path or repr('') for path in found.paths)}"]
    lines += [f"about {name}: {_about(value)}" for name, value in found.about.items()]
    return "\n".join([*lines, *(f"batch {number} failed: {why}" for number, why in found.failed)])


def _moments(found: Collected) -> dict[str, Any]:
    names = ("count", "mean", "variance", "minimum", "maximum")
    return {
        "kind": "statistics",
        "samples": found.samples,
        "batches": found.batches,
        "failed": [{"batch": number, "why": why} for number, why in found.failed],
        "layers": list(found.paths),
        "statistics": {
            key: {name: _without_nan(getattr(moments, name).tolist()) for name in names}
            for key, moments in found.items()
        },
        "about": found.about,
    }


def _without_nan(numbers: Any) -> Any:
    """None for NaN, which JSON lacks."""
    if isinstance(numbers, list):
        return [_without_nan(number) for number in numbers]
    return None if numbers != numbers else numbers


def _content(found: Found) -> dict[str, Any]:
    return {
        "kind": "captured values" if isinstance(found, Cache) else "attention maps",
        "keys": [{"key": key, "values": [_value(value) for value in values_of(found, key)]} for key in keys_of(found)],
        "about": found.about,
    }


def _value(value: Any) -> dict[str, Any]:
    """A value's shape, type and bytes, as far as it has them."""
    if type(value).__name__ == "AttentionMap":
        source = "weights" if value.is_dense else "query and key"
        shape, dtype, size = value.shape, value.dtype, value.nbytes
        return {**_row(shape, dtype, size), "kept as": source, "attention": value.kind}
    size = sum(bytes_by_device(value).values())
    if is_tensor(value) or is_array(value):
        return _row(value.shape, value.dtype, size)
    return {"type": type(value).__name__, "bytes": size}


def _row(shape: Any, dtype: Any, size: int) -> dict[str, Any]:
    return {"shape": list(map(int, shape)), "dtype": str(dtype).removeprefix("torch."), "bytes": size}


def _about(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

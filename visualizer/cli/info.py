"""`visualizer info`: what is in a saved file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..tensors import is_array, is_tensor
from .saved import is_map, read, size_of, values_by_key

if TYPE_CHECKING:
    from ..store import Recorded

_KINDS = {"values": "captured values", "maps": "attention maps"}


def arguments(info: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    info.add_argument("file", metavar="FILE", help="a file that visualizer run, or save() in Python, wrote")
    info.add_argument("--json", action="store_true", help="as JSON, with the shape of every value")


def main(options: argparse.Namespace) -> None:
    """List what is in a saved file.

    The keys are listed with their calls, shapes, types and bytes.
    """
    results = read(options.file)
    is_statistics = results.saved().kind == "statistics"
    if options.json:
        content = _moments(results) if is_statistics else _values(results)
        print(json.dumps({**content, "about": results.about}, indent=2, default=_shortened, skipkeys=True))
        return
    table = repr(results)[1:-1]  # without the brackets of a repr, and without load('...') before it
    print(f"{options.file}: {table.removeprefix(f'load({options.file!r}): ')}")
    if is_statistics:
        statistics: Any = results
        print(f"layers: {', '.join(path or repr('') for path in statistics.paths)}")
        for number, why in statistics.failed:
            print(f"batch {number} failed: {why}")
    for name, value in results.about.items():
        print(f"about {name}: {_shortened(value)}")


def _moments(statistics: Any) -> dict[str, Any]:
    names = ("count", "mean", "variance", "minimum", "maximum")
    return {
        "kind": "statistics",
        "samples": statistics.samples,
        "batches": statistics.batches,
        "failed": [{"batch": number, "why": why} for number, why in statistics.failed],
        "layers": list(statistics.paths),
        "statistics": {
            record.key: {name: _without_nan(getattr(record.value, name).tolist()) for name in names}
            for record in statistics.records
        },
    }


def _without_nan(numbers: Any) -> Any:
    """None in place of NaN, which JSON lacks."""
    if isinstance(numbers, list):
        return [_without_nan(number) for number in numbers]
    return None if numbers != numbers else numbers


def _values(results: Recorded) -> dict[str, Any]:
    kind = results.saved().kind
    keys = [
        {"key": key, "values": [_value(value) for value in values]} for key, values in values_by_key(results).items()
    ]
    return {"kind": _KINDS.get(kind, kind), "keys": keys}


def _value(value: Any) -> dict[str, Any]:
    """A value's shape, type and bytes, as far as it has them."""
    row: dict[str, Any] = {"type": type(value).__name__}
    if is_map(value) or is_tensor(value) or is_array(value):
        row = {"shape": list(map(int, value.shape)), "dtype": str(value.dtype).removeprefix("torch.")}
    row["bytes"] = size_of(value)
    if is_map(value):
        row |= {"kept as": value.source.kept, "attention": value.kind}
    return row


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

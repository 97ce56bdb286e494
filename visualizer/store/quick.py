"""Keeps the common values without detours: numbers, strings, plain arrays, plain tensors on the CPU.

`keeper` decides for every value; what is here decides the same for these, and takes a fraction of the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from ..tensors import Keep, is_plain_torch, kind_of
from .budget import ARRAY_BYTES, ROW_BYTES, TENSOR_BYTES, object_bytes, resident_bytes

ARRAY, _TENSOR = ARRAY_BYTES + ROW_BYTES, TENSOR_BYTES + ROW_BYTES

Quick = Callable[[Any], tuple[Any, int]]
"""From a value to what is kept of it and the bytes that it takes on the CPU; (None, 0) for all but common values."""

_NOT_QUICK: tuple[Any, int] = (None, 0)


def quick_keeper(keep: Keep) -> Quick:
    """A function that keeps common values as `keeper(keep)` does."""
    return _never_quick if callable(keep) else _quick_keeper(keep)


def _never_quick(value: Any) -> tuple[Any, int]:
    return _NOT_QUICK


@cache
def _quick_keeper(keep: str) -> Quick:
    torch: ModuleType | None = None
    is_graph, to_numpy = keep == "graph", keep == "numpy"

    def quick(value: Any) -> tuple[Any, int]:
        nonlocal torch
        kind = kind_of(value)
        if kind == "array":
            if is_graph:
                return value, resident_bytes(value)["cpu"]
            if not value.dtype.hasobject:
                kept = value.copy()
                return kept, kept.__sizeof__() + ARRAY
        elif kind == "tensor":
            torch = torch or sys.modules["torch"]
            cls = type(value)
            if (cls is torch.Tensor or cls is torch.nn.Parameter) and value.is_cpu:
                if is_graph:
                    return (value, value.nbytes + _TENSOR) if value.layout is torch.strided else _NOT_QUICK
                if is_plain_torch(torch):
                    try:
                        tensor = value.detach() if value.requires_grad else value
                        kept = tensor.numpy().copy() if to_numpy else tensor.clone()
                        return kept, kept.__sizeof__() + ARRAY if to_numpy else kept.nbytes + _TENSOR
                    except (TypeError, RuntimeError):  # numpy lacks the type, or it is no tensor of plain numbers
                        return _NOT_QUICK
        elif kind == "other" and _is_plain(type(value)):
            return value, object_bytes(value)
        return _NOT_QUICK

    return quick


def is_light(value: Any) -> bool:
    """Whether nobody minds if a value beyond a limit goes a little later: a number, a string, a plain array."""
    kind, cls = kind_of(value), type(value)
    if kind == "tensor":
        return cls is sys.modules["torch"].Tensor and value.is_cpu and not value.requires_grad
    return (kind == "array" and not value.dtype.hasobject) or _is_plain(cls)


def _is_plain(cls: Any) -> bool:
    # Compared by identity, because a class may have its own __eq__ or __hash__.
    return cls is float or cls is int or cls is bool or cls is str or cls is bytes or cls is complex

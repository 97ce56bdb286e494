"""Checks of arguments, made before anything changes."""

from __future__ import annotations

from numbers import Integral
from typing import Any, get_args

from ..rewrite import At
from ..store import NO_LIMIT


def check_names(caller: str, names: tuple[Any, ...], hint: str) -> tuple[str, ...]:
    """The names without repetitions; TypeError where there is none, or one is no string."""
    if not names:
        raise TypeError(f"{caller} needs the name of a local variable: {hint}")
    for name in names:
        if not isinstance(name, str):
            written = f"; write {hint} above the function" if callable(name) and caller == "get_local" else ""
            raise TypeError(f"{caller} takes names of local variables as strings, not {name!r}{written}")
    return tuple(dict.fromkeys(names))


def check_at(at: Any) -> None:
    """ValueError unless it is one of the places to capture at."""
    if at not in get_args(At):
        raise ValueError(f"at must be one of {', '.join(map(repr, get_args(At)))}, not {at!r}")


def check_count(name: str, value: Any) -> None:
    """TypeError or ValueError unless it is a positive whole number or None."""
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a whole number or None, not {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")


def check_max_bytes(value: Any) -> None:
    """TypeError or ValueError unless it is a positive whole number, `math.inf` for no limit, or None."""
    if not isinstance(value, float) or value != NO_LIMIT:
        check_count("max_bytes", value)

"""Awkward functions for the rewriter, one idea each, as plain modules.

Each case names the locals its function has, the calls to make, and for each call what is assigned in it, written down
by hand as (name, line below the `def`, value). What it returns, yields, raises and holds at its returns is not
written down: `oracle.py` learns it from the untouched function. Modules with syntax that a later Python brought are
named `since_*` and loaded there only.
"""

from __future__ import annotations

import functools
import importlib
import linecache
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

# From 3.12 on a list, dict or set comprehension is part of the function's own code (PEP 709).
COMPREHENSIONS_INLINED = sys.version_info >= (3, 12)

MODULES = {
    "control_flow": (3, 11),
    "exceptions": (3, 11),
    "finally_returns": (3, 11),
    "contexts": (3, 11),
    "assignments": (3, 11),
    "unbound": (3, 11),
    "signatures": (3, 11),
    "expressions": (3, 11),
    "closures": (3, 11),
    "comprehensions": (3, 11),
    "matching": (3, 11),
    "generators": (3, 11),
    "coroutines": (3, 11),
    "introspection": (3, 11),
    "sizes": (3, 11),
    "since_312": (3, 12),
    "since_313": (3, 13),
    "since_314": (3, 14),
    "since_315": (3, 15),
}

# (name, line below the def, value), or None where a further frame of the function is entered
Assigned = tuple[str, int, Any] | None


class Shown(str):
    """A value given by its repr, addresses left out: functions, classes and the like in hand-written lists."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Call:
    """One call of a case's function, and what is assigned in it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    assigns: tuple[Assigned, ...] | None
    steps: tuple[tuple[Any, ...], ...] | None


@dataclass(frozen=True)
class Case:
    """A function with the names of its locals and the calls to make."""

    name: str
    function: FunctionType
    names: tuple[str, ...]
    singles: tuple[str, ...]
    calls: tuple[Call, ...]

    @functools.cached_property
    def def_line(self) -> int:
        """The line of `def` or `lambda`; the code's first line may be a decorator's."""
        code = self.function.__code__
        lines = linecache.getlines(code.co_filename)
        line = code.co_firstlineno
        if code.co_name != "<lambda>":
            while not lines[line - 1].lstrip().startswith(("def ", "async def ")):
                line += 1
        return line


CASES: list[Case] = []

# Steps for generators, coroutines and asynchronous generators. Without steps they are run to their end.
NEXT = ("send", None)
CLOSE = ("close",)


def send(value: Any) -> tuple[Any, ...]:
    """A step: send a value in."""
    return ("send", value)


def throw(kind: type[BaseException], *args: Any) -> tuple[Any, ...]:
    """A step: throw a fresh exception in (an exception that is used twice would keep its first traceback)."""
    return ("throw", kind, args)


def call(
    *args: Any,
    assigns: Sequence[Assigned] | None = (),
    steps: Sequence[tuple[Any, ...]] | None = None,
    **kwargs: Any,
) -> Call:
    """A call with these arguments, which must stay unchanged: every run is given the same objects.

    `assigns` is what follows the entry of the function, None when the function is not even entered.
    """
    return Call(
        args,
        kwargs,
        None if assigns is None else tuple(assigns),
        None if steps is None else tuple(steps),
    )


def case(names: str, *calls: Call, singles: str | None = None) -> Callable[[FunctionType], FunctionType]:
    """Register a function with its locals (in any order) and its calls; the function is returned as it is.

    Each name is captured alone, too; `singles` picks a few where there are hundreds.
    """

    def register(function: FunctionType) -> FunctionType:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        if name in {known.name for known in CASES}:
            # lambdas, and the setter of a property
            name += f":{function.__code__.co_firstlineno}"
        chosen = names if singles is None else singles
        CASES.append(Case(name, function, tuple(names.split()), tuple(chosen.split()), calls))
        return function

    return register


def load() -> list[Case]:
    """All cases that this Python can read."""
    with warnings.catch_warnings():
        # `return` in `finally` is warned about from 3.14 on (PEP 765); the cases mean it.
        warnings.simplefilter("ignore", SyntaxWarning)
        for module, since in MODULES.items():
            if sys.version_info >= since:
                importlib.import_module(f"{__name__}.{module}")
    return CASES

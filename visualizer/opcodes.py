"""All that differs between Python versions, as named facts and named builders of instructions.

Nothing else in the package looks at `sys.version_info`. What the rewriter injects
is, in Python's terms,

    __get_local__(key, value)

built here from `load_hook`, `load_key`, `load_variable` and `call_hook`. Comments show the stack after each step,
top at the right.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING

from .errors import UnsupportedPythonError

if TYPE_CHECKING:
    from bytecode import Instr
    from bytecode.instr import InstrLocation

OLDEST, NEWEST = (3, 11), (3, 15)

COMPREHENSIONS_ARE_INLINED = sys.version_info >= (3, 12)
"""PEP 709: a comprehension's variables live in the function's own frame, saved by LOAD_FAST_AND_CLEAR before it and
restored by a plain STORE_FAST after it, which may store "unbound"."""

LOADS_MUST_BE_CHECKED = sys.version_info >= (3, 12)
"""LOAD_FAST pushes a null pointer for an unbound local, and the interpreter crashes; LOAD_FAST_CHECK raises."""

CALLS_ARE_PREPARED = sys.version_info < (3, 12)
"""CALL must follow a PRECALL of its own."""

RETURNS = frozenset({"RETURN_VALUE", "RETURN_CONST"})
"""What ends a call with a result. RETURN_CONST (3.12, 3.13) brings its own value."""

KNOWN_RETURNS = RETURNS | {"RETURN_GENERATOR"}
"""RETURN_GENERATOR hands out the generator and ends nothing. Any other RETURN_... would be news, and is refused."""

STORES = frozenset({"STORE_FAST", "STORE_DEREF"})
DELETES = frozenset({"DELETE_FAST", "DELETE_DEREF"})

PAIRS = {
    "STORE_FAST_STORE_FAST": ("STORE_FAST", "STORE_FAST"),
    "STORE_FAST_LOAD_FAST": ("STORE_FAST", "LOAD_FAST"),
    "LOAD_FAST_LOAD_FAST": ("LOAD_FAST", "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": ("LOAD_FAST_BORROW", "LOAD_FAST_BORROW"),
}
"""3.13 and later do two steps in one instruction; either half may be the one that matters."""


SHAM_JUMPS = frozenset({"END_ASYNC_FOR"})
"""3.14 and later give it the way back to its loop, for monitoring only: execution never takes it."""


class Kind(Enum):
    """Where a variable of a function lives."""

    FAST = "in the frame"
    CELL = "in a cell that inner functions share"
    FREE = "in a cell of an outer function"


def why_unsupported() -> str | None:
    """The reason why this interpreter's code cannot be rewritten, or None where it can."""
    if sys.implementation.name != "cpython":
        return f"it rewrites CPython's bytecode, and this is {sys.implementation.name}"
    version = sys.version_info[:2]
    if not OLDEST <= version <= NEWEST:
        span = f"CPython {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
        return f"it knows the bytecode of {span}, and this is {'.'.join(map(str, version))}"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "it swaps code objects under the interpreter's lock, and this free-threaded build runs without one"
    return None


def require_supported() -> None:
    """Raise UnsupportedPythonError, with the reason, where code cannot be rewritten."""
    reason = why_unsupported()
    if reason:
        raise UnsupportedPythonError(
            f"get_local cannot be activated: {reason}. Without activation decorated functions run as they are; "
            "a newer release of get-local may know this interpreter."
        )


def load_hook(hook: str, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... hook, null. The low bit asks for the null on its right side of the hook in every version."""
    from bytecode import Instr

    return [Instr("LOAD_GLOBAL", (True, hook), location=at)]


def load_marker(hook: str, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... hook. The hook itself stands for "unbound": no variable of the user's can hold it."""
    from bytecode import Instr

    return [Instr("LOAD_GLOBAL", (False, hook), location=at)]


def load_constant(value: str | int | None, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... value."""
    from bytecode import Instr

    return [Instr("LOAD_CONST", value, location=at)]


def load_variable(name: str, kind: Kind, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... value; an unbound variable raises NameError or UnboundLocalError."""
    from bytecode import Instr
    from bytecode.instr import CellVar, FreeVar

    if kind is Kind.FREE:
        return [Instr("LOAD_DEREF", FreeVar(name), location=at)]
    if kind is Kind.CELL:
        return [Instr("LOAD_DEREF", CellVar(name), location=at)]
    return [Instr("LOAD_FAST_CHECK" if LOADS_MUST_BE_CHECKED else "LOAD_FAST", name, location=at)]


def build_tuple(count: int, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... value1 .. valueN -> ... (value1, .., valueN)."""
    from bytecode import Instr

    return [Instr("BUILD_TUPLE", count, location=at)]


def call_hook(at: InstrLocation | None) -> list[Instr]:
    """Stack: ... hook, null, key, value -> ... (what the hook returned is dropped)."""
    from bytecode import Instr

    prepare = [Instr("PRECALL", 2, location=at)] if CALLS_ARE_PREPARED else []
    return [*prepare, Instr("CALL", 2, location=at), Instr("POP_TOP", location=at)]

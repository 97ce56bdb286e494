"""All that differs between Python versions: facts about bytecode, and builders of instructions, named by meaning.

No other file of the engine looks at `sys.version_info` or spells the name of an instruction, so of the engine's code a
new Python changes this file alone. What the rewriter injects is, in Python's terms,

    __get_local__(key, value)

built here by `load_hook`, `load_constant`, `load_variable` and `call_hook`. "Stack" shows what a step changes, with the
top at the right.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable
from enum import Enum
from types import CodeType
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedPythonError

if TYPE_CHECKING:
    from bytecode import Instr, Label
    from bytecode.instr import InstrLocation

OLDEST, NEWEST = (3, 11), (3, 15)

COMPREHENSIONS_ARE_INLINED = sys.version_info >= (3, 12)
"""PEP 709: a comprehension's variables live in the function's own frame. LOAD_FAST_AND_CLEAR saves the function's value
before the comprehension, and a plain STORE_FAST restores it afterwards; it may restore "unbound"."""

LOADS_MUST_BE_CHECKED = sys.version_info >= (3, 12)
"""LOAD_FAST pushes a null pointer for an unbound local, and the interpreter crashes; LOAD_FAST_CHECK raises."""

CALLS_ARE_PREPARED = sys.version_info < (3, 12)
"""Each CALL needs a PRECALL before it."""

RETURNS = frozenset({"RETURN_VALUE", "RETURN_CONST"})
"""These end a call with a result. RETURN_CONST (3.12, 3.13) has its value as its argument."""

KNOWN_RETURNS = RETURNS | {"RETURN_GENERATOR"}
"""RETURN_GENERATOR hands out the generator and does not end the call. Any other RETURN_... is new, and is refused."""

JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs, *getattr(dis, "hasjump", ())})
"""The numbers of the operations that jump."""

STARTS = frozenset({"RESUME"})
"""Here the function's body starts; in a generator it also goes on here after a yield."""

MAKES_CELL = frozenset({"MAKE_CELL"})
"""This puts a variable into a cell."""

STORES = frozenset({"STORE_FAST", "STORE_DEREF"})
"""These give a variable a value."""

DELETES = frozenset({"DELETE_FAST", "DELETE_DEREF"})
"""These are the work of a `del`."""

BORROWS = frozenset({"LOAD_FAST_AND_CLEAR"})
"""Here a comprehension saves a variable of the function on the stack, to use the name for its own."""

FILLERS = frozenset({"EXTENDED_ARG", "CACHE"})
"""These only belong to another instruction: they widen its argument, or leave room for its cache."""

_PAIRS = {
    "STORE_FAST_STORE_FAST": ("STORE_FAST", "STORE_FAST"),
    "STORE_FAST_LOAD_FAST": ("STORE_FAST", "LOAD_FAST"),
    "LOAD_FAST_LOAD_FAST": ("LOAD_FAST", "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": ("LOAD_FAST_BORROW", "LOAD_FAST_BORROW"),
}
"""3.13 and later do two steps in one instruction, and the rewriter may have to work between them."""

_SHAM_JUMPS = frozenset({"END_ASYNC_FOR"})
"""From 3.14 on it names the start of its loop, for monitoring only: execution never jumps there."""


class Storage(Enum):
    """Where the interpreter keeps a variable of a function."""

    FRAME = "in the call's frame"
    CELL = "in a cell that inner functions share"
    FREE = "in a cell of an outer function"


def why_unsupported() -> str | None:
    """Why this interpreter's code cannot be rewritten; None where it can."""
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
    """Raise UnsupportedPythonError, with the reason, where this interpreter's code cannot be rewritten."""
    reason = why_unsupported()
    if reason:
        raise UnsupportedPythonError(
            f"get_local cannot be activated: {reason}. Without activation decorated functions run as they are; "
            "a newer release of get-local may know this interpreter."
        )


def halves(operation: str, argument: Any, shown: str) -> list[tuple[str, Any, str]]:
    """The one or two steps of an instruction, as (operation, argument, argument as `dis` shows it)."""
    if operation in _PAIRS:
        return [(half, name, str(name)) for half, name in zip(_PAIRS[operation], argument, strict=True)]
    if operation == "RETURN_CONST":
        return [("LOAD_CONST", argument, shown), ("RETURN_VALUE", None, "")]
    return [(operation, argument, shown)]


def split(instr: Instr) -> list[Instr]:
    """The instructions of one step each that do the same."""
    at = instr.location
    if instr.name in _PAIRS and isinstance(instr.arg, tuple):
        return [
            step for half, name in zip(_PAIRS[instr.name], instr.arg, strict=True) for step in _one(half, name, at=at)
        ]
    if instr.name == "RETURN_CONST":
        return [*load_constant(instr.arg, at), *_one("RETURN_VALUE", at=at)]
    return [instr]


def line_of(instr: Instr) -> int | None:
    """The line of the source that an instruction belongs to."""
    return instr.location.lineno if instr.location is not None else None


def variable_of(instr: Instr) -> str | None:
    """The name of the variable that an instruction on one variable works on."""
    return instr.arg if isinstance(instr.arg, str) else getattr(instr.arg, "name", None)


def unknown_returns(instructions: Iterable[Instr]) -> set[str]:
    """The ways to return among the instructions that this file does not know."""
    return {instr.name for instr in instructions if instr.name.startswith("RETURN")} - KNOWN_RETURNS


def may_borrow(code: CodeType) -> bool:
    """Whether a comprehension in the function may borrow its variables: cheap, and False only where none does."""
    # Half of the bytes are arguments, and one of those may equal the opcode.
    return COMPREHENSIONS_ARE_INLINED and any(dis.opmap.get(name, -1) in code.co_code for name in BORROWS)


def globals_of(code: CodeType) -> set[str]:
    """The names that code looks up among the globals of its module."""
    return {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}


def attributes_of(code: CodeType) -> set[str]:
    """The names that code asks other things for, and what it takes from modules that it imports."""
    asking = ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")
    return {step.argval for step in dis.get_instructions(code) if step.opname in asking}


def imports_of(code: CodeType) -> set[str]:
    """The modules that code imports, by the names that it has for them."""
    return {step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}


def multiplies_matrices(code: CodeType) -> bool:
    """Whether code has the operator @ in it."""
    return any(step.opname == "BINARY_OP" and step.argrepr in ("@", "@=") for step in dis.get_instructions(code))


def jumps(instr: Instr) -> bool:
    """Whether execution may go on at the label that it names."""
    return instr.has_jump() and instr.name not in _SHAM_JUMPS


def slot_after(instr: Instr, slot: int, depth: int) -> int | None:
    """Where a value of the stack lies after an instruction; None where a variable takes it.

    Args:
        instr: one that leaves the value alone, or stores it, or swaps it.
        slot: how many values lie beneath it before.
        depth: how many values the stack has before.
    """
    top = depth - 1
    if instr.name == "STORE_FAST" and slot == top:
        return None
    if instr.name == "SWAP":
        other = depth - int(instr.arg)  # type: ignore[arg-type]
        return other if slot == top else top if slot == other else slot
    return slot


def load_hook(hook: str, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... hook, null. True adds the null, on the side of the hook where this version expects it."""
    return _one("LOAD_GLOBAL", (True, hook), at=at)


def load_marker(hook: str, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... hook. The hook itself means "unbound": no variable of the user's can hold it."""
    return _one("LOAD_GLOBAL", (False, hook), at=at)


def load_constant(value: Any, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... value."""
    return _one("LOAD_CONST", value, at=at)


def load_variable(name: str, storage: Storage, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... -> ... value; an unbound variable raises NameError or UnboundLocalError."""
    from bytecode.instr import CellVar, FreeVar

    if storage is Storage.FRAME:
        return _one("LOAD_FAST_CHECK" if LOADS_MUST_BE_CHECKED else "LOAD_FAST", name, at=at)
    return _one("LOAD_DEREF", FreeVar(name) if storage is Storage.FREE else CellVar(name), at=at)


def build_tuple(count: int, at: InstrLocation | None) -> list[Instr]:
    """Stack: ... value1 .. valueN -> ... (value1, .., valueN)."""
    return _one("BUILD_TUPLE", count, at=at)


def call_hook(at: InstrLocation | None) -> list[Instr]:
    """Stack: ... hook, null, key, value -> ... (the hook's result is dropped)."""
    prepare = _one("PRECALL", 2, at=at) if CALLS_ARE_PREPARED else []
    return [*prepare, *_one("CALL", 2, at=at), *drop(at)]


def drop(at: InstrLocation | None) -> list[Instr]:
    """Stack: ... value -> ..."""
    return _one("POP_TOP", at=at)


def skip_to(label: Label, at: InstrLocation | None) -> list[Instr]:
    """Go on at a label further down."""
    return _one("JUMP_FORWARD", label, at=at)


def _one(operation: str, *argument: Any, at: InstrLocation | None) -> list[Instr]:
    """A single instruction. `bytecode` is imported only now, because whoever never captures does not need it."""
    from bytecode import Instr

    return [Instr(operation, *argument, location=at)]

"""Which locals are to be captured from a function, and what its code does with them, read without changing it.

Nothing here imports `bytecode` before a function is taken apart.
"""

from __future__ import annotations

from functools import lru_cache
from types import CodeType
from typing import TYPE_CHECKING, Literal, NamedTuple

from .. import opcodes
from ..errors import RewriteError

if TYPE_CHECKING:
    from bytecode import Instr

    from .variables import Variables

At = Literal["return", "assign"]

HOOK = "__get_local__"
"""The global or builtin name under which rewritten code finds its hook."""


class Capture(NamedTuple):
    """Which locals go to the hook, and when."""

    names: tuple[str, ...]
    """Locals, out of `local_names(code)`."""
    at: At
    """"return": their values at every return. "assign": every value assigned to them."""
    key: str
    """The hook gets it with each value. It is a string, so that the code can still be marshalled."""
    owner: str | None = None
    """A parameter that goes before the values: the object whose method is called."""


def local_names(code: CodeType) -> tuple[str, ...]:
    """The names that can be captured from a function's code, its parameters first.

    >>> def scale(x, by=2):
    ...     product = x * by
    ...     return product
    >>> local_names(scale.__code__)
    ('x', 'by', 'product')

    These are parameters, assigned names, names that inner functions share, and names of outer functions that it uses. A
    comprehension's own variable is not among them. From Python 3.12 on it lives in the function's frame, but it is a
    local of the comprehension, as it is on 3.11.
    """
    names = dict.fromkeys((*code.co_varnames, *code.co_cellvars, *code.co_freevars))
    if opcodes.may_borrow(code) and opcodes.why_unsupported() is None:
        try:
            variables = _variables(code)
        except RewriteError:
            return tuple(names)  # only those who want it rewritten need to hear of the refusal
        names = {name: None for name in names if variables.has(name)}
    return tuple(names)


def assigned_lines(code: CodeType, name: str) -> tuple[int, ...]:
    """The lines on which a function's code assigns to a name, in order.

    >>> def scale(x):
    ...     if x:
    ...         attn = 2 * x
    ...     return x
    >>> lines = assigned_lines(scale.__code__, "attn")
    >>> [line - scale.__code__.co_firstlineno for line in lines]
    [2]
    """
    lines = {opcodes.line_of(instr) for instr in _variables(code).assignments(name)}
    return tuple(sorted(line for line in lines if line is not None))


def assigns(code: CodeType, name: str) -> bool:
    """Whether a function's code assigns to a name; the value that a parameter has from the caller does not count.

    >>> def scale(x):
    ...     attn = 2 * x
    >>> assigns(scale.__code__, "attn"), assigns(scale.__code__, "x")
    (True, False)
    """
    return bool(_variables(code).assignments(name))


def deletes(code: CodeType, name: str) -> bool:
    """Whether a function's code has a `del` of the name; that of an `except ... as` does not count.

    >>> def scale(x):
    ...     attn = 2 * x
    ...     del attn
    >>> deletes(scale.__code__, "attn"), deletes(scale.__code__, "x")
    (True, False)
    """
    of_name = _instructions_on(code, name)
    stored = [instr.location for instr in of_name if instr.name in opcodes.STORES]
    return any(instr.name in opcodes.DELETES and instr.location not in stored for instr in of_name)


@lru_cache(maxsize=256)  # capture() asks this of the same function each time, and taking code apart takes a millisecond
def rebinds(code: CodeType, name: str) -> bool:
    """Whether a parameter may have another value at a return than the one that was passed, or no value.

    >>> def scale(self, x):
    ...     self = None
    ...     return x
    >>> rebinds(scale.__code__, "self"), rebinds(scale.__code__, "x")
    (True, False)
    """
    is_changed = any(instr.name in opcodes.STORES | opcodes.DELETES for instr in _instructions_on(code, name))
    # A comprehension that borrows the name puts its value back, so the stores alone prove nothing.
    if is_changed and (assigns(code, name) or deletes(code, name)):
        return True
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(name in function.co_freevars and rebinds(function, name) for function in inner)


def _variables(code: CodeType) -> Variables:
    from .variables import Variables, disassemble

    return Variables(disassemble(code), code)


def _instructions_on(code: CodeType, name: str) -> list[Instr]:
    """The instructions that work on one variable."""
    from .variables import disassemble, instructions

    return [instr for instr in instructions(disassemble(code)) if opcodes.variable_of(instr) == name]

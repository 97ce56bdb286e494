"""A code object taken apart into instructions of one step each, and what an instruction says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any

from bytecode import Bytecode, Instr

from .. import opcodes
from ..errors import RewriteError
from ..proof import refusal


def disassemble(code: CodeType) -> Bytecode:
    """The instructions, labels and exception regions of a code object; RewriteError where that fails."""
    try:
        bytecode = Bytecode.from_code(code, conserve_exception_block_stackdepth=True)
    except Exception as error:
        raise RewriteError(refusal(code, f"the bytecode package could not take it apart: {error!r}")) from error
    # The package numbers variables by their first use. Given all of them as arguments, it keeps their order.
    bytecode.argnames = list(code.co_varnames)
    # In code without a docstring a string that comes first would become one; the hook's key must not.
    if not isinstance(bytecode.docstring, str):
        bytecode.docstring = None
    items: list[Any] = []
    for item in bytecode:
        items += opcodes.split(item) if isinstance(item, Instr) else [item]
    bytecode[:] = items
    unknown = opcodes.unknown_returns(instructions(bytecode))
    if unknown:
        raise RewriteError(refusal(code, f"it returns by {', '.join(sorted(unknown))}, which is not known"))
    return bytecode


def instructions(bytecode: Bytecode) -> Iterator[Instr]:
    """The instructions alone, without labels and the borders of exception regions."""
    return (item for item in bytecode if isinstance(item, Instr))


def line_of(instr: Instr) -> int | None:
    """The line of the source that an instruction belongs to."""
    return instr.location.lineno if instr.location is not None else None


def variable_of(instr: Instr) -> str | None:
    """The name of the variable that an instruction on one variable works on."""
    return instr.arg if isinstance(instr.arg, str) else getattr(instr.arg, "name", None)

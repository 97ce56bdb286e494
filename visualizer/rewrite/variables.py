"""A function taken apart: its instructions, what kind of variable each name is, and which stores are assignments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any

from bytecode import Bytecode, Instr

from .. import opcodes
from ..errors import RewriteError
from ..opcodes import Storage, variable_of
from ..proof import refusal
from .paths import borrowed


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


class Variables:
    """The variables of a function, as its bytecode uses them. It does not follow later changes to the bytecode."""

    def __init__(self, bytecode: Bytecode, code: CodeType) -> None:
        self._items = list(bytecode)
        self._position = {id(item): index for index, item in enumerate(self._items)}
        stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        self._parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]
        self._start = next((i for i, instr in self._instructions() if instr.name in opcodes.STARTS), 0)
        before = (instr for i, instr in self._instructions() if i < self._start)
        self._cells = {variable_of(instr) for instr in before if instr.name in opcodes.MAKES_CELL}
        self._free = set(bytecode.freevars)
        self._borrowed = borrowed(self._items, self._start) if opcodes.COMPREHENSIONS_ARE_INLINED else {}

    def _instructions(self) -> Iterator[tuple[int, Instr]]:
        return ((index, item) for index, item in enumerate(self._items) if isinstance(item, Instr))

    def storage(self, name: str) -> Storage:
        """Where the function's variable of that name is kept."""
        # A comprehension may make a cell of its own for a name that is free in the function, so free comes first. And
        # it makes cells of plain locals only after the start, so a name in co_cellvars need not be a cell at a return.
        if name in self._free:
            return Storage.FREE
        return Storage.CELL if name in self._cells else Storage.FRAME

    def is_always_bound(self, name: str) -> bool:
        """Whether it is a parameter that nothing ever unbinds, so that its load cannot fail."""
        return (
            name in self._parameters
            and self.storage(name) is Storage.FRAME
            and not any(
                variable_of(instr) == name and instr.name in opcodes.DELETES | opcodes.BORROWS
                for _, instr in self._instructions()
            )
        )

    def has(self, name: str) -> bool:
        """Whether a name is a variable of the function, and not only of comprehensions in it."""
        if name not in self._borrowed or name in self._free or name in self._parameters:
            return True
        inside = self._borrowed[name]
        return any(
            variable_of(instr) == name and index not in inside and instr.name not in opcodes.BORROWS
            for index, instr in self._instructions()
            if index > self._start  # before it, cells are made, for the variables of comprehensions too
        )

    def assigns(self, instr: Instr, names: Sequence[str]) -> bool:
        """Whether an instruction is the store of an assignment to one of the names."""
        name, index = variable_of(instr), self._position.get(id(instr))
        if index is None or instr.name not in opcodes.STORES or name is None or name not in names:
            return False
        return index not in self._borrowed.get(name, set()) and not self._ends_except_clause(index, instr)

    def assignments(self, name: str) -> list[Instr]:
        """The stores of all assignments to the name."""
        return [instr for _, instr in self._instructions() if self.assigns(instr, (name,))]

    def _ends_except_clause(self, index: int, store: Instr) -> bool:
        """`except E as e` ends with a hidden `e = None; del e`, both at the same place in the source."""
        following = next((item for item in self._items[index + 1 : index + 6] if isinstance(item, Instr)), None)
        return (
            following is not None
            and following.name in opcodes.DELETES
            and variable_of(following) == variable_of(store)
            and following.location == store.location
        )

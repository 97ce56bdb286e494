"""The proof that rewritten code is the original and the injected instructions, and nothing else.

Both are read back with `dis`, not with the package that assembled them: instruction by instruction the same operations
on the same names and constants, the same jumps, exception handlers, lines and columns.
"""

from __future__ import annotations

import dis
from types import CodeType
from typing import Any, NamedTuple

from . import opcodes
from .errors import RewriteError

_KEPT = (
    *("co_name", "co_qualname", "co_filename", "co_firstlineno", "co_flags"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals"),
    *("co_varnames", "co_cellvars", "co_freevars"),
)


def refusal(code: CodeType, reason: str) -> str:
    """The message of a RewriteError."""
    return (
        f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}) cannot be rewritten and was left as it is: "
        f"{reason}. To capture from it, move the lines that compute the value into a function of their own."
    )


class _Step(NamedTuple):
    """One instruction with all that it means, free of offsets and numbering."""

    operation: str
    argument: Any
    shown: str
    place: Any
    line: int | None
    handler: tuple[int, int, bool] | None


def _steps(code: CodeType, dropped: set[int]) -> list[_Step]:
    """A code object's instructions but the dropped ones; jumps and handlers by the step that they lead to."""
    jumps = {*dis.hasjrel, *dis.hasjabs, *getattr(dis, "hasjump", ())}
    resolved = {*dis.hasconst, *dis.hasname, *dis.haslocal, *dis.hasfree}
    drafts: list[tuple[str, Any, str, Any, int, bool]] = []
    step_at: dict[int, int] = {}
    index = -1
    for instruction in dis.get_instructions(code):
        step_at[instruction.offset] = len(drafts)  # an EXTENDED_ARG leads to the instruction that it extends
        if instruction.opname in ("EXTENDED_ARG", "CACHE"):
            continue
        index += 1
        if index in dropped:
            continue
        name, value, shown = instruction.opname, instruction.argval, instruction.argrepr
        place, offset, is_jump = instruction.positions, instruction.offset, instruction.opcode in jumps
        if name in opcodes.PAIRS:
            for half, variable in zip(opcodes.PAIRS[name], value, strict=True):
                drafts.append((half, variable, str(variable), place, offset, False))
        elif name == "RETURN_CONST":
            drafts.append(("LOAD_CONST", value, shown, place, offset, False))
            drafts.append(("RETURN_VALUE", None, "", place, offset, False))
        elif is_jump:
            drafts.append((name, value, "", place, offset, True))
        elif instruction.opcode in resolved:
            drafts.append((name, value, shown, place, offset, False))
        else:
            drafts.append((name, instruction.arg, "", place, offset, False))
    disassembly: Any = dis.Bytecode(code)
    regions = [
        (entry.start, entry.end, (step_at[entry.target], entry.depth, bool(entry.lasti)))
        for entry in disassembly.exception_entries
    ]
    lines = {offset: line for start, end, line in code.co_lines() for offset in range(start, end, 2)}
    steps = []
    for name, value, shown, place, offset, is_jump in drafts:
        handler = next((to for start, end, to in regions if start <= offset < end), None)
        steps.append(_Step(name, step_at[value] if is_jump else value, shown, place, lines.get(offset), handler))
    return steps


def prove(code: CodeType, rewritten: CodeType, injected: set[int]) -> None:
    """Raise RewriteError unless the rewritten code is the original and the injected instructions, and nothing else."""
    for attribute in _KEPT:
        before, after = getattr(code, attribute), getattr(rewritten, attribute)
        if before != after:
            raise RewriteError(refusal(code, f"its {attribute} would change from {before!r} to {after!r}"))
    before_steps, after_steps = _steps(code, set()), _steps(rewritten, injected)
    if len(before_steps) != len(after_steps):
        raise RewriteError(refusal(code, f"{len(before_steps)} instructions would become {len(after_steps)}"))
    for before, after in zip(before_steps, after_steps, strict=True):
        same_argument = before.argument is after.argument or (
            type(before.argument) is type(after.argument) and repr(before.argument) == repr(after.argument)
        )
        if not same_argument or before._replace(argument=None) != after._replace(argument=None):
            raise RewriteError(refusal(code, f"{before} would become {after}"))

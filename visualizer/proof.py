"""The proof that rewritten code is the original plus the injected instructions, and nothing else.

It reads both with `dis`, not with the package that assembled them, and compares them instruction by instruction: the
operations, their names and constants, jumps, exception handlers, lines and columns.
"""

from __future__ import annotations

import dis
from types import CodeType
from typing import Any, NamedTuple

from . import opcodes
from .errors import RewriteError

_UNCHANGED = (
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
    """One step with all that it means, free of offsets and of the numbers of names and constants."""

    operation: str
    argument: Any
    shown: str
    place: Any
    line: int | None
    handler: tuple[int, int, bool] | None


def _steps(code: CodeType, dropped: set[int]) -> list[_Step]:
    """The steps of a code object without the dropped instructions; jumps and handlers name the step they lead to."""
    resolved = {*dis.hasconst, *dis.hasname, *dis.haslocal, *dis.hasfree}
    drafts: list[tuple[str, Any, str, Any, int, bool]] = []
    step_at: dict[int, int] = {}
    index = -1
    for instruction in dis.get_instructions(code):
        step_at[instruction.offset] = len(drafts)  # a jump to a filler leads to the instruction that it belongs to
        if instruction.opname in opcodes.FILLERS:
            continue
        index += 1
        if index in dropped:
            continue
        is_jump = instruction.opcode in opcodes.JUMPS
        argument = instruction.argval if is_jump or instruction.opcode in resolved else instruction.arg
        shown = instruction.argrepr if instruction.opcode in resolved and not is_jump else ""
        for step in opcodes.halves(instruction.opname, argument, shown):
            drafts.append((*step, instruction.positions, instruction.offset, is_jump))
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
    """Raise RewriteError unless the rewritten code is the original plus the injected instructions, and nothing else.

    Args:
        code: the original.
        rewritten: what is to take its place.
        injected: the positions of the injected instructions among all of the rewritten code, fillers not counted.
    """
    for attribute in _UNCHANGED:
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

"""Where a comprehension uses a variable of the function for its own (PEP 709, from Python 3.12 on).

The interpreter saves the function's value on the stack, and stores it back after the comprehension. So the name belongs
to the comprehension for as long as the saved value lies on the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bytecode import Instr

from .. import opcodes
from ..opcodes import variable_of
from .paths import Paths


def borrowed(items: Sequence[Any], start: int) -> dict[str, set[int]]:
    """For each name that a comprehension uses for its own, the positions of the instructions where it does.

    Args:
        items: a function's bytecode: instructions, labels and the borders of exception regions.
        start: the position from which a call runs.

    From each instruction that saves a variable, it follows every path until the saved value leaves the stack.
    """
    saves = [(i, item) for i, item in enumerate(items) if isinstance(item, Instr) and opcodes.borrows(item)]
    if not saves:
        return {}
    paths = Paths(items, start)
    inside: dict[str, set[int]] = {}
    for save, instr in saves:
        if save in paths.depths:  # otherwise it never runs
            inside.setdefault(str(variable_of(instr)), set()).update(paths.while_on_stack(save))
    return inside

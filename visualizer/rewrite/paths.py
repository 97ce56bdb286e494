"""The ways that execution can take through a function's bytecode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bytecode import Instr
from bytecode.instr import TryBegin, TryEnd

from .. import opcodes
from ..opcodes import variable_of


class Paths:
    """Where execution can go in a function's bytecode, and how many values the stack has there."""

    def __init__(self, items: Sequence[Any], start: int) -> None:
        self._items = items
        self._position = {id(item): index for index, item in enumerate(items)}
        self._regions: dict[int, TryBegin] = {}
        region: TryBegin | None = None
        for index, item in enumerate(items):
            if isinstance(item, TryBegin):
                region = item
            elif isinstance(item, TryEnd):
                region = None
            elif region is not None:
                self._regions[index] = region
        self.depths: dict[int, int] = {}
        """How many values the stack has at each position that execution can reach."""
        ways = [(start, 0)]
        while ways:
            index, depth = ways.pop()
            if index < len(items) and index not in self.depths:
                self.depths[index] = depth
                ways.extend((after, there) for after, there, _ in self._after(index))

    def _after(self, index: int) -> Iterator[tuple[int, int, int]]:
        """(position, depth of the stack there, how many of its values stay as they are) of each way on."""
        item, depth = self._items[index], self.depths[index]
        if not isinstance(item, Instr):
            yield index + 1, depth, depth
            return
        if index in self._regions:
            region = self._regions[index]
            assert isinstance(region.stack_depth, int)
            unwound = region.stack_depth
            yield self._position[id(region.target)], unwound + region.push_lasti + 1, unwound
        if opcodes.jumps(item):
            left = depth + item.stack_effect(jump=True)
            yield self._position[id(item.arg)], left, left
        if not item.is_final():
            left = depth + item.stack_effect(jump=False)
            yield index + 1, left, left

    def while_on_stack(self, push: int) -> set[int]:
        """The positions of the instructions that run while the value that one pushes lies on the stack."""
        inside: set[int] = set()
        seen: set[tuple[int, int]] = set()
        ways = [(push + 1, self.depths[push])]
        while ways:
            index, slot = ways.pop()
            if (index, slot) in seen or index not in self.depths:
                continue
            seen.add((index, slot))
            item = self._items[index]
            if isinstance(item, Instr):
                inside.add(index)
                moved = opcodes.slot_after(item, slot, self.depths[index])
                if moved is None:
                    continue
                slot = moved
            ways.extend((after, slot) for after, _, kept in self._after(index) if kept > slot)
        return inside


def borrowed(items: Sequence[Any], start: int) -> dict[str, set[int]]:
    """For each name that a comprehension uses for its own, the positions of the instructions where it does.

    Args:
        items: a function's bytecode: instructions, labels and the borders of exception regions.
        start: the position from which a call runs.

    From Python 3.12 on (PEP 709) the interpreter saves the function's value on the stack, and stores it back after the
    comprehension. So from each instruction that saves a variable, every path is followed until the saved value leaves
    the stack.
    """
    saves = [(i, item) for i, item in enumerate(items) if isinstance(item, Instr) and item.name in opcodes.BORROWS]
    if not saves:
        return {}
    paths = Paths(items, start)
    inside: dict[str, set[int]] = {}
    for save, instr in saves:
        if save in paths.depths:  # otherwise it never runs
            inside.setdefault(str(variable_of(instr)), set()).update(paths.while_on_stack(save))
    return inside

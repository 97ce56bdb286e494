"""`Writer` puts hook calls into a function's bytecode."""

from __future__ import annotations

from types import CodeType
from typing import Any

from bytecode import Instr, Label
from bytecode.instr import InstrLocation, TryBegin, TryEnd

from .. import opcodes
from .line_table import line_table
from .locals import HOOK, Capture
from .variables import Variables, disassemble, instructions


class Writer:
    """A function's bytecode with hook calls in it, and which of its instructions are injected."""

    def __init__(self, code: CodeType) -> None:
        self._code = code
        self._bytecode = disassemble(code)
        self._variables = Variables(self._bytecode, code)
        self._injected: set[int] = set()
        self._room = 0

    def add(self, capture: Capture) -> None:
        """Put the capture's hook calls in, behind those of earlier captures."""
        # Above what the function itself stacks: hook, null, key, name, line, the values and an exception.
        self._room = max(self._room, 7 + len(capture.names))
        if capture.at == "return":
            self._call_at_returns(capture)
        else:
            self._call_at_assignments(capture)

    def injected_indices(self) -> set[int]:
        """The injected instructions, by their position among all instructions."""
        return {index for index, instr in enumerate(instructions(self._bytecode)) if id(instr) in self._injected}

    def assemble(self) -> CodeType:
        """The new code object."""
        stacksize = self._code.co_stacksize + self._room
        code = self._bytecode.to_code(stacksize=stacksize, compute_exception_stack_depths=False)
        return code.replace(co_linetable=line_table(code))

    def _call_at_returns(self, capture: Capture) -> None:
        items: list[Any] = []
        names = capture.names if capture.owner is None else (capture.owner, *capture.names)
        # The exception region around the item, and the part of it that is open since it was last split.
        region: TryBegin | None = None
        part: TryBegin | None = None
        for item in self._bytecode:
            if isinstance(item, TryBegin):
                region = part = item
            elif isinstance(item, TryEnd) and item.entry is region and part is not None:
                item = TryEnd(part)
                region = part = None
            elif isinstance(item, Instr) and item.name in opcodes.RETURNS:
                at = item.location
                self._put(items, opcodes.load_hook(HOOK, at))
                self._put(items, opcodes.load_constant(capture.key, at))
                for count, name in enumerate(names):
                    if self._variables.is_always_bound(name):
                        self._put_load(items, name, at)
                    else:
                        beneath = 1 + 3 + count  # the result; hook, null and key; the values so far
                        part = self._put_load_or_marker(items, name, beneath, part, at)
                if len(names) > 1:
                    self._put(items, opcodes.build_tuple(len(names), at))
                self._put(items, opcodes.call_hook(at))
            items.append(item)
        self._bytecode[:] = items

    def _call_at_assignments(self, capture: Capture) -> None:
        items: list[Any] = []
        has_started = False
        nowhere = InstrLocation(None, None, None, None)  # no line: tracers must not see one before the body's first
        for item in self._bytecode:
            items.append(item)
            if not isinstance(item, Instr):
                continue
            if item.name in opcodes.STARTS and not has_started:
                has_started = True
                self._put(items, opcodes.load_hook(HOOK, nowhere))
                self._put(items, opcodes.load_constant(capture.key, nowhere))
                if capture.owner is None:
                    self._put(items, opcodes.load_constant(None, nowhere))
                else:
                    self._put_load(items, capture.owner, nowhere)
                    self._put(items, opcodes.build_tuple(1, nowhere))
                self._put(items, opcodes.call_hook(nowhere))
            elif self._variables.assigns(item, capture.names):
                name, at = str(opcodes.variable_of(item)), item.location
                line = opcodes.line_of(item)
                self._put(items, opcodes.load_hook(HOOK, at))
                self._put(items, opcodes.load_constant(capture.key, at))
                self._put(items, opcodes.load_constant(name, at))
                self._put(items, opcodes.load_constant(self._bytecode.first_lineno if line is None else line, at))
                self._put_load(items, name, at)
                self._put(items, opcodes.build_tuple(3, at))
                self._put(items, opcodes.call_hook(at))
        self._bytecode[:] = items

    def _put_load_or_marker(
        self, items: list[Any], name: str, beneath: int, part: TryBegin | None, at: InstrLocation | None
    ) -> TryBegin | None:
        """Put in: try to load the variable; where it is unbound, load the marker.

        Args:
            items: what the instructions are appended to.
            name: the variable.
            beneath: how many values the stack has before.
            part: the exception region that is open there. Regions may not nest, so it ends before and goes on behind.
            at: the place in the source.

        Returns:
            The region that is open behind.
        """
        # The handler stands in line: at the end of the code its jump back would be a `line` event on 3.11. And as it
        # stands between load and call, what precedes the call is not the region, where 3.13 would look up the handler
        # of an exception that the hook raises.
        handler, after = Label(), Label()
        attempt = TryBegin(handler, False, beneath)
        if part is not None:
            items.append(TryEnd(part))
        items.append(attempt)
        self._put_load(items, name, at)
        items.append(TryEnd(attempt))
        if part is not None:
            part = TryBegin(part.target, part.push_lasti, part.stack_depth)
            items.append(part)
        self._put(items, opcodes.skip_to(after, at))
        items.append(handler)
        self._put(items, opcodes.drop(at))
        self._put(items, opcodes.load_marker(HOOK, at))
        items.append(after)
        return part

    def _put_load(self, items: list[Any], name: str, at: InstrLocation | None) -> None:
        self._put(items, opcodes.load_variable(name, self._variables.storage(name), at))

    def _put(self, items: list[Any], injected: list[Instr]) -> None:
        self._injected.update(map(id, injected))
        items.extend(injected)

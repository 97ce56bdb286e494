"""`Writer` puts hook calls into a function's bytecode."""

from __future__ import annotations

from types import CodeType
from typing import Any

from bytecode import Instr, Label
from bytecode.instr import InstrLocation, TryBegin, TryEnd

from .. import opcodes
from .line_table import line_table
from .locals import HOOK, Capture
from .paths import Paths
from .variables import Variables, disassemble, instructions


class _Items(list[Any]):
    """New bytecode. Regions may not nest, so those of the function are interrupted where a region of ours stands."""

    def __init__(self) -> None:
        super().__init__()
        self._part: TryBegin | None = None  # of the open region, what has begun since it was last interrupted

    def append(self, item: Any) -> None:
        """Add an item of the function's."""
        if isinstance(item, TryBegin):
            self._part = item
        elif isinstance(item, TryEnd) and self._part is not None:
            item, self._part = TryEnd(self._part), None
        super().append(item)

    def append_region(self, begin: TryBegin, inside: list[Instr]) -> None:
        """Add a region of ours with its instructions."""
        interrupted = self._part
        self.extend([] if interrupted is None else [TryEnd(interrupted)])
        self.extend([begin, *inside, TryEnd(begin)])
        if interrupted is not None:
            self.append(TryBegin(interrupted.target, interrupted.push_lasti, interrupted.stack_depth))


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
        items = _Items()
        names = capture.names if capture.owner is None else (capture.owner, *capture.names)
        for item in self._bytecode:
            if isinstance(item, Instr) and opcodes.returns(item):
                at = item.location
                absent = self._put_hook_and_key(items, capture.key, 1, at)
                for count, name in enumerate(names):
                    # Beneath: the result; hook, null and key; the values so far.
                    self._put_load_or_marker(items, name, 1 + 3 + count, at)
                if len(names) > 1:
                    self._put(items, opcodes.build_tuple(len(names), at))
                self._put_call(items, absent, at)
            items.append(item)
        self._bytecode[:] = items

    def _call_at_assignments(self, capture: Capture) -> None:
        old, items = list(self._bytecode), _Items()
        nowhere = InstrLocation(None, None, None, None)  # no line: tracers must not see one before the body's first
        start = next(i for i, item in enumerate(old) if isinstance(item, Instr) and opcodes.starts(item))
        depths = Paths(old, start).depths
        for index, item in enumerate(old):
            items.append(item)
            if index == start:
                absent = self._put_hook_and_key(items, capture.key, 0, nowhere)
                if capture.owner is None:
                    self._put(items, opcodes.load_constant(None, nowhere))
                else:
                    self._put_load(items, capture.owner, nowhere)
                    self._put(items, opcodes.build_tuple(1, nowhere))
                self._put_call(items, absent, nowhere)
            elif isinstance(item, Instr) and self._variables.assigns(item, capture.names):
                name, at = str(opcodes.variable_of(item)), item.location
                line = opcodes.line_of(item)
                absent = self._put_hook_and_key(items, capture.key, depths.get(index + 1, 0), at)
                self._put(items, opcodes.load_constant(name, at))
                self._put(items, opcodes.load_constant(self._bytecode.first_lineno if line is None else line, at))
                self._put_load(items, name, at)
                self._put(items, opcodes.build_tuple(3, at))
                self._put_call(items, absent, at)
        self._bytecode[:] = items

    # Each handler stands in line: at the end of the code its jump back would be a `line` event on 3.11. And what
    # precedes a call is in no region of ours, where 3.13 would look up the handler of an exception from the hook.

    def _put_hook_and_key(self, items: _Items, key: str, beneath: int, at: InstrLocation | None) -> Label:
        """Put in: load the hook and the key. Where there is no hook, go on at the label, with the exception stacked.

        Args:
            items: what the instructions are appended to.
            key: what the hook gets first.
            beneath: how many values the stack has before.
            at: the place in the source.
        """
        absent = Label()
        self._put_attempt(items, opcodes.load_hook(HOOK, at), beneath, absent)
        self._put(items, opcodes.load_constant(key, at))
        return absent

    def _put_call(self, items: _Items, absent: Label, at: InstrLocation | None) -> None:
        """Put in: call the hook with what is stacked; at the label, do without."""
        end = Label()
        self._put(items, opcodes.call_hook(at))
        self._put(items, opcodes.skip_to(end, at))
        items.append(absent)
        self._put(items, opcodes.drop(at))
        items.append(end)

    def _put_load_or_marker(self, items: _Items, name: str, beneath: int, at: InstrLocation | None) -> None:
        """Put in: load the variable; where it is unbound, load the marker. The arguments are as above."""
        if self._variables.is_always_bound(name):
            self._put_load(items, name, at)
            return
        unbound, after = Label(), Label()
        load = opcodes.load_variable(name, self._variables.storage(name), at)
        self._put_attempt(items, load, beneath, unbound)
        self._put(items, opcodes.skip_to(after, at))
        items.append(unbound)
        self._put(items, opcodes.drop(at))
        self._put(items, opcodes.load_marker(HOOK, at))
        items.append(after)

    def _put_attempt(self, items: _Items, injected: list[Instr], beneath: int, handler: Label) -> None:
        """Put in instructions that may raise: then the stack is cut to `beneath`, and the handler runs."""
        self._injected.update(map(id, injected))
        items.append_region(TryBegin(handler, False, beneath), injected)

    def _put_load(self, items: _Items, name: str, at: InstrLocation | None) -> None:
        self._put(items, opcodes.load_variable(name, self._variables.storage(name), at))

    def _put(self, items: _Items, injected: list[Instr]) -> None:
        self._injected.update(map(id, injected))
        items.extend(injected)

"""Rewrite a code object so that named locals reach a hook, and prove that nothing else changed.

Pure: (code, names, at, key) -> code. It knows no store and no tensor; the rewritten code looks the hook up as a global
of its function, under the name `HOOK`, so any two-argument callable put there will do.

    at="return"  before every return, while the result waits on the stack: hook(key, value), or
                 hook(key, (value1, value2, ...)) for several names; an unbound name is passed as the hook itself
    at="assign"  once as a call begins: hook(key, None); after each assignment: hook(key, (name, line, value))

With an owner, a parameter such as `self`, the values of a return are hook(key, (owner, value1, ...)), and the beginning
of a call is hook(key, (owner,)).

The proof: the rewritten code without the injected instructions is, instruction by instruction, the original:
the same operations on the same names and constants, the same jumps, exception handlers, lines and columns.
A function that fails it is refused with `RewriteError` and left as it was.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby
from types import CodeType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from . import opcodes
from .errors import RewriteError, UnknownLocalError
from .opcodes import Kind
from .proof import prove, refusal

if TYPE_CHECKING:
    from bytecode import Bytecode, Instr
    from bytecode.instr import TryBegin

At = Literal["return", "assign"]

HOOK = "__get_local__"
"""The global name under which rewritten code finds its hook."""


def local_names(code: CodeType) -> tuple[str, ...]:
    """The names that can be captured from a function's code, its parameters first.

    >>> def scale(x, by=2):
    ...     product = x * by
    ...     return product
    >>> local_names(scale.__code__)
    ('x', 'by', 'product')

    Parameters, assigned names, those that inner functions share, and those of outer functions that it uses. From
    Python 3.12 on a comprehension's own variable lives in the function's frame too; it is none of the function's locals
    (as on 3.11, where it has a frame of its own) and is not listed.
    """
    names = dict.fromkeys((*code.co_varnames, *code.co_cellvars, *code.co_freevars))
    # Half of the bytes are arguments, which may look like the opcode: a cheap test that is never wrongly negative.
    may_borrow = opcodes.COMPREHENSIONS_ARE_INLINED and dis.opmap.get("LOAD_FAST_AND_CLEAR", -1) in code.co_code
    if may_borrow and opcodes.why_unsupported() is None:
        try:
            flow = _Flow(_disassemble(code), code)
        except RewriteError:
            return tuple(names)  # a refusal is for those who want it rewritten
        names = {name: None for name in names if flow.is_the_functions_own(name)}
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
    flow = _Flow(_disassemble(code), code)
    lines = {_line(instr) for _, instr in flow.instructions() if flow.assigns(instr, (name,))}
    return tuple(sorted(line for line in lines if line is not None))


def assigns(code: CodeType, name: str) -> bool:
    """Whether a function's code assigns to a name at all: what a parameter has from its caller does not count.

    >>> def scale(x):
    ...     attn = 2 * x
    >>> assigns(scale.__code__, "attn"), assigns(scale.__code__, "x")
    (True, False)
    """
    flow = _Flow(_disassemble(code), code)
    return any(flow.assigns(instr, (name,)) for _, instr in flow.instructions())


def deletes(code: CodeType, name: str) -> bool:
    """Whether a function's code has a `del` of the name; that of an `except ... as` does not count.

    >>> def scale(x):
    ...     attn = 2 * x
    ...     del attn
    >>> deletes(scale.__code__, "attn"), deletes(scale.__code__, "x")
    (True, False)
    """
    of_name = [instr for instr in _instructions(_disassemble(code)) if _variable(instr) == name]
    stored = [instr.location for instr in of_name if instr.name in opcodes.STORES]
    return any(instr.name in opcodes.DELETES and instr.location not in stored for instr in of_name)


@lru_cache(maxsize=256)  # capture() asks it of the same function each time, and taking code apart takes a millisecond
def rebinds(code: CodeType, name: str) -> bool:
    """Whether a parameter may hold something else, or nothing, at a return than what was passed.

    >>> def scale(self, x):
    ...     self = None
    ...     return x
    >>> rebinds(scale.__code__, "self"), rebinds(scale.__code__, "x")
    (True, False)
    """
    changing = {*opcodes.STORES, *opcodes.DELETES}
    is_changed = any(_variable(i) == name and i.name in changing for i in _instructions(_disassemble(code)))
    # Not so by a comprehension that borrows the name and puts its value back.
    if is_changed and (assigns(code, name) or deletes(code, name)):
        return True
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(name in function.co_freevars and rebinds(function, name) for function in inner)


class Capture(NamedTuple):
    """What is to be brought to the hook."""

    names: tuple[str, ...]
    """Which locals, out of `local_names(code)`."""
    at: At
    """"return" for the values at every return, "assign" for every value assigned."""
    key: str
    """Handed to the hook with each value; a string, so that the code stays marshallable."""
    owner: str | None = None
    """A parameter that is brought before the values: the object whose method it is."""


def rewrite(code: CodeType, names: Sequence[str], *, at: At = "return", key: str) -> CodeType:
    """A code object that does what `code` does and also brings the locals `names` to a hook.

    >>> def scale(x):
    ...     attn = 2 * x
    ...     return attn + 1
    >>> captured = []
    >>> globals()[HOOK] = lambda key, value: captured.append((key, value))
    >>> scale.__code__ = rewrite(scale.__code__, ["attn"], key="scale")
    >>> scale(3), captured
    (7, [('scale', 6)])

    See `Capture` for the arguments, and `rewrite_for` for what it raises.
    """
    return rewrite_for(code, [Capture(tuple(names), at, key)])


def rewrite_for(code: CodeType, captures: Sequence[Capture]) -> CodeType:
    """A code object that does what `code` does and makes the hook calls of all the captures, in their order.

    Raises:
        UnknownLocalError: `code` has no local of that name.
        RewriteError: the result cannot be proved to mean the same; the message has the reason.
        UnsupportedPythonError: this interpreter's bytecode is not known.
    """
    opcodes.require_supported()
    known = local_names(code)
    for name in (name for capture in captures for name in capture.names):
        if name not in known:
            raise UnknownLocalError(f"{code.co_qualname} has no local {name!r}; it has {', '.join(known)}")
    writer = _Writer(code)
    for capture in captures:
        writer.add(capture)
    try:
        rewritten = writer.assemble()
    except Exception as error:
        raise RewriteError(refusal(code, f"the bytecode package cannot put it together again: {error!r}")) from error
    prove(code, rewritten, writer.injected_indices())
    return rewritten


def _disassemble(code: CodeType) -> Bytecode:
    from bytecode import Bytecode

    try:
        bytecode = Bytecode.from_code(code, conserve_exception_block_stackdepth=True)
    except Exception as error:
        raise RewriteError(refusal(code, f"the bytecode package could not take it apart: {error!r}")) from error
    # The package numbers variables by first use; all of them given as arguments keep the order that they have.
    bytecode.argnames = list(code.co_varnames)
    # A function made from the result takes a string that comes first for its docstring: it must not be the key.
    if not isinstance(bytecode.docstring, str):
        bytecode.docstring = None
    _split_pairs(bytecode)
    unknown = {i.name for i in _instructions(bytecode) if i.name.startswith("RETURN")} - opcodes.KNOWN_RETURNS
    if unknown:
        raise RewriteError(refusal(code, f"it returns by {', '.join(sorted(unknown))}, which is not known"))
    return bytecode


def _split_pairs(bytecode: Bytecode) -> None:
    """Write two-in-one instructions as the two that they stand for, and a constant's return as load and return."""
    from bytecode import Instr

    items: list[Any] = []
    for item in bytecode:
        if isinstance(item, Instr) and item.name in opcodes.PAIRS and isinstance(item.arg, tuple):
            steps = zip(opcodes.PAIRS[item.name], item.arg, strict=True)
            items.extend(Instr(name, variable, location=item.location) for name, variable in steps)
        elif isinstance(item, Instr) and item.name == "RETURN_CONST":
            items.append(Instr("LOAD_CONST", item.arg, location=item.location))
            items.append(Instr("RETURN_VALUE", location=item.location))
        else:
            items.append(item)
    bytecode[:] = items


def _instructions(bytecode: Bytecode) -> Iterator[Instr]:
    from bytecode import Instr

    return (item for item in bytecode if isinstance(item, Instr))


def _line(instr: Instr) -> int | None:
    return instr.location.lineno if instr.location is not None else None


def _variable(instr: Instr) -> str | None:
    """The name of the variable that an instruction on one variable works on."""
    return instr.arg if isinstance(instr.arg, str) else getattr(instr.arg, "name", None)


def _line_table(code: CodeType) -> bytes:
    """A code object's line table, written anew from its positions.

    The bytecode package puts columns from 128 on into single bytes, whose highest bit begins another entry: whoever
    reads lines only, as tracebacks do, gets wrong ones from there on. The format is CPython's Objects/locations.md.
    """

    def number(value: int) -> Iterator[int]:
        while value > 63:
            yield value & 63 | 64
            value >>= 6
        yield value

    def signed(value: int) -> Iterator[int]:
        return number(-value << 1 | 1 if value < 0 else value << 1)

    table, before = bytearray(), code.co_firstlineno
    for (line, end_line, column, end_column), run in groupby(code.co_positions()):
        units = sum(1 for _ in run)
        while units:
            size = min(units, 8)
            units -= size
            step = 0 if line is None else line - before
            if line is None:
                kind, rest = 15, b""
            elif end_line is None or column is None or end_column is None:
                kind, rest = 13, bytes(signed(step))
            elif end_line == line and step == 0 and column < 80 and end_column - column < 16:
                kind, rest = column >> 3, bytes([(column & 7) << 4 | end_column - column])
            elif end_line == line and 0 <= step <= 2 and column < 128 and end_column < 128:
                kind, rest = 10 + step, bytes([column, end_column])
            else:
                numbers = (number(end_line - line), number(column + 1), number(end_column + 1))
                kind, rest = 14, bytes(chain(signed(step), *numbers))
            table.append(128 | kind << 3 | size - 1)
            table += rest
            before += step
    return bytes(table)


class _Flow:
    """What kind of variable a name is, and which of its stores are assignments that the programmer wrote."""

    def __init__(self, bytecode: Bytecode, code: CodeType) -> None:
        self._items = list(bytecode)
        self._index = {id(item): index for index, item in enumerate(self._items)}
        stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        self._parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]
        self._start = next((i for i, instr in self.instructions() if instr.name == "RESUME"), 0)
        self._cells = {
            _variable(instr) for i, instr in self.instructions() if i < self._start and instr.name == "MAKE_CELL"
        }
        self._free = set(bytecode.freevars)
        self._comprehended = self._comprehensions() if opcodes.COMPREHENSIONS_ARE_INLINED else {}

    def instructions(self) -> Iterator[tuple[int, Instr]]:
        from bytecode import Instr

        return ((index, item) for index, item in enumerate(self._items) if isinstance(item, Instr))

    def kind(self, name: str) -> Kind:
        # A comprehension adds a cell with a free variable's name, so free comes first; one that makes a cell of a plain
        # local does it behind RESUME, so a name in co_cellvars need not be a cell at the return.
        if name in self._free:
            return Kind.FREE
        return Kind.CELL if name in self._cells else Kind.FAST

    def is_always_bound(self, name: str) -> bool:
        """Whether it is a parameter that nothing ever unbinds: its load cannot fail."""
        unbinds = opcodes.DELETES | {"LOAD_FAST_AND_CLEAR"}
        return (
            name in self._parameters
            and self.kind(name) is Kind.FAST
            and not any(_variable(instr) == name and instr.name in unbinds for _, instr in self.instructions())
        )

    def is_the_functions_own(self, name: str) -> bool:
        """Whether a name is a variable of the function, and not only of a comprehension in it."""
        if name not in self._comprehended or name in self._free or name in self._parameters:
            return True
        inside = self._comprehended[name]
        return any(
            _variable(instr) == name and index not in inside and instr.name != "LOAD_FAST_AND_CLEAR"
            for index, instr in self.instructions()
            if index > self._start  # before it, cells are only made: for the comprehension's variable as well
        )

    def assigns(self, instr: Instr, names: Sequence[str]) -> bool:
        """Whether an instruction is the store of an assignment to one of the names."""
        name, index = _variable(instr), self._index.get(id(instr))
        if index is None or instr.name not in opcodes.STORES or name is None or name not in names:
            return False
        return index not in self._comprehended.get(name, set()) and not self._ends_except_clause(index, instr)

    def _ends_except_clause(self, index: int, store: Instr) -> bool:
        """`except E as e` ends with a hidden `e = None; del e`, both at one and the same place in the source."""
        from bytecode import Instr

        following = next((item for item in self._items[index + 1 : index + 6] if isinstance(item, Instr)), None)
        return (
            following is not None
            and following.name in opcodes.DELETES
            and _variable(following) == _variable(store)
            and following.location == store.location
        )

    def _comprehensions(self) -> dict[str, set[int]]:
        """For each name that a comprehension borrows, the items between its being saved and its being restored.

        The saved value waits on the stack meanwhile, so the borrowing lasts as long as that slot does: from each
        LOAD_FAST_AND_CLEAR on, every path is followed until a store takes the slot away.
        """
        from bytecode import Instr
        from bytecode.instr import TryBegin, TryEnd

        saves = [(i, instr) for i, instr in self.instructions() if instr.name == "LOAD_FAST_AND_CLEAR"]
        if not saves:
            return {}
        handlers: dict[int, TryBegin] = {}
        active: TryBegin | None = None
        for i, item in enumerate(self._items):
            if isinstance(item, TryBegin):
                active = item
            elif isinstance(item, TryEnd):
                active = None
            elif isinstance(item, Instr) and active is not None:
                handlers[i] = active

        def successors(index: int, depth: int) -> Iterator[tuple[int, int, int]]:
            """Where execution may go on, how deep the stack is there, and how much of it is as it was."""
            item = self._items[index]
            if not isinstance(item, Instr):
                yield index + 1, depth, depth
                return
            if index in handlers:
                begin = handlers[index]
                assert isinstance(begin.stack_depth, int)
                unwound = begin.stack_depth
                yield self._index[id(begin.target)], unwound + begin.push_lasti + 1, unwound
            if item.has_jump() and item.name not in opcodes.SHAM_JUMPS:
                left = depth + item.stack_effect(jump=True)
                yield self._index[id(item.arg)], left, left
            if not item.is_final():
                left = depth + item.stack_effect(jump=False)
                yield index + 1, left, left

        depths: dict[int, int] = {}
        paths = [(self._start, 0)]
        while paths:
            index, depth = paths.pop()
            if index < len(self._items) and index not in depths:
                depths[index] = depth
                paths.extend((after, there) for after, there, _ in successors(index, depth))

        found: dict[str, set[int]] = {}
        for save, instr in saves:
            if save not in depths:
                continue  # unreachable: never runs, so nothing is borrowed
            inside = found.setdefault(str(_variable(instr)), set())
            seen: set[tuple[int, int]] = set()
            steps = [(save + 1, depths[save])]  # where execution is, and which slot of the stack holds the saved value
            while steps:
                index, slot = steps.pop()
                if (index, slot) in seen or index >= len(self._items) or index not in depths:
                    continue
                seen.add((index, slot))
                item, depth = self._items[index], depths[index]
                top = depth - 1
                if isinstance(item, Instr):
                    inside.add(index)
                    if item.name == "STORE_FAST" and slot == top:
                        continue
                    if item.name == "SWAP":
                        other = depth - int(item.arg)  # type: ignore[arg-type]
                        slot = other if slot == top else top if slot == other else slot
                steps.extend((after, slot) for after, _, kept in successors(index, depth) if kept > slot)
        return found


class _Writer:
    """Puts hook calls into a function's bytecode and remembers which instructions it put in."""

    def __init__(self, code: CodeType) -> None:
        self._code = code
        self._bytecode = _disassemble(code)
        self._flow = _Flow(self._bytecode, code)
        self._injected: set[int] = set()
        self._room = 0

    def add(self, capture: Capture) -> None:
        """Put the capture's hook calls in, behind those of earlier captures."""
        # Above what the function itself stacks: hook, null, key, name, line, the values and an exception.
        self._room = max(self._room, 7 + len(capture.names))
        if capture.at == "return":
            self._capture_at_returns(capture)
        else:
            self._capture_assignments(capture)

    def injected_indices(self) -> set[int]:
        """The injected instructions, by their position among all instructions."""
        return {index for index, instr in enumerate(_instructions(self._bytecode)) if id(instr) in self._injected}

    def assemble(self) -> CodeType:
        stacksize = self._code.co_stacksize + self._room
        code = self._bytecode.to_code(stacksize=stacksize, compute_exception_stack_depths=False)
        return code.replace(co_linetable=_line_table(code))

    def _capture_at_returns(self, capture: Capture) -> None:
        from bytecode import Instr, Label
        from bytecode.instr import TryBegin, TryEnd

        items: list[Any] = []
        brought = capture.names if capture.owner is None else (capture.owner, *capture.names)
        # The exception region that we are in, and the part of it that is open since it was last split.
        region: TryBegin | None = None
        part: TryBegin | None = None
        for item in self._bytecode:
            if isinstance(item, TryBegin):
                region = part = item
            elif isinstance(item, TryEnd) and item.entry is region and part is not None:
                item = TryEnd(part)
                region = part = None
            elif isinstance(item, Instr) and item.name in opcodes.RETURNS:
                place = item.location
                self._put(items, opcodes.load_hook(HOOK, place))
                self._put(items, opcodes.load_constant(capture.key, place))
                for count, name in enumerate(brought):
                    load = opcodes.load_variable(name, self._flow.kind(name), place)
                    if self._flow.is_always_bound(name):
                        self._put(items, load)
                        continue
                    # try: load / except: the hook itself. Regions may not nest, so the outer one pauses. The handler
                    # stands in line: at the end of the code its jump back would be a `line` event on 3.11. And as it
                    # stands between load and call, what precedes the call is not the region, where 3.13 would look up
                    # the handler of an exception that the hook raises.
                    handler, after = Label(), Label()
                    below = 1 + 3 + count  # the result; hook, null and key; the values so far
                    attempt = TryBegin(handler, False, below)
                    if part is not None:
                        items.append(TryEnd(part))
                    items.append(attempt)
                    self._put(items, load)
                    items.append(TryEnd(attempt))
                    if part is not None:
                        part = TryBegin(part.target, part.push_lasti, part.stack_depth)
                        items.append(part)
                    self._put(items, [Instr("JUMP_FORWARD", after, location=place)])
                    items.append(handler)
                    self._put(items, [Instr("POP_TOP", location=place)])
                    self._put(items, opcodes.load_marker(HOOK, place))
                    items.append(after)
                if len(brought) > 1:
                    self._put(items, opcodes.build_tuple(len(brought), place))
                self._put(items, opcodes.call_hook(place))
            items.append(item)
        self._bytecode[:] = items

    def _capture_assignments(self, capture: Capture) -> None:
        from bytecode import Instr
        from bytecode.instr import InstrLocation

        items: list[Any] = []
        entered = False
        nowhere = InstrLocation(None, None, None, None)  # no line: tracers must not see one on entry
        for item in list(self._bytecode):
            items.append(item)
            if not isinstance(item, Instr):
                continue
            if item.name == "RESUME" and not entered:
                entered = True
                self._put(items, opcodes.load_hook(HOOK, nowhere))
                self._put(items, opcodes.load_constant(capture.key, nowhere))
                if capture.owner is None:
                    self._put(items, opcodes.load_constant(None, nowhere))
                else:
                    self._put(items, opcodes.load_variable(capture.owner, self._flow.kind(capture.owner), nowhere))
                    self._put(items, opcodes.build_tuple(1, nowhere))
                self._put(items, opcodes.call_hook(nowhere))
            elif self._flow.assigns(item, capture.names):
                name, place = str(_variable(item)), item.location
                line = _line(item)
                self._put(items, opcodes.load_hook(HOOK, place))
                self._put(items, opcodes.load_constant(capture.key, place))
                self._put(items, opcodes.load_constant(name, place))
                self._put(items, opcodes.load_constant(self._bytecode.first_lineno if line is None else line, place))
                self._put(items, opcodes.load_variable(name, self._flow.kind(name), place))
                self._put(items, opcodes.build_tuple(3, place))
                self._put(items, opcodes.call_hook(place))
        self._bytecode[:] = items

    def _put(self, items: list[Any], instructions: list[Instr]) -> None:
        self._injected.update(map(id, instructions))
        items.extend(instructions)

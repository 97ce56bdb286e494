"""Programs that nobody wrote: generated functions behave the same when rewritten, and hand over what they held.

Each program is written twice: as it is, and as a twin that notes every assignment itself, in its source. What it does
and what its frame holds at each return is learnt from the untouched function by tracing it (`corpus/oracle.py`), what
is assigned in it from the twin.
"""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from types import FunctionType
from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis", reason="generated programs need hypothesis, which is not installed")
from corpus import Call  # noqa: E402
from corpus.oracle import UNBOUND, behaviour, show, traced  # noqa: E402
from corpus.parts import Manager, Ticks, pause  # noqa: E402
from hypothesis import HealthCheck, assume, event, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from visualizer.errors import RewriteError  # noqa: E402
from visualizer.rewrite import HOOK, Capture, local_names, rewrite  # noqa: E402

NAMES = ("a", "b", "c", "d")
KINDS = ("def", "def", "generator", "async def", "async generator")


def mix(*values: object) -> int:
    """A number made of anything: expressions do not end programs by their types."""
    return sum(value if isinstance(value, int) else len(show(value)) for value in values) % 1009


@dataclass
class Source:
    """Lines of the program and of its twin. The twin's lines have other numbers, so it is told those of the program."""

    lines: list[str] = field(default_factory=list)
    twin: list[str] = field(default_factory=list)

    def add(self, depth: int, text: str, twin: str | None = None) -> int:
        """Add a line to both; the number that it has in the program."""
        self.lines.append("    " * depth + text)
        self.twin.append("    " * depth + (text if twin is None else twin))
        return len(self.lines)

    def note(self, depth: int, line: int, *names: str) -> None:
        self.twin += ["    " * depth + f"note({name!r}, {line}, {name})" for name in names]


class Writer:
    """Writes one program with what hypothesis draws."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.source = draw, Source()
        self.kind = draw(st.sampled_from(KINDS))
        self.is_async, self.yields = self.kind.startswith("async"), "generator" in self.kind
        self.size = draw(st.integers(3, 25))

    def write(self) -> Source:
        head = f"{'async ' if self.is_async else ''}def program(numbers, a, *, d=3):"
        self.source.add(0, head)
        self.source.add(1, "it = iter(numbers)")
        if self.yields:
            self.source.add(1, "yield 'first'")
        if self.draw(st.booleans()):
            line = self.source.add(1, "b = c = 0")
            self.source.note(1, line, "b", "c")
        if self.draw(st.booleans()):
            self.source.add(1, "def inner():")
            name = self.name()
            self.source.add(2, f"nonlocal {name}")
            self.source.add(2, f"{name} = mix({name}, 7)")
            self.source.add(2, f"return {name}")
            self.inner = True
        else:
            self.inner = False
        self.block(1, loop=False, star=False)
        return self.source

    def name(self) -> str:
        return self.draw(st.sampled_from(NAMES))

    def expression(self, deep: bool = True) -> tuple[str, str]:
        """Source and twin of an expression; a walrus notes itself."""
        line = len(self.source.lines) + 1
        kinds = ["number", "name", "next", "name"]
        if deep:
            kinds += ["mix", "pair", "if", "walrus", "and", "list", "set", "lambda"] + (["inner"] if self.inner else [])
        match self.draw(st.sampled_from(kinds)):
            case "number":
                text = str(self.draw(st.integers(0, 5)))
                return text, text
            case "name":
                text = self.name()
                return text, text
            case "next":
                return "next(it, 0)", "next(it, 0)"
            case "inner":
                return "inner()", "inner()"
            case "walrus":
                name, (value, twin) = self.name(), self.expression(False)
                return f"({name} := mix({value}, 1))", f"note({name!r}, {line}, ({name} := mix({twin}, 1)))"
            case "list":
                name = self.name()
                return (f"[{name} for {name} in range(3) if {name}]",) * 2
            case "set":
                name = self.name()
                return (f"{{(lambda: {name})() for {name} in range(2)}}",) * 2
            case "lambda":
                name = self.name()
                return (f"(lambda: {name})()",) * 2
            case kind:
                (one, twin), (other, other_twin) = self.expression(False), self.expression(False)
                forms = {"mix": "mix({}, {})", "pair": "({}, {})", "and": "({} and {})"}
                form = forms.get(kind, "({} if next(it, 0) else {})")
                return form.format(one, other), form.format(twin, other_twin)

    def block(self, depth: int, *, loop: bool, star: bool) -> None:
        """One to four statements; `star`: inside `except*`, which nothing may leave by break, continue or return."""
        for _ in range(self.draw(st.integers(1, 4))):
            self.statement(depth, loop, star)

    def statement(self, depth: int, loop: bool, star: bool) -> None:
        self.size -= 1
        kinds = ["assign", "assign", "augment", "unpack", "call", "delete", "annotate"]
        if not star:
            kinds += ["return", "return"] + (["break", "continue"] if loop else [])
        kinds += ["yield"] if self.yields else []
        kinds += ["await"] if self.is_async else []
        kinds += ["raise"]
        if depth < 5 and self.size > 0:
            kinds += ["if", "for", "while", "try", "try", "with", "match", "try star"]
            kinds += ["async for", "async with"] if self.is_async else []
        getattr(self, "write_" + self.draw(st.sampled_from(kinds)).replace(" ", "_"))(depth, loop, star)

    def write_assign(self, depth: int, *_: bool) -> None:
        name, (value, twin) = self.name(), self.expression()
        self.source.note(depth, self.source.add(depth, f"{name} = {value}", f"{name} = {twin}"), name)

    def write_annotate(self, depth: int, *_: bool) -> None:
        self.source.note(depth, self.source.add(depth, "e: int = 3"))

    def write_augment(self, depth: int, *_: bool) -> None:
        name, (value, twin) = self.name(), self.expression(False)
        line = self.source.add(depth, f"{name} = mix({name}); {name} += mix({value})")
        self.source.twin[-1] = "    " * depth + f"{name} = mix({name})"
        self.source.note(depth, line, name)
        self.source.twin.append("    " * depth + f"{name} += mix({twin})")
        self.source.note(depth, line, name)

    def write_unpack(self, depth: int, *_: bool) -> None:
        one, other = self.draw(st.permutations(NAMES))[:2]
        (value, twin), (rest, rest_twin) = self.expression(False), self.expression()
        target = f"{one}, {self.draw(st.sampled_from(['', '*']))}{other}"
        line = self.source.add(depth, f"{target} = {value}, {rest}", f"{target} = {twin}, {rest_twin}")
        self.source.note(depth, line, one, other)

    def write_call(self, depth: int, *_: bool) -> None:
        value, twin = self.expression()
        self.source.add(depth, f"mix({value})", f"mix({twin})")

    def write_delete(self, depth: int, *_: bool) -> None:
        self.source.add(depth, f"del {self.name()}")

    def write_return(self, depth: int, *_: bool) -> None:
        if self.kind == "async generator":
            self.source.add(depth, "return")
        else:
            value, twin = self.expression()
            self.source.add(depth, f"return {value}", f"return {twin}")

    def write_break(self, depth: int, *_: bool) -> None:
        self.source.add(depth, "break")

    def write_continue(self, depth: int, *_: bool) -> None:
        self.source.add(depth, "continue")

    def write_raise(self, depth: int, *_: bool) -> None:
        group = "ExceptionGroup('two', [ValueError(1), KeyError(2)])"
        self.source.add(depth, f"raise {self.draw(st.sampled_from(['ValueError', 'KeyError', group]))}")

    def write_yield(self, depth: int, *_: bool) -> None:
        name, (value, twin) = self.name(), self.expression(False)
        self.source.note(depth, self.source.add(depth, f"{name} = yield {value}", f"{name} = yield {twin}"), name)

    def write_await(self, depth: int, *_: bool) -> None:
        name, (value, twin) = self.name(), self.expression(False)
        line = self.source.add(depth, f"{name} = await pause({value})", f"{name} = await pause({twin})")
        self.source.note(depth, line, name)

    def write_if(self, depth: int, loop: bool, star: bool) -> None:
        value, twin = self.expression()
        self.source.add(depth, f"if {value}:", f"if {twin}:")
        self.block(depth + 1, loop=loop, star=star)
        if self.draw(st.booleans()):
            self.source.add(depth, "else:")
            self.block(depth + 1, loop=loop, star=star)

    def write_for(self, depth: int, loop: bool, star: bool, prefix: str = "", over: str = "range") -> None:
        name = self.name()
        line = self.source.add(depth, f"{prefix}for {name} in {over}({self.draw(st.integers(0, 3))}):")
        self.source.note(depth + 1, line, name)
        self.block(depth + 1, loop=True, star=star)
        if self.draw(st.booleans()):
            self.source.add(depth, "else:")
            self.block(depth + 1, loop=loop, star=star)

    def write_async_for(self, depth: int, loop: bool, star: bool) -> None:
        self.write_for(depth, loop, star, "async ", "Ticks")

    def write_while(self, depth: int, loop: bool, star: bool) -> None:
        self.source.add(depth, "while next(it, 0):")
        self.block(depth + 1, loop=True, star=star)

    def write_try(self, depth: int, loop: bool, star: bool) -> None:
        self.source.add(depth, "try:")
        self.block(depth + 1, loop=loop, star=star)
        handled = self.draw(st.sampled_from(["except", "named", "finally", "both"]))
        if handled != "finally":
            name = self.name()
            if handled == "except":
                self.source.add(depth, "except (ValueError, LookupError):")
            else:
                line = self.source.add(depth, f"except Exception as {name}:")
                self.source.note(depth + 1, line, name)
            self.block(depth + 1, loop=loop, star=star)
            if self.draw(st.booleans()):
                self.source.add(depth, "else:")
                self.block(depth + 1, loop=loop, star=star)
        if handled in ("finally", "both"):
            self.source.add(depth, "finally:")
            self.block(depth + 1, loop=loop, star=star)

    def write_try_star(self, depth: int, loop: bool, star: bool) -> None:
        self.source.add(depth, "try:")
        self.block(depth + 1, loop=loop, star=star)
        name = self.name()
        line = self.source.add(depth, f"except* ValueError as {name}:")
        self.source.note(depth + 1, line, name)
        self.block(depth + 1, loop=False, star=True)

    def write_with(self, depth: int, loop: bool, star: bool, prefix: str = "") -> None:
        name, (value, twin) = self.name(), self.expression(False)
        form = f"{prefix}with Manager({{}}, swallow={self.draw(st.booleans())}) as {name}:"
        self.source.note(depth + 1, self.source.add(depth, form.format(value), form.format(twin)), name)
        self.block(depth + 1, loop=loop, star=star)

    def write_async_with(self, depth: int, loop: bool, star: bool) -> None:
        self.write_with(depth, loop, star, "async ")

    def write_match(self, depth: int, loop: bool, star: bool) -> None:
        value, twin = self.expression()
        self.source.add(depth, f"match {value}:", f"match {twin}:")
        name = self.name()
        for pattern in ("0 | 1", "int()", f"[_, *_] as {name}", f"{name}")[self.draw(st.integers(0, 3)) :]:
            line = self.source.add(depth + 1, f"case {pattern}:")
            if name in pattern.split():
                self.source.note(depth + 2, line, name)
            self.block(depth + 2, loop=loop, star=star)


@st.composite
def programs(draw: Any) -> tuple[Source, tuple[Any, ...]]:
    source = Writer(draw).write()
    numbers = draw(st.lists(st.integers(0, 2), max_size=12))
    return source, (tuple(numbers), 1)


def function_of(lines: list[str], name: str, **extra: Any) -> FunctionType:
    text = "\n".join(lines) + "\n"
    space: dict[str, Any] = {"mix": mix, "Manager": Manager, "Ticks": Ticks, "pause": pause, **extra}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # a `return` in `finally` is meant
        try:
            exec(compile(text, name, "exec"), space)
        except SyntaxError:  # what may not stand inside `except*` or be nonlocal differs between versions
            assume(False)
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    return space["program"]


def check(source: Source, args: tuple[Any, ...]) -> None:
    function = function_of(source.lines, "<generated>")
    call = Call(args, {}, (), None)
    names = tuple(name for name in (*NAMES, "numbers", "it") if name in local_names(function.__code__))
    original, space = function.__code__, function.__globals__
    expected = traced(function, call, names)
    event(f"returns: {len(expected.returns) > 0}")

    values: list[tuple[Any, ...]] = []
    shown: list[dict[str, str]] = []

    def at_return(key: str, captured: Any) -> None:
        captured = captured if len(names) > 1 else (captured,)
        values.append(tuple(UNBOUND if value is at_return else value for value in captured))
        shown.append({name: show(value) for name, value in zip(names, values[-1], strict=True)})

    space[HOOK] = at_return
    try:
        function.__code__ = rewrite(original, Capture(tuple(names), "return", "k"))
    except RewriteError as refusal:
        event(f"refused: {str(refusal).split(': ')[1][:40]}")
        assume(False)
    assert expected.behaviour == behaviour(function, call)
    assert expected.shown == shown
    values.clear()
    actual = traced(function, call, names)
    assert expected.behaviour == actual.behaviour
    for held, captured in zip(actual.locals, values, strict=True):
        assert all(held[name] is value for name, value in zip(names, captured, strict=True))
    if not any(UNBOUND in captured for captured in values):  # noticing that is an exception, which tracers are shown
        assert expected.events == actual.events

    assigned: list[tuple[str, int, str]] = []
    space[HOOK] = lambda key, event: event and assigned.append((event[0], event[1], show(event[2])))
    function.__code__ = rewrite(original, Capture(tuple(name for name in names if name in NAMES), "assign", "k"))
    assert expected.behaviour == behaviour(function, call)

    noted: list[tuple[str, int, str]] = []

    def note(name: str, line: int, value: Any) -> Any:
        noted.append((name, line, show(value)))
        return value

    behaviour(function_of(source.twin, "<twin>", note=note), call)
    assert in_order(each for each in noted if each[0] in names) == in_order(assigned)


def in_order(assigned: Iterable[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """What the compiler may not change of the order: the names of one line sorted, repetitions dropped.

    In `a, b = 0, a` it stores `b` first, and of the two stores in `a = (a := 1)` it drops one.
    """
    runs = (sorted(run, key=lambda each: each[0]) for _, run in groupby(assigned, lambda each: each[1]))
    return [each for run in runs for each, _ in groupby(run)]


ordinary = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=150, derandomize=True, **ordinary)
@given(programs())
def test_generated_programs(program: tuple[Source, tuple[Any, ...]]) -> None:
    check(*program)


@pytest.mark.long
@settings(max_examples=5000, **ordinary)
@given(programs())
def test_many_generated_programs(program: tuple[Source, tuple[Any, ...]]) -> None:
    check(*program)

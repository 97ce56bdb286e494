"""Every function of the corpus behaves the same when rewritten, and what reaches the hook is what it held.

What it does and holds is learnt from the untouched function (`corpus/oracle.py`), what is assigned in it is written
down by hand with each case.
"""

from __future__ import annotations

import functools
import gc
import inspect
import marshal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, Literal

import pytest
from corpus import CASES, Call, Case, load
from corpus.oracle import UNBOUND, Traced, behaviour, show, traced

from visualizer.errors import RewriteError
from visualizer.rewrite import HOOK, Capture, local_names, rewrite

At = Literal["return", "assign"]
Hook = Callable[[str, Any], object]
KEY, ASSIGN_KEY = "the key", "another key"

load()

# What the bytecode package cannot do, by case, and since which version: these are refused and left as they were.
_SHADOWS = "comprehensions.make_shadowing.<locals>."
REFUSED: dict[str, tuple[int, int]] = {
    # a comprehension's variable that is a cell, or from 3.14 on any, with the name of a free variable
    _SHADOWS + "captured_variable_shadows_a_free_variable": (3, 13),
    _SHADOWS + "shadows_a_free_variable": (3, 14),
    # t-strings
    "since_314.template_string": (3, 14),
    "since_314.template_string_without_conversions": (3, 14),
}


def is_refused(case: Case) -> bool:
    return case.name in REFUSED and sys.version_info >= REFUSED[case.name]


ACCEPTED = [case for case in CASES if not is_refused(case)]
BY_NAME = {case.name: case for case in CASES}


def param(case: Case) -> Any:
    """The largest of the generated functions takes seconds in each test."""
    marks = [pytest.mark.slow] if len(case.function.__code__.co_code) > 100_000 else []
    return pytest.param(case, id=case.name, marks=marks)


each_case_with_names = pytest.mark.parametrize("case", [param(case) for case in ACCEPTED if case.names])
each_case_with_singles = pytest.mark.parametrize("case", [param(case) for case in ACCEPTED if case.singles])


def is_small(code: CodeType) -> bool:
    """All but the generated functions, which take their time."""
    return len(code.co_code) < 4000


class HookError(Exception):
    """What a failing hook raises; the handlers for Exception in the corpus would catch it."""


@functools.cache
def rewritten_code(case_name: str, names: tuple[str, ...], at: At) -> CodeType:
    return rewrite(BY_NAME[case_name].function.__code__, Capture(tuple(names), at, KEY))


@contextmanager
def in_place(function: FunctionType, code: CodeType, hook: Hook | None) -> Iterator[None]:
    """The function with this code and hook, or none, for a while, then as it was."""
    original = function.__code__
    if hook is not None:
        function.__globals__[HOOK] = hook
    function.__code__ = code
    try:
        yield
    finally:
        function.__code__ = original
        function.__globals__.pop(HOOK, None)


@contextmanager
def hooked(case: Case, names: tuple[str, ...], at: At, hook: Hook) -> Iterator[FunctionType]:
    """The case's function while it is rewritten."""
    with in_place(case.function, rewritten_code(case.name, names, at), hook):
        yield case.function


class Recorder:
    """A hook for returns: keeps the values and how they looked, an unbound one as UNBOUND."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.stands_for_unbound: Hook = self
        self.values: list[tuple[Any, ...]] = []
        self.shown: list[tuple[str, ...]] = []

    def __call__(self, key: str, value: Any) -> None:
        assert key == KEY
        values = (value,) if self.count == 1 else value
        assert len(values) == self.count
        self.values.append(tuple(UNBOUND if value is self.stands_for_unbound else value for value in values))
        self.shown.append(tuple(map(show, self.values[-1])))


class AssignmentRecorder:
    """A hook for assignments: keeps them as the cases have them, with how the value looked."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.assigned: list[tuple[str, int, str] | None] = []

    def __call__(self, key: str, value: tuple[str, int, Any] | None) -> None:
        assert key in (KEY, ASSIGN_KEY)
        self.assigned.append(value and (value[0], value[1] - self.case.def_line, show(value[2])))


class ByKey:
    """The one hook of two captures."""

    def __init__(self, returns: Recorder, assignments: AssignmentRecorder) -> None:
        self.hooks: dict[str, Hook] = {KEY: returns, ASSIGN_KEY: assignments}
        returns.stands_for_unbound = self

    def __call__(self, key: str, value: Any) -> None:
        self.hooks[key](key, value)


@functools.cache
def baseline(case_name: str, index: int) -> Traced:
    """The untouched function's call, traced; the rewritten ones are held against it."""
    case = BY_NAME[case_name]
    return traced(case.function, case.calls[index], case.names)


def without_exceptions(events: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [event for event in events if event[0] != "exception"]


def check_returns(case: Case, names: tuple[str, ...]) -> None:
    for index, call in enumerate(case.calls):
        expected = baseline(case.name, index)
        expected_shown = [tuple(shown[name] for name in names) for shown in expected.shown]

        recorder = Recorder(len(names))
        with hooked(case, names, "return", recorder) as function:
            assert expected.behaviour == behaviour(function, call)
        assert expected_shown == recorder.shown

        # once more under a tracer, which gives the very objects that the frame holds
        recorder = Recorder(len(names))
        with hooked(case, names, "return", recorder) as function:
            actual = traced(function, call, names)
        assert expected.behaviour == actual.behaviour
        assert expected_shown == recorder.shown
        assert len(actual.locals) == len(recorder.values)
        for held, values in zip(actual.locals, recorder.values, strict=True):
            assert all(held[name] is value for name, value in zip(names, values, strict=True))

        expected_events, actual_events = expected.events, actual.events
        if any(UNBOUND in values for values in recorder.values):
            # An unbound name is noticed by an exception inside the injected code, which tracers are shown.
            expected_events = without_exceptions(expected_events)
            actual_events = without_exceptions(actual_events)
        assert expected_events == actual_events


def check_assignments(case: Case, names: tuple[str, ...]) -> None:
    for index, call in enumerate(case.calls):
        expected = baseline(case.name, index)
        expected_assigned = hand_written(case, call, names)

        recorder = AssignmentRecorder(case)
        with hooked(case, names, "assign", recorder) as function:
            assert expected.behaviour == behaviour(function, call)
        assert expected_assigned == recorder.assigned

        recorder = AssignmentRecorder(case)
        with hooked(case, names, "assign", recorder) as function:
            actual = traced(function, call, names)
        assert expected.behaviour == actual.behaviour
        assert expected_assigned == recorder.assigned
        assert expected.events == actual.events


def hand_written(case: Case, call: Call, names: tuple[str, ...]) -> list[tuple[str, int, str] | None]:
    """What the case says is assigned to these names in this call, after the entry."""
    if call.assigns is None:
        return []
    chosen = (assigned for assigned in call.assigns if assigned is None or assigned[0] in names)
    return [None, *((each[0], each[1], show(each[2])) if each else None for each in chosen)]


def check_without_hook(case: Case, at: At) -> None:
    """As in a process that the code was sent to."""
    code = marshal.loads(marshal.dumps(rewritten_code(case.name, case.names, at)))
    for index, call in enumerate(case.calls):
        expected = baseline(case.name, index)
        with in_place(case.function, code, None):
            actual = traced(case.function, call, case.names)
        assert expected.behaviour == actual.behaviour
        assert without_exceptions(expected.events) == without_exceptions(actual.events)


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 80
    # a case that is gone or renamed must not go on being excused
    assert all(name in BY_NAME for name, since in REFUSED.items() if sys.version_info >= since)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_does_the_same_every_time(case: Case) -> None:
    """Traced or not, warm or cold, without the rewriter: else the other tests would compare nothing."""
    for index, call in enumerate(case.calls):
        expected = baseline(case.name, index)
        assert [expected.behaviour] * 3 == [behaviour(case.function, call) for _ in range(3)]
        assert expected.events == traced(case.function, call, case.names).events


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_names(case: Case) -> None:
    """What is written down of a case is of its names, and these are all its locals and no comprehension's variable."""
    for call in case.calls:
        assert {each[0] for each in call.assigns or () if each} <= set(case.names)
    assert set(case.singles) <= set(case.names)
    if not is_refused(case):
        assert sorted(case.names) == sorted(local_names(case.function.__code__))


def lines_of(code: CodeType) -> set[int | None]:
    return {line for *_, line in code.co_lines()}


@each_case_with_singles
def test_one_name_at_a_time(case: Case) -> None:
    for name in case.singles:
        check_returns(case, (name,))
        check_assignments(case, (name,))


@each_case_with_names
def test_all_names(case: Case) -> None:
    check_returns(case, case.names)
    if is_small(case.function.__code__):
        check_returns(case, case.names[::-1])
    check_assignments(case, case.names)


@pytest.mark.slow
@each_case_with_names
def test_without_a_hook(case: Case) -> None:
    """Rewritten code does the same where there is none, as in a process that it was sent to."""
    check_without_hook(case, "return")
    check_without_hook(case, "assign")


@each_case_with_names
def test_the_code_object_looks_the_same(case: Case) -> None:
    """Signature, docstring, names and flags stay, the old code is left alone, and the new one can be marshalled."""
    check_code_object(case, "return")
    check_code_object(case, "assign")


def check_code_object(case: Case, at: At) -> None:
    old = case.function.__code__
    before = (old.co_code, old.co_consts, old.co_names)
    new = rewritten_code(case.name, case.names, at)
    assert (old.co_code, old.co_consts, old.co_names) == before
    for attribute in (
        *("co_name", "co_qualname", "co_filename", "co_firstlineno", "co_flags", "co_varnames"),
        *("co_cellvars", "co_freevars", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_nlocals"),
    ):
        assert getattr(old, attribute) == getattr(new, attribute), attribute
    remade = FunctionType(new, {}, closure=case.function.__closure__)
    assert FunctionType(old, {}, closure=case.function.__closure__).__doc__ == remade.__doc__
    assert inspect.signature(FunctionType(old, {}, closure=case.function.__closure__)) == inspect.signature(remade)
    assert marshal.loads(marshal.dumps(new)) == new
    # what is injected on entry has no line, so that no tracer sees one
    assert {*lines_of(old), None} == {*lines_of(new), None}


def check_failing_hook(
    case: Case, names: tuple[str, ...], call: Call, untouched: Traced, at: At, n: int
) -> tuple[Traced, int]:
    """The n-th call of the hook fails the same way cold, traced and specialised; what the tracer saw, and when."""
    seen = Traced()
    left = events_before = 0

    # A function, not an object that can be called: the interpreter runs it without leaving its loop, and looks for
    # the handler of what it raises in another way.
    def hook(key: str, value: Any) -> None:
        nonlocal left, events_before
        left -= 1
        if left == 0:
            events_before = len(seen.events)
            raise HookError(key)

    references = sys.getrefcount(hook)
    with hooked(case, names, at, hook) as function:
        left = n
        cold = behaviour(function, call)
        left = n
        traced(function, call, case.names, seen)
        events_before_traced = events_before
        assert cold == seen.behaviour
        # So many calls specialise the code, and a specialisation that does not fit is given up after some fifty.
        rounds = 60 if is_small(function.__code__) else 3
        for _ in range(rounds):
            assert untouched.behaviour == behaviour(function, call)
        for _ in range(rounds):
            left = n
            assert cold == behaviour(function, call)
        assert untouched.behaviour == behaviour(function, call)
    # the stack was left balanced: an unbound name stands for the hook on it, so its references tell
    if references != sys.getrefcount(hook):
        gc.collect()
    assert references == sys.getrefcount(hook)
    return seen, events_before_traced


@each_case_with_names
def test_a_hook_that_raises_at_a_return(case: Case) -> None:
    """Its error leaves the function from the return, and none of the function's own handlers sees it."""
    for index, call in enumerate(case.calls):
        untouched = baseline(case.name, index)
        if not untouched.locals:
            continue
        # with one name its load stands right before the call, with several there is a tuple to build
        for names in {case.names, case.names[-1:]}:
            seen, events_before = check_failing_hook(case, names, call, untouched, "return", 1)
            errors = [entry[1] for entry in seen.behaviour if entry[0] == "raised"]
            assert ("HookError", f"({KEY!r},)") in [error[:2] for error in errors]

            # as without the hook up to the first return, and from there straight out
            first = untouched.events[untouched.returns[0]]
            so_far, after = seen.events[:events_before], seen.events[events_before:]
            assert without_exceptions(untouched.events[: untouched.returns[0]]) == without_exceptions(so_far)
            assert after[0] == ("exception", first[1], f"HookError({KEY!r})")
            assert (after[1][0], after[1][2]) == ("return", "None")


@each_case_with_names
def test_a_hook_that_raises_at_an_assignment(case: Case) -> None:
    """Its error is raised on the line of the assignment, as if the assigned value had raised it."""
    for index, call in enumerate(case.calls):
        untouched = baseline(case.name, index)
        expected = hand_written(case, call, case.names)
        # the entry, the first assignment and the last one
        for n in sorted({1, 2, len(expected)} & set(range(1, len(expected) + 1))):
            seen, events_before = check_failing_hook(case, case.names, call, untouched, "assign", n)
            assert untouched.events[:events_before] == seen.events[:events_before]
            event, line, error = seen.events[events_before]
            assert (event, error) == ("exception", f"HookError({KEY!r})")
            assigned = expected[n - 1]
            if assigned is not None:
                assert line == assigned[1] + case.def_line - case.function.__code__.co_firstlineno


@pytest.mark.parametrize("at", ["return", "assign"])
def test_refused_functions_are_left_alone(at: At) -> None:
    """What cannot be proved is refused whatever is asked for, by an error that names the function."""
    for case in filter(is_refused, CASES):
        old = case.function.__code__
        for name in case.names:
            with pytest.raises(RewriteError, match=case.function.__name__):
                rewrite(old, Capture((name,), at, KEY))
        assert case.function.__code__ is old


@each_case_with_names
def test_two_captures_at_once(case: Case) -> None:
    """Two captures of one function get what each would get alone."""
    captures = [Capture(case.names, "return", KEY), Capture(case.names[:1], "assign", ASSIGN_KEY)]
    code = rewrite(case.function.__code__, *captures)
    for index, call in enumerate(case.calls):
        expected = baseline(case.name, index)
        both = ByKey(returns := Recorder(len(case.names)), assignments := AssignmentRecorder(case))
        with in_place(case.function, code, both):
            assert expected.behaviour == behaviour(case.function, call)
        assert [tuple(shown[name] for name in case.names) for shown in expected.shown] == returns.shown
        assert hand_written(case, call, case.names[:1]) == assignments.assigned

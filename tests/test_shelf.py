"""The columns under a key: what users do to their list, limits, and interrupts in the middle."""

import itertools
import random
import sys

import pytest

from visualizer.store.locks import this_thread
from visualizer.store.shelf import Shelf

THREAD = this_thread()


class Channel:
    """As much of a channel as a shelf knows."""

    def __init__(self):
        self.calls, self.append = itertools.count(), None

    def halt(self):
        self.append = None


def rows(shelf):
    return [(r.value, r.call, r.line, r.variable, r.thread, r.module) for r in shelf.records()]


def filled(number=5):
    shelf = Shelf("key", [])
    for i in range(number):
        shelf.add(10 * i, i, i if i % 2 else None, None, ("attn", THREAD, "path"))
    return shelf


def row(i):
    return 10 * i, i, i if i % 2 else None, "attn", THREAD, "path"


def test_records_are_made_of_the_columns():
    shelf = filled()
    assert [row(i) for i in range(5)] == rows(shelf)
    assert shelf.values == [0, 10, 20, 30, 40]


def test_what_is_appended_directly_gets_the_numbers_of_its_calls():
    shelf, channel = filled(2), Channel()
    channel.append = shelf.open(channel, 2, ("attn", THREAD, None))
    for i in range(2, 1002):
        channel.append(i)
    shelf.close()
    assert [(i, i, None, "attn", THREAD, None) for i in range(2, 1002)] == rows(shelf)[2:]
    assert 1002 == next(channel.calls)
    assert channel.append is None
    shelf.close()
    assert 1002 == shelf.size


@pytest.mark.parametrize("change", [
    lambda values: values.clear(), lambda values: values.pop(2), lambda values: values.reverse(),
    lambda values: values.insert(1, "own"), lambda values: values.extend(["own", "own"]), lambda values: None,
    lambda values: values.__setitem__(slice(1, 3), []), lambda values: values.sort(key=lambda value: -value),
])  # fmt: skip
def test_records_follow_what_users_do_to_the_list(change):
    shelf = filled()
    before = list(shelf.values)
    change(shelf.values)
    gone = shelf.match(shelf.values)
    known = {10 * i: row(i) for i in range(5)}
    assert [known.get(value, (value, -1, None, "attn", 0, None)) for value in shelf.values] == rows(shelf)
    assert sorted(set(before) - {*shelf.values}) == sorted(gone)


def test_a_list_that_nobody_else_holds_is_not_held():
    cache = {"key": []}
    shelf = Shelf("key", cache["key"])
    assert not shelf.is_held
    held = cache["key"]
    assert shelf.is_held
    iterator = iter(held)
    del held
    assert shelf.is_held
    del iterator
    assert not shelf.is_held


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_the_calls_that_began_last_stay(limit):
    """Against the plain rule, in every order in which the values of calls may come."""
    chance = random.Random(limit)
    for _ in range(200):
        shelf, arrived = Shelf("key", []), []
        for number in range(40):
            begun = 10**9 + chance.randrange(12)
            shelf.add(number, begun, None, begun, ("attn", 0, None))
            arrived.append((number, begun))
            calls = sorted({begun for _, begun in arrived})[-limit:]
            arrived = [(value, begun) for value, begun in arrived if begun in calls]
            shelf.trim(limit, 0)
            assert arrived == [(value, call) for value, call, *_ in rows(shelf)] == [*zip(shelf.values, shelf.calls)]


@pytest.mark.parametrize("act", ["add", "trim", "scattered trim", "close", "match"])
def test_an_interrupt_anywhere_leaves_each_value_with_its_own_record(act):
    """At every point where the interpreter may raise what a signal's handler raises, one after the other."""

    class Tick(BaseException):
        pass

    for strike in itertools.count():
        shelf, channel = filled(), Channel()
        if act == "scattered trim":
            shelf.add(50, 5, 5, shelf.begun[0], ("attn", THREAD, "path"))
        if act == "close":
            channel.append = shelf.open(channel, 5, ("attn", THREAD, "path"))
            channel.append(50), channel.append(60)
        if act == "match":
            del shelf.values[1]
        left = strike

        def trace(frame, event, arg):
            nonlocal left
            if frame.f_globals.get("__name__") != "visualizer.store.shelf":
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise Tick
            return trace

        sys.settrace(trace)
        try:
            if act == "add":
                shelf.add(50, 5, 5, None, ("attn", THREAD, "path"))
            elif "trim" in act:
                shelf.trim(2, 0)
            elif act == "close":
                shelf.close()
            else:
                shelf.match(shelf.values)
        except Tick:
            done = False
        else:
            done = True
        finally:
            sys.settrace(None)
        shelf.match(shelf.values)
        for value, call, *_, variable, _, _ in rows(shelf):
            assert (value // 10 == call) or (call == -1 and value == 50 and act == "add")
            assert "attn" == variable
        assert shelf.values == [value for value, *_ in rows(shelf)]
        if act == "close":
            assert [0, 10, 20, 30, 40, 50, 60] == shelf.values
            assert 7 == next(channel.calls)
        if done:
            break
    assert strike > 2

"""capture() on plain Python: functions, classes, names, several at once. Modules are in test_capture_modules.py."""

import asyncio
import copy
import functools
import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from pathlib import Path

import pytest

from visualizer import UnknownKeyError, UnknownLocalError, VisualizerWarning, capture, load
from visualizer.instrument import GetLocal


def attend(x):
    q = x + 1
    attn = q * 2
    return attn + 1


class Base:
    def score(self, x):
        attn = [self, x]
        return x

    @classmethod
    def build(cls, x):
        made = (cls.__name__, x)
        return made

    @staticmethod
    def scale(x):
        scaled = 10 * x
        return x


class Derived(Base):
    def other(self, x):
        attn = -x
        return x


class Loses:
    """Its methods no longer have themselves when they return."""

    def assigns(self, x):
        attn = x
        self = None
        return x

    def deletes(self, x):
        attn = x
        del self

    def loops(self, x):
        attn = x
        for self in range(x):
            pass

    def shares(self, x):
        def lose():
            nonlocal self
            self = None

        attn = x
        lose()
        return x


@pytest.fixture
def gl():
    own = GetLocal()
    yield own
    own.deactivate()


class TestMistakes:
    @pytest.mark.parametrize(
        ("make", "error", "parts"),
        [
            (lambda: capture(attend), TypeError, ["needs the name", 'capture(model, "attn")']),
            (lambda: capture(attend, attend), TypeError, ["strings"]),
            (lambda: capture(attend, "atn"), UnknownLocalError, ["'atn'", "did you mean 'attn'", "x, q, attn"]),
            (lambda: capture(Base, "atn"), UnknownLocalError, ["no method of Base", "Base.score: x, attn"]),
            (lambda: capture(len, "x"), TypeError, ["an nn.Module, a function", "len"]),
            (lambda: capture(3, "x"), TypeError, ["3 has no Python code"]),
            (lambda: capture([], "x"), ValueError, ["empty"]),
            (lambda: capture("textwrap.dedent", "x"), ValueError, ["'textwrap.dedent'", "package.module:function"]),
            (lambda: capture("textwrap:dedet", "x"), AttributeError, ["'textwrap:dedet'", "did you mean 'dedent'"]),
            (lambda: capture("no_such_module:f", "x"), ModuleNotFoundError, ["no_such_module"]),
            (lambda: capture(attend, "attn", at="exit"), ValueError, ["'return', 'assign'"]),
            (lambda: capture(attend, "attn", keep="torch"), ValueError, ["'numpy', 'tensor', 'graph'"]),
            (lambda: capture(attend, "attn", limit=0), ValueError, ["limit"]),
            (lambda: capture(attend, "attn", max_bytes="1"), TypeError, ["max_bytes"]),
        ],
    )
    def test_each_is_told_at_once(self, make, error, parts):
        code = attend.__code__
        with pytest.raises(error) as caught:
            make()
        for part in parts:
            assert part in str(caught.value)
        assert attend.__code__ is code

    @pytest.mark.parametrize("method", ["assigns", "deletes", "loops", "shares"])
    def test_a_method_that_loses_its_self_does_not_say_whose_call_returns(self, method):
        one, line = Loses(), getattr(Loses, method).__code__.co_firstlineno
        with pytest.raises(TypeError) as caught:
            capture(getattr(one, method), "attn")
        for part in (f"Loses.{method} ({__file__}:{line})", "'self'", f"capture(Loses.{method}, 'attn')"):
            assert part in str(caught.value)
        with capture(getattr(one, method), "attn", at="assign") as found, capture(Loses, "attn") as both:
            getattr(one, method)(1), getattr(Loses(), method)(2)
        assert [1] == found[f"Loses.{method}"]
        assert [1, 2] == both[f"Loses.{method}"]
        with pytest.raises(TypeError, match="whose call"):
            capture(type("LosesToo", (Loses,), {}), "attn")

    def test_a_method_without_self_does_not_say_whose_call_it_is(self):
        class Starred:
            def score(*args):
                attn = args[1:]
                return attn

        class Inherits(Starred):
            pass

        for target in (Starred().score, Inherits):
            for at in ("return", "assign"):
                with pytest.raises(TypeError, match=r"Starred.score \(.*no parameter.*capture\(.*Starred.score"):
                    capture(target, "attn", at=at)
        with capture(Starred, "attn") as found:
            Starred().score(1)
        assert [[(1,)]] == list(found.values())

    @pytest.mark.parametrize("name", ["x", "rest", "options"])
    def test_a_parameter_that_is_never_assigned_has_nothing_for_assign(self, name):
        def forward(x, *rest, by=2, **options):
            by = x * by
            return by

        line = forward.__code__.co_firstlineno
        for names in ([name], ["by", name]):
            with pytest.raises(ValueError) as caught:
                capture(forward, *names, at="assign")
            for part in (f"forward ({__file__}:{line})", f"assigns to {name!r}: it is a parameter", "at='return'"):
                assert part in str(caught.value)
        with capture(forward, "by", at="assign") as found:
            forward(3)
        assert [[6]] == list(found.values())

    def test_what_only_others_assign_has_nothing_for_assign(self):
        total = 1

        def forward(x):
            def add():
                nonlocal attn
                attn = x

            attn: int
            add()
            return attn + total

        with pytest.raises(ValueError, match="'total': it is a variable of an outer function"):
            capture(forward, "total", at="assign")
        with pytest.raises(ValueError, match="'attn': only a function inside it may do so"):
            capture(forward, "attn", at="assign")
        with capture(forward, "attn", "total") as found:
            assert 2 == forward(1)
        assert [[1], [1]] == list(found.values())

    def test_for_assign_methods_and_wrappers_that_do_not_are_left_out(self):
        class Scores:
            def first(self, attn):
                return attn

            def second(self, x):
                attn = x
                return self.first(attn)

        @functools.wraps(attend)
        def wrapper(x):
            x = 2 * x
            return attend(x)

        with capture(wrapper, "x", at="assign") as found:
            assert 7 == wrapper(1)
        assert {"attend": [2]} == found
        with capture(Scores, "attn", at="assign") as found:
            Scores().second(3)
        assert [[3]] == list(found.values())
        with pytest.raises(ValueError, match=r"Scores\.first .*'self': it is a parameter"):
            capture(Scores, "attn", "self", at="assign")

    def test_a_missing_key_says_what_there_is(self):
        with capture(attend, "attn") as found:
            with pytest.raises(UnknownKeyError, match=r"did you mean 'attend'\? The keys are: 'attend'; .*is running"):
                found["atend"]
        with pytest.raises(KeyError, match="not running"):
            found["Attention.forward"]

    def test_a_call_that_raises_leaves_nothing_behind(self):
        def forward(x):
            attn = 1 / x
            return attn

        code = forward.__code__
        with pytest.raises(ZeroDivisionError), capture(forward, "attn") as found:
            forward(2)
            forward(0)
        assert forward.__code__ is code
        assert [[0.5]] == list(found.values())


class TestSeveralAtOnce:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
    def test_each_has_its_own_whatever_the_order_of_leaving(self, gl, order):
        code = attend.__code__
        gl("attn")(attend)
        captures = [capture(attend, "attn"), capture(attend, "q", at="assign"), capture([Base, attend], "x")]
        switches = [gl.deactivate, *(found.stop for found in captures)]
        gl.activate()
        for found in captures:
            found.start()
        for number, index in enumerate(order):
            assert 5 + 2 * number == attend(1 + number)
            switches[index]()
        attend(99)
        assert attend.__code__ is code
        left_at = {index: number + 1 for number, index in enumerate(order)}
        xs = [1, 2, 3, 4]
        assert [2 * (x + 1) for x in xs][: left_at[0]] == gl.cache["attend"]
        assert [2 * (x + 1) for x in xs][: left_at[1]] == captures[0]["attend"]
        assert [x + 1 for x in xs][: left_at[2]] == captures[1]["attend"]
        assert xs[: left_at[3]] == captures[2]["attend"]

    def test_nested(self):
        with capture(attend, "attn") as outer:
            attend(1)
            with capture(attend, "attn") as inner:
                attend(2)
            attend(3)
        assert ([4, 6, 8], [6]) == (outer["attend"], inner["attend"])

    def test_stop_and_start_go_on_in_the_same_lists(self):
        found = capture(attend, "attn")
        attend(1)
        with found as same:
            assert same is found
            attend(2)
        assert found.start().start() is found
        assert found.is_running
        attend(3)
        found.stop(), found.stop()
        assert not found.is_running
        attend(4)
        assert {"attend": [6, 8]} == found
        assert [0, 1] == [record.call for record in found.records]

    def test_clear_starts_over(self):
        with capture(attend, "attn") as found:
            attend(1)
            held = found["attend"]
            found.clear()
            attend(2)
        assert ([4], [6]) == (held, found["attend"])

    def test_limits(self):
        with capture(attend, "attn", limit=2) as found, capture(attend, "attn", max_bytes=60) as small:
            attend(1), attend(2)
            with pytest.warns(VisualizerWarning, match=r"60 bytes on cpu \(max_bytes\).*until its clear"):
                attend(3)
            attend(4)
        assert ([8, 10], [4, 6]) == (found["attend"], small["attend"])

    def test_keep_raises_here_and_on_reading(self):
        def swallows(x):
            try:
                attn = x
            except ValueError:
                return "swallowed"

        def keep(value):
            raise ValueError("no")

        with capture(swallows, "attn", at="assign", keep=keep) as found:
            assert "swallowed" == swallows(1)
        with pytest.raises(ValueError, match="no") as caught:
            found["TestSeveralAtOnce"]
        assert "while keeping 'attn'" in caught.value.__notes__[0]


class TestResults:
    def test_it_is_a_dict(self):
        with capture(attend, "attn") as found:
            attend(1)
        for read in (dict, copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f)), lambda f: {**f}):
            assert {"attend": [4]} == read(found)
        assert (True, 1, ["attend"]) == (isinstance(found, dict), len(found), [*found])

    def test_records_say_where_each_comes_from(self):
        with capture(attend, "q", "attn") as found:
            attend(1), attend(2)
        expected = [("attend:q", "q", 2, 0), ("attend:q", "q", 3, 1)]
        expected += [("attend:attn", "attn", 4, 0), ("attend:attn", "attn", 6, 1)]
        assert expected == [(r.key, r.variable, r.value, r.call) for r in found.records]
        assert {(threading.get_ident(), None, None)} == {(r.thread, r.line, r.module) for r in found.records}

    def test_printed_it_is_a_table(self):
        with capture(attend, "q", "attn", at="assign") as found:
            attend(1), attend(2)
        text = repr(found)
        assert text.startswith("<captured q, attn: 2 keys, 4 values, ")
        assert ["key", "calls", "shape", "dtype", "bytes"] == text.splitlines()[1].split()
        assert ["attend:q", "2", "int"] == text.splitlines()[2].split()[:3]
        assert "<captured attn: 1 key, 0 values, 0 B" in repr(capture(attend, "attn"))

    def test_a_long_table_says_what_it_leaves_out(self):
        found = capture([make_attend(number) for number in range(150)], "attn")
        assert "... 50 more" in repr(found)
        assert 103 >= len(repr(found).splitlines())

    def test_the_notebook_table_escapes_names(self):
        def forward(x):
            attn = x
            return attn

        forward.__qualname__ = "<script>alert(1)</script>"
        with capture(forward, "attn") as found:
            forward(1)
        html = found._repr_html_()
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert 2 == html.count("<tr>")

    def test_get_local_has_all_of_it(self, gl):
        gl("attn")(attend)
        with gl.activate():
            attend(1)
        assert repr(gl.cache).startswith("<get_local.cache: 1 key, 1 value")
        assert "attend" in gl.cache._repr_html_()
        assert ["attend"] == [record.key for record in gl.cache.records]


def make_attend(number):
    def attend(x):
        attn = number
        return attn

    attend.__qualname__ = f"attend_{number}"
    return attend


class TestTheUsersHand:
    """The cache is a dict of lists, and whoever has it may change it: all ways of reading follow."""

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    @pytest.mark.parametrize("other", [tuple, deque])
    def test_a_list_that_was_made_something_else_is_gone_on_with(self, keep, other):
        with capture(attend, "attn", keep=keep) as found:
            attend(1), attend(2)
            found["attend"] = other(found["attend"])
            assert isinstance(found["attend"], other)
            assert 9 == attend(3)
            assert [4, 6, 8] == found["attend"] == [record.value for record in found.records]
            found["attend"] = None
            assert 9 == attend(3)
            assert [None, 8] == found["attend"]

    def test_equal_values_keep_their_own_records(self):
        with capture(attend, "attn") as found:
            for x in (1, 1, 1, 2):
                attend(x)
            del found["attend"][1]
            assert [0, 1, 3] == [record.call for record in found.records]

    def test_what_waits_belongs_under_the_key_that_is_changed(self):
        with capture(attend, "attn", keep="graph") as found:
            attend(1)
            del found["attend"]
            assert {} == dict(found)
            attend(2)
            assert [6] == found["attend"]
            attend(3)
            found["attend"] = []
            attend(4)
            assert {"attend": [10]} == dict(found)
            attend(5)
            assert ("attend", [10, 12]) == found.popitem()
            attend(6)
            found |= {"attend": [0]}
            assert [0] == found.setdefault("attend", [1]) == found["attend"]
            assert [1] == found.setdefault("other", [1])


class TestStack:
    @pytest.fixture(autouse=True)
    def numpy(self):
        self.np = pytest.importorskip("numpy", reason="engine only: numpy is not in this environment")

    def captured(self, shapes, calls=1):
        functions = []
        for number, shape in enumerate(shapes):

            def attend(shape=shape):
                attn = self.np.ones(shape)
                return None

            attend.__qualname__ = f"attend_{number}"
            functions.append(attend)
        with capture(functions, "attn") as found:
            for _ in range(calls):
                for function in functions:
                    function()
        return found

    def test_one_of_each_key(self):
        assert (3, 2, 5) == self.captured([(2, 5)] * 3).stack().shape

    def test_one_key_has_all_its_calls(self):
        assert (4, 2, 5) == self.captured([(2, 5)], calls=4).stack().shape

    def test_a_chosen_call(self):
        found = self.captured([(2, 5)] * 3, calls=2)
        assert (3, 2, 5) == found.stack(call=-1).shape
        with pytest.raises(ValueError, match=r"'attend_0' has 2 values .*call=-1"):
            found.stack()
        with pytest.raises(ValueError, match="has 2 values, none at 2"):
            found.stack(call=2)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"'attend_1' cannot be stacked on 'attend_0': shape \(3, 5\) on"):
            self.captured([(2, 5), (3, 5)]).stack()

    def test_nothing_to_stack(self):
        with pytest.raises(ValueError, match="did not run, or had nothing to record"):
            self.captured([(2, 5)] * 2, calls=0).stack()
        with pytest.raises(ValueError, match="no values"):
            self.captured([(2, 5)], calls=0).stack()

    def test_numbers_and_what_is_no_array(self):
        with capture(attend, "attn") as found:
            attend(1), attend(2)
        assert [4, 6] == found.stack().tolist()
        with capture(Base.score, "self") as found:
            Base().score(1)
        with pytest.raises(ValueError, match="no arrays, tensors or numbers"):
            found.stack()


class TestMemory:
    def test_what_was_captured_goes_with_what_holds_it(self):
        """At once, by counting references: on a GPU the collector comes too late."""

        class Value:
            pass

        def forward():
            attn = Value()
            return None

        gc.collect()
        gc.disable()
        try:
            with capture(forward, "attn", keep="graph") as found:
                forward()
            seen = weakref.ref(next(iter(found.values()))[0])
            assert seen() is not None
            del found
            assert seen() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize("keep", ["numpy", "graph", "callable"])
    @pytest.mark.parametrize("reads", ["before the end", "after it", "never"])
    def test_however_it_was_read(self, keep, reads):
        class Value:
            pass

        def forward():
            attn = Value()
            return None

        gc.collect()
        gc.disable()
        try:
            with capture(forward, "attn", keep=(lambda value: value) if keep == "callable" else keep) as found:
                forward()
                if reads == "before the end":
                    assert 1 == len(next(iter(found.values())))
                alive = [weakref.ref(one) for one in gc.get_objects() if type(one) is Value]
            if reads == "after it":
                assert 1 == len(next(iter(found.values())))
            assert [True] == [one() is not None for one in alive]
            del found
            assert [False] == [one() is not None for one in alive]
        finally:
            gc.enable()

    def test_one_whose_keep_refers_back_to_it(self):
        class Probe:
            def __init__(self):
                self.found = capture(attend, "attn", keep=self.reduce)

            def reduce(self, value):
                return self, value

        probe = Probe()
        with probe.found:
            attend(1)
        gone = weakref.ref(probe)
        del probe
        gc.collect()
        assert gone() is None

    def test_one_that_goes_with_a_value_that_it_trims(self):
        class Value:
            def __del__(self):
                works.clear()

        def forward(x):
            return "done"

        code = forward.__code__
        works = [capture(forward, "x", limit=1).start()]
        forward(Value())
        assert forward.__code__ is not code
        assert "done" == forward(1)
        assert forward.__code__ is code
        assert "done" == forward(2)

    def test_what_is_taken_out_of_the_cache_goes(self):
        class Value:
            pass

        def forward(value):
            return None

        def taken_out(take):
            with capture(forward, "value") as found:
                alive = weakref.WeakSet([value := Value()])
                forward(value)
                del value
                [key] = found
                take(found, key)
                gc.collect()
                return len(alive), found.records

        assert (0, []) == taken_out(lambda found, key: found.pop(key) and None)
        assert (0, []) == taken_out(lambda found, key: found.popitem() and None)
        assert (0, []) == taken_out(lambda found, key: found.__delitem__(key))
        assert (0, []) == taken_out(lambda found, key: found.__setitem__(key, []))
        assert (0, []) == taken_out(lambda found, key: found.update({key: []}))
        assert (0, []) == taken_out(lambda found, key: found[key].clear() or found.fetch())

    def test_one_that_is_dropped_while_it_runs_ends(self):
        code = attend.__code__
        found = capture(attend, "attn").start()
        assert attend.__code__ is not code
        del found
        gc.collect()
        assert attend.__code__ is code

    def test_a_function_can_go_while_it_is_captured(self):
        function = make_attend(1)
        found = capture(function, "attn").start()
        gone = weakref.ref(function)
        del function
        gc.collect()
        assert gone() is None
        found.stop()

    def test_an_object_can_go_and_its_place_in_memory_be_taken(self):
        one = Base()
        with capture(one.score, "x") as found:
            one.score(1)
            gone = weakref.ref(one)
            del one
            gc.collect()
            assert gone() is None
            for _ in range(100):  # one of them may well get the same address
                Base().score(2)
        assert [1] == found["Base.score"]


def held_up(waits):
    """A function for `keep` that waits where there is something to wait for."""
    return lambda value: waits[0](value) if waits else value


class TestThreads:
    def hammer(self, seconds):
        """Eight threads call, two switch captures on and off; one capture is on all the while."""
        stop, errors = threading.Event(), []
        counts = [0] * 8

        def work(thread, number):
            q = thread, number
            attn = (*q, "attn")
            return attn

        def call(thread):
            try:
                while not stop.is_set():
                    assert (thread, counts[thread], "attn") == work(thread, counts[thread])
                    counts[thread] += 1
            except BaseException as error:
                errors.append(error)

        def switch():
            try:
                while not stop.is_set():
                    with capture(work, "q", "attn") as found:
                        time.sleep(0.001)
                    values = dict(found)
                    qs, attns = list(values.values())
                    assert [(*q, "attn") for q in qs] == attns
                    assert len(set(qs)) == len(qs)
                    assert [record.call for record in found.records if record.variable == "q"] == list(range(len(qs)))
            except BaseException as error:
                errors.append(error)

        code = work.__code__
        with capture(work, "q", "attn", at="return") as throughout:
            threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
            threads += [threading.Thread(target=switch) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(seconds)
            stop.set()
            for thread in threads:
                thread.join()
        assert [] == errors
        assert work.__code__ is code
        qs, attns = throughout.values()
        assert [(i, n) for i in range(8) for n in range(counts[i])] == sorted(qs)
        assert [(*q, "attn") for q in qs] == attns
        by_thread = {}
        for record in throughout.records:
            by_thread.setdefault(record.thread, set()).add(record.value[0])
        assert [1] * 8 == [len(numbers) for numbers in by_thread.values()]
        return sum(counts)

    def test_no_record_is_lost_doubled_or_torn(self):
        assert self.hammer(2) > 1000

    @pytest.mark.long
    def test_for_a_minute(self):
        assert self.hammer(60) > 10_000

    def late(self, work, waits, monkeypatch, act):
        """Have a thread call `work`, and `act` while it is held up: in `keep`, or without one before it appends."""
        arrived, go_on = threading.Event(), threading.Event()

        def wait(*args):
            if threading.current_thread() is thread and not arrived.is_set():
                arrived.set()
                assert go_on.wait(60)
            return threading.get_ident() if not args else args[0]

        if waits is None:
            monkeypatch.setattr("visualizer.store.channel.get_ident", wait)
        else:
            waits.append(wait)
        thread = threading.Thread(target=work, args=("late",))
        thread.start()
        try:
            assert arrived.wait(60)
            act()
        finally:
            go_on.set()
            thread.join()

    @pytest.mark.parametrize("way", ["graph", "callable", "assign"])
    def test_what_was_on_its_way_in_another_thread_does_not_come_after_the_end(self, way, monkeypatch):
        def work(x):
            attn = x
            return attn

        waits = None if way == "graph" else []
        at = "assign" if way == "assign" else "return"
        found = capture(work, "attn", at=at, keep="graph" if waits is None else held_up(waits))

        def end():
            found.stop()
            assert ["before"] == [*itertools.chain(*found.values())]

        found.start()
        work("before")
        self.late(work, waits, monkeypatch, end)
        assert ["before"] == [*itertools.chain(*found.values())]
        with found:
            assert ["before"] == [*itertools.chain(*found.values())]
            work("again")
        assert ["before", "again"] == [*itertools.chain(*found.values())]

    @pytest.mark.parametrize("keep", ["graph", "callable"])
    def test_nor_after_get_local_is_deactivated(self, keep, gl, monkeypatch):
        waits = None if keep == "graph" else []

        @gl("attn", keep="graph" if waits is None else held_up(waits))
        def work(x):
            attn = x
            return attn

        gl.activate()
        work("before")
        self.late(work, waits, monkeypatch, gl.deactivate)
        assert [["before"]] == [*gl.cache.values()]
        with gl.activate():
            work("again")
        assert [["before", "again"]] == [*gl.cache.values()]
        gl.clear()
        assert [[]] == [*gl.cache.values()]

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_none_among_the_values(self, keep):
        """None has work of its own with keep="graph", which plain values of other threads may not suffer from."""

        def work(n):
            item = None if n % 2 else n  # no name of a map, whose being None would be warned of
            return None

        def call():
            for n in range(20_000):
                work(n)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with capture(work, "item", keep=keep) as found:
                threads = [threading.Thread(target=call) for _ in range(4)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            sys.setswitchinterval(interval)
        [values] = found.values()
        assert 40_000 == values.count(None)
        assert sorted([*range(0, 20_000, 2)] * 4) == sorted(value for value in values if value is not None)

    def test_what_ended_before_the_end_is_recorded_whatever_other_threads_do(self):
        def work(n):
            item = None if n < 0 else n
            return None

        def disturb():
            while not done.is_set():
                work(-1)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(200):
                done = threading.Event()
                other = threading.Thread(target=disturb)
                with capture(work, "item", keep="graph") as found:
                    other.start()
                    mine = threading.Thread(target=lambda: [work(n) for n in range(20)])
                    mine.start()
                    mine.join()
                done.set()
                other.join()
                [values] = found.values()
                assert [*range(20)] == [value for value in values if value is not None]
        finally:
            sys.setswitchinterval(interval)

    def test_calls_are_numbered_from_0_by_whoever_clears(self):
        def work(n):
            attn = n
            return None

        done = threading.Event()

        def call():
            while not done.is_set():
                work(1)

        thread = threading.Thread(target=call)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with capture(work, "attn") as found:
                thread.start()
                for _ in range(300):
                    found.clear()
                    calls = [record.call for record in found.records]
                    assert calls == list(range(len(calls)))
        finally:
            done.set()
            thread.join()
            sys.setswitchinterval(interval)

    def test_tasks(self):
        async def forward(x):
            attn = x
            await asyncio.sleep(0.001 * (x % 3))
            attn = x + 0.5
            await asyncio.sleep(0)
            return attn

        async def main():
            return await asyncio.gather(*[forward(x) for x in range(50)])

        with capture(forward, "attn") as at_return, capture(forward, "attn", at="assign") as assigned:
            results = asyncio.run(main())
        [values] = at_return.values()
        assert results == sorted(values)
        calls = {}
        for record in assigned.records:
            calls.setdefault(record.call, []).append(record.value)
        assert [[x, x + 0.5] for x in range(50)] == sorted(calls.values())

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_a_forked_process_does_not_grow_its_parents_cache(self):
        code = (
            "import os\n"
            "from visualizer import capture\n"
            "def attend(x):\n    attn = x\n    return attn\n"
            "with capture(attend, 'attn') as found:\n"
            "    attend(1)\n"
            "    child = os.fork()\n"
            "    attend(2)\n"
            "    if child == 0:\n"
            "        os._exit(0 if found['attend'] == [1, 2] else 1)\n"
            "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
            "assert found['attend'] == [1, 2], found\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        assert (0, "") == (done.returncode, done.stderr)


def test_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors", reason="engine only: safetensors is not in this environment")
    with capture(attend, "q", "attn") as found:
        attend(1), attend(2)
    found.save(tmp_path / "maps.safetensors", about={"tokens": ["a", "b"]})
    again = load(tmp_path / "maps.safetensors")
    assert {"attend:q": [2, 3], "attend:attn": [4, 6]} == again
    assert [(r.key, r.call, r.thread) for r in found.records] == [(r.key, r.call, r.thread) for r in again.records]
    assert {"tokens": ["a", "b"]} == again.about

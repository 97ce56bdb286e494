"""From rewritten code into a store: what is delivered, converted, numbered, and warned of."""

import asyncio
import functools
import gc
import itertools
import signal
import threading
import warnings
import weakref
from collections import deque

import pytest
from functions import make

from visualizer import VisualizerWarning, capture
from visualizer.store.locks import this_thread


class TestReturns:
    def test_a_call_that_raises_records_nothing(self, gl):
        @gl("attn")
        def forward(x):
            attn = x
            if x < 0:
                raise ValueError(x)
            return attn

        gl.activate()
        forward(1)
        with pytest.raises(ValueError, match="-1"):
            forward(-1)
        assert [1] == gl.cache[next(iter(gl.cache))]

    def test_an_unbound_name_warns_once_with_the_lines(self, gl):
        @gl("attn")
        def forward(fused):
            if not fused:
                attn = "weights"
            return fused

        line = forward.__code__.co_firstlineno + 3
        gl.activate()
        with pytest.warns(VisualizerWarning) as caught:
            assert [forward(True), forward(True), forward(False)] == [True, True, False]
        assert len(caught) == 1
        for part in ("'attn'", "forward", f"line {line}", "fused", "set_fused_attn(False)"):
            assert part in str(caught[0].message)
        assert caught[0].filename == __file__
        assert ["weights"] == gl.cache[next(iter(gl.cache))]

    def test_none_is_recorded_and_is_no_cause_to_warn_where_nothing_else_was_to_be_expected(self, gl):
        @gl("best")
        def search(x):
            best = None
            return x

        gl.activate()
        search(1)
        assert [None] == gl.cache[next(iter(gl.cache))]


class TestAssignments:
    def test_every_value_in_order_with_its_line_and_call(self, gl):
        @gl("attn", at="assign")
        def forward(scores):
            attn = scores
            attn = [s / sum(attn) for s in attn]
            for attn in [attn[0]]:
                pass
            return attn

        first = forward.__code__.co_firstlineno
        gl.activate()
        forward([1, 3]), forward([1, 1])
        [key] = gl.cache
        assert [[1, 3], [0.25, 0.75], 0.25, [1, 1], [0.5, 0.5], 0.5] == gl.cache[key]
        assert [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)] == [(r.call, r.line - first) for r in gl.records]

    def test_a_call_that_raises_has_recorded_what_it_assigned(self, gl):
        @gl("attn", at="assign")
        def forward(x):
            attn = x
            raise ValueError

        gl.activate()
        with pytest.raises(ValueError):
            forward(1)
        assert [1] == gl.cache[next(iter(gl.cache))]

    def test_calls_that_interleave_are_told_apart(self, gl):
        @gl("x", at="assign")
        def stream(start):
            x = start
            yield x
            x = start + 1
            yield x

        gl.activate()
        one, two = stream(10), stream(20)
        next(one), next(two), next(two), next(one)
        assert [(10, 0), (20, 1), (21, 1), (11, 0)] == [(r.value, r.call) for r in gl.records]

    @pytest.mark.parametrize("limit", [1, 2])
    def test_the_limit_counts_calls_that_interleave(self, gl, limit):
        @gl("x", at="assign")
        def stream(start):
            for step in range(100):
                x = start + step
                yield x

        gl.activate(limit=limit)
        first, second = stream(0), stream(1000)
        next(first), next(second)
        for _ in range(50):
            next(first), next(second)
        values = gl.cache[next(iter(gl.cache))]
        assert [*range(1000, 1051)] == [value for value in values if value >= 1000]
        assert ([] if limit == 1 else [*range(51)]) == [value for value in values if value < 1000]

    def test_the_limit_counts_calls(self, gl):
        @gl("x", at="assign")
        def twice(start):
            x = start
            x = start + 1
            return x

        gl.activate(limit=2)
        for start in (10, 20, 30):
            twice(start)
        assert [20, 21, 30, 31] == gl.cache[next(iter(gl.cache))]


class TestKeep:
    def test_containers_are_snapshots_and_graph_is_the_object(self, gl):
        @gl("values", keep="graph")
        def by_reference(values):
            return None

        @gl("values")
        def by_copy(values):
            return None

        gl.activate()
        values = [1]
        by_reference(values), by_copy(values)
        values.append(2)
        kept, copied = (key[0] for key in gl.cache.values())
        assert kept is values
        assert [1] == copied

    def test_a_callable_keeps_only_its_result(self, gl):
        forward = make(gl, "attn", keep=str)
        gl.activate()
        forward(1)
        assert ["4"] == gl.cache["forward"]

    def test_a_raising_keep_says_whose_variable_it_was(self, gl):
        forward = make(gl, "attn", keep=lambda value: value.mean(1))
        gl.activate()
        with pytest.raises(AttributeError) as caught:
            forward(1)
        [note] = caught.value.__notes__
        assert "'attn'" in note
        assert "forward" in note
        assert forward.__code__.co_filename in note

    def test_a_raising_keep_that_the_function_swallows_is_raised_by_reading(self, gl):
        @gl("attn", at="assign", keep=lambda value: value.mean(1))
        def forward(x):
            try:
                attn = x
            except Exception:
                attn = None
            return attn

        gl.activate()
        assert forward(1) is None
        with pytest.raises(AttributeError, match="mean"):
            gl.cache
        assert [None] == gl.cache[next(iter(gl.cache))]

    def test_what_a_with_ends_does_not_hide_an_error_that_was_swallowed(self, gl):
        @gl("attn", at="assign", keep=lambda value: value.mean(1))
        def forward(x):
            try:
                attn = x
            except Exception:
                pass

        with gl.activate(), gl.activate():
            forward(1)
        with pytest.raises(AttributeError, match="mean"):
            gl.cache

    def test_a_remembered_error_does_not_hold_on_to_locals(self, gl):
        alive = []

        class Large:
            def __init__(self):
                alive.append(weakref.ref(self))

        def broken(value):
            raise ValueError("no")

        @gl("large", keep=broken)
        def forward():
            large = Large()
            return None

        gl.activate()
        with pytest.raises(ValueError, match="no"):
            forward()
        gc.collect()
        assert [None] == [one() for one in alive]
        with pytest.raises(ValueError, match="no"):
            gl.cache

    def test_a_recursion_error_that_the_function_deals_with_is_its_own_affair(self, gl):
        @gl("values")
        def deep(values):
            try:
                return 1 + deep(values)
            except RecursionError:
                return 0

        gl.activate(limit=5)
        assert deep([1]) > 0
        with pytest.warns(VisualizerWarning, match=r"calls of .*deep .* too close to the recursion limit"):
            assert gl.cache

    @pytest.mark.parametrize("keep", ["numpy", "tensor", "graph"])
    def test_a_value_whose_own_code_fails_is_kept_and_the_function_goes_on(self, gl, keep):
        class Lazy:
            @property
            def __class__(self):
                raise RuntimeError("evaluated")

            def __sizeof__(self):
                raise RuntimeError("measured")

        class Unhashable(type):
            __hash__ = None

            def __eq__(self, other):
                raise RuntimeError("compared")

        class Odd(metaclass=Unhashable):
            pass

        class Thing:
            pass

        @gl("value", keep=keep)
        def forward(value):
            return "done"

        values = [Lazy(), Odd(), weakref.proxy(Thing())]
        with gl.activate(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is or holds a .*(Lazy|proxy)", VisualizerWarning)
            assert ["done"] * 3 == [forward(value) for value in values]
        [kept] = gl.cache.values()
        assert list(map(id, values)) == list(map(id, kept))

    def test_each_class_that_is_kept_by_reference_is_told_once(self, gl):
        class Memory:
            def __init__(self, items):
                self.items = items

        @gl("memory", "state", at="assign")
        def forward(x):
            memory = Memory([x])
            state = {"memory": memory, "x": (x, str)}
            memory = Memory([0])
            state["memory"].items.append(5)
            return x

        gl.activate()
        with pytest.warns(
            VisualizerWarning, match="'memory' or 'state' of .*forward.*is or holds a .*Memory.*later"
        ) as told:
            forward(1), forward(2)
        assert 1 == len(told)
        assert [1, 5] == gl.cache[next(key for key in gl.cache if "state" in key)][0]["memory"].items
        gl.activate(keep=lambda value: value)
        forward(3)  # what a user's function makes is the user's

    def test_a_copy_that_runs_the_captured_function_is_not_recorded(self, gl):
        class Grid:
            shape = (2,)

            def __init__(self, rows):
                self.rows = rows

            @gl("rows")
            def copy(self):
                rows = list(self.rows)
                return Grid(rows)

        @gl("grid")
        def forward(rows):
            grid = Grid(rows)
            return None

        gl.activate()
        forward([1]), forward([2])
        of_copy, of_forward = gl.cache.values()
        assert ([], [[1], [2]]) == (of_copy, [grid.rows for grid in of_forward])


class Items(list):
    """Its items cannot be read."""

    def __iter__(self):
        raise OSError("the file is closed.")


class Names(dict):
    def values(self):
        raise MemoryError


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Text(deque):
    def __iter__(self):
        raise Silent


class TestFailures:
    """What fails in recording is said at the end, or to whoever reads, and never to the function."""

    @pytest.mark.parametrize("at", ["return", "assign"])
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize(
        ("make_value", "said"),
        [(Items, "OSError: the file is closed. "), (Names, "MemoryError: . "), (Text, "<Silent>")],
    )
    def test_a_value_that_cannot_be_copied(self, gl, make_value, said, several, at):
        def forward(value):
            attn = value
            number = 1
            return number + 1

        gl("attn", *["number"][: int(several)], at=at)(forward)
        gl.activate()
        assert [2, 2] == [forward(make_value([])), forward(make_value([]))]
        with pytest.warns(VisualizerWarning, match="2 values of .*forward") as caught:
            gl.deactivate()
        [message] = [str(one.message) for one in caught]
        for part in (said, "forward (", "forward:attn'" if several else "forward'", __file__, "keep='graph'"):
            assert part in message
        values = [*gl.cache.values()]
        assert ([[], [1, 1]] if several else [[]]) == values, "the other variables of the call are recorded"

    def test_it_is_said_to_whoever_reads_first_and_once(self, gl):
        @gl("x")
        def forward(x):
            return "done"

        with gl.activate():
            assert ["done", "done"] == [forward(Items()), forward(0)]
            with pytest.warns(VisualizerWarning, match="1 values"):
                assert [[0]] == [*gl.cache.values()]
            assert [[0]] == [*gl.cache.values()]

    @pytest.mark.parametrize("names", [("x",), ("x", "q")])
    @pytest.mark.parametrize("at", ["return", "assign"])
    def test_a_store_that_fails(self, gl, monkeypatch, names, at):
        def fail(value):
            raise MemoryError("no room")

        def forward(start):
            x = q = start
            return x + q

        gl(*names, at=at)(forward)
        gl.activate()
        with monkeypatch.context() as patch:
            patch.setattr("visualizer.store.store.resident_bytes", fail)
            assert 10 == forward(5)
        with pytest.warns(VisualizerWarning, match="could not be recorded under .*MemoryError: no room"):
            gl.deactivate()
        with gl.activate():
            assert 14 == forward(7)
        assert all(values[-1] == 7 for values in gl.cache.values())

    def test_the_error_of_a_keep_reaches_the_function_whatever_the_repr_of_it_does(self, gl):
        class Keep:
            def __call__(self, value):
                raise ValueError("by keep")

            def __repr__(self):
                raise RuntimeError("by repr")

        forward = make(gl, "attn", keep=Keep())
        with gl.activate():
            with pytest.raises(ValueError, match="by keep") as caught:
                forward(1)
            assert "keep=<Keep>" in caught.value.__notes__[0]
            with pytest.raises(ValueError, match="by keep"):
                assert gl.cache
        with pytest.warns(VisualizerWarning, match=r"keep=<Keep>; the new"):
            gl("attn")(forward)

    def test_what_a_handler_of_a_signal_raises_is_for_the_program(self, gl):
        class Handler:
            def __call__(self, *_):
                raise TimeoutError

            def method(self, *_):
                raise TimeoutError

        class Slow(list):
            def __iter__(self):
                signal.raise_signal(signal.SIGINT)
                return super().__iter__()

        forward = gl("value")(lambda value: "done")
        before = signal.getsignal(signal.SIGINT)
        gl.activate()
        try:
            for handler in (Handler(), Handler().method, functools.partial(Handler.method, None)):
                signal.signal(signal.SIGINT, handler)
                with pytest.raises(TimeoutError):
                    forward(Slow())
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_warnings_as_errors(self, gl, keep):
        @gl("attn", "x", keep=keep)
        def forward(x):
            if x > 2:
                attn = x
            return x

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gl.activate(max_bytes=500)
            assert [*range(20)] == [forward(x) for x in range(20)]
            for part in ("'attn' was not bound", "would take more than 500 bytes"):
                with pytest.raises(VisualizerWarning, match=part):
                    assert gl.cache
            attn, x = gl.cache.values()
            assert [0, 1, 2, 3] == x[:4]
            assert [3, 4] == attn[:2]
            gl.deactivate()


class TestCalls:
    def test_calls_that_began_unseen_are_calls_of_their_own(self, gl):
        @gl("x", at="assign")
        def stream(start):
            x = start
            yield x
            x = start + 1
            yield x

        gl.activate()
        for _ in range(5):
            list(stream(0))
        running = [stream(10 * number) for number in range(1, 5)]  # made while on: they have the rewritten code
        gl.deactivate()
        for one in running:
            next(one)
        gl.clear()
        gl.activate()
        for one in running:
            list(one)
        assert 4 == len({record.call for record in gl.records})

    def test_a_call_under_way_is_numbered_anew_when_the_cache_is_cleared(self, gl):
        @gl("a", at="assign")
        def forward(values):
            for value in values:
                a = value
                yield

        gl.activate(limit=2)
        for _ in range(20):
            list(forward([0]))
        under_way = forward([1, 2, 3])
        next(under_way)
        gl.clear()
        list(forward([10]))
        next(under_way)
        list(forward([20]))
        [key] = gl.cache
        assert [10, 20] == gl.cache[key]  # the one under way began before either
        assert [0, 2] == [record.call for record in gl.records]
        list(forward([30])), list(forward([40]))
        assert [30, 40] == gl.cache[key]

    def test_switching_on_again_in_the_middle_of_a_call_does_not_split_it(self, gl):
        @gl("a", at="assign")
        def forward():
            a = 1
            gl.activate()
            a = 2
            return a

        gl.activate()
        forward()
        assert [(1, 0), (2, 0)] == [(record.value, record.call) for record in gl.records]


def held_up(waits):
    """A function for `keep` that waits where there is something to wait for."""
    return lambda value: waits[0](value) if waits else value


class TestThreads:
    def late(self, work, waits, monkeypatch, act):
        """Have a thread call `work`, and `act` while it is held up: in `keep`, or without one before it appends."""
        arrived, go_on = threading.Event(), threading.Event()

        def wait(*args):
            if threading.current_thread() is thread and not arrived.is_set():
                arrived.set()
                assert go_on.wait(60)
            return this_thread() if not args else args[0]

        if waits is None:
            monkeypatch.setattr("visualizer.store.channel.this_thread", wait)
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

"""What the store files: within its limits, under threads, in a forked child."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import pytest
from functions import make

from visualizer import VisualizerWarning, capture
from visualizer.store.budget import object_bytes
from visualizer.store.locks import ForkSafeLock


class TestLimits:
    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_the_limit_keeps_the_most_recent_calls_of_each_key(self, gl, keep):
        forward = make(gl, "q", "attn", keep=keep)
        gl.activate(limit=3)
        for x in range(10):
            forward(x)
        assert {"forward:q": [8, 9, 10], "forward:attn": [16, 18, 20]} == gl.cache

    def test_the_most_recent_calls_are_those_that_began_last(self, gl):
        """However they are counted: a definition run again, as in a notebook, counts from 0, and so does clear()."""

        def define(keep):
            @gl("a", at="assign", keep=keep)
            def cell(x):
                a = x
                a = -x

            return cell

        gl.activate(limit=2)
        cell = define("numpy")
        for x in range(10):
            cell(x)
        [values] = gl.cache.values()
        assert [8, -8, 9, -9] == values
        cell = define(lambda value: value)
        for x in range(100, 105):
            cell(x)
        assert [103, -103, 104, -104] == next(iter(gl.cache.values()))

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_a_list_that_the_user_works_on_stays_within_the_limits(self, gl, keep):
        forward = make(gl, "attn", keep=keep)
        gl.activate(limit=3, max_bytes=3 * object_bytes(1))
        for x in range(50):
            forward(x)
            values = gl.cache["forward"]
            assert 2 * x + 2 == values[-1]
            assert len(values) <= 3
            if x % 4 == 0:
                values[:] = [value + 1000 for value in values]
            if x % 7 == 0:
                values.clear()

    def test_the_same_small_value_again_after_the_list_was_emptied(self, gl):
        forward = make(gl, "attn")
        gl.activate(limit=2)
        forward(1), forward(1)
        gl.cache["forward"].clear()
        forward(1)
        assert {"forward": [4]} == gl.cache

    def test_a_limit_makes_room_within_the_budget(self, gl):
        @gl("data")
        def forward(size):
            data = "x" * size
            return data

        gl.activate(limit=2, max_bytes=3 * object_bytes("x" * 1000))
        for _ in range(100):
            forward(1000)
        assert 2 == len(gl.cache[next(iter(gl.cache))])

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_past_the_budget_nothing_more_is_recorded_and_one_warning_says_so(self, gl, keep):
        @gl("data", keep=keep)
        def forward(size):
            data = "x" * size
            return data

        size = object_bytes("x" * 1000)
        gl.activate(max_bytes=3 * size)
        with pytest.warns(VisualizerWarning) as caught:
            for _ in range(100):
                forward(1000)
            [key] = gl.cache
            assert 3 == len(gl.cache[key])
        assert len(caught) == 1
        for part in (f"{3 * size:,} bytes", "cpu", "forward", "get_local.clear()", "max_bytes"):
            assert part in str(caught[0].message)
        gl.clear()
        forward(1000)
        assert 1 == len(gl.cache[key])

    def test_what_several_functions_have_not_had_filed_yet_shares_the_budget(self, gl):
        class Value:
            def __sizeof__(self):
                return 1000

        @gl("value", keep="graph")
        def one(value):
            return None

        @gl("value", keep="graph")
        def two(value):
            return None

        @gl("value", keep="graph")
        def three(value):
            return None

        gl.activate(max_bytes=11_000)
        alive = weakref.WeakSet()
        with pytest.warns(VisualizerWarning, match="11,000 bytes"):
            for _ in range(10):
                for function in (one, two, three):
                    alive.add(value := Value())
                    function(value)
                    del value
                    assert len(alive) <= 11
        assert 10 == sum(map(len, gl.cache.values())) == len(alive)

    @pytest.mark.filterwarnings("ignore:.*is or holds a .*Value")
    @pytest.mark.parametrize("first", ["graph", "numpy"])
    def test_whatever_is_kept_of_values_they_share_the_budget_in_the_order_of_the_calls(self, gl, first):
        class Value:
            def __sizeof__(self):
                return 1000

        @gl("value", keep=first)
        def one(value):
            return None

        @gl("value", keep="numpy" if first == "graph" else "graph")
        def two(value):
            return None

        gl.activate(max_bytes=11_000)
        alive = weakref.WeakSet()
        with pytest.warns(VisualizerWarning, match="11,000 bytes"):
            for _ in range(10):
                for function in (one, two):
                    alive.add(value := Value())
                    function(value)
                    del value
                    assert len(alive) <= 11
            assert [5, 5] == [len(values) for values in gl.cache.values()]

    @pytest.mark.parametrize("number", [10**6, 0.5], ids=str)
    def test_numbers_count_too_if_nobody_reads_them(self, gl, number):
        forward = make(gl, "x", keep="graph")
        gl.activate(max_bytes=200_000)
        with pytest.warns(VisualizerWarning, match="200,000 bytes"):
            for _ in range(20_000):
                forward(number)
        assert 200_000 // object_bytes(number) == len(gl.cache["forward"])

    def test_the_default_budget_is_a_quarter_of_the_memory(self, gl, monkeypatch):
        monkeypatch.setattr("visualizer.store.budget.memory_of", lambda device: 4 * 1100)
        forward = make(gl, "x", keep=lambda value: b"x" * (1000 - sys.getsizeof(b"")))
        gl.activate()
        with pytest.warns(VisualizerWarning, match="a quarter of its memory"):
            forward(1), forward(2)
        assert 1 == len(gl.cache["forward"])

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_where_warnings_are_errors_all_is_done_before_they_are_raised(self, gl, keep):
        forward = make(gl, "x", keep=keep)
        before = forward.__code__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gl.activate(max_bytes=3 * object_bytes(1))
            with contextlib.suppress(VisualizerWarning):
                for x in range(10):
                    forward(x)
            with contextlib.suppress(VisualizerWarning):
                gl.clear()
            assert [] == gl.cache["forward"]
            for x in range(3):
                forward(x)
            with contextlib.suppress(VisualizerWarning):
                gl.activate(keep=keep, limit=2)
            for x in range(3):
                forward(x)
            assert [1, 2] == gl.cache["forward"]
            with contextlib.suppress(VisualizerWarning):
                gl.deactivate()
        assert forward.__code__ is before

    def test_a_warning_is_given_when_nobody_is_waited_for(self, gl, monkeypatch):
        """What shows it may wait for another thread: a handler of logging, whose lock one has that prints the cache."""
        forward = make(gl, "x")
        seen = []

        def show(*_, **__):
            reader = threading.Thread(target=lambda: seen.append(len(gl.cache["forward"])))
            reader.start()
            reader.join(60)

        monkeypatch.setattr(warnings, "warn", show)
        gl.activate(max_bytes=3 * object_bytes(1))
        for x in range(10):
            forward(x)
        assert [3] == seen


class TestReading:
    def test_reading_comes_to_an_end_while_others_record(self, gl):
        @gl("x", keep="graph")
        def forward(x):
            return x

        gl.activate()
        stop = threading.Event()

        def work():
            while not stop.is_set():
                forward(1)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            start = time.monotonic()
            while time.monotonic() - start < 0.5:
                gl.clear()
            assert time.monotonic() - start < 20
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # it is what is tested
    def test_a_forked_child_reads_its_cache_while_the_parents_threads_record(self, gl):
        forward = make(gl, "attn")
        gl.activate(limit=10)
        stop = threading.Event()

        def work():
            while not stop.is_set():
                forward(1)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    try:
                        signal.alarm(20)
                        forward(2)
                        os._exit(0 if gl.cache["forward"][-1] == 6 else 1)
                    finally:  # or a second session of tests would go on in it
                        os._exit(2)
                assert 0 == os.waitpid(child, 0)[1]
        finally:
            stop.set()
            thread.join()

    def test_threads_get_their_own_records(self, gl):
        forward = make(gl, "q", "attn")
        gl.activate()

        together = threading.Barrier(4)  # all alive at once: an ended thread's number is given away again

        def work(start):
            together.wait()
            for x in range(start, start + 200):
                forward(x)
            together.wait()

        threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        q, attn = gl.cache["forward:q"], gl.cache["forward:attn"]
        assert [2 * value for value in q] == attn
        assert sorted(1000 * i + x + 1 for i in range(4) for x in range(200)) == sorted(q)
        assert 4 == len({record.thread for record in gl.records})


@pytest.mark.filterwarnings("ignore:nothing was recorded")
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

    @pytest.mark.slow
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

    def test_signal_handlers_do_not_pile_up_where_a_thread_is_slowed(self, gl, monkeypatch):
        """Each would wait for longer than the next takes to come, and the calls end at the recursion limit."""

        def acquire(lock, blocking=True, timeout=-1):  # another thread files all the time; a signal comes at each wait
            if timeout > 0:
                signal.raise_signal(signal.SIGINT)
            return False

        @gl("x")
        def forward(x):
            return None

        depth, depths, sent = 0, [], itertools.count()

        def handle(*_):
            nonlocal depth
            depth += 1
            depths.append(depth)
            forward(next(sent))
            depth -= 1

        monkeypatch.setattr("visualizer.store.store._MANY", -1)
        before = signal.signal(signal.SIGINT, handle)
        try:
            with gl.activate():
                with monkeypatch.context() as patch:
                    patch.setattr(ForkSafeLock, "acquire", acquire)
                    for _ in range(5):
                        forward(next(sent))
        finally:
            signal.signal(signal.SIGINT, before)
        assert [1, 1, 1, 1, 1] == depths
        [values] = gl.cache.values()
        assert [*range(10)] == sorted(values)

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


class TestAppendingDirectly:
    """One thread's plain values go into their list without a lock: none may be lost, doubled or torn for that."""

    @pytest.mark.parametrize("limit", [None, 50])
    @pytest.mark.parametrize("at_once", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
    def test_threads_that_take_turns_readers_and_a_hand_on_the_list(self, gl, limit, at_once):
        @gl("x")
        def forward(x):
            return None

        done, errors, counts = threading.Event(), [], [0] * at_once

        def call(thread):
            while not done.is_set():
                for _ in range(200):
                    forward(thread + counts[thread] / 2**20)
                    counts[thread] += 1
                time.sleep(0)

        def read():
            try:
                while not done.is_set():
                    held = gl.cache[key]
                    records = gl.records
                    numbers = [record.call for record in records]
                    assert numbers == sorted(numbers)
                    assert len(set(numbers)) == len(numbers)
                    assert limit is None or len(records) <= limit
                    assert held is not None
                    del held
                    time.sleep(0.001)
            except BaseException as error:
                errors.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            with gl.activate(limit=limit):
                [key] = gl.cache
                threads = [threading.Thread(target=call, args=(i,)) for i in range(at_once)]
                threads.append(threading.Thread(target=read))
                for thread in threads:
                    thread.start()
                time.sleep(1)
                done.set()
                for thread in threads:
                    thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert [] == errors
        records = gl.records
        assert gl.cache[key] == [record.value for record in records]
        by_thread = {}
        for record in records:
            by_thread.setdefault(record.thread, []).append(record.value)
        assert all(len({int(value) for value in values}) == 1 for values in by_thread.values()), "not its own thread"
        assert all(values == sorted(values) for values in by_thread.values()), "not in the order of the calls"
        if limit is None:
            expected = sorted(thread + n / 2**20 for thread in range(at_once) for n in range(counts[thread]))
            assert expected == sorted(record.value for record in records)
            assert list(range(len(records))) == [record.call for record in records]
        else:
            assert limit == len(records)

    def test_what_the_user_takes_out_makes_room_again(self, gl):
        forward = make(gl, "x")
        gl.activate(max_bytes=100 * object_bytes(1.5))
        for _ in range(30):
            for x in range(80):
                forward(x)
            values = gl.cache["forward"]
            assert list(range(80)) == values
            values.clear()
            del values
        with pytest.warns(VisualizerWarning, match="bytes on cpu"):
            for x in range(101):
                forward(x)
        assert 100 == len(gl.cache["forward"])

    def test_the_list_grows_with_each_call_for_whoever_holds_it(self, gl):
        forward = make(gl, "x", keep="graph")
        gl.activate()
        forward(0), forward(1)
        held = gl.cache["forward"]
        for x in range(2, 100):
            forward(x)
            assert list(range(x + 1)) == held
        del held[:50]
        forward(100)
        assert [*range(50, 101)] == held == [record.call for record in gl.records]

    def test_a_list_that_was_read_and_let_go_is_appended_to_again(self, gl):
        forward = make(gl, "x")
        gl.activate()
        for x in range(1000):
            forward(x)
            assert x == gl.cache["forward"][-1]
        gl.deactivate()
        forward(-1)
        assert [*range(1000)] == gl.cache["forward"]

    def test_bytes_that_are_counted_are_given_back(self, gl):
        forward = make(gl, "x")
        for limit in (None, 7, 1000):
            gl.activate(limit=limit, max_bytes=10**9)
            for x in (0.5, 1, 2**61, 10**30, "text", True, None, [1.5]):
                for _ in range(3000):
                    forward(x) if x is not None and not isinstance(x, (str, list)) else None
            gl.clear()
            assert 10**9 == gl._store.budget.room("cpu")

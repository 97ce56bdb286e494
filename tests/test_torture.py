"""What may happen around a captured call: other threads, signals, the collector, the end, forks, other tools."""

import bdb
import copy
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import pytest

from visualizer import UnsupportedPythonError, VisualizerWarning, capture, get_local, opcodes

ROOT = Path(__file__).parent.parent


def run(code, *, clean=True, **environment):
    """What a fresh process prints; it must end well, and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert (0, "") == (done.returncode, done.stderr if clean or done.returncode else "")
    return done.stdout.strip()


def halve(n):
    attn = n // 2
    return attn


class Layer:
    def __init__(self, scale):
        self.scale = scale

    @get_local("attn")
    def forward(self, x):
        attn = x * self.scale
        return attn + 1


class TestSwitchingInTheMiddle:
    def test_from_another_thread_while_generators_are_suspended(self, gl):
        def count(n):
            total = 0
            for i in range(n):
                total += i
                yield total
            return total

        gl("total")(count)
        original = count.__code__
        for first in ("on", "off"):
            if first == "on":
                gl.activate()
            running = [count(50) for _ in range(20)]
            for generator in running:
                next(generator)
            done = threading.Event()

            def switch(done=done):
                while not done.is_set():
                    gl.activate()
                    gl.deactivate()

            thread = threading.Thread(target=switch)
            thread.start()
            results = [list(generator) for generator in running]
            done.set()
            thread.join()
            gl.deactivate()
            assert [[sum(range(k + 1)) for k in range(1, 50)]] * 20 == results
        assert count.__code__ is original
        assert {sum(range(50))} >= set(gl.cache[next(iter(gl.cache))])

    def test_a_call_that_switches_its_own_capture(self):
        def forward(depth):
            attn = depth
            if depth:
                with capture(forward, "attn") as found:
                    forward(depth - 1)
                assert list(range(depth)) == sorted(next(iter(found.values())))
            return attn

        code = forward.__code__
        assert 4 == forward(4)
        assert forward.__code__ is code

    def test_recursion_to_the_limit(self, gl):
        def dive(depth):
            attn = depth
            try:
                return dive(depth + 1)
            except RecursionError:
                return attn

        bare = dive(0)
        gl("attn")(dive)
        with gl.activate(limit=3):
            deepest = dive(0)
            assert 0 <= bare - deepest <= 1, "the hook needs one call's headroom, and no more"
            with pytest.warns(VisualizerWarning, match=r"calls of .*dive .* too close to the recursion limit"):
                [values] = gl.cache.values()
        assert 3 == len(values)


class TestSignals:
    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_errors_that_a_handler_raises_anywhere_leave_all_in_order(self, keep):
        """In a process of its own: the handler may strike inside a finalizer, where errors are only printed."""
        code = f"""
            import signal
            from visualizer import get_local

            class Tick(BaseException):  # as KeyboardInterrupt is; an Exception out of `keep` would be remembered
                pass

            def tick(number, frame):
                global is_armed
                if is_armed:
                    is_armed = False
                    raise Tick

            @get_local("attn")
            def halve(n):
                attn = n // 2
                return attn

            signal.signal(signal.SIGALRM, tick)
            get_local.activate(keep={keep!r})
            is_armed, ticks, calls = False, 0, 0
            signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
            while ticks < 60:  # not for a time, of which other work on the machine may have the most
                try:
                    is_armed = True
                    for _ in range(100_000):
                        assert calls // 2 == halve(calls)
                        calls += 1
                    is_armed = False
                except Tick:
                    ticks += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            values = get_local.cache["halve"]
            # A call may be interrupted before it is recorded, or after that and before it is counted; nothing else.
            assert abs(len(values) - calls) <= ticks, (len(values), calls, ticks)
            assert values == sorted(values)
            get_local.deactivate()
            assert 5 == halve(10)
            print(len(values) > ticks)
        """
        assert "True" == run(code, clean=False)

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timers")
    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    @pytest.mark.parametrize("limit", [None, 5])
    def test_a_handler_that_calls_and_reads_anywhere(self, keep, limit):
        code = f"""
            import signal, time
            from visualizer import capture

            def halve(n):
                attn = n // 2
                return attn

            def tick(number, frame):
                halve(-2)
                found["halve"]

            with capture(halve, "attn", keep={keep!r}, limit={limit}) as found:
                signal.signal(signal.SIGALRM, tick)
                signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
                end, calls = time.process_time() + 0.5, 0  # its own time: other work may have most of the clock's
                while time.process_time() < end:
                    for _ in range(100):
                        halve(2 * calls)
                        calls += 1
                    assert all(record.call >= 0 for record in found.records)
                    if not calls % 2000:
                        values = list(found["halve"])  # a copy: the handler adds to the list and trims it
                        mine = [value for value in values if value != -1]
                        assert mine == list(range(calls - len(mine), calls)), mine
                        found.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
            print(calls)
        """
        assert int(run(code)) > 100


class TestTheCollector:
    def test_finalizers_that_run_captured_code_anywhere(self, gl):
        class Ends:
            def __init__(self):
                self.itself = self

            def __del__(self):
                halve(-2)

        gl("attn")(halve)
        before = gc.get_threshold()
        gc.set_threshold(3, 2, 2)
        try:
            with gl.activate():  # not with a function for keep: what the collector runs in that is not recorded
                for number in range(500):
                    Ends()
                    assert number // 2 == halve(number)
                gc.collect()
                values = gl.cache[next(iter(gl.cache))]
        finally:
            gc.set_threshold(*before)
        assert [number // 2 for number in range(500)] == [value for value in values if value != -1]
        assert 500 == values.count(-1)

    def test_a_capture_that_is_collected_while_another_one_begins(self):
        class Probe:
            def __init__(self, function):
                self.found = capture(function, "attn").start()
                self.itself = self

        def make(n):
            def function(n):
                attn = other = n
                return attn, other

            function.__code__ = function.__code__.replace(co_name=f"function{n}")
            return function

        before = gc.get_threshold()
        gc.collect()
        gc.freeze()  # what other tests and libraries hold would be gone through some thousand times
        gc.set_threshold(300, 2, 2)
        try:
            for n in range(150):
                function = make(n)
                code = function.__code__
                Probe(function)
                filling = [[] for _ in range(7 * n)]  # so that the collector comes at another place each time
                with capture(function, "other") as found:
                    function(1)
                assert [1] == next(iter(found.values()))
                del filling
                gc.collect()
                assert function.__code__ is code
        finally:
            gc.set_threshold(*before)
            gc.unfreeze()

    @pytest.mark.parametrize("dropped", ["capture", "function"])
    def test_what_ends_while_values_are_filed_and_another_thread_switches(self, dropped):
        """Each would wait for what the other one holds, if a finalizer waited for its turn to switch."""
        code = f"""
            import faulthandler, threading, time
            from visualizer import capture
            from visualizer.instrument import GetLocal

            faulthandler.dump_traceback_later(60, exit=True)

            def halve(n):
                attn = n
                return None

            def make(bound):
                def other(n):
                    attn = n
                    return bound
                return gl("attn", keep=lambda value: bound)(other)

            def double(n):
                attn = n
                return None

            gl = GetLocal()
            gl.activate()
            code = halve.__code__, double.__code__
            last = [capture(double, "attn").start() if {dropped!r} == "capture" else make(1)]

            class Value:
                def __del__(self):  # the store's lock is held
                    thread.start()
                    time.sleep(0.3)  # the other thread holds the one for switching, and waits for the store's
                    last.clear()

            found = capture(halve, "attn", limit=1, keep="graph").start()
            thread = threading.Thread(target=found.stop)
            halve(Value())
            halve(1)
            thread.join()
            assert [1] == found["halve"]
            assert (halve.__code__, double.__code__) == code
            print(len(gl._store._sources))
        """
        assert "0" == run(code)


class TestTheEnd:
    @pytest.mark.parametrize("off", ["", "get_local.deactivate()"])
    @pytest.mark.parametrize("left", ["kept = Ends()", "threading.Thread(target=forever, daemon=True).start()"])
    def test_captured_code_runs_while_the_interpreter_ends(self, off, left):
        code = f"""
            import atexit, os, threading, time
            from visualizer import get_local, capture

            @get_local("attn")
            def halve(n):
                attn = n // 2
                return attn

            class Ends:
                def __del__(self, halve=halve):
                    assert halve(4) == 2
                    os.write(1, b"ended")

            def at_exit():
                assert halve(6) == 3
                os.write(1, b"exit ")

            atexit.register(at_exit)
            get_local.activate()
            found = capture(halve, "attn").start()
            def forever():
                while True:
                    halve(1)
                    time.sleep(0.001)
            {left}
            halve(2)
            {off}
        """
        assert ("exit ended" if "Ends" in left else "exit") == run(code)


class TestCopies:
    def test_deep_copies_and_pickles_of_what_has_decorated_methods(self):
        layer = Layer(3)
        get_local.clear()
        with get_local.activate():
            twin = copy.deepcopy(layer)
            again = pickle.loads(pickle.dumps(layer))
            method = pickle.loads(pickle.dumps(layer.forward))
            function = pickle.loads(pickle.dumps(Layer.forward))
            assert function is Layer.forward
            assert [7, 7, 7] == [twin.forward(2), again.forward(2), method(2)]
            assert [6, 6, 6] == get_local.cache["Layer.forward"]
        assert 7 == pickle.loads(pickle.dumps(twin)).forward(2)
        assert 3 == len(get_local.cache["Layer.forward"])
        get_local.clear()


def in_another_process(number):
    return Layer(2).forward(number), get_local.is_active, list(get_local.cache["Layer.forward"])


class TestProcesses:
    @pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_each_has_a_cache_of_its_own(self, method):
        try:
            multiprocessing.get_context(method).Lock()
        except OSError:
            pytest.skip("this system has no semaphores, which multiprocessing needs")
        get_local.clear()
        with get_local.activate(), multiprocessing.get_context(method).Pool(1) as pool:
            Layer(1).forward(5)
            [(result, is_active, values)] = pool.map(in_another_process, [10])
            assert [5] == get_local.cache["Layer.forward"], "what the other process does stays there"
        get_local.clear()
        assert 21 == result
        assert (is_active, values) in [(True, [20]), (False, [])]
        assert is_active == (method == "fork")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_forked_while_another_thread_keeps_a_value(self):
        """A thread of the child may well get that one's number, and is recorded all the same."""
        code = """
            import os, threading, warnings
            from visualizer import capture

            warnings.filterwarnings("ignore", "(?s).*multi-threaded")

            def halve(n):
                attn = n // 2
                return attn

            def keep(value):
                if value == 1:
                    inside.set()
                    end.wait(60)
                return value

            inside, end = threading.Event(), threading.Event()
            with capture(halve, "attn", keep=keep) as found:
                other = threading.Thread(target=halve, args=(2,))
                other.start()
                inside.wait(60)
                child = os.fork()
                if child == 0:
                    threads = [threading.Thread(target=halve, args=(4,)) for _ in range(5)]
                    for thread in threads:
                        thread.start()
                        thread.join()
                    os._exit(found["halve"].count(2))
                end.set()
                other.join()
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *found["halve"])
        """
        assert "5 1" == run(code)


class TestOtherTools:
    def test_a_debugger_stops_at_the_same_lines(self, gl):
        class Stops(bdb.Bdb):
            def __init__(self):
                super().__init__()
                self.seen = []

            def user_line(self, frame):
                if frame.f_code.co_name == "forward":
                    self.seen.append((frame.f_lineno, sorted(frame.f_locals)))
                self.set_step()

        layer = Layer(2)

        def stops():
            debugger = Stops()
            tracer = sys.gettrace()
            try:
                debugger.runcall(layer.forward, 3)
            finally:
                sys.settrace(tracer)
            return debugger.seen

        expected = stops()
        assert 2 == len(expected)
        get_local.clear()
        with get_local.activate():
            assert expected == stops()
        assert [6] == get_local.cache["Layer.forward"]
        get_local.clear()

    @pytest.mark.skipif(not hasattr(sys, "monitoring"), reason="sys.monitoring came with Python 3.12")
    def test_monitoring_tools_see_the_same_lines_and_returns(self, gl):
        monitoring = getattr(sys, "monitoring")
        seen = []
        events = monitoring.events.LINE | monitoring.events.PY_RETURN | monitoring.events.PY_START
        gl("attn")(halve)

        def watch():
            seen.clear()
            monitoring.use_tool_id(4, "test")
            try:
                for event in (monitoring.events.LINE, monitoring.events.PY_RETURN, monitoring.events.PY_START):
                    monitoring.register_callback(
                        4, event, lambda code, *rest: seen.append(rest[-1]) if code.co_name == "halve" else None
                    )
                monitoring.set_events(4, events)
                halve(10)
            finally:
                monitoring.set_events(4, 0)
                monitoring.free_tool_id(4)
            return list(seen)

        expected = [value for value in watch() if value]
        with gl.activate():
            assert expected == [value for value in watch() if value]
            assert [5] == gl.cache[next(iter(gl.cache))]

    @pytest.mark.skipif(importlib.util.find_spec("coverage") is None, reason="coverage.py is not installed")
    @pytest.mark.parametrize("core", ["ctrace", "pytrace", "sysmon"])
    def test_coverage_counts_the_same_lines(self, tmp_path, core):
        if core == "sysmon" and not hasattr(sys, "monitoring"):
            pytest.skip("sys.monitoring came with Python 3.12")
        (tmp_path / "model.py").write_text(
            "from visualizer import get_local\n"
            "@get_local('attn')\n"
            "def forward(x):\n    if x:\n        attn = 1\n        return attn\n    for i in range(2):\n"
            "        attn = i\n    return None\n"
        )
        code = """
            import coverage, sys
            sys.path.insert(0, FOLDER)
            counted = coverage.Coverage(data_file=None, branch=True, include=[FOLDER + "/model.py"])
            counted.start()
            import model
            if ACTIVE:
                model.get_local.activate()
            model.forward(0), model.forward(1), model.forward(0)
            counted.stop()
            data = counted.get_data()
            [file] = data.measured_files()
            print(sorted(data.arcs(file) or data.lines(file)), list(model.get_local.cache.values()) if ACTIVE else "")
        """
        counts = [
            run(f"FOLDER, ACTIVE = {str(tmp_path)!r}, {on}\n" + textwrap.dedent(code), COVERAGE_CORE=core)
            for on in (False, True)
        ]
        assert f"{counts[0]} [[1, 1, 1]]" == counts[1]

    @pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="IPython is not installed")
    def test_autoreload_of_a_notebook(self, tmp_path):
        code = """
            import os, sys, time, warnings
            warnings.simplefilter("ignore")
            from IPython.core.interactiveshell import InteractiveShell
            from visualizer import get_local
            sys.path.insert(0, FOLDER)
            text = "from visualizer import get_local\\n@get_local('attn')\\ndef forward(x):\\n"
            text += "    attn = x * {}\\n    return x\\n"
            path = FOLDER + "/reloaded_model.py"
            def write(factor):
                with open(path, "w") as file:
                    file.write(text.format(factor))
                os.utime(path, (time.time() + factor, time.time() + factor))
            write(2)
            shell = InteractiveShell.instance()
            shell.run_cell("%load_ext autoreload\\n%autoreload 2")
            shell.run_cell("from reloaded_model import forward\\nfrom visualizer import get_local")
            shell.run_cell("get_local.activate(); forward(1)")
            write(10)
            shell.run_cell("forward(1)")
            shell.run_cell("get_local.deactivate(); forward(1)")
            write(100)
            shell.run_cell("get_local.activate(); forward(1)")
            print(get_local.cache["forward"], len(get_local.cache))
        """
        output = run(f"FOLDER = {str(tmp_path)!r}\n" + textwrap.dedent(code), clean=False, HOME=str(tmp_path))
        assert "[2, 10, 100] 1" == output.splitlines()[-1]


class TestWhereItCannotBe:
    def test_free_threaded_builds_are_refused_by_name(self, gl, monkeypatch):
        gl("attn")(halve)
        code = halve.__code__
        monkeypatch.setattr(opcodes, "why_unsupported", lambda: "a free-threaded build")
        for switch in (gl.activate, lambda: capture(halve, "attn")):
            with pytest.raises(UnsupportedPythonError, match="free-threaded"):
                switch()
        assert halve.__code__ is code
        assert 5 == halve(10)


def test_types_that_hold_functions_in_odd_places(gl):
    """A dict's value in a module's attribute: it is the function that is changed, not its name."""
    module = types.ModuleType("odd")
    module.halve = {"f": halve}
    with capture(module.halve["f"], "attn") as found:
        assert 2 == module.halve["f"](4)
    assert {"halve": [2]} == found

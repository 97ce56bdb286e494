"""Code that is swapped: all of it or none, whatever other tools do to it meanwhile."""

import asyncio
import builtins
import marshal
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import types
import warnings
from pathlib import Path

import pytest
from functions import make

from visualizer import RewriteError, VisualizerWarning, capture
from visualizer.instrument import GetLocal, swapped_code
from visualizer.rewrite import HOOK


def test_what_another_tool_put_in_place_stays_with_a_warning(gl):
    forward = make(gl, "attn")
    gl.activate()

    def other(x):
        attn = "other"
        return attn

    forward.__code__ = other.__code__
    with pytest.warns(VisualizerWarning, match="another tool"):
        gl.deactivate()
    assert forward.__code__ is other.__code__
    with gl.activate():
        assert forward(1) == "other"
    assert forward.__code__ is other.__code__
    assert {"forward": ["other"]} == gl.cache


def without_the_local(x):
    return x


def with_it_as_a_parameter(attn):
    return attn


class TestReplacedBeforeActivation:
    """One function whose code another tool has replaced keeps no other from being captured."""

    @pytest.mark.parametrize(
        ("other", "at", "said"),
        [
            (without_the_local, "return", "it has no local 'attn' now"),
            (with_it_as_a_parameter, "assign", "it has no assignment to 'attn' now"),
        ],
    )
    def test_without_the_local(self, gl, other, at, said):
        functions = [make(gl, "attn", at=at) for _ in range(3)]
        codes = [function.__code__ for function in functions]
        functions[1].__code__ = other.__code__
        with pytest.warns(VisualizerWarning, match="replaced by another tool since") as caught:
            gl.activate()
        [message] = [str(one.message) for one in caught]
        assert said in message
        assert f"forward ({__file__}:{other.__code__.co_firstlineno})" in message
        assert gl.is_active
        assert [5, 2, 7] == [function(x) for x, function in zip([1, 2, 2], functions, strict=True)]
        gl.deactivate()
        assert [codes[0], other.__code__, codes[2]] == [function.__code__ for function in functions]
        assert functions[1].__code__ is other.__code__
        assert {"forward": [4, 6]} == gl.cache
        functions[1].__code__ = codes[1]  # as a mock or a debugger does at its end
        with gl.activate():
            functions[1](3)
        assert {"forward": [4, 6, 8]} == gl.cache

    def test_by_code_that_cannot_be_rewritten(self, gl, monkeypatch):
        functions = [make(gl, "attn"), make(gl, "attn")]
        code = functions[1].__code__ = functions[1].__code__.replace(co_name="other")
        module = sys.modules["visualizer.instrument.swapped_code"]
        real = module.rewrite

        def refuse(rewritten, *captures):
            if rewritten is code:
                raise RewriteError("there is no proof")
            return real(rewritten, *captures)

        monkeypatch.setattr(module, "rewrite", refuse)
        with pytest.warns(VisualizerWarning, match="there is no proof"):
            gl.activate()
        assert [5, 5] == [function(1) for function in functions]
        gl.deactivate()
        assert functions[1].__code__ is code
        assert {"forward": [4]} == gl.cache

    def test_by_code_that_has_the_local(self, gl):
        forward, other = make(gl, "attn"), make(GetLocal(), "attn")
        forward.__code__ = other.__code__.replace(co_name="reloaded")
        with gl.activate():
            forward(1)
        assert {"forward": [4]} == gl.cache

    def test_where_warnings_are_errors_all_others_are_captured(self, gl):
        functions = [make(gl, "attn") for _ in range(2)]
        functions[0].__code__ = without_the_local.__code__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(VisualizerWarning):
                gl.activate()
            functions[1](1)
            gl.deactivate()
        assert {"forward": [4]} == gl.cache


def test_a_copy_of_rewritten_code_does_not_record_twice(gl):
    forward = make(gl, "attn")
    gl.activate()
    forward.__code__ = forward.__code__.replace()  # as line profilers and debuggers do
    with pytest.warns(VisualizerWarning, match="another tool"):
        gl.deactivate()
    forward(1)
    gl.activate()
    forward(2)
    assert {"forward": [6]} == gl.cache


def test_a_reload_that_patches_the_old_function_is_undone(gl):
    """As IPython's autoreload does it: the old function gets the new one's code, while capture is active."""
    old, code = make(gl, "attn"), make(gl, "attn").__code__
    gl.activate()
    new = make(gl, "attn")
    old.__code__ = new.__code__
    old(1)
    gl.deactivate()
    assert old.__code__ is new.__code__ is code
    with gl.activate():
        old(2)
    assert {"forward": [4, 6]} == gl.cache


def test_warnings_as_errors_come_when_all_is_done(gl):
    functions = [make(gl, "attn") for _ in range(3)]
    for number, function in enumerate(functions):
        function.__qualname__ = f"forward{number}"
    codes = [function.__code__ for function in functions]
    gl.activate()
    functions[1].__code__ = (lambda attn: attn).__code__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(VisualizerWarning):
            gl.deactivate()
        assert not gl.is_active
        assert functions[0].__code__ is codes[0]
        assert functions[2].__code__ is codes[2]
        gl.activate(limit=1)
        with pytest.raises(VisualizerWarning):
            gl("attn", keep=lambda value: -value)(functions[0])
        functions[0](1)
        gl.deactivate()
    assert functions[0].__code__ is codes[0]
    assert [-4] == gl.cache["forward0"]


def test_nothing_is_half_activated(gl, monkeypatch):
    good, bad = make(gl, "attn"), make(gl, "q")
    codes = good.__code__, bad.__code__
    module = sys.modules["visualizer.instrument.swapped_code"]
    real, calls = module.rewrite, []

    def refuse_the_second(code, *captures):
        calls.append(captures)
        if captures[0].names == ("q",):
            raise RewriteError("no")
        return real(code, *captures)

    monkeypatch.setattr(module, "rewrite", refuse_the_second)
    with pytest.raises(RewriteError):
        gl.activate()
    assert len(calls) == 2
    assert not gl.is_active
    assert codes == (good.__code__, bad.__code__)
    assert good.__code__ is codes[0]


def test_a_code_that_another_tool_put_in_place_is_left():
    def forward(x):
        attn = x
        return attn

    found = capture(forward, "attn").start()
    forward.__code__ = (lambda x: 2 * x).__code__
    with pytest.warns(VisualizerWarning, match="replaced by another tool"):
        found.stop()
    assert 6 == forward(3)


def test_a_finalizers_change_waits_until_nobody_is_switching():
    done = []
    with swapped_code.switching():
        with swapped_code.switching():
            swapped_code.when_idle(lambda: done.append("later"))
        assert [] == done
    assert ["later"] == done
    swapped_code.when_idle(lambda: done.append("at once"))
    assert ["later", "at once"] == done


def test_a_finalizer_does_not_wait_for_another_thread_that_is_switching():
    done, is_switching, may_end = [], threading.Event(), threading.Event()

    def switch():
        with swapped_code.switching():
            is_switching.set()
            may_end.wait(10)

    thread = threading.Thread(target=switch)
    thread.start()
    assert is_switching.wait(10)
    swapped_code.when_idle(lambda: done.append(threading.current_thread()))
    assert [] == done
    may_end.set()
    thread.join()
    assert [thread] == done


def add(x):
    a, b = x, 10 * x
    return a + b


class Adder:
    def add(self, x):
        a, b = x, 10 * x
        return a + b


def adding(x):
    a, b = x, 10 * x
    yield a
    yield b


async def add_soon(x):
    a, b = x, 10 * x
    await asyncio.sleep(0)
    return a + b


def make_adder(by):
    def add(x):
        a, b = x, by * x
        return a + b

    return add


ADDERS = [add, Adder.add, adding, add_soon, make_adder(10), lambda x, a=1: (b := 10 * x) + x]
"""Whatever of them is called with 2 gives 22, or 2 and 20."""

RUN_THEM = """
import asyncio, marshal, pickle, sys, types
def run(function):
    result = function(*[None] * (function.__qualname__ == "Adder.add"), 2)
    if isinstance(result, types.GeneratorType):
        return sum(result)
    return result if isinstance(result, int) else asyncio.run(result)
"""


def in_a_process(code, *, without_visualizer=False, data=b""):
    """What a fresh Python prints that is given the data; one without this package cannot import it."""
    alone = "import sys; sys.modules['visualizer'] = None\n" if without_visualizer else ""
    text = f"{alone}{RUN_THEM}{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-c", text], input=data, capture_output=True, timeout=120, check=False)
    assert (0, b"") == (done.returncode, done.stderr)
    return done.stdout.decode().split()


def captured_by_a_worker(function):
    """What a worker gets from a function that came by value; whether it has other code then, and whether rewritten."""
    before = function.__code__
    with capture(function, "b") as found:
        assert 22 == function(2)
    own = function.__code__
    assert 22 == function(2)
    return [*found.values()], before is not own, HOOK in own.co_names


@pytest.fixture
def cloudpickle():
    return pytest.importorskip("cloudpickle", reason="engine only: cloudpickle is not in this environment")


@pytest.mark.filterwarnings("ignore:nothing was recorded")
class TestByValue:
    """Rewritten code that leaves its function, or its process."""

    LOADED = "functions = pickle.load(sys.stdin.buffer)\n"

    def pickled(self, cloudpickle, at):
        this = sys.modules[__name__]
        cloudpickle.register_pickle_by_value(this)
        try:
            with capture(ADDERS, "a") if at == "return" else capture(ADDERS[:-1], "a", at=at):
                return cloudpickle.dumps(ADDERS)
        finally:
            cloudpickle.unregister_pickle_by_value(this)

    @pytest.mark.parametrize("at", ["return", "assign"])
    def test_a_process_without_this_package_loads_and_runs_it(self, cloudpickle, at):
        data = self.pickled(cloudpickle, at)
        assert b"visualizer" not in data.replace(str(Path(__file__).parent.parent).encode(), b"")
        code = f"{self.LOADED}print(*map(run, functions))"
        assert ["22"] * 6 == in_a_process(code, without_visualizer=True, data=data)

    @pytest.mark.parametrize("at", ["return", "assign"])
    def test_a_process_with_it_records_nothing_until_it_captures_for_itself(self, cloudpickle, at):
        code = f"""{self.LOADED}
            import warnings
            from visualizer import capture
            warnings.filterwarnings("ignore", "nothing was recorded")
            def other(x):
                a = "another function's"
                return 22
            with capture(other, "a") as others:
                print(*map(run, functions))
            with capture(functions, "b") as found:
                print(*map(run, functions))
            print(*map(run, functions))
            print(sum(others.values(), []), len(found), {{*sum(found.values(), [])}})
            print(any("{HOOK}" in function.__code__.co_names for function in functions))
        """.replace("\n            ", "\n")
        assert [*["22"] * 18, "[]", "6", "{20}", "False"] == in_a_process(code, data=self.pickled(cloudpickle, at))

    def test_functions_and_classes_of_main(self, cloudpickle):
        """They always go by value."""
        code = """
            import cloudpickle
            from visualizer import capture
            class Adder:
                def add(self, x):
                    a, b = x, 10 * x
                    return a + b
            def add(x):
                a, b = x, 10 * x
                return Adder().add(x)
            with capture([add, Adder], "a"):
                add(2)
                print(cloudpickle.dumps([add, Adder.add]).hex())
        """
        [text] = in_a_process(code)
        code = f"{self.LOADED}print(*map(run, functions))"
        assert ["22", "22"] == in_a_process(code, without_visualizer=True, data=bytes.fromhex(text))

    def test_joblib(self):
        joblib = pytest.importorskip("joblib", reason="engine only: joblib is not in this environment")

        def add(x):  # a function in a function goes by value
            a, b = x, 10 * x
            return a + b

        with capture(add, "a") as found:
            worked = joblib.Parallel(2)([joblib.delayed(captured_by_a_worker)(add), joblib.delayed(add)(2)])
        assert [([[20]], True, False), 22] == worked
        assert [[]] == [*found.values()]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_child_has_keys_of_its_own(self):
        """What parent and child capture after the fork must not meet under one key."""
        receiving, sending = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = os.fork()
        if child == 0:
            with capture(add, "b") as found:
                code = marshal.loads(receiving.recv_bytes())
                types.FunctionType(code, globals())(2)
                os._exit(sum(map(len, found.values())))
        with capture(add, "a"):
            sending.send_bytes(marshal.dumps(add.__code__))
        assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def test_marshalled_code(self):
        with capture(add, "a"), capture(add, "b", at="assign"):
            data = marshal.dumps(add.__code__)
        code = "print(run(types.FunctionType(marshal.load(sys.stdin.buffer), {})))"
        assert ["22"] == in_a_process(code, without_visualizer=True, data=data)

    @pytest.mark.parametrize("at", ["return", "assign"])
    @pytest.mark.parametrize("space", [{}, {"__builtins__": {}}], ids=["no globals", "no builtins"])
    def test_a_function_of_the_same_code_does_what_the_original_does(self, space, at):
        with capture(add, "a", at=at) as found:
            twin = types.FunctionType(add.__code__, space)
            assert 22 == twin(2)
            count = sum(map(len, found.values()))
        assert count == (0 if space else 1), "it is recorded where the hook is in reach, and runs anyway"
        assert 22 == twin(2)
        assert count == sum(map(len, found.values()))

    def test_a_function_of_the_same_code_is_captured_by_itself(self):
        with capture(add, "a") as found:
            twin = types.FunctionType(add.__code__, globals(), "twin")
            with capture(twin, "b") as twins:
                twin(2), add(3)
            assert (22, 33) == (twin(2), add(3))
        assert ([[2, 3, 2, 3]], [[20]]) == ([*found.values()], [*twins.values()])
        with capture(twin, "b") as twins:
            twin(2)
        assert [[20]] == [*twins.values()]

    def test_a_function_with_builtins_of_its_own_is_captured(self):
        space = {"__builtins__": {}}
        exec("def f(x):\n    attn = 2 * x\n    return attn", space)
        with capture(space["f"], "attn") as found:
            space["f"](1)
        assert {"f": [2]} == found

    def test_nothing_is_left_in_the_globals(self):
        with capture(add, "a"):
            add(1)
            assert not hasattr(sys.modules[__name__], HOOK)
        assert hasattr(builtins, HOOK), "for generators that are suspended in rewritten code"

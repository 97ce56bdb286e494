"""Code that is swapped: all of it or none, whatever other tools do to it meanwhile."""

import sys
import threading
import warnings

import pytest

from visualizer import RewriteError, VisualizerWarning, capture
from visualizer.instrument import GetLocal, patches


@pytest.fixture
def gl():
    """A get_local of its own, switched off at the end."""
    own = GetLocal()
    yield own
    own.deactivate()


def make(gl, *names, **options):
    def forward(x):
        q = x + 1
        attn = q * 2
        return attn + 1

    forward.__qualname__ = "forward"
    return gl(*names, **options)(forward)


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
    module = sys.modules["visualizer.instrument.patches"]
    real, calls = module.rewrite_for, []

    def refuse_the_second(code, captures):
        calls.append(captures)
        if captures[0].names == ("q",):
            raise RewriteError("no")
        return real(code, captures)

    monkeypatch.setattr(module, "rewrite_for", refuse_the_second)
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
    with patches.switching:
        with patches.switching:
            patches.when_idle(lambda: done.append("later"))
        assert [] == done
    assert ["later"] == done
    patches.when_idle(lambda: done.append("at once"))
    assert ["later", "at once"] == done


def test_a_finalizer_does_not_wait_for_another_thread_that_is_switching():
    done, is_switching, may_end = [], threading.Event(), threading.Event()

    def switch():
        with patches.switching:
            is_switching.set()
            may_end.wait(10)

    thread = threading.Thread(target=switch)
    thread.start()
    assert is_switching.wait(10)
    patches.when_idle(lambda: done.append(threading.current_thread()))
    assert [] == done
    may_end.set()
    thread.join()
    assert [thread] == done

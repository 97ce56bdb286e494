"""Capture and torch's compiler: loaded in any order, in other threads, or not understood."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch._dynamo

from visualizer import capture
from visualizer.instrument import compiler, compiler_trouble

if not hasattr(torch._dynamo.eval_frame, "set_code_exec_strategy"):
    pytest.skip("capturing works, but older releases of torch put many things differently", allow_module_level=True)

ROOT = Path(__file__).parent.parent


def attend(x):
    attn = 2 * x
    return attn + 1


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout.split()


SWITCHED = """
import importlib.util, sys
from visualizer import get_local

@get_local("attn")
def inner(x):
    attn = x * 2
    return attn + 1

finders = len(sys.meta_path)
{statements}
assert "torch._dynamo" not in sys.modules
assert importlib.util.find_spec("torch._dynamo").name == "torch._dynamo"
assert inner(torch.ones(1)).item() == 3
fast = torch.compile(lambda x: inner(x) * 2, backend="eager", fullgraph=True)
assert fast(torch.ones(1)).item() == 6
assert [2, 2] == [value.item() for value in get_local.cache["inner"]]
assert finders == len(sys.meta_path)
assert "exec_module" not in vars(torch._dynamo.__loader__)
print("done")
"""


@pytest.mark.parametrize("statements", ["get_local.activate(); import torch", "import torch; get_local.activate()"])
@pytest.mark.slow
def test_activation_before_torch_or_its_compiler_is_loaded(statements):
    """Here it is loaded in all other tests. Its import leaves nothing of ours behind in the import system."""
    assert ["done"] == in_a_fresh_process(SWITCHED.format(statements=statements))


@pytest.mark.slow
def test_switching_while_other_threads_run_and_compile():
    """In a process of its own: what it proves is that the process does not crash."""
    code = """
import threading, torch, warnings
from visualizer import capture

warnings.filterwarnings("ignore", "nothing was recorded")  # of the other model, where no thread came to run it

class Layer(torch.nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.breaks = breaks
    def forward(self, x):
        attn = x.softmax(-1)
        if self.breaks:
            torch._dynamo.graph_break()
        return attn * 2

models = [torch.nn.Sequential(Layer(False), Layer(breaks)) for breaks in (True, False)]
fast = [torch.compile(model, backend="eager") for model in models]
x, errors, is_over = torch.randn(2, 3), [], threading.Event()
expected = models[0](x)

def run():
    while not is_over.is_set():
        try:
            for call in fast:
                torch.testing.assert_close(expected, call(x))
        except BaseException as error:
            errors.append(error)
            break

threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for turn in range(4):
    with capture(fast, "attn") as found:
        torch.testing.assert_close(expected, fast[turn % 2](x))
    for path, map_ in (("0", x.softmax(-1)), ("1", models[0][0](x).softmax(-1))):
        maps = found[f"{turn % 2}.{path}"]
        assert maps
        for one in maps:
            torch.testing.assert_close(map_, torch.as_tensor(one))
is_over.set()
for thread in threads:
    thread.join()
assert not errors, errors
print("done")
"""
    assert ["done"] == in_a_fresh_process(code)


def test_why_the_compiler_does_not_know_the_hook_is_remembered_until_it_does(monkeypatch):
    from torch._dynamo.variables.builder import VariableBuilder

    def broken():
        raise AttributeError("this release has no such table")

    assert compiler_trouble() is None
    monkeypatch.setattr(compiler, "_knows_hook", False)
    with monkeypatch.context() as release:
        release.setattr(VariableBuilder, "_id_dispatch", broken)
        assert "AttributeError: this release has no such table" == compiler_trouble()
        with capture(attend, "attn") as found:  # and nobody is kept from capturing
            attend(1)
        assert 1 == len(found["attend"])
    assert compiler_trouble() is None


def test_without_torch_there_is_no_trouble_and_a_broken_one_says_so(monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(compiler, "import_module", lambda name: __import__("torch_that_is_missing"))
        assert "No module named 'torch_that_is_missing'" in compiler_trouble()
    code = (
        "import sys; sys.modules['torch'] = None; from visualizer.instrument import compiler_trouble;"
        "print(compiler_trouble())"
    )
    assert ["None"] == in_a_fresh_process(code)

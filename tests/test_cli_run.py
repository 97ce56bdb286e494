"""`visualizer run`: the script runs as without it, and what it captures is what capture gives in Python."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from visualizer import attention, capture, cli, load

DECORATED = """
from visualizer import get_local

@get_local("doubled")
def double(x):
    doubled = 2 * x
    return doubled + 1

double(20)
"""

MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        scores = self.project(x) @ x.mT
        attn = scores.softmax(-1)
        return attn @ x

torch.manual_seed(0)
model = nn.Sequential(Attention(), Attention())
x = torch.randn(1, 5, 8)
"""


# Without tests/sitecustomize.py, which brings torch into every process.
BARE = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def start(*arguments, folder, env=BARE, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, **options)


def run(*arguments, folder, **options):
    return start("-m", "visualizer", "run", *arguments, folder=folder, **options)


def without_ours(text):
    return "".join(line for line in text.splitlines(True) if not line.startswith("visualizer: "))


PROGRAMS = {
    "arguments and names": """
import sys, os
print(sys.argv, __name__, __file__, __spec__, __package__, __doc__, sys.path[0], __builtins__)
print(sorted(vars().keys()), sys.modules["__main__"].__dict__ is globals(), locals() is globals())
print(type(__loader__).__name__, __loader__.name, __loader__.path, __cached__, "__annotations__" in vars())
""",
    "its parser's error": """
from argparse import ArgumentParser
parser = ArgumentParser()
parser.add_argument("--n", type=int)
parser.parse_args()
""",
    "an exception": "def inner():\n    raise ValueError('seven')\ninner()",
    "a chain of exceptions": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError('x') from error",
    "exit 3": "import sys; print('before'); sys.exit(3)",
    "exit with words": "raise SystemExit('no more')",
    "exit 0": "import sys; sys.exit()",
    "a syntax error": "x = (1,\ny = 2\n",
    "its own hook for exceptions": """
import sys, traceback
def hook(kind, error, tb):
    print('hooked', kind.__name__, error, [frame.name for frame in traceback.extract_tb(tb)])
sys.excepthook = hook
def inner(): raise ValueError(1)
inner()
""",
    "functions at exit": """
import atexit, threading, time
atexit.register(print, 'first registered')
atexit.register(lambda: print('second', double(1)))
threading.Thread(target=lambda: (time.sleep(0.3), print('a thread that goes on'))).start()
print('the last line')
""",
    "standard input": "import sys; print(sys.stdin.readline(), input())",
    "a pickle of its own class": """
import pickle
class Point:
    x: int = 1
print(pickle.loads(pickle.dumps(Point())).x, Point.__module__, __annotations__ if False else '')
""",
    "processes": """
import multiprocessing as mp, os
def work(x): return x * 2, __name__
if __name__ == '__main__':
    with mp.get_context('spawn').Pool(1) as pool:
        print(pool.map(work, [1, 2]))
""",
    "another file beside it": "import beside; print(beside.__name__, beside.value)",
    "a recursion without end": "def f(): f()\ntry: f()\nexcept RecursionError: print('caught')",
    "a future": "from __future__ import annotations\ndef f(x: Nothing): pass\nprint(f.__annotations__)",
    "no future of ours": "def f(x: int): pass\nprint(f.__annotations__)",
    "a warning": "import warnings; warnings.warn('look')",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_script_runs_as_python_runs_it(name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("value = 7")
    source = PROGRAMS[name]
    script = tmp_path / "sub" / "the script.py"
    future, source = ("", source) if "__future__" not in source else source.split("\n", 1)
    script.write_text(f"{future}\n{DECORATED}\n{source}")
    arguments = ["sub/the script.py", "--n", "x", "--help", "-m", "--", "--var"]
    if name == "its parser's error":
        arguments = arguments[:3]
    plain = start(*arguments, folder=tmp_path, input="one\ntwo\n")
    ours = run("--limit", "5", *arguments, folder=tmp_path, input="one\ntwo\n")
    assert (plain.returncode, plain.stdout) == (ours.returncode, ours.stdout)
    assert plain.stderr == without_ours(ours.stderr)
    if name != "a syntax error":
        assert [40] == load(tmp_path / "captured.safetensors")["double"]
        assert "visualizer: 1 value of 1 key, 28 B, in captured.safetensors\n" in ours.stderr


def write_package(folder):
    (folder / "pkg").mkdir()
    (folder / "pkg" / "__init__.py").write_text("")
    (folder / "pkg" / "part.py").write_text(DECORATED)
    (folder / "pkg" / "__main__.py").write_text("from . import part\nfrom . import program")
    (folder / "pkg" / "program.py").write_text(
        "import sys\nfrom .part import double\n"
        "print(sys.argv, sys.path[0], __name__, __package__, __spec__.name, double(1))\n"
        "print(__file__, __spec__.parent, __cached__ == __spec__.cached)\n"
        "if '--fail' in sys.argv: raise ValueError('seven')"
    )


@pytest.mark.parametrize("module", ["pkg", "pkg.program"])
def test_a_module_runs_as_python_m_runs_it(module, tmp_path):
    write_package(tmp_path)
    plain = start("-m", module, "--n", "1", "-m", folder=tmp_path)
    ours = run("--quiet", "-m", module, "--n", "1", "-m", folder=tmp_path)
    assert (0, plain.stdout, "") == (ours.returncode, ours.stdout, ours.stderr)
    assert [40, 2] == load(tmp_path / "captured.safetensors")["double"]


def test_a_folder_with_a_main_runs(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "other.py").write_text(DECORATED)
    (tmp_path / "app" / "__main__.py").write_text(
        "import other, sys; print(sys.argv, sys.path[0], __name__, __package__ == '', __spec__.name, __file__)"
    )
    plain, ours = start("app", "x", folder=tmp_path), run("app", "x", folder=tmp_path)
    assert (0, plain.stdout) == (ours.returncode, ours.stdout), ours.stderr
    assert [40] == load(tmp_path / "captured.safetensors")["double"]


def test_a_modules_traceback_begins_in_the_module(tmp_path):
    write_package(tmp_path)
    done = run("-m", "pkg.program", "--fail", folder=tmp_path)
    assert 1 == done.returncode
    frames = re.findall(r'File "(.*?)", line', done.stderr)
    assert [str(tmp_path / "pkg" / "program.py")] == frames
    assert done.stderr.endswith("ValueError: seven\n")


def test_an_interrupted_script_ends_as_without_us_and_is_saved(tmp_path):
    (tmp_path / "script.py").write_text(f"{DECORATED}\nimport time\nprint('ready', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "visualizer", "run", "script.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=BARE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "ready\n" == process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert -signal.SIGINT == process.returncode
    assert "KeyboardInterrupt" in said
    assert "cli" not in said
    assert [40] == load(tmp_path / "captured.safetensors")["double"]


def test_what_a_script_that_uses_get_local_itself_leaves_is_saved(tmp_path):
    (tmp_path / "script.py").write_text(
        f"{DECORATED}\nget_local.clear()\ndouble(5)\nwith get_local.activate(limit=1):\n    double(6), double(7)\n"
        "assert get_local.is_active\nprint(get_local.cache['double'])"
    )
    done = run("script.py", folder=tmp_path)
    assert (0, "[14]\n") == (done.returncode, done.stdout)
    assert [14] == load(tmp_path / "captured.safetensors")["double"]


def test_what_was_captured_before_a_script_changes_folder_is_saved_where_it_began(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "script.py").write_text(f"{DECORATED}\nimport os; os.chdir('deep')")
    assert 0 == run("-o", "out.safetensors", "script.py", folder=tmp_path).returncode
    assert ["out.safetensors", "script.py"] == sorted(path.name for path in tmp_path.iterdir() if path.is_file())


def test_nothing_heavy_is_imported_before_the_script_does(tmp_path):
    """A script may set its environment before torch reads it."""
    code = "import sys; print(sorted({'torch', 'matplotlib', 'transformers', 'PIL'} & sys.modules.keys()))"
    (tmp_path / "script.py").write_text(code)
    for options in (
        [],
        ["--var", "attn"],
        ["--attention"],
        ["--target", "torch.nn.functional:softmax", "--var", "ret"],
    ):
        done = run(*options, "script.py", folder=tmp_path)
        assert (1, "[]\n") == (done.returncode, done.stdout), done.stderr
        assert 1 == done.stderr.count("\n")


def in_python():
    space: dict = {}
    exec(MODEL, space)
    return space["model"], space["x"]


def test_a_local_of_every_module_is_what_capture_gives(tmp_path):
    (tmp_path / "script.py").write_text(
        f"{MODEL}\nmodel(x)\nnn.CrossEntropyLoss()(x[0], x[0].softmax(-1))\nmodel(2 * x)"
    )
    done = run("--var", "attn", "script.py", folder=tmp_path)
    assert (0, "", "visualizer: 4 values of 2 keys, 400 B, in captured.safetensors\n") == (
        done.returncode,
        done.stdout,
        done.stderr,
    )
    model, x = in_python()
    with capture(model, "attn") as found:
        model(x), model(2 * x)
    saved = load(tmp_path / "captured.safetensors")
    assert list(found) == list(saved)
    for key, values in found.items():
        assert [value.tolist() for value in values] == [value.tolist() for value in saved[key]]
    assert [(r.key, r.variable, r.call, r.module) for r in found.records] == [
        (r.key, r.variable, r.call, r.module) for r in saved.records
    ]


def test_every_value_that_is_assigned(tmp_path):
    (tmp_path / "script.py").write_text(
        "from torch import nn\nclass Twice(nn.Module):\n    def forward(self, x):\n        for _ in range(2):\n"
        "            x = x * 2\n        return x\nTwice()(1)\n"
    )
    done = run("--var", "x", "--at", "assign", "-o", "x.safetensors", "script.py", folder=tmp_path)
    assert 0 == done.returncode, done.stderr
    assert [[2, 4]] == list(load(tmp_path / "x.safetensors").values())
    done = run("--at", "assign", "script.py", folder=tmp_path)
    assert 2 == done.returncode and "--at goes with --var" in done.stderr


@pytest.mark.slow
def test_several_locals_and_a_limit(tmp_path):
    (tmp_path / "script.py").write_text(f"{MODEL}\nmodel(x)\nmodel(2 * x)")
    assert 0 == run("--var", "attn", "--var", "scores", "--limit", "1", "script.py", folder=tmp_path).returncode
    model, x = in_python()
    with capture(model, "attn", "scores", limit=1) as found:
        model(x), model(2 * x)
    saved = load(tmp_path / "captured.safetensors")
    assert list(found) == list(saved) == ["0:attn", "0:scores", "1:attn", "1:scores"]
    assert all(np.array_equal(found[key], saved[key]) and 1 == len(saved[key]) for key in saved)


@pytest.mark.slow
def test_models_of_one_script_are_told_apart_by_their_classes(tmp_path):
    (tmp_path / "script.py").write_text(
        f"{MODEL}\nmodel(x)\nother = nn.Sequential(Attention())\nother(3 * x)\n"
        "nn.ModuleList([Attention()])[0](x)\nother(x)"
    )
    assert 0 == run("--var", "attn", "script.py", folder=tmp_path).returncode
    saved = load(tmp_path / "captured.safetensors")
    assert {"Sequential.0": 1, "Sequential.1": 1, "Sequential@2.0": 2, "Attention": 1} == {
        key: len(values) for key, values in saved.items()
    }


@pytest.mark.slow
def test_a_part_that_was_called_before_its_model_is_not_captured_twice(tmp_path):
    (tmp_path / "script.py").write_text(f"{MODEL}\nmodel[1](x)\nmodel(x)\nmodel[0](x)\nmodel(x)")
    assert 0 == run("--var", "attn", "script.py", folder=tmp_path).returncode
    saved = load(tmp_path / "captured.safetensors")
    assert {"Attention": 1, "Sequential.0": 3, "Sequential.1": 2} == {key: len(values) for key, values in saved.items()}


@pytest.mark.slow
def test_models_that_are_gone_are_not_kept_alive_and_their_values_are_saved(tmp_path):
    (tmp_path / "script.py").write_text(
        f"{MODEL}\nimport weakref, gc\nfor size in range(3):\n    model = nn.Sequential(Attention())\n    model(x)\n"
        "    alive = weakref.ref(model)\n    del model\n    gc.collect()\n    print(alive())\n"
    )
    done = run("--var", "attn", "script.py", folder=tmp_path)
    assert (0, "None\n" * 3) == (done.returncode, done.stdout)
    assert ["Sequential.0", "Sequential@2.0", "Sequential@3.0"] == list(load(tmp_path / "captured.safetensors"))


@pytest.mark.slow
def test_a_model_that_saves_copies_and_compiles_itself_does_so(tmp_path):
    (tmp_path / "script.py").write_text(
        f"{MODEL}\nimport copy, io, pickle\nmodel(x)\ntorch.save(model, io.BytesIO())\ncopy.deepcopy(model)(x)\n"
        "assert 'Module' == nn.Module.__call__.__qualname__.split('.')[0]\nmodel(x)\n"
        "compiled = torch.compile(model, backend='eager', fullgraph=True)\ncompiled(x)\n"
        "@torch.compile(backend='eager', fullgraph=True)\ndef step(x): return model(x) + 1\nstep(x)\n"
    )
    done = run("--var", "attn", "script.py", folder=tmp_path)
    assert 0 == done.returncode, done.stderr
    model, x = in_python()
    with capture(model, "attn") as found:
        model(x)
    saved = load(tmp_path / "captured.safetensors")
    values = saved["Sequential.0"] + saved["Sequential@2.0"]
    assert 5 == len(values)
    assert all(np.allclose(found["0"][0], value, atol=1e-6) for value in values)


@pytest.mark.parametrize("option", [["--var", "attn"], ["--attention"]])
@pytest.mark.slow
def test_a_model_may_first_be_called_as_it_is_compiled(option, tmp_path):
    (tmp_path / "script.py").write_text(
        f"{MODEL}\n@torch.compile(backend='eager', fullgraph=True)\ndef step(x): return model(x) + 1\nstep(x), step(x)"
    )
    done = run(*option, "script.py", folder=tmp_path)
    assert 0 == done.returncode, done.stderr
    model, x = in_python()
    with capture(model, "attn") as found:
        model(x)
    saved = load(tmp_path / "captured.safetensors")
    for key in ("0", "1"):
        values = saved[key] if option[0] == "--var" else [one.numpy()[0] for one in saved.calls(key)]
        assert 2 == len(values)
        assert all(np.allclose(found[key][0], value, atol=1e-6) for value in values)


@pytest.mark.slow
def test_the_class_has_its_own_call_again_when_the_script_has_ended(tmp_path):
    (tmp_path / "script.py").write_text(
        f"import atexit\n{MODEL}\nmodel(x)\nown = Attention.forward.__code__\n"
        "atexit.register(lambda: print(vars(nn.Module)['__call__'].__name__, own is Attention.forward.__code__))"
    )
    done = run("--var", "attn", "script.py", folder=tmp_path)
    assert "_wrapped_call_impl False\n" == done.stdout  # the code of the time when it was captured


@pytest.mark.parametrize("where", ["script", "__main__", "library"])
def test_a_target_is_one_function_wherever_it_is_defined(where, tmp_path):
    (tmp_path / "library.py").write_text(
        "class Box:\n    def fill(self, x):\n        inner = x + 1\n        return inner"
    )
    source = (tmp_path / "library.py").read_text() if where != "library" else "from library import Box"
    (tmp_path / "script.py").write_text(f"Box = None\n{source}\nprint(Box().fill(1), Box().fill(2))")
    done = run("--target", f"{where}:Box.fill", "--var", "inner", "script.py", folder=tmp_path)
    assert (0, "2 3\n") == (done.returncode, done.stdout), done.stderr
    assert {"Box.fill": [2, 3]} == dict(load(tmp_path / "captured.safetensors"))


def test_attention_is_what_attention_gives(tmp_path):
    model = "import torch\ntorch.manual_seed(0)\nlayer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)\n"
    model += "model = torch.nn.TransformerEncoder(layer, 2).eval()\nx = torch.randn(2, 5, 16)\n"
    (tmp_path / "script.py").write_text(f"{model}\nwith torch.no_grad():\n    y = model(x)\n    y = model(2 * x)")
    done = run("--attention", "script.py", folder=tmp_path)
    assert 0 == done.returncode, done.stderr
    space: dict = {}
    exec(model, space)
    with attention(space["model"]) as maps, torch.no_grad():
        space["model"](space["x"]), space["model"](2 * space["x"])
    saved = load(tmp_path / "captured.safetensors")
    assert maps.paths == saved.paths == ("layers.0.self_attn", "layers.1.self_attn")
    assert all(torch.equal(one.dense(), other.dense()) for one, other in zip(maps, saved, strict=True))


@pytest.mark.slow
def test_attention_of_an_attention_module_alone_and_of_two_models(tmp_path):
    """The outermost module may be the one that attends, in its very first call."""
    code = "import torch\ntorch.manual_seed(0)\nx = torch.randn(2, 5, 16)\n"
    code += "first, second = (torch.nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2))\n"
    code += "given = {'query': x, 'key': x, 'value': x, 'average_attn_weights': False}\n"
    code += "with torch.no_grad():\n    wanted = [m(**given)[1] for m in (first, second)]\n"
    (tmp_path / "script.py").write_text(f"{code}\ntorch.nn.Linear(16, 3)(x)")
    done = run("--attention", "script.py", folder=tmp_path)
    assert (0, 1) == (done.returncode, done.stderr.count("\n")), done.stderr
    space: dict = {}
    exec(code, space)
    saved = load(tmp_path / "captured.safetensors")
    assert ("MultiheadAttention", "MultiheadAttention@2") == saved.paths
    for weights, found in zip(space["wanted"], saved, strict=True):
        assert torch.allclose(weights, found.dense(), atol=1e-6)


WRONG = [
    (["run"], "no script to run"),
    (["run", "missing.py"], "cannot read the script missing.py"),
    (["run", "-m", "no.such.module"], "no module 'no.such.module'"),
    (["run", "-m", "script.py"], "leave out the -m"),
    (["run", "empty"], "no __main__.py in empty"),
    (["run", "-m", "empty"], "without a __main__ module"),
    (["run", "--var", "a-b", "script.py"], "--var takes the name of a local variable, not 'a-b'"),
    (["run", "--target", "script:double", "script.py"], "needs --var"),
    (["run", "--target", "double", "--var", "x", "script.py"], "write package.module:function"),
    (["run", "--attention", "--var", "x", "script.py"], "it takes no --var"),
    (["run", "--limit", "0", "script.py"], "--limit: '0' is not a number from 1 on"),
    (["run", "--max-bytes", "many", "script.py"], "is not a number from 1 on"),
    (["run", "--nonsense", "script.py"], "--nonsense"),
    (["run", "-o", "missing/x.safetensors", "script.py"], "cannot write missing/x.safetensors"),
    (["run", "-o", "empty", "script.py"], "'empty' is a folder"),
    (["run", "--target", "script:double", "--var", "dubled", "script.py"], "did you mean 'doubled'?"),
    (["run", "--target", "script:double.inner", "--var", "x", "script.py"], "there is no 'inner'"),
    (["run", "--target", "json:lods", "--var", "x", "imports.py"], "did you mean 'loads'?"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_use_is_one_line_and_status_2(arguments, said, tmp_path):
    (tmp_path / "script.py").write_text(DECORATED)
    (tmp_path / "imports.py").write_text("import json\nprint('goes on')")
    (tmp_path / "empty").mkdir()
    done = start("-m", "visualizer", *arguments, folder=tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert said in done.stderr
    assert 1 == done.stderr.count("\n")
    assert not list(tmp_path.glob("*.safetensors"))


LATE = f"""{MODEL}
class Late(nn.Module):
    def forward(self, x):
        if x is None:
            late = 1

Late()(x)
"""

NOTHING = [
    ([], "print(1)", "nothing in it has @get_local"),
    ([], f"{DECORATED}\nget_local.clear()", "double did not run, or the script cleared the cache"),
    (["--var", "attn"], "print(1)", "the script called no nn.Module"),
    (["--var", "atn"], f"{MODEL}\nmodel(x)", "did you mean 'attn'?"),
    (["--var", "late"], LATE, "Late ran, and had no value in the local"),
    (["--attention"], f"{MODEL}\nnn.Sequential(nn.Linear(8, 8))(x)", "Sequential ran, and no attention was seen in it"),
    (["--target", "colorsys:rgb_to_hsv", "--var", "r"], "print(1)", "the script did not import colorsys"),
    (["--target", "script:f", "--var", "s"], "print(1)", "the script defines no f"),
    (["--target", "script:f", "--var", "s"], "def f(s): pass", "f was not called"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "code", "said"), NOTHING)
def test_nothing_captured_is_one_line_and_status_1(options, code, said, tmp_path):
    (tmp_path / "script.py").write_text(code)
    done = run(*options, "script.py", folder=tmp_path)
    ours = [line for line in done.stderr.splitlines() if line.startswith("visualizer: ")]
    assert 1 == done.returncode
    assert 1 == len(ours)
    assert ours[0].startswith("visualizer: nothing was captured: ")
    assert said in ours[0]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.safetensors"))


def test_nothing_captured_leaves_a_failing_scripts_own_status(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit(3)")
    assert 3 == run("script.py", folder=tmp_path).returncode
    (tmp_path / "script.py").write_text("raise SystemExit(0)")
    assert 1 == run("script.py", folder=tmp_path).returncode


def test_values_that_no_file_can_hold_are_said_by_name(tmp_path):
    (tmp_path / "script.py").write_text(DECORATED.replace("2 * x", "object()").replace("doubled + 1", "0"))
    done = run("script.py", folder=tmp_path)
    assert 1 == done.returncode
    assert "cannot save what was captured in captured.safetensors: 'double'" in done.stderr
    assert 1 == done.stderr.count("\n")


@pytest.mark.slow
def test_a_timm_vit_is_captured_without_a_change_to_its_script(tmp_path):
    model = (
        "import timm, torch\ntimm.layers.set_fused_attn(False)\ntorch.manual_seed(0)\n"
        "model = timm.create_model('vit_tiny_patch16_224', depth=2, img_size=64).eval()\n"
        "x = torch.randn(1, 3, 64, 64)\n"
    )
    (tmp_path / "script.py").write_text(f"{model}\nwith torch.inference_mode():\n    model(x)")
    assert 0 == run("--var", "attn", "-o", "a", "script.py", folder=tmp_path, env=os.environ).returncode
    assert 0 == run("--attention", "-o", "b", "script.py", folder=tmp_path, env=os.environ).returncode
    space: dict = {}
    exec(model, space)
    space["timm"].layers.set_fused_attn(True)
    with capture(space["model"], "attn") as found, torch.inference_mode():
        space["model"](space["x"])
    values, maps = load(tmp_path / "a"), load(tmp_path / "b")
    assert ["blocks.0.attn", "blocks.1.attn"] == list(found) == list(values) == list(maps.paths)
    for key in found:
        assert np.array_equal(found[key][0], values[key][0])
        assert np.allclose(found[key][0], maps[key].numpy(), atol=1e-6)


@pytest.mark.slow
def test_the_documentations_examples_print_what_it_says(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text(encoding="utf-8")
    (tmp_path / "look.py").write_text(text.split("```python\n")[1].split("```")[0])
    examples = [block.split("```")[0] for block in text.split("```console\n$ visualizer ")[1:]]
    examples = [example for example in examples if not example.startswith("doctor")]  # which lists timm's locals
    assert 9 == len(examples)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        command, wanted = example.split("\n", 1)
        arguments = shlex.split(command)
        if arguments[0] == "run":
            done = start("-m", "visualizer", *arguments, folder=tmp_path, env=os.environ)
            printed = done.stdout, done.stderr
        else:  # it runs nobody's script, so it needs no process of its own
            cli.main(arguments)
            printed = capsys.readouterr()
        assert wanted == "".join(printed)

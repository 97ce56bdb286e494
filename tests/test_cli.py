"""The command itself: its parser, its exit status, and what it imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import visualizer
from visualizer import cli

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["dem"], "invalid choice"),
        (["plto"], "did you mean 'plot'?"),
        (["demo", "--colour", "red"], "--colour"),
        (["explore", "x", "--titel", "y"], "did you mean '--title'? (see visualizer explore --help)"),
        (["run", "--at", "asign", "x.py"], "did you mean 'assign'?"),
        (["plot", "x", "--style", "masc"], "did you mean 'mask'?"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, said, refuses):
    refuses(arguments, said)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (0, f"visualizer {visualizer.__version__}\n") == (end.value.code, capsys.readouterr().out)


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert 2 == cli.main(["demo"])
    printed = capsys.readouterr().err
    assert 'pip install "get-local[demo]"' in printed
    assert 1 == printed.count("\n")


def test_an_error_of_our_own_is_no_wrong_argument(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.demo, "_run", lambda *_: 1 / 0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["doctor"], ["stats", "--model", "vit_tiny_patch16_224", "--images", "."]])
def test_a_package_that_is_broken_is_one_line_and_what_fits(arguments, tmp_path):
    """As where torch was updated alone: timm cannot be imported, because torchvision cannot."""
    for name, code in (("timm", "import torchvision"), ("torchvision", "raise RuntimeError('no operator nms')")):
        (tmp_path / "site-packages" / name).mkdir(parents=True)
        (tmp_path / "site-packages" / name / "__init__.py").write_text(code)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    around = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site-packages"), str(ROOT)])}
    command = [sys.executable, "-m", "visualizer", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=around, capture_output=True, text=True)
    assert done.returncode == (1 if arguments == ["doctor"] else 2), done.stderr
    minor = torch.__version__.split(".")[1]
    for said in ("imports, and cannot be imported: RuntimeError: no operator nms", f"0.{int(minor) + 15}.*"):
        assert said in done.stderr
    assert 1 == done.stderr.count("\n")


def test_python_m_visualizer_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "visualizer", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (0, "") == (done.returncode, done.stderr)
    assert "demo" in done.stdout


@pytest.mark.parametrize("command", ["", "plot", "info", "run"])
def test_help_of_others_loads_no_torch(command):
    code = (
        "import sys\nfrom visualizer import cli\n"
        f"try: cli.main([*{[command] * bool(command)}, '--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "False" == done.stdout.splitlines()[-1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path):
    """And so is one where the results are so short that Python writes them only at its end."""
    script = tmp_path / "script.py"
    script.write_text("from visualizer import get_local\nget_local('a')(lambda a: a)(1)\n")
    command = [sys.executable, "-m", "visualizer"]
    subprocess.run([*command, "run", "-o", "one.safetensors", script], cwd=tmp_path, check=True)
    info = [*command, "info", "one.safetensors"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(info, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (1, "visualizer: cannot write the results: No space left on device\n") == (done.returncode, done.stderr)

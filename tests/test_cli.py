"""The command itself: its parser, its exit status, and what it imports."""

import subprocess
import sys
from pathlib import Path

import pytest

from visualizer import cli

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "COMMAND"), (["dem"], "invalid choice"), (["demo", "--colour", "red"], "--colour")],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, said, capsys):
    assert 2 == cli.main(arguments)
    printed = capsys.readouterr()
    assert "" == printed.out
    assert said in printed.err
    assert printed.err.startswith("visualizer: ")
    assert 1 == printed.err.count("\n")


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

"""`visualizer info`: what it says of a saved file."""

import json
import os
import subprocess
import sys
from pathlib import Path

from saved_files import TOKENS, folder_of_files  # noqa: F401

from visualizer import cli, load


def test_info_lists_keys_and_what_was_saved_with_them(folder, capsys):
    assert 0 == cli.main(["info", "text.safetensors"])
    out = capsys.readouterr().out.splitlines()
    assert "text.safetensors: 1 key, 3 values, 1.2 kB" == out[0]
    assert ["attend", "3", "(1,", "2,", "5,", "5)", "float64", "1.2", "kB"] == out[2].split()
    assert ["about tokens: ['[CLS]', 'the', 'cat', 'sat', '[SEP]']", "about made by: 'a test'"] == out[3:]


def test_info_as_json_has_every_value(folder, capsys):
    assert 0 == cli.main(["info", "text.safetensors", "--json"])
    content = json.loads(capsys.readouterr().out)
    value = {"shape": [1, 2, 5, 5], "dtype": "float64", "bytes": 400}
    assert "captured values" == content["kind"]
    assert [{"key": "attend", "values": [value] * 3}] == content["keys"]
    assert TOKENS == content["about"]["tokens"]


def test_info_of_attention_maps(folder, capsys):
    assert 0 == cli.main(["info", "maps.safetensors"])
    out = capsys.readouterr().out
    assert "layers.a" in out
    assert "query and key, float32" in out
    assert 0 == cli.main(["info", "maps.safetensors", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert "attention maps" == content["kind"]
    assert ["layers.a", "layers.b"] == [row["key"] for row in content["keys"]]
    [value] = content["keys"][0]["values"]
    maps = load("maps.safetensors")
    assert {
        "shape": [1, 2, 5, 5],
        "dtype": "float32",
        "bytes": maps[0].nbytes,
        "kept as": "query and key",
        "attention": "self",
    } == value


def test_info_of_arrays_loads_no_torch(folder):
    code = (
        "import sys; from visualizer.cli import main; main(['info', 'text.safetensors']); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}  # without tests/sitecustomize.py
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert "False" == done.stdout.splitlines()[-1], done.stderr

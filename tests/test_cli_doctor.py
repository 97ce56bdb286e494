"""`visualizer doctor`: what it says of this machine and of models."""

import json
import platform
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from visualizer import cli, opcodes

EXAMPLE = """
import torch
from visualizer.models import VisionTransformer

class Layer(torch.nn.Module):
    def forward(self, x):
        attn = x.softmax(-1)
        return attn

def build():
    return torch.nn.Sequential(Layer(), Layer())

def fails():
    raise RuntimeError("no weights here")

ready = build()
number = 7
"""


@pytest.fixture
def examined(tmp_path, monkeypatch, capsys):
    """What doctor says of a model, as text and as JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "example_models.py").write_text(EXAMPLE)

    def examine(*arguments):
        sys.modules.pop("example_models", None)
        assert 0 == cli.main(["doctor", *arguments]), capsys.readouterr().err
        text = capsys.readouterr().out
        assert 0 == cli.main(["doctor", *arguments, "--json"])
        return text, json.loads(capsys.readouterr().out)

    return examine


def test_versions_and_devices_are_those_of_this_process(examined):
    text, content = examined()
    assert content["python"].startswith(platform.python_version())
    assert content["capture works"]
    assert (np.__version__, torch.__version__) == (content["versions"]["numpy"], content["versions"]["torch"])
    assert metadata.version("bytecode") == content["versions"]["bytecode"]
    assert 1 + torch.cuda.device_count() == len(
        [name for name in content["devices"] if name.startswith(("cpu", "cuda"))]
    )
    for name, version in content["versions"].items():
        assert any([name, version or "-"] == line.split() for line in text.splitlines())


def test_an_interpreter_that_capture_does_not_know_is_status_1(monkeypatch, capsys):
    monkeypatch.setattr(opcodes, "why_unsupported", lambda: "it knows others")
    assert 1 == cli.main(["doctor"])
    printed = capsys.readouterr()
    assert "capture works: no" in printed.out
    assert "visualizer: get_local and capture cannot work on this Python: it knows others\n" == printed.err


def test_it_says_whether_the_compiler_knows_what_a_captured_call_means(monkeypatch, examined):
    text, content = examined()
    assert "captured within their graphs" == content["compiled models"]
    monkeypatch.setattr(cli.doctor, "compiler_trouble", lambda: "torch 9 has no VariableBuilder")
    text, content = examined()
    assert "torch 9 has no VariableBuilder" == content["compiled models"]
    assert "compiled models: torch 9 has no VariableBuilder" in text.splitlines()


def test_a_missing_extra_has_its_command(monkeypatch, capsys):
    known = metadata.version

    def version(name):
        if name in ("scipy", "torch"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    assert 1 == cli.main(["doctor", "--json"])
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert 'missing scipy: pip install "get-local[flow]"' == content["extras"]["flow"]
    assert (None, []) == (content["versions"]["torch"], content["devices"])
    assert "visualizer: torch is missing: pip install torch\n" == printed.err


def test_its_extras_are_those_of_the_package():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for extra, packages in tomllib.loads(text)["project"]["optional-dependencies"].items():
        if extra in cli.doctor.EXTRAS:
            assert {name.partition(">")[0] for name in packages} == set(cli.doctor.EXTRAS[extra])


def test_a_model_that_a_function_builds(examined):
    for name in ("example_models:build", "example_models:ready"):
        text, content = examined(name)
        assert {"attn": 2} == content["locals"]
        assert {"Layer": ["x", "attn"]} == content["classes"]
        assert not content["fused"]
        assert "capture(model, \"attn\") has 2 keys, '0' to '1'" in text


def test_a_timm_model_is_built_without_weights_and_its_fused_attention_is_named(examined, monkeypatch):
    import timm

    built = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **options: built.append(create(*args, **options)) or built[-1]
    )
    before = timm.layers.use_fused_attn()
    try:
        timm.layers.set_fused_attn(True)
        text, content = examined("vit_tiny_patch16_224")
        timm.layers.set_fused_attn(False)
        _, open_ones = examined("vit_tiny_patch16_224")
    finally:
        timm.layers.set_fused_attn(before)
    assert all(parameter.is_meta for parameter in built[0].parameters())
    assert {"attn": 12} == content["locals"]
    assert content["fused"]
    assert "timm.layers.set_fused_attn(False)" in text
    assert "attention(model), or visualizer run --attention, has the weights without any change" in text
    assert "attn" in content["classes"]["Attention"]
    assert not open_ones["fused"]


def test_a_model_of_transformers_out_of_a_folder(examined, tmp_path):
    import transformers

    transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    ).save_pretrained(tmp_path / "my-bert")
    text, content = examined("my-bert")
    assert "BertModel (transformers, without weights)" == content["model"]
    assert {"attn_weights": 4} == content["locals"]
    assert content["fused"]
    assert 'model.set_attn_implementation("eager")' in text


def test_a_model_without_attention(examined):
    text, content = examined("resnet18")
    assert ({}, {}, False) == (content["locals"], content["classes"], content["fused"])
    assert "it seems to have none" in text


def test_a_model_of_ours(examined):
    _, content = examined("dinov2-small")
    assert {"attn": 12} == content["locals"]
    assert not content["fused"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("minilmm", "did you mean minilm"),
        ("no_such_module:build", "No module named 'no_such_module'"),
        ("example_models:bild", "'example_models:bild' leads nowhere"),
        ("example_models:fails", "example_models:fails() raised RuntimeError: no weights here"),
        ("example_models:number", "example_models:number() raised TypeError"),
        ("math:gcd", "returns a int, not an nn.Module"),
        ("", "there is no model ''"),
    ],
)
def test_a_wrong_name_is_one_line_and_status_2(name, said, examined, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert 2 == cli.main(["doctor", name])
    printed = capsys.readouterr()
    assert "" == printed.out
    assert said in printed.err
    assert 1 == printed.err.count("\n")


def test_a_name_that_may_be_one_of_timms_where_timm_is_not_there(examined, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert 2 == cli.main(["doctor", "vit_tiny_patch16_224"])
    printed = capsys.readouterr().err
    assert "there is no model 'vit_tiny_patch16_224': neither" in printed
    assert "nor could its name be looked up among those of timm: timm cannot be imported" in printed
    assert 1 == printed.count("\n")

"""`visualizer info` and `visualizer plot`: what they say and draw of a saved file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from plots import no_figure_left  # noqa: F401

from visualizer import analysis, attention, capture, cli, load

TOKENS = ["[CLS]", "the", "cat", "sat", "[SEP]"]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(x):
    attn = x
    return attn.sum()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of three layers, of a text with its tokens and of 4 x 4 patches; of maps; of two calls; of nothing."""
    random = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    with capture(attend, "attn") as text:
        [attend(softmax(random.normal(size=(1, 2, 5, 5)))) for _ in range(3)]
    text.save("text.safetensors", about={"tokens": TOKENS, "made by": "a test"})
    with capture(attend, "attn") as picture:
        [attend(softmax(random.normal(size=(1, 2, 17, 17)))) for _ in range(3)]
    picture.save("picture.safetensors")
    layers = torch.nn.ModuleDict({name: torch.nn.MultiheadAttention(8, 2, batch_first=True) for name in "ab"})

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            for layer in self.layers.values():
                x = layer(x, x, x, need_weights=False)[0]
            return x

    model = Model()
    with attention(model) as maps, torch.no_grad():
        model(torch.randn(1, 5, 8))
        maps.save("maps.safetensors")
        model(torch.randn(1, 5, 8))
        maps.save("twice.safetensors")
    with capture(attend, "attn") as nothing:
        pass
    nothing.save("nothing.safetensors")
    pixels = random.integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def matrix(figure, panel=0):
    return np.asarray(figure.axes[panel].images[0].get_array())


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


def test_a_heads_matrix_is_that_of_the_layer_and_head(folder, drawn, capsys):
    assert 0 == cli.main(["plot", "text.safetensors", "--kind", "head", "--layer", "1", "--head", "-1", "-o", "x.png"])
    assert "x.png\n" == capsys.readouterr().out
    assert np.allclose(load("text.safetensors")["attend"][1][0, 1], matrix(drawn[0]))
    with Image.open("x.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_all_heads_are_drawn_unless_told_otherwise(folder, drawn, capsys):
    assert 0 == cli.main(["plot", "maps.safetensors"])
    assert "heads.png\n" == capsys.readouterr().out
    maps = load("maps.safetensors")
    for head in range(2):
        assert np.allclose(maps[1].numpy()[0, head], matrix(drawn[0], head))


def test_keys_and_calls_are_chosen(folder, drawn, capsys):
    arguments = ["plot", "twice.safetensors", "--kind", "head", "--head", "0", "--key", "*.b"]
    assert 0 == cli.main([*arguments, "--call", "-1"])
    assert np.allclose(load("twice.safetensors").calls("layers.b")[1].numpy()[0, 0], matrix(drawn[0]))
    assert 0 == cli.main([*arguments, "--layer", "0"])  # of one key, the calls are the layers
    assert np.allclose(load("twice.safetensors").calls("layers.b")[0].numpy()[0, 0], matrix(drawn[1]))
    capsys.readouterr()
    assert 2 == cli.main(["plot", "twice.safetensors"])
    assert "'layers.a' was called 2 times: choose --call 0 to 1" in capsys.readouterr().err


def test_a_wrapper_that_passes_a_map_on_is_no_layer_of_its_own(tmp_path, monkeypatch, drawn):
    class Inner(torch.nn.Module):
        def forward(self, x):
            attn = x.softmax(-1)
            return attn

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            attn = self.inner(x)
            return attn

    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(Outer(), Outer())
    with capture(model, "attn") as found:
        model(torch.randn(1, 1, 3, 3))
    assert ["0", "0.inner", "1", "1.inner"] == list(found)
    found.save("x")
    assert 0 == cli.main(["plot", "x", "--kind", "head", "--layer", "1"])
    assert np.allclose(found["1.inner"][0][0, 0], matrix(drawn[0]))
    assert 0 == cli.main(["plot", "x", "--kind", "head", "--layer", "2", "--key", "*"])
    assert np.allclose(found["1"][0][0, 0], matrix(drawn[1]))


def test_the_words_are_the_files_own_or_the_users(folder, drawn):
    arguments = ["plot", "text.safetensors", "--kind", "tokens", "--layer", "0", "--head", "0"]
    assert 0 == cli.main(arguments)
    assert 0 == cli.main([*arguments, "-o", "letters", "--tokens", *"abcde"])
    assert {"tokens.png", "letters.png"} <= {path.name for path in folder.iterdir()}
    for figure, words in zip(drawn, (TOKENS, list("abcde")), strict=True):
        assert words == [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize("kind", ["query", "class-token", "rollout"])
def test_weights_lie_over_the_picture(kind, folder, drawn):
    options = ["--query", "2,1"] if kind == "query" else []
    arguments = ["plot", "picture.safetensors", "--kind", kind, *options]
    assert 0 == cli.main([*arguments])
    assert 0 == cli.main([*arguments, "--image", "photo.png"])
    maps = load("picture.safetensors")["attend"]
    means = [layer[0].mean(0) for layer in maps]
    if kind == "rollout":
        flow = np.eye(17)
        for mean in means:
            mixed = mean / 2 + np.eye(17) / 2
            flow = mixed / mixed.sum(-1, keepdims=True) @ flow
        wanted = flow[0, 1:]
    else:
        wanted = means[-1][0 if kind == "class-token" else 1 + 2 * 4 + 1, 1:]
    alone, above = ([np.asarray(image.get_array()) for ax in figure.axes for image in ax.images] for figure in drawn)
    assert any(array.shape == (4, 4) and np.allclose(wanted.reshape(4, 4), array, atol=1e-6) for array in alone)
    [*_, colours] = (array for array in above if array.shape == (48, 48, 3))
    with Image.open("photo.png") as picture:
        grey = 0.6 / 255 * (np.asarray(picture) @ [0.299, 0.587, 0.114])
    least = np.argmin(wanted)  # the picture is seen best where the weight is lowest, and there as it is, upright
    patch = np.s_[12 * (least // 4) : 12 * (least // 4 + 1), 12 * (least % 4) : 12 * (least % 4 + 1)]
    assert 0.99 < np.corrcoef(grey[patch].ravel(), colours[patch].sum(-1).ravel())[0, 1]


def test_all_layers_of_a_head(folder, drawn):
    assert 0 == cli.main(["plot", "text.safetensors", "--kind", "layers", "--head", "1", "--title", "all of them"])
    for number, layer in enumerate(load("text.safetensors")["attend"]):
        assert np.allclose(layer[0, 1], matrix(drawn[0], number))


def test_distance_and_entropy_have_a_dot_for_each_head(folder, drawn):
    assert 0 == cli.main(["plot", "picture.safetensors", "--kind", "distance", "--grid", "4x4"])
    assert 0 == cli.main(["plot", "picture.safetensors", "--kind", "entropy"])
    weights = np.stack(load("picture.safetensors")["attend"])[:, 0]  # (layers, heads, 17, 17)
    inner = weights[:, :, 1:, 1:] / weights[:, :, 1:, 1:].sum(-1, keepdims=True)
    places = np.array([divmod(patch, 4) for patch in range(16)])
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    wanted = [(inner * apart).sum(-1).mean(-1), -(weights * np.log(weights)).sum(-1).mean(-1)]
    for figure, values, unit in zip(drawn, wanted, ("distance (patches)", "entropy (nats)"), strict=True):
        assert np.allclose(values.ravel(), figure.axes[0].collections[0].get_offsets()[:, 1])
        assert figure.axes[0].get_ylabel().endswith(unit)


def test_patterns_are_those_of_the_analysis(folder, drawn):
    assert 0 == cli.main(["plot", "text.safetensors", "--kind", "patterns"])
    labels = analysis.head_patterns(load("text.safetensors")["attend"], TOKENS).labels.ravel().tolist()
    said = " ".join(text.get_text() for text in drawn[0].axes[0].get_legend().get_texts())
    for label in set(labels):
        assert f"{label} ({labels.count(label)})" in said


def test_what_is_odd_about_the_maps_is_one_plain_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with capture(attend, "attn") as found:
        attend(np.full((1, 1, 3, 3), 0.2))
    found.save("x")
    assert 0 == cli.main(["plot", "x"])
    said = capsys.readouterr().err
    assert said.startswith("visualizer: 3 of 3 rows do not sum to 1")
    assert 1 == said.count("\n")


WRONG = [
    (["info", "missing"], "cannot read missing: No such file"),
    (["info", "."], "cannot read .: Is a directory"),
    (["info", "empty"], "'empty' is empty"),
    (["info", "cut"], "'cut' has 1,996 bytes in place of 2,096"),
    (["info", "flipped"], "damaged"),
    (["info", "photo.png"], "is not a safetensors file"),
    (["info", "foreign"], "not written by save()"),
    (["info", "nul\0"], "cannot read nul"),
    (["plot", "photo.png"], "is not a safetensors file"),
    (["plot", "nothing.safetensors"], "there is nothing in nothing.safetensors"),
    (["plot", "text.safetensors", "--kind", "headz"], "invalid choice: 'headz'"),
    (
        ["plot", "text.safetensors", "--kind", "head", "--layer", "0"],
        "maps has 2 heads and none is chosen: pass --head",
    ),
    (["plot", "text.safetensors", "--layer", "3"], "--layer 3 is out of range"),
    (["plot", "text.safetensors", "--layer", "first"], "'first' is no number, and not mean"),
    (["plot", "text.safetensors", "--key", "blocks.*"], "no key matches 'blocks.*': there are 'attend'"),
    (["plot", "text.safetensors", "--call", "3"], "'attend' has no call 3"),
    (["plot", "text.safetensors", "--head", "0"], "--kind heads has no use for --head; it takes --layer, --batch"),
    (["plot", "text.safetensors", "--kind", "entropy", "--image", "photo.png"], "it takes --title"),
    (["plot", "picture.safetensors", "--kind", "tokens"], "needs the words: --tokens"),
    (["plot", "text.safetensors", "--kind", "query"], "needs --query"),
    (["plot", "text.safetensors", "--kind", "tokens", "--layer", "0", "--head", "0", "--tokens", "a"], "1 entries"),
    (["plot", "picture.safetensors", "--kind", "query", "--query", "9,9"], "9"),
    (["plot", "picture.safetensors", "--kind", "query", "--query", "0,0", "--grid", "4"], "'4' is not like 14x14"),
    (["plot", "picture.safetensors", "--kind", "class-token", "--grid", "3x3", "--image", "none.jpg"], "none.jpg"),
    (["plot", "picture.safetensors", "--kind", "class-token", "--image", "text.safetensors"], "as a picture"),
    (["plot", "maps.safetensors", "--kind", "class-token", "--key", "*.a", "--grid", "2x3"], "5 keys"),
    (["plot", "text.safetensors", "-o", "missing/x.png"], "cannot write missing/x.png"),
    (["plot", "text.safetensors", "-o", "x.xyz"], "xyz"),
    (["plot", "text.safetensors", "-o", "."], "cannot write ."),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_use_is_one_line_and_status_2(arguments, said, folder, capsys):
    whole = (folder / "text.safetensors").read_bytes()
    (folder / "empty").write_bytes(b"")
    (folder / "cut").write_bytes(whole[:-100])
    (folder / "flipped").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "foreign").write_bytes(b"\x0e\0\0\0\0\0\0\0" + b'{"a":{},"b":1}')
    before = sorted(path.name for path in folder.iterdir())
    assert 2 == cli.main(arguments)
    printed = capsys.readouterr()
    assert "" == printed.out
    assert said in printed.err
    assert printed.err.startswith("visualizer: ")
    assert 1 == printed.err.count("\n")
    assert before == sorted(path.name for path in folder.iterdir())


def test_info_of_arrays_loads_no_torch(folder):
    code = (
        "import sys; from visualizer.cli import main; main(['info', 'text.safetensors']); print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}  # without tests/sitecustomize.py
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert "False" == done.stdout.splitlines()[-1], done.stderr

"""What `visualizer info` and `plot` share: reading a saved file, and choosing among its maps."""

import numpy as np
import pytest
import torch
from plots import no_figure_left  # noqa: F401
from saved_files import TOKENS, figures_drawn, folder_of_files, matrix  # noqa: F401

from visualizer import attention, capture, cli, load


def test_keys_and_calls_are_chosen(folder, drawn, capsys):
    arguments = ["plot", "twice.safetensors", "--kind", "head", "--head", "0", "--key", "*.b"]
    assert 0 == cli.main([*arguments, "--call", "-1"])
    assert np.allclose(load("twice.safetensors").calls("layers.b")[1].numpy()[0, 0], matrix(drawn[0]))
    assert 0 == cli.main([*arguments, "--layer", "0"])  # of one key, the calls are the layers
    assert np.allclose(load("twice.safetensors").calls("layers.b")[0].numpy()[0, 0], matrix(drawn[1]))
    capsys.readouterr()
    assert 2 == cli.main(["plot", "twice.safetensors"])
    assert "'layers.a' was called 2 times: choose --call 0 to 1" in capsys.readouterr().err


def test_the_steps_of_a_generation_are_one_map(tmp_path, monkeypatch, drawn):
    class Decoder(torch.nn.Module):
        def forward(self, x, cache):
            cache = torch.cat([cache, x], 2)
            return torch.nn.functional.scaled_dot_product_attention(x, cache, cache, is_causal=len(x[0, 0]) > 1), cache

    monkeypatch.chdir(tmp_path)
    model = Decoder()
    with attention(model) as maps:
        x, cache = model(torch.randn(1, 2, 4, 8), torch.empty(1, 2, 0, 8))
        model(x[:, :, -1:], cache)
    maps.save("x")
    assert 0 == cli.main(["plot", "x", "--kind", "head", "--layer", "0", "--head", "1"])
    assert np.allclose(maps.generated()[0].numpy()[0, 1], np.nan_to_num(matrix(drawn[0])))  # the future is blank
    assert 0 == cli.main(["plot", "x", "--kind", "head", "--layer", "0", "--head", "1", "--call", "0"])
    assert np.allclose(maps[0].numpy()[0, 1], np.nan_to_num(matrix(drawn[1])))


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


WRONG = [
    (["info", "missing"], "cannot read missing: No such file"),
    (["info", "."], "cannot read .: Is a directory"),
    (["info", "empty"], "'empty' is empty"),
    (["info", "cut"], "'cut' has 2,012 bytes in place of 2,112"),
    (["info", "flipped"], "damaged"),
    (["info", "photo.png"], "is not a safetensors file"),
    (["info", "foreign"], "not written by save()"),
    (["info", "nul\x00"], "cannot read nul"),
    (["plot", "photo.png"], "is not a safetensors file"),
    (["plot", "nothing.safetensors"], "there is nothing in nothing.safetensors"),
    (["plot", "text.safetensors", "--key", "blocks.*"], "no key matches 'blocks.*': there are 'attend'"),
    (["plot", "text.safetensors", "--call", "3"], "'attend' has no call 3"),
    (["plot", "picture.safetensors", "--kind", "query", "--query", "0,0", "--grid", "4"], "'4' is not like 14x14"),
    (["plot", "picture.safetensors", "--kind", "class-token", "--grid", "3x3", "--image", "none.jpg"], "none.jpg"),
    (["plot", "picture.safetensors", "--kind", "class-token", "--image", "text.safetensors"], "as a picture"),
    (["plot", "maps.safetensors", "--kind", "class-token", "--key", "*.a", "--grid", "2x3"], "5 tokens"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_use_is_one_line_and_status_2(arguments, said, folder, refuses):
    whole = (folder / "text.safetensors").read_bytes()
    (folder / "empty").write_bytes(b"")
    (folder / "cut").write_bytes(whole[:-100])
    (folder / "flipped").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "foreign").write_bytes(b"\x0e\0\0\0\0\0\0\0" + b'{"a":{},"b":1}')
    before = sorted(path.name for path in folder.iterdir())
    refuses(arguments, said)
    assert before == sorted(path.name for path in folder.iterdir())

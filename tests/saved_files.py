"""What the tests of saved files share: the files, and the figures that are drawn of them."""

import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image

from visualizer import attention, capture
from visualizer.errors import VisualizerWarning

TOKENS = ["[CLS]", "the", "cat", "sat", "[SEP]"]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(x):
    attn = x
    return attn.sum()


@pytest.fixture(name="folder")
def folder_of_files(tmp_path, monkeypatch):
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
    with pytest.warns(VisualizerWarning, match="nothing was recorded"), capture(attend, "attn") as nothing:
        pass
    nothing.save("nothing.safetensors")
    pixels = random.integers(0, 255, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


@pytest.fixture(name="drawn")
def figures_drawn(monkeypatch):
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

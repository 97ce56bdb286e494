"""The open softmax: what may happen to scores and to weights. The map is what is multiplied with the values."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import VisualizerWarning, attention


class Written(nn.Module):
    """Attention of one head, as a function writes it; it keeps what it multiplies with the values."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        self.weights = self.function(x)
        return self.weights @ x


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def map_of(function, x):
    model = Written(function)
    before = model(x)
    with attention(model) as maps:
        after = model(x)
    assert torch.equal(before, after)
    [found] = maps
    assert torch.equal(found.dense()[:, 0], model.weights)
    return found


def scores(x, factor=1.0):
    return x @ x.mT * factor / 8**0.5


SCORES = {
    "a floor": lambda s: torch.max(s, torch.tensor(-2.0)),
    "a floor as a method": lambda s: s.maximum(torch.tensor(-2.0)),
    "abs": lambda s: s.abs(),
    "power": lambda s: -(s**2),
    "softcap": lambda s: 5 * (s / 5).tanh(),
    "sigmoid": lambda s: torch.sigmoid(s),
    "exp and log": lambda s: torch.log1p(torch.exp(s)),
    "a mask": lambda s: s.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf),
    "a mask in place": lambda s: s.masked_fill_(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf),
    "less the largest": lambda s: s - s.amax(-1, keepdim=True),
    "a bias": lambda s: s + torch.arange(5.0),
    "tril": lambda s: s.tril(),
    "lerp": lambda s: torch.lerp(s, torch.zeros(()), 0.5),
}


@pytest.mark.parametrize("name", SCORES)
def test_between_scores_and_softmax(x, name):
    found = map_of(lambda x: SCORES[name](scores(x)).softmax(-1), x)
    assert found.softmaxes == ()


def zero_first(weights):
    weights[..., 0] = 0
    return weights


def zero_by_a_view(weights):
    weights[:, :, 0].zero_()
    return weights


CHANGES = {
    "masked": lambda w: w.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), 0),
    "written to": zero_first,
    "written to by a view": zero_by_a_view,
    "scaled": lambda w: w * 2,
    "normalised again": lambda w: w / (1e-3 + w.sum(-2, keepdim=True)),
    "thresholded": lambda w: F.relu(w - 0.1),
    "gated": lambda w: w * torch.sigmoid(torch.arange(5.0)),
    "to a power": lambda w: w.pow(2),
    "sorted by a rule": lambda w: torch.where(w > 0.2, w, torch.zeros(())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_between_softmax_and_values(x, name):
    kept = []

    def function(x):
        weights = scores(x).softmax(-1)
        kept.append(weights.clone())
        return CHANGES[name](weights)

    found = map_of(function, x)
    [softmax] = found.softmaxes
    assert torch.equal(softmax.dense()[:, 0], kept[-1])
    assert "made of 1 softmax" in repr(found)


@pytest.mark.parametrize(
    "change",
    [lambda w: w.masked_fill(w < 0, 7.0), lambda w: w * 1.0, lambda w: w.contiguous().clone(), lambda w: w + 0],
    ids=["a mask of nothing", "times 1", "a copy", "plus 0"],
)
def test_what_changes_no_number_leaves_one_softmax(x, change):
    assert map_of(lambda x: change(scores(x).softmax(-1)), x).softmaxes == ()


def test_two_softmaxes_mixed(x):
    """As ConViT mixes content and position."""

    def function(x):
        mixed = 0.3 * scores(x).softmax(-1) + 0.7 * scores(x, 3).softmax(-1)
        return mixed / mixed.sum(-1, keepdim=True)

    found = map_of(function, x)
    assert len(found.softmaxes) == 2
    assert torch.equal(found.softmaxes[1].dense()[:, 0], scores(x, 3).softmax(-1))
    assert "made of 2 softmaxes" in repr(found)


def test_a_difference_of_softmaxes(x):
    found = map_of(lambda x: scores(x).softmax(-1) - 0.5 * scores(x, 3).softmax(-1), x)
    assert len(found.softmaxes) == 2


def test_talking_heads():
    class Talking(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.proj = nn.Linear(4, 4), nn.Linear(12, 12)

        def forward(self, q):
            self.softmax = (q @ q.mT).softmax(-1)
            self.weights = self.mix(self.softmax.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.proj((self.weights @ q).transpose(1, 2).flatten(2))

    model = Talking()
    with attention(model) as maps:
        model(torch.randn(2, 4, 5, 3))
    assert torch.equal(maps[0].dense(), model.weights)
    assert torch.equal(maps[0].softmaxes[0].dense(), model.softmax)


def test_parts_go_to_a_file_and_to_a_device(x, tmp_path):
    model = Written(lambda x: scores(x).softmax(-1) - scores(x, 3).softmax(-1))
    with attention(model) as maps:
        model(x)
    maps.save(tmp_path / "maps.safetensors")
    from visualizer import load

    again = load(tmp_path / "maps.safetensors")[0]
    assert again.axes_assumed == maps[0].axes_assumed
    for one, other in zip(maps[0].softmaxes, again.softmaxes, strict=True):
        assert torch.equal(one.dense(), other.dense())
    assert len(again.to("cpu").softmaxes) == 2


def test_the_gradient_of_mixed_weights(x):
    model = Written(lambda x: 0.3 * scores(x).softmax(-1) + 0.7 * scores(x, 3).softmax(-1))
    with attention(model, gradients=True) as maps:
        y = model(x.requires_grad_())
        model.weights.retain_grad()
        y.square().sum().backward()
    assert torch.equal(maps[0].grad_dense()[:, 0], model.weights.grad)


def test_a_softmax_over_features_is_no_attention(x):
    class LinearAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x).softmax(-1) @ (self.k(x).softmax(-2).mT @ x)

    model = LinearAttention()
    with pytest.warns(VisualizerWarning, match="LinearAttention"), attention(model) as maps:
        model(x)
    assert len(maps) == 0

"""Several attention calls of one module that are one attention are one map, however their outputs are put together."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import images, timm_model

from visualizer import VisualizerWarning, attention, load

H, N, D = 4, 6, 4


def fused(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def openly(query, key, value):
    return (query @ key.mT / 2).softmax(-1) @ value


def features(output):
    """(batch, heads, queries, width) as (batch, queries, features)."""
    return output.transpose(1, 2).flatten(2)


def heads_behind_each_other(attend, q, k, v):
    return torch.cat([attend(q[:, h], k[:, h], v[:, h]) for h in range(H)], -1)


def heads_stacked(attend, q, k, v):
    return features(torch.stack([attend(q[:, h], k[:, h], v[:, h]) for h in range(H)], dim=1))


def heads_of_four_axes(attend, q, k, v):
    return features(torch.cat([attend(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1]) for h in range(H)], dim=1))


def uneven_heads(attend, q, k, v):
    return features(torch.cat([attend(q[:, part], k[:, part], v[:, part]) for part in (slice(3), slice(3, H))], 1))


def groups_of_heads(attend, q, k, v):
    halves = (slice(2), slice(2, H))
    flat = [attend(*(one[:, part].flatten(0, 1) for one in (q, k, v))) for part in halves]
    return torch.cat([features(one.view(len(q), 2, N, D)) for one in flat], -1)


def heads_written(attend, q, k, v):
    whole = q.new_empty(len(q), N, H, D)
    for head in reversed(range(H)):
        whole[:, :, head] = attend(q[:, head], k[:, head], v[:, head])
    return whole.flatten(2)


def heads_copied(attend, q, k, v):
    whole = q.new_empty(len(q), N, H * D)
    for head in range(H):
        whole[..., head * D : (head + 1) * D].copy_(attend(q[:, head], k[:, head], v[:, head]))
    return whole


def sliced(size):
    """As diffusers' SlicedAttnProcessor: slices of images x heads, here also such that end within an image."""

    def function(attend, q, k, v):
        q, k, v = (one.flatten(0, 1) for one in (q, k, v))
        whole = torch.zeros_like(q)
        for start in range(0, len(q), size):
            part = slice(start, start + size)
            whole[part] = attend(q[part], k[part], v[part])
        return features(whole.view(-1, H, N, D))

    return function


def chunks_of_queries(attend, q, k, v):
    return features(torch.cat([attend(part, k, v) for part in q.split((3, 1, 2), 2)], 2))


def chunks_with_features(attend, q, k, v):
    return torch.cat([features(attend(part, k, v)) for part in q.split(4, 2)], dim=1)


def chunks_written(attend, q, k, v):
    whole = torch.zeros_like(q)
    whole[:, :, 4:] = attend(q[:, :, 4:], k, v)
    whole[:, :, :4] = attend(q[:, :, :4], k, v)
    return features(whole)


def single_queries(attend, q, k, v):
    return torch.stack([attend(q[:, :, n : n + 1], k, v).flatten(1) for n in range(N)], 1)


def heads_and_queries_in_turn(attend, q, k, v):
    rows = [[attend(part, k[:, h], v[:, h]) for part in q[:, h].split(4, 1)] for h in range(H)]
    return torch.cat([torch.cat(row, 1) for row in rows], -1)


def heads_and_queries_written(attend, q, k, v):
    whole = torch.zeros_like(q)
    for head in range(H):
        for part in (slice(4), slice(4, N)):
            whole[:, head, part] = attend(q[:, head, part], k[:, head], v[:, head])
    return features(whole)


def an_image_each(attend, q, k, v):
    return features(torch.stack([attend(*one) for one in zip(q, k, v, strict=True)]))


JOINED = {
    function.__name__: function
    for function in (
        *(heads_behind_each_other, heads_stacked, heads_of_four_axes, uneven_heads, groups_of_heads, heads_written),
        *(heads_copied, chunks_of_queries, chunks_with_features, chunks_written, single_queries, an_image_each),
        *(heads_and_queries_in_turn, heads_and_queries_written),
    )
} | {f"slices of {size}": sliced(size) for size in (1, 2, 3, 4, 5, 8)}


class Module(nn.Module):
    def __init__(self, function, attend=openly):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.attend = function, attend
        self.qkv, self.proj = nn.Linear(16, 3 * H * D), nn.Linear(H * D, 16)

    def parts(self, x):
        return self.qkv(x).reshape(len(x), N, 3, H, D).permute(2, 0, 3, 1, 4)

    def weights(self, x):
        q, k, _ = self.parts(x)
        return (q @ k.mT / 2).softmax(-1)

    def forward(self, x):
        return self.proj(self.function(self.attend, *self.parts(x)))


def inputs(batch=2):
    return torch.randn(batch, N, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attend", [fused, openly])
@pytest.mark.parametrize("name", JOINED)
def test_one_map(name, attend, batch):
    if name == "an_image_each" and batch == 1:
        batch = 3
    model, x = Module(JOINED[name], attend), inputs(batch)
    with torch.no_grad(), attention(model) as maps:
        model(x)
        expected = model.weights(x)
    [one] = maps
    assert one is maps[""]
    assert one.shape == (batch, H, N, N)
    assert (one.dense() - expected).abs().max() < 1e-6
    assert (one.kind, one.is_dense, one.is_softmax, one.axes_assumed) == ("self", attend is openly, True, False)
    assert (one.rows([4, 0]) - expected[:, :, [4, 0]]).abs().max() < 1e-6


def keys_up_to_the_queries(attend, q, k, v):
    parts = slice(3), slice(3, N)
    return features(torch.cat([attend(q[:, :, p], k[:, :, : p.stop], v[:, :, : p.stop]) for p in parts], 2))


def keys_near_by(attend, q, k, v):
    parts = slice(3), slice(3, N)
    return features(torch.cat([attend(q[:, :, p], k[:, :, p], v[:, :, p]) for p in parts], 2))


def single_keys(attend, q, k, v):
    parts = [slice(n, n + 2) for n in range(N - 1)] + [slice(N - 2, N)]
    made = [attend(q[:, :, [n]], k[:, :, p], v[:, :, p]).flatten(1) for n, p in enumerate(parts)]
    return torch.stack(made, 1)


@pytest.mark.parametrize("attend", [fused, openly])
@pytest.mark.parametrize(
    ("function", "count", "why"),
    [
        (keys_up_to_the_queries, 2, "they have different numbers of keys"),
        (keys_near_by, 2, "they are of different queries, and do not look at the same keys and values"),
        (single_keys, N, "each has a single query, and keys and values of its own"),
    ],
)
def test_chunks_with_keys_of_their_own_stay_apart(attend, function, count, why):
    model = Module(function, attend)
    with torch.no_grad(), attention(model) as maps:
        model(inputs())
    assert len(maps) == count
    assert all(one.shape[:2] == (2, H) for one in maps)
    with pytest.raises(KeyError, match=f"attended {count} times; .* are not one attention: {why}"):
        maps[""]


def test_one_attention_of_two_values_stays_apart():
    def halves(attend, q, k, v):
        return features(torch.cat([attend(q, k, part) for part in v.chunk(2, -1)], -1))

    model = Module(halves, fused)
    with torch.no_grad(), attention(model) as maps:
        model(inputs())
    assert len(maps) == 2
    with pytest.raises(KeyError, match="the same query and key, and other values"):
        maps[""]


def test_two_calls_of_the_module_stay_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Module(heads_stacked)

        def forward(self, x):
            return torch.cat([self.attn(x), self.attn(x.flip(1))], -1)

    model, x = Twice(), inputs()
    with torch.no_grad(), attention(model) as maps:
        model(x)
        expected = [model.attn.weights(one) for one in (x, x.flip(1))]
    for one, weights in zip(maps.calls("attn"), expected, strict=True):
        assert (one.dense() - weights).abs().max() < 1e-6


def test_what_is_not_complete_stays_apart():
    def three(attend, q, k, v):
        whole = torch.zeros(len(q), N, H * D)
        for head in range(H - 1):
            whole[..., head * D : (head + 1) * D] = attend(q[:, head], k[:, head], v[:, head])
        return whole

    model = Module(three)
    with torch.no_grad(), attention(model) as maps:
        model(inputs())
    assert len(maps) == H - 1


def test_single_queries_of_heads_that_share_a_key_are_heads():
    def shared(attend, q, k, v):
        return features(torch.stack([attend(q[:, h, :1], k[:, 0], v[:, 0]) for h in range(H)], 1))

    model = Module(shared)
    with torch.no_grad(), attention(model) as maps:
        model(inputs())
    assert maps[""].shape == (2, H, 1, N)


def test_a_mask_for_each_chunk():
    mask = torch.ones(N, N, dtype=torch.bool).tril()

    def masked(_, q, k, v):
        parts = slice(2), slice(2, N)
        calls = [F.scaled_dot_product_attention(q[:, :, p], k, v, attn_mask=mask[p]) for p in parts]
        return features(torch.cat(calls, 2))

    model, x = Module(masked), inputs()
    with torch.no_grad(), attention(model) as maps:
        model(x)
        q, k, _ = model.parts(x)
    expected = (q @ k.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    assert (maps[""].dense() - expected).abs().max() < 1e-6


@torch.library.custom_op("visualizer_tests_joins::_scaled_dot_product_attention_math", mutates_args=())
def wrong_for_one_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    output = F.scaled_dot_product_attention(query, key, value)
    return [output + (query[0, 0, 0] > 10), output.clone()]


def test_each_call_is_proven():
    """Where one head is not what its kernel returned, there is no map."""

    def function(_, q, k, v):
        q = torch.cat([q[:, :3], q[:, 3:] + 20], 1)
        return features(torch.stack([wrong_for_one_head(q[:, h], k[:, h], v[:, h])[0] for h in range(H)], 1))

    model = Module(function)
    with (
        pytest.warns(VisualizerWarning, match="the map of '' is not kept"),
        torch.no_grad(),
        attention(model) as maps,
    ):
        model(inputs())
    assert len(maps) == 0


@pytest.mark.parametrize("attend", [fused, openly])
def test_copied_pickled_and_saved(attend, tmp_path):
    model = Module(heads_and_queries_written, attend)
    with torch.no_grad(), attention(model) as maps:
        model(inputs())
    expected = maps[""].dense()
    assert torch.equal(pickle.loads(pickle.dumps(maps[""])).dense(), expected)
    maps.save(tmp_path / "maps.safetensors")
    loaded = load(tmp_path / "maps.safetensors")[""]
    assert torch.equal(loaded.dense(), expected)
    assert (loaded.kind, loaded.is_dense) == ("self", attend is openly)


@pytest.mark.parametrize("attend", [fused, openly])
@pytest.mark.parametrize("name", ["heads_and_queries_written", "slices of 3"])
def test_the_gradient(attend, name):
    model, x = Module(JOINED[name], attend), inputs()
    with attention(model, gradients=True) as maps:
        model(x).square().sum().backward()
    q, k, v = model.parts(x)
    weights = (q @ k.mT / 2).softmax(-1)
    weights.retain_grad()
    model.proj(features(weights @ v)).square().sum().backward()
    assert (maps[""].grad_dense() - weights.grad).abs().max() < 1e-6
    assert (maps[""].grad_rows([5, 1]) - weights.grad[:, :, [5, 1]]).abs().max() < 1e-6
    assert torch.equal(pickle.loads(pickle.dumps(maps[""])).grad_dense(), maps[""].grad_dense())
    assert torch.equal(maps[""].to("cpu").grad_dense(), maps[""].grad_dense())


def test_a_gradient_that_is_not_known_yet():
    model = Module(heads_stacked)
    with attention(model, gradients=True) as maps:
        model(inputs())
    with pytest.raises(RuntimeError, match="no backward pass has come"):
        maps[""].grad_dense()


def test_efficientvit(monkeypatch):
    """A call a head, and windows in the first stage."""
    model, x = timm_model("efficientvit_m0"), images(224)
    softmaxes = []

    def softmax(scores, dim):
        softmaxes.append(torch.softmax(scores, dim))
        return softmaxes[-1]

    with torch.no_grad():
        with attention(model) as maps:
            model(x)
        monkeypatch.setattr(torch.Tensor, "softmax", softmax)
        model(x)
    assert len(maps) == len(maps.paths) == 6
    assert [one.kind for one in maps] == ["window"] + ["self"] * 5
    for number, one in enumerate(maps):
        assert torch.equal(one.dense(), torch.stack(softmaxes[4 * number : 4 * number + 4], 1))

"""Which axes are heads: told by what each model does with the output, whatever its axes and however it is called."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import attention
from visualizer.intercept.axes import Order, Output, einsum_labels

B, H, N, D = 2, 4, 5, 3


class Layer(nn.Module):
    """Attention of B images, N tokens, H heads of width D; how it is written is what the subclasses differ in."""

    def __init__(self):
        super().__init__()
        self.num_heads = H
        self.qkv, self.proj = nn.Linear(8, 3 * H * D), nn.Linear(H * D, 8)

    def forward(self, hidden_states):
        return self.proj(self.attend(hidden_states))

    def factors(self, x):
        """Query, key and value, (B, H, N, D); the expected map is kept."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
        self.weights = (q @ k.mT / D**0.5).softmax(-1)
        return q, k, v


class FourAxes(Layer):
    def attend(self, x):
        q, k, v = self.factors(x)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class BatchTimesHeads(Layer):
    """As TrOCR: three axes."""

    def attend(self, x):
        q, k, v = (tensor.flatten(0, 1) for tensor in self.factors(x))
        out = torch.bmm((q @ k.mT / D**0.5).softmax(-1), v)
        return out.view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)


class HeadsTimesBatch(Layer):
    def attend(self, x):
        q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in self.factors(x))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.view(H, B, N, D).permute(1, 2, 0, 3).reshape(B, N, H * D)


class TokensFirst(Layer):
    """As Mask2Former: (tokens, batch, width) outside, (batch x heads, tokens, width) inside."""

    def attend(self, x):
        q, k, v = (tensor.flatten(0, 1) for tensor in self.factors(x))
        out = torch.bmm((q @ k.mT / D**0.5).softmax(-1), v)
        return out.transpose(0, 1).contiguous().view(N, B, H * D).transpose(0, 1)


class QueriesBeforeHeads(Layer):
    """As Longformer: the weights are (batch, queries, heads, keys)."""

    def attend(self, x):
        q, k, v = (tensor.transpose(1, 2) for tensor in self.factors(x))
        weights = torch.einsum("bqhd,bkhd->bqhk", q, k).div(D**0.5).softmax(-1)
        return torch.einsum("bqhk,bkhd->bqhd", weights, v).flatten(2)


class EinsumOnly(Layer):
    """The output projection sums over heads and width."""

    def forward(self, hidden_states):
        q, k, v = self.factors(hidden_states)
        weights = torch.einsum("...qd,...kd->...qk", q, k).div(D**0.5).softmax(-1)
        out = torch.einsum("bhqk, bhkd -> bhqd", weights, v)
        return torch.einsum("bhqd,ohd->bqo", out, self.proj.weight.view(8, H, D))


class ChannelsFirst(Layer):
    """The features become channels, for a convolution."""

    def forward(self, hidden_states):
        q, k, v = (tensor.flatten(0, 1) for tensor in self.factors(hidden_states))
        out = ((q @ k.mT / D**0.5).softmax(-1) @ v).mT.reshape(B, H * D, N, 1)
        return F.conv2d(out, self.proj.weight[..., None, None])


class Turned(Layer):
    """The values come first: (width, keys) times (keys, queries)."""

    def attend(self, x):
        q, k, v = self.factors(x)
        return (v.mT @ (q @ k.mT / D**0.5).softmax(-1).mT).permute(0, 3, 1, 2).reshape(B, N, H * D)


class KeysBeforeHeads(Layer):
    """The softmax is not over the last axis: the weights are (batch, queries, keys, heads)."""

    def attend(self, x):
        q, k, v = (tensor.transpose(1, 2) for tensor in self.factors(x))
        weights = torch.einsum("bqhd,bkhd->bqkh", q, k).div(D**0.5).softmax(2)
        return torch.einsum("bqkh,bkhd->bqhd", weights, v).flatten(2)


class KeysBeforeQueries(Layer):
    def attend(self, x):
        q, k, v = self.factors(x)
        return (v.mT @ (k @ q.mT / D**0.5).softmax(-2)).permute(0, 3, 1, 2).reshape(B, N, H * D)


class HeadsInBlocks(Layer):
    """As in Set Transformer: the features are split, and the parts are joined as more images; then the way back."""

    def attend(self, x):
        q, k, v = (torch.cat(tensor.transpose(1, 2).flatten(2).split(D, 2)) for tensor in self.factors(x))
        out = torch.bmm((q @ k.mT / D**0.5).softmax(2), v)
        return torch.cat(out.split(B), 2)


class HeadsSideBySide(Layer):
    def attend(self, x):
        return torch.cat(F.scaled_dot_product_attention(*self.factors(x)).unbind(1), -1)


class HeadsOneByOne(Layer):
    def attend(self, x):
        out = F.scaled_dot_product_attention(*self.factors(x))
        return torch.stack([out[:, head] for head in range(H)], 2).flatten(2)


WAYS = Layer.__subclasses__()


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("is_named", [True, False], ids=["by keyword", "by position"])
def test_heads_are_found(kind, is_named):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(B, N, 8)
    before = model(x)
    with attention(model, gradients=True) as maps:
        after = model(hidden_states=x) if is_named else model(x)
    assert torch.equal(before, after)
    assert maps[0].shape == (B, H, N, N)
    assert (maps[0].dense() - model.weights).abs().max() < 1e-6
    assert not maps[0].axes_assumed
    after.square().sum().backward()
    y = after if after.ndim == 3 else after[..., 0].mT
    grad_of_output = (2 * y @ model.proj.weight).view(B, N, H, D).transpose(1, 2)
    expected = grad_of_output @ model.factors(x)[2].mT
    assert (maps[0].grad_dense() - expected).abs().max() < 1e-5


# Their own code cannot run on that: a convolution over no tokens, blocks of a batch of none.
CANNOT = {(ChannelsFirst, 2, 0), (ChannelsFirst, 0, 0), (HeadsInBlocks, 0, 4), (HeadsInBlocks, 0, 0)}
OF_NOTHING = [(kind, *sizes) for kind in WAYS for sizes in ((2, 0), (0, 4), (0, 0)) if (kind, *sizes) not in CANNOT]


@pytest.mark.parametrize(("kind", "images", "tokens"), OF_NOTHING)
def test_heads_of_nothing_are_found(kind, images, tokens, monkeypatch):
    for name, size in (("B", images), ("N", tokens)):
        monkeypatch.setitem(globals(), name, size)
    model = kind()
    with attention(model) as maps:
        model(torch.randn(images, tokens, 8))
    assert maps[0].shape == (images, H, tokens, tokens)
    assert not maps[0].axes_assumed


class HeadsFolded(Layer):
    def attend(self, x):
        q, k, v = (tensor.flatten(0, 1) for tensor in self.factors(x))
        return F.scaled_dot_product_attention(q, k, v).view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)


@pytest.mark.parametrize(("images", "tokens"), [(0, 4), (2, 0), (0, 0), (2, 4)])
def test_heads_that_share_an_axis_with_nothing(images, tokens, monkeypatch):
    test_heads_of_nothing_are_found(HeadsFolded, images, tokens, monkeypatch)


class Windows(Layer):
    """As Hiera and Nest: windows are an axis of their own, before the heads or behind them."""

    def __init__(self, order):
        super().__init__()
        self.order = order

    def attend(self, x):
        q, k, v = self.qkv(x).view(B, 3, N, 3, H, D).permute(3, *self.order, 2, 5)
        q, k, v = q[..., :4, :], k, v  # fewer queries than keys
        self.weights = (q @ k.mT / D**0.5).softmax(-1)
        out = F.scaled_dot_product_attention(q, k, v)
        back = [1 + self.order.index(0) - 1, self.order.index(1), 3, self.order.index(4), 4]
        return out.permute(back).reshape(B, 3 * 4, H * D)


@pytest.mark.parametrize(
    "order", [(0, 1, 4), (0, 4, 1), (4, 0, 1)], ids=["windows, heads", "heads, windows", "heads first"]
)
def test_windows_are_batch(order):
    torch.manual_seed(0)
    model, x = Windows(order), torch.randn(B, 3 * N, 8)
    with attention(model) as maps:
        model(x)
    expected = model.weights.permute(order.index(0), order.index(1), order.index(4), 3, 4).reshape(B * 3, H, 4, N)
    assert maps[0].shape == expected.shape
    assert (maps[0].dense() - expected).abs().max() < 1e-6
    assert not maps[0].axes_assumed


class Experts(Layer):
    """As JetMoE: each token asks two experts, whose queries are heads, and whose outputs go their own ways."""

    def attend(self, x):
        q, k, v = self.factors(x)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        rows = out.reshape(B, N, 2, H // 2 * D).flatten(0, 2)
        each = torch.stack([F.linear(rows[expert::2], self.proj.weight[:, : H // 2 * D]) for expert in range(2)], 1)
        return F.pad(each.sum(1).view(B, N, 8), (0, H * D - 8))


def test_experts_are_heads():
    model = Experts()
    with attention(model) as maps:
        model(torch.randn(B, N, 8))
    assert torch.allclose(maps[0].dense(), model.weights, atol=1e-6)
    assert not maps[0].axes_assumed


def test_attention_over_channels():
    """As XCiT: the features are the queries, and heads join them there."""

    class Channels(Layer):
        def attend(self, x):
            q, k, v = (tensor.mT for tensor in self.factors(x))
            self.weights = (q @ k.mT).softmax(-1)
            return (self.weights @ v).permute(0, 3, 1, 2).reshape(B, N, H * D)

    model = Channels()
    with attention(model) as maps:
        model(torch.randn(B, N, 8))
    assert torch.equal(maps[0].dense(), model.weights)
    assert not maps[0].axes_assumed


class SharedByRows(Layer):
    """As ESM's MSA Transformer: the rows of an alignment share a map, and heads come before the batch."""

    def attend(self, x):
        q, k, v = self.factors(x.flatten(0, 1))
        q, k, v = (tensor.unflatten(0, (3, B)).permute(2, 0, 1, 3, 4) for tensor in (q, k, v))  # (H, rows, B, N, D)
        scores = torch.einsum("hrbid,hrbjd->hbij", q, k)
        weights = scores.softmax(-1)
        self.weights = weights.transpose(0, 1)
        return torch.einsum("hbij,hrbjd->rbihd", weights, v).reshape(3, B, N, H * D)


def test_rows_that_share_a_map():
    model = SharedByRows()
    with attention(model) as maps:
        model(torch.randn(3, B, N, 8))
    assert torch.equal(maps[0].dense(), model.weights)
    assert not maps[0].axes_assumed


class MixedWindows(Layer):
    """As SepViT: a second attention mixes the windows, by `mix`, (batch, heads, windows, windows)."""

    def __init__(self, product):
        super().__init__()
        self.product = product

    def attend(self, x):
        _, _, v = self.factors(x.flatten(0, 1))
        out = (self.weights @ v).unflatten(0, (B, 3)).transpose(1, 2)  # (B, H, windows, N, D)
        pooled = out.mean(-2)
        self.mix = (pooled @ pooled.mT).softmax(-1)
        return self.product(self.mix, out).permute(0, 2, 3, 1, 4).reshape(B, 3, N, H * D)


@pytest.mark.parametrize(
    "product",
    [
        lambda mix, out: torch.einsum("bhij,bhjwd->bhiwd", mix, out),
        lambda mix, out: (mix @ out.flatten(3)).unflatten(-1, (N, D)),
    ],
    ids=["einsum", "matmul"],
)
def test_windows_that_a_second_attention_mixes(product):
    model = MixedWindows(product)
    with attention(model) as maps:
        model(torch.randn(B, 3, N, 8))
    assert torch.equal(maps[0].dense(), model.weights)
    assert torch.equal(maps[1].dense(), model.mix)
    assert not maps[0].axes_assumed
    assert not maps[1].axes_assumed


def test_queries_that_a_second_attention_mixes():
    """As agent attention: what few agents have gathered are the values of all tokens."""

    class Agents(Layer):
        def attend(self, x):
            q, k, v = (tensor.transpose(0, 1) for tensor in self.factors(x))  # (H, B, N, D)
            agents = q[:, :, :2]
            gathered = (agents @ k.mT).softmax(-1) @ v
            return ((q @ agents.mT).softmax(-1) @ gathered).permute(1, 2, 0, 3).reshape(B, N, H * D)

    model = Agents()
    with attention(model) as maps:
        model(torch.randn(B, N, 8))
    assert [found.shape for found in maps] == [(B, H, 2, N), (B, H, N, 2)]
    assert not any(found.axes_assumed for found in maps)


@pytest.mark.parametrize("images", [1, B])
@pytest.mark.parametrize("is_fused", [False, True])
def test_heads_among_the_queries_are_said_to_be_unknown(is_fused, images):
    """All heads share their keys, so that each query stands there once a head: nothing tells heads from queries."""

    class OneKey(Layer):
        def attend(self, x):
            q, k, v = self.factors(x)
            q, k, v = q.transpose(1, 2).flatten(1, 2), k[:, 0], v[:, 0]
            self.weights = (q @ k.mT / D**0.5).softmax(-1)
            out = F.scaled_dot_product_attention(q, k, v) if is_fused else self.weights @ v
            return out.reshape(len(x), N, H * D)

    model = OneKey()
    with torch.no_grad(), attention(model) as maps:
        for _ in range(3):  # the third by a plan
            model(torch.randn(images, N, 8))
    torch.testing.assert_close(maps[2].dense()[:, 0], model.weights)
    assert all(found.axes_assumed for found in maps)


def test_one_head():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(F.scaled_dot_product_attention(x, x, x))

    model = Single()
    with attention(model) as maps:
        model(torch.randn(6, 5, 8))
    assert maps[0].shape == (6, 1, 5, 5)
    assert not maps[0].axes_assumed


def test_one_head_before_a_convolution():
    """As in non-local blocks: (batch, channels, places)."""

    class NonLocal(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Conv1d(8, 8, 1)

        def forward(self, x):
            return self.out(x @ (x.mT @ x).softmax(-1).mT)

    model = NonLocal()
    with attention(model) as maps:
        model(torch.randn(6, 8, 5))
    assert maps[0].shape == (6, 1, 5, 5)
    assert not maps[0].axes_assumed


def test_frames_that_a_convolution_goes_over_are_no_heads():
    """As in VidTok: (batch, frames, places, channels)."""

    class Film(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Conv3d(8, 8, 1)

        def forward(self, x):
            y = x.flatten(3).permute(0, 2, 3, 1)
            return self.out(F.scaled_dot_product_attention(y, y, y).permute(0, 3, 1, 2).view(x.shape))

    model = Film()
    with attention(model) as maps:
        model(torch.randn(2, 8, 3, 2, 2))
    assert maps[0].shape == (6, 1, 4, 4)
    assert not maps[0].axes_assumed


def test_one_head_and_windows():
    """As in the first blocks of Hiera: (batch, 1 head, windows, tokens, width)."""

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            q = x.view(2, 3, 5, 1, 8).permute(0, 3, 1, 2, 4)
            return self.proj(F.scaled_dot_product_attention(q, q, q).transpose(1, 3).reshape(2, 15, 8))

    model = Single()
    with attention(model) as maps:
        model(torch.randn(2, 15, 8))
    assert maps[0].shape == (6, 1, 5, 5)
    assert not maps[0].axes_assumed


def windows_in_a_row(x):
    return x.unflatten(1, (4, 4)), lambda y: y.flatten(1, 2)


def windows_of_a_picture(x):
    parts = x.view(-1, 2, 2, 2, 2, 8).transpose(2, 3)
    return parts.reshape(-1, 4, 4, 8), lambda y: y.view(parts.shape).transpose(2, 3).reshape(x.shape)


def windows_left_as_a_picture(x):
    parts = x.view(-1, 2, 2, 2, 2, 8).transpose(2, 3)
    return parts.reshape(-1, 4, 4, 8), lambda y: y.view(parts.shape).transpose(2, 3).reshape(-1, 4, 4, 8)


def a_grid(x):
    """Of tokens that are far from each other."""
    return x.unflatten(1, (4, 4)).transpose(1, 2), lambda y: y.transpose(1, 2).flatten(1, 2)


def windows_of_two_axes(x):
    return x.unflatten(1, (2, 2, 4)), lambda y: y.flatten(1, 3)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize(
    "split", [windows_in_a_row, windows_of_a_picture, windows_left_as_a_picture, a_grid, windows_of_two_axes]
)
def test_windows_without_heads(split, is_fused):
    """Tokens are split, and put together behind the attention: what they were split into are no heads."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            (q, put_together), (k, _), (v, _) = (split(one) for one in self.qkv(x).chunk(3, -1))
            self.weights = (q @ k.mT / 8**0.5).softmax(-1)
            return self.proj(put_together(F.scaled_dot_product_attention(q, k, v) if is_fused else self.weights @ v))

    model = Windows()
    with attention(model) as maps:
        model(torch.randn(3, 16, 8))
    [found] = maps
    assert (found.shape, found.kind, found.axes_assumed) == ((12, 1, 4, 4), "window", False)
    torch.testing.assert_close(found.dense()[:, 0], model.weights.flatten(0, -3))


def flattened(layer):
    return lambda x: layer(x.reshape(-1, D)).view(x.shape)


LAYERS_OF_ALL_HEADS = {
    "on four axes": lambda layer: layer,
    "on all of it in a row": flattened,
    "on heads and tokens in a row": lambda layer: lambda x: layer(x.flatten(1, 2)).view(x.shape),
}


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS_OF_ALL_HEADS)
def test_heads_that_share_a_layer_are_no_windows(name, images):
    """Such a layer tells nothing of heads, however it puts them together with the tokens."""

    class Shares(Layer):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(D, D)

        def factors(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
            self.weights = (q @ k.mT / D**0.5).softmax(-1)
            return q, k, v

        def attend(self, x):
            out = LAYERS_OF_ALL_HEADS[name](self.shared)(F.scaled_dot_product_attention(*self.factors(x)).contiguous())
            return out.transpose(1, 2).flatten(2)

    model = Shares()
    with attention(model) as maps:
        model(torch.randn(images, N, 8))
    [found] = maps
    assert (found.shape, found.kind, found.axes_assumed) == ((images, H, N, N), "self", True)
    torch.testing.assert_close(found.dense(), model.weights)


@pytest.mark.parametrize("padding", [0, 3])
def test_windows_in_a_module_that_is_handed_them(padding):
    """The module around has the tokens; windows of padded ones are some more."""

    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.core = nn.Linear(8, 24), nn.Linear(8, 8), Core()

        def forward(self, x):
            q, k, v = (F.pad(one, (0, 0, 0, padding)).unflatten(1, (-1, 4)) for one in self.qkv(x).chunk(3, -1))
            return self.proj(self.core(q, k, v).flatten(1, 2)[:, : x.shape[1]])

    model = Around()
    with attention(model) as maps:
        model(torch.randn(3, 16 - padding, 8))
    assert (maps[0].shape, maps[0].axes_assumed) == ((12, 1, 4, 4), False)


def test_heads_that_are_put_behind_the_tokens_by_mistake():
    """As where a transpose is missing: features are made of tokens, and nothing is known of what they were."""

    class Mixes(Layer):
        def attend(self, x):
            q, k, v = self.factors(x)
            return F.scaled_dot_product_attention(q, k, v).reshape(B, N, H * D)

    model = Mixes()
    with attention(model) as maps:
        model(torch.randn(B, N, 8))
    assert maps[0].shape == (B, H, N, N)
    assert maps[0].axes_assumed
    torch.testing.assert_close(maps[0].dense(), model.weights)


@pytest.mark.parametrize("taken", [lambda y: y[:, 0], lambda y: y.squeeze(1), lambda y: y.select(1, 0)])
def test_an_axis_for_one_head(taken):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            return self.proj(taken(F.scaled_dot_product_attention(*self.qkv(x)[:, None].chunk(3, -1))))

    model = Single()
    with attention(model) as maps:
        model(torch.randn(B, N, 8))
    assert maps[0].shape == (B, 1, N, N)
    assert not maps[0].axes_assumed


def test_the_output_of_a_module_is_joined_by_the_one_around_it():
    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class Around(Layer):
        def __init__(self):
            super().__init__()
            self.core = Core()

        def attend(self, x):
            q, k, v = (tensor.transpose(0, 1) for tensor in self.factors(x))  # (heads, batch, ...)
            return self.core(q, k, v).permute(1, 2, 0, 3).reshape(B, N, H * D)

    model = Around()
    with attention(model) as maps:
        model(torch.randn(B, N, 8))
    assert maps.paths == ("core",)
    assert (maps[0].dense() - model.weights).abs().max() < 1e-6


def test_what_cannot_be_known_is_said():
    class Bare(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    model = Bare()
    with attention(model) as maps:
        model(torch.randn(2, 4, 5, 3))
    assert maps[0].shape == (2, 4, 5, 5)
    assert maps[0].axes_assumed
    assert "axes assumed" in repr(maps[0])


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ((1, 4, 3, 8), (5, 4, 6, 8)),
        ((5, 4, 3, 8), (1, 4, 6, 8)),
        ((5, 1, 3, 8), (5, 4, 6, 8)),
        ((5, 4, 3, 8), (1, 1, 6, 8)),
    ],
    ids=["one query", "one key", "one query head", "one key for all"],
)
def test_query_and_key_are_broadcast(query, key):
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(32, 8)

        def forward(self, q, k):
            return self.proj(F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2))

    model, q, k = Latents(), torch.randn(query), torch.randn(key)
    with attention(model) as maps:
        model(q, k)
    assert maps[0].shape == (5, 4, 3, 6)
    assert (maps[0].dense() - (q @ k.mT / 8**0.5).softmax(-1)).abs().max() < 1e-6


class TestOutput:
    def test_factors_are_told_apart(self):
        """8 = 2 images x 4 heads, of which the heads join the width."""
        tensor = torch.zeros(8, 5, 3)
        output, layout = Output(tensor.shape), None
        layout = output.layout
        for func, args in (
            (torch.Tensor.transpose, (0, 1)),
            (torch.Tensor.contiguous, ()),
            (torch.Tensor.view, (10, 12)),
        ):
            result = func(tensor, *args)
            layout, tensor = output.follow(func, (tensor, *args), {}, tensor, layout, result), result
        weight = torch.zeros(7, 12)
        assert output.follow(F.linear, (tensor, weight), {}, tensor, layout, F.linear(tensor, weight)) is None
        assert output.order == Order((2, 4), (False, True))

    def test_nothing_is_known_of_a_shape_that_does_not_fit(self):
        tensor = torch.zeros(6, 5, 3)
        output = Output(tensor.shape)
        result = tensor.reshape(10, 9)
        assert output.follow(torch.reshape, (tensor, (10, 9)), {}, tensor, output.layout, result) is None
        assert output.order is None


def test_arranged_takes_the_axes_where_they_are():
    tensor = torch.arange(2 * 3 * 4).view(2, 3, 4, 1, 1)
    assert Order((2, 3, 4), (False, True, False)).arranged(tensor)[5, 2].item() == tensor[1, 2, 1].item()
    assert Order((), ()).arranged(torch.zeros(5, 5)).shape == (1, 1, 5, 5)


@pytest.mark.parametrize(
    ("equation", "axes", "expected"),
    [
        ("bhqk,bhkd->bhqd", (4, 4), (["bhqk", "bhkd"], "bhqd")),
        ("...ij, ...jd -> ...id", (4, 3), (["01ij", "1jd"], "01id")),
        ("ij,jk", (2, 2), (["ij", "jk"], "ik")),
    ],
)
def test_einsum_labels(equation, axes, expected):
    assert einsum_labels(equation, axes) == expected

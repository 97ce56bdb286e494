"""The kind of an attention: told by where its queries and keys come from, not by names or by their numbers."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import attention, load

B, N, M, H, D = 2, 6, 4, 2, 4


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


class Attends(nn.Module):
    """Attention whose queries, keys and values the subclasses make."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.latents = nn.LayerNorm(8), nn.Parameter(torch.randn(1, 3, 8))

    def attend(self, q, k, v):
        return self.proj(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2))


class Own(Attends):
    def forward(self, hidden_states, encoder_hidden_states=None):
        x = hidden_states
        return self.attend(self.q(x), self.k(x), self.v(x))


class Open(Attends):
    def forward(self, x, memory):
        scores = heads(self.q(x)) @ heads(self.k(memory)).mT + torch.zeros(N, memory.shape[1])
        return self.proj((scores.softmax(-1) @ heads(self.v(memory))).transpose(1, 2).flatten(2))


class Positions(Attends):
    def forward(self, x, positions):
        return self.attend(self.q(x + positions), self.k(x), self.v(x))


class Rotary(Attends):
    def forward(self, x, cos, sin):
        def turned(y):
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat([-second, first], -1) * sin

        return self.attend(turned(self.q(x)), turned(self.k(x)), self.v(x))


class OneKeyHead(Attends):
    """All heads share a key, which is then as large as the cosines, and is joined to an empty cache."""

    def forward(self, x, cos):
        key = torch.cat([torch.empty(0), heads(self.k(x))[:, :1] * cos], -2)
        mixed = F.scaled_dot_product_attention(heads(self.q(x)) * cos, key, heads(self.v(x))[:, :1], enable_gqa=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class OneKeyHeadOfBoth(Attends):
    """And the keys are those of another input too, with the same positions."""

    def forward(self, x, memory, cos):
        key = torch.cat([heads(self.k(one))[:, :1] * cos for one in (memory, x)], -2)
        mixed = F.scaled_dot_product_attention(heads(self.q(x))[:, :1] * cos, key, torch.ones_like(key))
        return self.proj(mixed.expand(-1, H, -1, -1).transpose(1, 2).flatten(2))


class Other(Attends):
    def forward(self, x, memory):
        return self.attend(self.q(x), self.k(memory), self.v(memory))


class Learned(Attends):
    """As attention pooling."""

    def forward(self, x):
        return self.attend(self.q(self.latents.expand(B, -1, -1)), self.k(x), self.v(x))


class Resampler(Attends):
    """As Flamingo's: the keys are those of both, the queries of one."""

    def forward(self, latents, media):
        both = torch.cat([media, latents], 1)
        return self.attend(self.q(latents), self.k(both), self.v(both))


class Pooled(Attends):
    """As PVT: fewer keys, of the same picture."""

    def forward(self, x):
        few = F.avg_pool1d(self.norm(x).mT, 2).mT
        return self.attend(self.q(x), self.k(few), self.v(few))


class Summary(Attends):
    """The queries know of the memory, but are not made of its tokens."""

    def forward(self, x, memory):
        return self.attend(self.q(x + memory.mean(1, keepdim=True)), self.k(memory), self.v(memory))


class Together(Attends):
    """Query and key are turned as one tensor, and taken apart again."""

    def __init__(self, together, apart):
        super().__init__()
        self.together, self.apart = together, apart

    def forward(self, x, memory):
        both = self.together([self.q(x), self.k(memory)])
        q, k = self.apart(both * torch.rand(1) + -both)
        return self.attend(q, k, self.v(memory))


TOGETHER = {
    "stack": (torch.stack, lambda both: both.unbind(0)),
    "stack, by index": (lambda pair: torch.stack(pair, 2), lambda both: (both[:, :, 0], both[:, :, -1])),
    "cat": (torch.cat, lambda both: both.chunk(2)),
    "cat of tokens": (lambda pair: torch.cat(pair, dim=1), lambda both: both.split([N, both.shape[1] - N], 1)),
    "cat of features": (lambda pair: torch.cat(pair, -1), lambda both: (both[..., :8], both[..., 8:])),
}


class Additive(Attends):
    def forward(self, x, memory):
        pairs = torch.tanh(self.q(x)[:, :, None] + self.k(memory)[:, None])
        return self.proj(pairs.sum(-1).softmax(-1) @ self.v(memory))


def mixed_scores(q, k):
    """Talking heads; the matrix that mixes them is no parameter itself."""
    return torch.einsum("bhqk,hg->bgqk", q @ k.mT, torch.eye(4)[:H, :H])


def plain_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.matmul(q, k.mT) / 2.0


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted_scores = torch.jit.script(plain_scores)


def cosines(q, k):
    return F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)


class Scored(Attends):
    """Attention whose scores a function makes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, memory):
        weights = self.function(heads(self.q(x)), heads(self.k(memory))).softmax(-1)
        return self.proj((weights @ heads(self.v(memory))).transpose(1, 2).flatten(2))


SCORED = [partial(Scored, function) for function in (mixed_scores, scripted_scores, cosines)]


class Lookup(Attends):
    """As LookViT: scores are made in one module, and used in another too."""

    class Used(nn.Module):
        def forward(self, scores, values):
            return scores.mT.softmax(-1) @ values

    class Made(Attends):
        def forward(self, x, memory):
            return self.q(x) @ self.k(memory).mT

    def __init__(self):
        super().__init__()
        self.made, self.used = self.Made(), self.Used()

    def forward(self, x, memory):
        return self.used(self.made(self.norm(x), self.norm(memory)), x)


class Past(Attends):
    """Keys of earlier steps are an argument."""

    def forward(self, x, past):
        return self.attend(self.q(x), torch.cat([past, self.k(x)], 1), torch.cat([past, self.v(x)], 1))


class StaticPast(Attends):
    """Keys are written into a buffer."""

    def forward(self, x):
        keys, values = torch.zeros(B, 9, 8), torch.zeros(B, 9, 8)
        keys[:, 2:8] = self.k(x)
        values.index_copy_(1, torch.arange(2, 8), self.v(x))
        return self.attend(self.q(x), keys, values)


class TwoNorms(Attends):
    """The same tokens, handed to the attention as two tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, H, batch_first=True)

    def forward(self, x):
        return self.inner(self.norm(x), x * 2, x)[0]


class Encoded(TwoNorms):
    """Two tensors, of which one was made by mixing tokens."""

    def forward(self, x):
        return self.inner(x, self.k(self.norm(x).mean(1, keepdim=True) + x), x)[0]


X, MEMORY = torch.randn(B, N, 8), torch.randn(B, M, 8)
KINDS = {
    "self": [
        (Own, (X,)),
        (Own, (X, MEMORY)),
        (Positions, (X, torch.randn(B, N, 8))),
        (Rotary, (X, torch.randn(N, 8), torch.randn(N, 8))),
        (OneKeyHead, (X[:1], torch.randn(1, 1, N, D))),
        (Pooled, (X,)),
        (Open, (X, X)),
        (Past, (X, MEMORY)),
        (StaticPast, (X,)),
        (TwoNorms, (X,)),
        (Additive, (X, X)),
        (Lookup, (X, X)),
        *((scored, (X, X)) for scored in SCORED),
        *((partial(Together, *how), (X, X)) for how in TOGETHER.values()),
    ],
    "cross": [
        (Other, (X, MEMORY)),
        (Other, (X, torch.randn(B, N, 8))),  # as many keys as queries
        (Open, (X, MEMORY)),
        (OneKeyHeadOfBoth, (X[:1], torch.randn(1, N, 8), torch.randn(1, 1, N, D))),
        (Learned, (X,)),
        (Resampler, (X, MEMORY)),
        (Summary, (X, MEMORY)),
        (Encoded, (X,)),
        (Additive, (X, MEMORY)),
        (Lookup, (X, MEMORY)),
        *((scored, (X, MEMORY[:, :3])) for scored in SCORED),
        *((partial(Together, *how), (X, torch.randn(B, N, 8))) for how in TOGETHER.values()),
    ],
}


@pytest.mark.parametrize(("kind", "cls", "inputs"), [(kind, *case) for kind, cases in KINDS.items() for case in cases])
def test_kinds(kind, cls, inputs):
    model = cls()
    with attention(model) as maps:
        model(*inputs)
    assert maps[0].kind == kind
    assert maps[0].joined == {}


class Joint(Attends):
    """As in SD3: text and picture have projections of their own, and are joined."""

    def __init__(self, text_first=False):
        super().__init__()
        self.text_first, self.text = text_first, nn.Linear(8, 24)

    def forward(self, hidden_states, encoder_hidden_states):
        x = [torch.cat([self.q(hidden_states), self.k(hidden_states), self.v(hidden_states)], -1)]
        x.insert(0 if self.text_first else 1, self.text(encoder_hidden_states))
        q, k, v = (torch.cat([heads(one.chunk(3, -1)[part]) for one in x], 2) for part in range(3))
        scale = torch.rand(N + M, D)
        q, k = (one * scale + torch.cat(one.chunk(2, -1)[::-1], -1) for one in (q, k))  # as rotary positions
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Around(nn.Module):
    """As FLUX's single blocks: the module around joins both."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), Own()

    def forward(self, hidden_states, encoder_hidden_states):
        both = torch.cat([encoder_hidden_states, hidden_states], 1)
        return both + self.inner(hidden_states=self.norm(both))


PICTURE_FIRST = {"hidden_states": slice(0, N), "encoder_hidden_states": slice(N, N + M)}
TEXT_FIRST = {"encoder_hidden_states": slice(0, M), "hidden_states": slice(M, N + M)}


@pytest.mark.parametrize(
    ("model", "joined"),
    [(Joint(), PICTURE_FIRST), (Joint(text_first=True), TEXT_FIRST), (Around(), TEXT_FIRST)],
    ids=["in the attention", "text first", "around the attention"],
)
@pytest.mark.parametrize("is_named", [True, False], ids=["by keyword", "by position"])
def test_joint(model, joined, is_named, tmp_path):
    with attention(model) as maps:
        model(hidden_states=X, encoder_hidden_states=MEMORY) if is_named else model(X, MEMORY)
    assert (maps[0].kind, maps[0].joined) == ("joint", joined)
    maps.save(tmp_path / "maps.safetensors")
    assert load(tmp_path / "maps.safetensors")[0].joined == joined


def test_tokens_that_get_something_of_another_input_are_not_joint():
    """As TNT's outer block: the pixels are added to the patches, but not to the class token."""

    class Outer(Attends):
        def forward(self, patches, pixels):
            x = torch.cat([patches[:, :1], patches[:, 1:] + pixels], 1)
            return self.attend(self.q(x), self.k(x), self.v(x))

    model = Outer()
    with attention(model) as maps:
        model(X, torch.randn(B, N - 1, 8))
    assert maps[0].kind == "self"


def test_a_core_asks_the_module_around_it():
    class Core(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    class Layer(Attends):
        def __init__(self):
            super().__init__()
            self.core = Core()

        def attend(self, q, k, v):
            return self.proj(self.core(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2))

    class Two(Layer):
        def forward(self, x, memory):
            return self.attend(self.q(x), self.k(x), self.v(x)), self.attend(self.q(x), self.k(memory), self.v(memory))

    model = Two()
    with attention(model) as maps:
        model(X, MEMORY)
    assert [one.kind for one in maps] == ["self", "cross"]


def test_products_in_modules_of_their_own_ask_the_module_around_them():
    class Product(nn.Module):
        def forward(self, one, other):
            return one @ other

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = Product()

        def forward(self, scores, values):
            return self.product(scores.softmax(-1), values)

    class Steps(Attends):
        def __init__(self, last):
            super().__init__()
            self.scores, self.last, self.softmax = Product(), last, nn.Softmax(-1)

        def attend(self, q, k, v):
            scores = self.scores(heads(q), heads(k).mT) / D**0.5
            made = self.last(self.softmax(scores) if isinstance(self.last, Product) else scores, heads(v))
            return self.proj(made.transpose(1, 2).flatten(2))

        def forward(self, x, memory):
            return self.attend(self.q(x), self.k(x), self.v(x)), self.attend(self.q(x), self.k(memory), self.v(memory))

    for last in (Product(), Weighted()):
        with attention(model := Steps(last)) as maps:
            model(X, MEMORY)
        assert [one.kind for one in maps] == ["self", "cross"]


def test_functions_that_are_not_seen():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    class Layer(Attends):
        def forward(self, x, *more):
            return self.attend(Scaled.apply(self.q(x)), Scaled.apply(self.k(x)), self.v(x))

    model = Layer()
    with torch.no_grad(), attention(model) as maps:
        model(X)
        model(X, MEMORY)
    assert [one.kind for one in maps] in (["self", None], ["self", "self"])


class TestWindows:
    class Block(nn.Module):
        """Cuts (batch, tokens, width) into windows of some tokens, as Swin's blocks do; padding makes them whole."""

        def __init__(self, window):
            super().__init__()
            self.window, self.attn = window, Own()
            self.attn.window_size = (window, 1)

        def forward(self, x):
            padded = F.pad(x, (0, 0, 0, -x.shape[1] % self.window))
            windows = padded.unflatten(1, (-1, self.window)).flatten(0, 1)
            return self.attn(windows).unflatten(0, (len(x), -1)).flatten(1, 2)[:, : x.shape[1]]

    @pytest.mark.parametrize(("window", "kind"), [(3, "window"), (4, "window"), (6, "self")])
    def test_windows_are_only_where_a_picture_is_cut(self, window, kind):
        """One window of the whole picture is none, whatever the module's `window_size` says."""
        model = self.Block(window)
        with attention(model) as maps:
            model(X)
        assert maps[0].kind == kind
        assert maps[0].shape == (B * -(-N // window), H, window, window)

    def test_frames_of_a_video_are_no_windows(self):
        class Video(nn.Module):
            def __init__(self):
                super().__init__()
                self.patches, self.attn = nn.Conv2d(3, 8, 4, 4), Own()

            def forward(self, frames):
                return self.attn(self.patches(frames.flatten(0, 1)).flatten(2).mT)

        model = Video()
        with attention(model) as maps:
            model(torch.randn(B, 3, 3, 16, 16))
        assert (maps[0].kind, maps[0].shape[0]) == ("self", B * 3)


def clamped(scores: torch.Tensor) -> torch.Tensor:
    return (scores / 5).tanh() * 5


@pytest.mark.parametrize("change", ["distances", "scripted"])
def test_scores_that_no_product_of_torch_is_the_last_step_of(change):
    class Changed(Attends):
        def forward(self, x, memory):
            q, k = heads(self.q(x)), heads(self.k(memory))
            scores = -torch.cdist(q, k) if change == "distances" else script(q @ k.mT)
            return self.proj((scores.softmax(-1) @ heads(self.v(memory))).transpose(1, 2).flatten(2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.trace(clamped, torch.randn(B, H, N, N))
    model, x = Changed(), torch.randn(B, N, 8)
    with attention(model) as maps:
        model(x, x)
        model(x, torch.randn(B, N, 8))
    assert [found.kind for found in maps] == ["self", "cross"]

"""A sample of the menagerie, and what its judge finds wrong."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch", reason="attention maps are of torch's models")

from menagerie.__main__ import compared  # noqa: E402
from menagerie.judging import reasons_of  # noqa: E402
from menagerie.making import fitted  # noqa: E402
from menagerie.page import page  # noqa: E402
from menagerie.reading import read  # noqa: E402

from visualizer import AttentionMap  # noqa: E402

# Fused and open softmax, grouped heads, encoder and decoder, two towers, windows, mixed heads, latent keys, sinks.
TRANSFORMERS = ("bert", "llama", "t5", "clip", "swin", "deberta-v2", "whisper", "deepseek_v3", "gpt_oss", "videomae")
TIMM = ("test_vit", "swin_tiny_patch4_window7_224", "nest_tiny", "convit_tiny")


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("default")
def test_a_sample_of_transformers_is_exact(name):
    pytest.importorskip("transformers", reason="comes with get-local[demo]")
    outcome = compared("transformers", name)
    assert (outcome["outcome"], outcome.get("reasons"), outcome.get("why")) == ("exact", {}, None)
    assert outcome["answers"].get("found", 0) or name in ("clip",)  # CLIP's two towers return no weights themselves


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.filterwarnings("default")
def test_a_sample_of_timm_is_exact(name):
    pytest.importorskip("timm", reason="comes with get-local[test]")
    outcome = compared("timm", name)
    assert (outcome["outcome"], outcome.get("reasons"), outcome.get("why")) == ("exact", {}, None)


class Attention(torch.nn.Module):
    """Two heads of width 4 over two texts of five words."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        self.weights = (2 * q @ k.mT).softmax(-1)
        return self.out((self.weights @ v).transpose(1, 2).flatten(2))


@pytest.fixture
def seen():
    """The right map of a small model, and how wrong ones fare against its reading."""
    model, x = Attention().eval(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reading = read(model, lambda: model(x))
        model(x)
    return model.weights, lambda *maps: reasons_of(reading, list(maps))[0]


def test_the_right_map_is_right(seen):
    weights, reasons = seen
    assert reasons(AttentionMap(weights, kind="self")) == Counter()


def test_the_reading_tells_heads_from_batch(seen):
    """Both are two: only what the model does with them tells."""
    weights, reasons = seen
    assert list(reasons(AttentionMap(weights.transpose(0, 1), kind="self"))) == [
        "axes: (2, 2, 5, 5) in place of (2, 2, 5, 5)"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: AttentionMap(w.roll(1, -1), kind="self"), "numbers: the nearest map is"),
        (lambda w: AttentionMap(w.flatten(0, 1)[:, None], kind="self"), "axes: (4, 1, 5, 5) in place of (2, 2, 5, 5)"),
        (lambda w: AttentionMap(w, kind="cross"), "kind: cross in place of self"),
        (lambda w: AttentionMap(w, kind="window"), "kind: window in place of self"),
    ],
)
def test_a_wrong_map_is_told(seen, change, reason):
    weights, reasons = seen
    assert any(one.startswith(reason) for one in reasons(change(weights)))


def test_a_missing_map_and_one_too_many_are_told(seen):
    weights, reasons = seen
    right = AttentionMap(weights, kind="self")
    assert list(reasons()) == ["no map of (2, 2, 5, 5)"]
    assert list(reasons(right, right)) == ["a map of the model that the reading has not"]


def test_the_page_has_a_row_for_every_model():
    exact = {
        "outcome": "exact",
        "how": "pixels",
        "maps": 2,
        "kinds": {"self": 2},
        "reasons": {},
        "answers": {"found": 2},
    }
    wrong = {**exact, "outcome": "wrong", "reasons": {"kind: None in place of self": 1}}
    lost = {"outcome": "not built", "why": "ValueError: a | b"}
    lines = page([{"library": "timm", "name": name, **one} for name, one in zip("abc", (exact, wrong, lost))])
    assert "| timm | 3 | 1 | 1 | 0 | 1 |" in lines
    assert "1 of the 2 models whose attention the reading sees are exact (50.0 %)" in lines
    assert [sum(line.startswith(f"| {name} |") for line in lines.splitlines()) for name in "abc"] == [1, 1, 1]


def test_inputs_are_made_to_fit_by_what_a_model_refuses():
    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(6, 4)

        def forward(self, film, sizes=None):
            if film.ndim != 5:
                raise ValueError("not enough values to unpack (expected 5)")
            return self.inner(film).sum() + sizes.sum()

    more = {"sizes": torch.ones(2)}
    fits = fitted(Picky(), {"film": torch.ones(2, 3, 4, 5)}, lambda name, given: more.get(name))
    assert fits["film"].ndim == 5
    assert (fits["film"].shape[-1], fits["sizes"]) == (6, more["sizes"])
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'sum'"):
        fitted(Picky(), {"film": torch.ones(2, 3, 4, 5)}, lambda name, given: None)


def reading_of(model, *inputs):
    with torch.no_grad():
        return read(model.eval(), lambda: model(*inputs))


def test_the_reading_looks_through_a_second_attention():
    """As SepViT: windows attend to windows, and what they hand over is what attention within them made."""

    class Windows(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            within = ((q @ k.mT).softmax(-1) @ v).unflatten(0, (2, 3)).transpose(1, 2)  # (images, heads, windows, ...)
            tokens = within.mean(3)
            among = (tokens @ tokens.mT).softmax(-1)
            mixed = torch.einsum("bhij,bhjnd->bhind", among, within)
            return self.out(mixed.permute(0, 2, 3, 1, 4).flatten(3))

    within, among = reading_of(Windows(), torch.randn(6, 5, 8)).seen
    assert within.arrangement == [[2 * window, 2 * window + 1] for window in range(6)]
    assert among.arrangement == [[0, 1], [2, 3]]


def test_the_reading_knows_a_sum_over_heads():
    """As adaptive token sampling: weights are multiplied with norms of values, and summed over heads."""

    class Summed(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT).softmax(-1)
            self.of_keys = torch.einsum("bhn,bhn->bn", weights[..., 0, :], v.norm(dim=-1))
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    over_heads, over_keys = reading_of(Summed(), torch.randn(2, 5, 8)).seen
    assert (over_heads.over_keys, over_keys.over_keys) == (False, True)
    assert over_keys.arrangement == [[0, 1], [2, 3]]


def test_the_reading_does_not_tell_one_sequence_from_two_of_one_origin():
    class Pooled(Attention):
        def forward(self, x):
            few = self.out(x)[:, ::2]
            weights = (self.qkv(self.out(x)) @ self.qkv(few).mT).softmax(-1)
            return self.qkv.weight @ (weights @ few).mT

    [seen] = reading_of(Pooled(), torch.randn(2, 5, 8)).seen
    assert seen.kind == "related"
    with_kinds = {kind: AttentionMap(seen.weights[:, None], kind=kind) for kind in ("self", "cross", None)}
    reading = reading_of(Pooled(), torch.randn(2, 5, 8))
    reading.seen = [seen]
    assert [bool(reasons_of(reading, [one])[0]) for one in with_kinds.values()] == [False, False, True]

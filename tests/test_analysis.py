"""Each analysis against its formula, spelled out in float64 with the whole matrices; and that it never makes them."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from visualizer import AttentionMap, analysis, capture
from visualizer.analysis import attention_distance, cls_attention, confidence, entropy, received, rollout

L, B, H, N, D = 3, 2, 4, 17, 8


def softmax(scores):
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def factors(layers=L, batch=B, heads=H, tokens=N, width=D, seed=0):
    """Query and key of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, batch, heads, tokens, width, generator=generator) for _ in range(layers)]


def weights_of(pairs):
    """(layers, batch, heads, queries, keys) in float64."""
    queries, keys = (np.stack([pair[part].double().numpy() for pair in pairs]) for part in (0, 1))
    return softmax(queries @ np.swapaxes(keys, -1, -2) / math.sqrt(queries.shape[-1]))


def random_weights(*shape, seed=0, spread=1.5):
    return softmax(np.random.default_rng(seed).normal(size=shape) * spread)


FUSE = {"mean": np.mean, "max": np.max, "min": np.min}


def rollout_by_the_book(weights, heads="mean", residual=0.5, discard=0.0):
    """(batch, queries, keys): the definition, from the first layer to the last, with every matrix whole."""
    flow = np.eye(weights.shape[-1])
    for layer in weights:
        mixed = FUSE[heads](layer, axis=1)
        for image in mixed:
            ordered = np.sort(image, axis=None)
            kept = (image >= ordered[int(discard * ordered.size)]) | (np.arange(image.shape[1]) == 0)
            image[~kept] = 0
        mixed = (1 - residual) * mixed + residual * np.eye(mixed.shape[-1])
        flow = mixed / mixed.sum(-1, keepdims=True) @ flow
    return flow


def distance_by_the_book(weights, rows, columns, prefix, patch_size, renormalise):
    """(batch, heads), from the pixels of each pair of patches."""
    weights = weights[:, :, prefix:, prefix:]
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    total = 0
    for i in range(rows * columns):
        for j in range(rows * columns):
            apart = math.dist(divmod(i, columns), divmod(j, columns))
            total = total + weights[:, :, i, j] * patch_size * apart
    return total / (rows * columns)


ANALYSES = {
    "entropy": (entropy, lambda w: -np.sum(np.where(w > 0, w * np.log(np.where(w > 0, w, 1)), 0), -1)),
    "received": (received, lambda w: w.mean(-2)),
    "confidence": (confidence, lambda w: w.max(-1).mean(-1)),
    "cls_attention": (cls_attention, lambda w: w[..., 0, 1:]),
    "attention_distance": (
        attention_distance,
        lambda w: np.stack([distance_by_the_book(layer, 4, 4, 1, 1, True) for layer in w.reshape(-1, *w.shape[-4:])])
        .reshape(*w.shape[:-2]),
    ),
}  # fmt: skip

WAYS = {
    "factored": lambda pairs, whole: [AttentionMap.from_query_key(query, key) for query, key in pairs],
    "dense maps": lambda pairs, whole: [AttentionMap(layer) for layer in whole],
    "tensors": lambda pairs, whole: [torch.from_numpy(layer).float() for layer in whole],
    "tensors of gradients": lambda pairs, whole: [torch.from_numpy(layer).requires_grad_() for layer in whole],
    "arrays": lambda pairs, whole: [layer.astype(np.float32) for layer in whole],
    "five axes": lambda pairs, whole: torch.from_numpy(whole),
    "array of five axes": lambda pairs, whole: whole,
    "dict": lambda pairs, whole: {f"blocks.{number}": [layer] for number, layer in enumerate(whole)},
    "mixed": lambda pairs, whole: [AttentionMap.from_query_key(*pairs[0]), whole[1], torch.from_numpy(whole[2])],
}
OF_ARRAYS = {"arrays", "array of five axes", "dict"}


def close(expected, actual, tolerance=1e-6):
    assert tuple(np.shape(expected)) == tuple(actual.shape)
    np.testing.assert_allclose(expected, np.asarray(actual, np.float64), rtol=0, atol=tolerance)


@pytest.fixture(params=WAYS)
def case(request):
    """Attention of one of the kinds that people have, its weights, and what comes out of it."""
    pairs = factors()
    whole = weights_of(pairs)
    return WAYS[request.param](pairs, whole), whole, np.ndarray if request.param in OF_ARRAYS else torch.Tensor


@pytest.fixture(params=["cache", 5000, 1])
def chunks(request, monkeypatch):
    """As many rows at a time as by default, all, some, and one."""
    if request.param != "cache":
        at_once = AttentionMap._rows_at_once
        monkeypatch.setattr(AttentionMap, "_rows_at_once", lambda self, _: at_once(self, request.param))


class TestEach:
    @pytest.mark.parametrize("name", ANALYSES)
    def test_of_every_layer(self, name, case, chunks):
        attention, whole, kind = case
        analyse, by_the_book = ANALYSES[name]
        found = analyse(attention)
        assert isinstance(found, kind)
        assert not getattr(found, "requires_grad", False)
        close(by_the_book(whole), found, 2e-6)

    @pytest.mark.parametrize("name", ANALYSES)
    @pytest.mark.parametrize("way", ["factored", "dense maps", "tensors", "arrays"])
    def test_of_one_layer(self, name, way):
        pairs = factors()
        whole = weights_of(pairs)
        analyse, by_the_book = ANALYSES[name]
        close(by_the_book(whole[1]), analyse(WAYS[way](pairs, whole)[1]), 2e-6)

    @pytest.mark.parametrize("name", [*ANALYSES, "rollout"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_types(self, name, dtype):
        layers = torch.from_numpy(random_weights(L, B, H, N, N)).to(dtype)
        found = getattr(analysis, name)(layers)
        assert (torch.float64 if dtype == torch.float64 else torch.float32) == found.dtype
        if dtype == torch.float64:
            by_the_book = rollout_by_the_book if name == "rollout" else ANALYSES[name][1]
            close(by_the_book(layers.numpy()), found, 1e-12)

    @pytest.mark.parametrize("name", ANALYSES)
    def test_layers_of_different_shapes(self, name):
        layers = [AttentionMap(torch.eye(size).expand(1, heads, size, size)) for size, heads in ((5, 2), (10, 3))]
        layers[1].path = "blocks.1"
        with pytest.raises(ValueError) as caught:
            getattr(analysis, name)(layers)
        for part in ("layer 0 is (1, 2, 5, 5)", "layer 1 ('blocks.1') (1, 3, 10, 10)", "one by one"):
            assert part in str(caught.value)

    @pytest.mark.parametrize("name", [*ANALYSES, "rollout"])
    def test_under_the_modes_of_a_forward_pass(self, name):
        pairs = factors()
        analyse = getattr(analysis, name)
        expected = analyse(WAYS["factored"](pairs, None))
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = analyse(WAYS["factored"](pairs, None))
        torch.testing.assert_close(found.clone(), expected, rtol=0, atol=0)

    def test_what_capture_found(self):
        def attend(layer):
            attn = random_weights(1, 2, 5, 5, seed=layer)
            return layer

        with capture(attend, "attn") as found:
            for layer in range(4):
                attend(layer)
        whole = np.stack([random_weights(1, 2, 5, 5, seed=layer) for layer in range(4)])
        close(rollout_by_the_book(whole), rollout(found), 1e-12)
        assert isinstance(entropy(found), np.ndarray)


class TestEntropy:
    def test_its_ends(self):
        close(np.full((1, 1, 8), math.log(8)), entropy(torch.full((1, 1, 8, 8), 1 / 8)))
        close(np.zeros((1, 1, 8)), entropy(torch.eye(8).expand(1, 1, 8, 8)), 0)
        close(np.full((1, 1, 8), math.nan), entropy(torch.zeros(1, 1, 8, 8)), 0)

    def test_of_a_causal_map(self):
        """With equal scores, query i is as broad as the i + 1 keys that it sees."""
        alike = torch.zeros(1, 1, 6, 4)
        found = entropy(AttentionMap.from_query_key(alike, alike, is_causal=True))
        close(np.log(np.arange(1, 7))[None, None], found)


class TestReceived:
    def test_it_is_shared_out(self):
        close(np.ones((L, B, H)), received(random_weights(L, B, H, 5, 9)).sum(-1), 1e-12)

    def test_of_a_sink(self):
        weights = torch.zeros(1, 1, 4, 4)
        weights[..., 0] = 1
        close([[[1, 0, 0, 0]]], received(weights), 0)


class TestConfidence:
    def test_its_ends(self):
        close([[1]], confidence(torch.eye(8).expand(1, 1, 8, 8)), 0)
        close([[1 / 8]], confidence(torch.full((1, 1, 8, 8), 1 / 8)), 0)


class TestClassAttention:
    @pytest.mark.parametrize(("query", "prefix"), [(0, 1), (1, 5), (-1, 0)])
    def test_the_row_behind_the_prefix(self, query, prefix):
        weights = random_weights(2, 3, 9, 11)
        close(weights[:, :, query, prefix:], cls_attention(weights, query, prefix_tokens=prefix), 0)

    def test_errors(self):
        weights = random_weights(1, 1, 5, 5)
        for prefix in (5, -1):
            with pytest.raises(ValueError, match=f"prefix_tokens={prefix} does not leave a patch among 5 keys"):
                cls_attention(weights, prefix_tokens=prefix)
        with pytest.raises(IndexError, match="there is no query 5"):
            cls_attention(weights, 5)


class TestDistance:
    @pytest.mark.parametrize("renormalise", [True, False])
    @pytest.mark.parametrize("patch_size", [1, 16, 0.5])
    @pytest.mark.parametrize(
        ("tokens", "grid", "prefix", "expected"),
        [
            (16, None, None, (4, 4, 0)),
            (17, None, None, (4, 4, 1)),
            (21, None, 5, (4, 4, 5)),
            (2, None, None, (1, 1, 1)),
            (17, None, 8, (3, 3, 8)),
            (12, (3, 4), None, (3, 4, 0)),
            (15, (2, 6), None, (2, 6, 3)),
            (15, (6, 2), 3, (6, 2, 3)),
        ],
    )
    def test_as_the_formula_has_it(self, tokens, grid, prefix, expected, patch_size, renormalise, chunks):
        weights = random_weights(1, 2, tokens, tokens)
        options = {"patch_size": patch_size, "prefix_tokens": prefix, "renormalise": renormalise}
        by_the_book = distance_by_the_book(weights, *expected, patch_size, renormalise)
        close(by_the_book, attention_distance(weights, grid, **options), 1e-12)

    def test_to_the_neighbour(self):
        """Each patch sees the one to its right, and the last of a row the first of the next."""
        weights = torch.eye(16).roll(1, 1).expand(1, 1, 16, 16)
        expected = 16 * (12 * 1 + 3 * math.sqrt(10) + math.sqrt(18)) / 16
        close([[expected]], attention_distance(weights, patch_size=16), 1e-5)

    def test_queries_that_see_no_patch(self):
        """Renormalised they stay out of the mean, and a head of nothing else has none; else their distance is 0."""
        weights = torch.zeros(1, 2, 5, 5)
        weights[..., 0] = 1
        weights[0, 0, 1] = torch.tensor([0.5, 0, 0.5, 0, 0])
        found = attention_distance(weights, prefix_tokens=1)
        assert 1 == found[0, 0]
        assert found[0, 1].isnan()
        close([[0.5 / 4, 0]], attention_distance(weights, prefix_tokens=1, renormalise=False))

    @pytest.mark.parametrize(
        ("shape", "options", "said"),
        [
            ((5, 9), {}, ["not 5 queries and 9 keys"]),
            ((15, 15), {"prefix_tokens": 2}, ["15 tokens, 2 of them prefix tokens: 13 is not", "grid=(rows, columns)"]),
            ((48, 48), {}, ["48 tokens: neither 48 nor 47 is a square", "prefix_tokens= says how many"]),
            ((295, 295), {}, ["295 tokens"]),  # 14 x 21 patches and a class token, or 17 x 17 behind six
            ((5, 5), {"patch_size": 0}, ["patch_size=0 is one number above 0"]),
            ((5, 5), {"patch_size": (16, 16)}, ["patch_size=(16, 16) is one number"]),
            ((5, 5), {"prefix_tokens": -4}, ["prefix_tokens=-4 does not leave a patch among 5 tokens"]),
            ((5, 5), {"grid": (2, 3)}, ["grid=(2, 3) makes 2 x 3 = 6 patches, which does not fit 5 tokens"]),
            ((7, 7), {"grid": (2, 3), "prefix_tokens": 0}, ["does not fit 7 tokens, 0 of them prefix tokens"]),
            ((7, 7), {"grid": (-2, -3)}, ["grid=(-2, -3)"]),
        ],
    )
    def test_errors(self, shape, options, said):
        with pytest.raises(ValueError) as caught:
            attention_distance(random_weights(1, 1, *shape), **options)
        for part in said:
            assert part in str(caught.value)


class TestRollout:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"residual": 0.0},
            {"residual": 0.2},
            {"residual": 1.0},
            {"heads": "max"},
            {"heads": "min"},
            {"discard": 0.9},
            {"discard": 0.5, "heads": "max", "residual": 0.3},
            {"discard": 0.999, "heads": "min"},
        ],
        ids=str,
    )
    def test_as_the_formula_has_it(self, case, options, chunks):
        attention, whole, kind = case
        expected = rollout_by_the_book(whole, **options)
        found = rollout(attention, **options)
        assert isinstance(found, kind)
        close(expected, found)
        close(np.ones((B, N)), found.sum(-1), 2e-6)
        for query in (0, -1, np.int64(3), torch.tensor(3)):
            close(expected[:, int(query)], rollout(attention, query, **options))
        close(expected[:, [2, 0, 2]], rollout(attention, [2, 0, 2], **options))
        close(expected[:, :0], rollout(attention, [], **options))

    def test_of_one_map(self):
        weights = random_weights(B, H, N, N)
        close((weights.mean(1) + np.eye(N)) / 2, rollout(weights), 1e-12)
        assert isinstance(rollout(weights), np.ndarray)

    @pytest.mark.parametrize("heads", FUSE)
    def test_uniform_maps(self, heads):
        """After L layers 1/2^L of a token is still its own, and the rest is spread evenly."""
        close((1 - 0.5**L) / N + 0.5**L * np.eye(N)[None], rollout(torch.full((L, 1, H, N, N), 1 / N), heads=heads))

    def test_maps_that_look_at_themselves(self):
        close(np.eye(N)[None], rollout(torch.eye(N).expand(L, 1, H, N, N)), 0)
        close(np.eye(N)[None, 4], rollout(torch.eye(N).expand(L, 1, H, N, N), 4, residual=0.0), 0)

    @pytest.mark.parametrize("options", [{}, {"heads": "max"}])
    def test_tokens_in_another_order(self, options):
        weights = random_weights(L, B, H, N, N)
        order = np.random.default_rng(1).permutation(N)
        again = rollout(weights[..., order, :][..., order], **options)
        close(rollout(weights, **options)[:, order][..., order], again, 1e-12)

    def test_rows_that_see_nothing(self):
        """A query that is masked out keeps what the residual gives it: itself. Without a residual it has nothing."""
        query, key = torch.randn(2, 1, 2, 5, 4)
        seen = (torch.arange(5) != 2)[:, None].expand(5, 5)
        layers = [AttentionMap.from_query_key(query, key, mask=seen)] * 2
        close(np.eye(5)[None, 2], rollout(layers, 2), 0)
        close(np.zeros((1, 5)), rollout(layers, 2, residual=0.0), 0)
        assert rollout(layers, residual=0.0).isfinite().all()

    def test_rows_that_do_not_sum_to_one(self):
        """As after dropout: each is normalised with its residual."""
        weights = random_weights(L, B, H, N, N) * (np.random.default_rng(1).random((L, B, H, N, N)) < 0.7) / 0.7
        close(rollout_by_the_book(weights), rollout(weights), 1e-12)
        close(rollout_by_the_book(weights)[:, 3], rollout(weights, 3), 1e-12)

    def test_layers_of_different_types(self):
        """The wider one counts."""
        for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
            layers = [torch.eye(5, dtype=dtype).expand(1, 1, 5, 5) for dtype in dtypes]
            assert torch.float64 == rollout(layers).dtype == entropy(layers).dtype

    def test_layers_with_different_numbers_of_heads(self):
        layers = [random_weights(B, heads, N, N, seed=heads) for heads in (1, 3, 6)]
        fused = np.stack([layer.mean(1, keepdims=True) for layer in layers])
        close(rollout_by_the_book(fused), rollout(layers), 1e-12)

    def test_it_computes_only_rows_that_count(self, monkeypatch):
        """One row of the last layer; in a decoder only those of the tokens before it."""
        counts = []
        rows = AttentionMap.rows
        monkeypatch.setattr(AttentionMap, "rows", lambda self, which: counts.append(rows(self, which)) or counts[-1])
        layers = [AttentionMap.from_query_key(query, key, is_causal=True) for query, key in factors()]
        rollout(layers, 3)
        assert [1, 4, 4] == [found.shape[2] for found in counts]

    def test_inputs_stay_as_they_are(self):
        weights = torch.from_numpy(random_weights(L, B, 1, N, N)).float()
        before = weights.clone()
        for options in ({}, {"heads": "max"}, {"discard": 0.5}):
            rollout(weights, **options)
        torch.testing.assert_close(weights, before, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"heads": "sum"}, ValueError, 'heads=\'sum\': pass "mean", "max" or "min"'),
            ({"residual": 1.5}, ValueError, "residual=1.5 is a share from 0 to 1"),
            ({"discard": 1.0}, ValueError, "discard=1.0 is a share from 0 up to, not including, 1"),
            ({"discard": -0.1}, ValueError, "discard=-0.1"),
            ({"query": N}, IndexError, f"there is no query {N}: the map has {N} queries"),
            ({"query": [0.5]}, TypeError, "a query is an integer"),
        ],
    )
    def test_options_out_of_range(self, options, error, said):
        with pytest.raises(error) as caught:
            rollout(random_weights(L, 1, 1, N, N), **options)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("shapes", "kinds", "said"),
        [
            ([(1, 5, 5), (1, 5, 7)], [None, None], ["layer 1 ('b.1') has 5 queries and 7 keys", "cross attention"]),
            ([(1, 5, 5), (1, 5, 5)], ["self", "cross"], ["layer 1 ('b.1') is cross attention"]),
            ([(4, 5, 5), (4, 5, 5)], ["window", "window"], ["layer 0 ('b.0') attends within windows"]),
            ([(4, 5, 5), (1, 5, 5)], [None, None], ["5 tokens of 1 images", "layer 0 ('b.0') 5 of 4"]),
            ([(4, 5, 5), (1, 9, 9)], [None, None], ["9 tokens of 1 images", "layer 0 ('b.0') 5 of 4", "pooled"]),
        ],
        ids=["cross lengths", "cross", "windows", "images", "pooled"],
    )
    def test_layers_that_do_not_go_together(self, shapes, kinds, said):
        layers = [
            AttentionMap(torch.rand(batch, 2, queries, keys), path=f"b.{number}", kind=kind)
            for number, ((batch, queries, keys), kind) in enumerate(zip(shapes, kinds, strict=True))
        ]
        with pytest.raises(ValueError) as caught:
            rollout(layers)
        for part in ("a rollout multiplies square maps of the same tokens", *said):
            assert part in str(caught.value)


class TestDiscard:
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("discard", [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
    @pytest.mark.parametrize("levels", [None, 7, 2, 1])
    def test_as_sorting_has_it(self, discard, levels, dtype, chunks):
        """With few levels most entries tie; an exact tie with the smallest that stays, stays."""
        weights = np.random.default_rng(0).random((L, B, 1, N, N)).astype(dtype)
        if levels is not None:
            weights = np.floor(weights * levels) / dtype(levels) + (levels == 1)
        expected = rollout_by_the_book(weights.astype(np.float64), discard=discard)
        close(expected, rollout(weights, discard=discard))
        close(expected[:, 5], rollout(weights, 5, discard=discard))

    def test_the_class_token_is_kept(self):
        weights = np.tile(np.linspace(0, 1, 5), (1, 1, 5, 1))
        found = rollout(weights + (np.arange(5) == 0) * 1e-9, discard=0.8, residual=0.0)
        np.testing.assert_array_equal([True, False, False, False, True], found[0, 0] > 0)


def in_a_fresh_process(code):
    # glibc gives large blocks back at once then: else the peak counts what it keeps for later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_a_rollout_over_4097_tokens_takes_the_memory_of_some_rows():
    """Its two maps would take 537 MB, one map that the heads make together 67 MB."""
    peak = in_a_fresh_process(
        "import torch\n"
        "from visualizer import AttentionMap\n"
        "from visualizer.analysis import entropy, rollout\n"
        "def peak(): return [int(line.split()[1]) for line in open('/proc/self/status') if 'VmHWM' in line][0] / 1000\n"
        "torch.manual_seed(0)\n"
        "def maps(tokens): return [AttentionMap.from_query_key(*torch.randn(2, 1, 4, tokens, 32)) for _ in range(2)]\n"
        "layers = maps(4097)\n"
        "rollout(maps(64), 0), entropy(maps(64))\n"
        "before = peak()\n"
        "flow, broad = rollout(layers, 0), entropy(layers)\n"
        "assert abs(flow.sum() - 1) < 1e-5 and broad.shape == (2, 1, 4, 4097)\n"
        "print(peak() - before)"
    )
    assert 60 > float(peak)

"""Flow and relevance through layers, against networkx, autograd on open models, and the papers' rules in float64."""

import subprocess
import sys

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import swin_transformer
from zoo import IDS, TEXT, timm_model, transformers_model

from visualizer import AttentionMap, attention, capture
from visualizer.analysis import attention_flow, cross_relevance, gradient_rollout, relevance, rollout
from visualizer.layout import Layout
from visualizer.models import VisionTransformer

L, B, H, N = 3, 2, 4, 7


def softmax(scores):
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def random_weights(*shape, seed=0, spread=1.5):
    return softmax(np.random.default_rng(seed).normal(size=shape) * spread)


def random_gradients(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def close(expected, actual, tolerance=1e-6):
    assert tuple(np.shape(expected)) == tuple(actual.shape)
    np.testing.assert_allclose(expected, np.asarray(actual, np.float64), rtol=0, atol=tolerance)


def relu(values):
    return np.maximum(values, 0)


FUSE = {"mean": np.mean, "max": np.max, "min": np.min}


def flow_by_networkx(weights, query, key, heads="mean", residual=0.5):
    """(batch,): the maximum flow with capacities that are no whole numbers."""
    tokens, flows = weights.shape[-1], []
    for image in range(weights.shape[1]):
        graph = networkx.DiGraph()
        for number, layer in enumerate(weights):
            mixed = (1 - residual) * FUSE[heads](layer[image], axis=0) + residual * np.eye(tokens)
            mixed /= mixed.sum(-1, keepdims=True)
            for i in range(tokens):
                for j in range(tokens):
                    graph.add_edge((number + 1, i), (number, j), capacity=mixed[i, j])
        flows.append(networkx.maximum_flow_value(graph, (len(weights), query), (0, key)))
    return np.array(flows)


def gradient_rollout_by_the_book(weights, grads, residual=0.5):
    flow = np.eye(weights[0].shape[-1])
    for layer, grad in zip(weights, grads, strict=True):
        mixed = (1 - residual) * relu((layer * grad).mean(1)) + residual * np.eye(layer.shape[-1])
        sums = mixed.sum(-1, keepdims=True)
        flow = mixed / np.where(sums == 0, 1, sums) @ flow
    return flow


def relevance_by_the_book(weights, grads):
    relevant = np.eye(weights[0].shape[-1])
    for layer, grad in zip(weights, grads, strict=True):
        relevant = relevant + relu(grad * layer).mean(1) @ relevant
    return np.broadcast_to(relevant, (weights[0].shape[0], *relevant.shape[-2:]))


def cross_relevance_by_the_book(weights, grads, groups):
    """One image at a time and entry by entry where rows are normalised; `groups` are lists of pairs."""
    sizes = {}
    pairs = [pair for group in groups for pair in group]
    for layer, (s, q) in zip(weights, pairs, strict=True):
        sizes[s], sizes[q] = layer.shape[2:]

    def normalised(matrix):
        rest = matrix - np.eye(len(matrix))
        return np.eye(len(matrix)) + np.array([row / row.sum() if row.sum() else row for row in rest])

    images = []
    for image in range(len(weights[0])):
        found = {(s, q): np.eye(sizes[s]) if s == q else np.zeros((sizes[s], sizes[q])) for s in sizes for q in sizes}
        layers = iter([relu(a[image] * g[image]).mean(0) for a, g in zip(weights, grads, strict=True)])
        for group in groups:
            before = dict(found)
            for s, q in group:
                cam = next(layers)
                if s == q:
                    for x in sizes:
                        found[s, x] = found[s, x] + cam @ before[s, x]
                else:
                    found[s, q] = found[s, q] + normalised(before[s, s]).T @ cam @ normalised(before[q, q])
                    found[s, s] = found[s, s] + cam @ before[q, s]
        images.append(found)
    return {pair: np.stack([found[pair] for found in images]) for pair in images[0]}


class TestAttentionFlow:
    @pytest.mark.parametrize(
        "options", [{}, {"residual": 0.0}, {"residual": 0.8}, {"heads": "max"}, {"heads": "min"}], ids=str
    )
    def test_as_networkx_has_it(self, options):
        weights = random_weights(L, B, H, 5, 5)
        expected = np.stack([flow_by_networkx(weights, 1, key, **options) for key in range(5)], 1)
        found = attention_flow(weights, 1, **options)
        assert isinstance(found, np.ndarray)
        close(expected, found, 5 * L * 5 / 2**20)
        close(expected[:, [4, 0]], attention_flow(torch.from_numpy(weights), 1, keys=[4, 0], **options), 1e-4)
        close(expected[:, 3], attention_flow(list(weights), np.int64(1 - 5), keys=3, **options), 1e-4)

    @given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([0.3, 2, 8]))
    @settings(max_examples=25, deadline=None)
    def test_it_lies_between_the_rollout_and_one(self, layers, tokens, seed, residual, spread):
        """What a rollout sends along all paths at once is a flow, though not the largest."""
        weights = random_weights(layers, 1, 2, tokens, tokens, seed=seed, spread=spread)
        found = attention_flow(weights, 0, residual=residual)
        assert (found <= 1).all()
        assert (found >= rollout(weights, 0, residual=residual) - 1e-4).all()

    def test_maps_that_look_at_themselves(self):
        close(np.eye(N)[None, 4], attention_flow(torch.eye(N).expand(L, 1, H, N, N), 4), 0)

    def test_one_layer_is_its_row(self):
        weights = random_weights(1, 1, H, N, N)
        close((weights[0].mean(1)[:, 2] + np.eye(N)[2]) / 2, attention_flow(weights, 2), 1e-6)

    def test_uniform_maps(self):
        """Without a residual connection any token can have all that the query's row can carry."""
        close(np.ones((1, N)), attention_flow(torch.full((L, 1, H, N, N), 1 / N), residual=0.0), 1e-4)

    def test_the_narrowest_edge_counts(self):
        """Two layers, one path to key 2, by token 1: 0.8, then 0.3."""
        upper, lower = np.eye(3), np.eye(3)
        upper[0], lower[1] = [0.2, 0.8, 0], [0.7, 0, 0.3]
        layers = np.stack([lower, upper])[:, None, None]
        close([0.3], attention_flow(layers, 0, keys=2, residual=0.0), 1e-6)
        close([0.24], rollout(layers, 0, residual=0.0)[:, 2], 1e-12)

    def test_tokens_in_another_order(self):
        weights = random_weights(L, 1, H, N, N)
        order = np.random.default_rng(1).permutation(N)
        again = attention_flow(weights[..., order, :][..., order], 3)
        close(attention_flow(weights, order[3])[:, order], again, 1e-5)

    def test_of_fused_maps(self):
        pairs = torch.randn(L, 2, 1, H, N, 8, generator=torch.Generator().manual_seed(0))
        fused = [AttentionMap.from_query_key(query, key, is_causal=True) for query, key in pairs]
        found = attention_flow(fused, 3)
        close(attention_flow([layer.dense() for layer in fused], 3), found, 1e-6)
        close(np.zeros((1, N - 4)), found[:, 4:], 0)

    def test_errors(self):
        weights = random_weights(L, 1, 1, 5, 5)
        for options, error, said in (
            ({"query": 5}, IndexError, "there is no query 5"),
            ({"keys": [0, 7]}, IndexError, "there is no key 7"),
            ({"heads": "sum"}, ValueError, "heads='sum'"),
            ({"residual": -1}, ValueError, "residual=-1"),
            ({"query": "cat"}, TypeError, "query='cat': pass the number of one token, an attention flow has one query"),
            ({"query": None}, TypeError, "query=None"),
        ):
            with pytest.raises(error, match=said):
                attention_flow(weights, **options)
        with pytest.raises(ValueError, match="an attention flow multiplies square maps"):
            attention_flow(random_weights(1, 1, 5, 6))

    def test_without_scipy(self):
        """And the rest of the analyses needs none."""
        code = (
            "import sys; sys.modules['scipy'] = sys.modules['scipy.sparse'] = None\n"
            "import numpy; from visualizer import analysis\n"
            "try: analysis.attention_flow(numpy.eye(3)[None, None])\n"
            "except ImportError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "pip install scipy" in done.stdout, done.stderr


def vit(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(patch=4, width=24, depth=3, heads=3, hidden=40, grid=4, classes=5).eval().double()


def pictures():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def by_autograd(model, run, local="attn"):
    """Weights and their gradients of an open model, from its own local variable."""
    with capture(model, local, keep="graph") as found:
        output = run(model)
    weights = [values[0] for values in found.values()]
    for layer in weights:
        layer.retain_grad()
    output.backward()
    return weights, [a.detach().double().numpy() for a in weights], [a.grad.double().numpy() for a in weights]


METHODS = {
    "relevance": (relevance, relevance_by_the_book),
    "gradient_rollout": (gradient_rollout, gradient_rollout_by_the_book),
}


@pytest.mark.parametrize("name", METHODS)
class TestWithGradients:
    def test_of_an_open_model(self, name):
        method, by_the_book = METHODS[name]
        model = vit()

        def run(model):
            return model(pictures())[:, 2].sum()

        tensors, weights, grads = by_autograd(model, run)
        expected = by_the_book(weights, grads)
        assert expected[:, 0, 1:].min() >= 0 and expected[:, 0, 1:].max() > 0
        close(expected, method(tensors), 1e-12)
        close(expected[:, 0], method({f"b.{number}": [layer] for number, layer in enumerate(tensors)}, 0), 1e-12)
        close(expected[:, 0], method(weights, 0, gradients=grads), 1e-12)
        with attention(model, gradients=True) as maps:
            output = run(model)
        output.backward()
        close(expected[:, 0], method(maps, query=0), 1e-12)
        close(expected[:, [3, 0]], method(maps, query=[3, 0]), 1e-12)

    def test_of_a_fused_model(self, name):
        """timm's ViT with its fused kernel, against its own open attention."""
        method, by_the_book = METHODS[name]
        options = {"img_size": 64, "num_classes": 5, "depth": 3}
        torch.manual_seed(0)
        fused = timm_model("vit_tiny_patch16_224", fused=True, **options)
        eager = timm_model("vit_tiny_patch16_224", **options)
        eager.load_state_dict(fused.state_dict())
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        _, weights, grads = by_autograd(eager, lambda model: model(x)[:, 1].sum())
        with attention(fused, gradients=True) as maps:
            output = fused(x)[:, 1].sum()
        output.backward()
        assert not any(layer.is_dense for layer in maps)
        expected = by_the_book(weights, grads)
        close(expected, method(maps), 1e-5 * expected.max())
        close(expected[:, 0], method(maps, 0), 1e-5 * expected.max())

    @pytest.mark.parametrize("chunk", [10**6, 900, 1])
    def test_by_parts(self, name, chunk, monkeypatch):
        method, by_the_book = METHODS[name]
        at_once = AttentionMap._rows_at_once
        monkeypatch.setattr(AttentionMap, "_rows_at_once", lambda self, _: at_once(self, chunk))
        weights, grads = random_weights(L, B, H, N, N), random_gradients(L, B, H, N, N)
        expected = by_the_book(weights, grads)
        found = method(weights, gradients=grads)
        assert isinstance(found, np.ndarray)
        close(expected, found, 1e-12)
        close(expected[:, -1], method(weights, -1, gradients=grads), 1e-12)
        assert torch.float32 == method(torch.from_numpy(weights).half(), 0, gradients=torch.from_numpy(grads)).dtype

    def test_tensors_with_gradients_of_their_own(self, name):
        method, by_the_book = METHODS[name]
        weights, grads = random_weights(L, B, H, N, N), random_gradients(L, B, H, N, N)
        stacked = torch.from_numpy(weights.copy()).requires_grad_()
        (stacked * torch.from_numpy(grads)).sum().backward()
        close(by_the_book(weights, grads), method(stacked), 1e-12)
        single = torch.from_numpy(weights[:1].copy()).requires_grad_()
        (single * torch.from_numpy(grads[:1])).sum().backward()
        close(by_the_book(weights[:1], grads[:1]), method(single), 1e-12)
        one = torch.from_numpy(weights[0].copy()).requires_grad_()
        (one * torch.from_numpy(grads[0])).sum().backward()
        close(by_the_book(weights[:1], grads[:1]), method(one), 1e-12)
        close(by_the_book(weights[:1], grads[:1]), method(layer for layer in [one]), 1e-12)

    def test_layers_behind_the_output(self, name):
        """What comes after the output was read has no part in it, and changes nothing."""
        method, _ = METHODS[name]
        model = vit()
        kept = []
        model.blocks[1].register_forward_hook(lambda *call: kept.append(call[-1]))
        with capture(model, "attn", keep="graph") as found, attention(model, gradients=True) as maps:
            model(pictures())
        for values in found.values():
            values[0].retain_grad()
        kept[0][:, 0, 5].sum().backward()
        expected = method(maps[:2])
        assert expected[:, 0].max() > 0
        close(expected, method(maps), 0)
        close(expected, method(found), 1e-12)

    def test_only_rows_that_count_are_computed(self, name, monkeypatch):
        method, _ = METHODS[name]
        counts = []
        rows = AttentionMap.rows
        monkeypatch.setattr(AttentionMap, "rows", lambda self, which: counts.append(rows(self, which)) or counts[-1])
        pairs = torch.randn(3, 2, 1, 2, N, 8)
        layers = [AttentionMap.from_query_key(query, key, is_causal=True) for query, key in pairs]
        method(layers, 2, gradients=torch.ones(3, 1, 2, N, N))
        # Weights and gradients of each layer: one row of the last, then those of the tokens before it.
        assert [1, 1, 3, 3, 3, 3] == [found.shape[2] for found in counts]

    def test_gradients_that_speak_against(self, name):
        """Where all gradients are negative nothing is relevant but each token to itself."""
        method, _ = METHODS[name]
        weights = random_weights(L, B, H, N, N)
        close(np.broadcast_to(np.eye(N), (B, N, N)), method(weights, gradients=-np.ones_like(weights)), 0)

    def test_tokens_in_another_order(self, name):
        method, _ = METHODS[name]
        weights, grads = random_weights(L, B, H, N, N), random_gradients(L, B, H, N, N)
        order = np.random.default_rng(1).permutation(N)
        again = method(*[weights[..., order, :][..., order]], gradients=grads[..., order, :][..., order])
        close(method(weights, gradients=grads)[:, order][..., order], again, 1e-12)

    def test_gradients_of_a_query_that_saw_nothing(self, name):
        """They are NaN after an open softmax; they stay where they are, and out of the other image of the batch."""
        method, _ = METHODS[name]
        weights, grads = random_weights(L, 2, H, N, N), random_gradients(L, 2, H, N, N)
        weights[:, 1, ..., :2] = 0
        weights[:, 1] /= weights[:, 1].sum(-1, keepdims=True)
        weights[:, 1, :, :2] = 0
        expected = method(weights, -1, gradients=grads)
        weights[:, 1, :, :2] = grads[:, 1, :, :2] = np.nan
        close(expected, method(weights, -1, gradients=grads), 1e-12)
        assert np.isfinite(method(weights, gradients=grads)[0]).all()

    def test_errors(self, name):
        method, _ = METHODS[name]
        weights = torch.from_numpy(random_weights(L, 1, 1, 5, 5))
        with pytest.raises(ValueError) as caught:
            method(weights)
        for part in ("no gradient of layer 0", "attention(model, gradients=True)", "retain_grad()"):
            assert part in str(caught.value)
        with pytest.raises(ValueError, match="gradients of 2 layers for the maps of 3"):
            method(weights, gradients=weights[:2])
        with pytest.raises(ValueError, match=r"gradient of layer 0 has the shape \(1, 1, 5, 4\)"):
            method(weights, gradients=weights[..., :4])
        with pytest.raises(IndexError, match="there is no query 5"):
            method(weights, 5, gradients=weights)
        model = vit()
        with attention(model, gradients=True) as maps:
            model(pictures())
        with pytest.raises(RuntimeError, match="no backward pass"):
            method(maps, 0)
        with pytest.raises(ValueError, match="multiplies square maps"):
            method(torch.rand(1, 1, 5, 6), gradients=torch.rand(1, 1, 5, 6))


def whole_of(numbers, block, side):
    """What lies in the windows of a Swin's block on its grid, by the model's own way to cut it."""
    grid = torch.arange(side * side).view(1, side, side, 1).roll([-step for step in block.shift_size], (1, 2))
    places = swin_transformer.window_partition(grid, block.window_size).flatten(1)
    made = torch.zeros(len(numbers) // len(places), numbers.shape[1], side * side, side * side)
    for at, window in enumerate(numbers):
        image, place = at // len(places), places[at % len(places)]
        made[image, :, place[:, None], place] = window
    return made.double().numpy()


@pytest.fixture(scope="module")
def swin():
    """The maps of four blocks, and their weights and gradients as matrices of the whole picture."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    model = timm_model("swin_tiny_patch4_window7_224", **sizes)
    with attention(model, gradients=True) as maps:
        logits = model(torch.randn(2, 3, 32, 32))
    logits[:, 7].sum().backward()
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [(0, 0), (2, 2), (0, 0), (0, 0)] == [block.shift_size for block in blocks]
    return maps, [
        tuple(whole_of(numbers, block, side) for numbers in (one.dense(), one.grad_dense()))
        for one, block, side in zip(maps, blocks, (8, 8, 4, 4), strict=True)
    ]


class TestWindows:
    """Windows count as maps of the whole picture, and a merged patch as the mean of the patches that it was made of."""

    @staticmethod
    def product(matrices):
        """Of four blocks, with patches that are merged between the second and the third."""
        merging = np.zeros((16, 64))
        for row, column in np.ndindex(8, 8):
            merging[row // 2 * 4 + column // 2, row * 8 + column] = 1 / 4
        first, second, third, fourth = matrices
        return fourth @ third @ merging @ second @ first

    def test_rollout(self, swin):
        maps, matrices = swin
        mixed = [0.5 * weights.mean(1) + 0.5 * np.eye(weights.shape[-1]) for weights, _ in matrices]
        expected = self.product(mixed)
        found = rollout(maps)
        close(expected, found)
        close(expected[:, [5, 0]], rollout(maps, [5, 0]))
        close(np.ones((2, 16)), found.sum(-1))
        close((mixed[1] @ mixed[0])[:, 60], rollout(maps[:2], 60))

    @pytest.mark.parametrize("name", METHODS)
    def test_with_gradients(self, swin, name):
        method, _ = METHODS[name]
        maps, matrices = swin
        relevant = [relu(weights * grads) for weights, grads in matrices]
        if method is relevance:
            mixed = [one.mean(1) + np.eye(one.shape[-1]) for one in relevant]
        else:
            mixed = [
                0.5 * relu((weights * grads).mean(1)) + 0.5 * np.eye(len(weights[0, 0])) for weights, grads in matrices
            ]
            mixed = [one / one.sum(-1, keepdims=True) for one in mixed]
        close(self.product(mixed), method(maps), 1e-5)

    def test_patches_that_are_not_merged_by_two_are_refused(self):
        layers = [AttentionMap(torch.full((1, 1, side**2, side**2), 1 / side**2), path=f"b.{side}") for side in (9, 3)]
        for layer, side in zip(layers, (9, 3), strict=True):
            layer.layout = layer.query_layout = Layout.picture((side, side))
        with pytest.raises(ValueError, match=r"9 tokens of 1 images, layer 0 .* 81 of 1"):
            rollout(layers)


def test_a_gradient_rollout_sums_to_one():
    weights, grads = random_weights(L, B, H, N, N), random_gradients(L, B, H, N, N)
    for residual in (0.0, 0.3, 1.0):
        found = gradient_rollout(weights, gradients=np.abs(grads), residual=residual)
        close(np.ones((B, N)), found.sum(-1), 1e-12)
        close(gradient_rollout_by_the_book(weights, np.abs(grads), residual), found + np.zeros((B, N, N)), 1e-12)


def test_relevance_finds_what_the_output_was_made_of():
    """One layer with the values in the open: token 3 speaks for the output, token 2 against it."""
    scores = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    attn = scores.softmax(-1)
    attn.retain_grad()
    values = torch.tensor([0.0, 0.0, -5.0, 8.0], dtype=torch.float64)[None, None, :, None]
    (attn @ values)[0, 0, 0, 0].backward()
    close([[1.0, 0.0, 0.0, 8 / 4]], relevance([attn], 0), 1e-12)


SELF, CROSS = ("a", "a"), ("a", "b")
BACK, OTHER = ("b", "a"), ("b", "b")


class TestCrossRelevance:
    @pytest.mark.parametrize(
        "streams",
        [
            [OTHER, OTHER, SELF, CROSS, SELF, CROSS],
            [SELF, OTHER, [CROSS, BACK], OTHER, SELF, [CROSS, BACK]],
            [SELF, OTHER, CROSS, BACK],
            [CROSS],
            [CROSS, SELF],
        ],
        ids=["encoder and decoder", "side by side", "one after the other", "nothing before", "nothing of its own"],
    )
    @pytest.mark.parametrize("chunk", [10**6, 1])
    def test_as_the_paper_has_it(self, streams, chunk, monkeypatch):
        at_once = AttentionMap._rows_at_once
        monkeypatch.setattr(AttentionMap, "_rows_at_once", lambda self, _: at_once(self, chunk))
        groups = [entry if isinstance(entry, list) else [entry] for entry in streams]
        pairs = [pair for group in groups for pair in group]
        size = {"a": 4, "b": 6}
        shapes = [(B, 3, size[s], size[q]) for s, q in pairs]
        weights = [random_weights(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        grads = [random_gradients(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        expected = cross_relevance_by_the_book(weights, grads, groups)
        found = cross_relevance(weights, streams, gradients=grads)
        assert expected.keys() == found.keys()
        for pair in expected:
            assert isinstance(found[pair], np.ndarray)
            close(expected[pair], found[pair], 1e-12)

    def test_one_stream_is_relevance(self):
        weights, grads = random_weights(L, B, H, N, N), random_gradients(L, B, H, N, N)
        found = cross_relevance(weights, [SELF] * L, gradients=grads)
        assert {SELF} == found.keys()
        close(relevance_by_the_book(weights, grads), found[SELF], 1e-12)

    @pytest.mark.parametrize("name", ["Bart", "T5"])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_of_an_encoder_and_decoder(self, name, implementation):
        """The maps that the model gives out itself, and autograd's gradients of them."""
        sizes = {
            "Bart": TEXT
            | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
            | {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "forced_eos_token_id": None},
            "T5": {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8}
            | {"decoder_start_token_id": 0, "pad_token_id": 0},
        }[name]
        torch.manual_seed(0)
        eager = transformers_model(name, **sizes)
        inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3], "use_cache": False}
        output = eager(**inputs, output_attentions=True)
        encoder, decoder, cross = output.encoder_attentions, output.decoder_attentions, output.cross_attentions
        layers = [*encoder, *[layer for both in zip(decoder, cross, strict=True) for layer in both]]
        for layer in layers:
            layer.retain_grad()
        output.last_hidden_state[:, -1, 3].sum().backward()
        weights, grads = ([part.detach().double().numpy() for part in parts] for parts in
                          (layers, [layer.grad for layer in layers]))  # fmt: skip
        streams = [("read", "read")] * 2 + [("written", "written"), ("written", "read")] * 2
        expected = cross_relevance_by_the_book(weights, grads, [[pair] for pair in streams])
        model = transformers_model(name, attention=implementation, **sizes)
        model.load_state_dict(eager.state_dict())
        with attention(model, gradients=True) as maps:
            output = model(**inputs)
        output.last_hidden_state[:, -1, 3].sum().backward()
        found = cross_relevance(maps, streams)
        for pair, matrix in expected.items():
            close(matrix, found[pair], 2e-5 * max(1, matrix.max()))
        assert found["written", "read"][:, -1].min() >= 0 < found["written", "read"][:, -1].max()
        assert 0 == found["read", "written"].abs().max()

    def test_of_torchs_transformer(self):
        """Against relevance of the encoder alone, and the decoder's rules on its dense maps and gradients."""
        torch.manual_seed(0)
        model = torch.nn.Transformer(16, 2, 2, 2, 32, batch_first=True).eval()
        with attention(model, gradients=True) as maps:
            output = model(torch.randn(2, 7, 16), torch.randn(2, 5, 16))
        output[:, -1, 3].sum().backward()
        streams = [("source", "source")] * 2 + [("target", "target"), ("target", "source")] * 2
        found = cross_relevance(maps, streams)
        weights, grads = ([part.double().numpy() for part in parts] for parts in
                          ([layer.dense() for layer in maps], [layer.grad_dense() for layer in maps]))  # fmt: skip
        expected = cross_relevance_by_the_book(weights, grads, [[pair] for pair in streams])
        for pair, matrix in expected.items():
            close(matrix, found[pair], 1e-5)
        close(relevance(maps[:2]), found["source", "source"], 1e-5)

    def test_of_co_attention(self):
        """LXMERT: both directions of a layer read what was there before it."""
        options = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
        options |= {"l_layers": 2, "x_layers": 2, "r_layers": 1, "visual_feat_dim": 12}
        torch.manual_seed(0)
        model = transformers_model("Lxmert", **options)
        inputs = {"input_ids": IDS, "visual_feats": torch.rand(2, 6, 12), "visual_pos": torch.rand(2, 6, 4)}
        with attention(model, gradients=True) as maps:
            output = model(**inputs)
        (output.pooled_output[:, 3] + output.vision_output[:, 0, 3]).sum().backward()
        text, image = "text", "image"
        crossed = [[(text, image), (image, text)], (text, text), (image, image)]
        streams = [(text, text)] * 2 + [(image, image)] + crossed * 2
        assert 2 + 1 + 4 * 2 == len(maps)
        found = cross_relevance(maps, streams)
        weights, grads = ([part.double().numpy() for part in parts] for parts in
                          ([layer.dense() for layer in maps], [layer.grad_dense() for layer in maps]))  # fmt: skip
        groups = [entry if isinstance(entry, list) else [entry] for entry in streams]
        expected = cross_relevance_by_the_book(weights, grads, groups)
        for pair, matrix in expected.items():
            close(matrix, found[pair], 1e-5 * max(1, matrix.max()))
        one_by_one = cross_relevance(maps, [pair for group in groups for pair in group])
        assert not torch.allclose(one_by_one[image, text], found[image, text], rtol=1e-4, atol=0)

    @pytest.mark.parametrize(
        ("streams", "said"),
        [
            ([SELF], ["a pair (stream of the queries, stream of the keys) for each of 2 layers", "has 1 entries"]),
            (["aa", "ab"], ["for each of 2 layers"]),
            ([SELF, SELF], ["layer 1 has 6 keys", "'a'", "has 4 tokens", "check the order"]),
        ],
        ids=["too few", "no pairs", "wrong streams"],
    )
    def test_errors(self, streams, said):
        weights = [random_weights(1, 2, 4, 4), random_weights(1, 2, 4, 6)]
        with pytest.raises(ValueError) as caught:
            cross_relevance(weights, streams, gradients=weights)
        for part in said:
            assert part in str(caught.value)

    def test_three_streams(self):
        weights = random_weights(3, 1, 2, 4, 4)
        with pytest.raises(ValueError, match="one stream or two, not for 3: a, b, c"):
            cross_relevance(weights, [SELF, OTHER, ("c", "c")], gradients=weights)

"""Sinks, best keys, and the patches that hold most of a row, against counting by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visualizer import AttentionMap, attention, models
from visualizer.analysis import (
    TopKey,
    attention_distance,
    confidence,
    entropy,
    mass_mask,
    received,
    rollout,
    sink,
    sinks,
    top_keys,
)
from visualizer.layout import Layout, Part, Windows


def random_weights(*shape, seed=0):
    raised = np.exp(np.random.default_rng(seed).normal(size=shape) * 1.5)
    return raised / raised.sum(-1, keepdims=True)


class TestSink:
    @pytest.mark.parametrize("key", [0, 3, -1])
    def test_it_is_the_mean_of_a_column(self, key):
        weights = random_weights(3, 2, 4, 5, 7)
        found = sink(weights, key)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(weights[..., key].mean(-1), found, atol=1e-12)
        np.testing.assert_allclose(weights[1, ..., key].mean(-1), sink(torch.from_numpy(weights[1]), key), atol=1e-12)

    def test_of_a_causal_map(self):
        """Of even attention the first token gets the mean of 1, 1/2, 1/3 and so on."""
        alike = torch.zeros(1, 2, 6, 4)
        found = sink(AttentionMap.from_query_key(alike, alike, is_causal=True))
        np.testing.assert_allclose(np.full((1, 2), np.mean(1 / np.arange(1, 7))), found, atol=1e-6)

    def test_all_sinks_together_are_what_is_received(self):
        weights = torch.from_numpy(random_weights(2, 2, 3, 5, 5))
        expected = torch.stack([sink(weights, key) for key in range(5)], -1)
        torch.testing.assert_close(received(weights), expected, rtol=0, atol=1e-12)

    def test_there_is_no_such_key(self):
        for key in (7, -8):
            with pytest.raises(IndexError, match=f"there is no key {key}: the map has 7 keys"):
                sink(random_weights(1, 1, 5, 7), key)
        with pytest.raises(TypeError, match="integer"):
            sink(random_weights(1, 1, 5, 7), "first")


@pytest.mark.parametrize("shape", [(1, 2, 3, 0), (1, 2, 0, 3), (1, 2, 0, 0), (0, 2, 3, 3)])
@pytest.mark.parametrize("is_fused", [True, False])
def test_maps_without_queries_keys_or_images(shape, is_fused):
    """Numbers about nothing are NaN, and have the shape that they always have."""
    batch, heads, queries, keys = shape
    query, key = torch.randn(batch, heads, queries, 4), torch.randn(batch, heads, keys, 4)
    layer = AttentionMap.from_query_key(query, key) if is_fused else AttentionMap(torch.zeros(shape))
    for analysis, expected in (
        (entropy, (batch, heads, queries)),
        (confidence, (batch, heads)),
        (received, (batch, heads, keys)),
    ):
        found = analysis(layer)
        assert expected == found.shape
        assert bool(found.isnan().all())
    assert (batch, heads, keys) == sinks(layer).shape
    assert not sinks(layer).any()
    assert (batch, heads, queries, 0) == layer.columns([]).shape
    if keys:
        assert [(batch, heads, queries, 1)] * 2 == [found.shape for found in layer.topk(1)]


@pytest.mark.parametrize("masked", [0.0, np.nan], ids=["zeros", "NaN"])
class TestQueriesThatAttendToNothing:
    """What fused kernels give for them is zeros, and what an open softmax over nothing gives is NaN."""

    def weights(self, masked):
        weights = random_weights(2, 3, 4, 6, 6)
        whole = weights.copy()
        weights[:, 0, :, :2] = masked
        weights[:, 1, :, :] = masked
        return whole, weights

    def test_they_do_not_count(self, masked):
        whole, weights = self.weights(masked)
        for analysis, by_hand in (
            (received, lambda rows: rows.mean(-2)),
            (sink, lambda rows: rows[..., 0].mean(-1)),
            (confidence, lambda rows: rows.max(-1).mean(-1)),
        ):
            found = analysis(weights)
            np.testing.assert_allclose(by_hand(whole[:, 0, :, 2:]), found[:, 0], atol=1e-12)
            assert np.isnan(found[:, 1]).all()
            np.testing.assert_allclose(by_hand(whole[:, 2]), found[:, 2], atol=1e-12)

    def test_the_numbers_of_such_a_row_are_none(self, masked):
        whole, weights = self.weights(masked)
        found = entropy(weights)
        by_hand = -(whole * np.log(whole)).sum(-1)
        assert np.isnan(found[:, 0, :, :2]).all() and np.isnan(found[:, 1]).all()
        np.testing.assert_allclose(by_hand[:, 0, :, 2:], found[:, 0, :, 2:], atol=1e-12)
        assert top_keys(weights, 0, batch=0) == [[], []]
        assert len(top_keys(weights, 2, batch=0)[0]) == 3

    @pytest.mark.parametrize("renormalise", [True, False])
    def test_they_are_at_no_distance(self, masked, renormalise):
        weights = np.zeros((1, 2, 5, 5))
        weights[:, :, :, 1:] = 1 / 4
        weights[:, :, 2] = 0
        weights[:, 0, 2, 3] = 1
        weights[:, 1, 2] = masked
        first = (4 * (0 + 1 + 1 + 2**0.5) / 4) / 4  # each patch sees all alike
        seen = attention_distance(weights, (2, 2), renormalise=renormalise)
        np.testing.assert_allclose(seen[0, 1], first, atol=1e-6)
        assert seen[0, 0] > first

    def test_they_receive_no_more_than_others_give_them(self, masked):
        """A rollout through them: only their residual connection carries anything."""
        _, weights = self.weights(masked)
        zeros = np.nan_to_num(weights)
        np.testing.assert_allclose(rollout(zeros, -1), rollout(weights, -1), atol=1e-12)
        assert np.isfinite(rollout(weights)).all()
        assert [one.key for one in top_keys(zeros, -1)[0]] == [one.key for one in top_keys(weights, -1)[0]]


@pytest.mark.parametrize("analysis", [received, sink, confidence, rollout, top_keys])
def test_scores_are_no_weights(analysis):
    query = {"query": 0} if analysis is top_keys else {}
    with pytest.raises(ValueError, match=r"layer 1 holds -0\.5, and attention .* not negative: are these scores"):
        analysis([np.full((1, 1, 2, 2), 0.5), np.array([[[[0.5, 0.5], [1.5, -0.5]]]])], **query)


def fewest(weights, share):
    """How many patches it takes at least, from all subsets of them; weights are whole numbers."""
    for count in range(len(weights) + 1):
        if any(sum(some) * 100 >= share * sum(weights) for some in itertools.combinations(weights, count)):
            return count


class TestMassMask:
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 100))
    @settings(max_examples=200, deadline=None)
    def test_no_fewer_patches_hold_the_share(self, weights, share):
        found = mass_mask(np.array(weights), share / 100)
        assert fewest(weights, share) == found.sum()
        assert np.array(weights)[found].sum() * 100 >= share * sum(weights)
        if found.any() and not found.all():
            assert np.array(weights)[found].min() >= np.array(weights)[~found].max()

    def test_of_many_rows(self):
        weights = random_weights(2, 3, 20)
        found = mass_mask(torch.from_numpy(weights))
        assert (torch.bool, (2, 3, 20)) == (found.dtype, tuple(found.shape))
        for row, mask in zip(weights.reshape(-1, 20), found.reshape(-1, 20).numpy(), strict=True):
            ordered = np.sort(row)[::-1]
            count = next(count for count in range(21) if ordered[:count].sum() >= 0.6)
            np.testing.assert_array_equal(row >= ordered[count - 1], mask)
            np.testing.assert_array_equal(mask, mass_mask(row * 7))

    def test_of_patches_that_are_alike_the_first_are_taken(self):
        for dtype in (np.float32, np.float64):
            np.testing.assert_array_equal(np.arange(10) < 6, mass_mask(np.full(10, 0.1, dtype), 0.6))
            np.testing.assert_array_equal(np.arange(5000) < 3000, mass_mask(np.full(5000, 0.1, dtype), 0.6))
        np.testing.assert_array_equal([False, True, True, False, False], mass_mask([1, 4, 3, 3, 1], 0.5))

    def test_ends(self):
        np.testing.assert_array_equal([True, False, True], mass_mask([0.1, 0, 1e-9], 1.0))
        np.testing.assert_array_equal([False, True, False], mass_mask([0.2, 0.5, 0.3], 1e-9))
        assert not mass_mask(torch.zeros(2, 4)).any()
        np.testing.assert_array_equal([[True, False], [False, False]], mass_mask([[1.0, 0.0], [0.0, 0.0]]))

    @pytest.mark.parametrize(
        ("weights", "share", "said"),
        [
            ([0.5, 0.5], 0, "share=0 is a share from above 0 to 1"),
            ([0.5, 0.5], 60, "share=60"),
            ([0.5, -0.5], 0.6, "hold a negative number"),
            ([0.5, np.nan], 0.6, "NaN"),
            ([0.5, np.inf], 0.6, "infinity"),
            (0.5, 0.6, "have no axis"),
        ],
    )
    def test_errors(self, weights, share, said):
        with pytest.raises(ValueError, match=said):
            mass_mask(np.array(weights), share)


TOKENS = ["the", "cat", "sat", "on", "the", "mat"]


class TestTopKeys:
    @pytest.mark.parametrize("heads", ["mean", "max", "min", 0, -1])
    def test_they_are_the_largest_in_order(self, heads):
        weights = random_weights(3, 2, 4, 6, 6)
        found = top_keys(weights, "cat", TOKENS, k=4, heads=heads, batch=1)
        assert 3 == len(found)
        for layer, best in zip(weights, found, strict=True):
            row = layer[1, heads, 1] if isinstance(heads, int) else getattr(np, heads)(layer[1], axis=0)[1]
            order = np.argsort(-row)[:4]
            assert [TopKey(TOKENS[key], key=key, weight=pytest.approx(row[key])) for key in order] == best
            assert all(isinstance(one.weight, float) and isinstance(one.key, int) for one in best)

    def test_of_one_map_without_tokens(self):
        weights = random_weights(1, 2, 4, 6)
        [best] = top_keys(torch.from_numpy(weights), -1, k=10)
        assert 6 == len(best)
        assert [str(one.key) for one in best] == [one.token for one in best]
        assert sorted(weights[0, :, -1].mean(0), reverse=True) == pytest.approx([one.weight for one in best])

    def test_only_the_row_is_computed(self, monkeypatch):
        counts = []
        rows = AttentionMap.rows
        monkeypatch.setattr(AttentionMap, "rows", lambda self, which: counts.append(rows(self, which)) or counts[-1])
        top_keys([AttentionMap.from_query_key(*torch.randn(2, 1, 4, 6, 8))] * 2, 3)
        assert [(1, 4, 1, 6)] * 2 == [tuple(found.shape) for found in counts]

    @pytest.mark.parametrize(
        ("query", "options", "error", "said"),
        [
            ("dog", {"tokens": TOKENS}, ValueError, "there is no token 'dog' among 'the', 'cat', 'sat'"),
            ("the", {"tokens": TOKENS}, ValueError, "there are 2 tokens 'the', at [0, 4]"),
            ("cat", {}, ValueError, "pass the tokens of the 6 queries, or a number"),
            (0, {"tokens": TOKENS[1:]}, ValueError, "there are 5 tokens for the 6 keys of layer 0"),
            (6, {}, IndexError, "there is no query 6"),
            (0, {"batch": 1}, IndexError, "there is no batch 1: layer 0 has 1 of them"),
            (0, {"heads": 4}, IndexError, "there is no head 4: layer 0 has 4 of them"),
            (0, {"heads": "sum"}, ValueError, "heads='sum'"),
            (0, {"batch": "all"}, TypeError, "batch='all': pass the number of one image or text"),
            (0, {"k": 0}, ValueError, "k=0"),
            (0, {"k": 2.5}, ValueError, "k=2.5"),
            (None, {}, TypeError, "integer"),
        ],
    )
    def test_errors(self, query, options, error, said):
        with pytest.raises(error) as caught:
            top_keys(random_weights(2, 1, 4, 6, 6), query, **options)
        assert said in str(caught.value)

    def test_it_finds_the_cat(self):
        model, tokenizer = models.minilm()
        batch = tokenizer("The cat sat on the mat because it was tired.", return_tensors="pt")
        with attention(model) as maps, torch.inference_mode():
            model(**batch)
        best = top_keys(maps, "it", tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), heads=1)[3][0]
        assert ("cat", 2, pytest.approx(0.49, abs=0.01)) == (best.token, best.key, best.weight)


class TestWhereTokensLie:
    """What a map knows of its tokens, or what `layout` says."""

    def test_distances_in_a_video(self):
        layout = Layout.picture((3, 2, 2), ["CLS"])
        weights = random_weights(1, 2, 13, 13)
        places = np.array([*np.ndindex(3, 2, 2)])
        inner = weights[0, :, 1:, 1:] / weights[0, :, 1:, 1:].sum(-1, keepdims=True)
        for along, axes, unit in (("space", slice(1, 3), 14), ("time", slice(0, 1), 1)):
            apart = np.linalg.norm(places[:, None, axes] - places[:, axes], axis=-1)
            expected = unit * (inner * apart).sum(-1).mean(-1)
            found = attention_distance(weights, layout=layout, patch_size=14, along=along)
            np.testing.assert_allclose(found[0], expected, rtol=1e-6)
        with pytest.raises(ValueError, match="along='time'"):
            attention_distance(random_weights(1, 1, 4, 4), along="time")

    def test_distances_within_windows_that_do_not_fill_the_grid(self):
        layout = Layout(Layout.picture((3, 4)).parts, Windows((2, 2), (1, 1), pads_first=False))
        places = layout.windows.places(3, 4)
        made = AttentionMap(torch.tensor(random_weights(2 * len(places), 2, 4, 4)))
        made.layout = made.query_layout = layout
        weights = made.numpy().reshape(2, len(places), 2, 4, 4)
        expected = np.zeros((2, 2))
        for number, place in enumerate(places):
            for i, j in itertools.product(range(4), repeat=2):
                if min(place[i], place[j]) >= 0:
                    apart = math.dist(divmod(place[i], 4), divmod(place[j], 4))
                    row = weights[:, number, :, i][..., place >= 0]
                    expected += weights[:, number, :, i, j] / row.sum(-1) * apart / 12
        np.testing.assert_allclose(attention_distance(made), expected, rtol=1e-6)

    @pytest.mark.parametrize("padding", [[0, 1], [3, 4]])
    def test_padding_does_not_count(self, padding):
        whole = random_weights(1, 2, 5, 5)
        real = [token for token in range(5) if token not in padding]
        whole[..., padding] = 0
        whole /= whole.sum(-1, keepdims=True)
        made = AttentionMap(torch.tensor(whole))
        words = [Part("padding", 2), Part("text", 3, ("a", "b", "c"))]
        made.layout = made.query_layout = Layout(tuple(words if padding[0] == 0 else words[::-1]))
        alone = whole[:, :, real][..., real]
        np.testing.assert_allclose(received(made)[..., real], received(alone), rtol=1e-6)
        np.testing.assert_allclose(confidence(made), confidence(alone), rtol=1e-6)
        np.testing.assert_allclose(sink(made, real[0]), sink(alone, 0), rtol=1e-6)
        entropies = entropy(made)
        assert bool(entropies[:, :, padding].isnan().all())
        np.testing.assert_allclose(entropies[:, :, real], entropy(alone), rtol=1e-6)
        [best] = top_keys(made, "b", k=5)
        order = np.argsort(-alone[0, :, 1].mean(0))
        assert [("abc"[key], real[key]) for key in order] == [(one.token, one.key) for one in best]

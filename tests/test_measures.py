"""The statistics of maps, each against counting by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from statistics_by_hand import (
    Batch,
    close,
    confidence_by_hand,
    entropy_by_hand,
    moments_by_hand,
    patterns_by_hand,
    prefix_by_hand,
    received_by_hand,
    sink_by_hand,
)

import visualizer
from visualizer import AttentionMap, Layout
from visualizer.statistics import (
    Confidence,
    Distance,
    Entropy,
    MeanMap,
    Patterns,
    PrefixMass,
    Received,
    Sink,
    Tokens,
    measures,
)
from visualizer.statistics.base import measured
from visualizer.statistics.measures import MEASURES
from visualizer.statistics.moments import empty_state, state_of

CASES = {
    "entropy": (Entropy, entropy_by_hand),
    "confidence": (Confidence, confidence_by_hand),
    "received": (Received, received_by_hand),
    "sink": (Sink, sink_by_hand(0)),
    "sink of a later key": (lambda: Sink(9), sink_by_hand(9)),
    "prefix mass": (lambda: PrefixMass(2), prefix_by_hand),
    "patterns": (lambda: Patterns([0, 3], window=1), patterns_by_hand([0, 3], 1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_it_is_what_counting_gives(name, causal, padding, fused):
    """Over batches of different numbers and lengths of texts."""
    make, function = CASES[name]
    statistic = make()
    sizes = [(3, 17), (1, 20), (4, 12)]
    batches = [Batch(*size, seed, padding, causal) for seed, size in enumerate(sizes)]
    for batch in batches:
        statistic.update(batch.maps(fused), batch.mask(), batch.ids)
    close(moments_by_hand([batch.by_hand(function) for batch in batches]), statistic.compute(), 3e-6 if fused else 1e-9)


class TestDistance:
    @pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
    @pytest.mark.parametrize(
        ("tokens", "options", "rows", "columns"),
        [
            (17, {}, 4, 4),
            (17, {"renormalise": False, "patch_size": 16}, 4, 4),
            (16, {"prefix_tokens": 0}, 4, 4),
            (16, {"grid": (3, 5), "patch_size": 2.5}, 3, 5),
        ],
    )
    def test_it_is_the_mean_over_pairs_of_patches(self, tokens, options, rows, columns, fused):
        def by_hand(weights, real, ids):
            prefix, size = tokens - rows * columns, options.get("patch_size", 1)
            distances = []
            for i in range(rows * columns):
                row = weights[prefix + i, prefix:]
                apart = [size * math.dist(divmod(i, columns), divmod(j, columns)) for j in range(rows * columns)]
                distances.append(np.dot(row, apart) / (row.sum() if options.get("renormalise", True) else 1))
            return np.mean(distances)

        batches = [Batch(size, tokens, size) for size in (3, 1)]
        statistic = Distance(**options)
        for batch in batches:
            statistic.update(batch.maps(fused))
        expected = moments_by_hand([batch.by_hand(by_hand) for batch in batches])
        close(expected, statistic.compute(), 1e-4 if fused else 1e-9)

    def test_the_grid_must_fit(self):
        with pytest.raises(ValueError, match="does not fit 17 tokens"):
            Distance((5, 5)).update(Batch(1, 17, 0).maps(True))
        with pytest.raises(ValueError, match="cannot tell the patch grid of 15 tokens"):
            Distance().update(Batch(1, 15, 0).maps(False))


class TestMeanMap:
    @pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
    def test_of_each_head(self, fused):
        batches = [Batch(size, 6, size, causal=True) for size in (3, 1, 2)]
        statistic = MeanMap()
        for batch in batches:
            statistic.update(batch.maps(fused))
        close(moments_by_hand([batch.weights for batch in batches]), statistic.compute(), 1e-6)

    @pytest.mark.parametrize("heads", ["mean", "max", "min"])
    def test_of_the_heads_together(self, heads):
        batches = [Batch(size, 6, size) for size in (3, 1)]
        statistic = MeanMap(heads)
        for batch in batches:
            statistic.update(batch.maps(True))
        close(
            moments_by_hand([getattr(batch.weights, heads)(2, keepdims=True) for batch in batches]),
            statistic.compute(),
            1e-6,
        )


def test_layers_may_have_different_numbers_of_heads():
    """A head that a layer has not has no samples."""
    few, many = Batch(3, 9, 0, heads=2), Batch(3, 9, 1, heads=4)
    statistic = Entropy()
    statistic.update([few.maps(True)[0], many.maps(True)[1]])
    found = statistic.compute()
    np.testing.assert_array_equal([[3, 3, 0, 0], [3, 3, 3, 3]], found.count)
    for layer, batch in enumerate((few, many)):
        heads = batch.weights.shape[2]
        expected = moments_by_hand([batch.by_hand(entropy_by_hand)[layer : layer + 1]])[1, 0]
        np.testing.assert_allclose(expected, found.mean[layer, :heads], atol=1e-6)
        assert np.isnan(found.mean[layer, heads:]).all()


def test_queries_that_attend_to_nothing_are_zeros_or_nan():
    """What an open softmax over nothing leaves, NaN, counts like the zeros of a fused kernel."""
    batch = Batch(3, 9, 0)
    zeros, nans = batch.weights.copy(), batch.weights.copy()
    zeros[:, 1, :, 4:], nans[:, 1, :, 4:] = 0, np.nan
    for statistic in (Entropy(), Confidence(), Received(), MeanMap()):
        states = []
        for weights in (zeros, nans):
            maps = [AttentionMap(layer) for layer in weights]
            states.append(torch.stack([measured(layer, Tokens(), [statistic])[0] for layer in maps]))
            assert (2 if isinstance(statistic, MeanMap) else 3) == states[-1][:, 0].min()
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_means_leave_out_queries_that_attend_to_nothing():
    weights = torch.full((1, 1, 1, 4, 4), 1 / 4)
    weights[..., 1:3, :] = 0
    for statistic, expected in ((Entropy(), math.log(4)), (Confidence(), 1 / 4), (Received(), 1 / 4)):
        statistic.update(weights)
        assert torch.tensor(statistic.compute().mean).sub(expected).abs().max() < 1e-6
        masked = type(statistic)()
        masked.update(weights, torch.tensor([[0, 1, 1, 1]]))
        assert torch.tensor(masked.compute().mean).sub(expected).abs().nan_to_num(0).max() < 1e-6
    map_ = MeanMap()
    map_.update(weights)
    map_.update(torch.full((1, 1, 1, 4, 4), 1 / 4))
    assert map_.compute().count[0, 0, :, 0].tolist() == [2, 1, 1, 2]
    assert (map_.compute().mean == 1 / 4).all()


def test_a_text_without_tokens_has_no_prefix():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    statistic = PrefixMass(1)
    statistic.update(torch.full((1, 2, 1, 4, 4), 1 / 4), mask)
    assert ([[1]], [[0.25]]) == (statistic.compute().count.tolist(), statistic.compute().mean.tolist())


def test_the_prefix_is_what_the_map_knows():
    made = AttentionMap(torch.full((1, 2, 6, 6), 1 / 6))
    for layout, share in ((None, 1 / 6), (Layout.picture((2, 2), 2), 2 / 6), (Layout.picture((2, 3)), 0)):
        made.layout = made.query_layout = layout
        statistic = PrefixMass()
        statistic.update(made)
        np.testing.assert_allclose([[share] * 2], statistic.compute().mean, atol=1e-6)


def test_confidence_is_that_of_queries_that_see_anything():
    weights = torch.zeros(1, 1, 1, 4, 4)
    weights[..., :2, :] = 1 / 4
    statistic = Confidence()
    statistic.update(weights)
    assert [[0.25]] == statistic.compute().mean.tolist()
    assert 0.25 == visualizer.analysis.confidence(weights[0]).item()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_mean_map_of_texts_is_that_of_each(side):
    weights = torch.rand(2, 1, 5, 5).softmax(-1)
    short = weights[1, :, :3, :3] / weights[1, :, :3, :3].sum(-1, keepdim=True)
    padded = torch.full((1, 5, 5), 1 / 5)
    place = slice(0, 3) if side == "right" else slice(2, 5)
    padded[:, place] = 0
    padded[:, place, place] = short
    mask = torch.zeros(2, 5)
    mask[0], mask[1, place] = 1, 1
    one, both = MeanMap(), MeanMap()
    one.update(weights[None, :1])
    one.update(short[None, None])
    both.update(torch.stack([weights[0], padded])[None], mask)
    for field in ("count", "mean", "minimum"):
        np.testing.assert_allclose(getattr(one.compute(), field), getattr(both.compute(), field), atol=1e-6)


def test_infinity_is_a_number():
    state = state_of(torch.tensor([[1.0], [torch.inf]]))
    assert (2, torch.inf, torch.inf) == (state[0].item(), state[1].item(), state[4].item())


def test_no_samples_are_none():
    torch.testing.assert_close(empty_state((2, 3)), state_of(torch.zeros(0, 2, 3)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Sink(-1), "key=-1: a position is counted from 0"),
        (lambda: Sink(0.5), "key=0.5"),
        (lambda: PrefixMass(0), "prefix_tokens=0: pass how many tokens, 1 or more"),
        (lambda: MeanMap("sum"), "heads='sum'"),
        (lambda: Distance(patch_size=0), "patch_size=0 is one number above 0"),
        (lambda: Patterns(window=-1), "window=-1: pass how many tokens, 0 or more"),
    ],
)
def test_wrong_options_are_refused_at_once(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_patterns_are_those_of_tokens_among_themselves():
    with pytest.raises(ValueError, match="not of 4 queries to 6 keys"):
        Patterns().update(torch.full((1, 1, 1, 4, 6), 1 / 6))


def test_each_says_what_the_command_line_and_plots_need():
    assert {measure.__name__ for measure in MEASURES.values()} == {*measures.__all__}
    assert measures.__all__ == sorted(measures.__all__)
    for name, measure in MEASURES.items():
        statistic = measure.for_tokenizer(None)
        assert (name, type(statistic)) == (statistic.name, measure)
        assert measure.about
        assert {*measure.default_for} <= {"images", "texts"}
        assert statistic.label != name.replace("_", " ")
        assert (statistic.axes == 1) >= bool(statistic.number_names)


def test_patterns_know_the_special_tokens_of_a_tokenizer():
    tokenizer = SimpleNamespace(all_special_ids=[3, 1])
    assert [3, 1] == Patterns.for_tokenizer(tokenizer).special_ids
    assert Patterns.for_tokenizer(None).special_ids is None

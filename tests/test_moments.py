"""`Moments`: parts in any order are the whole."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_by_hand import Batch, close, moments_by_hand

from visualizer.statistics import (
    Entropy,
    MeanMap,
    Moments,
    Patterns,
    Received,
)
from visualizer.statistics.moments import empty_state, merge_states, state_of, to_one_shape

SAMPLES = st.lists(st.one_of(st.floats(-1e3, 1e3, allow_subnormal=False), st.just(math.nan)), min_size=1, max_size=12)


class TestMerging:
    @given(
        SAMPLES,
        st.sampled_from([0.0, 1e6]),
        st.lists(st.integers(0, 12), max_size=6),
        st.randoms(use_true_random=False),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_parts_in_any_order_give_the_same(self, samples, base, cuts, random):
        """Also where the variance is tiny beside the mean."""
        samples = [base + value / (1e3 if base else 1) for value in samples]
        expected = moments_by_hand([np.array(samples)[None, :, None]])
        ordered = random.sample(samples, len(samples))
        edges = sorted({0, len(ordered), *(min(cut, len(ordered)) for cut in cuts)})
        states = [empty_state((1,))]
        for start, stop in itertools.pairwise(edges):
            states.append(state_of(torch.tensor(ordered[start:stop], dtype=torch.float64)[:, None]))
        random.shuffle(states)
        while len(states) > 1:  # as a tree, or one after the other
            count = random.randint(2, len(states))
            states = [merge_states(torch.stack(states[:count])), *states[count:]]
        found = Moments.of(states[0][:, None])
        for values, name in zip(expected, ("count", "mean", "variance", "minimum", "maximum"), strict=True):
            np.testing.assert_allclose(values, getattr(found, name), rtol=1e-9, atol=1e-9, err_msg=name)

    def test_a_variance_tiny_beside_its_mean(self):
        """Where sums of squares would have lost it all."""
        values = 1e8 + np.random.default_rng(0).normal(size=10_000) * 1e-2
        parts = torch.from_numpy(values).split(97)
        found = Moments.of(merge_states(torch.stack([state_of(part[:, None]) for part in parts]))[:, None])
        assert found.variance.item() == pytest.approx(np.var(values - 1e8, ddof=1), rel=1e-6)

    def test_parts_of_different_shapes(self):
        """Longer texts have positions of which shorter ones have no samples."""
        short, long = torch.rand(3, 2, 4, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)
        states = [state_of(short), state_of(long), empty_state((0, 0))]
        expected = moments_by_hand([short[None].numpy(), long[None].numpy()])
        for order in (states, states[::-1]):
            close(expected, Moments.of(merge_states(torch.stack(to_one_shape(order)))[:, None]), 1e-12)

    def test_the_state_does_not_grow_with_the_samples(self):
        statistics = [Entropy(), Received(), Patterns(), MeanMap()]
        sizes = []
        for seed in range(6):
            for statistic in statistics:
                statistic.update(Batch(5, 9, seed).maps(True))
            sizes.append([len(pickle.dumps(statistic)) for statistic in statistics])
        assert sizes[1] == pytest.approx(sizes[-1], abs=64)


class TestMoments:
    def test_it_prints_a_table_of_heads(self):
        statistic = Entropy()
        statistic.update(torch.stack([torch.eye(4), torch.full((4, 4), 0.25)])[None, :, None])
        assert [
            "<moments of 1 x 1 heads, 2 samples",
            "  layer  head 0",
            "  0      0.6931 ± 0.98>",
        ] == repr(statistic.compute()).splitlines()
        assert "0.6931 ± 0.98" in statistic.compute()._repr_html_()

    def test_of_more_numbers_it_prints_how_many(self):
        statistic = Received()
        statistic.update(Batch(3, 9, 0, "right").maps(True), Batch(3, 9, 0, "right").mask())
        assert "<moments of 2 x 3 x 9 numbers, 1 to 3 samples" in repr(statistic.compute())

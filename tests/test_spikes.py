"""Firing rates and the scores of spikes, against loops over neurons."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visualizer.analysis import spike_rate, spike_scores

SHAPE = (3, 2, 2, 4, 5)  # time, batch, heads, tokens, channels


def random_spikes(*shape, seed=0, rate=0.3):
    return (np.random.default_rng(seed).random(shape) < rate).astype(np.float32)


class TestRate:
    @given(st.permutations("time batch heads tokens channels".split()), st.integers(0, 5))
    @settings(max_examples=40, deadline=None)
    def test_as_einsum_has_it(self, names, count):
        """Any axes, in any order."""
        spikes, letters = random_spikes(*SHAPE), dict(zip(["time", "batch", "heads", "tokens", "channels"], "tbhnc"))
        kept = names[:count]
        expected = np.einsum(f"tbhnc->{''.join(letters[name] for name in kept)}", spikes)
        found = spike_rate(spikes, keep=" ".join(kept))
        np.testing.assert_allclose(expected * found.size / spikes.size, found, atol=1e-6)

    def test_of_each_token(self):
        spikes = random_spikes(*SHAPE)
        found = spike_rate(torch.from_numpy(spikes))
        for image, token in itertools.product(range(2), range(4)):
            neurons = [spikes[t, image, h, token, c] for t in range(3) for h in range(2) for c in range(5)]
            assert sum(neurons) / len(neurons) == pytest.approx(found[image, token].item())

    def test_axes_of_other_names(self):
        """V1's maps before the patches are tokens; and where all axes are kept, the spikes themselves."""
        spikes = random_spikes(3, 2, 5, 4, 6)
        found = spike_rate(spikes, "T B C H W", "B W H")
        np.testing.assert_allclose(spikes.mean((0, 2)).swapaxes(1, 2), found, atol=1e-6)
        np.testing.assert_array_equal(spikes, spike_rate(spikes, "T B C H W", "T B C H W"))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_types(self, dtype):
        spikes = torch.from_numpy(random_spikes(*SHAPE)).to(dtype)
        found = spike_rate(spikes, keep="")
        assert (torch.float64 if dtype == torch.float64 else torch.float32) == found.dtype
        assert random_spikes(*SHAPE).mean() == pytest.approx(found.item())

    def test_ends(self):
        assert (0, 1) == (spike_rate(np.zeros(SHAPE)).max(), spike_rate(np.ones(SHAPE)).min())

    @pytest.mark.parametrize("value", [-1, 0.5, 2, 4, np.nan, np.inf])
    def test_what_is_no_spike(self, value):
        """Membrane potentials, rates, and spikes that count to more than one."""
        spikes = random_spikes(*SHAPE)
        spikes[1, 0, 1, 2, 3] = value
        for call in (spike_rate, lambda spikes: spike_scores(np.zeros_like(spikes), spikes)):
            with pytest.raises(ValueError, match="are 0 and 1, and 1 of these 240 values are neither") as caught:
                call(spikes)
            assert f"{value:.6g}" in str(caught.value)

    @pytest.mark.parametrize(
        ("axes", "keep", "said"),
        [
            ("time batch tokens", "tokens", "name each of the 5 axes of spikes of the shape (3, 2, 2, 4, 5) once"),
            ("time batch time tokens channels", "tokens", "must name each of the 5 axes"),
            ("time batch heads tokens channels", "token", "keep='token' must name axes of"),
            ("time batch heads tokens channels", "tokens tokens", "keep='tokens tokens'"),
        ],
    )
    def test_names_that_do_not_fit(self, axes, keep, said):
        with pytest.raises(ValueError) as caught:
            spike_rate(random_spikes(*SHAPE), axes, keep)
        assert said in str(caught.value)

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="hold no values"):
            spike_rate(np.zeros((0, 1, 1, 2, 2)))


class TestScores:
    def test_each_pair_of_tokens(self):
        query, key = random_spikes(*SHAPE), random_spikes(3, 2, 2, 6, 5, seed=1)
        found = spike_scores(query, key)
        assert ((2, 2, 4, 6), np.ndarray) == (found.shape, type(found))
        for b, h, i, j in itertools.product(range(2), range(2), range(4), range(6)):
            steps = [0.125 * sum(query[t, b, h, i, c] * key[t, b, h, j, c] for c in range(5)) for t in range(3)]
            assert sum(steps) / 3 == pytest.approx(found[b, h, i, j], abs=1e-6)
        np.testing.assert_allclose(found * 8, spike_scores(torch.from_numpy(query), key, scale=1.0), atol=1e-6)

    def test_they_make_what_a_model_without_the_map_makes(self):
        """q (k^T v), step by step, is the map of that step times v."""
        query, key, value = (torch.from_numpy(random_spikes(*SHAPE, seed=seed)) for seed in range(3))
        for t in range(3):
            output = query[t] @ (key[t].mT @ value[t]) * 0.125
            torch.testing.assert_close(spike_scores(query[t : t + 1], key[t : t + 1]) @ value[t], output)

    @pytest.mark.parametrize(
        ("query", "key", "said"),
        [
            ((2, 2, 4, 5), SHAPE, "query has the shape (time, batch, heads, tokens, channels), this one (2, 2, 4, 5)"),
            (SHAPE, (3, 2, 2, 4), "key has the shape"),
            (SHAPE, (3, 2, 2, 4, 6), "do not fit"),
            (SHAPE, (1, 2, 2, 4, 5), "only the tokens may differ"),
        ],
    )
    def test_errors(self, query, key, said):
        with pytest.raises(ValueError) as caught:
            spike_scores(np.zeros(query), np.zeros(key))
        assert said in str(caught.value)

"""Contacts against the same formula pair by pair, and what is no residue."""

import numpy as np
import pytest
import torch

from visualizer import AttentionMap
from visualizer.analysis import contacts


def weights(*shape):
    return np.random.default_rng(0).dirichlet(np.ones(shape[-1]), shape[:-1])


def by_hand(head, places):
    symmetric = [[head[i, j] + head[j, i] for j in places] for i in places]
    sums = [sum(row) for row in symmetric]
    return [[symmetric[i][j] - sums[i] * sums[j] / sum(sums) for j in range(len(sums))] for i in range(len(sums))]


def test_each_pair_is_corrected_by_what_both_get_on_the_whole():
    maps = weights(3, 2, 4, 9, 9)
    found = contacts(maps)
    assert (3, 2, 4, 7, 7) == found.shape
    for place in np.ndindex(3, 2, 4):
        np.testing.assert_allclose(found[place], by_hand(maps[place], range(1, 8)), atol=1e-12)
    np.testing.assert_array_equal(contacts(maps[1]), found[1])


def test_fused_maps_give_what_dense_ones_do():
    query, key = torch.randn(2, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    fused = AttentionMap.from_query_key(query, key)
    torch.testing.assert_close(contacts([fused, fused]), contacts([fused.dense()] * 2))


def test_tokens_that_are_no_residues_do_not_count():
    """The second protein is shorter; with what is behind it left out, it is as if it were alone."""
    maps = weights(2, 2, 3, 9, 9)
    residues = np.ones((2, 9), bool)
    residues[:, 0] = residues[0, 8] = residues[1, 6:] = False
    found = contacts(maps, residues=residues)
    assert (2, 2, 3, 7, 7) == found.shape
    for place in np.ndindex(2, 3):
        layer, head = place
        np.testing.assert_allclose(found[layer, 0, head], by_hand(maps[layer, 0, head], range(1, 8)), atol=1e-12)
        shorter = found[layer, 1, head]
        np.testing.assert_allclose(shorter[:5, :5], by_hand(maps[layer, 1, head], range(1, 6)), atol=1e-12)
        assert not shorter[5:].any() and not shorter[:, 5:].any()


def test_a_regression_makes_a_probability():
    maps, factors = weights(3, 2, 4, 9, 9), np.random.default_rng(1).normal(size=12) * 30
    expected = 1 / (1 + np.exp(-(np.einsum("lbhij,lh->bij", contacts(maps), factors.reshape(3, 4)) - 2)))
    np.testing.assert_allclose(contacts(maps, (factors, [-2.0])), expected, atol=1e-12)
    linear = torch.nn.Linear(12, 1)
    linear.load_state_dict({"weight": torch.tensor(factors[None]), "bias": torch.tensor([-2.0])})
    found = contacts(torch.from_numpy(maps), linear)
    assert not found.requires_grad
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1, 4, 5, 6), {}, "queries and keys are the same tokens"),
        ((2, 1, 4, 5, 5), {"residues": [1, 1]}, r"residues has the shape \(1, 5\) or \(5,\), not \(2,\)"),
        ((2, 1, 4, 2, 2), {}, "none of the 2 tokens is a residue"),
        ((2, 1, 4, 5, 5), {"regression": ([1.0] * 7, [0.0])}, "7 weights and 1 biases: .* 4 heads of 2 layers"),
    ],
)
def test_what_does_not_fit_is_said(shape, options, message):
    with pytest.raises(ValueError, match=message):
        contacts(weights(*shape), **options)

"""Filters and positions of a vision transformer, against loops and the eigenvectors of a covariance."""

import math

import numpy as np
import pytest
import torch

from visualizer import models
from visualizer.analysis import filter_components, position_similarity


class TestPositions:
    @pytest.mark.parametrize(
        ("tokens", "options", "grid", "prefix"),
        [
            (16, {}, (4, 4), 0),
            (17, {}, (4, 4), 1),
            (14, {"grid": (3, 4)}, (3, 4), 2),
            (14, {"grid": (4, 3), "prefix_tokens": 2}, (4, 3), 2),
            (17, {"prefix_tokens": 8}, (3, 3), 8),
        ],
    )
    def test_each_pair_of_patches(self, tokens, options, grid, prefix):
        table = np.random.default_rng(0).normal(size=(tokens, 5))
        found = position_similarity(table, **options)
        assert (*grid, *grid) == found.shape
        for i in range(grid[0] * grid[1]):
            for j in range(grid[0] * grid[1]):
                a, b = table[prefix + i], table[prefix + j]
                expected = sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))
                assert math.isclose(expected, found[(*divmod(i, grid[1]), *divmod(j, grid[1]))], abs_tol=1e-12)

    def test_of_a_parameter(self):
        found = position_similarity(torch.nn.Parameter(torch.randn(1, 17, 8).half()))
        assert (torch.float32, False) == (found.dtype, found.requires_grad)
        torch.testing.assert_close(found.permute(2, 3, 0, 1), found)

    def test_an_embedding_of_zeros_is_like_none(self):
        assert 0 == position_similarity(np.r_[np.zeros((1, 3)), np.ones((3, 3))])[0, 0].max()

    def test_neighbours_are_more_alike_in_a_trained_model(self):
        positions = models.dinov2_small().positions
        found = position_similarity(positions)
        side = math.isqrt(positions.shape[1] - 1)
        assert (side,) * 4 == tuple(found.shape)
        middle = side // 2
        near = found[middle, middle, middle, middle + 1]
        assert near > found[middle, middle, middle, -1] + 0.2

    @pytest.mark.parametrize(
        ("shape", "options", "said"),
        [
            ((2, 17, 8), {}, "(1, tokens, width), these are (2, 17, 8)"),
            ((17,), {}, "these are (17,)"),
            ((15, 8), {"prefix_tokens": 2}, "cannot tell the patch grid of 15 tokens"),
            ((15, 8), {"grid": (4, 4)}, "does not fit 15 tokens"),
        ],
    )
    def test_errors(self, shape, options, said):
        with pytest.raises(ValueError) as caught:
            position_similarity(torch.zeros(shape), **options)
        assert said in str(caught.value)


class TestFilters:
    def test_they_are_the_eigenvectors_of_the_covariance(self):
        filters = np.random.default_rng(0).normal(size=(50, 3, 2, 4)) * np.linspace(1, 3, 24).reshape(3, 2, 4)
        found = filter_components(filters, 24)
        assert isinstance(found, np.ndarray)
        values, vectors = np.linalg.eigh(np.cov(filters.reshape(50, -1), rowvar=False))
        for component, vector in zip(found.reshape(24, -1), vectors.T[::-1], strict=True):
            assert math.isclose(1, abs(component @ vector), rel_tol=1e-9)
            assert component[np.abs(component).argmax()] > 0
        assert (np.diff(values[::-1]) < 0).all()

    def test_the_mean_of_the_filters_is_taken_off(self):
        filters = np.random.default_rng(0).normal(size=(20, 1, 2, 2))
        np.testing.assert_allclose(filter_components(filters, 4), filter_components(filters + 100, 4), atol=1e-9)

    def test_filters_of_one_direction(self):
        direction = np.array([[0.0, -0.6], [0.8, 0.0]])
        filters = np.linspace(-1, 1, 9)[:, None, None, None] * direction
        np.testing.assert_allclose(direction[None, None], filter_components(filters, 1), atol=1e-12)

    def test_of_a_trained_model(self):
        weight = models.dinov2_small().patch_embedding.weight
        found = filter_components(weight)
        assert ((28, 3, 14, 14), torch.float32, False) == (tuple(found.shape), found.dtype, found.requires_grad)
        flat = found.flatten(1)
        torch.testing.assert_close(flat @ flat.mT, torch.eye(28), rtol=0, atol=1e-5)
        spread = ((weight.detach() - weight.detach().mean(0)).flatten(1) @ flat.mT).var(0)
        assert (spread[:-1] >= spread[1:]).all()

    @pytest.mark.parametrize(
        ("shape", "count", "said"),
        [
            ((8, 12), 2, "(filters, channels, height, width); this one is (8, 12)"),
            ((8, 3, 4, 4), 28, "count=28: filters of the shape (8, 3, 4, 4) have 1 to 7 components"),
            ((50, 3, 2, 2), 13, "have 1 to 12 components"),
            ((50, 3, 2, 2), 0, "count=0"),
        ],
    )
    def test_errors(self, shape, count, said):
        with pytest.raises(ValueError) as caught:
            filter_components(torch.randn(shape), count)
        assert said in str(caught.value)


def test_a_layer_is_no_weight():
    with pytest.raises(TypeError, match="expected numbers, got Conv2d"):
        filter_components(torch.nn.Conv2d(3, 4, 2))

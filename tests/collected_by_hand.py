"""What the tests of `collect` share: data, models that fail, and the entropy of `Looking()` by numpy alone."""

import numpy as np
import pytest
import torch
from ranks import TOKENS, WIDTH, Looking, weights_of
from torch.utils.data import IterableDataset

from visualizer import VisualizerWarning
from visualizer.statistics import collect

ALIKE = 1e-12


SCALES = 0.5, 2.0  # of the layers of Looking()


def pictures(batches, size=3, seed=0):
    made = np.random.default_rng(seed).normal(size=(batches, size, 2, TOKENS, WIDTH))
    return torch.from_numpy(made.astype(np.float32))


def entropies(data):
    """(samples, layers, heads), of (batches, size, heads, tokens, width)."""
    data = np.asarray(data).reshape(-1, *data.shape[2:])
    layers = [weights_of(data, scale) for scale in SCALES]
    return np.stack([-(weights * np.log(weights)).sum(-1).mean(-1) for weights in layers], 1)


def check_entropy(found, data):
    expected = entropies(data)
    moments = found["entropy"]
    np.testing.assert_array_equal(np.full((2, 2), len(expected)), moments.count)
    np.testing.assert_allclose(moments.mean, expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.variance, expected.var(0, ddof=1), atol=1e-6)
    np.testing.assert_allclose(moments.minimum, expected.min(0), atol=1e-6)
    np.testing.assert_allclose(moments.maximum, expected.max(0), atol=1e-6)
    assert len(expected) == found.samples


def quietly(model, batches, *statistics, **kwargs):
    with pytest.warns(VisualizerWarning, match="failed and does not count"):
        return collect(model, batches, *statistics, **kwargs)


class Stream(IterableDataset):
    """Batches without a length, of which some fail."""

    def __init__(self, data, bad=()):
        self.data, self.bad = data, bad

    def __iter__(self):
        for number, batch in enumerate(self.data):
            if number in self.bad:
                raise OSError(f"{number} is damaged")
            yield batch


class Failing(Looking):
    """It fails in some calls, between its layers."""

    def __init__(self, *bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x, attention_mask=None, input_ids=None):
        self.layers[0](x)
        self.calls += 1
        if self.calls - 1 in self.bad:
            raise ArithmeticError("too hot")
        self.layers[1](x)


def stopping(data, after):
    yield from data[:after]
    raise KeyboardInterrupt


def counting(batches, seen):
    for batch in batches:
        seen.append(batch)
        yield batch

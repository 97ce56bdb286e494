"""`Statistic`: what torchmetrics promises of a metric, and a statistic of one's own."""

import copy
import pickle

import pytest
import torch
from statistics_by_hand import Batch, close, confidence_by_hand, entropy_by_hand, moments_by_hand
from torchmetrics import MetricCollection

from visualizer import AttentionMap
from visualizer.statistics import (
    Confidence,
    Distance,
    Entropy,
    MeanMap,
    Patterns,
    PrefixMass,
    Received,
    Sink,
    Statistic,
    Tokens,
    collect,
)
from visualizer.statistics.base import measured


def test_images_that_are_nan_are_no_samples():
    """As of a model that overflows: neither zeros, nor what looks like an entropy that has collapsed."""
    batch = Batch(4, 9, 0)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [9], [8]])).long()
    for statistic in (Entropy(), Confidence(), Received(), Sink(), PrefixMass(1), MeanMap()):
        for bad in ([1], [0, 1, 2, 3]):
            good = [image for image in range(4) if image not in bad]
            broken = torch.from_numpy(batch.weights[0].copy())
            broken[bad] = torch.nan
            [state] = measured(AttentionMap(broken), Tokens(mask), [statistic])
            expected = 0
            if good:
                [expected] = measured(AttentionMap(broken[good]), Tokens(mask[good]), [statistic])
                torch.testing.assert_close(expected, state, rtol=0, atol=0)
            else:
                assert 0 == state[0].max()


def test_an_argument_that_is_not_kept_is_refused():
    class Above(Statistic):
        def __init__(self, least, **kwargs):
            super().__init__(**kwargs)
            self.bound = least

    with pytest.raises(TypeError, match=r"Above does not keep its argument 'least' as self\.least"):
        collect(torch.nn.Identity(), [], Above(0.5))


class TestAsMetrics:
    """What torchmetrics promises of a metric."""

    def filled(self, batches=2):
        statistic = Entropy(name="width")
        for seed in range(batches):
            statistic.update(Batch(3, 9, seed).maps(True))
        return statistic

    def expected(self, *seeds):
        return moments_by_hand([Batch(3, 9, seed).by_hand(entropy_by_hand) for seed in seeds])

    def test_reset(self):
        statistic = self.filled()
        statistic.reset()
        assert statistic.moments.numel() == 0
        statistic.update(Batch(3, 9, 1).maps(True))
        close(self.expected(1), statistic.compute(), 1e-6)

    def test_clone_and_pickle_and_deepcopy(self):
        for twin in (self.filled().clone(), pickle.loads(pickle.dumps(self.filled())), copy.deepcopy(self.filled())):
            close(self.expected(0, 1), twin.compute(), 1e-6)
            twin.update(Batch(3, 9, 2).maps(True))
            close(self.expected(0, 1, 2), twin.compute(), 1e-6)
            assert "width" == twin.name

    def test_state_dict(self):
        statistic, other = self.filled(), Entropy()
        assert {} == statistic.state_dict()
        for metric in (statistic, other):
            metric.persistent(True)
        other.load_state_dict(statistic.state_dict())
        other.update(Batch(3, 9, 2).maps(True))
        close(self.expected(0, 1, 2), other.compute(), 1e-6)

    def test_in_a_collection(self):
        """Though their states have one name, and may be alike at first, each goes its own way."""
        collection = MetricCollection({"width": Entropy(), "sure": Confidence(), "again": Entropy()})
        batches = [Batch(3, 9, seed) for seed in range(3)]
        for batch in batches:
            collection.update(batch.maps(True))
        found = collection.compute()
        assert {"width", "sure", "again"} == set(found)
        close(self.expected(0, 1, 2), found["width"], 1e-6)
        close(self.expected(0, 1, 2), found["again"], 1e-6)
        close(moments_by_hand([batch.by_hand(confidence_by_hand) for batch in batches]), found["sure"], 1e-6)

    def test_forward_gives_the_batch_alone_and_keeps_all(self):
        statistic = Entropy()
        for seed in range(2):
            close(self.expected(seed), statistic(Batch(3, 9, seed).maps(True)), 1e-6)
        close(self.expected(0, 1), statistic.compute(), 1e-6)

    def test_compute_is_kept_until_the_next_update(self):
        statistic = self.filled(1)
        first = statistic.compute()
        assert first is statistic.compute()
        statistic.update(Batch(3, 9, 1).maps(True))
        close(self.expected(0, 1), statistic.compute(), 1e-6)
        statistic.add([measured(layer, Tokens(), [statistic])[0] for layer in Batch(3, 9, 2).maps(True)])
        close(self.expected(0, 1, 2), statistic.compute(), 1e-6)
        close(self.expected(0), first, 1e-6)

    def test_it_leaves_no_graph(self):
        weights = torch.from_numpy(Batch(3, 9, 0).weights).requires_grad_()
        statistic = Entropy()
        statistic.update(weights)
        assert not statistic.moments.requires_grad


def test_several_statistics_of_one_map_are_those_of_each():
    """Weights that are computed once for all of them, and by each for itself, are the same."""
    layer = Batch(3, 17, 0).maps(True)[0]
    statistics = [Entropy(), Distance(), Confidence(), Received(), Sink(), PrefixMass(), Patterns(), MeanMap("max")]
    together = measured(layer, Tokens(), statistics)
    for statistic, state in zip(statistics, together, strict=True):
        torch.testing.assert_close(statistic.reduced(layer, Tokens()), state, rtol=0, atol=1e-6, equal_nan=True)


class Reach(Statistic):
    """How much goes to keys no further than a reach, and beyond it."""

    axes = 1

    def __init__(self, reach, *, name=None, **kwargs):
        super().__init__(name=name, **kwargs)
        self.reach = reach

    def of(self, layer, tokens):
        count = layer.shape[3]
        apart = (torch.arange(count)[:, None] - torch.arange(count)).abs()
        weights = layer.dense()
        return torch.stack([weights[..., where].sum(-1) for where in (apart <= self.reach, apart > self.reach)], -1)


class TestOnesOwn:
    def test_it_is_as_the_others(self):
        batches = [Batch(size, 9, size) for size in (2, 3)]
        statistic = Reach(2)
        for batch in batches:
            statistic.update(batch.maps(True))

        def by_hand(weights, real, ids):
            near = sum(weights[i, j] for i in range(9) for j in range(9) if abs(i - j) <= 2)
            return [near, weights.sum() - near]

        close(moments_by_hand([batch.by_hand(by_hand) for batch in batches]), statistic.compute(), 1e-5)
        assert ("reach", {"statistic": "Reach", "reach": 2}) == (statistic.name, statistic.settings)

    @pytest.mark.parametrize(
        ("axes", "shape", "said"),
        [
            (0, (2, 3, 4), r"Wrong\.of gave the shape \(2, 3, 4\): it is \(batch, heads\), 2 axes"),
            (1, (2, 3), r"Wrong\.of gave the shape \(2, 3\): it is \(batch, heads, \.\.\.\), 3 axes"),
        ],
    )
    def test_of_gives_the_axes_it_says(self, axes, shape, said):
        wrong = type("Wrong", (Statistic,), {"axes": axes, "of": lambda self, layer, texts: torch.ones(shape)})()
        with pytest.raises(ValueError, match=said):
            wrong.update(Batch(2, 9, 0).maps(True))

    def test_without_of(self):
        with pytest.raises(NotImplementedError, match=r"Nothing has no method of\(layer, tokens\)"):
            type("Nothing", (Statistic,), {})().update(Batch(2, 9, 0).maps(True))


def test_scores_are_no_weights():
    scores = torch.randn(2, 3, 4, 5, 5)
    for statistic in (Entropy(), Received(), MeanMap()):
        with pytest.raises(ValueError, match=r"layer 0 holds .*: are these scores before the softmax"):
            statistic.update(scores)
        with pytest.raises(ValueError, match="are these scores before the softmax"):
            measured(AttentionMap(scores[0]), Tokens(), [statistic])

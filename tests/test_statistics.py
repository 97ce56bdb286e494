"""Statistics of attention against brute force over all samples in float64, alone and by `collect`."""

import copy
import gc
import itertools
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from zoo import PADDING, SIZE, SMALL, TEXT, timm_model, transformers_model

import visualizer
from visualizer import AttentionMap, attention
from visualizer.statistics import (
    Confidence,
    Distance,
    Entropy,
    MeanMap,
    Moments,
    Patterns,
    PrefixMass,
    Received,
    Sink,
    Statistic,
    Tokens,
    collect,
)
from visualizer.statistics.moments import empty_state, merge_states, state_of, to_one_shape
from visualizer.statistics.statistic import measured

L, H, WIDTH = 2, 3, 8


def softmax(scores):
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def moments_by_hand(samples):
    """Of arrays (layers, samples, heads, ...), NaN being no sample: count, mean, variance, minimum, maximum."""
    places = tuple(max(sizes) for sizes in zip(*(some.shape[2:] for some in samples), strict=True))
    grown = []
    for some in samples:
        whole = np.full((*some.shape[:2], *places), np.nan)
        whole[tuple(map(slice, some.shape))] = some
        grown.append(whole)
    found = np.concatenate(grown, 1)
    expected = np.full((5, found.shape[0], *places), np.nan)
    for place in np.ndindex(found.shape[0], *places):
        values = found[place[0]][(slice(None), *place[1:])]
        values = values[~np.isnan(values)]
        expected[(0, *place)] = len(values)
        if len(values):
            expected[(1, *place)] = math.fsum(values) / len(values)
            expected[(3, *place)], expected[(4, *place)] = values.min(), values.max()
        if len(values) > 1:
            mean = math.fsum(values) / len(values)
            expected[(2, *place)] = math.fsum((values - mean) ** 2) / (len(values) - 1)
    return expected


def close(expected, found, tolerance=1e-6):
    fields = ("count", "mean", "variance", "minimum", "maximum")
    assert isinstance(found, Moments)
    assert np.int64 == found.count.dtype
    for name, values in zip(fields, expected, strict=True):
        assert values.shape == getattr(found, name).shape, name
        np.testing.assert_allclose(values, getattr(found, name), rtol=0, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(np.sqrt(expected[2]), found.std, atol=1e-4)


# What each statistic is of one head's map (queries, keys) in float64, `real` saying which tokens are no padding.


def entropy_by_hand(weights, real, ids):
    rows = [-sum(w * math.log(w) for w in row if w > 0) for row in weights[real]]
    return np.mean(rows)


def confidence_by_hand(weights, real, ids):
    return weights[real].max(-1).mean()


def received_by_hand(weights, real, ids):
    columns = weights[real].sum(0)
    total = columns.sum()
    got = (columns / total if total else columns)[real]
    return np.concatenate([got, np.full(len(real) - len(got), np.nan)])


def sink_by_hand(key):
    def by_hand(weights, real, ids):
        got = received_by_hand(weights, real, ids)
        return got[key] if key < len(got) else np.nan

    return by_hand


def prefix_by_hand(weights, real, ids):
    return np.nansum(received_by_hand(weights, real, ids)[:2])


def patterns_by_hand(special_ids, window):
    def by_hand(weights, real, ids):
        places = np.flatnonzero(real)
        first = places[0]
        causal = not weights[first, first + 1 :].any()
        special = np.isin(ids, special_ids)
        if causal:
            special[first] = True
        told = {name: [] for name in Patterns.NAMES}
        for i in places:
            seen = [j for j in places if j <= i or not causal]
            if i > 0 and real[i - 1]:
                told["previous"].append(weights[i, i - 1])
            if i + 1 < len(real) and real[i + 1]:
                told["next"].append(weights[i, i + 1])
            told["self"].append(weights[i, i])
            told["local"].append(sum(weights[i, j] for j in range(len(real)) if abs(i - j) <= window))
            told["special"].append(weights[i, special].sum())
            if len(seen) > 1:
                told["broad"].append(-sum(w * math.log(w) for w in weights[i] if w > 0) / math.log(len(seen)))
            behind = [j + 1 for j in range(i - 1) if real[j] and ids[j] == ids[i] and j + 1 < i]
            if behind:
                told["induction"].append(weights[i, behind].sum())
        least = {name: 8 if name == "induction" else 1 for name in told}
        return [np.mean(told[name]) if len(told[name]) >= least[name] else np.nan for name in Patterns.NAMES]

    return by_hand


def mean_map_by_hand(weights, real, ids):
    return weights


CASES = {
    "entropy": (Entropy, entropy_by_hand),
    "confidence": (Confidence, confidence_by_hand),
    "received": (Received, received_by_hand),
    "sink": (Sink, sink_by_hand(0)),
    "sink of a later key": (lambda: Sink(9), sink_by_hand(9)),
    "prefix mass": (lambda: PrefixMass(2), prefix_by_hand),
    "patterns": (lambda: Patterns([0, 3], window=1), patterns_by_hand([0, 3], 1)),
}


class Batch:
    """A batch's maps in float64, query and key that they come from, and what is known of its tokens."""

    def __init__(self, texts, tokens, seed, padding=None, causal=False, heads=H):
        generator = torch.Generator().manual_seed(seed)
        self.pairs = 2 * torch.randn(L, 2, texts, heads, tokens, WIDTH, generator=generator)
        self.ids = torch.randint(0, 5, (texts, tokens), generator=generator)
        self.real = np.ones((texts, tokens), bool)
        for text in range(texts if padding else 0):
            gone = text * 5 % (tokens - 3)
            self.real[text, : gone if padding == "left" else 0] = False
            self.real[text, tokens - gone if padding == "right" else tokens :] = False
        self.causal = causal
        queries, keys = self.pairs.double().numpy().swapaxes(0, 1)
        scores = queries @ keys.swapaxes(-1, -2) / math.sqrt(WIDTH)
        self.allowed = np.broadcast_to(self.real[:, None, None], (texts, 1, tokens, tokens)).copy()
        if causal:
            self.allowed &= np.tril(np.ones((tokens, tokens), bool))
        scores = np.where(self.allowed, scores, -1e30)
        self.weights = softmax(scores) * self.allowed.any(-1, keepdims=True)

    def maps(self, fused):
        if not fused:
            return torch.from_numpy(self.weights)
        options = {"is_causal": self.causal}
        if not self.real.all():
            options["mask"] = torch.from_numpy(self.real)[:, None, None]
        return [AttentionMap.from_query_key(query, key, **options) for query, key in self.pairs]

    def mask(self):
        return None if self.real.all() else torch.from_numpy(self.real).long()

    def by_hand(self, function):
        """(layers, texts, heads, ...)."""
        ids = self.ids.numpy()
        return np.array(
            [
                [[function(head, real, own) for head in text] for text, real, own in zip(layer, self.real, ids)]
                for layer in self.weights
            ]
        )


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
            assert 3 == states[-1][:, 0].min()
        torch.testing.assert_close(*states, rtol=0, atol=0)


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


def test_a_text_without_tokens_has_no_prefix():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    statistic = PrefixMass(1)
    statistic.update(torch.full((1, 2, 1, 4, 4), 1 / 4), mask)
    assert ([[1]], [[0.25]]) == (statistic.compute().count.tolist(), statistic.compute().mean.tolist())


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


def test_scores_are_no_weights():
    scores = torch.randn(2, 3, 4, 5, 5)
    for statistic in (Entropy(), Received(), MeanMap()):
        with pytest.raises(ValueError, match=r"layer 0 holds .*: are these scores before the softmax"):
            statistic.update(scores)
        with pytest.raises(ValueError, match="are these scores before the softmax"):
            measured(AttentionMap(scores[0]), Tokens(), [statistic])


def test_patterns_are_those_of_tokens_among_themselves():
    with pytest.raises(ValueError, match="not of 4 queries to 6 keys"):
        Patterns().update(torch.full((1, 1, 1, 4, 6), 1 / 6))


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


def vit(fused=True):
    torch.manual_seed(0)
    model = timm_model("vit_small_patch16_224", fused=fused, **SMALL)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 40  # with which it attends to some patches more than to others
    return model


def pictures(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def kept_maps(model, *calls):
    """The weights of each call in float64: a list of (layers, batch, heads, queries, keys)."""
    found = []
    for call in calls:
        with attention(model) as maps, torch.no_grad():
            call(model)
        found.append(np.array([layer.dense().double().numpy() for layer in maps]))
    return found


def by_hand(weights, function, real=None):
    """(layers, batch, heads, ...)."""
    real = np.ones((weights.shape[1], weights.shape[-1]), bool) if real is None else real.numpy().astype(bool)
    return np.array(
        [[[function(head, own, None) for head in text] for text, own in zip(layer, real)] for layer in weights]
    )


class TestCollect:
    """The values; failures, checkpoints and processes are tested beside this."""

    SIZES = (3, 1, 4)

    def batches(self):
        return [pictures(size, seed=size) for size in self.SIZES]

    def expected(self, model, function):
        maps = kept_maps(model, *(lambda model, batch=batch: model(batch) for batch in self.batches()))
        return moments_by_hand([by_hand(weights, function) for weights in maps])

    @pytest.mark.parametrize("fused", [False, True], ids=["open", "fused"])
    def test_of_pictures(self, fused):
        model = vit(fused)
        found = collect(model, self.batches(), Entropy(), Received(), MeanMap(), progress=False)
        assert ["entropy", "received", "mean_map"] == list(found)
        assert (8, 3, []) == (found.samples, found.batches, found.failed)
        assert ("blocks.0.attn", "blocks.1.attn") == found.paths
        close(self.expected(model, entropy_by_hand), found["entropy"], 1e-5)
        close(self.expected(model, received_by_hand), found["received"], 1e-6)
        close(self.expected(model, mean_map_by_hand), found["mean_map"], 1e-6)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_of_texts_with_padding(self, implementation):
        torch.manual_seed(0)
        model = transformers_model("Bert", attention=implementation, **SIZE, **TEXT)
        ids = [torch.randint(0, 50, (2, length)) for length in (5, 7)]
        masks = [PADDING, torch.ones(2, 7, dtype=torch.long)]
        batches = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids, masks, strict=True)]
        found = collect(model, batches, Entropy(), Sink(), Received(), progress=False)
        maps = kept_maps(model, *(lambda model, batch=batch: model(**batch) for batch in batches))
        for name, function in (("entropy", entropy_by_hand), ("sink", sink_by_hand(0)), ("received", received_by_hand)):
            samples = [by_hand(weights, function, mask) for weights, mask in zip(maps, masks, strict=True)]
            close(moments_by_hand(samples), found[name], 1e-5)
        np.testing.assert_array_equal([4, 4, 4, 3, 3, 2, 2], found["received"].count[0, 0])

    @pytest.mark.parametrize("kind", ["tensor", "tuples", "lists", "mappings", "generator", "loader", "call"])
    def test_whatever_holds_batches(self, kind):
        model, whole = vit(), pictures(6)
        pairs = [(part, torch.zeros(2)) for part in whole.split(2)]

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(whole)

        batches, call = {
            "tensor": (torch.stack(whole.split(2)), None),
            "tuples": (pairs, None),
            "lists": ([list(pair) for pair in pairs], None),
            "mappings": ([{"x": part} for part, _ in pairs], None),
            "generator": ((part for part, _ in pairs), None),
            "loader": (torch.utils.data.DataLoader(Stream(), batch_size=2), None),
            "call": ([{"image": part} for part, _ in pairs], lambda model, batch: model(batch["image"])),
        }[kind]
        found = collect(model, batches, Confidence(), call=call, progress=False)
        assert (6, 3) == (found.samples, found.batches)
        [weights] = kept_maps(model, lambda model: model(whole))
        close(moments_by_hand([by_hand(weights, confidence_by_hand)]), found["confidence"], 1e-5)

    def test_under_autocast(self):
        """The maps are those of the query and key in half precision, and are themselves of full."""
        model, whole = vit(), pictures(4)
        with torch.autocast("cpu", torch.bfloat16):
            found = collect(model, whole.split(2), Entropy(), progress=False)
            [weights] = kept_maps(model, lambda model: model(whole))
        close(moments_by_hand([by_hand(weights, entropy_by_hand)]), found["entropy"], 1e-5)
        plain = collect(model, whole.split(2), Entropy(), progress=False)["entropy"].mean
        assert 1e-4 < abs(plain - found["entropy"].mean).max() < 1e-1

    def test_of_a_compiled_model(self):
        model, whole = vit(), pictures(4)
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        compiled(whole)
        found = collect(compiled, whole.split(2), Entropy(), progress=False)
        [weights] = kept_maps(model, lambda model: model(whole))
        close(moments_by_hand([by_hand(weights, entropy_by_hand)]), found["entropy"], 1e-5)

    def test_it_leaves_the_model_and_the_statistics_as_they_were(self):
        model = vit()
        model.train()
        model.blocks[0].eval()
        modes = [module.training for module in model.modules()]
        statistic = Entropy()
        statistic.update(Batch(2, 9, 0).maps(True))
        before = statistic.compute()
        found = collect(model, self.batches(), statistic, progress=False)
        assert modes == [module.training for module in model.modules()]
        assert before is statistic.compute()
        assert all(parameter.grad is None for parameter in model.parameters())
        np.testing.assert_array_equal(8, found["entropy"].count)  # without what it had before

    def test_no_map_outlives_its_call(self, monkeypatch):
        alive, most = weakref.WeakSet(), []
        make = AttentionMap._of.__func__

        def noted(cls, *args):
            most.append(len(alive))
            made = make(cls, *args)
            alive.add(made)
            return made

        monkeypatch.setattr(AttentionMap, "_of", classmethod(noted))
        gc.disable()  # by counting references alone
        try:
            found = collect(vit(), self.batches(), Entropy(), Distance(), progress=False)
        finally:
            gc.enable()
        assert 3 * 2 == len(most)
        assert 0 == max(most)
        assert not alive
        assert 8 == found.samples

    def test_it_prints_a_table(self):
        found = collect(vit(), self.batches(), Entropy(), Received(name="by position"), MeanMap(), progress=False)
        assert [
            "<statistics of 8 images or texts in 3 batches",
            "  statistic    numbers                        samples",
            "  entropy      2 layers, 4 heads              8",
            "  by position  2 layers, 4 heads, 17 of each  8",
            "  mean_map     2 layers, 4 heads, 17 x 17     8>",
        ] == repr(found).splitlines()
        assert "by position" in found._repr_html_()

    def test_a_name_that_is_not_there(self):
        found = collect(vit(), self.batches(), Entropy(), Sink(), progress=False)
        with pytest.raises(KeyError, match="there is no statistic 'distance'; there are 'entropy', 'sink'"):
            found["distance"]
        assert "distance" not in found
        assert 2 == len(found)

    def test_a_file_gives_it_again(self, tmp_path):
        found = collect(vit(), self.batches(), Entropy(), Received(), progress=False)
        found.save(tmp_path / "found.safetensors", about={"data": "noise"})
        again = visualizer.load(tmp_path / "found.safetensors")
        assert repr(found) == repr(again)
        assert ({"data": "noise"}, found.paths) == (again.about, again.paths)
        for name in found:
            for field in ("count", "mean", "variance", "minimum", "maximum"):
                np.testing.assert_array_equal(getattr(found[name], field), getattr(again[name], field))

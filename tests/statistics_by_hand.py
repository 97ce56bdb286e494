"""What the tests of statistics share: batches of made-up attention, and each number counted by loops."""

import math

import numpy as np
import torch

from visualizer import AttentionMap
from visualizer.statistics import (
    Moments,
    Patterns,
)

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

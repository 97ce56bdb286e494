"""Alignments against a computation by hand, step by step, and which heads show one."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from visualizer import AttentionMap, attention
from visualizer.analysis import align, monotony


def random_weights(*shape, seed=0):
    scores = np.random.default_rng(seed).normal(size=shape) * 2
    raised = np.exp(scores)
    return raised / raised.sum(-1, keepdims=True)


def median_by_hand(row, width):
    """Of each entry, with the row mirrored at its ends and the end itself not doubled."""
    reach, last = width // 2, len(row) - 1
    around = [[last - abs(last - abs(place + off)) for off in range(-reach, reach + 1)] for place in range(len(row))]
    return [sorted(row[place] for place in places)[reach] for places in around]


def best_sum_by_hand(weights):
    """The largest sum of a path that moves on by one query, one key, or both."""
    best = {}
    for i in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            before = [best[place] for place in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if place in best]
            best[i, j] = weights[i, j] + (max(before) if before else 0)
    return best[weights.shape[0] - 1, weights.shape[1] - 1]


@pytest.mark.parametrize("width", [1, 3, 7])
def test_it_is_what_the_steps_give_by_hand(width):
    """Renormalised over the keys that are left, standardised over all queries, filtered, averaged, and then cut."""
    weights = random_weights(2, 1, 3, 9, 20)
    found = align(torch.from_numpy(weights), [(0, 2), (1, 0)], queries=slice(2, 8), keys=slice(0, 15), median=width)
    heads = []
    for layer, head in found.heads:
        rows = weights[layer, 0, head][:, :15]
        rows = rows / rows.sum(-1, keepdims=True)
        rows = (rows - rows.mean(0)) / rows.std(0)
        heads.append([median_by_hand(row, width) for row in rows[2:8]])
    expected = np.mean(heads, 0)
    np.testing.assert_allclose(found.weights, expected, atol=1e-12)
    assert found.path[0].tolist() == [0, 0] and found.path[-1].tolist() == [5, 14]
    steps = np.diff(found.path, axis=0)
    assert ((steps >= 0) & (steps <= 1)).all() and (steps.sum(1) > 0).all()
    assert math.isclose(best_sum_by_hand(expected), expected[tuple(found.path.T)].sum())
    for query, (begin, end) in enumerate(found.spans):
        keys = found.path[found.path[:, 0] == query, 1]
        assert (begin, end) == (keys.min(), keys.max() + 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (2, 3), (30, 50)])
def test_the_path_has_the_largest_sum(shape):
    weights = random_weights(*shape, seed=sum(shape))
    found = align(weights[None, None], [(0, 0)], median=1)
    assert math.isclose(best_sum_by_hand(found.weights), found.weights[tuple(found.path.T)].sum())


def diagonal(queries=6, keys=24, share=0.7):
    """Each query gives its part of the keys a share, and the rest to all alike."""
    own = np.kron(np.eye(queries), np.ones(keys // queries)) * queries / keys
    return share * own + (1 - share) / keys


def test_spans_are_in_seconds():
    found = align(diagonal()[None, None], [(0, 0)], seconds_per_key=0.02, median=3)
    np.testing.assert_allclose(found.spans, np.stack([np.arange(6), np.arange(1, 7)], 1) * 4 * 0.02)
    assert "<Alignment of 6 queries and 24 keys by 1 heads>" == repr(found)


def test_what_every_query_gives_to_a_key_says_nothing():
    """A sink that takes nine tenths of each row changes no span."""
    weights = 0.1 * diagonal()
    weights[:, 13] += 0.9
    np.testing.assert_array_equal(
        align(diagonal()[None, None], [(0, 0)], median=1).spans, align(weights[None, None], [(0, 0)], median=1).spans
    )


def test_a_key_that_no_query_looks_at_is_no_division_by_zero():
    weights = np.pad(diagonal(), ((0, 0), (0, 3)))
    found = align(weights[None, None], [(0, 0)], median=1)
    assert np.isfinite(found.weights).all()
    np.testing.assert_array_equal(found.spans[:5], align(diagonal()[None, None], [(0, 0)], median=1).spans[:5])


def test_one_sequence_of_a_batch_is_aligned():
    weights = np.stack([random_weights(6, 24), diagonal()])[:, None]
    for batch in (1, -1):
        found = align(weights, "find", batch=batch, median=1)
        np.testing.assert_array_equal(found.spans[:, 0], np.arange(6) * 4)


def test_the_heads_that_follow_the_order_are_found():
    """And not a sink, not even attention, not the reversed order."""
    sink = np.zeros((6, 24))
    sink[:, 0] = 1
    heads = [random_weights(6, 24), sink, diagonal(share=0.99), np.full((6, 24), 1 / 24), diagonal()[::-1].copy()]
    layers = np.stack([np.stack(heads), np.stack(heads[::-1])])[:, None]
    found = align(layers)
    assert [(0, 2), (1, 2)] == found.heads
    with pytest.raises(ValueError, match="no head follows the order"):
        align(np.stack([sink, diagonal()[::-1]]))


def pairs_by_hand(rows):
    total, pairs = 0.0, 0
    for first in range(len(rows)):
        for second in range(first + 1, len(rows)):
            if not (rows[first].any() and rows[second].any()):
                continue
            pairs += 1
            for i, one in enumerate(rows[first] / rows[first].sum()):
                for j, other in enumerate(rows[second] / rows[second].sum()):
                    total += one * other * ((j > i) - (j < i))
    return total / pairs if pairs else math.nan


def test_monotony_is_what_all_pairs_of_picks_give():
    weights = random_weights(2, 2, 3, 7, 9)
    weights[:, 1, :, 3] = 0  # a query that attends to nothing
    weights[0, 0, 0, 1:] = 0  # one query is left
    found = monotony(weights, keys=slice(1, 8))
    assert (2, 2, 3) == found.shape
    for place in np.ndindex(found.shape):
        np.testing.assert_allclose(found[place], pairs_by_hand(weights[place][:, 1:8]), atol=1e-12)
    assert np.isnan(found[0, 0, 0]) and not np.isnan(found[1:]).any()


def test_of_an_encoder_decoder_the_cross_attention_is_read():
    """Layers count from the first of the cross-attention, as in Whisper's list of heads, and the kernels are fused."""
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 3, 3, 32, batch_first=True).eval()
    source, target = torch.randn(2, 10, 16), torch.randn(2, 4, 16)
    with attention(model) as maps, torch.no_grad():
        model(source, target)
    crossed = [one for one in maps if one.kind == "cross"]
    assert 3 == len(crossed) < len(maps)
    heads = [(1, 1), (2, 0)]
    found, expected = (align(layers, heads, batch=1, median=1) for layers in (maps, [one.dense() for one in crossed]))
    np.testing.assert_array_equal(expected.path, found.path)
    np.testing.assert_allclose(expected.weights, found.weights, atol=1e-5)


def test_the_calls_of_generate_are_one_layer():
    """One query a call, with a cache: as if the model had read the finished output at once."""
    transformers = pytest.importorskip("transformers", reason="comes with get-local[demo]")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    ).eval()
    source = torch.randint(2, 50, (1, 9))
    with torch.no_grad():
        with attention(model) as stepwise:
            written = model.generate(source, min_new_tokens=5, max_new_tokens=5, do_sample=False)
        with attention(model) as at_once:
            model(source, decoder_input_ids=written[:, :-1])
    heads = [(0, 1), (1, 0)]
    found, expected = (align(maps, heads, median=1) for maps in (stepwise, at_once))
    assert (5, 9) == found.weights.shape
    np.testing.assert_allclose(expected.weights, found.weights, atol=1e-4)
    np.testing.assert_array_equal(expected.path, found.path)


def test_layers_that_share_a_module_are_not_one():
    weights = torch.from_numpy(diagonal())[None, None]
    layers = [AttentionMap(weights.roll(number, -1), path="shared", kind="cross") for number in range(2)]
    np.testing.assert_array_equal(align(layers[1:], [(0, 0)]).path, align(layers, [(1, 0)]).path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": []}, ValueError, 'heads is empty: pass .layer, head. pairs, or "find"'),
        ({"heads": "all"}, ValueError, "heads='all': pass .find., or .layer, head. pairs"),
        ({"heads": [(2, 0)]}, IndexError, r"no head \(2, 0\): there are 2 layers"),
        ({"heads": [(1, 3)]}, IndexError, r"no head \(1, 3\): there are 3 heads"),
        ({"heads": [(-1, 0)]}, IndexError, r"no head \(-1, 0\)"),
        ({"median": 4}, ValueError, "median=4 is the width"),
        ({"batch": 1}, IndexError, "no batch 1: there are 1"),
        ({"queries": slice(5, 5)}, ValueError, "0 queries and 24 keys are left"),
        ({"keys": []}, ValueError, "6 queries and 0 keys are left"),
        ({"queries": [6]}, IndexError, "no query 6"),
    ],
)
def test_what_cannot_be_aligned_is_said(options, error, message):
    weights = np.broadcast_to(diagonal(), (2, 1, 3, 6, 24))
    with pytest.raises(error, match=message):
        align(weights, **{"heads": [(0, 0)], **options})


def test_layers_of_other_queries_and_keys_are_said():
    layers = [AttentionMap(torch.rand(1, 2, 3, keys), path=f"layers.{keys}", kind="cross") for keys in (4, 5)]
    with pytest.raises(ValueError, match=r"layer 0 \('layers.4'\) has the shape .*layer 1 \('layers.5'\)"):
        align(layers, [(0, 0)])

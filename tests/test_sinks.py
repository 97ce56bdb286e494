"""Attention sinks: tokens that draw far more than their share, found and taken out."""

import pickle
from typing import Any

import pytest
import torch

from visualizer import AttentionMap, Layout, analysis, attention, models
from visualizer.layout import Part


def test_an_even_map_has_no_sinks() -> None:
    assert not analysis.sinks(torch.full((2, 3, 30, 30), 1 / 30)).any()
    causal = torch.ones(30, 30).tril()
    assert not analysis.sinks(causal / causal.sum(-1, keepdim=True)).any()
    assert not analysis.sinks(torch.eye(30)).any()  # each token sees itself


def test_sinks_are_found_by_image_head_and_layer() -> None:
    weights = torch.full((2, 2, 3, 20, 20), 0.1 / 19)
    weights[...] = 1 / 20
    weights[1, 0, 2] = 0.4 / 19
    weights[1, 0, 2, :, 7] = 0.6
    assert analysis.sinks(weights).nonzero().tolist() == [[1, 0, 2, 7]]
    assert analysis.sinks(list(weights)).shape == (2, 2, 3, 20)
    assert not analysis.sinks(weights, times=15).any()
    assert isinstance(analysis.sinks(weights.numpy()), type(weights.numpy()))


def test_rows_without_sinks_are_rescaled() -> None:
    torch.manual_seed(0)
    query, key = 0.1 * torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    key[..., 0] = 0
    query[..., 0], key[:, 0, 3, 0] = 3.0, 9.0  # all look at the fourth, in the first head
    [clean] = analysis.without_sinks(AttentionMap.from_query_key(query, key, path="layer"))
    dense = AttentionMap.from_query_key(query, key).dense()
    assert analysis.sinks(dense).nonzero().tolist() == [[0, 0, 3]]
    expected = dense.clone()
    expected[:, 0, :, 3] = 0
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(clean.dense(), expected)
    assert clean.path == "layer"
    row = analysis.rollout([clean, clean], query=0)
    torch.testing.assert_close(row, analysis.rollout([expected, expected], query=0))


def test_a_row_of_nothing_but_sinks_stays() -> None:
    weights = torch.full((1, 1, 20, 20), 0.02 / 19)
    weights[..., 0] = 0.98
    weights[0, 0, 0] = torch.eye(20)[0]
    [clean] = analysis.without_sinks(weights)
    assert clean.rows([0])[0, 0, 0, 0] == 1
    assert clean.rows([1])[0, 0, 0, 0] == 0


def test_a_row_with_next_to_nothing_left_stays() -> None:
    weights = torch.full((1, 1, 20, 20), 0.5 / 19)
    weights[..., 3] = 0.5
    weights[0, 0, 5] = 1e-20
    weights[0, 0, 5, 3] = 1.0
    [clean] = analysis.without_sinks(weights)
    assert torch.equal(clean.rows([5]), weights[:, :, 5:6])
    torch.testing.assert_close(clean.dense().sum(-1), torch.ones(1, 1, 20))


def test_maps_without_sinks_know_their_tokens() -> None:
    made = AttentionMap(torch.full((1, 1, 20, 20), 1 / 20))
    made.layout = Layout((Part("patches", 20, shape=(4, 5)),))
    made.query_layout = None
    [clean] = analysis.without_sinks(made)
    assert clean.layout is made.layout
    assert clean.query_layout is None


def test_what_is_hidden_by_a_larger_sink_is_found_too() -> None:
    weights = torch.full((1, 1, 50, 50), 0.01 / 48)
    weights[..., 7], weights[..., 9] = 0.9, 0.09  # the second has 4.5 times its share, and of the rest nine tenths
    assert analysis.sinks(weights).nonzero()[:, -1].tolist() == [7, 9]
    clean = analysis.without_sinks(weights)
    assert not bool(analysis.sinks(clean[0].dense()).any())
    torch.testing.assert_close(analysis.rollout(weights, sinks="remove"), analysis.rollout(clean))


def test_of_few_tokens_a_sink_draws_more_than_half() -> None:
    for share, is_sink in ((0.45, False), (0.55, True)):
        weights = torch.full((6, 6), (1 - share) / 5)
        weights[:, 2] = share
        assert bool(analysis.sinks(weights)[..., 2].item()) == is_sink
        assert not bool(analysis.sinks(weights)[..., [0, 1, 3, 4, 5]].any())
    assert not bool(analysis.sinks(torch.tensor([[1.0, 0.0], [0.9, 0.1]])).any())  # one of two always has half


def test_rows_that_are_a_part_count_as_a_whole() -> None:
    weights = torch.full((1, 1, 20, 20), 0.5 / 19)
    weights[..., 3] = 0.5
    for whole in (weights, weights / 100):
        assert analysis.sinks(whole).nonzero().tolist() == [[0, 0, 3]]


def test_maps_without_sinks_can_be_pickled_and_moved() -> None:
    weights = torch.full((1, 1, 20, 20), 0.5 / 19)
    weights[..., 3] = 0.5
    [clean] = analysis.without_sinks(weights)
    for copy in (pickle.loads(pickle.dumps(clean)), clean.to("cpu")):
        assert torch.equal(clean.dense(), copy.dense())


def test_only_keep_and_remove_are_known() -> None:
    with pytest.raises(ValueError, match="sinks='hide': pass 'keep' or 'remove'"):
        analysis.rollout(torch.eye(3), sinks="hide")  # type: ignore[arg-type]


def test_times_is_above_one() -> None:
    for function in (analysis.sinks, analysis.without_sinks):
        with pytest.raises(ValueError, match="times=1: a sink draws more"):
            function(torch.eye(3), 1)


@pytest.mark.slow
def test_a_trained_vision_transformer_has_sinks_and_a_rollout_without(dinov2: Any) -> None:
    images, _ = models.prepare(models.photo("chelsea"))
    with torch.no_grad(), attention(dinov2) as maps:
        dinov2(images)
    found = analysis.sinks(maps)  # (layers, images, heads, tokens)
    per_head = found.sum(-1)
    assert bool((per_head[1:6] > 0).any(-1).all())
    assert int(found[1:6].any((0, 2)).sum()) < 30  # of 1025 tokens
    row, raw = (analysis.rollout(maps, query=0, sinks=sinks)[0, 1:] for sinks in ("remove", "keep"))
    assert float(raw.max() / raw.mean()) > 40  # one patch takes most of it
    assert float(row.max() / row.mean()) < 5


@pytest.mark.slow
def test_a_trained_language_model_sinks_into_its_first_token(smollm2: Any) -> None:
    model, tokenizer = smollm2
    words = "The cat sat on the mat, and the dog looked at it from the door of the house near the river. " * 2
    with torch.no_grad(), attention(model) as maps:
        model(**tokenizer(words, return_tensors="pt"))
    found = analysis.sinks(maps).any((1, 2))  # (layers, tokens)
    assert float(found[:, 0].float().mean()) > 0.5
    assert int(found.sum(0).argmax()) == 0

"""What heads do: each score against a count by hand, and the heads of trained models that are known for it."""

import math

import numpy as np
import pytest
import torch

from visualizer import AttentionMap, Layout, attention
from visualizer.analysis import head_patterns

N = 12
PATTERNS = ("previous", "next", "self", "local", "special", "broad", "induction", "vertical")
CAT = "The cat sat on the mat because it was tired."


def softmax(scores):
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def random_weights(*shape, seed=0, causal=False):
    scores = np.random.default_rng(seed).normal(size=shape) * 2
    if causal:
        scores = np.where(np.tri(shape[-1], dtype=bool), scores, -np.inf)
    return softmax(scores)


def by_hand(head, repeats, special, real, window, causal):
    """The scores of one head, entry by entry: head (texts, queries, keys), the rest (texts, tokens)."""
    found = {name: [] for name in (*PATTERNS, "even")}
    for text, weights in enumerate(head):
        tokens = range(len(weights))
        for i in [i for i in tokens if real[text][i]]:
            visible = [j for j in tokens if real[text][j] and not (causal and j > i)]
            if i - 1 in tokens and real[text][i - 1]:
                found["previous"].append(weights[i, i - 1])
            if i + 1 in tokens and real[text][i + 1]:
                found["next"].append(weights[i, i + 1])
            found["self"].append(weights[i, i])
            found["local"].append(sum(weights[i, j] for j in tokens if abs(i - j) <= window))
            found["special"].append(sum(weights[i, j] for j in tokens if special[text][j]))
            if len(visible) > 1:
                entropy = -sum(weights[i, j] * math.log(weights[i, j]) for j in tokens if weights[i, j] > 0)
                found["broad"].append(entropy / math.log(len(visible)))
            earlier = [j for j in range(i) if repeats[text][j] == repeats[text][i] and real[text][j]]
            after = [j + 1 for j in earlier if j + 1 < i]
            if after:
                found["induction"].append(sum(weights[i, j] for j in after))
            seen = np.array([j in visible for j in tokens])
            others = [k for k in tokens if k != i and real[text][k]]
            mean = [np.mean([weights[k, j] for k in others if not (causal and j > k)] or [0]) for j in tokens] * seen
            found["vertical"].append(np.minimum(weights[i], mean / max(mean.sum(), 1e-12)).sum())
            found["even"].append(np.minimum(weights[i], seen / seen.sum()).sum())
    return {name: np.mean(values) if values else math.nan for name, values in found.items()}


def even_attention(real, causal):
    """(texts, queries, keys): the same for all keys that a query may see."""
    seen = np.broadcast_to(np.asarray(real, float)[:, None], (len(real), N, N)) * (np.tri(N) if causal else 1)
    return seen / seen.sum(-1, keepdims=True).clip(1)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("window", [0, 2, 50])
def test_each_score_is_what_counting_gives(causal, padded, window, monkeypatch):
    at_once = AttentionMap._rows_at_once
    monkeypatch.setattr(AttentionMap, "_rows_at_once", lambda self, _: at_once(self, 1500))
    layers, texts, heads = 2, 3, 4
    weights = random_weights(layers, texts, heads, N, N, causal=causal)
    real = np.ones((texts, N), int)
    if padded:
        real[1, 9:] = 0
        real[2, :3] = 0
        weights = weights * real[:, None, None]
        weights /= weights.sum(-1, keepdims=True).clip(1e-9)
    ids = np.random.default_rng(2).integers(0, 4, (texts, N))
    special = np.zeros((texts, N), bool)
    special[:, [0, 5]] = True
    mask = torch.from_numpy(real) if padded else None
    found = head_patterns(weights, ids=ids, special=[0, 5], attention_mask=mask, window=window)
    if causal:  # of a causal map the first token that is no padding counts too
        special[range(texts), real.argmax(1)] = True
    for layer in range(layers):
        for head in range(heads):
            expected = by_hand(weights[layer, :, head], ids, special, real, window, causal)
            np.testing.assert_allclose(expected.pop("even"), found.uniform["vertical"][layer, head], atol=1e-12)
            assert {*PATTERNS} == expected.keys() == found.scores.keys() == found.uniform.keys()
            for name, score in expected.items():
                assert found.scores[name].shape == (layers, heads)
                np.testing.assert_allclose(score, found.scores[name][layer, head], atol=1e-12)
    even = by_hand(even_attention(real, causal), ids, special, real, window, causal)
    for name in {*PATTERNS} - {"vertical"}:
        np.testing.assert_allclose(even[name], found.uniform[name], atol=1e-12)


def one_head(weights, **options):
    return head_patterns(torch.as_tensor(np.array(weights), dtype=torch.float64)[None, None], **options)


def mixed(target, share=0.8):
    """A head that gives the share to one key of each query, and the rest to all alike."""
    return share * np.eye(N)[target] + (1 - share) / N


PLACES = np.arange(N)
IDEAL = {
    "vertical": (np.full(N, 5), {}),
    "previous": (np.maximum(PLACES - 1, 0), {}),
    "next": (np.minimum(PLACES + 1, N - 1), {}),
    "self": (PLACES, {}),
    "special": (np.zeros(N, int), {"special": [0]}),
    "local": (np.clip(PLACES + 2 * (-1) ** PLACES, 0, N - 1), {}),
    "induction": (PLACES * 7 % N, {}),  # overwritten below: it needs a text that repeats
    "mixed": (PLACES * 7 % N, {}),
}


class TestLabels:
    @pytest.mark.parametrize("name", [name for name in IDEAL if name != "induction"])
    def test_of_a_clear_head(self, name):
        target, options = IDEAL[name]
        assert name == one_head(mixed(target), **options).labels[0, 0]

    def test_two_keys_for_all_queries_are_vertical_and_one_of_two_by_turns_is_not(self):
        both = 0.4 * np.eye(N)[[5] * N] + 0.4 * np.eye(N)[[8] * N] + 0.2 / N
        assert "vertical" == one_head(both).labels[0, 0]
        assert "mixed" == one_head(mixed(np.where(PLACES % 2, 5, 8))).labels[0, 0]
        assert "the same keys for all queries: 1.00 of its attention (0.33 if it were even)" == one_head(both).evidence(
            0, 0
        )

    def test_of_induction(self):
        """A text of nine tokens, twice: each of the second half sees what came next in the first."""
        ids = np.tile(np.arange(9), 2)
        weights = np.full((18, 18), 1 / 18)
        for query in range(9, 17):
            weights[query] = 0.1 / 18 + 0.9 * np.eye(18)[query - 9 + 1]
        weights[17] = np.eye(18)[9]
        found = one_head(weights, ids=ids)
        assert "induction" == found.labels[0, 0]
        assert math.isclose((8 * (0.9 + 0.1 / 18) + 1) / 9, found.scores["induction"][0, 0])
        assert math.isclose(1 / 18, found.uniform["induction"][0, 0])
        assert "mixed" == one_head(weights).labels[0, 0]

    def test_few_repeats_are_no_evidence(self):
        for repeats, is_nan in ((7, True), (8, False)):
            ids = np.r_[np.zeros(1), np.arange(1, 12), np.arange(1, 1 + repeats)]
            found = one_head(np.full((len(ids), len(ids)), 1 / len(ids)), ids=ids)
            assert is_nan == np.isnan(found.scores["induction"][0, 0])

    def test_even_attention_is_broad(self):
        found = one_head(np.full((N, N), 1 / N), special=[0], ids=np.tile(np.arange(3), 4))
        assert "broad" == found.labels[0, 0]
        for name, score in found.scores.items():
            np.testing.assert_allclose(found.uniform[name], score, atol=1e-12)

    def test_even_causal_attention_is_broad(self):
        """Its first tokens give themselves much; but so does any head that may see nothing else."""
        found = one_head(np.tril(np.ones((N, N))) / np.arange(1, N + 1)[:, None])
        assert "broad" == found.labels[0, 0]
        assert 0 == found.scores["next"][0, 0]
        assert math.isclose(np.mean(1 / np.arange(1, N + 1)), found.uniform["special"][0, 0])

    @pytest.mark.parametrize(("gain", "label"), [(0.49, "mixed"), (0.51, "previous")])
    def test_half_of_the_way_from_even_attention(self, gain, label):
        weights = mixed(np.maximum(PLACES - 1, 0), gain)
        weights[0] = 1 / N
        found = one_head(weights, window=0)
        assert label == found.labels[0, 0]
        assert math.isclose(1 / N + gain * (1 - 1 / N), found.scores["previous"][0, 0])

    def test_the_most_specific_comes_first(self):
        """To the token before is nearby too, and where a window takes all in, it says nothing."""
        assert "previous" == one_head(mixed(np.maximum(PLACES - 1, 0), 1.0), window=3).labels[0, 0]
        assert "mixed" == one_head(mixed(IDEAL["mixed"][0]), window=N).labels[0, 0]

    def test_tokens_that_change_places_keep_what_they_hold(self):
        """Scores that ask for no order do not depend on it."""
        weights = random_weights(1, 1, 3, N, N)
        order = np.random.default_rng(0).permutation(N)
        found, again = head_patterns(weights, special=[4]), None
        again = head_patterns(weights[..., order, :][..., order], special=[int(np.flatnonzero(order == 4)[0])])
        for name in ("self", "special", "broad"):
            np.testing.assert_allclose(found.scores[name], again.scores[name], atol=1e-12)


class TestSpecial:
    def test_tokens_by_their_names(self):
        weights = random_weights(1, 2, 3, 5, 5)
        tokens = ["[CLS]", "a", "cat", "[SEP]", "[PAD]"]
        expected = weights[0][..., [0, 3, 4]].sum(-1).mean((0, 2))
        np.testing.assert_allclose(expected, head_patterns(weights, tokens).scores["special"][0], atol=1e-12)
        expected = weights[0][..., 2].mean((0, 2))
        named = head_patterns(weights, tokens, special=["cat"]).scores["special"][0]
        np.testing.assert_allclose(expected, named, atol=1e-12)
        np.testing.assert_allclose(expected, head_patterns(weights, special=-3).scores["special"][0], atol=1e-12)
        lists = [tokens, ["[CLS]", "b", "[SEP]", "[PAD]", "[PAD]"]]
        expected = (weights[0, 0][..., [0, 3, 4]].sum(-1) + weights[0, 1][..., [0, 2, 3, 4]].sum(-1)).mean(-1) / 2
        np.testing.assert_allclose(expected, head_patterns(weights, lists).scores["special"][0], atol=1e-12)

    def test_those_that_the_map_knows(self):
        """By their ids, whatever their names are."""
        made = AttentionMap(torch.from_numpy(random_weights(1, 2, 5, 5)))
        made.layout = made.query_layout = Layout.text(["«end»", "a", "b", "c", "[SEP]"], special=[0])
        expected = made.dense()[0, :, :, [0, 4]].sum(-1).mean(-1)
        np.testing.assert_allclose(expected, head_patterns(made).scores["special"][0], atol=1e-12)

    def test_without_any(self):
        assert np.isnan(head_patterns(random_weights(1, 1, 2, 5, 5), list("abcde")).scores["special"]).all()

    def test_the_first_token_of_a_causal_model(self):
        """And behind padding on the left, the first that is none."""
        weights = random_weights(1, 1, 2, 6, 6, causal=True)
        np.testing.assert_allclose(
            weights[0, 0, :, :, 0].mean(-1), head_patterns(weights).scores["special"][0], atol=1e-12
        )
        weights[..., 2:, :2] = 0
        weights[..., :2, :] = 0
        weights /= weights.sum(-1, keepdims=True).clip(1e-9)
        found = head_patterns(weights, attention_mask=[0, 0, 1, 1, 1, 1])
        np.testing.assert_allclose(weights[0, 0, :, 2:, 2].mean(-1), found.scores["special"][0], atol=1e-12)

    def test_a_first_query_that_sees_nothing_makes_no_causal_model(self):
        """Zeros stand at a masked query in both kinds of model."""
        weights = random_weights(1, 1, 2, 6, 6)
        weights[..., 0, :] = 0
        assert np.isnan(head_patterns(weights).scores["special"]).all()


@pytest.mark.parametrize("masked", [0.0, np.nan], ids=["zeros", "NaN"])
def test_texts_padded_on_the_left(masked):
    """Beside a text without padding, the rows of padding hold zeros in a fused kernel, and NaN in an open softmax."""
    weights = random_weights(1, 2, 3, 8, 8, causal=True)
    weights[:, 1, :, :, :3] = 0
    weights[:, 1] /= weights[:, 1].sum(-1, keepdims=True).clip(1e-9)
    weights[:, 1, :, :3] = masked
    found = head_patterns(weights, attention_mask=[[1] * 8, [0] * 3 + [1] * 5], window=1)
    real = [weights[0, 0], weights[0, 1, :, 3:, 3:]]
    previous = sum(text[:, range(1, text.shape[1]), range(text.shape[1] - 1)].sum(-1) for text in real) / (7 + 4)
    first = sum(text[:, :, 0].sum(-1) for text in real) / (8 + 5)
    np.testing.assert_allclose(previous, found.scores["previous"][0], atol=1e-12)
    np.testing.assert_allclose(first, found.scores["special"][0], atol=1e-12)
    assert np.isfinite(found.scores["broad"]).all()


class TestResult:
    def test_evidence(self):
        weights = np.stack(
            [mixed(IDEAL[name][0]) for name in ("previous", "local", "mixed")] + [np.full((N, N), 1 / N)]
        )
        found = head_patterns(weights[None])
        assert "previous token: 0.82 of its attention (0.08 if it were even)" == found.evidence(0, 0)
        assert found.evidence(0, 1).startswith("tokens nearby: 0.")
        assert found.evidence(0, 2).startswith("mixed: it fits no pattern; the nearest is ")
        assert "broad: 1.00 of the largest entropy" == found.evidence(0, -1)

    def test_evidence_of_one_token(self):
        """It has no neighbours, so no share of theirs is the largest."""
        expected = (
            "mixed: it fits no pattern; the nearest is the token itself: 1.00 of its attention (1.00 if it were even)"
        )
        assert expected == head_patterns(np.ones((1, 1, 1, 1, 1))).evidence(0, 0)

    def test_evidence_of_a_head_that_attends_to_nothing(self):
        found = head_patterns(np.zeros((1, 1, 1, 4, 4)))
        assert found.evidence(0, 0) == "mixed: its queries attend to nothing"
        assert all(np.isnan(score).all() for score in found.scores.values())

    def test_queries_that_attend_to_nothing_do_not_count(self):
        """Each head has its own."""
        weights = np.stack([np.eye(6), np.eye(6)])[None, None]
        weights[..., 1, 2:, :] = 0
        weights[..., 0, 0, :] = 0
        found = head_patterns(weights)
        assert found.scores["self"].tolist() == [[1, 1]]
        assert found.scores["broad"].tolist() == [[0, 0]]

    def test_its_table(self):
        weights = np.stack([mixed(IDEAL["previous"][0]), np.full((N, N), 1 / N)])
        found = head_patterns(np.stack([weights, weights[::-1]])[:, None])
        assert (
            "<patterns of 2 x 2 heads: 2 previous, 2 broad\n"
            "  layer  head 0    head 1\n"
            "  0      previous  broad\n"
            "  1      broad     previous>" == repr(found)
        )
        assert "<td" in found._repr_html_() and "previous" in found._repr_html_()
        assert (2, 2) == found.labels.shape

    @pytest.mark.parametrize(
        ("shape", "options", "said"),
        [
            ([(1, 2, 5, 5), (1, 2, 5, 6)], {}, ["layer 1 has 5 queries and 6 keys"]),
            ([(1, 2, 5, 5), (1, 3, 5, 5)], {}, ["layer 1 has the shape (1, 3, 5, 5), and layer 0 has (1, 2, 5, 5)"]),
            ([(2, 2, 3, 3)], {"tokens": ["a", "b"]}, ["a list of 3 words, or 2 such lists", "[2] in 2 lists"]),
            ([(2, 2, 3, 3)], {"ids": [1, 2]}, ["ids has the shape (2, 3) or (3,), not (2,)"]),
            ([(2, 2, 3, 3)], {"attention_mask": [[1, 1, 1], [0, 0, 0]]}, ["leaves a text without a token"]),
            ([(1, 2, 3, 3)], {"special": ["[CLS]"]}, ["has names: pass tokens"]),
            ([(1, 2, 3, 3)], {"special": [3]}, ["has the position 3, and there are 3 tokens"]),
            ([(1, 2, 3, 3)], {"window": -1}, ["window=-1"]),
        ],
    )
    def test_errors(self, shape, options, said):
        with pytest.raises(ValueError) as caught:
            head_patterns([random_weights(*one) for one in shape], **options)
        for part in said:
            assert part in str(caught.value)

    def test_windows_are_no_row_of_tokens(self):
        with pytest.raises(ValueError, match=r"layer 0 has another kind of attention \(window\)"):
            head_patterns(AttentionMap(torch.full((4, 1, 4, 4), 0.25), kind="window"))


class TestTrainedHeads:
    def test_of_minilm(self, minilm):
        model, tokenizer = minilm
        texts = [CAT, "[CLS] is a token of its own, and padding is none."]
        batch = tokenizer(CAT, return_tensors="pt")
        tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
        with attention(model) as maps, torch.inference_mode():
            model(**batch)
        found = head_patterns(maps, tokens)
        assert ("previous", "next") == (found.labels[0, 2], found.labels[1, 8])
        assert found.scores["previous"][0, 2] > 0.99
        assert "special" == found.labels[1, 11] and found.scores["special"][1, 11] > 0.8
        padded = tokenizer([CAT, " ".join(texts)], padding=True, return_tensors="pt")
        with attention(model) as maps, torch.inference_mode():
            model(**padded)
        again = head_patterns(
            [layer.rows(slice(None))[:1] for layer in maps],
            tokenizer.convert_ids_to_tokens(padded["input_ids"][0]),
            attention_mask=padded["attention_mask"][:1],
        )
        for name in found.scores:
            np.testing.assert_allclose(found.scores[name], again.scores[name], atol=2e-6)

    @pytest.mark.slow
    def test_of_smollm2(self, smollm2):
        """On random tokens, twice: its induction heads, and the sink at the first token that most heads have."""
        model, _ = smollm2
        half = torch.randint(1000, 40000, (2, 24), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([half, half], 1)
        with attention(model) as maps, torch.inference_mode():
            model(ids)
        found = head_patterns(maps, ids=ids)
        assert "induction" == found.labels[18, 6] and found.scores["induction"][18, 6] > 0.8
        assert (found.labels == "induction").sum() < 10
        assert 0 == found.scores["next"].max()
        assert (found.labels == "special").mean() > 0.3

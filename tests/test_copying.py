"""Retrieval scores by hand."""

import numpy as np
import pytest

from visualizer.analysis import retrieval

IDS = np.array([[9, 1, 2, 3, 8, 7, 1, 2, 3], [9, 1, 2, 4, 8, 7, 1, 2, 4]])


def looking_at(*targets):
    """(tokens, tokens): each query gives most to its target, the rest to all."""
    return 0.6 * np.eye(9)[list(targets)] + 0.4 / 9


def test_a_head_copies_where_it_looks_at_the_token_that_comes_next():
    heads = [
        looking_at(0, 0, 0, 0, 0, 1, 2, 3, 0),  # all three
        looking_at(0, 0, 0, 0, 0, 1, 1, 3, 0),  # two: query 6 looks at the needle, but not at what comes next
        looking_at(0, 0, 0, 0, 0, 6, 7, 8, 0),  # the right tokens, outside the needle
        np.zeros((9, 9)),  # attends to nothing
    ]
    weights = np.broadcast_to(np.stack(heads), (2, 2, 4, 9, 9))  # layers, texts
    found = retrieval(weights, IDS, needle=slice(1, 4), answer=slice(6, 9))
    np.testing.assert_allclose(found, np.broadcast_to([1, 2 / 3, 0, 0], (2, 2, 4)))
    np.testing.assert_allclose(retrieval(weights[0], IDS[0], needle=[1, 3], answer=[-3, -1]), [[1, 1, 0, 0]] * 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ids": IDS[:, :3]}, ValueError, r"ids has the shape \(1, 9\) or \(9,\), not \(2, 3\)"),
        ({"needle": slice(4, 4)}, ValueError, "at least one each"),
        ({"answer": [0, 1]}, ValueError, "has a token before it"),
        ({"answer": [9]}, IndexError, "no key 9"),
    ],
)
def test_what_does_not_fit_is_said(options, error, message):
    arguments = {"ids": IDS[0], "needle": slice(1, 4), "answer": slice(6, 9), **options}
    with pytest.raises(error, match=message):
        retrieval(looking_at(*[0] * 9), **arguments)


def test_queries_and_keys_must_be_the_same_tokens():
    with pytest.raises(ValueError, match="not 9 and 8 of them"):
        retrieval(np.full((9, 8), 1 / 8), IDS[0], needle=[1], answer=[6])

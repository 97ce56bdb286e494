"""Rewritten code has the lines and columns of the original, however far to the right they are."""

from itertools import groupby

import pytest

from visualizer.rewrite import Capture, rewrite
from visualizer.rewrite.line_table import line_table


def positions(code):
    return list(code.co_positions()), [line for line, _ in groupby(line for *_, line in code.co_lines() if line)]


def function(text):
    space = {}
    exec(compile(text, "somewhere", "exec"), space)
    return space["f"].__code__


@pytest.mark.parametrize("column", [1, 70, 79, 100, 127, 128, 200, 255, 256, 5000])
def test_a_table_that_is_made_anew_says_the_same(column):
    code = function(f"def f(x):\n    y = {' ' * column}x + 1\n\n\n    z = (x +\n{' ' * column}y)\n    return z\n")
    assert positions(code) == positions(code.replace(co_linetable=line_table(code)))


@pytest.mark.parametrize("column", [100, 128, 200, 300])
def test_lines_behind_far_columns_stay(column):
    code = function(f"def f(x):\n    y = {' ' * column}x + 1\n    z = y\n    return z\n")
    lines = sorted({line for line in positions(rewrite(code, Capture(("y",), "return", "k")))[1]})
    assert sorted(set(positions(code)[1])) == lines


def test_many_lines_at_once_and_backwards():
    code = function("def f(x):\n" + "\n" * 500 + "    for i in (\n\n\n        x):\n        y = i\n    return y\n")
    assert positions(code) == positions(code.replace(co_linetable=line_table(code)))

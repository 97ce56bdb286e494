"""The proof that a map is the one that was used: some of its rows, times the values, are what the kernel returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..maps import Factors, Samples, without_autograd

_ROWS = 2
_ROUNDING = {torch.float32: 16, torch.float64: 16}  # steps of the output's type at the largest value; others: 4


class Evidence:
    """How far some rows of a map, times the values, are from the rows of the output; computed, not yet read."""

    def __init__(self, rows: Tensor, values: Tensor, output: Tensor, size_of_scores: Callable[[], float]) -> None:
        self._gap = torch.matmul(rows, values.to(rows.dtype)).sub_(output)
        self._distance = torch.linalg.vector_norm(self._gap, math.inf)
        self._largest = values.abs().amax()  # a norm takes ten times as long
        self._rows, self._output, self._size_of_scores = rows, output, size_of_scores

    def doubt(self) -> str | None:
        """By how much the map is wrong, in words; None if it is right as far as the type of the output can tell."""
        largest, dtype = float(self._largest), self._output.dtype
        distance, step = float(self._distance), torch.finfo(dtype).eps * largest
        if math.isnan(distance):  # where the kernel returns no number there is nothing to compare
            distance = float(self._gap.masked_fill(self._output.isnan(), 0).abs().amax())
        allowed = _ROUNDING.get(dtype, 4) * step
        if not distance > allowed:
            return None
        # Scores are rounded too, the more the larger they are.
        allowed = allowed * max(1.0, float(self._rows.abs().sum(-1).amax())) + step * self._size_of_scores()
        if not distance > allowed:
            return None
        return f"by {distance:.2g}, where {str(dtype).removeprefix('torch.')} allows {allowed:.2g}"


@without_autograd
def of_fused(source: Factors, values: Tensor, output: Tensor, number: int) -> Evidence | None:
    """The evidence for query and key, (batch, heads, ...) like values and output; `number` varies which rows."""
    batch, heads, queries, keys = source.shape
    if not (batch * heads * queries * keys and values.shape[-1]):
        return None
    chosen, groups = _some(queries, number), heads // values.shape[1]
    if not source.has_functions:
        image, head = number % batch, number // batch % values.shape[1]
        rows = source.rows_of_head(image, head, chosen)
        output = output[image, head * groups : (head + 1) * groups, chosen]
        return Evidence(rows, values[image, head], output, lambda: source.of_head(image, head).size_of_scores(chosen))
    rows = source.rows(chosen)
    grouped = rows.reshape(batch, values.shape[1], -1, keys)
    output = output[:, :, chosen].reshape(*grouped.shape[:3], -1)
    return Evidence(grouped, values, output, lambda: source.size_of_scores(chosen))


@without_autograd
def of_weights(weights: Tensor, values: Tensor, output: Tensor, number: int) -> Evidence | None:
    """The evidence for weights (..., queries, keys), values (..., keys, width) and output (..., queries, width)."""
    if not (weights.numel() and output.numel()):
        return None
    chosen = _some(weights.shape[-2], number)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    return Evidence(weights[..., chosen, :].to(dtype), values, output[..., chosen, :], lambda: 0.0)


@without_autograd
def of_samples(source: Samples, values: Sequence[Tensor], output: Tensor, number: int) -> Evidence | None:
    """The evidence for points: values (batch, heads, width, height, width of a level) of each level."""
    batch, heads, queries, keys = source.shape
    if not (batch * heads * queries * keys and output.numel()):
        return None
    chosen, image, head = _some(queries, number), number % batch, number // batch % heads
    cells = torch.cat([level[image, head].flatten(1) for level in values], 1).mT
    one = source.of_head(image, head)
    return Evidence(one.rows(chosen)[0, 0], cells, output[image, head, chosen], source.largest_side)


def _some(queries: int, number: int) -> slice:
    start = 7 * number % max(1, queries - _ROWS + 1)
    return slice(start, start + _ROWS)

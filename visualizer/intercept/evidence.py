"""The proof that a map is the one that was used: some of its rows, times the values, are what the kernel returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..maps import Factors, HeadRows, Samples, without_autograd

_ROWS = 2
_AT_ONCE = 2**20  # how many numbers of values are compared in one product, at most
_ROUNDING = {torch.float32: 16, torch.float64: 16}  # steps of the output's type at the largest value; others: 4


class Evidence:
    """How far some rows of a map, times the values, are from the rows of the output.

    Args:
        rows: gives the rows, (..., some queries, keys).
        values, output: of these, which nobody changes until they are compared.
        size_of_scores: of what the rows are made of, asked only where the rows are not near.
        head: of a fused map without a mask, the head that the rows are of.
    """

    def __init__(
        self,
        rows: Callable[[], Tensor],
        values: Tensor,
        output: Tensor,
        size_of_scores: Callable[[], float],
        head: HeadRows | None = None,
    ) -> None:
        self._rows, self._output, self._size_of_scores, self._head = rows, output, size_of_scores, head
        self._values: Tensor | None = values
        """None once they are compared: there may be many."""
        self._gap: Tensor | None = None
        self._distance: float | Tensor = 0.0
        self._largest: float | Tensor = 0.0

    @property
    def nbytes(self) -> int:
        """The bytes that it holds until it is weighed."""
        return 0 if self._values is None else self._values.nbytes

    def weighed(self) -> Evidence:
        """The same, compared now; on a GPU the result is on its way."""
        if self._values is not None:
            rows = self._rows()
            gap = torch.matmul(rows, self._values.to(rows.dtype)).sub_(self._output)
            self._take(gap, gap.abs().amax(), self._values.abs().amax())  # a norm takes ten times as long
        return self

    def _take(self, gap: Tensor, distance: float | Tensor, largest: float | Tensor) -> None:
        self._gap, self._distance, self._largest, self._values = gap, distance, largest, None

    def doubt(self) -> str | None:
        """By how much the map is wrong, in words; None if it is right as far as the type of the output can tell."""
        gap = self.weighed()._gap
        assert gap is not None
        largest, dtype = float(self._largest), self._output.dtype
        distance, step = float(self._distance), torch.finfo(dtype).eps * largest
        if math.isnan(distance):  # where the kernel returns no number there is nothing to compare
            distance = float(gap.masked_fill(self._output.isnan(), 0).abs().amax())
        allowed = _ROUNDING.get(dtype, 4) * step
        if not distance > allowed:
            return None
        # Scores are rounded too, the more the larger they are.
        allowed = allowed * max(1.0, float(self._rows().abs().sum(-1).amax())) + step * self._size_of_scores()
        if not distance > allowed:
            return None
        return f"by {distance:.2g}, where {str(dtype).removeprefix('torch.')} allows {allowed:.2g}"

    @staticmethod
    @without_autograd
    def weigh(several: Sequence[Evidence]) -> None:
        """Compare several: those of a model's layers are mostly alike, and one product is quicker than one for each."""
        alike: dict[Any, list[Evidence]] = {}
        for one in several:
            head, values = one._head, one._values
            if head is not None and values is not None:
                alike.setdefault((*head.form, values.shape, values.dtype, one._output.dtype), []).append(one)
        for form, together in alike.items():
            count = max(1, _AT_ONCE // math.prod(form[-3]))
            for start in range(0, len(together), count):
                _weigh_alike(together[start : start + count])


def _weigh_alike(several: Sequence[Evidence]) -> None:
    heads = [one._head for one in several if one._head is not None]
    rows = HeadRows.of_several(heads)
    values = torch.stack([one._values for one in several if one._values is not None])
    gaps = torch.matmul(rows, values.to(rows.dtype)[:, None]).sub_(torch.stack([one._output for one in several]))
    sizes = [one.abs().flatten(1).amax(1) for one in (gaps, values)]
    distances, largest = torch.stack([one.to(gaps.dtype) for one in sizes]).tolist()
    for one, *told in zip(several, gaps, distances, largest, strict=True):
        one._take(*told)


@without_autograd
def of_fused(source: Factors, values: Tensor, output: Tensor, number: int) -> Evidence | None:
    """The evidence for query and key, (batch, heads, ...) like values and output; `number` varies which rows."""
    batch, heads, queries, keys = source.shape
    if not (batch * heads * queries * keys and values.shape[-1]):
        return None
    chosen, groups = _some(queries, number), heads // values.shape[1]
    if not source.has_functions:
        image, head = number % batch, number // batch % values.shape[1]
        own = output[image, head * groups : (head + 1) * groups, chosen].clone()
        return Evidence(
            lambda: source.rows_of_head(image, head, chosen),
            values[image, head].clone(),
            own,
            lambda: source.of_head(image, head).size_of_scores(chosen),
            HeadRows(source, image, head, chosen) if source.is_plain else None,
        )
    rows = source.rows(chosen)
    grouped = rows.reshape(batch, values.shape[1], -1, keys)
    output = output[:, :, chosen].reshape(*grouped.shape[:3], -1)
    return Evidence(lambda: grouped, values, output, lambda: source.size_of_scores(chosen)).weighed()


@without_autograd
def of_weights(weights: Tensor, values: Tensor, output: Tensor, number: int) -> Evidence | None:
    """The evidence for weights (..., queries, keys), values (..., keys, width) and output (..., queries, width)."""
    if not (weights.numel() and output.numel()):
        return None
    chosen = _some(weights.shape[-2], number)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    rows = weights[..., chosen, :].to(dtype)
    return Evidence(lambda: rows, values, output[..., chosen, :], lambda: 0.0).weighed()


@without_autograd
def of_samples(source: Samples, values: Sequence[Tensor], output: Tensor, number: int) -> Evidence | None:
    """The evidence for points: values (batch, heads, width, height, width of a level) of each level."""
    batch, heads, queries, keys = source.shape
    if not (batch * heads * queries * keys and output.numel()):
        return None
    chosen, image, head = _some(queries, number), number % batch, number // batch % heads
    cells = torch.cat([level[image, head].flatten(1) for level in values], 1).mT
    rows = source.of_head(image, head).rows(chosen)[0, 0]
    return Evidence(lambda: rows, cells, output[image, head, chosen], source.largest_side).weighed()


def _some(queries: int, number: int) -> slice:
    start = 7 * number % max(1, queries - _ROWS + 1)
    return slice(start, min(start + _ROWS, queries))

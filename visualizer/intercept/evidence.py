"""The proof that a map is the one that was used: some of its rows, times the values, are what the kernel returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maps import Factors, HeadRows, Samples, tokens_of, without_autograd

_AT_ONCE = 2**20  # how many numbers of values are compared in one product, at most
_WHOLE, _HEADS = (
    2**22,
    8,
)  # of kernels of others: so many numbers of keys are taken at once, or so many heads one by one
_ON_ONE_THREAD = 2**15  # so many torch works on alone; more of small maps would wake threads that sleep
_STEPS = {torch.float32: 16, torch.float64: 16}  # of the output's type at the largest value; others: 4


class _Known(NamedTuple):
    """Rows that exist, (..., some queries, keys)."""

    rows: Tensor
    size_of_scores: Callable[[], float]

    def weights(self) -> Tensor:
        """The rows."""
        return self.rows


class Evidence:
    """How far some rows of a map, times the values, are from the rows of the output.

    Args:
        rows: which, and how large the scores are that they are made of: asked only where they are not near.
        values, output: of these, which nobody changes until they are compared.
    """

    __slots__ = ("_distance", "_gap", "_is_near", "_largest", "_output", "_rows", "_values")

    def __init__(self, rows: HeadRows | _Known, values: Tensor, output: Tensor) -> None:
        self._rows, self._output = rows, output
        self._values: Tensor | None = values
        """None once they are compared: there may be many."""
        self._is_near = False

    @property
    def nbytes(self) -> int:
        """The bytes that it holds until it is weighed."""
        return 0 if self._values is None else self._values.nbytes

    def weighed(self) -> Evidence:
        """The same, compared now; on a GPU the result is on its way."""
        values = self._values
        if values is not None:
            rows = self._rows.weights()
            gap = torch.matmul(rows, values.to(rows.dtype)).sub_(self._output)
            self._take(gap, gap.abs().amax(), values.abs().amax())  # a norm takes ten times as long
        return self

    def _take(self, gap: Tensor, distance: float | Tensor, largest: Tensor) -> None:
        self._gap, self._distance, self._largest, self._values = gap, distance, largest, None

    def doubt(self) -> str | None:
        """By how much the map is wrong, in words; None if it is right as far as the type of the output can tell."""
        if self._values is not None:
            Evidence.weigh([self])
        if self._is_near:
            return None
        self.weighed()
        dtype, distance, largest = self._output.dtype, float(self._distance), float(self._largest)
        if math.isnan(distance):  # where the kernel returns no number there is nothing to compare
            distance = float(self._gap.masked_fill(self._output.isnan(), 0).abs().amax())
        allowed = _rounding(dtype) * largest
        if not distance > allowed:
            return None
        # Scores are rounded too, the more the larger they are.
        allowed *= max(1.0, float(self._rows.weights().abs().sum(-1).amax()))
        allowed += torch.finfo(dtype).eps * largest * self._rows.size_of_scores()
        if not distance > allowed:
            return None
        return f"by {distance:.2g}, where {str(dtype).removeprefix('torch.')} allows {allowed:.2g}"

    @staticmethod
    @without_autograd
    def weigh(several: Sequence[Evidence]) -> None:
        """Compare several: those of a model's layers are mostly alike, and one product is quicker than one for each."""
        alike: dict[Any, list[Evidence]] = {}
        for one in several:
            rows, values = one._rows, one._values
            if values is not None and type(rows) is HeadRows and (form := rows.form) is not None:
                alike.setdefault((form, values.shape[1], values.dtype, one._output.dtype), []).append(one)
        for (form, width, _, dtype), together in alike.items():
            size = form[0] * width
            count = max(1, (_ON_ONE_THREAD if 4 * size <= _ON_ONE_THREAD else _AT_ONCE) // size)
            for start in range(0, len(together), count):
                _weigh_alike(together[start : start + count], _rounding(dtype))


def _weigh_alike(several: Sequence[Evidence], rounding: float) -> None:
    rows: Any = [one._rows for one in several]
    values: Any = [one._values for one in several]
    products = HeadRows.products(rows, values)
    gaps = products - torch.stack([one._output for one in several])
    found = torch.stack((gaps, products)).abs().amax((2, 3, 4)).tolist()
    for place, (one, distance, size) in enumerate(zip(several, *found, strict=True)):
        # Rows that sum to one make nothing larger than the largest of the values, which takes longer to find.
        if distance <= rounding * size:
            one._is_near, one._values = True, None
        else:
            one._take(gaps[place], distance, values[place].abs().amax())


@lru_cache
def _rounding(dtype: torch.dtype) -> float:
    """By how much a number of this type is rounded, at most, where the largest is 1."""
    return _STEPS.get(dtype, 4) * torch.finfo(dtype).eps


@without_autograd
def of_fused(source: Factors, values: Tensor, output: Tensor, number: int, is_foreign: bool = False) -> Evidence | None:
    """The evidence for query and key, (batch, heads, ...) like values and output; `number` varies which rows.

    Of torch's own kernels two rows of a head are compared; of others, whose arguments may mean more than is known here,
    and of functions that change the scores, rows from all parts of the text and of all heads, or some of many.
    """
    batch, heads, queries, keys = source.shape
    if source.key_heads != values.shape[1]:  # each query head has values of its own then
        values = values.repeat_interleave(heads // values.shape[1], 1)
    _, key_heads, _, width = values.shape
    if not (batch * heads * queries * keys and width):
        return None
    if source.has_functions or is_foreign or key_heads != source.key_heads:
        chosen, total = _spread(queries, number, source.device), batch * key_heads
        if not is_foreign or source.has_functions or total * keys * width <= _WHOLE:
            several = torch.arange(total)
            rows = source.rows(chosen).reshape(total, -1, keys)
        else:  # all keys at once would be copied in a larger type
            several = torch.arange(number % -(-total // _HEADS), total, -(-total // _HEADS))
            one_by_one = [source.of_head(one // key_heads, one % key_heads) for one in several.tolist()]
            rows = torch.stack([one.rows(chosen).reshape(-1, keys) for one in one_by_one])
        several = several.to(source.device)
        at = several // key_heads, several % key_heads
        output = output[:, :, chosen].reshape(batch, key_heads, rows.shape[1], width)
        return Evidence(_Known(rows, lambda: source.size_of_scores(chosen)), values[at], output[at]).weighed()
    return of_plain(source.shape, values, output, number, _cloned)(source)


def of_plain(
    shape: Sequence[int], values: Tensor, output: Tensor, number: int, hold: Callable[..., Callable[[], list[Tensor]]]
) -> Callable[[Factors], Evidence]:
    """The same of one of torch's own kernels, of a map of that shape that holds numbers, once there is what it is of.

    Args:
        hold: copies tensors, and returns what makes the copies.
    """
    batch, heads, queries, keys = shape
    key_heads = values.shape[1]
    image, head, groups = number % batch, number // batch % key_heads, heads // key_heads
    places = _some(queries, number)
    own = tokens_of(output, image, head * groups, places.start, len(places), groups, places.step)
    held = hold(tokens_of(values, image, head, 0, keys), own)
    return lambda source: Evidence(HeadRows(source, image, head, places), *held())


@without_autograd
def of_weights(weights: Tensor, values: Tensor, output: Tensor, number: int) -> Evidence | None:
    """The evidence for weights (..., queries, keys), values (..., keys, width) and output (..., queries, width)."""
    if not (weights.numel() and output.numel()):
        return None
    chosen = _slice(_some(weights.shape[-2], number))
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    rows = weights[..., chosen, :].to(dtype)
    return Evidence(_Known(rows, float), values, output[..., chosen, :]).weighed()


@without_autograd
def of_samples(source: Samples, values: Sequence[Tensor], output: Tensor, number: int) -> Evidence | None:
    """The evidence for points: values (batch, heads, width, height, width of a level) of each level."""
    batch, heads, queries, keys = source.shape
    if not (batch * heads * queries * keys and output.numel()):
        return None
    chosen, image, head = _slice(_some(queries, number)), number % batch, number // batch % heads
    cells = torch.cat([level[image, head].flatten(1) for level in values], 1).mT
    rows = source.of_head(image, head).rows(chosen)[0, 0]
    return Evidence(_Known(rows, source.largest_side), cells, output[image, head, chosen]).weighed()


def _cloned(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    copies = [one.clone() for one in tensors]
    return lambda: copies


def _some(queries: int, number: int) -> range:
    """The numbers of two queries, one of each half: the first of a causal text see few keys, the last nearly all."""
    half = queries // 2
    if half == 0:
        return range(1)
    first, second = 7 * number % half, queries - 1 - 7 * number % (queries - half)
    return range(first, second + 1, second - first)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def _spread(queries: int, number: int, device: torch.device) -> Tensor:
    """The numbers of queries from all parts of a text; the last is always among them."""
    last = queries - 1
    return torch.tensor(sorted({7 * number % queries, last // 2, last - last // 4, last}), device=device)

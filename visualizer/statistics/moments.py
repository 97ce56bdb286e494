"""Count, mean, variance, minimum and maximum of numbers that come in parts: what adds up over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..store import as_html, as_text

Floats: TypeAlias = npt.NDArray[np.float64]

# What a state of no samples holds: count, mean, sum of squared deviations from the mean, minimum, maximum.
_NOTHING = (0.0, 0.0, 0.0, torch.inf, -torch.inf)


def nothing(shape: tuple[int, ...]) -> Tensor:
    """The state of no samples, (5, *shape), float64."""
    return torch.tensor(_NOTHING, dtype=torch.float64).view(5, *[1] * len(shape)).repeat(1, *shape)


def state_of(values: Tensor) -> Tensor:
    """The state of some samples: (samples, *shape) makes (5, *shape), float64. NaN is no sample."""
    values = values.double()
    is_one = ~values.isnan()
    count = is_one.sum(0).double()
    if not len(values):
        return nothing(tuple(values.shape[1:])).to(values.device)
    mean = torch.where(is_one, values, 0).sum(0) / count.clamp(min=1)
    squares = torch.where(is_one, values - mean, 0).square().sum(0)
    least = values.masked_fill(~is_one, torch.inf).amin(0)
    most = values.masked_fill(~is_one, -torch.inf).amax(0)
    return torch.stack([count, mean, squares, least, most])


def merged(states: Tensor) -> Tensor:
    """The state of all samples together: (parts, 5, *shape) makes (5, *shape).

    By the pairwise formula of Chan, Golub and LeVeque 1983 (https://doi.org/10.1080/00031305.1983.10483115), which
    loses nothing where a variance is small beside its mean.
    """
    count, mean, squares, least, most = states.unbind(1)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total.clamp(min=1)
    squares = (squares + count * (mean - centre).square()).sum(0)
    return torch.stack([total, centre, squares, least.amin(0), most.amax(0)])


def as_large(states: list[Tensor]) -> list[Tensor]:
    """States of one shape, the largest along each axis: what one of them has no place for has no samples there."""
    shape = tuple(map(max, zip(*(state.shape[1:] for state in states), strict=True)))
    grown = []
    for state in states:
        if tuple(state.shape[1:]) != shape:
            whole = nothing(shape).to(state.device)
            whole[tuple(map(slice, state.shape))] = state
            state = whole
        grown.append(state)
    return grown


@dataclass(eq=False)
class Moments:
    """What is known of a number over all samples, for each layer and head: arrays (layers, heads, ...), float64."""

    count: npt.NDArray[np.int64]
    """How many samples had the number."""
    mean: Floats
    """NaN where no sample had it, as in the other arrays."""
    variance: Floats
    """Of the samples, their squared deviations over count - 1; NaN of fewer than two."""
    minimum: Floats
    maximum: Floats

    @classmethod
    def of(cls, state: Tensor) -> Moments:
        """The moments that a state (5, ...) stands for."""
        count, mean, squares, least, most = state.detach().cpu().numpy().copy()
        none = count == 0
        variance = np.divide(squares, count - 1, out=np.full_like(squares, np.nan), where=count > 1)
        mean, least, most = (np.where(none, np.nan, values) for values in (mean, least, most))
        return cls(count.astype(np.int64), mean, variance, least, most)

    @property
    def std(self) -> Floats:
        """The standard deviation over the samples."""
        return np.sqrt(self.variance)

    def __repr__(self) -> str:
        return as_text(*self._table())

    def _repr_html_(self) -> str:
        return as_html(*self._table())

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        """Layers down, heads across where there are no further axes; else the means over these."""
        means, spread = self.mean, self.std
        if means.ndim > 2:
            return f"moments of {' x '.join(map(str, means.shape))} numbers, {_counted(self.count)}", [("layer",)]
        rows = [("layer", *(f"head {head}" for head in range(means.shape[1])))]
        for layer, (row, deviations) in enumerate(zip(means, spread, strict=True)):
            rows.append((str(layer), *(f"{m:.4g} ± {s:.2g}" for m, s in zip(row, deviations, strict=True))))
        return f"moments of {means.shape[0]} x {means.shape[1]} heads, {_counted(self.count)}", rows


def _counted(count: npt.NDArray[np.int64]) -> str:
    least, most = (int(count.min()), int(count.max())) if count.size else (0, 0)
    return f"{most} samples" if least == most else f"{least} to {most} samples"

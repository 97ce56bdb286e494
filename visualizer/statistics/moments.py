"""Count, mean, variance, minimum and maximum over a data set that comes in parts.

A state is a tensor (5, *shape), float64, that holds these as they add up. `Moments` are the same as arrays, to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..store import Printed

__all__ = ["Moments"]

Floats: TypeAlias = npt.NDArray[np.float64]

# Count, mean, sum of squared deviations from the mean, minimum, maximum of no samples.
_EMPTY = (0.0, 0.0, 0.0, torch.inf, -torch.inf)


def empty_state(shape: tuple[int, ...]) -> Tensor:
    """The state of no samples, (5, *shape), float64."""
    return torch.tensor(_EMPTY, dtype=torch.float64).view(5, *[1] * len(shape)).repeat(1, *shape)


def state_of(values: Tensor) -> Tensor:
    """The state (5, *shape) of samples (samples, *shape). NaN is no sample."""
    values = values.double()
    is_sample = ~values.isnan()
    count = is_sample.sum(0).double()
    if not len(values):
        return empty_state(tuple(values.shape[1:])).to(values.device)
    mean = torch.where(is_sample, values, 0).sum(0) / count.clamp(min=1)
    squares = torch.where(is_sample, values - mean, 0).square().sum(0)
    least = values.masked_fill(~is_sample, torch.inf).amin(0)
    most = values.masked_fill(~is_sample, -torch.inf).amax(0)
    return torch.stack([count, mean, squares, least, most])


def merge_states(states: Tensor) -> Tensor:
    """The state (5, *shape) of all samples in several states (parts, 5, *shape).

    This is the pairwise formula of Chan, Golub and LeVeque 1983 (https://doi.org/10.1080/00031305.1983.10483115), which
    stays exact where a variance is small beside its mean.
    """
    count, mean, squares, least, most = states.unbind(1)
    total = count.sum(0)
    centre = (count * mean).sum(0) / total.clamp(min=1)
    squares = (squares + count * (mean - centre).square()).sum(0)
    return torch.stack([total, centre, squares, least.amin(0), most.amax(0)])


def to_one_shape(states: list[Tensor]) -> list[Tensor]:
    """The states in one shape, the largest along each axis. Where a state had no place before, it has no samples."""
    shape = tuple(map(max, zip(*(state.shape[1:] for state in states), strict=True)))
    grown = []
    for state in states:
        if tuple(state.shape[1:]) != shape:
            whole = empty_state(shape).to(state.device)
            whole[tuple(map(slice, state.shape))] = state
            state = whole
        grown.append(state)
    return grown


@dataclass(repr=False, eq=False)
class Moments(Printed):
    """A number's moments over all samples, for each layer and head: arrays (layers, heads, ...), float64."""

    count: npt.NDArray[np.int64]
    """How many samples had the number."""
    mean: Floats
    """NaN where no sample had the number; so in the arrays that follow."""
    variance: Floats
    """The sum of squared deviations from the mean over count - 1; NaN for fewer than two samples."""
    minimum: Floats
    maximum: Floats

    @classmethod
    def of(cls, state: Tensor) -> Moments:
        """The moments in a state (5, layers, heads, ...)."""
        count, mean, squares, least, most = state.detach().cpu().numpy().copy()
        none = count == 0
        variance = np.divide(squares, count - 1, out=np.full_like(squares, np.nan), where=count > 1)
        mean, least, most = (np.where(none, np.nan, values) for values in (mean, least, most))
        return cls(count.astype(np.int64), mean, variance, least, most)

    @property
    def std(self) -> Floats:
        """The standard deviation over the samples."""
        return np.sqrt(self.variance)

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """Layers down, heads across; where there are further axes, only how many numbers there are."""
        means, spread = self.mean, self.std
        if means.ndim > 2:
            return f"moments of {' x '.join(map(str, means.shape))} numbers, {samples_in(self.count)} samples", [
                ("layer",)
            ]
        rows = [("layer", *(f"head {head}" for head in range(means.shape[1])))]
        for layer, (row, deviations) in enumerate(zip(means, spread, strict=True)):
            rows.append((str(layer), *(f"{m:.4g} ± {s:.2g}" for m, s in zip(row, deviations, strict=True))))
        return f"moments of {means.shape[0]} x {means.shape[1]} heads, {samples_in(self.count)} samples", rows


def samples_in(count: npt.NDArray[np.int64]) -> str:
    """The number of samples, for a table; the least and the most where the numbers differ."""
    least, most = (int(count.min()), int(count.max())) if count.size else (0, 0)
    return str(most) if least == most else f"{least} to {most}"

"""Where the rows of a deformable attention's map come from: the points that each query looks at, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .sources import computed_in, without_autograd


class Samples:
    """The sampling points of a deformable attention and their weights, from which the rows of a map are made.

    A query looks at a few points of one or several feature maps, the levels. A point lies between four cells, and its
    weight is shared among them by their distance, as bilinear interpolation does. What falls outside of a level is
    lost, as the kernel reads zeros there, so that a row may sum to less than one. The keys are the cells of all
    levels, row by row, one level behind the other.

    >>> import torch
    >>> samples = Samples(torch.tensor([[[[[0.5, 1.0]]]]]), torch.ones(1, 1, 1, 1), ((2, 2),), (1,))
    >>> samples.rows(slice(None))                 # half-way between the two cells of the lower row
    tensor([[[[0.0000, 0.0000, 0.5000, 0.5000]]]])
    >>> samples.points                            # in shares of the level's width and height
    tensor([[[[[0.5000, 0.7500]]]]])

    Args:
        cells: (batch, heads, queries, points, 2), the place (x, y) of each point, counted in cells of its level: the
            centre of the first cell is (0, 0).
        weights: (batch, heads, queries, points).
        sizes: (height, width) of each level.
        counts: how many of the points lie on each level: first all of the first level, then all of the second.
    """

    kept = "points and weights"
    """What is held, in words."""

    def __init__(self, cells: Tensor, weights: Tensor, sizes: Sequence[tuple[int, int]], counts: Sequence[int]) -> None:
        self._cells = cells
        self.weights = weights
        """The weight of each point, (batch, heads, queries, points): what the model's softmax made."""
        self.sizes = tuple((int(height), int(width)) for height, width in sizes)
        """(height, width) of each level."""
        self.counts = tuple(map(int, counts))
        """How many of a query's points lie on each level."""
        batch, heads, queries, _ = weights.shape
        keys = sum(height * width for height, width in self.sizes)
        self.shape = batch, heads, queries, keys
        self.dtype, self.device = weights.dtype, weights.device

    @property
    def levels(self) -> Tensor:
        """The number of the level that each point lies on: (points,), int64."""
        return torch.arange(len(self.counts), device=self.device).repeat_interleave(
            torch.tensor(self.counts, device=self.device)
        )

    @property
    def points(self) -> Tensor:
        """Where each point lies: (batch, heads, queries, points, 2), (x, y) in shares of its level's width and height.

        (0, 0) is the upper left corner of the picture, (1, 1) the lower right one; points may lie outside.
        """
        return (self._cells + 0.5) / self._of_points([(width, height) for height, width in self.sizes])

    def _of_points(self, per_level: Sequence[Any]) -> Tensor:
        """Numbers of each level, for each point."""
        return torch.tensor(per_level, device=self.device)[self.levels].to(self._cells.dtype)

    @without_autograd
    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries, (batch, heads, those queries, keys)."""
        dtype = computed_in(self.dtype)
        cells, weights = self._cells[:, :, queries].to(dtype), self.weights[:, :, queries].to(dtype)
        sizes = torch.tensor(self.sizes, device=self.device)[self.levels]
        starts = [0]
        for height, width in self.sizes[:-1]:
            starts.append(starts[-1] + height * width)
        first = torch.tensor(starts, device=self.device)[self.levels]
        rows = weights.new_zeros(*weights.shape[:3], self.shape[3])
        corner = cells.floor()
        for right in (0, 1):
            for below in (0, 1):
                x, y = corner[..., 0] + right, corner[..., 1] + below
                share = (1 - (cells[..., 0] - x).abs()) * (1 - (cells[..., 1] - y).abs())
                is_inside = (x >= 0) & (x < sizes[:, 1]) & (y >= 0) & (y < sizes[:, 0])
                # Far outside, or NaN, a place has no integer: it is taken for the first cell, with no weight.
                key = (y * sizes[:, 1] + x + first).where(is_inside, 0).long()
                rows.scatter_add_(-1, key, (weights * share).where(is_inside, 0))
        return rows

    def of_head(self, image: int, head: int) -> Samples:
        """The same of one image and head."""
        images, heads = slice(image, image + 1), slice(head, head + 1)
        return Samples(self._cells[images, heads], self.weights[images, heads], self.sizes, self.counts)

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> Samples:
        """The same with other batch and heads; `arrange` makes them of a tensor that has those of this one."""
        cells = arrange(self._cells.flatten(-2))
        return Samples(cells.reshape(*cells.shape[:-1], -1, 2), arrange(self.weights), self.sizes, self.counts)

    def largest_side(self) -> float:
        """How many cells lie side by side at most: the larger that number, the more a place is rounded."""
        return float(max(map(max, self.sizes)))

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [self._cells, self.weights]

    def to(self, device: torch.device | str) -> Samples:
        """The same on another device."""
        return Samples(self._cells.to(device), self.weights.to(device), self.sizes, self.counts)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file."""
        sizes = [list(size) for size in self.sizes]
        return {"cells": self._cells, "shares": self.weights, "sizes": sizes, "counts": list(self.counts)}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Samples:
        """What `packed` made, as it was."""
        return cls(packed["cells"], packed["shares"], packed["sizes"], packed["counts"])

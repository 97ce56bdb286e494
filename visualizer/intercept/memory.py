"""Copies of tensors: those that stay, and small ones that are soon let go of together."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_ROOM = 2**20  # bytes


def copied(tensor: Tensor) -> Tensor:
    """A copy that has its numbers one behind the other, without a graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class Room:
    """Makes small copies that are let go of together, soon, in one piece of memory.

    Among the tensors of a model, each would lie in the way of the next large one: the memory that a forward pass frees
    could not be used again.
    """

    def __init__(self) -> None:
        self._memory = bytearray()
        self._used = 0

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy as `Tensor.clone` makes it."""
        size: int = tensor.nbytes
        if not size or size > _ROOM // 4 or not tensor.is_cpu or type(tensor) is not Tensor:
            return tensor.clone()
        if not self._memory:
            self._memory = bytearray(_ROOM)
        if sys.getrefcount(self._memory) <= 2:  # no copy is left that holds it
            self._used = 0
        first = self._used
        if first + size > _ROOM:
            return tensor.clone()
        self._used = first + size + 63 & ~63  # as torch aligns tensors
        made = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
        return made.view(tensor.shape).copy_(tensor)

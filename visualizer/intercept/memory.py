"""Memory for copies: large ones that stay, in large pages, and small ones that do not, all in one place."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

_PAGE = 2**21  # bytes of a large page; smaller copies mostly lie in memory that is in use already
_BLOCK = 2**24  # that copies share which do not fill their last page
_ROOM = 2**20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux


def copied(tensor: Tensor) -> Tensor:
    """A copy that has its numbers one behind the other, without a graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class LargePages:
    """Makes copies that stay. Large ones on the CPU lie in large pages of memory, as far as the system has them: to get
    fresh memory in small pages takes several times as long as to copy the numbers.

    Some share a block, which goes with the last of them: whoever keeps a single one holds at most 16 MiB.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = 0

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy as the function of that name makes it."""
        size: int = tensor.nbytes
        if size < _PAGE or _ADVICE is None or not tensor.is_cpu or type(tensor) is not Tensor:
            return copied(tensor)
        block, first = self._block, self._used
        if block is None or first + size > len(block):
            # Only what is a multiple of large pages is made of them.
            length = _BLOCK if 2 * size <= _BLOCK else -(-size // _PAGE) * _PAGE
            try:
                block, first = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                block.madvise(_ADVICE)
            except OSError:  # a kernel without them
                return copied(tensor)
            self._block = block
        self._used = first + _rounded(size)
        return _copied_to(block, first, tensor.detach())


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
        if sys.getrefcount(self._memory) == 2:  # no copy is left that holds it
            self._memory, self._used = self._memory or bytearray(_ROOM), 0
        first = self._used
        if first + size > _ROOM:
            return tensor.clone()
        self._used = first + _rounded(size)
        return _copied_to(self._memory, first, tensor)


def _rounded(size: int) -> int:
    return size + 63 & ~63  # as torch aligns tensors


def _copied_to(memory: Any, first: int, tensor: Tensor) -> Tensor:
    """A copy in some memory, which it holds."""
    made = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
    return made.view(tensor.shape).copy_(tensor)

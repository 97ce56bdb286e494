"""Memory for copies: what the maps of a model took is used again for the next ones, once nobody holds these."""

from __future__ import annotations

import mmap
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

LEAST = 2**17
"""Copies of fewer bytes are left to the C allocator, which keeps those at hand by itself."""
MOST = 2**26
"""So many bytes wait for later copies, at most."""
# Not in the C allocator's heap: blocks that stay would part it, so that it grows with each pass.
_PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}


class _Loan(weakref.ref[Any]):
    """A block that a copy lies in, until the copy is gone."""

    __slots__ = ("block", "owner")
    block: mmap.mmap
    owner: weakref.ref[Memory]


class Memory:
    """Makes copies in memory that earlier copies had.

    A C allocator hands what is freed back to the system, where new memory has to be cleared, page by page: for query
    and key of a large pass that takes twice as long as to copy them.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}  # blocks by their sizes
        self._self = weakref.ref(self)
        self._lent = dict[int, _Loan]()

    @property
    def nbytes(self) -> int:
        """The bytes that wait for a copy."""
        return sum(size * len(blocks) for size, blocks in [*self._free.items()])

    def copied(self, tensor: Tensor) -> Tensor:
        """A contiguous copy, without autograd."""
        size = 0 if tensor.is_nested else tensor.nbytes
        if size < LEAST or not _is_plain(tensor):
            return tensor.detach().clone(memory_format=torch.contiguous_format)
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):  # another thread may have taken the last
            block = mmap.mmap(-1, size, **_PRIVATE)
        # The storage of the copy holds this view: it lives for as long as any tensor or array in the block.
        view = memoryview(block)
        loan = _Loan(view, _give_back)
        loan.block, loan.owner = block, self._self
        self._lent[id(loan)] = loan
        made = torch.frombuffer(view, dtype=tensor.dtype).view(tensor.shape)
        return made.copy_(tensor.detach() if tensor.requires_grad else tensor)

    def _take_back(self, loan: _Loan) -> None:
        self._lent.pop(id(loan), None)
        size = len(loan.block)
        if self.nbytes + size > MOST:
            self._free.clear()  # of what earlier passes had
        if size <= MOST:
            self._free.setdefault(size, []).append(loan.block)


def _is_plain(tensor: Tensor) -> bool:
    is_plain = type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided
    return is_plain and not tensor.is_quantized


def _give_back(loan: Any) -> None:
    memory = loan.owner()
    if memory is not None:
        memory._take_back(loan)

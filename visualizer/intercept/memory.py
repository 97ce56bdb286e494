"""Copies that stay, in large pages of memory: to get fresh memory in small ones takes longer than to copy numbers."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_PAGE = 2**21  # bytes of a large page; smaller copies mostly lie in memory that is in use already
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux


def copied(tensor: Tensor) -> Tensor:
    """A copy that has its numbers one behind the other, without a graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def copied_to_stay(tensor: Tensor) -> Tensor:
    """The same; of a large tensor on the CPU it lies in large pages, as far as the system has them."""
    if tensor.nbytes < _PAGE or _ADVICE is None or not tensor.is_cpu or type(tensor) is not Tensor:
        return copied(tensor)
    try:
        memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_ADVICE)
    except OSError:  # a kernel without them
        return copied(tensor)
    # The tensor holds the memory, which goes with the last tensor that lies in it.
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor.detach())

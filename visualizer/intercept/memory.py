"""Copies that stay, in large pages of memory: to get fresh memory in small ones takes longer than to copy numbers."""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor

_PAGE = 2**21  # bytes of a large page
_LEAST = 2**16  # smaller copies are made as quickly in memory as Python and torch give it
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux


def copied(tensor: Tensor) -> Tensor:
    """A copy that has its numbers one behind the other, without a graph."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class LargePages:
    """Makes copies of tensors on the CPU that lie in large pages, as far as the system has them.

    Small ones share a page, which goes with the last of them: whoever keeps a single one holds at most a page more.
    """

    def __init__(self) -> None:
        self._page: mmap.mmap | None = None
        self._used = 0

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy like those of the function of that name."""
        size: int = tensor.nbytes
        if size < _LEAST or _ADVICE is None or not tensor.is_cpu or type(tensor) is not Tensor:
            return copied(tensor)
        page, first = self._page, self._used
        if page is None or first + size > len(page):
            try:
                page, first = mmap.mmap(-1, max(size, _PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                page.madvise(_ADVICE)
            except OSError:  # a kernel without them
                return copied(tensor)
            self._page = page
        self._used = first + (size + 63) // 64 * 64
        made: Any = torch.frombuffer(page, dtype=tensor.dtype, count=tensor.numel(), offset=first)
        return made.view(tensor.shape).copy_(tensor.detach())  # type: ignore[no-any-return]

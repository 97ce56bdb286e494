"""Memory for copies: what the maps of a model took is used again for the next ones, once nobody holds these."""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

LEAST = 2**17
"""Copies of fewer bytes are left to the C allocator, which keeps those at hand by itself."""
MOST = 2**26
"""So many bytes wait for later copies, at most."""
_ALIGNED = 64  # bytes; as torch's own memory
_LARGEST_OF_GLIBC = 2**25 - 2**14
"""A little less than the largest block whose size glibc goes by."""
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
        _have_freed_memory_kept()
        self._free: dict[int, list[mmap.mmap]] = {}  # blocks by their sizes
        self._self = weakref.ref(self)
        self._lent = dict[int, _Loan]()

    @property
    def nbytes(self) -> int:
        """The bytes that wait for a copy."""
        return sum(size * len(blocks) for size, blocks in [*self._free.items()])

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy without gaps, and without autograd."""
        [copied] = self.held(tensor)()
        return copied

    def held(self, *tensors: Tensor, least: float = LEAST) -> Callable[[], list[Tensor]]:
        """Copies without gaps, made now and in one block; the tensors in it are made when what is returned is called.

        Their axes lie in memory as those of the tensors do: heads are mostly parts of each token, and to bring them
        apart goes through the memory of all tokens once for each head, which takes twice as long.

        Until then there is no object of torch: small ones that stay part the C allocator's heap too, where the model's
        activations were and are to be again.

        Args:
            least: of how many bytes copies have a block.
        """
        starts, size = [], 0
        for tensor in tensors if all(map(_is_plain, tensors)) else ():
            starts.append(size)
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if size < max(least, 1):
            copies = [one.detach().clone() for one in tensors]
            return lambda: copies
        view = self._block(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        forms = [
            (start, one.dtype, one.numel(), one.shape, _dense_strides(one))
            for start, one in zip(starts, tensors, strict=True)
        ]

        def make() -> list[Tensor]:
            return [
                torch.frombuffer(view, dtype=dtype, offset=start, count=count).as_strided(shape, strides)
                for start, dtype, count, shape, strides in forms
            ]

        for copied, one in zip(make(), tensors, strict=True):
            copied.copy_(one.detach() if one.requires_grad else one)
        return make

    def _block(self, size: int) -> memoryview:
        """The memory of an earlier copy, or new; it is free again when nobody has the view, or any tensor in it."""
        try:
            block = self._free[size].pop()
        except (KeyError, IndexError):  # another thread may have taken the last
            block = mmap.mmap(-1, size, **_PRIVATE)
        view = memoryview(block)
        loan = _Loan(view, _give_back)
        loan.block, loan.owner = block, self._self
        self._lent[id(loan)] = loan
        return view

    def _take_back(self, loan: _Loan) -> None:
        self._lent.pop(id(loan), None)
        size = len(loan.block)
        if self.nbytes + size > MOST:
            self._free.clear()  # of what earlier passes had
        if size <= MOST:
            self._free.setdefault(size, []).append(loan.block)


@cache
def _have_freed_memory_kept() -> None:
    """Have glibc keep up to 64 MB of what is freed, as it does once it has seen a large block freed.

    It goes by the largest up to now. Without it the heap that recording parts a little is handed back to the system and
    fetched anew in each pass, which takes longer than recording does. The block is never written: it takes no memory.
    """
    if sys.platform == "linux":
        torch.UntypedStorage(_LARGEST_OF_GLIBC)  # type: ignore[no-untyped-call]  # modes of torch would see a tensor


def _is_plain(tensor: Tensor) -> bool:
    is_plain = type(tensor) is Tensor and tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested
    return is_plain and not tensor.is_quantized and tensor.numel() > 0


def _dense_strides(tensor: Tensor) -> Sequence[int]:
    """The strides of a copy without gaps whose axes lie in the order of the tensor's."""
    shape, own = tensor.shape, tensor.stride()
    if tensor.is_contiguous():
        return own
    strides, size = [0] * len(own), 1
    for axis in sorted(range(len(own) - 1, -1, -1), key=own.__getitem__):  # of axes that are alike, the last first
        strides[axis] = size
        size *= shape[axis]
    return strides


def _give_back(loan: Any) -> None:
    memory = loan.owner()
    if memory is not None:
        memory._take_back(loan)

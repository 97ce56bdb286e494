"""Notices what no mode of torch sees: a function of somebody else that takes tensors of a module and makes another.

Each function that is seen makes tensors of others. A tensor that none of them made was made by something else, of the
tensors that none of them took. If these are three or more, and one is as large as what was made of them, as a query is,
that may have been an attention kernel; or if one is three times as large: query, key and value in one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from copy import copy
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from .calls import name_of

_PARTS = type(iter(()))


class _Known:
    """A tensor whose origin is known."""

    __slots__ = ("is_taken", "reference", "size")
    is_taken: bool

    def __init__(self, tensor: Tensor) -> None:
        self.reference = weakref.ref(tensor)
        self.size = tensor.numel() if tensor.ndim > 2 and tensor.is_floating_point() else 0


class Gap:
    """The tensors of one call of a module: which of them seen functions made, and which they took.

    Args:
        args, kwargs: what the module was called with.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        self._by_id: dict[int, _Known] = {}
        self._known: list[_Known] = []
        self.made(args)
        self.made(kwargs)

    def made(self, value: Any) -> None:
        """Take note of tensors that a seen function made, or a module that was called."""
        for tensor in _tensors(value):
            known = self._by_id.get(id(tensor))
            if known is None or known.reference() is not tensor:
                known = self._by_id[id(tensor)] = _Known(tensor)
                self._known.append(known)
            known.is_taken = known.size == 0  # neither query, key nor value

    def taken(self, value: Any) -> None:
        """Take note of tensors that a seen function took, or a module that was called."""
        for tensor in _tensors(value):
            known = self._by_id.get(id(tensor))
            if known is not None:
                known.is_taken = True

    def saw(self, func: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Take note of a function that has run; whether something unseen may have attended before it."""
        if _is_foreign(func):
            return False
        first = args[0] if args else None
        has_gap = self.is_of_gap(first)
        if isinstance(first, Tensor) and not self._is_known(first):
            self.made(first)
        made = tuple(copy(result)) if isinstance(result, _PARTS) else result  # as a tensor is unpacked
        if isinstance(made, (Tensor, list, tuple)) and not _makes_nothing(func):
            self.taken(args)
            if kwargs:
                self.taken(kwargs)
            self.made(made)
        return has_gap

    def is_of_gap(self, tensor: Any) -> bool:
        """Whether a tensor may be what an attention made that was not seen."""
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter) or self._is_known(tensor):
            return False
        size = tensor.numel() if tensor.ndim > 1 and tensor.is_floating_point() else 0
        left = [known.size for known in self._known if not known.is_taken]
        may_attend = 3 * size in left or (size in left and (len(left) > 2 or sum(left) >= 3 * size))
        return size > 0 and may_attend and not self._is_view(tensor)

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._by_id.get(id(tensor))
        return known is not None and known.reference() is tensor

    def _is_view(self, tensor: Tensor) -> bool:
        """Whether it is a part of a known tensor, such as one that was unpacked: no function is seen doing that."""
        place = tensor.untyped_storage().data_ptr()
        alive = (known.reference() for known in self._known)
        return any(one is not None and one.untyped_storage().data_ptr() == place for one in alive)


def _tensors(value: Any, depth: int = 2) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth - 1)


@lru_cache(maxsize=4096)
def _is_foreign(func: Any) -> bool:
    """Whether it is an operator of another library than torch."""
    name = getattr(func, "_qualified_op_name", None) or str(getattr(func, "_name", ""))
    return "::" in name and name.partition("::")[0] not in ("aten", "prim", "prims", "higher_order", "torch_attn")


@lru_cache(maxsize=4096)
def _makes_nothing(func: Any) -> bool:
    """Whether it only makes room, for something else to write to."""
    return name_of(func).startswith(("empty", "new_empty"))

"""Follows tensors from function to function: what is known of each, for as long as it lives."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

_SEVERAL = (list, tuple)


class Lineage(dict[int, tuple[weakref.ref[Tensor], Any]]):
    """By their ids, the tensors that are followed, and what is known of each; none is kept alive."""

    def follow(self, tensor: Any, origin: Any) -> None:
        """Know something of a tensor, in place of what was known. None: it is followed no further."""
        if origin is None:
            self.pop(id(tensor), None)
        elif isinstance(tensor, Tensor):
            number = id(tensor)
            self[number] = weakref.ref(tensor, lambda _: self.pop(number, None)), origin

    def may_know(self, items: Iterable[Any]) -> bool:
        """Whether one of a function's arguments may be followed: a quick look."""
        return any(id(item) in self or type(item) in _SEVERAL for item in items)

    def known_in(self, items: Iterable[Any]) -> Iterator[tuple[Tensor, Any]]:
        """The tensors that are followed, among a function's arguments, and what is known of each."""
        for item in items:
            known = self.get(id(item))
            tensor = None if known is None else known[0]()
            if known is not None and tensor is not None and tensor is item:
                yield tensor, known[1]
            elif isinstance(item, (list, tuple)):
                yield from self.known_in(item)

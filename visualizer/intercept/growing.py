"""The ids of texts and their padding, as lists that grow while a model writes.

Each step has a few numbers more than the one before: to copy all for each would take memory as the square of the steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..tensors import version_of


class Rows:
    """Numbers for each text of a batch. What was once read of these does not change while others with more grow.

    Args:
        lists: of which each text has the first `end`.
        room: how many come behind them that no token fills: of ids these are like the last, of padding 0.
        grows: whether the lists may become longer; those of others may not.
    """

    __slots__ = ("_grows", "end", "lists", "room")

    def __init__(self, lists: Sequence[Any], end: int, room: int = 0, *, grows: bool = False) -> None:
        self.lists, self.end, self.room, self._grows = lists, end, room, grows

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows) or self.end != other.end or self.room != other.room:
            return False
        return self.lists is other.lists or self.lists == other.lists

    __hash__ = None  # type: ignore[assignment]

    def with_room(self, room: int) -> Rows:
        """These, with so many places behind them."""
        return Rows(self.lists, self.end, room, grows=self._grows)

    def and_then(self, more: Sequence[Any]) -> Rows:
        """These, and behind them as many others for each text."""
        end = self.end + len(more[0])
        if self._grows and len(self.lists[0]) == self.end:
            for own, new in zip(self.lists, more, strict=True):
                own += new
            return Rows(self.lists, end, grows=True)
        return Rows([own[: self.end] + new for own, new in zip(self.lists, more, strict=True)], end, grows=True)

    def last(self, text: int, count: int) -> Sequence[int]:
        """The last so many numbers of a text."""
        row = self.lists[text]
        row = row[: self.end] + (row[self.end - 1 : self.end] if isinstance(row, list) else b"\0") * self.room
        return row[-count:]  # type: ignore[no-any-return]


class Lists:
    """The numbers of tensors as lists: all layers of a model are given the same few tensors, and of a GPU each list
    waits for it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int | None, list[list[int]]]] = {}

    def of(self, tensor: Tensor) -> list[list[int]]:
        """The numbers of a tensor of two axes; they are not to be changed."""
        known, version = self._known.get(id(tensor)), version_of(tensor)
        if known is None or version is None or known[1] != version or known[0]() is not tensor:
            if len(self._known) > 8:
                self._known.clear()
            known = self._known[id(tensor)] = weakref.ref(tensor), version, tensor.tolist()
        return known[2]


class Padding:
    """Which tokens of texts are none, as rows of 0 for padding and 1 for a token, a byte each."""

    def __init__(self) -> None:
        self._masks: dict[Any, tuple[weakref.ref[Tensor], int | None, Rows | None]] = {}
        self._in_cache: tuple[Sequence[int], Rows] = (), Rows((), 0)

    def of_mask(self, mask: Tensor, key: Any) -> Rows | None:
        """The rows of a mask of two axes; None where it has other numbers, such as those that are added to scores.

        Args:
            key: what masks have in common of which one has the numbers of the one before, and more.
        """
        known, version = self._masks.get(key), version_of(mask)
        if known is not None and version is not None and known[1] == version and known[0]() is mask:
            return known[2]
        rows = _rows_of(mask, None if known is None else known[2])
        self._masks[key] = weakref.ref(mask), version, rows
        return rows

    def before(self, counts: list[int], filled: int) -> Rows:
        """The rows of texts with so much padding before each, that are so long with it."""
        known, rows = self._in_cache
        if known != counts:
            rows = Rows([bytearray(count) for count in counts], max(counts), grows=True)
            for row in rows.lists:
                row += b"\1" * (rows.end - len(row))
        if filled > rows.end:
            rows = rows.and_then([b"\1" * (filled - rows.end)] * len(counts))
        self._in_cache = counts, rows
        return Rows(rows.lists, filled)


def _rows_of(mask: Tensor, before: Rows | None) -> Rows | None:
    """The rows of a mask; behind those of the mask before it, where it begins with them."""
    try:
        numbers = mask.numpy()
    except (RuntimeError, TypeError):  # it lies on another device, has a gradient, or a type that numpy lacks
        numbers = np.array(mask.tolist())
    are_tokens = numbers == 1
    if not (are_tokens | (numbers == 0)).all():
        return None
    whole, count = are_tokens.tobytes(), mask.shape[1]
    rows = [whole[start : start + count] for start in range(0, len(whole), count)]
    is_like = before is not None and len(before.lists) == len(rows) and before.end <= count
    if before is not None and is_like and all(map(bytes.startswith, rows, before.lists)):
        return before if before.end == count else before.and_then([row[before.end :] for row in rows])
    return Rows([*map(bytearray, rows)], count, grows=True)

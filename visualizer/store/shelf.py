"""`Shelf`: the values under one key and, column by column, where each of them comes from.

A number takes 32 bytes. An object that said where it comes from would take five times as many, so there is none: each
fact has a column, and `Record` objects are made when somebody reads.
"""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice
from operator import is_
from typing import Any, Protocol

from ..tensors import is_array, is_tensor
from .budget import Purse
from .locks import is_current
from .records import Record

_NO_LINE = -(2**63)
"""Stands for None in the column of the lines."""

call_order = count()
"""Numbers the calls of all functions in the order in which they begin: a limit keeps the most recent ones."""


class Source(Protocol):
    """Where values come from: the part of a `Channel` that the store and its shelves know."""

    calls: count[int]
    append: Any
    is_in_thread: Callable[[], bool]
    purse: Purse
    key_of: Callable[[str, str | None], str]

    def name_values(self, values: Any) -> Iterable[tuple[str, Any]]:
        """(variable, value) for each value of a `Put`."""

    def halt(self) -> None:
        """Append nothing directly any more."""

    def place(self) -> str:
        """The function, file and line, for messages."""


class Shelf:
    """The values under one key, and where each comes from.

    Everything but the appends of an open channel happens under the store's lock. An error or an interrupt may end each
    method anywhere: `size` is set last, so that columns of different lengths are noticed and repaired.
    """

    __slots__ = (
        *("begun", "calls", "filed", "is_light", "is_loose", "key", "lines", "most_calls"),
        *("origins", "run", "size", "table", "unsorted", "values"),
    )

    def __init__(self, key: str, values: list[Any]) -> None:
        self.key, self.values = key, values
        self.filed: list[Any] = []
        """The values as of the last filing: users may change their list, and their records have to follow."""
        self.calls, self.lines = array("q"), array("q")
        self.begun = array("q")
        """When each value's call began: its place in `call_order`."""
        self.origins = array("I")
        """For each value, the place of its (variable, thread, module) in `table`."""
        self.table: dict[tuple[str, int, str | None], int] = {}
        self.size = 0
        self.run: tuple[Source, int, int, int] | None = None
        """The channel that may append, from which place on, the number of its next call, and its origin."""
        self.is_light = True
        """Whether it has nothing but numbers, strings and plain arrays."""
        self.is_loose = False
        """Whether it may have more calls than the limit allows, to be dropped together before somebody reads."""
        self.most_calls = 0
        """The number of calls that have values here, or more."""
        self.unsorted = False
        """Whether a call may have several values, or lie behind one that began later."""
        if values:
            self.match(values)

    @property
    def is_held(self) -> bool:
        """Whether somebody else than the cache holds the list, and so may read or change it at any time."""
        return sys.getrefcount(self.values) > _REFERENCES

    def open(self, channel: Source, call: int, origin: tuple[str, int, str | None]) -> Callable[[Any], None]:
        """What lets a channel append values of one thread to the list directly, once it has it, until `close`.

        `call` is the number of the channel's next call. The caller has just seen that the list is in order.
        """
        self.run = channel, self.size, call, self._origin(origin)
        channel.is_in_thread = is_current[origin[1]]
        return self.values.append

    def close(self) -> None:
        """Let nobody append any more, and fill the columns for what was appended."""
        if self.run is None:
            return
        channel, start, call, origin = self.run
        channel.halt()
        end = len(self.values)
        # An interrupt leaves the run open, and each line goes on where it was left.
        self.filed.extend(self.values[len(self.filed) :])
        self.calls.extend(range(call + len(self.calls) - start, call + end - start))
        self.lines.extend(array("q", [_NO_LINE]) * (end - len(self.lines)))
        self.begun.extend(islice(call_order, end - len(self.begun)))
        self.origins.extend(array("I", [origin]) * (end - len(self.origins)))
        if end > start:
            channel.calls = count(call + end - start)
        self.most_calls += end - self.size
        self.size, self.run = end, None

    def add(
        self, value: Any, call: int, line: int | None, begun: int | None, origin: tuple[str, int, str | None]
    ) -> None:
        """Add a value at the end. `begun` is None where a value is all of its call."""
        is_new_call = begun is None
        if begun is None:
            begun = next(call_order)
        elif not self.begun or begun != self.begun[-1]:
            is_new_call = True
        self.unsorted = self.unsorted or not is_new_call or (bool(self.begun) and begun < self.begun[-1])
        self.most_calls += is_new_call
        place = self._origin(origin)
        self.values.append(value)
        self.filed.append(value)
        self.calls.append(call)
        self.lines.append(_NO_LINE if line is None else line)
        self.begun.append(begun)
        self.origins.append(place)
        self.size += 1

    def match(self, values: list[Any]) -> list[Any]:
        """Have the columns follow a list that a user may have changed; the values that are gone from it."""
        self.close()
        if self.values is values and self.size == len(values) == len(self.filed) and all(map(is_, values, self.filed)):
            return []
        whole = min(map(len, (self.filed, self.calls, self.lines, self.begun, self.origins)))
        places: dict[int, deque[int]] = defaultdict(deque)
        for place in range(whole):
            places[id(self.filed[place])].append(place)
        kept = [places[id(value)].popleft() if places.get(id(value)) else -1 for value in values]
        gone = [self.filed[place] for left in places.values() for place in left]
        variable = next(iter(self.table), ("", 0, None))[0]
        unknown = self._origin((variable, 0, None)) if -1 in kept else 0
        calls = array("q", [self.calls[place] if place >= 0 else -1 for place in kept])
        lines = array("q", [self.lines[place] if place >= 0 else _NO_LINE for place in kept])
        begun = array("q", [self.begun[place] if place >= 0 else next(call_order) for place in kept])
        origins = array("I", [self.origins[place] if place >= 0 else unknown for place in kept])
        number, filed, size = len(set(begun)), list(values), len(kept)
        self.unsorted = number < len(begun) or any(map(int.__gt__, begun, begun[1:]))
        # One line without a call: an interrupt comes before all of it or after.
        self.filed, self.calls, self.lines, self.begun, self.origins = filed, calls, lines, begun, origins
        self.values, self.size, self.most_calls = values, size, number
        return gone

    def trim(self, limit: int, slack: int) -> list[Any]:
        """Drop the oldest calls, if there are `slack` more than the limit; the values of these."""
        self.is_loose = slack > 0
        if self.most_calls <= limit + slack:
            return []
        if not self.unsorted:
            self.most_calls = limit
            return self.keep(range(max(0, self.size - limit), self.size))
        began = sorted(set(self.begun))
        self.most_calls = len(began)
        if len(began) <= limit + slack:
            return []
        self.most_calls, oldest = limit, began[-limit]
        return self.keep([place for place, call in enumerate(self.begun) if call >= oldest])

    def keep(self, places: Sequence[int]) -> list[Any]:
        """Keep what is at these places, which ascend; the values that are dropped."""
        first, end = (places[0], places[-1] + 1) if places else (0, 0)
        columns: Any = self.calls, self.lines, self.begun, self.origins
        if len(places) == end - first:  # all in a row, as usual
            dropped, filed = [*self.filed[:first], *self.filed[end:]], self.filed[first:end]
            calls, lines, begun, origins = (column[first:end] for column in columns)
        else:
            staying = set(places)
            dropped = [value for place, value in enumerate(self.filed) if place not in staying]
            filed = [self.filed[place] for place in places]
            calls, lines, begun, origins = (array(c.typecode, [c[place] for place in places]) for c in columns)
        size = len(filed)
        # No call from here to the end, so an interrupt comes before all of it or after; `dropped` holds what goes.
        self.values[:] = filed
        self.filed, self.calls, self.lines, self.begun, self.origins = filed, calls, lines, begun, origins
        self.size = size
        return dropped

    def records(self) -> list[Record]:
        """A record for each value."""
        table = list(self.table)
        return [
            Record(self.key, table[origin][0], value, call, None if line == _NO_LINE else line, *table[origin][1:])
            for value, call, line, origin in zip(self.filed, self.calls, self.lines, self.origins, strict=True)
        ]

    def restore(self, records: Iterable[Record]) -> None:
        """Add what was recorded elsewhere."""
        for record in records:
            self.add(record.value, record.call, record.line, None, (record.variable, record.thread, record.module))

    def _origin(self, origin: tuple[str, int, str | None]) -> int:
        return self.table.setdefault(origin, len(self.table))


def listed(values: Any) -> list[Any]:
    """A list of what a user has put in a list's place; of an array its rows."""
    if isinstance(values, list):
        return values
    has_rows = (is_array(values) or is_tensor(values)) and values.ndim > 0
    return list(values) if has_rows or isinstance(values, (tuple, deque)) else [values]


def _references() -> int:
    """How many references a list has that only a cache and its shelf hold, as `is_held` counts them."""
    values: list[Any] = []
    cache, shelf = {"": values}, Shelf("", values)
    del values
    return sys.getrefcount(shelf.values) if cache else 0


_REFERENCES = _references()

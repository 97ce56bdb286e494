"""Files what channels bring under its keys, within the limits on calls and bytes."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Protocol

from ..errors import warn
from ..tensors import bytes_by_device, memory_of
from .records import Cache, Record


class Source(Protocol):
    """Where values come from: a `Channel`, as far as the store knows it."""

    calls: count[int]

    key_of: Callable[[str, str | None], str]

    def flush(self, waiting: Waiting) -> None:
        """Move what is pending to what waits."""

    def adjust(self) -> None:
        """Look at the store's limits again."""

    def name_values(self, value: Any) -> Iterable[tuple[str, Any]]:
        """The variables with their values, of what was put."""

    def place(self) -> str:
        """The function, file and line, for messages."""


Waiting = deque[tuple[Source, Any, int, int | None, int, str | None, Sequence[Any], int]]
"""(source, value, call, line, thread, module, copies under way, their bytes) of what has arrived and is not filed yet.
`call` is -1 where calls are counted as they are filed. A bool for a value says from where on the source is recorded, or
no longer: a call of another thread that had found its channel before may bring its value at any time after."""


class Store:
    """Captured values under their keys, within the limits on calls and bytes.

    It holds its records, and its cache only weakly: whoever drops the cache drops the values at once.
    """

    def __init__(self, state: str, *, clear: str = "clear()", off: str = "stop()") -> None:
        self.state = state
        """Whether capture is active, in a few words for messages."""
        self.clearing, self.off = clear, off
        """What a user calls to empty it and to switch capture off, for messages."""
        self.limit: int | None = None
        self.max_bytes: int | None = None
        self.is_full = False
        self.about: dict[str, Any] = {}
        self._cache: Callable[[], Cache | None] = lambda: None
        self._lock = threading.RLock()
        _stores.add(self)
        self._waiting: Waiting = deque()
        self.missed: dict[Source, int] = {}
        """How many calls came too close to the recursion limit to be recorded, by source; told when somebody reads."""
        self._left: dict[str, int] = {}
        """How many bytes may still pend, by device, as of the last time that all was filed."""
        self._under_way = 0
        self._sources: list[Source] = []
        self._recorded: set[Source] = set()
        self._failure: BaseException | None = None
        self._records: dict[str, deque[tuple[Record, dict[str, int]]]] = {}
        self._bytes: dict[str, int] = {}
        self._budgets: dict[str, int] = {}

    @property
    def cache(self) -> dict[str, list[Any]]:
        """The lists by key, without fetching first."""
        cache = self._cache()
        return {} if cache is None else cache

    def fill(self, cache: Cache) -> None:
        """File in this cache from now on."""
        self._cache = weakref.ref(cache)

    def add(self, source: Source) -> None:
        """Take a source in, whose pending values are to be fetched."""
        with self._lock:
            self._sources.append(source)

    def remove(self, source: Source) -> None:
        """Let a source go that nothing will come from any more."""
        with self._lock:
            if source in self._sources:
                self._sources.remove(source)

    def switch(self, source: Source, on: bool) -> None:
        """File what a source brings from now on, or nothing but what it has brought by now."""
        with self._lock:
            source.flush(self._waiting)
            self._waiting.append((source, on, -1, None, 0, None, (), 0))

    def open(self, key: str) -> None:
        """Give a key its empty list, unless it has one."""
        with self._lock:
            self.cache.setdefault(key, [])
            self._records.setdefault(key, deque())

    def rename(self, old: str, new: str) -> None:
        """Move what is under one key to another."""
        with self._lock:
            self._sort_in()
            if old in self.cache:
                self.cache[new] = dict.pop(self.cache, old)
                self._records[new] = self._records.pop(old)
                for record, _ in self._records[new]:
                    record.key = new

    def drop_if_empty(self, key: str) -> None:
        """Forget a key that nothing was recorded under."""
        with self._lock:
            self._sort_in()
            if key in self.cache and not self._values(key):
                del self.cache[key], self._records[key]

    def clear(self) -> None:
        """Start over with empty lists under the same keys; lists that were read before keep their values."""
        with self._lock:
            self._sort_in()
            self._failure, self._records, self._bytes = None, {}, {}
            for key in list(self.cache):
                self.cache[key], self._records[key] = [], deque()
            for source in self._sources:
                source.calls = count()
            self._reopen()

    def configure(self, limit: int | None, max_bytes: int | None) -> None:
        """Set the limits for what is recorded from now on."""
        with self._lock:
            self._sort_in()
            self.limit, self.max_bytes = limit, max_bytes
            self._budgets.clear()
            self._reopen()

    def records(self) -> list[Record]:
        """Every value with where it comes from, in the order of the keys, then of the calls."""
        with self._lock:
            self.fetch()
            return [record for records in self._records.values() for record, _ in records]

    def last(self, key: str) -> Any:
        """The newest value that is filed under a key, or None."""
        records = self._records.get(key)
        try:
            return records[-1][0].value if records else None
        except IndexError:  # another thread has just cleared it
            return None

    def fail(self, error: BaseException) -> None:
        """Remember an error of a `keep` function: the captured function may have swallowed it.

        A copy without its traceback, which would hold on to the function's locals. That the recursion limit was met is
        the function's own affair.
        """
        if isinstance(error, RecursionError):
            return
        try:
            self._failure = copy.copy(error)
            self._failure.__notes__ = list(error.__notes__)
        except Exception:  # an exception that cannot be copied
            self._failure = RuntimeError(f"{error!r} {' '.join(error.__notes__)}")

    def settle(self) -> None:
        """File everything that has arrived."""
        with self._lock:
            self._sort_in()

    def fetch(self) -> None:
        """File everything that has arrived, and raise what a `keep` function raised meanwhile."""
        with self._lock:
            self._sort_in()
            failure, self._failure = self._failure, None
            missed, self.missed = self.missed, {}
        for source, number in missed.items():
            warn(f"{number} calls of {source.place()} came too close to the recursion limit to be recorded.")
        if failure is not None:
            raise failure

    def put(
        self,
        source: Source,
        value: Any,
        call: int,
        line: int | None,
        module: str | None = None,
        copies: Sequence[Any] = (),
    ) -> None:
        """File one call's value; see `Waiting`. What is still being copied is filed when it has arrived."""
        source.flush(self._waiting)
        size = sum(sum(bytes_by_device(item).values()) for _, item in source.name_values(value)) if copies else 0
        self._under_way += size
        self._waiting.append((source, value, call, line, get_ident(), module, copies, size))
        # Never wait for the lock here: whoever holds it, perhaps this very thread below us, files what waits.
        if self._lock.acquire(blocking=False):
            try:
                self._file_waiting(wait=size > 0 and self._under_way > self.room("cpu"))
            finally:
                self._lock.release()

    def room(self, device: str) -> int:
        """How many bytes may still be filed for a device."""
        return self._budget(device) - self._bytes.get(device, 0)

    def hold(self, sizes: dict[str, int]) -> None:
        """Count what pends in one of the sources, and file all that does before it can outgrow the budget."""
        for device, size in sizes.items():
            left = self._left.get(device)
            self._left[device] = left = (self.room(device) if left is None else left) - size
            if left < 0 and self._lock.acquire(blocking=False):  # else another thread is filing just now
                try:
                    self._sort_in(wait=False)
                finally:
                    self._lock.release()
                return

    def restore(self, keys: Iterable[str], records: Iterable[Record], about: dict[str, Any]) -> None:
        """Take in what a file had."""
        self.about = about
        for key in keys:
            self.open(key)
        for record in records:
            self._records[record.key].append((record, {}))
            self.cache[record.key].append(record.value)

    def _sort_in(self, wait: bool = True) -> None:
        self._left = {}
        self._file_waiting(wait)
        for source in self._sources:
            source.flush(self._waiting)
            self._file_waiting(wait)

    def _file_waiting(self, wait: bool) -> None:
        for _ in range(len(self._waiting)):  # what other threads add meanwhile is for the next time
            try:
                arrived = self._waiting.popleft()
            except IndexError:  # a captured function that ran in the middle of this, a finalizer's say, has filed it
                return
            source, value, call, line, thread, module, copies, size = arrived
            if copies:
                try:
                    is_there = wait or all(under_way.query() for under_way in copies)
                    if is_there:
                        for under_way in copies:
                            under_way.synchronize()
                except BaseException:
                    self._waiting.appendleft(arrived)
                    raise
                if not is_there:
                    self._waiting.appendleft(arrived)  # what came later waits too: the order is that of the calls
                    return
                self._under_way = max(0, self._under_way - size)
            if isinstance(value, bool):
                (self._recorded.add if value else self._recorded.discard)(source)
            elif source in self._recorded:
                if call < 0:
                    call = next(source.calls)
                for variable, item in source.name_values(value):
                    if not self.is_full:
                        self._file(Record(source.key_of(variable, module), variable, item, call, line, thread, module))

    def _file(self, record: Record) -> None:
        cache = self._cache()
        if cache is None:
            return
        key, sizes, is_over = record.key, bytes_by_device(record.value), None
        if not dict.__contains__(cache, key) or key not in self._records:  # or the user has taken it out
            self.open(key)
        values = dict.__getitem__(cache, key)  # its own would fetch first
        if len(self._records[key]) != len(values):
            self._follow_the_user(key, record)
        records = self._records[key]
        records.append((record, sizes))
        values.append(record.value)
        for device, size in sizes.items():
            self._bytes[device] = total = self._bytes.get(device, 0) + size
            if total > self._budget(device):
                is_over = device
        if self.limit is not None:
            self._trim(key)
            records = self._records[key]
            is_over = next((device for device in sizes if self._bytes[device] > self._budget(device)), None)
        if is_over is not None and records and records[-1][0] is record:
            records.pop()
            values.pop()
            self._discount(sizes)
            self._stop(key, is_over)

    def _values(self, key: str) -> list[Any]:
        """The list under a key, without fetching first: for those who are just filling it."""
        return self.cache.setdefault(key, [])

    def _follow_the_user(self, key: str, newest: Record) -> None:
        """Bring the records in line with a list that the user has taken values out of, or put some into."""
        known = {id(record.value): (record, sizes) for record, sizes in self._records[key]}
        for _, sizes in self._records[key]:
            self._discount(sizes)
        foreign = Record(key, newest.variable, None, -1, newest.line, newest.thread)
        self._records[key] = deque(known.get(id(value), (foreign, {})) for value in self._values(key))
        for _, sizes in self._records[key]:
            for device, size in sizes.items():
                self._bytes[device] += size

    def _trim(self, key: str) -> None:
        """Drop the oldest calls beyond the limit. A call makes one value at its return, any number by assignments."""
        records, values, limit = self._records[key], self._values(key), self.limit
        if limit is None or not records:
            return
        if records[-1][0].line is None:
            kept = list(range(max(0, len(records) - limit), len(records)))
        elif len(records) > 1 and records[-1][0].call == records[-2][0].call:
            return  # the call under way has its place already
        else:
            # Calls may interleave, so an old call's values can lie anywhere. The calls that are kept are few.
            calls = set(sorted({record.call for record, _ in records})[-limit:])
            kept = [place for place, (record, _) in enumerate(records) if record.call in calls]
        if len(kept) < len(records):
            staying, entries = set(kept), list(records)
            for place, (_, sizes) in enumerate(entries):
                if place not in staying:
                    self._discount(sizes)
            values[:] = [values[place] for place in kept]
            self._records[key] = deque(entries[place] for place in kept)

    def _discount(self, sizes: dict[str, int]) -> None:
        for device, size in sizes.items():
            self._bytes[device] -= size

    def _budget(self, device: str) -> int:
        if device not in self._budgets:
            self._budgets[device] = memory_of(device) // 4 if self.max_bytes is None else self.max_bytes
        return self._budgets[device]

    def _stop(self, key: str, device: str) -> None:
        self.is_full = True
        for source in self._sources:
            source.adjust()
        budget = "max_bytes" if self.max_bytes is not None else "a quarter of its memory"
        warn(
            f"captured values would take more than {self._budget(device):,} bytes on {device} ({budget}): {key!r} and "
            f"all that follows is not recorded, until {self.clearing}. If capture was left on by mistake, call "
            f"{self.off}; else keep less (limit=, keep=) or allow more (max_bytes=)."
        )

    def _reopen(self) -> None:
        self.is_full = False
        for source in self._sources:
            source.adjust()


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held is held for ever there, for that thread is not."""
    for store in _stores:
        store._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)

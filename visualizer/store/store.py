"""Files what channels bring under its keys, within the limits on calls and bytes."""

from __future__ import annotations

import copy
import os
import threading
import weakref
from _thread import get_ident
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

from ..errors import warn
from ..tensors import bytes_by_device, is_array, is_tensor, memory_of
from .records import Record

BATCH = 4096
"""How many numbers may wait before they are weighed: one by one they would take longer to weigh than to keep."""


class Source(Protocol):
    """Where values come from: a `Channel`, as far as the store knows it."""

    calls: count[int]

    key_of: Callable[[str, str | None], str]

    def adjust(self) -> None:
        """Look at the store's limits again."""

    def name_values(self, value: Any) -> Iterable[tuple[str, Any]]:
        """The variables with their values, of what was put."""

    def place(self) -> str:
        """The function, file and line, for messages."""


class Call:
    """A call whose values come one by one: its number, counted anew when the cache is cleared, and when it began."""

    __slots__ = ("began", "calls", "number")

    _begun = count()

    def __init__(self, source: Source) -> None:
        self.calls, self.began = source.calls, next(self._begun)
        self.number = next(self.calls)


Arrived = deque[tuple[Any, ...]]
"""(source, value, thread) of what has arrived and is not filed yet, in that order.

A value that was put has (call or None, line, module, copies under way, their bytes) behind it. A bool there says that
from here on the source is recorded, or no longer: a call of another thread that found its channel before may bring its
value at any time after.
"""

_Lists = dict[str, list[Any]]
"""A `Cache`, by which the values are read; only dict's own methods are called on it here."""

_Entry = tuple[Record, dict[str, int], Call | None]
"""A record, the bytes it takes, and its call, where that may have several values."""


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
        self.arrived: Arrived = deque()
        """Anybody may append to it without a lock."""
        self.many = BATCH
        """How many may wait until numbers among them are weighed."""
        self.missed: dict[Source, int] = {}
        """How many calls came too close to the recursion limit to be recorded, by source; told when somebody reads."""
        self._cache: Callable[[], _Lists | None] = lambda: None
        self._lock = threading.RLock()
        _stores.add(self)
        self._is_busy = False
        """If the thread that holds the lock is at work: finalizers and signal handlers that it runs have to wait."""
        self._left: dict[str, int] = {}
        """How many bytes may still wait, by device, as of the last filing."""
        self._under_way = 0
        self._sources: list[Source] = []
        self._recorded: set[Source] = set()
        self._failure: BaseException | None = None
        self._messages: list[str] = []
        self._records: dict[str, deque[_Entry]] = {}
        self._bytes: dict[str, int] = {}
        self._budgets: dict[str, int] = {}

    @property
    def cache(self) -> dict[str, list[Any]]:
        """The lists by key; all but `in`, `len` and iteration fetch first."""
        cache = self._cache()
        return {} if cache is None else cache

    def fill(self, cache: _Lists) -> None:
        """File in this cache from now on."""
        self._cache = weakref.ref(cache)

    def add(self, source: Source) -> None:
        """Take a source in, whose calls are counted anew when the cache is cleared."""
        with self._lock:
            self._sources.append(source)

    def remove(self, source: Source) -> None:
        """Let a source go that nothing will come from any more."""
        with self._lock:
            if source in self._sources:
                self._sources.remove(source)

    def switch(self, source: Source, on: bool) -> None:
        """File what a source brings from now on, or nothing but what it has brought by now."""
        self.arrived.append((source, None, 0, on))

    def abandon(self) -> None:
        """Drop what is not filed: nobody can read it any more, and it would hold the sources, which hold the store."""
        with self._lock:
            self.arrived.clear()
            self._recorded.clear()
            self._sources.clear()

    def open(self, key: str) -> None:
        """Give a key its empty list, unless it has one."""
        with self._lock:
            dict.setdefault(self.cache, key, [])
            self._records.setdefault(key, deque())

    def rename(self, old: str, new: str) -> None:
        """Move what is under one key to another."""
        self.settle()
        with self._at_work():
            if old in self.cache:
                dict.__setitem__(self.cache, new, dict.pop(self.cache, old))
                self._records[new] = self._records.pop(old, deque())
                for record, *_ in self._records[new]:
                    record.key = new

    def drop_if_empty(self, key: str) -> None:
        """Forget a key that nothing was recorded under."""
        self.settle()
        with self._at_work():
            if key in self.cache and not _listed(dict.__getitem__(self.cache, key)):
                dict.pop(self.cache, key)
                self._records.pop(key, None)

    def clear(self, sources: Iterable[Source] = ()) -> None:
        """Start over with empty lists under the same keys; lists that were read before keep their values.

        Calls are counted from 0 again, also those of `sources`, which are not recorded just now.
        """
        self.settle()
        with self._at_work():
            self._failure, self._records, self._bytes = None, {}, {}
            for key in list(self.cache):
                dict.__setitem__(self.cache, key, [])
                self._records[key] = deque()
            for source in [*self._sources, *sources]:
                source.calls = count()
            self._reopen()
        self._tell()

    def configure(self, limit: int | None, max_bytes: int | None) -> None:
        """Set the limits for what is recorded from now on."""
        with self._lock:
            self._file_arrived()
            self.limit, self.max_bytes = limit, max_bytes
            self._budgets.clear()
            self._reopen()

    def records(self) -> list[Record]:
        """Every value with where it comes from, in the order of the keys, then of the calls."""
        self.fetch()
        with self._lock:
            self.follow()
            with self._at_work():
                return [record for key in self.cache for record, *_ in self._records.get(key, ())]

    def follow(self, *keys: str) -> None:
        """Have the records follow what the user has made of the cache and its lists; of these keys, or of all."""
        cache = self._cache()
        with self._lock:
            if cache is None or self._is_busy:
                return
            with self._at_work():
                for key in keys or [*self._records, *(key for key in cache if key not in self._records)]:
                    values, records = dict.get(cache, key), self._records.get(key)
                    if (
                        isinstance(values, list)
                        and records is not None
                        and len(records) == len(values)
                        and all(record.value is value for (record, *_), value in zip(records, values, strict=False))
                    ):
                        continue
                    if key in cache:
                        self._follow_key(cache, key, keeps_kind=True)
                    else:
                        for _, sizes, _ in self._records.pop(key, ()):
                            self._discount(sizes)

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
            self._file_arrived()

    def fetch(self) -> None:
        """File everything that has arrived, and raise what a `keep` function raised meanwhile."""
        with self._lock:
            self._file_arrived()
            failure, self._failure = self._failure, None
            missed, self.missed = self.missed, {}
        self._tell()
        for source, number in missed.items():
            warn(f"{number} calls of {source.place()} came too close to the recursion limit to be recorded.")
        if failure is not None:
            raise failure

    def put(
        self,
        source: Source,
        value: Any,
        call: Call | None,
        line: int | None,
        module: str | None = None,
        copies: Sequence[Any] = (),
    ) -> None:
        """File one call's value; see `Arrived`. What is still being copied is filed when it has arrived."""
        size = sum(sum(bytes_by_device(item).values()) for _, item in source.name_values(value)) if copies else 0
        self._under_way += size
        self.arrived.append((source, value, get_ident(), (call, line, module, copies, size)))
        self._try_filing(wait=size > 0 and self._under_way > self.room("cpu"))

    def hold(self, sizes: dict[str, int]) -> None:
        """Count what has just arrived, and file all that has before it can outgrow the budget."""
        for device, size in sizes.items():
            left = self._left.get(device)
            self._left[device] = left = (self.room(device) if left is None else left) - size
            if left < 0:
                self._try_filing(wait=False)
                return

    def room(self, device: str) -> int:
        """How many bytes may still be filed for a device."""
        return self._budget(device) - self._bytes.get(device, 0)

    def restore(self, keys: Iterable[str], records: Iterable[Record]) -> None:
        """Take in what was recorded elsewhere."""
        for key in keys:
            self.open(key)
        for record in records:
            self._records[record.key].append((record, {}, None))
            dict.__getitem__(self.cache, record.key).append(record.value)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._lock:
            was_busy, self._is_busy = self._is_busy, True
            try:
                yield
            finally:
                self._is_busy = was_busy

    def _try_filing(self, wait: bool) -> None:
        # Never wait for the lock here: whoever holds it, perhaps this very thread below us, files what waits.
        if self._lock.acquire(blocking=False):
            try:
                self._file_arrived(wait)
            finally:
                self._lock.release()
            if self._messages:
                self._tell()

    def _file_arrived(self, wait: bool = True) -> None:
        """File what has arrived, or without `wait` what comes before the first that is still being copied.

        An error or an interrupt loses at most the one value that it meets.
        """
        if self._is_busy:
            return
        self._is_busy, left, self._left = True, self._left, {}
        try:
            for _ in range(len(self.arrived)):  # what other threads add meanwhile is for the next time
                if not self.arrived:  # the cache has been dropped just now, by what ended with a value
                    return
                source, value, thread, *more = self.arrived[0]
                known = more[0] if more else None
                if known is True:
                    self._recorded.add(source)
                elif known is False:
                    self._recorded.discard(source)
                elif known is not None and known[3]:
                    if not wait and not all(under_way.query() for under_way in known[3]):
                        self._left = left  # what came later waits too: the order is that of the calls
                        return
                    for under_way in known[3]:
                        under_way.synchronize()
                    self._under_way = max(0, self._under_way - known[4])
                self.arrived.popleft()
                if isinstance(known, bool) or source not in self._recorded:
                    continue
                call, line, module, *_ = (None, None, None) if known is None else known
                if call is None:
                    number = next(source.calls)
                else:
                    if call.calls is not source.calls:  # it began before the cache was cleared
                        call.calls, call.number = source.calls, next(source.calls)
                    number = call.number
                for variable, item in source.name_values((value,) if known is None else value):
                    if not self.is_full:
                        key = source.key_of(variable, module)
                        self._file(Record(key, variable, item, number, line, thread, module), call)
        finally:
            self._is_busy = False
            self.many = len(self.arrived) + BATCH

    def _file(self, record: Record, call: Call | None) -> None:
        cache = self._cache()
        if cache is None:
            return
        key, sizes, is_over = record.key, bytes_by_device(record.value), None
        values, records = dict.get(cache, key), self._records.get(key)
        if not isinstance(values, list) or records is None or len(records) != len(values):
            values, records = self._follow_key(cache, key)
        records.append((record, sizes, call))
        values.append(record.value)
        for device, size in sizes.items():
            self._bytes[device] = total = self._bytes.get(device, 0) + size
            if total > self._budget(device):
                is_over = device
        if self.limit is not None:
            records = self._trim(key, values, records, self.limit)
            is_over = next((device for device in sizes if self._bytes[device] > self._budget(device)), None)
        if is_over is not None and records and records[-1][0] is record:
            records.pop()
            values.pop()
            self._discount(sizes)
            self._stop(key, is_over)

    def _follow_key(self, cache: _Lists, key: str, keeps_kind: bool = False) -> tuple[list[Any], deque[_Entry]]:
        """The list under a key, whatever the user has made of it, and the records of what is in it."""
        values = _listed(dict.get(cache, key, ()))
        if not keeps_kind or key not in cache:
            dict.__setitem__(cache, key, values)
        known: dict[int, deque[_Entry]] = defaultdict(deque)
        variable = ""
        for entry in self._records.get(key, ()):
            known[id(entry[0].value)].append(entry)
            variable = entry[0].variable
        records: deque[_Entry] = deque()
        for value in values:
            same = known.get(id(value))
            records.append(same.popleft() if same else (Record(key, variable, value, -1, None, 0), {}, None))
        for gone in known.values():
            for _, sizes, _ in gone:
                self._discount(sizes)
        self._records[key] = records
        return values, records

    def _trim(self, key: str, values: list[Any], records: deque[_Entry], limit: int) -> deque[_Entry]:
        """Drop the oldest calls beyond the limit. A call makes one value at its return, any number by assignments."""
        newest = records[-1][2]
        if newest is None:
            kept = list(range(max(0, len(records) - limit), len(records)))
        elif len(records) > 1 and records[-2][2] is newest:
            return records  # the call under way has its place already
        else:
            # Calls may interleave, so an old call's values can lie anywhere. The calls that are kept are few.
            began = sorted({call.began for _, _, call in records if call is not None})[-limit:]
            others = [place for place, (_, _, call) in enumerate(records) if call is None]  # of another way to capture
            spare = set(others[len(others) - (limit - len(began)) :] if limit > len(began) else ())
            kept = [
                place
                for place, (_, _, call) in enumerate(records)
                if (place in spare if call is None else call.began >= began[0])
            ]
        if len(kept) < len(records):
            staying, entries = set(kept), list(records)
            for place, (_, sizes, _) in enumerate(entries):
                if place not in staying:
                    self._discount(sizes)
            values[:] = [values[place] for place in kept]
            self._records[key] = records = deque(entries[place] for place in kept)
        return records

    def _discount(self, sizes: dict[str, int]) -> None:
        for device, size in sizes.items():
            self._bytes[device] = self._bytes.get(device, 0) - size

    def _budget(self, device: str) -> int:
        if device not in self._budgets:
            self._budgets[device] = memory_of(device) // 4 if self.max_bytes is None else self.max_bytes
        return self._budgets[device]

    def _stop(self, key: str, device: str) -> None:
        self.is_full = True
        for source in self._sources:
            source.adjust()
        budget = "max_bytes" if self.max_bytes is not None else "a quarter of its memory"
        self._messages.append(
            f"captured values would take more than {self._budget(device):,} bytes on {device} ({budget}): {key!r} and "
            f"all that follows is not recorded, until {self.clearing}. If capture was left on by mistake, call "
            f"{self.off}; else keep less (limit=, keep=) or allow more (max_bytes=)."
        )

    def _tell(self) -> None:
        """Warn of what came up, without the lock: what shows a warning may wait for a thread that is reading."""
        while self._messages and not self._is_busy:
            warn(self._messages.pop(0))

    def _reopen(self) -> None:
        self.is_full = False
        for source in self._sources:
            source.adjust()


def _listed(values: Any) -> list[Any]:
    """What the user has put in a list's place, as a list: of an array its rows."""
    if isinstance(values, list):
        return values
    has_rows = (is_array(values) or is_tensor(values)) and values.ndim > 0
    return list(values) if has_rows or isinstance(values, (tuple, deque)) else [values]


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held is held for ever there, for that thread is not."""
    for store in _stores:
        if store._lock.acquire(blocking=False):  # nobody's, or this thread's own
            store._lock.release()
        else:
            store._lock, store._is_busy = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)

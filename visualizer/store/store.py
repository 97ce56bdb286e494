"""Files what channels deliver under their keys, within the limits on calls and bytes."""

from __future__ import annotations

import copy
import weakref
from _thread import get_ident
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

from ..errors import warn
from ..tensors import is_array, is_tensor
from .budget import Budget, bytes_by_device
from .locks import ForkSafeLock
from .records import Record

BATCH = 4096
"""How many numbers may wait before they are weighed: to weigh each takes longer than to keep it."""


class Source(Protocol):
    """Where values come from: the part of a `Channel` that the store knows."""

    calls: count[int]

    key_of: Callable[[str, str | None], str]

    def choose_path(self) -> None:
        """Look at the store's limits again, and choose how values go into it."""

    def name_values(self, value: Any) -> Iterable[tuple[str, Any]]:
        """The variables with their values, of what was put."""

    def place(self) -> str:
        """The function, file and line, for messages."""


class Call:
    """A call whose values come one by one.

    Its number is counted anew when the cache is cleared; `began` orders the calls of all channels.
    """

    __slots__ = ("began", "calls", "number")

    _begun = count()

    def __init__(self, source: Source) -> None:
        self.calls, self.began = source.calls, next(self._begun)
        self.number = next(self.calls)


Arrived = deque[tuple[Any, ...]]
"""What has arrived and is not filed yet, in order: tuples that begin with (source, value, thread).

A value that was put has (call or None, line, module, copies under way, their bytes) behind it. A bool in that place
marks where the source starts or stops being recorded: a call in another thread may deliver its value after the switch.
"""

_Lists = dict[str, list[Any]]
"""A `Cache`, through which users read. The store calls only dict's own methods on it, for `Cache` has others."""

_Entry = tuple[Record, dict[str, int], Call | None]
"""A record, the bytes it takes, and its call if that may have several values."""


class Store:
    """Captured values under their keys, within the limits on calls and bytes.

    The store holds its records, but its cache only weakly: who drops the cache drops the values at once.
    """

    def __init__(self, state: str, *, clear: str = "clear()", off: str = "stop()") -> None:
        self.state = state
        """Whether capture is active, in a few words for messages."""
        self.clear_call, self.stop_call = clear, off
        """What a user calls to empty the store and to switch capture off, for messages."""
        self.limit: int | None = None
        self.is_full = False
        self.arrived: Arrived = deque()
        """Any thread may append to it without a lock."""
        self.weigh_after = BATCH
        """How many values may wait before the numbers among them are weighed."""
        self.skipped_near_recursion_limit: dict[Source, int] = {}
        """How many calls had no room left for ours below the recursion limit, by source; the next reader is warned."""
        self._cache: Callable[[], _Lists | None] = lambda: None
        self._lock = ForkSafeLock()
        self._budget = Budget()
        self._left: dict[str, float] = {}
        """How many bytes may still wait, by device, since the last filing."""
        self._under_way = 0
        self._sources: list[Source] = []
        self._recorded: set[Source] = set()
        self._failure: BaseException | None = None
        self._messages: list[str] = []
        self._records: dict[str, deque[_Entry]] = {}

    @property
    def max_bytes(self) -> float | None:
        """How many bytes of values to keep on each device; None: a quarter of its memory."""
        return self._budget.max_bytes

    @property
    def cache(self) -> dict[str, list[Any]]:
        """The lists by key; every way of reading but `in`, `len` and iteration fetches first."""
        cache = self._cache()
        return {} if cache is None else cache

    def fill(self, cache: _Lists) -> None:
        """File in this cache from now on."""
        self._cache = weakref.ref(cache)

    def add(self, source: Source) -> None:
        """Know a source: its calls are counted anew when the cache is cleared."""
        with self._lock:
            self._sources.append(source)

    def remove(self, source: Source) -> None:
        """Forget a source that delivers nothing any more."""
        with self._lock:
            if source in self._sources:
                self._sources.remove(source)

    def switch(self, source: Source, on: bool) -> None:
        """Start or stop filing what a source delivers; what it has delivered before is filed all the same."""
        self.arrived.append((source, None, 0, on))

    def abandon(self) -> None:
        """Drop what is not filed. Nobody can read it any more, and it holds the sources, which hold the store."""
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
        self.file_pending()
        with self._working():
            if old in self.cache:
                dict.__setitem__(self.cache, new, dict.pop(self.cache, old))
                self._records[new] = self._records.pop(old, deque())
                for record, *_ in self._records[new]:
                    record.key = new

    def drop_if_empty(self, key: str) -> None:
        """Forget a key that nothing was recorded under."""
        self.file_pending()
        with self._working():
            if key in self.cache and not _listed(dict.__getitem__(self.cache, key)):
                dict.pop(self.cache, key)
                self._records.pop(key, None)

    def clear(self, sources: Iterable[Source] = ()) -> None:
        """Start over with empty lists under the same keys; lists that were read before keep their values.

        Calls are counted from 0 again, those of `sources` too, which are not being recorded.
        """
        self.file_pending()
        with self._working():
            self._failure, self._records = None, {}
            self._budget.clear()
            for key in list(self.cache):
                dict.__setitem__(self.cache, key, [])
                self._records[key] = deque()
            for source in [*self._sources, *sources]:
                source.calls = count()
            self._reopen()
        self._warn()

    def configure(self, limit: int | None, max_bytes: float | None) -> None:
        """Set the limits for what is recorded from now on."""
        with self._lock:
            self._file_arrived()
            self.limit = limit
            self._budget.allow(max_bytes)
            self._reopen()

    def records(self) -> list[Record]:
        """Every value with where it comes from, in the order of the keys, then of the calls."""
        self.fetch()
        with self._lock:
            self.reconcile()
            with self._working():
                return [record for key in self.cache for record, *_ in self._records.get(key, ())]

    def reconcile(self, *keys: str) -> None:
        """Match the records to the lists of these keys, or of all: a user may have changed the lists."""
        cache = self._cache()
        with self._lock:
            if cache is None or self._lock.depth:
                return
            with self._working():
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
                        self._reconcile_key(cache, key, keeps_type=True)
                    else:
                        for _, sizes, _ in self._records.pop(key, ()):
                            self._budget.discount(sizes)

    def last(self, key: str) -> Any:
        """The newest value that is filed under a key, or None."""
        records = self._records.get(key)
        try:
            return records[-1][0].value if records else None
        except IndexError:  # another thread has just cleared it
            return None

    def fail(self, error: BaseException) -> None:
        """Remember an error of a `keep` function: the captured function may swallow it.

        A copy is remembered, because the traceback would hold on to the function's locals. A RecursionError is left
        out: the captured function itself met the limit.
        """
        if isinstance(error, RecursionError):
            return
        try:
            self._failure = copy.copy(error)
            self._failure.__notes__ = list(error.__notes__)
        except Exception:  # an exception that cannot be copied
            self._failure = RuntimeError(f"{error!r} {' '.join(error.__notes__)}")

    def file_pending(self) -> None:
        """File everything that has arrived."""
        with self._lock:
            self._file_arrived()

    def fetch(self) -> None:
        """File everything that has arrived, and raise what a `keep` function raised meanwhile."""
        with self._lock:
            self._file_arrived()
            failure, self._failure = self._failure, None
            skipped, self.skipped_near_recursion_limit = self.skipped_near_recursion_limit, {}
        self._warn()
        for source, number in skipped.items():
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
        """File one call's value; see `Arrived`. A value whose copies are under way is filed when they are complete."""
        size = sum(sum(bytes_by_device(item).values()) for _, item in source.name_values(value)) if copies else 0
        self._under_way += size
        self.arrived.append((source, value, get_ident(), (call, line, module, copies, size)))
        self._try_filing(wait=size > 0 and self._under_way > self._budget.room("cpu"))

    def count_pending(self, sizes: dict[str, int]) -> None:
        """Count what has just arrived, and file all that waits before it can outgrow the budget."""
        for device, size in sizes.items():
            left = self._left.get(device)
            self._left[device] = left = (self._budget.room(device) if left is None else left) - size
            if left < 0:
                self._try_filing(wait=False)
                return

    def restore(self, keys: Iterable[str], records: Iterable[Record]) -> None:
        """Take in what was recorded elsewhere."""
        for key in keys:
            self.open(key)
        for record in records:
            self._records[record.key].append((record, {}, None))
            dict.__getitem__(self.cache, record.key).append(record.value)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the lock, and have a finalizer or a signal handler in this thread wait until the work is done."""
        with self._lock:
            self._lock.depth += 1
            try:
                yield
            finally:
                self._lock.depth -= 1

    def _try_filing(self, wait: bool) -> None:
        # Do not wait for the lock here. Who holds it, perhaps this very thread further up, files what waits.
        if self._lock.acquire(blocking=False):
            try:
                self._file_arrived(wait)
            finally:
                self._lock.release()
            if self._messages:
                self._warn()

    def _file_arrived(self, wait: bool = True) -> None:
        """File what has arrived. Without `wait`, stop at the first value that is still being copied.

        An error or an interrupt loses at most the value that is being filed.
        """
        if self._lock.depth:
            return
        self._lock.depth, left, self._left = 1, self._left, {}
        try:
            for _ in range(len(self.arrived)):  # what other threads add meanwhile waits for the next time
                if not self.arrived:  # a finalizer of a value has just dropped the cache
                    return
                source, value, thread, *more = self.arrived[0]
                known = more[0] if more else None
                if known is True:
                    self._recorded.add(source)
                elif known is False:
                    self._recorded.discard(source)
                elif known is not None and known[3]:
                    if not wait and not all(under_way.query() for under_way in known[3]):
                        self._left = left  # what came later waits too, to keep the order of the calls
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
                    if call.calls is not source.calls:  # the call began before the cache was cleared
                        call.calls, call.number = source.calls, next(source.calls)
                    number = call.number
                for variable, item in source.name_values((value,) if known is None else value):
                    if not self.is_full:
                        key = source.key_of(variable, module)
                        self._file(Record(key, variable, item, number, line, thread, module), call)
        finally:
            self._lock.depth = 0
            self.weigh_after = len(self.arrived) + BATCH

    def _file(self, record: Record, call: Call | None) -> None:
        cache = self._cache()
        if cache is None:
            return
        key, sizes = record.key, bytes_by_device(record.value)
        values, records = dict.get(cache, key), self._records.get(key)
        if not isinstance(values, list) or records is None or len(records) != len(values):
            values, records = self._reconcile_key(cache, key)
        records.append((record, sizes, call))
        values.append(record.value)
        exceeded = self._budget.add(sizes)
        if self.limit is not None:
            records = self._trim(key, values, records, self.limit)
            exceeded = self._budget.exceeded(sizes)
        if exceeded is not None and records and records[-1][0] is record:
            records.pop()
            values.pop()
            self._budget.discount(sizes)
            self._stop(key, exceeded)

    def _reconcile_key(self, cache: _Lists, key: str, keeps_type: bool = False) -> tuple[list[Any], deque[_Entry]]:
        """The list under a key, whatever the user has put there, and the records of its values."""
        values = _listed(dict.get(cache, key, ()))
        if not keeps_type or key not in cache:
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
        for removed in known.values():
            for _, sizes, _ in removed:
                self._budget.discount(sizes)
        self._records[key] = records
        return values, records

    def _trim(self, key: str, values: list[Any], records: deque[_Entry], limit: int) -> deque[_Entry]:
        """Drop the oldest calls beyond the limit. A call has one value at its return, any number by assignments."""
        newest = records[-1][2]
        if newest is None:
            kept = list(range(max(0, len(records) - limit), len(records)))
        elif len(records) > 1 and records[-2][2] is newest:
            return records  # this call has been counted
        else:
            # Calls may interleave, so the values of an old call can lie anywhere.
            began = sorted({call.began for _, _, call in records if call is not None})[-limit:]
            others = [place for place, (_, _, call) in enumerate(records) if call is None]  # at their return
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
                    self._budget.discount(sizes)
            values[:] = [values[place] for place in kept]
            self._records[key] = records = deque(entries[place] for place in kept)
        return records

    def _stop(self, key: str, device: str) -> None:
        self.is_full = True
        for source in self._sources:
            source.choose_path()
        self._messages.append(
            f"captured values would take more than {self._budget.why_full(device)}: {key!r} and all that follows is "
            f"not recorded, until {self.clear_call}. If capture was left on by mistake, call {self.stop_call}; else "
            "keep less (limit=, keep=) or allow more (max_bytes=)."
        )

    def _warn(self) -> None:
        """Issue the warnings that came up, without the lock: showing a warning may wait for a thread that reads."""
        while self._messages and not self._lock.depth:
            warn(self._messages.pop(0))

    def _reopen(self) -> None:
        self.is_full = False
        for source in self._sources:
            source.choose_path()


def _listed(values: Any) -> list[Any]:
    """A list of what the user has put in a list's place; of an array its rows."""
    if isinstance(values, list):
        return values
    has_rows = (is_array(values) or is_tensor(values)) and values.ndim > 0
    return list(values) if has_rows or isinstance(values, (tuple, deque)) else [values]

"""Puts the values that channels deliver into the lists of a cache, and stops at the limits on calls and bytes."""

from __future__ import annotations

import copy
import weakref
from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..errors import News, Section, WarningsInCalls, shown, warn
from .budget import Budget, Purse, resident_bytes, resident_bytes_of
from .locks import ForkSafeLock
from .records import Record
from .shelf import Shelf, Source, call_order, listed

_SMALL = 16_384
"""Values beyond a limit are dropped together once they take so many bytes: to drop each alone takes long."""


_MANY = 10_000
"""So many values may wait to be filed before the threads that bring them are slowed down."""


class Call:
    """A call whose values come one by one.

    Its number starts at 0 again when the cache is cleared. `began` never does: it sorts the calls of all channels.
    """

    __slots__ = ("began", "calls", "number")

    def __init__(self, source: Source) -> None:
        self.calls, self.began = source.calls, next(call_order)
        self.number = next(self.calls)


@dataclass(slots=True, eq=False)
class Put:
    """Values of one call that are not in the lists yet."""

    source: Source
    values: Any
    thread: int
    call: Call | None = None
    """The call, if it may have several values."""
    line: int | None = None
    """The line that assigned this one."""
    module: str | None = None
    copies: Sequence[Any] = ()
    """Events of copies from a GPU that are under way."""
    is_light: bool = False
    """Whether the values are numbers, strings, arrays: nobody minds if those beyond a limit go a little later."""
    may_append: bool = False
    """Whether the source's next value may be appended to its list directly."""
    size: int = 0


@dataclass(slots=True, eq=False)
class Switch:
    """The place in the queue from which a source is recorded, or no longer: another thread may deliver after that."""

    source: Source
    is_on: bool


_Lists = dict[str, list[Any]]
"""A `Cache`, through which users read. The store calls only dict's own methods on it, for `Cache` has others."""


class Store:
    """Captured values under their keys, within the limits on calls and bytes.

    The store has only a weak reference to its cache: when the cache goes, the values go at once.

    A value comes as a `Put` through one queue; to file it is to put it into its list. If nothing can come between it
    and the next value of its channel (no other thread, nobody who holds the list, no limit that is near), the channel
    gets an open run: until the run is closed, it appends to the list directly. It does so only while `source.append`
    is there and `source.is_in_thread()` says that the run is for the thread that calls. Between looking at `append` and
    calling it, the interpreter runs no other thread, signal handler or finalizer: it does so only after calls and at
    jumps backward. Whoever calls `halt` ends the run.
    """

    def __init__(self, state: str, *, clear: str = "clear()", off: str = "stop()") -> None:
        self.state = state
        """Whether capture is active, in a few words for messages."""
        self.clear_call, self.stop_call = clear, off
        """What a user calls to empty the store and to switch capture off, for messages."""
        self.limit: int | None = None
        self.is_full = False
        self.arrived: deque[Put | Switch] = deque()
        """What is not filed yet, in order. Any thread may append to it without a lock."""
        self.skipped_near_recursion_limit: dict[Source, int] = {}
        """For each source, how many calls came too close to the recursion limit to be recorded; see `report`."""
        self.budget = Budget()
        self._cache: Callable[[], _Lists | None] = lambda: None
        self._lock = ForkSafeLock()
        self._slowed: set[int] = set()
        """The threads that wait because very much is waiting to be filed."""
        self._under_way = 0
        self._sources: dict[Source, None] = {}
        self._recorded: set[Source] = set()
        self._failure: BaseException | None = None
        self._news: list[News] = []
        self._in_calls = WarningsInCalls()
        self._missed: dict[tuple[Source, str, type], list[Any]] = {}
        self._shared: weakref.WeakSet[type] = weakref.WeakSet()
        """The classes whose objects are kept by reference, as far as the user was told."""
        self._shelves: dict[str, Shelf] = {}
        self._emptied: set[str] = set()
        """The keys whose values a user has taken out, some or all."""
        self._unfinished: dict[Shelf, None] = {}
        """Those that somebody may append to, or that may be beyond the limit."""

    @property
    def max_bytes(self) -> float | None:
        """How many bytes of values to keep on each device; None: a quarter of its memory."""
        return self.budget.max_bytes

    @property
    def cache(self) -> dict[str, list[Any]]:
        """The lists by key. Reading them files what waits first, except by `in`, `len` and iteration."""
        cache = self._cache()
        return {} if cache is None else cache

    def fill(self, cache: _Lists) -> None:
        """File in this cache from now on."""
        self._cache = weakref.ref(cache)

    def add(self, source: Source) -> None:
        """Know a source: its calls are counted anew when the cache is cleared."""
        with self._lock:
            self._sources[source] = None

    def remove(self, source: Source) -> None:
        """Forget a source that delivers nothing any more."""
        with self._lock:
            self._sources.pop(source, None)

    def switch(self, source: Source, on: bool) -> None:
        """Start or stop filing what a source delivers; what it has delivered before is filed all the same."""
        self.arrived.append(Switch(source, on))
        source.halt()

    def abandon(self) -> None:
        """Drop what waits: nobody can read it, and it refers to the sources, which would keep the store alive."""
        with self._lock:
            self.arrived.clear()
            self._recorded.clear()
            self._sources.clear()
            self._shelves.clear()
            self._unfinished.clear()
            self._missed.clear()

    def open(self, key: str) -> None:
        """Give a key its empty list, unless it has one."""
        with self._lock:
            if key not in self._shelves:
                self._shelves[key] = Shelf(key, listed(dict.setdefault(self.cache, key, [])))

    def rename(self, change: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Have sources use other keys, and move what is under the old ones.

        `change` makes the sources do so; it returns the new key for each old one that is another now, and so does this.
        Nothing is filed meanwhile.
        """
        with self._lock:
            self._file_arrived()
            with self._lock.working():
                renamed = change()
                for key in renamed.keys() & self._shelves.keys():
                    self._close(self._shelves[key])
                if renamed:
                    lists = {renamed.get(key, key): values for key, values in dict.items(self.cache)}
                    dict.clear(self.cache)
                    dict.update(self.cache, lists)
                    self._shelves = {renamed.get(key, key): shelf for key, shelf in self._shelves.items()}
                    for key, shelf in self._shelves.items():
                        shelf.key = key
                return renamed

    def drop_if_empty(self, key: str) -> None:
        """Forget a key that nothing was recorded under."""
        self.file_pending()
        with self._lock.working():
            if key in self.cache and not listed(dict.__getitem__(self.cache, key)):
                dict.pop(self.cache, key)
                shelf = self._shelves.pop(key, None)
                if shelf is not None:
                    self._close(shelf)

    def clear(self, sources: Iterable[Source] = ()) -> None:
        """Start over with empty lists under the same keys; lists that were read before keep their values.

        Calls are counted from 0 again, also those of `sources`: further sources, which are not recorded now.
        """
        self.file_pending()
        with self._lock.working():
            for shelf in self._shelves.values():
                self._close(shelf)
                if shelf.size:
                    self._emptied.add(shelf.key)
            self._failure, self._shelves, self._unfinished = None, {}, {}
            self.budget.clear()
            for key in list(self.cache):
                dict.__setitem__(self.cache, key, [])
                self._shelves[key] = Shelf(key, dict.__getitem__(self.cache, key))
            for source in [*self._sources, *sources]:
                source.calls = count()
            self.is_full = False
        self.report()

    def configure(self, limit: int | None, max_bytes: float | None) -> None:
        """Set the limits for what is recorded from now on."""
        with self._lock:
            self.close()
            self.limit = limit
            self.budget.allow(max_bytes)
            self.is_full = False

    def records(self) -> list[Record]:
        """Every value with where it comes from, in the order of the keys, then of the calls."""
        self.fetch()
        with self._lock:
            self.reconcile()
            with self._lock.working():
                return [record for shelf in self._read() for record in shelf.records()]

    def unheard(self) -> list[str]:
        """The keys that nothing was ever recorded under; none if recording stopped early, which the user is told."""
        with self._lock:
            if self.is_full or self._failure is not None:
                return []
            puts = [event for event in list(self.arrived) if isinstance(event, Put)]
            waiting = {p.source.key_of(name, p.module) for p in puts for name, _ in p.source.name_values(p.values)}
            filed = {key for key, shelf in self._shelves.items() if shelf.size or shelf.run is not None}
            heard = waiting | filed | self._emptied
            return [key for key, values in dict.items(self.cache) if key not in heard and not len(listed(values))]

    def calls_of(self, key: str) -> int:
        """How many calls have values under a key."""
        shelf = self._shelves.get(key)
        if shelf is None:
            return 0
        return len(set(shelf.calls)) if shelf.unsorted else shelf.size

    def reconcile(self, *keys: str) -> None:
        """Match the records to the lists of these keys, or of all: a user may have changed the lists."""
        cache = self._cache()
        with self._lock:
            if cache is None or self._lock.depth:
                return
            with self._lock.working():
                for key in keys or [*self._shelves, *(key for key in cache if key not in self._shelves)]:
                    shelf = self._shelves.get(key)
                    if key in cache:
                        self._reconcile_key(cache, key, keeps_type=True)
                    elif shelf is not None:
                        self._close(shelf)
                        self._discount(self._shelves.pop(key).filed)

    def last(self, key: str) -> Any:
        """The newest value that is filed under a key, or None."""
        shelf = self._shelves.get(key)
        try:
            return shelf.values[-1] if shelf else None
        except IndexError:  # another thread has just cleared it
            return None

    def fail(self, error: BaseException) -> None:
        """Remember an error of a `keep` function: the captured function may swallow it.

        A copy is remembered, because the traceback would hold on to the function's locals. A RecursionError is not:
        the user's own function went too deep.
        """
        if isinstance(error, RecursionError):
            return
        try:
            self._failure = copy.copy(error)
            self._failure.__notes__ = list(error.__notes__)
        except Exception:  # an exception that cannot be copied, or takes no notes
            self._failure = RuntimeError(f"{shown(repr, error)} {' '.join(getattr(error, '__notes__', ()))}")

    def miss(self, source: Source, key: str, error: Exception) -> None:
        """Remember, for `report`, that a value under a key could not be recorded: the recorded function goes on."""
        # Counted by class: the text may have an address in it. The error itself would hold on to the function's locals.
        missed = self._missed.setdefault((source, key, type(error)), [0, shown(str, error)])
        missed[0] += 1

    def warn_in_call(self, message: str, section: Section) -> None:
        """Warn at once, from within a recorded call. Where warnings are errors, `report` does, not to disturb it."""
        self._in_calls.warn(message, section)

    def report(self) -> None:
        """Warn of what could not be recorded, and has not been warned of."""
        with self._lock:
            missed, self._missed = self._missed, {}
            skipped, self.skipped_near_recursion_limit = self.skipped_near_recursion_limit, {}
            self._news += self._in_calls.take()
        for source, number in skipped.items():
            message = f"{number} calls of {source.place()} came too close to the recursion limit to be recorded."
            self._news.append(News(message, "recursion-limit"))
        for (source, key, cls), (number, text) in missed.items():
            way_out = (
                "" if "keep=" in text else " keep='graph' keeps the object itself, a callable what it makes of it."
            )
            message = (
                f"{number} values of {source.place()} could not be recorded under {key!r}, and the program went on: "
                f"{cls.__name__}: {text.removesuffix('.')}.{way_out}"
            )
            self._news.append(News(message, "values-not-copied"))
        self._warn()

    def tell_shared(self, cls: type, where: str) -> None:
        """Warn, once for each class, that its objects are kept by reference."""
        try:
            if cls in self._shared:
                return
            self._shared.add(cls)
        except Exception:  # its metaclass has no hash, or one that fails
            return
        message = (
            f"{where} is or holds a {cls.__qualname__}, which is kept by reference, because no safe way to copy it is "
            "known: later changes to it show in what was captured. To keep a copy or a part, pass keep= a function."
        )
        self._news.append(News(message, "kept-by-reference"))

    def file_pending(self) -> None:
        """File everything that has arrived."""
        with self._lock:
            self._file_arrived()

    def close(self) -> None:
        """File everything that has arrived, and have every list within its limit, and its columns filled."""
        with self._lock:
            self._file_arrived()
            if not self._lock.depth:
                with self._lock.working():
                    for shelf in list(self._unfinished):
                        self._close(shelf)
                        self._tighten(shelf)
                        self._unfinished.pop(shelf, None)

    def fetch(self) -> None:
        """File everything that has arrived, and raise what a `keep` function raised meanwhile."""
        with self._lock:
            self.close()
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self.report()

    def put(self, put: Put) -> None:
        """File one call's values. Those whose copies are under way are filed when the copies are complete."""
        if put.copies:
            put.size = sum(sum(resident_bytes(value).values()) for _, value in put.source.name_values(put.values))
            self._under_way += put.size
        self.arrived.append(put)
        put.source.halt()  # the next value may not overtake this one
        self._try_filing(wait=put.size > 0 and self._under_way > self.budget.room("cpu"))

    def restore(self, keys: Iterable[str], records: Iterable[Record]) -> None:
        """Take in what was recorded elsewhere."""
        for key in keys:
            self.open(key)
        for record in records:
            self._shelves[record.key].restore([record])

    def _try_filing(self, wait: bool) -> None:
        # Do not wait for the lock. Whoever has it, perhaps an outer call in this very thread, files what waits. But
        # several threads bring values faster than one files them: give it a moment when very much is waiting. A signal
        # handler that comes meanwhile does not wait too: handlers would pile up to the recursion limit.
        thread, seconds = get_ident(), 0.0
        if len(self.arrived) > _MANY and thread not in self._slowed:
            self._slowed.add(thread)
            seconds = 0.05
        try:
            is_ours = self._lock.acquire(timeout=seconds)
        finally:
            if seconds:
                self._slowed.discard(thread)
        if is_ours:
            try:
                self._file_arrived(wait)
            finally:
                self._lock.release()
            while self._news and not self._lock.depth:
                self.warn_in_call(*self._news.pop(0))

    def _file_arrived(self, wait: bool = True) -> None:
        """File what has arrived. Without `wait`, stop at the first value that is still being copied.

        An error or an interrupt loses at most the value that is being filed.
        """
        if self._lock.depth:
            return
        self._lock.depth = 1
        try:
            for _ in range(len(self.arrived)):  # what other threads add meanwhile waits for the next time
                if not self.arrived:  # a finalizer of a value has just dropped the cache
                    return
                event = self.arrived[0]
                if isinstance(event, Put) and event.copies:
                    if not wait and not all(under_way.query() for under_way in event.copies):
                        return  # what came later waits too, to keep the order of the calls
                    for under_way in event.copies:
                        under_way.synchronize()
                    self._under_way = max(0, self._under_way - event.size)
                self.arrived.popleft()
                if isinstance(event, Put):
                    self._file(event)
                elif event.is_on:
                    self._recorded.add(event.source)
                else:
                    self._recorded.discard(event.source)
        finally:
            self._lock.depth = 0

    def _file(self, put: Put) -> None:
        source, call = put.source, put.call
        cache = self._cache()
        if cache is None or source not in self._recorded:
            return
        shelves = [
            (variable, value, self._shelf(cache, source.key_of(variable, put.module)))
            for variable, value in source.name_values(put.values)
        ]  # closing their runs sets the number of the source's next call
        if call is None:
            number = next(source.calls)
        else:
            if call.calls is not source.calls:  # the call began before the cache was cleared
                call.calls, call.number = source.calls, next(source.calls)
            number = call.number
        for variable, value, shelf in shelves:
            if self.is_full:
                return
            origin = variable, put.thread, put.module
            shelf.add(value, number, put.line, None if call is None else call.began, origin)
            sizes = resident_bytes(value)
            exceeded = self.budget.add(sizes)
            shelf.is_light, slack = shelf.is_light and put.is_light, 0
            if self.limit is not None:
                size = max(1, sizes.get("cpu", 0))
                slack = max(self.limit // 4, _SMALL // size) if shelf.is_light and not shelf.is_held else 0
                self._discount(shelf.trim(self.limit, slack))
                if shelf.is_loose:
                    self._unfinished[shelf] = None
            if exceeded is not None:
                exceeded = self._make_room(cache, exceeded)
            if exceeded is not None and shelf.size and shelf.filed[-1] is value:
                shelf.keep(range(shelf.size - 1))
                self.budget.discount(sizes)
                self._stop(shelf.key, exceeded)
            elif put.may_append and not shelf.is_held and shelf.size == len(shelf.values):
                self._open(source, shelf, number + 1, origin, slack * sizes.get("cpu", 0))

    def _open(self, source: Source, shelf: Shelf, number: int, origin: tuple[str, int, str | None], slack: int) -> None:
        """Let the thread that this value came from append the next ones to the list directly."""
        if self.limit is None:
            source.purse = self.budget.purse
        else:
            slack = min(slack, self.budget.room("cpu"), Purse.MOST)
            if slack <= 0:
                return
            self.budget.add({"cpu": slack})
            source.purse = Purse(slack)
        self._unfinished[shelf] = None
        append = shelf.open(source, number, origin)
        if not self.arrived:  # no call between this look and the next line: nothing can come between them
            source.append = append

    def _close(self, shelf: Shelf) -> None:
        if shelf.run is not None:
            source: Any = shelf.run[0]
            shelf.close()
            if source.purse is not self.budget.purse:
                left, source.purse.left = source.purse.left, 0
                self.budget.discount({"cpu": left})

    def _shelf(self, cache: _Lists, key: str) -> Shelf:
        """The shelf of a key, in order, and with nobody who appends to it."""
        shelf = self._shelves.get(key)
        if shelf is not None and dict.get(cache, key) is shelf.values:
            self._close(shelf)
            if shelf.size == len(shelf.values):
                return shelf
        return self._reconcile_key(cache, key)

    def _reconcile_key(self, cache: _Lists, key: str, keeps_type: bool = False) -> Shelf:
        """The shelf of a key, in order, whatever the user has made of the list."""
        values = listed(dict.get(cache, key, ()))
        if not keeps_type or key not in cache:
            dict.__setitem__(cache, key, values)
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = Shelf(key, [])
        self._close(shelf)
        if gone := shelf.match(values):
            self._emptied.add(key)
            self._discount(gone)
        return shelf

    def _make_room(self, cache: _Lists, device: str) -> str | None:
        """Discount what users have removed, and drop what is beyond the limit; the device if it is still too full."""
        for key in list(self._shelves):
            shelf = self._reconcile_key(cache, key, keeps_type=True) if key in cache else self._shelves[key]
            self._tighten(shelf)
        return self.budget.exceeded([device])

    def _tighten(self, shelf: Shelf) -> None:
        """Drop the calls beyond the limit."""
        if self.limit is not None and shelf.is_loose:
            self._discount(shelf.trim(self.limit, 0))

    def _read(self) -> list[Shelf]:
        return [self._shelves[key] for key in self.cache if key in self._shelves]

    def _discount(self, values: list[Any]) -> None:
        self.budget.discount(resident_bytes_of(values))

    def _stop(self, key: str, device: str) -> None:
        self.is_full = True
        for shelf in self._shelves.values():
            self._close(shelf)
        message = (
            f"captured values would take more than {self.budget.why_full(device)}: {key!r} and all that follows is "
            f"not recorded, until {self.clear_call}. If capture was left on by mistake, call {self.stop_call}; else "
            "keep less (limit=, keep=) or allow more (max_bytes=)."
        )
        self._news.append(News(message, "memory-limit"))

    def _warn(self) -> None:
        """Issue the warnings that came up, without the lock: while one is shown, another thread may need the lock."""
        while self._news and not self._lock.depth:
            warn(*self._news.pop(0))

"""Where captured values arrive, and how they are read.

Rewritten code calls `receive(key, value)`. The key names a `Channel`: one function's variables on their way into one
`Store`, which keeps them in lists by key within its limits. A channel that converts what it keeps files each value at
once. One that keeps the very object (`keep="graph"`) only appends it to its own pending list, which costs little more
than a hand-written append and is atomic without a lock; it is filed when somebody reads, or when it has grown heavy.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import weakref
from _thread import get_ident
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from dataclasses import dataclass
from itertools import count
from types import CodeType
from typing import Any

from .errors import UnknownKeyError, warn
from .rewrite import At, assigned_lines
from .tensors import Keep, bytes_by_device, is_array, is_tensor, keeper, memory_of

_listening: dict[str, Channel] = {}

_SMALL = frozenset({int, float, bool, complex})  # too small to be weighed one by one
_SMALL_BATCH = 4096


def receive(key: str, value: Any) -> None:
    """The hook of all rewritten code; a key that nobody listens to any more is ignored.

    As a value it stands for "unbound": no variable of the user's holds it.
    """
    try:
        channel = _listening[key]
    except KeyError:
        return
    pending = channel.pending
    if pending is None or value is None or value is receive:
        channel.take(value)
    else:
        pending.append((value, get_ident()))
        if value.__class__ not in _SMALL or not len(pending) % _SMALL_BATCH:
            channel.weigh(value)


@dataclass(slots=True, eq=False)
class Record:
    """One captured value and where it comes from."""

    key: str
    """The key of `get_local.cache` that lists it."""
    variable: str
    value: Any
    """What was kept of it."""
    call: int
    """Which call it belongs to, counted from 0 since `clear()`, by decorator; the values of a call share it."""
    line: int | None
    """The line that assigned it, for at="assign"."""
    thread: int
    """`threading.get_ident()` of the thread that called."""

    def __repr__(self) -> str:
        shape = f" of shape {tuple(self.value.shape)}" if is_tensor(self.value) or is_array(self.value) else ""
        line = "" if self.line is None else f", line={self.line}"
        return f"<Record {self.key!r}: {self.variable}, call={self.call}{line}, {type(self.value).__name__}{shape}>"


class Cache(dict[str, list[Any]]):
    """Captured values: a dict from key to the list of values, in call order.

    Reading it first fetches what is still on its way; a missing key's error says what there is. A list that you hold
    grows with the calls, with keep="graph" only when the cache is read.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._fetch, self._state = store.fetch, store.state

    def __getitem__(self, key: str) -> list[Any]:
        self._fetch()
        return super().__getitem__(key)

    def __missing__(self, key: str) -> list[Any]:
        known = ", ".join(map(repr, self)) or "none: nothing is decorated yet"
        raise UnknownKeyError(f"nothing was captured under {key!r}; the keys are {known}; capture is {self._state()}")

    def get(self, key: str, default: Any = None) -> Any:
        """The list under a key, or the default."""
        self._fetch()
        return super().get(key, default)

    # Iterating in Python, not in C, makes dict(cache) and {**cache} read through __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def values(self) -> ValuesView[list[Any]]:  # type: ignore[override]
        """The lists."""
        self._fetch()
        return super().values()

    def items(self) -> ItemsView[str, list[Any]]:  # type: ignore[override]
        """The keys with their lists."""
        self._fetch()
        return super().items()

    def pop(self, *args: Any) -> Any:
        """Take a key and its list out."""
        self._fetch()
        return super().pop(*args)

    def copy(self) -> dict[str, list[Any]]:
        """A plain dict of the same lists."""
        return dict(self)

    def __eq__(self, other: object) -> bool:
        self._fetch()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        self._fetch()
        return super().__repr__()


class Store:
    """Captured values under their keys, within the limits on calls and bytes."""

    def __init__(self, state: Callable[[], str]) -> None:
        self.state = state
        """Says in a word or two whether capture is active, for messages."""
        self.limit: int | None = None
        self.max_bytes: int | None = None
        self.is_full = False
        self.cache = Cache(self)
        self._lock = threading.RLock()
        _stores.add(self)
        self._waiting: deque[tuple[Channel, Any, int, int | None, int]] = deque()
        self._channels: list[Channel] = []
        self._failure: BaseException | None = None
        self._records: dict[str, deque[tuple[Record, dict[str, int]]]] = {}
        self._bytes: dict[str, int] = {}
        self._budgets: dict[str, int] = {}

    def add(self, channel: Channel) -> None:
        """Take a channel in, whose pending values are to be fetched."""
        with self._lock:
            self._channels.append(channel)

    def remove(self, channel: Channel) -> None:
        """Let a channel go that nothing will come through any more."""
        with self._lock:
            self._sort_in()
            if channel in self._channels:
                self._channels.remove(channel)

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
            for channel in self._channels:
                channel.calls = count()
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
        if failure is not None:
            raise failure

    def put(self, channel: Channel, value: Any, call: int, line: int | None) -> None:
        """File one call's value; `call` is -1 where calls are counted as they arrive."""
        channel.flush(self._waiting)
        self._waiting.append((channel, value, call, line, get_ident()))
        # Never wait for the lock here: whoever holds it, perhaps this very thread below us, files what waits.
        if self._lock.acquire(blocking=False):
            try:
                self._file_waiting()
            finally:
                self._lock.release()

    def room(self, device: str) -> int:
        """How many bytes may still be filed for a device."""
        return self._budget(device) - self._bytes.get(device, 0)

    def sort_in(self) -> None:
        """File what is pending, unless another thread is doing it."""
        if self._lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        for channel in self._channels:
            channel.flush(self._waiting)
            self._file_waiting()

    def _file_waiting(self) -> None:
        for _ in range(len(self._waiting)):  # what other threads add meanwhile is for the next time
            channel, value, call, line, thread = self._waiting.popleft()
            if call < 0:
                call = next(channel.calls)
            for variable, item in channel.name_values(value):
                if item is not receive and not self.is_full:
                    self._file(Record(channel.key(variable), variable, item, call, line, thread))

    def _file(self, record: Record) -> None:
        key, sizes = record.key, bytes_by_device(record.value)
        if key not in self.cache or key not in self._records:  # or the user has taken it out
            self.open(key)
        if len(self._records[key]) != len(self._values(key)):
            self._follow_the_user(key, record)
        records, values, is_over = self._records[key], self._values(key), None
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
        for channel in self._channels:
            channel.adjust()
        source = "max_bytes" if self.max_bytes is not None else "a quarter of its memory"
        warn(
            f"captured values would take more than {self._budget(device):,} bytes on {device} ({source}): {key!r} and "
            "all that follows is not recorded, until get_local.clear(). If capture was left active by mistake, call "
            "get_local.deactivate(); else keep less (limit=, keep=) or allow more (max_bytes=)."
        )

    def _reopen(self) -> None:
        self.is_full = False
        for channel in self._channels:
            channel.adjust()


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: a lock that another thread held is held for ever there, for that thread is not."""
    for store in _stores:
        store._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Channel:
    """One function's variables on their way from its rewritten code into a store."""

    def __init__(
        self,
        store: Store,
        site: str,
        names: tuple[str, ...],
        at: At,
        keep: Keep | None,
        key: Callable[[str], str],
    ) -> None:
        self.store, self.names, self.at, self.keep = store, names, at, keep
        self.site = site
        """What the rewritten code passes as the hook's key: unique in the process."""
        self.key = key
        """Says the store's key for a variable."""
        self.calls = count()
        self.code: CodeType | None = None
        """The code that is captured from, for messages."""
        self.made: tuple[CodeType, tuple[Channel, ...], CodeType] | None = None
        """The code that was last rewritten with this channel as the last, for which channels, and the result."""
        self.pending: deque[tuple[Any, int]] | None = None
        """Values with their threads that are not filed yet; None where each value has work to be done at once."""
        self.take: Callable[[Any], None] = lambda value: None
        """Convert and file what the rewritten code brings."""
        self._keep: Keep = "numpy"
        self._queue: deque[tuple[Any, int]] = deque()
        self._numbers: dict[int, int] = {}
        self._warned: set[str] = set()
        self._held: dict[str, int] = {}

    def connect(self, default: Keep) -> None:
        """Receive what the rewritten code brings, from now on; `default` where the channel has no `keep` of its own."""
        self._keep = default if self.keep is None else self.keep
        self._numbers.clear()  # of calls that went on, or ended, unseen
        self.take = self._assignments() if self.at == "assign" else self._returns()
        self.adjust()
        _listening[self.site] = self

    def disconnect(self) -> None:
        """Ignore what the rewritten code brings, calls that are under way included."""
        _listening.pop(self.site, None)

    def adjust(self) -> None:
        """Let values pend only where each needs no work of its own."""
        plain = self._keep == "graph" and self.at == "return" and len(self.names) == 1
        self.pending = self._queue if plain and self.store.limit is None and not self.store.is_full else None

    def weigh(self, value: Any) -> None:
        """Count what is pending, by its newest value, and have it filed before it can outgrow the budget."""
        sizes = {"cpu": _SMALL_BATCH * 32} if value.__class__ in _SMALL else bytes_by_device(value)
        for device, size in sizes.items():
            self._held[device] = held = self._held.get(device, 0) + size
            if held > self.store.room(device):
                self.store.sort_in()  # exact, and empties what is held
                return

    def flush(self, waiting: deque[tuple[Channel, Any, int, int | None, int]]) -> None:
        """Move what is pending to what waits to be filed."""
        self._held = {}
        for _ in range(len(self._queue)):  # what other threads add meanwhile is for the next time
            value, thread = self._queue.popleft()
            waiting.append((self, value, -1, None, thread))

    def name_values(self, value: Any) -> list[tuple[str, Any]]:
        """The variables with their values, of what one call brought."""
        if self.at == "assign":
            return [value]
        return [(self.names[0], value)] if len(self.names) == 1 else list(zip(self.names, value, strict=True))

    def _returns(self) -> Callable[[Any], None]:
        store, names, convert = self.store, self.names, self._guarded()

        def kept(name: str, value: Any) -> Any:
            if value is None or value is receive:
                self._report_missing(name, value)
                return value
            return convert(name, value)

        def take_one(value: Any) -> None:
            if not store.is_full:
                store.put(self, kept(names[0], value), -1, None)

        def take_all(values: tuple[Any, ...]) -> None:
            if not store.is_full:
                store.put(self, [kept(*pair) for pair in zip(names, values, strict=True)], -1, None)

        return take_one if len(names) == 1 else take_all

    def _assignments(self) -> Callable[[Any], None]:
        store, convert, numbers = self.store, self._guarded(), self._numbers

        def take(event: tuple[str, int, Any] | None) -> None:
            # A frame object lives as long as its call, so its id tells apart the calls that are under way.
            frame = id(sys._getframe(2))
            if event is None:
                numbers.pop(frame, None)
                numbers[frame] = next(self.calls)
                if len(numbers) > 100_000:
                    for old in list(numbers)[:50_000]:
                        numbers.pop(old, None)
            elif not store.is_full:
                name, line, value = event
                call = numbers.get(frame)
                if call is None:
                    # Its beginning was not seen, so nothing tells this frame from a later one at the same address.
                    call = next(self.calls)
                store.put(self, (name, convert(name, value)), call, line)

        return take

    def _guarded(self) -> Callable[[str, Any], Any]:
        """What converts a variable's value; errors say whose they are, and are remembered."""
        keep = self._keep
        convert = keeper(keep)

        def guarded(name: str, value: Any) -> Any:
            try:
                return convert(value)
            except Exception as error:
                error.add_note(f"while keeping {name!r} of {self._function()} with keep={keep!r}")
                self.store.fail(error)
                raise

        return guarded

    def _function(self) -> str:
        code = self.code
        return "?" if code is None else f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"

    def _report_missing(self, name: str, value: Any) -> None:
        """Warn, once, that a call had nothing under the name, with the likely cause."""
        code = self.code
        if name in self._warned or code is None:
            return
        if value is None:
            sounds_like_a_map = "torch" in sys.modules and any(
                part in name.lower() for part in ("attn", "attention", "weight", "prob")
            )
            last = self.store.last(self.key(name))
            if not (is_tensor(last) or is_array(last) or sounds_like_a_map):
                return
        self._warned.add(name)
        lines = ", ".join(map(str, assigned_lines(code, name)))
        what = "was None, and None was recorded" if value is None else "was not bound, and nothing was recorded"
        where = f"it is assigned on line {lines}" if lines else "it is a parameter, or an outer function's variable"
        warn(
            f"{name!r} {what} when {self._function()} returned; {where}. The usual causes: a fused attention "
            "kernel that never makes the weights (build the model with timm.layers.set_fused_attn(False), or "
            'attn_implementation="eager" in transformers), or a flag of the model that guards those lines.'
        )

"""Where captured values arrive, and how they are read.

Rewritten code calls `receive(key, value)`. The key names a `Channel`: one function's variables on their way into one
`Store`. The channel takes the snapshot and drops it into the store's inbox, which is one atomic append, without a lock;
sorting into lists by key, counting calls and bytes, and the limits are done when the inbox is emptied, by whoever holds
the lock: at once where the snapshot costs more than that anyway, else every so often and whenever somebody reads.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from dataclasses import dataclass
from itertools import count
from types import CodeType
from typing import Any

from .errors import UnknownKeyError, VisualizerWarning
from .rewrite import At, assigned_lines
from .tensors import Keep, bytes_by_device, is_array, is_tensor, keeper, memory_of

_PACKAGE = __name__.rpartition(".")[0] + "."

_sinks: dict[str, Callable[[Any], None]] = {}


def receive(key: str, value: Any) -> None:
    """The hook of all rewritten code; a key that nobody listens to any more is ignored.

    As a value it stands for "unbound": no variable of the user's holds it.
    """
    sink = _sinks.get(key)
    if sink is not None:
        sink(value)


@dataclass(slots=True, eq=False)
class Record:
    """One captured value and where it comes from."""

    key: str
    """The key of `get_local.cache` that lists it."""
    variable: str
    value: Any
    """What was kept of it."""
    call: int
    """Which call of the function it belongs to, from 0; the values of one call share it."""
    line: int | None
    """The line that assigned it, for at="assign"."""
    thread: int
    """`threading.get_ident()` of the thread that called."""


class Cache(dict[str, list[Any]]):
    """Captured values: a dict from key to the list of values, in call order.

    Reading it first fetches what is still on its way; a missing key's error says what there is.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store: Store | None = store

    def _fetch(self) -> None:
        if self._store is not None:
            self._store.fetch()

    def __getitem__(self, key: str) -> list[Any]:
        self._fetch()
        return super().__getitem__(key)

    def __missing__(self, key: str) -> list[Any]:
        known = ", ".join(map(repr, self)) or "none: nothing is decorated yet"
        state = self._store.state() if self._store is not None else "cleared since"
        raise UnknownKeyError(f"nothing was captured under {key!r}; the keys are {known}; capture is {state}")

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
        self.limit: int | None = None
        self.max_bytes: int | None = None
        self._lock = threading.RLock()
        self._failure: BaseException | None = None
        self._inbox: deque[tuple[Channel, Any, int, int | None, int]] = deque()
        self.cache = Cache(self)
        self._records: dict[str, deque[Record]] = {}
        self._bytes: dict[str, int] = {}
        self._budgets: dict[str, int] = {}
        self.is_full = False

    def open(self, key: str) -> None:
        """Give a key its empty list, unless it has one."""
        with self._lock:
            self.cache.setdefault(key, [])
            self._records.setdefault(key, deque())

    def rename(self, old: str, new: str) -> None:
        """Move what is under one key to another."""
        with self._lock:
            self._empty_inbox()
            if old in self.cache:
                self.cache[new] = dict.pop(self.cache, old)
                self._records[new] = self._records.pop(old)
                for record in self._records[new]:
                    record.key = new

    def drop_if_empty(self, key: str) -> None:
        """Forget a key that nothing was recorded under."""
        with self._lock:
            self._empty_inbox()
            if key in self.cache and not self._values(key):
                del self.cache[key], self._records[key]

    def last(self, key: str) -> Any:
        """The newest value under a key, or None."""
        with self._lock:
            self._empty_inbox()
            records = self._records.get(key)
            return records[-1].value if records else None

    def clear(self) -> None:
        """Start over with empty lists under the same keys; lists that were read before keep their values."""
        with self._lock:
            keys = list(self.cache)
            self.cache._store = None
            self._failure = None
            self._inbox.clear()
            self.cache, self._records, self._bytes, self.is_full = Cache(self), {}, {}, False
            for key in keys:
                self.open(key)

    def configure(self, limit: int | None, max_bytes: int | None) -> None:
        """Set the limits from now on, and forget what went wrong and what was full under the old ones."""
        with self._lock:
            self._empty_inbox()
            self.limit, self.max_bytes, self.is_full, self._failure = limit, max_bytes, False, None
            self._budgets.clear()
            for key in list(self._records):
                self._trim(key)

    def records(self) -> list[Record]:
        """Every value with where it comes from, in the order of the keys, then of the calls."""
        with self._lock:
            self.fetch()
            return [record for records in self._records.values() for record in records]

    def fail(self, error: BaseException) -> None:
        """Remember an error of a `keep` function: the captured function may have swallowed it."""
        self._failure = error

    def fetch(self) -> None:
        """Sort everything that has arrived into the lists, and raise what a `keep` function raised meanwhile."""
        with self._lock:
            self._empty_inbox()
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def put(self, channel: Channel, value: Any, call: int, line: int | None, at_once: bool) -> None:
        """Take a value in. `call` is -1 where calls are counted as they arrive."""
        self._inbox.append((channel, value, call, line, threading.get_ident()))
        # Never wait for the lock here: whoever holds it, perhaps this very thread below us, empties the inbox.
        if (at_once or len(self._inbox) >= 32) and self._lock.acquire(blocking=False):
            try:
                self._empty_inbox()
            finally:
                self._lock.release()

    def _empty_inbox(self) -> None:
        while self._inbox:
            channel, value, call, line, thread = self._inbox.popleft()
            if call < 0:
                call = next(channel.calls)
            for variable, item in channel.name_values(value):
                if not self.is_full:
                    self._file(Record(channel.keys[variable], variable, item, call, line, thread))

    def _file(self, record: Record) -> None:
        key = record.key
        self.open(key)
        self._records[key].append(record)
        self._values(key).append(record.value)
        self._count(record, 1)
        self._trim(key)
        over = next((d for d in bytes_by_device(record.value) if self._bytes.get(d, 0) > self._budget(d)), None)
        if over is not None:
            self._records[key].pop()
            self._values(key).pop()
            self._count(record, -1)
            self._stop(key, over)

    def _values(self, key: str) -> list[Any]:
        """The list under a key, without fetching first: for those who are just filling it."""
        return super(Cache, self.cache).__getitem__(key)

    def _trim(self, key: str) -> None:
        """Drop the oldest calls beyond the limit. A call makes one value at its return, any number by assignments."""
        records, limit = self._records[key], self.limit
        if limit is None or not records:
            return
        newest = max(record.call for record in records) if records[-1].line is not None else None
        while records and (len(records) > limit if newest is None else records[0].call <= newest - limit):
            oldest = records.popleft()
            self._count(oldest, -1)
            values = self._values(key)
            if values and values[0] is oldest.value:  # unless the user has taken it out
                del values[0]

    def _count(self, record: Record, sign: int) -> None:
        for device, size in bytes_by_device(record.value).items():
            self._bytes[device] = self._bytes.get(device, 0) + sign * size

    def _budget(self, device: str) -> int:
        if device not in self._budgets:
            self._budgets[device] = memory_of(device) // 4 if self.max_bytes is None else self.max_bytes
        return self._budgets[device]

    def _stop(self, key: str, device: str) -> None:
        self.is_full = True
        source = "max_bytes" if self.max_bytes is not None else "a quarter of its memory"
        _warn(
            f"captured values would take more than {self._budget(device):,} bytes on {device} ({source}): {key!r} and "
            "all that follows is not recorded, until get_local.clear(). If capture was left active by mistake, call "
            "get_local.deactivate(); else keep less (limit=, keep=) or allow more (max_bytes=)."
        )


def _warn(message: str) -> None:
    """Warn at the innermost line that is not ours: in the captured function, or where the cache is read."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, VisualizerWarning, stacklevel=level)


class Channel:
    """One function's variables on their way from its rewritten code into a store."""

    def __init__(self, store: Store, site: str, names: tuple[str, ...], at: At, keep: Keep | None) -> None:
        self.store, self.names, self.at, self.keep = store, names, at, keep
        self.site = site
        """What the rewritten code passes as the hook's key: unique in the process."""
        self.keys: dict[str, str] = {}
        """Variable -> the store's key for it."""
        self.calls = count()
        self.code: CodeType | None = None
        """The code that is captured from, for messages."""
        self.made: tuple[CodeType, CodeType] | None = None
        """The code that was last rewritten for this channel, and the result."""
        self._numbers: dict[int, int] = {}
        self._warned: set[str] = set()

    def connect(self, default: Keep) -> None:
        """Receive what the rewritten code brings, from now on; `default` where the channel has no `keep` of its own."""
        keep = default if self.keep is None else self.keep
        _sinks[self.site] = self._assignments(keep) if self.at == "assign" else self._returns(keep)

    def disconnect(self) -> None:
        """Ignore what the rewritten code brings, calls that are under way included."""
        _sinks.pop(self.site, None)

    def name_values(self, value: Any) -> list[tuple[str, Any]]:
        """The variables that were bound, with their values, of what one call brought."""
        if self.at == "assign":
            return [value]
        pairs = [(self.names[0], value)] if len(self.names) == 1 else zip(self.names, value, strict=True)
        return [(name, item) for name, item in pairs if item is not receive]

    def _returns(self, keep: Keep) -> Callable[[Any], None]:
        store, names, convert, at_once = self.store, self.names, self._guarded(keep), keep != "graph"

        def take_one(value: Any) -> None:
            if store.is_full:
                return
            if value is receive or value is None:
                self._report_missing(names[0], value)
            kept = value if value is receive else convert(names[0], value)
            store.put(self, kept, -1, None, at_once or store.limit is not None)

        def take_all(values: tuple[Any, ...]) -> None:
            if store.is_full:
                return
            for name, value in zip(names, values, strict=True):
                if value is receive or value is None:
                    self._report_missing(name, value)
            kept = tuple(v if v is receive else convert(n, v) for n, v in zip(names, values, strict=True))
            store.put(self, kept, -1, None, at_once or store.limit is not None)

        return take_one if len(names) == 1 else take_all

    def _assignments(self, keep: Keep) -> Callable[[Any], None]:
        store, convert, numbers = self.store, self._guarded(keep), self._numbers

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
                if call is None:  # capture was switched on, or the number forgotten, while the call was under way
                    call = numbers[frame] = next(self.calls)
                store.put(self, (name, convert(name, value)), call, line, True)

        return take

    def _guarded(self, keep: Keep) -> Callable[[str, Any], Any]:
        """What converts a variable's value; errors say whose they are, and are remembered."""
        convert = keeper(keep)

        def guarded(name: str, value: Any) -> Any:
            try:
                return convert(value)
            except Exception as error:
                error.add_note(f"while keeping {name!r} of {self._function()} with keep={keep!r}")
                self.store.fail(error)
                raise

        return (lambda name, value: value) if keep == "graph" else guarded

    def _function(self) -> str:
        code = self.code
        return "?" if code is None else f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"

    def _report_missing(self, name: str, value: Any) -> None:
        """Warn, once, that a call had nothing under the name, with the likely cause."""
        code = self.code
        if name in self._warned or code is None:
            return
        if value is None:
            looks_like_attention = any(word in f"{code.co_qualname} {name}".lower() for word in ("forward", "att"))
            last = self.store.last(self.keys[name])
            if not (is_tensor(last) or is_array(last) or ("torch" in sys.modules and looks_like_attention)):
                return
        self._warned.add(name)
        lines = ", ".join(map(str, assigned_lines(code, name)))
        what = "was None, and None was recorded" if value is None else "was not bound, and nothing was recorded"
        where = f"it is assigned on line {lines}" if lines else "the function never assigns it"
        _warn(
            f"{name!r} {what} when {self._function()} returned; {where}. The usual causes: a fused attention "
            "kernel that never makes the weights (build the model with timm.layers.set_fused_attn(False), or "
            'attn_implementation="eager" in transformers), or a flag of the model that guards those lines.'
        )

"""`Cache`: captured values by key, as their user reads and changes them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator
from sys import getsizeof
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import UnknownKeyError, did_you_mean, warn
from ..tensors import is_array, is_tensor, shape_of
from .budget import bytes_by_device
from .printing import human
from .records import Record, Saved
from .results import RecordedMaps
from .shelf import listed
from .stacking import stacked
from .store import Store

if TYPE_CHECKING:
    from collections.abc import ValuesView

Stack = TypeVar("Stack")
"""What the values become in one: an array, or a tensor."""

_NAMED = 12  # keys in an error message
_NUMBERS = frozenset((int, float, bool))


class Cache(RecordedMaps, dict[str, list[Any]], Generic[Stack]):
    """Captured values: a dict from key to the list of values, in call order.

    Reading it first waits for values that are on their way, from a GPU for example. The error about a missing key lists
    the keys. A list that you hold grows with the calls; values on a GPU come into it when the cache is read. Printed,
    the cache is a table of keys, calls, shapes, types and bytes.
    """

    def __init__(self, store: Store, title: str) -> None:
        super().__init__()
        self.store = store
        """What files the values here."""
        self.namesakes: dict[str, dict[str, str]] = {}
        """For each name that several functions have: their keys, each with the function's file and line."""
        self._title, self.about = title, {}
        store.fill(self)

    @property
    def records(self) -> list[Record]:
        """Every value with where it comes from, in the order of the keys, then of the calls.

        >>> from visualizer import capture
        >>> def attend(x):
        ...     attn = 2 * x
        ...     return "done"
        >>> with capture(attend, "attn") as found:
        ...     _ = attend(1), attend(2)
        >>> [(record.key, record.variable, record.call, record.value) for record in found.records]
        [('attend', 'attn', 0, 2), ('attend', 'attn', 1, 4)]
        """
        return self.store.records()

    def stack(self, call: int | None = None) -> Stack:
        """One array of all maps, layers first: the values of the keys stacked, in the order of the keys.

        >>> import numpy as np
        >>> from visualizer import capture
        >>> def attend(x):
        ...     attn = np.full((1, 2, 5, 5), x)
        ...     return "done"
        >>> with capture(attend, "attn") as found:
        ...     _ = [attend(layer) for layer in range(12)]
        >>> found.stack().shape
        (12, 1, 2, 5, 5)

        Args:
            call: which value of each key, as an index into its list (-1: the newest). None: the only value of each
                key, or, if there is one key, all of its values.

        Returns:
            An array of shape (keys, *shape of a value), of the values' dtype; with a single key and call=None the
            first axis is its values. Tensors give a tensor on their device, or on the CPU if they are on several.

        Raises:
            ValueError: nothing was captured, a key has no such value, or the shapes differ; the message says which.
        """
        self.store.fetch()
        whole: Stack = stacked(self, call, state=self.store.state)
        return whole

    def saved(self, about: dict[str, Any] | None = None) -> Saved:
        """The values and their records as plain data."""
        return Saved("values", tuple(self), self.records, self.about if about is None else about)

    @classmethod
    def from_saved(cls, saved: Saved, source: str = "") -> Cache[Any]:
        """A cache of its own, with the same values and records; `source` is the file that they were read from."""
        store = Store(state=f"read from {source}" if source else "this is a copy of what was captured")
        cache: Cache[Any] = Cache(store, f"load({source!r})" if source else "captured values")
        store.restore(saved.keys, saved.records)
        cache.about = saved.about
        return cache

    def fetch(self) -> None:
        """Wait for values that are on their way, and put them into the lists, those that you hold too.

        Every way of reading the cache does so itself. Values that you have removed from a list are released here, or
        when the next value arrives.
        """
        self.store.fetch()
        self.store.reconcile()

    def __getitem__(self, key: str) -> list[Any]:
        self.store.fetch()
        return super().__getitem__(key)

    def _longer(self, key: str) -> list[str]:
        """The keys that a name stands for which several functions have: those with values, or else all."""
        if super().__contains__(key):
            return []
        keys = [longer for longer in self.namesakes.get(key, ()) if dict.__contains__(self, longer)]
        return list(filter(self._has_values, keys)) or keys

    def _which(self, key: str) -> list[str]:
        """The key that a name stands for, or all if there is nothing under any; an error if several have values."""
        keys = self._longer(key)
        if len(keys) > 1 and any(map(self._has_values, keys)):
            places = [f"{longer!r} ({self.namesakes[key][longer]})" for longer in keys]
            raise UnknownKeyError(f"{len(keys)} functions named {key!r} were recorded: read {' or '.join(places)}")
        return keys

    def _has_values(self, key: str) -> bool:
        return len(listed(dict.__getitem__(self, key))) > 0

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(key) or len(self._longer(key)) > 0

    def __missing__(self, key: str) -> list[Any]:
        keys = self._which(key)
        if len(keys) > 1:
            warn(
                f"several functions are named {key!r}, and none has run: this list stays empty. Read again after the "
                f"calls, or read {' or '.join(map(repr, keys))}.",
                "several-functions-of-one-name",
            )
            return []
        if keys:
            return super().__getitem__(keys[0])
        keys = list(self)
        named = ", ".join(map(repr, keys[:_NAMED])) or "none yet"
        if len(keys) > _NAMED:
            named += f" and {len(keys) - _NAMED} more"
        longer = [each for each in keys if f".{key}@" in f".{each}@"]
        hint = f"; did you mean {' or '.join(map(repr, longer[:_NAMED]))}?" if longer else did_you_mean(keys, str(key))
        what = f"nothing was captured under {key!r}{hint or '.'}"
        raise UnknownKeyError(f"{what} The keys are: {named}; {self.store.state}")

    def get(self, key: str, default: Any = None) -> Any:
        """The list under a key, or the default."""
        self.store.fetch()
        return self[key] if self._longer(key) else super().get(key, default)

    # An __iter__ in Python makes dict(cache) and {**cache} read through __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def values(self) -> ValuesView[list[Any]]:  # type: ignore[override]
        """The lists."""
        self.store.fetch()
        return super().values()

    def items(self) -> ItemsView[str, list[Any]]:  # type: ignore[override]
        """The keys with their lists."""
        self.store.fetch()
        return super().items()

    # Each change first fetches what belongs under the old keys, and then releases what nobody can read any more.

    def pop(self, *args: Any) -> Any:
        """Remove a key, and return its list."""
        self.store.fetch()
        keys = self._which(args[0]) or args[:1]
        values = [super(Cache, self).pop(key, *args[1:]) for key in keys]
        self.store.reconcile(*keys)
        return values[0]

    def popitem(self) -> tuple[str, list[Any]]:
        """Remove the last key, and return it with its list."""
        self.store.fetch()
        key, values = super().popitem()
        self.store.reconcile(key)
        return key, values

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def __setitem__(self, key: str, values: list[Any]) -> None:
        self.store.fetch()
        keys = self._longer(key) or [key]
        if len(keys) > 1 and len(listed(values)):
            raise UnknownKeyError(f"several functions are named {key!r}: set {' or '.join(map(repr, keys))}")
        for place in keys:
            super().__setitem__(place, values if place is keys[0] else [])
        self.store.reconcile(*keys)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The list under a key; without one, the default is put there and returned."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Put lists under their keys."""
        for key, values in dict(*args, **kwargs).items():
            self[key] = values

    def __ior__(self, other: Any) -> Cache[Stack]:  # type: ignore[override, misc]
        self.update(other)
        return self

    def clear(self) -> None:
        """Start over with empty lists under the same keys; lists that you hold keep their values."""
        self.store.clear()

    def copy(self) -> dict[str, list[Any]]:
        """A plain dict of the same lists."""
        return dict(self)

    def __eq__(self, other: object) -> bool:
        self.store.fetch()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line that sums everything up, and the rows of the table; the first row has the column names."""
        self.store.fetch()
        self.store.reconcile()
        rows: list[tuple[str, ...]] = [("key", "calls", "shape", "dtype", "bytes")]
        total = values_in_all = 0
        for key, values in list(super().items()):
            size = _bytes_of(values)
            total, values_in_all = total + size, values_in_all + len(values)
            called = self.store.calls_of(key) or len(values)
            count = f"{called}" if called == len(values) else f"{called} ({len(values)} values)"
            cells = dict.fromkeys(_shapes_and_dtypes(values))
            shapes, dtypes = (_few(dict.fromkeys(column)) for column in zip(*cells, strict=True)) if cells else ("", "")
            rows.append((key or "''", count, shapes, dtypes, human(size)))
        keys = f"{len(self)} key{'' if len(self) == 1 else 's'}"
        head = f"{self._title}: {keys}, {values_in_all} value{'' if values_in_all == 1 else 's'}, {human(total)}"
        return head, rows


def _are_numbers(values: list[Any]) -> bool:
    try:
        return _NUMBERS.issuperset(map(type, values))
    except Exception:  # a class whose own code fails
        return False


def _bytes_of(values: list[Any]) -> int:
    if _are_numbers(values):
        return sum(map(getsizeof, values))
    return sum(sum(bytes_by_device(value).values()) for value in values)


def _shapes_and_dtypes(values: list[Any]) -> Iterable[tuple[str, str]]:
    """The shape and the dtype of each value, but once for all numbers of a type that follow each other."""
    if _are_numbers(values):
        return [("", cls.__name__) for cls in dict.fromkeys(map(type, values))]
    return map(_shape_and_dtype, values)


def _shape_and_dtype(value: Any) -> tuple[str, str]:
    """The shape and the dtype of a value, as text."""
    if is_tensor(value) or is_array(value):
        shape = shape_of(value)
        return "nested" if shape is None else str(shape), str(value.dtype).removeprefix("torch.")
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{len(value)} items", type(value).__name__
    return "", type(value).__name__


def _few(names: dict[str, None]) -> str:
    first = list(names)[:2]
    return " or ".join(first) if len(names) <= 2 else f"{first[0]} and {len(names) - 1} others"

"""What was captured, as its readers see it: records, and the cache that lists their values by key."""

from __future__ import annotations

import sys
from collections.abc import ItemsView, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import UnknownKeyError, did_you_mean
from ..tensors import bytes_by_device, is_array, is_tensor, shape_of

if TYPE_CHECKING:
    from collections.abc import ValuesView

    from .store import Store

_ROWS = 100  # of a printed table; a model of more layers gets a line that says how many are left out
_NAMED = 12  # keys in an error message


@dataclass(slots=True, eq=False)
class Record:
    """One captured value and where it comes from."""

    key: str
    """The key of the cache that lists it."""
    variable: str
    value: Any
    """What was kept of it."""
    call: int
    """Which call of the function it belongs to, counted from 0 since `clear()`; the values of a call share it."""
    line: int | None
    """The line that assigned it, for at="assign"."""
    thread: int
    """`threading.get_ident()` of the thread that called."""
    module: str | None = None
    """The path of the module that was called, where a module was captured from; "" for the module itself."""

    def __repr__(self) -> str:
        has = shape_of(self.value)
        shape = "" if has is None else f" of shape {has}"
        line = "" if self.line is None else f", line={self.line}"
        return f"<Record {self.key!r}: {self.variable}, call={self.call}{line}, {type(self.value).__name__}{shape}>"


class Cache(dict[str, list[Any]]):
    """Captured values: a dict from key to the list of values, in call order.

    Reading it first fetches what is still on its way, from a GPU too; a missing key's error says what there is. A list
    that you hold grows with the calls; with keep="graph", and for values on a GPU, only when the cache is read.
    Printed, it is a table of keys, calls, shapes, types and bytes.
    """

    def __init__(self, store: Store, title: str) -> None:
        super().__init__()
        self._store, self._title = store, title
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
        return self._store.records()

    def stack(self, call: int | None = None) -> Any:
        """One array of all maps, layers first: the keys' values on each other, in the order of the keys.

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
            call: which value of each key, as an index of its list (-1: the newest). None: the only one that each has;
                where there is one key, all of its values.

        Returns:
            Arrays give an array, tensors a tensor on their device (on the CPU where they live on several), of the
            values' type; the keys come first, then the values' own axes.

        Raises:
            ValueError: nothing was captured, a key has no such value, or the shapes differ; the message says which.
        """
        self._store.fetch()
        if not self:
            raise ValueError("there is nothing to stack: no key")
        if call is None and len(self) == 1:
            [(key, values)] = self.items()
            chosen = [(f"{key}[{i}]", value) for i, value in enumerate(values)]
            if not chosen:
                raise ValueError(f"there is nothing to stack: {key!r} has no values; {self._store.state}")
        else:
            chosen = []
            for key, values in self.items():
                if call is None and len(values) != 1:
                    raise ValueError(
                        f"{key!r} has {len(values)} values where stack() needs one of each key; stack(call=-1) takes "
                        "the newest, and limit=1 keeps only that"
                        if values
                        else f"{key!r} has no values: it did not run, or had nothing to record; pop the keys that you "
                        "do not want"
                    )
                try:
                    chosen.append((key, values[0 if call is None else call]))
                except IndexError:
                    raise ValueError(f"{key!r} has {len(values)} values, none at {call}") from None
        return _stacked(chosen)

    def save(self, path: str | PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write everything captured to a `.safetensors` file, which `visualizer.load` reads without the model.

        >>> import os, tempfile
        >>> from visualizer import capture, load
        >>> def attend(x):
        ...     attn = [x, 2 * x]
        ...     return "done"
        >>> with capture(attend, "attn") as found:
        ...     _ = attend(1)
        >>> path = os.path.join(tempfile.mkdtemp(), "maps.safetensors")
        >>> found.save(path, about={"tokens": ["it", "works"]})
        >>> again = load(path)
        >>> again["attend"], again.about["tokens"]
        ([[1, 2]], ['it', 'works'])

        Args:
            path: the file. It is written beside it and then put in its place, so that a process that is killed leaves
                the old file or none.
            about: a dict of what else belongs to the maps: tokens, the picture, the grid of patches. None: what it had,
                if it was read from a file.

        Raises:
            TypeError: a value is not made of arrays, dense tensors, numbers, strings, None, and lists, tuples, sets and
                dicts of these. The message names its key; nothing is written.
            ValueError: what is not in arrays takes more than 100 MB, the most that the format has room for.
            OSError: the file cannot be written.
        """
        from .files import write

        write(path, list(self), self.records, self.about if about is None else about)

    def fetch(self) -> None:
        """Wait for what is still on its way, into the lists that you hold too; every way of reading does so itself.

        What you have taken out of the lists is forgotten here, or as the next value comes.
        """
        self._store.fetch()
        self._store.follow()

    @property
    def about(self) -> dict[str, Any]:
        """What `save` was given beside the values; {} unless this was read from a file."""
        return self._store.about

    def __getitem__(self, key: str) -> list[Any]:
        self._store.fetch()
        return super().__getitem__(key)

    def __missing__(self, key: str) -> list[Any]:
        keys = list(self)
        named = ", ".join(map(repr, keys[:_NAMED])) or "none yet"
        if len(keys) > _NAMED:
            named += f" and {len(keys) - _NAMED} more"
        hint = did_you_mean(keys, str(key)) or "."
        raise UnknownKeyError(f"nothing was captured under {key!r}{hint} The keys are: {named}; {self._store.state}")

    def get(self, key: str, default: Any = None) -> Any:
        """The list under a key, or the default."""
        self._store.fetch()
        return super().get(key, default)

    # Iterating in Python, not in C, makes dict(cache) and {**cache} read through __getitem__.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def values(self) -> ValuesView[list[Any]]:  # type: ignore[override]
        """The lists."""
        self._store.fetch()
        return super().values()

    def items(self) -> ItemsView[str, list[Any]]:  # type: ignore[override]
        """The keys with their lists."""
        self._store.fetch()
        return super().items()

    # What changes the cache fetches what belongs under the old keys, and then lets go of what nobody can read any more.

    def pop(self, *args: Any) -> Any:
        """Take a key and its list out."""
        self._store.fetch()
        found = super().pop(*args)
        self._store.follow(args[0])
        return found

    def popitem(self) -> tuple[str, list[Any]]:
        """Take the last key and its list out."""
        self._store.fetch()
        found = super().popitem()
        self._store.follow(found[0])
        return found

    def __delitem__(self, key: str) -> None:
        self._store.fetch()
        super().__delitem__(key)
        self._store.follow(key)

    def __setitem__(self, key: str, values: list[Any]) -> None:
        self._store.fetch()
        super().__setitem__(key, values)
        self._store.follow(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The list under a key, or the default, which is put there."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Put lists under their keys."""
        for key, values in dict(*args, **kwargs).items():
            self[key] = values

    def __ior__(self, other: Any) -> Cache:  # type: ignore[override, misc]
        self.update(other)
        return self

    def clear(self) -> None:
        """Start over with empty lists under the same keys; lists that you hold keep their values."""
        self._store.clear()

    def copy(self) -> dict[str, list[Any]]:
        """A plain dict of the same lists."""
        return dict(self)

    def __eq__(self, other: object) -> bool:
        self._store.fetch()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return as_text(*self._table())

    def _repr_html_(self) -> str:
        return as_html(*self._table())

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line about the whole, and the rows of the table, its header first."""
        self._store.fetch()
        calls: dict[str, set[int]] = {}
        for record in self._store.records():
            calls.setdefault(record.key, set()).add(record.call)
        rows: list[tuple[str, ...]] = [("key", "calls", "shape", "dtype", "bytes")]
        total = values_in_all = 0
        for key, values in list(super().items()):
            size = sum(sum(bytes_by_device(value).values()) for value in values)
            total, values_in_all = total + size, values_in_all + len(values)
            called = len(calls.get(key, ())) or len(values)
            count = f"{called}" if called == len(values) else f"{called} ({len(values)} values)"
            kinds = [_kind(value) for value in values]
            shapes, dtypes = (_few(dict.fromkeys(column)) for column in zip(*kinds, strict=True)) if kinds else ("", "")
            rows.append((key or "''", count, shapes, dtypes, human(size)))
        keys = f"{len(self)} key{'' if len(self) == 1 else 's'}"
        head = f"{self._title}: {keys}, {values_in_all} value{'' if values_in_all == 1 else 's'}, {human(total)}"
        return head, rows


def _kind(value: Any) -> tuple[str, str]:
    """A value's shape and dtype, in words."""
    if is_tensor(value) or is_array(value):
        shape = shape_of(value)
        return "nested" if shape is None else str(shape), str(value.dtype).removeprefix("torch.")
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{len(value)} items", type(value).__name__
    return "", type(value).__name__


def _few(names: dict[str, None]) -> str:
    first = list(names)[:2]
    return " or ".join(first) if len(names) <= 2 else f"{first[0]} and {len(names) - 1} others"


def as_text(head: str, rows: list[tuple[str, ...]]) -> str:
    """A table in plain text, as a repr: a line about the whole, then the rows, of which the first names the columns."""
    if len(rows) == 1:
        return f"<{head}>"
    rows = _few_rows(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"<{head}", *(f"  {line.rstrip()}" for line in lines)]) + ">"


def as_html(head: str, rows: list[tuple[str, ...]]) -> str:
    """The same as HTML, for notebooks."""
    import html

    names, *rest = _few_rows(rows)
    cell = '<{0} style="text-align:left">{1}</{0}>'.format
    body = "".join(f"<tr>{''.join(cell('td', html.escape(text)) for text in row)}</tr>" for row in rest)
    header = "".join(cell("th", name) for name in names)
    return (
        f'<table><caption style="text-align:left;white-space:nowrap">{html.escape(head)}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    )


def _few_rows(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    left = len(rows) - 1 - _ROWS
    if left < 1:
        return rows
    return [*rows[: _ROWS + 1], (f"... {left} more", *[""] * (len(rows[0]) - 1))]


def human(size: int) -> str:
    """Bytes as people write them: 999 B, 55.5 kB, 1.42 GB."""
    amount, unit = float(size), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, bigger
    return f"{size} B" if unit == "B" else f"{amount:.3g} {unit}"


def _stacked(chosen: list[tuple[str, Any]]) -> Any:
    nested = next((name for name, value in chosen if is_tensor(value) and shape_of(value) is None), None)
    if nested is not None:
        raise ValueError(f"{nested!r} has no one shape: it is a nested tensor")
    shapes = {name: getattr(value, "shape", None) for name, value in chosen}
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if other != shape:
            raise ValueError(f"{name!r} cannot be stacked on {first!r}: {_of(other)} on {_of(shape)}")
    values = [value for _, value in chosen]
    if all(map(is_tensor, values)):
        torch = sys.modules["torch"]
        if len({value.device for value in values}) > 1:
            values = [value.cpu() for value in values]
        return torch.stack(values)
    import numpy

    stacked = numpy.stack([numpy.asarray(value) for value in values])
    if stacked.dtype == object:
        raise ValueError(f"{first!r} and the others are no arrays, tensors or numbers, but {type(values[0]).__name__}")
    return stacked


def _of(shape: Any) -> str:
    return "a value without a shape" if shape is None else f"shape {tuple(shape)}"

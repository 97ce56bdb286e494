"""What was recorded, as plain data: each value with where it comes from, and all of them together.

A `Record` is one value. `Saved` is everything that was recorded, free of what recorded it: a file holds it, and copies
and pickles are made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..tensors import shape_of

Kind = Literal["values", "maps", "statistics"]
"""What `capture`, `attention` and `collect` record."""


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


@dataclass(frozen=True)
class Saved:
    """Everything that was recorded, as plain data."""

    kind: Kind
    keys: tuple[str, ...]
    """Every key, those without records too."""
    records: list[Record]
    """Their values are made of arrays, tensors, numbers, strings and containers of these, if they are to be written."""
    about: dict[str, Any]
    """What `save` was given beside them."""

    def values(self, key: str) -> list[Any]:
        """The values under a key, in call order."""
        return [record.value for record in self.records if record.key == key]

"""What was recorded, as plain data.

A `Record` is one value with where it comes from. `Saved` is everything that was recorded, without the model and without
any capture: files, copies and pickles are made from it.
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
    """The number of the function's call, counted from 0 since `clear()`; all values of a call have the same."""
    line: int | None
    """The line that assigned it, for at="assign"."""
    thread: int
    """`threading.get_ident()` of the thread that called."""
    module: str | None = None
    """The path of the module that was called, where a module was captured from; "" for the module itself."""

    def __repr__(self) -> str:
        shape = shape_of(self.value)
        of_shape = "" if shape is None else f" of shape {shape}"
        line = "" if self.line is None else f", line={self.line}"
        return f"<Record {self.key!r}: {self.variable}, call={self.call}{line}, {type(self.value).__name__}{of_shape}>"


@dataclass(frozen=True)
class Saved:
    """Everything that was recorded, as plain data."""

    kind: Kind
    keys: tuple[str, ...]
    """All keys, those without records too."""
    records: list[Record]
    """To be written, their values must be arrays, tensors, numbers, strings and containers of these."""
    about: dict[str, Any]
    """What `save` was given beside them."""

    def values(self, key: str) -> list[Any]:
        """The values under a key, in call order."""
        return [record.value for record in self.records if record.key == key]

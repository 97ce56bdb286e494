"""The face that the results of `capture`, `attention` and `collect` share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from os import PathLike
from typing import Any

from .records import Record, Saved
from .tables import as_html, as_text


class Recorded(ABC):
    """What was recorded, and how it is read: printed as a table, saved, copied, pickled."""

    about: dict[str, Any]
    """What `save` was given beside the values; {} unless this was read from a file."""

    @property
    @abstractmethod
    def records(self) -> list[Record]:
        """Every value with where it comes from."""

    @abstractmethod
    def saved(self, about: dict[str, Any] | None = None) -> Saved:
        """All of it as plain data, of which `from_saved` makes the same again; `about` in place of what it has."""

    @classmethod
    @abstractmethod
    def from_saved(cls, saved: Saved) -> Recorded:
        """What was recorded, free of what recorded it."""

    @abstractmethod
    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line about the whole, and the rows of a table, its header first."""

    def save(self, path: str | PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write everything to a `.safetensors` file, which `visualizer.load` reads without the model.

        Args:
            path: the file. It is written beside it and then put in its place, so that a process that is killed leaves
                the old file or none.
            about: a dict of what else belongs to the values: tokens, the picture, the grid of patches. None: what it
                had, if it was read from a file.

        Raises:
            TypeError: a value is not made of arrays, dense tensors, numbers, strings, None, and lists, tuples, sets and
                dicts of these. The message names its key; nothing is written.
            ValueError: what is not in arrays takes more than 100 MB, the most that the format has room for.
            OSError: the file cannot be written.
        """
        from .files import write  # takes its time to load, and most programs save nothing

        write(path, self.saved(about))

    def __reduce__(self) -> tuple[Callable[[Saved], Any], tuple[Saved]]:
        return type(self).from_saved, (self.saved(),)

    def __repr__(self) -> str:
        return as_text(*self.table())

    def _repr_html_(self) -> str:
        return as_html(*self.table())

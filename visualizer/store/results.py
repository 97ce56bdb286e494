"""What the results of `capture`, `attention` and `collect` have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from os import PathLike
from typing import Any

from .records import Record, Saved
from .tables import as_html, as_text


class Recorded(ABC):
    """What was recorded. It can be printed as a table, saved, copied and pickled."""

    about: dict[str, Any]
    """What `save` was given beside the values; {} unless this was read from a file."""

    @property
    @abstractmethod
    def records(self) -> list[Record]:
        """Every value with where it comes from."""

    @abstractmethod
    def saved(self, about: dict[str, Any] | None = None) -> Saved:
        """All of it as plain data, from which `from_saved` makes the same again; `about` replaces its own."""

    @classmethod
    @abstractmethod
    def from_saved(cls, saved: Saved) -> Recorded:
        """The results that `saved()` was called on, without the model and without any capture."""

    @abstractmethod
    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line that sums everything up, and the rows of a table; the first row has the column names."""

    def save(self, path: str | PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write everything to a `.safetensors` file, which `visualizer.load` reads without the model.

        Args:
            path: the file. A new file is written beside it and then renamed, so that a process that is killed leaves
                the old file or none.
            about: a dict of what else belongs to the values: tokens, the picture, the grid of patches. None: the dict
                of the file that this was read from, if any.

        Raises:
            TypeError: a value is not made of arrays, dense tensors, numbers, strings, None, and lists, tuples, sets and
                dicts of these. The message names its key; nothing is written.
            ValueError: the suffix of the path says another format (`x.pt`, `x.csv`), or what is not in arrays takes
                more than 100 MB, which is the limit of the format.
            OSError: the file cannot be written; the path is a folder, a device or a named pipe.
        """
        from .files import write  # takes time to load, and most programs save nothing

        write(path, self.saved(about))

    def __reduce__(self) -> tuple[Callable[[Saved], Any], tuple[Saved]]:
        return type(self).from_saved, (self.saved(),)

    def __repr__(self) -> str:
        return as_text(*self.table())

    def _repr_html_(self) -> str:
        return as_html(*self.table())

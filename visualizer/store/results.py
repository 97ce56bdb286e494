"""What the results of `capture`, `attention` and `collect` have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypedDict, Unpack

from .printing import Printed
from .records import Record, Saved


class Recorded(Printed):
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


class Choosing(TypedDict, total=False):
    """The keywords that choose the rows of a table; `RecordedMaps.to_frame` explains them."""

    layers: int | str | Sequence[int | str] | None
    heads: int | Sequence[int] | None
    queries: int | Sequence[int] | None
    top: int | None
    tokens: Sequence[Any] | None
    query_tokens: Sequence[Any] | None
    key_tokens: Sequence[Any] | None
    max_rows: float


class RecordedMaps(Recorded):
    """What was recorded, where it is attention maps: the results of `attention`, and of `capture` if they are maps."""

    def to_frame(self, **choice: Unpack[Choosing]) -> Any:
        """The weights as a `pandas.DataFrame`, a row for each.

        >>> import numpy as np
        >>> from visualizer import capture
        >>> def attend(x):
        ...     attn = np.array([[0.75, 0.25], [0.5, 0.5]], dtype="float32")
        ...     return x
        >>> with capture(attend, "attn") as found:
        ...     _ = attend(1)
        >>> found.to_frame(tokens=["a", "cat"])
           layer  module  head  query  key  weight query_token key_token
        0      0  attend     0      0    0    0.75           a         a
        1      0  attend     0      0    1    0.25           a       cat
        2      0  attend     0      1    0    0.50         cat         a
        3      0  attend     0      1    1    0.50         cat       cat
        >>> found.to_frame(top=1)["key"].tolist()  # of each query the best key
        [0, 0]

        The columns are layer (the modules, numbered in their order), module (its path, or the key of what was
        captured), head, query, key and weight; "call" too where a module was called several times, "batch" where there
        are several images or texts; "query_token" and "key_token" with words; of `maps.generated()` "query_generated"
        and "key_generated", whether the model wrote the token. All numbers count from 0. A fused map is computed some
        rows at a time.

        Args:
            layers: numbers of modules, -1 is the last; paths, or patterns of paths such as "encoder.*". None: all.
            heads, queries: which; -1 is the last. None: all.
            top: how many keys to take of each query, those with the most weight, best first. None: all.
            tokens: the words of the queries and the keys, where these are the same. None: those that the maps know, as
                of `attention(model, tokenizer=...)`.
            query_tokens, key_tokens: those of one side, where they are not.
            max_rows: larger tables are refused. The default, ten million, takes about a gigabyte; `math.inf`: no limit.

        Raises:
            ImportError: pandas is not installed; `to_csv` does without.
            ValueError: nothing was recorded, the words do not fit, or the table is too large; the message says how
                large, and how to choose.
            TypeError: a value is no map; the message names its key. Or there is no such keyword.
            IndexError: there is no such head or query.
        """
        from .export import Choice, frame  # loads numpy, and most programs make no tables

        return frame(self.records, Choice(**choice))

    def to_csv(self, path: str | PathLike[str], **choice: Unpack[Choosing]) -> None:
        """Write the table of `to_frame` to a text file in UTF-8, with commas; with tabs if the path ends in ".tsv".

        It is written some rows at a time, so that a large `max_rows` takes room on the disk alone. Weights have as many
        digits as their type. A new file takes the place of the old one once it is whole.

        Raises:
            ValueError: besides the reasons of `to_frame`, the suffix of the path says another format.
            OSError: the file cannot be written; the path is a folder, a device or a named pipe.
        """
        from .export import Choice, write_csv

        write_csv(path, self.records, Choice(**choice))

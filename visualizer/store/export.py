"""Maps for other programs: a table with a row for each weight, as pandas, R and spreadsheets read it.

Nothing is made at once but the table itself: maps are read some rows at a time, and fused ones computed so.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ALL_WORDS, few, not_installed
from ..tensors import is_array, is_tensor, keeper
from .destination import check_destination, replacing
from .printing import human
from .records import Record

Array = npt.NDArray[Any]

_CHUNK = 2**18  # bytes of the weights that are read at a time; their rows in the table take much more
_BYTES = 40  # of a row of the table, beside its words


@dataclass(frozen=True)
class Choice:
    """Which of the weights are wanted; see `RecordedMaps.to_frame`."""

    layers: int | str | Sequence[int | str] | None = None
    heads: int | Sequence[int] | None = None
    queries: int | Sequence[int] | None = None
    top: int | None = None
    tokens: Sequence[Any] | None = None
    query_tokens: Sequence[Any] | None = None
    key_tokens: Sequence[Any] | None = None
    max_rows: float = 10_000_000


class _Map:
    """A captured value as a map, (batch, heads, queries, keys), with what is wanted of it."""

    def __init__(self, record: Record, name: str, layer: int, choice: Choice) -> None:
        self.record, self.name, self.layer, self._choice = record, name, layer, choice
        value = record.value
        self._is_lazy = hasattr(value, "rows") and hasattr(value, "chunks")
        if not self._is_lazy:
            value = keeper("numpy")(value) if is_tensor(value) else value
            if not is_array(value) or value.dtype.kind not in "biuf" or not 2 <= value.ndim <= 4:
                what = (
                    f"an array of {value.dtype}, {value.ndim} axes" if is_array(value) else f"a {type(value).__name__}"
                )
                raise TypeError(
                    f"{name} is {what}, and a map has the axes (queries, keys), (heads, queries, keys) or (batch, "
                    "heads, queries, keys): choose others by layers="
                )
            value = value.reshape((1,) * (4 - value.ndim) + value.shape)
            value = value if value.dtype.kind == "f" else value.astype(np.float32)
        self._value = value
        self.batch, heads, queries, self.keys = map(int, value.shape)
        self._heads = _numbers(choice.heads, heads, f"{name} has {heads} heads, and heads")
        self._queries = _numbers(choice.queries, queries, f"{name} has {queries} queries, and queries")
        self._top: int = self.keys if choice.top is None else min(choice.top, self.keys)
        self.words = self._words_of(queries, self.keys)
        """The words of the queries and of the keys, (batch, tokens) each; None without any."""
        written = self._known("query_layout", queries, "generated"), self._known("layout", self.keys, "generated")
        self.written = written if any(tokens.any() for tokens in written) else None
        """Which of the queries and of the keys the model wrote, (batch, tokens) each; None where it wrote none."""

    @property
    def count(self) -> int:
        """How many rows it takes."""
        return int(self.batch * len(self._heads) * len(self._queries) * self._top)

    def columns(self) -> Iterator[dict[str, Array]]:
        """The columns of the table, some rows at a time."""
        for queries, weights in self._chunks():  # (queries,), (batch, heads, queries, keys)
            if self._choice.top is not None:
                keys = np.argsort(-weights, axis=-1, kind="stable")[..., : self._top]
                weights = np.take_along_axis(weights, keys, -1)
            else:
                keys = np.broadcast_to(np.arange(self.keys), weights.shape)
            places = [np.arange(self.batch), self._heads, queries, np.arange(self._top)]
            batch, head, query, _ = (axis.ravel() for axis in np.meshgrid(*places, indexing="ij"))
            made = {"batch": batch, "head": head, "query": query, "key": keys.ravel(), "weight": weights.ravel()}
            if self.words is not None:
                of_queries, of_keys = self.words
                made |= {"query_token": of_queries[batch, query], "key_token": of_keys[batch, made["key"]]}
            if self.written is not None:
                queries_written, keys_written = self.written
                made["query_generated"] = queries_written[batch, query]
                made["key_generated"] = keys_written[batch, made["key"]]
            yield made

    def _chunks(self) -> Iterator[tuple[Array, Array]]:
        size = max(1, _CHUNK // max(1, 4 * self.batch * self._value.shape[1] * self.keys))
        for start in range(0, len(self._queries), size):
            queries = self._queries[start : start + size]
            rows = keeper("numpy")(self._value.rows(queries.tolist())) if self._is_lazy else self._value[:, :, queries]
            yield queries, rows[:, self._heads]

    def _words_of(self, queries: int, keys: int) -> tuple[Array, Array] | None:
        choice = self._choice
        if choice.tokens is not None and queries != keys and None in (choice.query_tokens, choice.key_tokens):
            raise ValueError(
                f"tokens= names both queries and keys, and {self.name} has {queries} queries over {keys} keys: pass "
                "query_tokens= and key_tokens=, or choose others by layers="
            )
        sides = (("query_tokens", queries), ("key_tokens", keys))
        given = [getattr(choice, name) for name, _ in sides]
        given = [choice.tokens if words is None else words for words in given]
        if given == [None, None]:
            known = self._known("query_layout", queries, "names"), self._known("layout", keys, "names")
            return known if any(words.any() for words in known) else None
        made = []
        for (name, size), words in zip(sides, given, strict=True):
            words = words.tolist() if hasattr(words, "tolist") else words
            texts = [""] * size if words is None else [str(word) for word in words]
            if len(texts) != size:
                raise ValueError(
                    f"{name if choice.tokens is None else 'tokens'} has {len(texts)} words, and {self.name} has {size} "
                    f"{'queries' if name == 'query_tokens' else 'keys'}: {ALL_WORDS}"
                )
            made.append(np.broadcast_to(np.array(texts, dtype=object), (self.batch, size)))
        return made[0], made[1]

    def _known(self, name: str, size: int, what: str) -> Array:
        """What a map's layout says of its tokens, (batch, tokens): their "names", or which are "generated".

        "" where it has no words, False where it does not know.
        """
        kind, empty = (object, "") if what == "names" else (bool, False)
        known = np.full((self.batch, size), empty, dtype=kind)
        layout: Any = getattr(self.record.value, name, None) if self._is_lazy else None  # tensors have another `layout`
        for text in range(0 if layout is None else self.batch):
            one = layout.of(text)
            if one.count == size and (what != "names" or one.has_words):
                known[text] = getattr(one, what)
        return known


def frame(records: Sequence[Record], choice: Choice) -> Any:
    """The table as a `pandas.DataFrame`."""
    try:
        import pandas
    except ImportError as error:
        raise not_installed("pandas", "pandas, or write a file that others read: to_csv needs nothing") from error
    maps, names = _chosen(records, choice)
    columns: dict[str, list[Array]] = {name: [] for name in names}
    for part in _table(maps, names):
        for name, values in part.items():
            columns[name].append(values)
    return pandas.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})


def write_csv(path: str | PathLike[str], records: Sequence[Record], choice: Choice) -> None:
    """Write the table as text: with commas, or with tabs where the path ends in .tsv."""
    check_destination(path, "csv")
    maps, names = _chosen(records, choice)
    delimiter = "\t" if os.fspath(path).lower().endswith(".tsv") else ","
    with replacing(path) as file:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(names)
        for part in _table(maps, names):
            # So many digits tell each number from all others.
            digits = "%.17g" if part["weight"].dtype.itemsize > 4 else "%.9g"
            cells: dict[str, Any] = {name: values.tolist() for name, values in part.items()}
            cells["weight"] = map(digits.__mod__, cells["weight"])
            writer.writerows(zip(*cells.values(), strict=True))
            file.write(text.getvalue().encode())
            text.seek(0)
            text.truncate()


def _chosen(records: Sequence[Record], choice: Choice) -> tuple[list[_Map], list[str]]:
    """The maps that are wanted, and the names of the columns; an error where these are too many rows."""
    if choice.top is not None and operator.index(choice.top) < 1:
        raise ValueError(f"top={choice.top!r} is how many keys to take of each query, 1 or more")
    by_key: dict[str, list[Record]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    layers = {key: layer for layer, key in enumerate(by_key) if _is_wanted(choice.layers, key, layer, len(by_key))}
    if not layers:
        known = f"layers={choice.layers!r} are none of {few([*by_key], 12)}" if by_key else "nothing was recorded"
        raise ValueError(f"there are no maps for a table: {known}")
    maps = [
        _Map(record, f"{key!r}" + (f"[{number}]" if len(by_key[key]) > 1 else ""), layer, choice)
        for key, layer in layers.items()
        for number, record in enumerate(by_key[key])
    ]
    count = sum(one.count for one in maps)
    if count > choice.max_rows:
        words = max(len(key) for key in layers)
        raise ValueError(
            f"this is a table of {count:,} rows, as text about {human(count * (_BYTES + words))}: choose fewer by "
            "layers=, heads=, queries= or top=, the best keys of each query; or allow more (max_rows=)"
        )
    more = ["call"] * any(len(by_key[key]) > 1 for key in layers) + ["batch"] * any(one.batch > 1 for one in maps)
    has_words = any(one.words is not None for one in maps)
    names = ["layer", "module", *more, "head", "query", "key", "weight"] + ["query_token", "key_token"] * has_words
    names += ["query_generated", "key_generated"] * any(one.written is not None for one in maps)
    return maps, names


def _is_wanted(layers: Any, key: str, layer: int, count: int) -> bool:
    """Whether a layer is among those that are chosen by numbers, paths and patterns of paths, as in `attention`."""
    if layers is None:
        return True
    return any(
        fnmatch.fnmatchcase(key, one) if isinstance(one, str) else layer - operator.index(one) in (0, count)
        for one in ([layers] if isinstance(layers, (int, str)) else layers)
    )


def _numbers(chosen: int | Sequence[int] | None, count: int, name: str) -> Array:
    """Numbers of heads or queries, counted from the front."""
    if chosen is None:
        return np.arange(count)
    numbers = np.atleast_1d(np.asarray(chosen))
    if len(numbers) and numbers.dtype.kind not in "iu":
        raise TypeError(f"{name}={chosen!r} are no integers")
    if len(numbers) and not (-count <= numbers.min() and numbers.max() < count):
        raise IndexError(f"{name}={chosen!r} are not among them")
    return numbers.astype(int) % max(1, count)


def _table(maps: Sequence[_Map], names: Sequence[str]) -> Iterator[dict[str, Array]]:
    """The columns, some rows at a time."""
    calls: dict[str, int] = {}
    for one in maps:
        key = one.record.key
        calls[key] = calls.get(key, -1) + 1
        whole = {"layer": np.array(one.layer), "module": np.array(key, dtype=object), "call": np.array(calls[key])}
        whole |= dict.fromkeys(("query_token", "key_token"), np.array("", dtype=object))
        whole |= dict.fromkeys(("query_generated", "key_generated"), np.array(False))
        for columns in one.columns():
            shape = columns["weight"].shape
            yield {name: columns[name] if name in columns else np.broadcast_to(whole[name], shape) for name in names}

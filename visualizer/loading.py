"""`load` reads what any `save` of this package wrote; `joined` makes several saved results one."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from .store import Cache, Record, Saved
from .store.files import read

if TYPE_CHECKING:
    from .intercept import Maps
    from .statistics import Collected


def load(path: str | PathLike[str]) -> Cache[Any] | Maps[Any] | Collected:
    """A cache of captured values, attention maps, or statistics, read from a file; the model is not needed.

    >>> import os, tempfile, torch
    >>> from visualizer import attention, load
    >>> model = torch.nn.MultiheadAttention(8, 2)
    >>> with attention(model) as maps:
    ...     y = model(*3 * [torch.ones(5, 1, 8)])
    >>> path = os.path.join(tempfile.mkdtemp(), "maps.safetensors")
    >>> maps.save(path, about={"tokens": list("abcde")})
    >>> again = load(path)
    >>> again[0], again.about["tokens"][0]
    (<AttentionMap (1, 2, 5, 5), self, dense, float32, cpu>, 'a')

    Args:
        path: the file, or a pattern such as "run/rank-*.safetensors". A file is read into memory whole; nothing in it
            is run. The files of a pattern become one result, in the order of their names, where rank-2 comes before
            rank-10. They must be of one kind. Statistics are merged; values and maps follow one another; of `about`
            the items stay that are the same in all files.

    Returns:
        What was saved. Arrays come back as arrays and tensors as tensors, with their shape and dtype; tensors are on
        the CPU and have no graph. Numbers (numpy's too), strings, bytes, None, lists, tuples, sets and dicts keep their
        types; those of a subclass (a model's output, a named tuple, an enum) come back plain. An object that was in
        several places is one object again.

    Raises:
        FileFormatError: the file is damaged, cut off, written by a newer version, or not written by this package; the
            message says which. Each byte is checked, so that what is returned is what was saved.
        ModuleNotFoundError: the file has tensors, and torch is not installed.
        OSError: the file cannot be opened (it is missing, a folder, or not yours to read), or no file matches the
            pattern.
        ValueError: the files of a pattern are of several kinds, or their statistics do not belong together.
    """
    name = os.fspath(path)
    names = [name]
    if not os.path.lexists(name) and glob.has_magic(name):
        names = sorted(glob.glob(name), key=_by_numbers)
        if not names:
            raise FileNotFoundError(f"no file matches {name!r}")
    parts = {name: read(name) for name in names}
    kinds = {name: saved.kind for name, saved in parts.items() if saved.records}
    if len({*kinds.values()}) > 1:
        listed = ", ".join(f"{name} has {kind}" for name, kind in kinds.items())
        raise ValueError(f"the files of a pattern must be of one kind, but {listed}")
    several = list(parts.values())
    kind = next(iter(kinds.values()), several[0].kind)
    if kind == "statistics":
        from .statistics.collected import Collected, merge  # needs torchmetrics

        statistics = [Collected.from_saved(saved) for saved in several if saved.records]
        whole = merge(statistics)
        whole.about = _agreed([part.about for part in statistics])
        return whole
    saved = several[0] if len(several) == 1 else joined(several)
    if kind == "values":
        return Cache.from_saved(saved, source=name)
    from .intercept import Maps  # needs torch

    return Maps.from_saved(saved)


def _by_numbers(name: str) -> list[tuple[str, int]]:
    """A sorting key that puts rank-2 before rank-10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def joined(parts: Sequence[Saved]) -> Saved:
    """All parts in one, one after the other, with the `about` that they agree on.

    Calls are numbered on where parts share keys. The calls of maps are those of all modules, and always numbered on.
    """
    keys, records = list(dict.fromkeys(key for saved in parts for key in saved.keys)), list[Record]()
    for saved in parts:
        shared = set(saved.keys)
        before = (record.call for record in records if saved.kind == "maps" or record.key in shared)
        first = 1 + max(before, default=-1)
        records += [replace(record, call=first + record.call) for record in saved.records]
    kind = next((saved.kind for saved in parts if saved.records), parts[0].kind)
    return Saved(kind, tuple(keys), records, _agreed([saved.about for saved in parts]))


def _agreed(abouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The items that are the same in all."""
    first, *others = abouts
    return {
        key: value
        for key, value in first.items()
        if all(key in other and _is_same(value, other[key]) for other in others)
    }


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if hasattr(one, "shape"):  # an array or a tensor
        return bool(one.shape == other.shape and (one == other).all())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())
    return bool(one == other)

"""What any `save` of this package wrote, as what it was."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from .store import Cache, Record, restored_cache
from .store import load as load_cache

if TYPE_CHECKING:
    from .intercept import Maps
    from .statistics import Collected


def load(path: str | PathLike[str]) -> Cache | Maps | Collected:
    """What was saved, without the model: a cache of captured values, attention maps, or statistics.

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
        path: the file. All of it is read into memory; nothing in it is run. Or a pattern, as "run/rank-*.safetensors":
            files of one kind become one, in the order of their names with numbers by their size. Statistics are merged,
            values and maps come one file after the other, and of `about` there is what all files agree on.

    Returns:
        A cache or maps of their own. Arrays come back as arrays and tensors as tensors, of their shape and dtype;
        tensors are on the CPU and have no graph. Numbers (numpy's too), strings, bytes, None, lists, tuples, sets and
        dicts have their types; those of a subclass (a model's output, a named tuple, an enum) come back plain. What was
        one object in several places is one again.

    Raises:
        FileFormatError: the file is damaged, cut off, written by a newer version, or none that a `save` of ours wrote;
            the message says which. Each byte is checked: what is returned is what was saved.
        ModuleNotFoundError: the file has tensors, and torch is not installed.
        OSError: the file cannot be opened: it is missing, a folder, or not yours to read; or no file is like the
            pattern.
        ValueError: the files of a pattern are of several kinds, or their statistics do not belong together.
    """
    name = os.fspath(path)
    names = [name]
    if not os.path.lexists(name) and glob.has_magic(name):
        names = sorted(glob.glob(name), key=_by_numbers)
        if not names:
            raise FileNotFoundError(f"no file is like {name!r}")
    caches = [load_cache(name) for name in names]
    kinds = [_kind(cache.records) for cache in caches]
    if len({*kinds}) > 1:
        told = ", ".join(f"{name} has {kind}" for name, kind in zip(names, kinds, strict=True))
        raise ValueError(f"files of one pattern are of one kind, and {told}")
    if kinds[0] == "statistics":
        from .statistics.collecting import merge, restored  # needs torchmetrics

        return merge([restored(cache.records, cache.about) for cache in caches])
    cache = caches[0] if len(caches) == 1 else _together(name, caches)
    if kinds[0] == "values":
        return cache
    from .intercept import restored as restored_maps  # needs torch

    return restored_maps(cache.records, cache.about)


def _by_numbers(name: str) -> list[tuple[str, int]]:
    """rank-2 before rank-10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _kind(records: Sequence[Record]) -> str:
    # No variable has a space in its name.
    first = next((record.variable.partition(" ") for record in records), ("", "", ""))
    return {"attention": "maps", "statistics": "statistics"}.get(first[0], "values") if first[1] else "values"


def _together(name: str, caches: Sequence[Cache]) -> Cache:
    """One cache of the values of all."""
    keys, records = list(dict.fromkeys(key for cache in caches for key in cache)), list[Record]()
    for cache in caches:
        calls = 1 + max((record.call for record in records), default=-1)
        records += [replace(record, call=calls + record.call) for record in cache.records]
    first, *others = (cache.about for cache in caches)
    about = {key: value for key, value in first.items() if all(_is_same(value, other.get(key)) for other in others)}
    return restored_cache(name, keys, records, about)


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # arrays, which compare number by number
        return False

"""What any `save` of this package wrote, as what it was."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from .store import Cache
from .store import load as load_cache

if TYPE_CHECKING:
    from .intercept import Maps


def load(path: str | PathLike[str]) -> Cache | Maps:
    """What was saved, without the model: a cache of captured values, or attention maps.

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
        path: the file. All of it is read into memory; nothing in it is run.

    Returns:
        A cache or maps of their own. Arrays come back as arrays and tensors as tensors, of their shape and dtype;
        tensors are on the CPU and have no graph. Numbers (numpy's too), strings, bytes, None, lists, tuples, sets and
        dicts have their types; those of a subclass (a model's output, a named tuple, an enum) come back plain. What was
        one object in several places is one again.

    Raises:
        FileFormatError: the file is damaged, cut off, written by a newer version, or none that a `save` of ours wrote;
            the message says which. Each byte is checked: what is returned is what was saved.
        ModuleNotFoundError: the file has tensors, and torch is not installed.
        OSError: the file cannot be opened: it is missing, a folder, or not yours to read.
    """
    cache = load_cache(path)
    records = cache.records
    if not any(record.variable.startswith("attention ") for record in records):  # as no variable is called
        return cache
    from .intercept import restored  # needs torch

    return restored(records, cache.about)

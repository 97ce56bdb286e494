"""Captured values in a file, and back: arrays and tensors are its entries, one text in its metadata tells the rest.

The file is one of the safetensors format: eight bytes with the length of a JSON header, the header, the entries' bytes.
The text is JSON too. It has a flat list of nodes, each naming only nodes before it, so that no nesting is too deep for
it; what JSON has itself stands in it as it is. It lists the entries as well, so that the header follows from the text:
a header that differs is damaged, and the text's own checksum and those of the entries guard all other bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, BinaryIO

from ..errors import FileFormatError
from ..tensors import is_array, is_tensor
from .records import Cache, Record
from .store import Store

_VERSION = 1
_MAX_HEADER = 100_000_000  # bytes; the safetensors package opens no file that has more
_MAX_HASHED = 1000  # containers in a dict's key or a set's element

# Each with the format's name for it and the bytes of an element. What the format lacks is stored as pairs of floats.
_BOTH = {
    **{"bool": ("BOOL", 1), "int8": ("I8", 1), "int16": ("I16", 2), "int32": ("I32", 4), "int64": ("I64", 8)},
    **{"uint8": ("U8", 1), "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8)},
    **{"float16": ("F16", 2), "float32": ("F32", 4), "float64": ("F64", 8)},
    **{"complex64": ("C64", 8), "complex128": ("F64", 16)},
}
_TORCH = {
    **{"bfloat16": ("BF16", 2), "complex32": ("F16", 4)},
    **{"float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "float8_e8m0fnu": ("F8_E8M0", 1)},
    **{"float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1)},
}
_DTYPES = {"numpy": _BOTH, "torch": _BOTH | _TORCH}
_PAIRS = ("complex128", "complex32")

_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}

Entry = tuple[str, str, str, list[int]]
"""(name, "numpy" or "torch", dtype, shape) of an array in the file."""


def write(path: str | PathLike[str], keys: Sequence[str], records: Sequence[Record], about: dict[str, Any]) -> None:
    """Write a file that `load` reads; `Cache.save` says what it promises. Records under other keys are left out."""
    if not issubclass(type(about), dict):
        raise TypeError(f"about must be a dict, such as {{'tokens': [...]}}, not {type(about).__name__}")
    nodes, rows, counts = _Nodes(), [], dict.fromkeys(keys, 0)
    for record in records:
        if record.key in counts:
            place, counts[record.key] = counts[record.key], counts[record.key] + 1
            slot = nodes.add(record.value, f"{record.key}/{place}", f"{record.key!r}[{place}]", "keep=lambda x: {}")
            where = [record.call, record.line, record.thread, record.module]
            rows.append([record.key, record.variable, slot, *where])
    slot = nodes.add(about, "about", "about", "{}, say")
    # The widest elements first, so that each entry lies where those who map the file can read it in place.
    order = sorted(range(len(nodes.entries)), key=lambda i: -_width(nodes.entries[i]))
    entries, arrays = [nodes.entries[i] for i in order], [nodes.arrays[i] for i in order]
    content = {"version": _VERSION, "order": order, "entries": entries, "nodes": nodes.nodes}
    text = _json({**content, "keys": list(counts), "records": rows, "about": slot})
    checksums = [zlib.crc32(text.encode())] + [0] * len(entries)
    header = _header(text, checksums, entries)
    if len(header) > _MAX_HEADER:
        raise ValueError(
            f"what is captured outside of arrays takes {len(header):,} bytes, and a safetensors file has room for "
            f"{_MAX_HEADER:,}: keep arrays instead of lists of numbers, or fewer calls (limit=)"
        )
    target = os.path.realpath(path)
    # A name that is long enough to be the only one, whatever room the file's own leaves.
    temporary = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(header)
            for i, (entry, array) in enumerate(zip(entries, arrays, strict=True), 1):
                raw = _bytes_of(entry, array)
                checksums[i] = zlib.crc32(raw)
                file.write(raw)
            file.seek(0)
            file.write(_header(text, checksums, entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            error.filename, error.filename2 = target, None
        raise


def load(path: str | PathLike[str]) -> Cache:
    """What `Cache.save` wrote: the same keys, values and records; the model need not be there.

    >>> import os, tempfile
    >>> import numpy as np
    >>> from visualizer import capture
    >>> def attend(x):
    ...     attn = np.full((2, 5, 5), x)
    ...     return "done"
    >>> with capture(attend, "attn") as found:
    ...     _ = attend(0.2)
    >>> path = os.path.join(tempfile.mkdtemp(), "maps.safetensors")
    >>> found.save(path, about={"tokens": ["it", "works"]})
    >>> again = load(path)
    >>> again["attend"][0].shape, again.records[0].variable, again.about
    ((2, 5, 5), 'attn', {'tokens': ['it', 'works']})

    Args:
        path: the file. It is read as a whole; nothing in it is run.

    Returns:
        A cache that is its own, of equal values. Arrays are arrays of their dtype, in this machine's byte order;
        tensors are tensors of their dtype, on the CPU and without a graph. Lists, tuples, sets, dicts and numbers,
        numpy's too, have the types they had; what was of a subclass (a model's output, a named tuple, an enum) is
        plain. What was one object in several places is one again.

    Raises:
        FileFormatError: the file is damaged, cut off, or none that `Cache.save` of this version knows. The message says
            which. Each byte is checked, so nothing wrong is returned.
        ModuleNotFoundError: it has tensors, and torch is not installed.
        OSError: it cannot be opened.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        try:
            return _read(file, name)
        except FileFormatError:
            raise
        except (ValueError, TypeError, LookupError, OverflowError, RuntimeError) as error:
            raise _refusal(name, f"is damaged ({type(error).__name__}: {error})", _AGAIN) from error


_AGAIN = "copy it again from where it was whole, or save it anew"
_OTHERS = "load() reads what save() of captured values wrote"


def _refusal(name: str, what: str, remedy: str) -> FileFormatError:
    return FileFormatError(f"{name!r} {' '.join(what.split())}; {remedy}")


def _read(file: BinaryIO, name: str) -> Cache:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise _refusal(name, "is empty", _AGAIN)
    start = file.read(8)
    length = 8 + int.from_bytes(start, "little")
    if size < 8 or length > 8 + _MAX_HEADER:
        raise _refusal(name, "is not a safetensors file", _OTHERS)
    if length > size:
        raise _refusal(name, f"is cut off after {size:,} bytes, or not a safetensors file", _AGAIN)
    header = start + file.read(length - 8)
    try:
        outer = json.loads(header[8:])
    except (ValueError, RecursionError):
        raise _refusal(name, "is damaged, or not a safetensors file: its header is not JSON", _AGAIN) from None
    metadata = outer.get("__metadata__") if isinstance(outer, dict) else None
    if not isinstance(metadata, dict) or "visualizer" not in metadata:
        raise _refusal(name, "is a safetensors file of something else, or damaged", f"{_OTHERS}; safetensors reads it")
    text, checksums = metadata["visualizer"], [int(digits, 16) for digits in metadata["crc32"].split()]
    if checksums[0] != zlib.crc32(text.encode()):
        raise _refusal(name, "is damaged (the checksum of its metadata is another)", _AGAIN)
    content = json.loads(text)
    if _int(content["version"]) > _VERSION:
        upgrade = "upgrade with: pip install --upgrade get-local"
        raise _refusal(name, f"was written by a newer version of this package (format {content['version']})", upgrade)
    entries = [_entry(*entry) for entry in content["entries"]]
    if header != _header(text, checksums, entries):
        raise _refusal(name, "is damaged, or was changed by another program (its header is another)", _AGAIN)
    expected = length + sum(map(_size, entries))
    if expected != size:
        raise _refusal(name, f"has {size:,} bytes where {expected:,} belong", _AGAIN)
    arrays = [_array(file, entry, checksum) for entry, checksum in zip(entries, checksums[1:], strict=True)]
    value_of = _values(content["nodes"], dict(zip(content["order"], arrays, strict=True)))
    keys = [_str(key) for key in content["keys"]]
    records = []
    for key, variable, slot, call, line, thread, module in content["records"]:
        line, module = line if line is None else _int(line), module if module is None else _str(module)
        if key not in keys:
            raise ValueError(f"a record of {key!r}, which is no key")
        records.append(Record(key, _str(variable), value_of(slot), _int(call), line, _int(thread), module))
    about = value_of(content["about"])
    if type(about) is not dict:
        raise TypeError("about is no dict")
    store = Store(state=lambda: f"read from {name}")
    cache = Cache(store, title=f"load({name!r})")
    store.restore(keys, records, about)
    return cache

"""Writes and reads captured values: arrays and tensors are the entries of a file, a text in its metadata has the rest.

The file has the safetensors format: eight bytes with the length of a JSON header, the header, the bytes of the entries.
The text is JSON too. Its containers are a flat list of nodes, and each node names only nodes before it, so that no
nesting is too deep and none is endless. The text lists the entries as well. So the header follows from the text, and a
header that differs is damaged. The text and each entry have a checksum, so that every byte is checked.

An array takes an entry of its own. Where many are small and alike, they are the rows of one entry: a place in the
header would take more bytes than such an array. The records are columns for the same reason: what repeats is counted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from io import BufferedReader
from itertools import chain, groupby, repeat
from operator import attrgetter
from os import PathLike
from typing import Any, NamedTuple, get_args

from ..errors import FileFormatError
from ..tensors import is_array, is_tensor, why_not_dense
from .destination import check_destination, replacing, special
from .records import Kind, Record, Saved

_VERSION = 2
_SMALL = 4096  # bytes; arrays that take more have entries of their own
_MANY = 16  # small arrays of one dtype and shape that share an entry, or more
_CHUNK = 256  # rows that are put together before they are written
_MAX_HEADER = 100_000_000  # bytes; the safetensors package opens no file that has more
_MAX_HASHED = 1_000_000  # items that are met on hashing a dict's key or a set's element; a container counts as 1000

# For each dtype, the format's name and the bytes of an element. Dtypes that the format lacks are stored as pairs.
_NUMPY = {
    **{"bool": ("BOOL", 1), "int8": ("I8", 1), "int16": ("I16", 2), "int32": ("I32", 4), "int64": ("I64", 8)},
    **{"uint8": ("U8", 1), "uint16": ("U16", 2), "uint32": ("U32", 4), "uint64": ("U64", 8)},
    **{"float16": ("F16", 2), "float32": ("F32", 4), "float64": ("F64", 8)},
    **{"complex64": ("C64", 8), "complex128": ("F64", 16)},
}
_TORCH = {
    **_NUMPY,
    **{"bfloat16": ("BF16", 2), "complex32": ("F16", 4)},
    **{"float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "float8_e8m0fnu": ("F8_E8M0", 1)},
    **{"float8_e4m3fnuz": ("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1)},
}
_DTYPES = {"numpy": _NUMPY, "torch": _TORCH}
_PAIRS = ("complex128", "complex32")

_CONTAINERS: dict[str, type[Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}
# For values that contain nothing: the type, how it is written to text, and how it is read from text.
_LEAVES: dict[str, tuple[type[Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "int": (int, lambda value: f"{int.__int__(value):x}", lambda digits: int(digits, 16)),
    "float": (float, float.hex, float.fromhex),
    "complex": (
        complex,
        lambda value: [value.real.hex(), value.imag.hex()],
        lambda pair: complex(*map(float.fromhex, _checked(pair, list))),
    ),
    "str": (str, str.__str__, str.__str__),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}

_AGAIN = "copy it again from where it is whole, or save it again"
_OTHERS = "load() reads what a save() of this package wrote"


class _Entry(NamedTuple):
    name: str
    library: str  # "numpy" or "torch"
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return _DTYPES[self.library][self.dtype][1] * math.prod(self.shape)


def write(path: str | PathLike[str], saved: Saved) -> None:
    """Write a file that `read` reads; see `Recorded.save`. Records of other keys than `saved.keys` are left out."""
    check_destination(path, "safetensors")
    about = saved.about
    if not issubclass(type(about), dict):
        raise TypeError(f"about must be a dict, such as {{'tokens': ['a', 'cat']}}, not {type(about).__name__}")
    nodes, counts = _Nodes(), dict.fromkeys(saved.keys, 0)
    records = [record for record in saved.records if record.key in counts]
    slots = []
    for record in records:
        number = counts[record.key]
        counts[record.key] = number + 1
        slots.append(nodes.add(record.value, f"{record.key}/{number}", f"{record.key!r}[{number}]"))
    slot = nodes.add(about, "about", "about")
    arrays = nodes.entries()
    # Wide elements come first, so that each entry is aligned when the file is mapped into memory.
    entries = sorted(arrays, key=lambda entry: -_DTYPES[entry.library][entry.dtype][1])
    content = {"version": _VERSION, "kind": saved.kind, "entries": entries, "packs": nodes.packs, "keys": list(counts)}
    text = _json({**content, "nodes": nodes.as_text(), "records": _columns(records, slots), "about": slot})
    checksums = [zlib.crc32(text.encode())] + [0] * len(entries)
    header = _header(text, checksums, entries)
    if len(header) > 8 + _MAX_HEADER:
        raise ValueError(
            f"what is not in arrays takes {len(header):,} bytes, of which a safetensors file holds {_MAX_HEADER:,}: "
            "keep arrays in place of lists of numbers, or fewer calls (limit=)"
        )
    with replacing(path) as file:
        file.write(header)
        for place, entry in enumerate(entries, 1):
            for raw in _pieces(arrays[entry], entry):
                checksums[place] = zlib.crc32(raw, checksums[place])
                file.write(raw)
        file.seek(0)
        file.write(_header(text, checksums, entries))


def read(path: str | PathLike[str]) -> Saved:
    """Read what `write` wrote; see `visualizer.load`."""
    name = os.fspath(path)
    with contextlib.suppress(OSError):  # opening says what is wrong
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe waits for somebody who writes
            raise _refusal(name, f"is {special(mode)}, not a file", _OTHERS)
    with open(path, "rb") as file:
        try:
            return _read(file, name)
        except FileFormatError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
            raise _refusal(name, f"is damaged ({type(error).__name__}: {error})", _AGAIN) from error


def _refusal(name: str, what: str, remedy: str) -> FileFormatError:
    return FileFormatError(f"{name!r} {' '.join(what.split())}; {remedy}")


def _read(file: BufferedReader, name: str) -> Saved:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise _refusal(name, "is empty", _AGAIN)
    start = file.read(8)
    length = 8 + int.from_bytes(start, "little")
    if size < 8 or length > 8 + _MAX_HEADER:
        raise _refusal(name, "is not a safetensors file, or its first bytes are damaged", _OTHERS)
    if length > size:
        raise _refusal(name, f"is cut off after {size:,} bytes, or not a safetensors file", _AGAIN)
    header = start + file.read(length - 8)
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        text, checksums = metadata["visualizer"], [int(digits, 16) for digits in metadata["crc32"].split()]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise _refusal(name, "is a safetensors file that was not written by save(), or damaged", _OTHERS) from None
    if [zlib.crc32(text.encode())] != checksums[:1]:
        raise _refusal(name, "is damaged: the checksum of its metadata does not match", _AGAIN)
    content = json.loads(text)
    version = _checked(content["version"], int)
    if version != _VERSION:
        age = "a newer version of this package" if version > _VERSION else "this package before its first release"
        upgrade = "upgrade with: pip install --upgrade get-local" if version > _VERSION else "save it again"
        raise _refusal(name, f"was written by {age}, in format {version}", upgrade)
    entries = [_Entry(*row) for row in content["entries"]]
    if header != _header(text, checksums, entries):
        raise _refusal(name, "is damaged, or another program changed it: its header does not match", _AGAIN)
    expected = length + sum(entry.size for entry in entries)
    if expected != size:
        raise _refusal(name, f"has {size:,} bytes in place of {expected:,}", _AGAIN)
    arrays = {}
    for entry, checksum in zip(entries, checksums[1:], strict=True):
        arrays[entry.name] = _array(file, entry, checksum, name)
    packs = [arrays[name] for name in content["packs"]]
    nodes = [*_each_node(content["nodes"], packs)]
    value_of = _reader(nodes, arrays, packs)
    keys = dict.fromkeys(_checked(key, str) for key in _checked(content["keys"], list))
    about = _checked(value_of(content["about"]), dict)
    records = []
    for key, variable, slot, call, line, thread, module in _rows(content["records"], len(nodes)):
        if key not in keys:
            raise ValueError(f"a record of {key!r}, which is no key")
        where = _checked(call, int), _checked(line, int, type(None)), _checked(thread, int)
        if not all(abs(number or 0) < 2**63 for number in where[:2]):
            raise ValueError(f"call {call} and line {line}, which no run has")
        records.append(Record(key, _checked(variable, str), value_of(slot), *where, _checked(module, str, type(None))))
    kind: Any = content["kind"]
    if kind not in get_args(Kind):
        raise ValueError(f"{kind!r} is no kind of results")
    return Saved(kind, tuple(keys), records, about)


def _columns(records: Sequence[Record], slots: Sequence[Any]) -> dict[str, list[Any]]:
    """The records in columns of [what, how often in a row]. In those that ascend, the next is one more each time."""
    fields = {name: map(attrgetter(name), records) for name in _REPEATING}
    repeating = {name: [[value, len([*same])] for value, same in groupby(field)] for name, field in fields.items()}
    calls: list[Any] = []
    for record in records:
        _append_ascending(calls, record.call)
    values: list[Any] = []
    newest = -1
    for slot in slots:
        if type(slot) is list and slot[0] > newest:
            [newest] = slot
            _append_ascending(values, newest)
        else:  # a plain value, or one that was recorded before, which is in no run: see `_rows`
            values.append(slot)
    return {**repeating, "call": calls, "value": values}


_REPEATING = ("key", "variable", "line", "thread", "module")


def _append_ascending(runs: list[Any], number: int) -> None:
    """Add a number to runs of [first number, how many], each of numbers that ascend by one."""
    last = runs[-1] if runs else None
    if type(last) is list and sum(last) == number:
        last[1] += 1
    else:
        runs.append([number, 1])


def _rows(columns: Any, most: int) -> Iterator[tuple[Any, ...]]:
    """The records of `_columns`: key, variable, slot, call, line, thread, module; `most` is the number of nodes."""
    slots: list[Any] = []
    for slot in _checked(columns["value"], list):
        if type(slot) is list:
            first, *run = slot
            [number] = run or [1]
            most -= sum(run)
            if _checked(number, int) < 1 or most < 0:  # a few bytes must not become endless rows
                raise ValueError(f"{number} values from node {first} on, which there are not")
            slots += ([place] for place in range(first, first + number))
        else:
            slots.append(slot)
    repeated = {name: [*_counted(columns[name], len(slots), repeat)] for name in _REPEATING}
    calls = _counted(columns["call"], len(slots), lambda first, number: range(first, first + number))
    fields = (repeated["key"], repeated["variable"], slots, calls)
    return zip(*fields, *(repeated[name] for name in _REPEATING[2:]), strict=True)


def _counted(pairs: Any, expected: int, unroll: Callable[[Any, int], Iterable[Any]]) -> Iterator[Any]:
    """The column that pairs of (what, how often) stand for; ValueError unless it has the expected length."""
    if sum(max(1, _checked(number, int)) for _, number in pairs) != expected:
        raise ValueError("a column of another length than the others")
    return chain.from_iterable(unroll(what, number) for what, number in pairs)


def _checked(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise TypeError(f"{types[0].__name__} expected, not {type(value).__name__}")
    return value


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))


def _header(text: str, checksums: list[int], entries: list[_Entry]) -> bytes:
    """The file up to the bytes of the entries. The checksums, the text's first, have no influence on its length."""
    metadata = {"visualizer": text, "crc32": " ".join(f"{checksum:08x}" for checksum in checksums)}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        shape = [*entry.shape, 2] if entry.dtype in _PAIRS else entry.shape
        dtype, _ = _DTYPES[entry.library][entry.dtype]
        header[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = _json(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _pieces(array: Any, entry: _Entry) -> Iterator[Any]:
    """The bytes of an entry, as arrays: of one array, or of the rows in a list, without a copy of all of them."""
    if type(array) is not list:
        yield _bytes_of(array, entry)
        return
    stack = sys.modules["torch" if entry.library == "torch" else "numpy"].stack
    for start in range(0, len(array), _CHUNK):
        rows = array[start : start + _CHUNK]
        yield _bytes_of(stack(rows), entry._replace(shape=(len(rows), *entry.shape[1:])))


def _bytes_of(array: Any, entry: _Entry) -> Any:
    """The bytes of an array or a tensor, in C order and little-endian, as an array; copied only if necessary."""
    if entry.library == "numpy":
        import numpy

        array = numpy.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        return array.reshape(-1).view(numpy.uint8)
    try:
        array = array.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # With one element or none, reshape(-1) may leave a stride that cannot be viewed as another dtype.
        raw = array.as_strided((array.numel(),), (1,)).view(sys.modules["torch"].uint8).numpy()
    except (RuntimeError, NotImplementedError) as error:  # under vmap or in a fake mode there are no numbers
        raise TypeError(f"{entry.name!r}: a {type(array).__name__} cannot be written to a file ({error})") from error
    if raw.size != entry.size:
        raise TypeError(f"{entry.name!r}: a {type(array).__name__} that is in parts cannot be written to a file")
    return raw


def _array(file: BufferedReader, entry: _Entry, checksum: int, name: str) -> Any:
    """The next entry of the file, as an array or a tensor."""
    import numpy

    raw: Any = numpy.empty(entry.size, numpy.uint8)
    if file.readinto(raw) != entry.size or zlib.crc32(raw) != checksum:
        raise _refusal(name, f"is damaged: the checksum of {entry.name!r} does not match", _AGAIN)
    if entry.library == "numpy":
        return raw.view(numpy.dtype(entry.dtype).newbyteorder("<")).reshape(entry.shape)
    import torch

    dtype = getattr(torch, entry.dtype, None)
    if dtype is None:
        raise _refusal(name, f"has {entry.dtype} tensors, which torch {torch.__version__} lacks", "upgrade torch")
    return torch.from_numpy(raw).as_strided((raw.size,), (1,)).view(dtype).reshape(entry.shape)


def _scalar(dtype: Any, digits: Any) -> Any:
    import numpy

    if dtype not in _NUMPY:
        raise ValueError(f"no number has the dtype {dtype}")
    [scalar] = numpy.frombuffer(bytes.fromhex(digits), numpy.dtype(dtype).newbyteorder("<"))
    return scalar


def _is_plain(value: Any) -> bool:
    """Whether a value is written to the text as it is."""
    cls = type(value)
    return (
        value is None
        or cls in (bool, str)
        or (cls is float and math.isfinite(value))  # JSON has no infinity and no NaN
        or (cls is int and abs(value) < 2**53)  # other readers of JSON round larger ones
    )


def _parts(value: Any) -> tuple[str, list[Any]] | None:
    """The kind of a container and its items, for a dict keys and values in turn; None for anything else."""
    for kind, base in _CONTAINERS.items():
        if issubclass(type(value), base):
            # The base's own methods are called, because a subclass may iterate over something else.
            items = chain.from_iterable(dict.items(value)) if base is dict else base.__iter__(value)
            return kind, list(items)
    return None


class _Nodes:
    """The nodes of the values that were added so far, and the arrays that will be entries."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.packs: list[str] = []
        """The names of the entries whose rows are arrays."""
        self._arrays: list[tuple[Any, str, list[Any]]] = []
        """Each array with the name that its entry should have, and its node."""
        self._known: dict[int, tuple[int, Any]] = {}  # holds the value, so that no other gets its id
        self._names = {"__metadata__"}

    def add(self, value: Any, name: str, where: str) -> Any:
        """Add a value, and return what the text has in its place; `name` is for its arrays, `where` for messages."""
        slots: list[Any] = []
        stack: list[tuple[Any, str, Iterator[Any], list[Any]]] = [(None, "", iter([value]), slots)]
        is_open, before = set(), len(self._arrays)
        while stack:
            holder, kind, rest, slots = stack[-1]
            for part in rest:
                if _is_plain(part):
                    slots.append(part)
                elif id(part) in self._known:
                    slots.append([self._known[id(part)][0]])
                elif id(part) in is_open:
                    raise _unwritable(where, f"a {type(part).__name__} that contains itself", "list(x)")
                elif inner := _parts(part):
                    inner_kind, items = inner
                    if _is_costly_to_hash(inner_kind, items):
                        raise _unwritable(where, _COSTLY, "list(x)")
                    is_open.add(id(part))
                    stack.append((part, inner_kind, iter(items), []))
                    break
                else:
                    entry_name = name if len(stack) == 1 else f"{name}/{len(self._arrays) - before}"
                    slots.append(self._new(part, self._leaf(part, entry_name, where)))
            else:
                stack.pop()
                if stack:
                    stack[-1][3].append(self._new(holder, [kind, slots]))
        return slots[0]

    def entries(self) -> dict[_Entry, Any]:
        """The entries of the file, each with its array, or with a list of its rows; their nodes are filled in."""
        alike: dict[tuple[Any, ...], list[tuple[Any, str, list[Any]]]] = defaultdict(list)
        for value, name, node in self._arrays:
            entry = _Entry("", *_type_of(value))
            alike[entry if 0 < entry.size <= _SMALL and _is_stackable(value) else (id(value),)].append(
                (value, name, node)
            )
        entries: dict[_Entry, Any] = {}
        for arrays in alike.values():
            if len(arrays) < _MANY:
                for value, name, node in arrays:
                    entry = _Entry(self._unused(name), *_type_of(value))
                    entries[entry], node[:] = value, ["array", entry.name]
            else:
                library, dtype, shape = _type_of(arrays[0][0])
                entry = _Entry(self._unused("small arrays"), library, dtype, (len(arrays), *shape))
                entries[entry] = [value for value, _, _ in arrays]
                for row, (_, _, node) in enumerate(arrays):
                    node[:] = len(self.packs), row
                self.packs.append(entry.name)
        return entries

    def as_text(self) -> list[Any]:
        """The nodes as the text has them: rows that follow each other are one, [pack, first row, how many]."""
        nodes: list[Any] = []
        last: list[Any] = [None]
        for node in self.nodes:
            if type(node[0]) is int and node[0] == last[0] and node[1] == last[1] + last[2]:
                last[2] += 1
            else:
                last = [*node, 1] if type(node[0]) is int else node
                nodes.append(last)
        return nodes

    def _unused(self, name: str) -> str:
        name = name.encode("utf-8", "replace").decode()  # UTF-8 has no lone half of a surrogate pair
        while name in self._names:
            name += "+"
        self._names.add(name)
        return name

    def _new(self, value: Any, node: list[Any]) -> list[int]:
        self._known[id(value)] = len(self.nodes), value
        self.nodes.append(node)
        return [len(self.nodes) - 1]

    def _leaf(self, value: Any, name: str, where: str) -> list[Any]:
        """The node of a value that contains nothing."""
        if is_tensor(value) or is_array(value):
            if trouble := _trouble(value):
                raise _unwritable(where, *trouble)
            node: list[Any] = []
            self._arrays.append((value, name, node))
            return node
        cls, numpy = type(value), sys.modules.get("numpy")
        if numpy is not None and issubclass(cls, numpy.generic) and _name_of(value.dtype) in _NUMPY:
            return ["scalar", _name_of(value.dtype), value.astype(value.dtype.newbyteorder("<")).tobytes().hex()]
        for leaf, (base, written, _) in _LEAVES.items():
            if issubclass(cls, base):
                return [leaf, written(value)]
        raise _unwritable(where, f"an object of type {cls.__name__}", "x.attentions")


def _type_of(value: Any) -> tuple[str, str, tuple[int, ...]]:
    """The library, the dtype and the shape of an array or a tensor."""
    if is_tensor(value):
        return "torch", _name_of(value.dtype), tuple(map(int, value.shape))
    return "numpy", _name_of(value.dtype), value.shape


@lru_cache(maxsize=256)  # numpy takes long to make the name
def _name_of(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def _is_stackable(value: Any) -> bool:
    """Whether stacking such values makes an array of the same type: others may be in parts, or elsewhere."""
    if is_tensor(value):
        return type(value) is sys.modules["torch"].Tensor and bool(value.is_cpu)
    return type(value) is sys.modules["numpy"].ndarray


def _unwritable(where: str, what: str, way: str) -> TypeError:
    remedy = f"give a part of it, such as {way}" if where == "about" else f"keep a part, e.g. keep=lambda x: {way}"
    return TypeError(f"{where} holds {what}, which cannot be written to a file; {remedy}")


def _trouble(value: Any) -> tuple[str, str] | None:
    """What keeps an array or a tensor from being written, and a way out; None if nothing does."""
    dtype = value.dtype
    if is_array(value):
        if _name_of(dtype) not in _NUMPY:
            way = {"f": "x.astype('float64')", "c": "x.astype('complex128')", "m": "x.astype('int64')"}
            way = {**way, "M": "x.astype('int64')", "V": f"x[{(dtype.names or [0])[0]!r}]"}
            return f"an array of the dtype {dtype}", way.get(dtype.kind, "x.tolist()")
        return ("a masked array", "x.filled()") if hasattr(value, "mask") else None
    other = None if _name_of(dtype) in _TORCH else (f"a tensor of the dtype {dtype}", "x.float()")
    return why_not_dense(value) or other


_COSTLY = f"a dict's key or a set's element of more than {_MAX_HASHED // 1000} containers"


def _is_costly_to_hash(kind: str, items: list[Any]) -> bool:
    """Whether hashing a set's elements or a dict's keys, which take turns with its values, takes too much.

    Hashing recurses in C without a guard, and hashes a shared container again at each place. A file must not be able to
    overflow the stack, or to keep the reader busy for hours.
    """
    hashed = items if kind in ("set", "frozenset") else items[::2] if kind == "dict" else []
    for waiting in ([item] for item in hashed if not _is_plain(item)):
        met = 0
        while waiting:
            inner = _parts(waiting.pop())
            waiting += [] if inner is None else inner[1]
            met += 1 if inner is None else 1000
            if met + len(waiting) > _MAX_HASHED:
                return True
    return False


def _each_node(nodes: Any, packs: list[Any]) -> Iterator[Any]:
    """The nodes of `_Nodes.as_text`, a row at a time: [pack, row]."""
    unread = [len(pack) if pack.nbytes else 0 for pack in packs]
    for node in nodes:
        if type(node[0]) is not int:
            yield node
            continue
        pack, first, number = node
        unread[pack] -= _checked(number, int)
        if pack < 0 or first < 0 or number < 1 or unread[pack] < 0:  # a few bytes must not become endless rows
            raise ValueError(f"rows {first} to {first + number} of pack {pack}, which are not there")
        yield from ([pack, row] for row in range(first, first + number))


def _reader(nodes: Any, arrays: dict[str, Any], packs: list[Any]) -> Callable[[Any], Any]:
    """A function from what the text has in place of a value to the value. `packs` have arrays as their rows."""
    values: list[Any] = []

    def value_of(slot: Any) -> Any:
        if type(slot) is not list:
            return _checked(slot, str, bool, int, float, type(None))
        [place] = slot
        if _checked(place, int) < 0:
            raise ValueError(f"no node has the number {place}")
        return values[place]

    for kind, *parts in nodes:
        if type(kind) is int:
            value = packs[kind][parts[0], ...]
            value = value.clone() if is_tensor(value) else value.copy()
        elif kind == "array":
            [name] = parts
            value = arrays[name]
        elif kind in _CONTAINERS:
            [slots] = parts
            items = [value_of(slot) for slot in _checked(slots, list)]
            if _is_costly_to_hash(kind, items):
                raise ValueError(_COSTLY)
            value = dict(zip(items[::2], items[1::2], strict=True)) if kind == "dict" else _CONTAINERS[kind](items)
        elif kind == "scalar":
            value = _scalar(*parts)
        else:
            [text] = parts
            value = _LEAVES[kind][2](text)
        values.append(value)
    return value_of

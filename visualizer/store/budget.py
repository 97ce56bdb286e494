"""How much memory kept values take on each device, and how much they may.

`Budget` is what a store and the attention maps count with: what is used, what is left, and what a user is told when
nothing more fits. torch is looked up among the loaded modules, never imported.
"""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

from ..tensors import attributes, is_array, is_container, is_foreign_tensor, is_tensor, kind_of

NO_LIMIT = math.inf
"""As `max_bytes`: keep whatever there is."""

_UNREACHED = 2**100
"""So many bytes no memory has: as a limit, none."""


class Purse:
    """How many bytes may be taken without asking."""

    __slots__ = ("left",)
    MOST = 2**30 - 1
    """Below 2**30 Python subtracts in half the time."""

    def __init__(self, left: int) -> None:
        self.left = left


class Budget:
    """The bytes that values may take on each device, and those that they take.

    >>> budget = Budget(max_bytes=1000)
    >>> budget.add({"cpu": 800}), budget.room("cpu")
    (None, 200)
    >>> budget.add({"cpu": 400})
    'cpu'
    """

    def __init__(self, max_bytes: float | None = None) -> None:
        self.max_bytes = max_bytes
        """The most on each device; None: a quarter of its memory."""
        self.purse = Purse(0)
        """What channels may take on the CPU without asking."""
        self._limits: dict[str, int] = {}
        self._left: dict[str, int] = {}
        """What is left on each device, on the CPU beside the purse."""

    def allow(self, max_bytes: float | None) -> None:
        """Set the limit anew; what is used stays."""
        used = {device: self.limit(device) - self.room(device) for device in self._limits}
        self.max_bytes = max_bytes
        self.clear()
        self._limits.clear()
        self.discount({device: -size for device, size in used.items()})

    def limit(self, device: str) -> int:
        """How many bytes values may take on a device."""
        if device not in self._limits:
            limit = memory_of(device) // 4 if self.max_bytes is None else self.max_bytes
            self._limits[device] = int(min(limit, _UNREACHED))
            self._set(device, self._limits[device])
        return self._limits[device]

    def room(self, device: str) -> int:
        """How many bytes more may be kept on a device; negative where there are too many."""
        if device not in self._limits:
            self.limit(device)
        return self._left[device] + (self.purse.left if device == "cpu" else 0)

    def add(self, sizes: dict[str, int]) -> str | None:
        """Count a value; the device on which there are too many bytes now, or None."""
        for device, size in sizes.items():
            self._take(device, -size)
        return self.exceeded(sizes)

    def discount(self, sizes: dict[str, int]) -> None:
        """Count a value no more."""
        for device, size in sizes.items():
            self._take(device, size)

    def _take(self, device: str, more: int) -> None:
        """Have more left on a device, or less."""
        if device not in self._limits:
            self.limit(device)
        self._left[device] += more
        if device == "cpu":
            self._fill_purse()

    def exceeded(self, devices: Iterable[str]) -> str | None:
        """The first of these devices on which there are too many bytes, or None."""
        for device in devices:
            if self.room(device) < 0:
                return device
        return None

    def clear(self) -> None:
        """Start over with nothing kept."""
        for device, limit in self._limits.items():
            self._set(device, limit)

    def _set(self, device: str, left: int) -> None:
        self._left[device] = left
        if device == "cpu":
            self.purse.left = 0
            self._fill_purse()

    def _fill_purse(self) -> None:
        """Have in the purse what is left, but no more than counts fast; a debt is taken back."""
        more = min(self._left["cpu"], Purse.MOST - self.purse.left)
        # Each line adds at once: another thread may take from the purse in between.
        self.purse.left += more
        self._left["cpu"] -= more

    def why_full(self, device: str) -> str:
        """The limit of a device for a message, with where it comes from: "1,000 bytes on cpu (max_bytes)"."""
        origin = "a quarter of its memory" if self.max_bytes is None else "max_bytes"
        return f"{self.limit(device):,} bytes on {device} ({origin})"


ROW_BYTES = 48
"""What the list and the columns of a store take for a value."""
ARRAY_BYTES = 96
"""What an array takes beside what it says of itself and its row."""
TENSOR_BYTES = 544
"""What a small tensor takes beside its elements and its row."""


LARGEST = 2**60
NUMBER_BYTES = 32 + ROW_BYTES
"""What a float or a bool takes, or an int below `LARGEST`."""
_NUMBERS = frozenset((float, int, bool))


def resident_bytes(value: Any) -> dict[str, int]:
    """How many bytes of memory it takes to keep a value, by device: its own, the objects around them, and its row."""
    kind = kind_of(value)
    if kind == "other" and not attributes(value):
        return {"cpu": object_bytes(value)}
    sizes = bytes_by_device(value)
    more = ROW_BYTES + (_beside_elements(value) if kind == "array" else TENSOR_BYTES if kind == "tensor" else 0)
    if kind in ("container", "other"):
        more += _objects_in(value)
    return {**sizes, "cpu": sizes.get("cpu", 0) + more}


def resident_bytes_of(values: list[Any]) -> dict[str, int]:
    """What it takes to keep several values."""
    try:
        if _NUMBERS.issuperset(map(type, values)) and (not values or -LARGEST < min(values) <= max(values) < LARGEST):
            return {"cpu": len(values) * NUMBER_BYTES}
    except Exception:  # the class of a value has code that fails
        pass
    sizes: dict[str, int] = defaultdict(int)
    for value in values:
        for device, size in resident_bytes(value).items():
            sizes[device] += size
    return sizes


def object_bytes(value: Any) -> int:
    """What it takes to keep a value that is neither an array nor a tensor nor a container."""
    return _rounded(_size_of(value)) + ROW_BYTES


def _rounded(size: int) -> int:
    return size + 15 & ~15  # as Python allocates memory


def _parts(value: Any) -> Iterable[Any]:
    """What a container holds, or an object whose attributes are copied."""
    if is_container(value):
        parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
        return parts
    return attributes(value).values()


def _beside_elements(array: Any) -> int:
    """What an array takes beside its elements; what it says of itself has them, unless it is a view."""
    own = array.__sizeof__() - array.nbytes if array.flags.owndata else array.__sizeof__()
    return ARRAY_BYTES + int(own)


def _objects_in(value: Any) -> int:
    """What the arrays and tensors in a container take beside their elements."""
    more, seen, values = 0, set[int](), [value]
    try:
        while values:
            item = values.pop()
            kind = kind_of(item)
            if kind in ("container", "other") and id(item) not in seen:
                seen.add(id(item))
                values.extend(_parts(item))
            more += _beside_elements(item) if kind == "array" else TENSOR_BYTES if kind == "tensor" else 0
    except Exception:  # the class of a container has code that fails
        pass
    return more


def bytes_by_device(value: Any) -> dict[str, int]:
    """How many bytes a kept value takes on each device, e.g. {"cpu": 4096}.

    Tensors and arrays count their elements, containers what they hold, and so do objects that are copied with their
    attributes; anything else counts its own size.
    """
    try:
        kind = kind_of(value)
        if kind == "other" and not attributes(value):  # first the common cases
            return {"cpu": _size_of(value)}
        if kind == "array" and not value.dtype.hasobject:
            return {"cpu": value.nbytes}
        if kind != "tensor":
            return _sum_by_device(value)
        torch = sys.modules["torch"]
        if is_foreign_tensor(value):
            with torch._C.DisableTorchFunctionSubclass():
                return _sum_by_device(value)
        if value.layout is torch.strided:
            return {"cpu" if value.is_cpu else _name_of(value.device): value.nbytes}
        return _sum_by_device(value)
    except Exception:  # the class, a subclass of list for example, has code that fails
        return {"cpu": object.__sizeof__(value)}


def _sum_by_device(value: Any) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    values = [value]
    while values:
        item = values.pop()
        if is_tensor(item):
            counts[_name_of(item.device)] += _tensor_bytes(item)
        elif is_array(item):
            counts["cpu"] += item.nbytes
            if item.dtype == object and id(item) not in seen:
                seen.add(id(item))
                values.extend(item.flat)
        elif id(item) not in seen:
            counts["cpu"] += _size_of(item)
            if parts := [*_parts(item)]:
                seen.add(id(item))
                values.extend(parts)
    return dict(counts)


def _size_of(value: Any) -> int:
    try:
        return sys.getsizeof(value)
    except Exception:  # its class has a __sizeof__ that fails
        return object.__sizeof__(value)


@lru_cache(maxsize=256)
def _name_of(device: Any) -> str:
    """The name that a device has in a budget: "cpu", "cuda:0"."""
    return str(device.type) if device.index is None else f"{device.type}:{device.index}"


def _tensor_bytes(tensor: Any) -> int:
    layout, parts = str(tensor.layout), [tensor]
    if layout == "torch.sparse_coo":  # its values() would first have to merge equal indices
        axes, each = tensor.sparse_dim(), math.prod(tensor.shape[tensor.sparse_dim() :]) * tensor.element_size()
        return int(tensor._nnz() * (8 * axes + each))
    if layout in ("torch.sparse_csr", "torch.sparse_bsr"):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif layout in ("torch.sparse_csc", "torch.sparse_bsc"):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return sum(part.nelement() * part.element_size() for part in parts)


def memory_of(device: str) -> int:
    """How many bytes of memory a device has; for the CPU, no more than the container of this process may use.

    >>> memory_of("cpu") > 2**20
    True
    """
    kind, _, index = device.partition(":")
    torch = sys.modules.get("torch")
    if torch is not None and kind in ("cuda", "xpu"):
        return int(getattr(torch, kind).get_device_properties(int(index or 0)).total_memory)
    if torch is not None and kind == "mps":
        return int(torch.mps.recommended_max_memory())
    return _usable_memory()


@cache
def _usable_memory() -> int:
    """Asked once: to read the limits takes longer than to keep most values."""
    return min([_physical_memory(), *_container_limits()])


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        pass
    if sys.platform == "win32":
        import ctypes

        class Status(ctypes.Structure):
            _fields_ = [
                ("length", ctypes.c_ulong),
                ("load", ctypes.c_ulong),
                ("total", ctypes.c_ulonglong),
                ("rest", ctypes.c_ulonglong * 6),
            ]

        status = Status(length=ctypes.sizeof(Status))
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return int(status.total)
    return 8 * 2**30  # unknown: assume a small laptop


def _container_limits() -> list[int]:
    """The memory limits of the control groups that this process is in; [] where there are none."""
    limits = []
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return []
    for _, controllers, path in groups:
        if controllers == "":
            root, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for length in range(len(parts), -1, -1):
            try:
                with open(os.path.join(root, *parts[:length], name)) as file:
                    limits.append(int(file.read()))
            except (OSError, ValueError):
                continue  # no such group in this namespace, or "max": no limit
    return [limit for limit in limits if limit > 0]

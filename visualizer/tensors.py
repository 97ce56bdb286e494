"""What is kept of a captured value, how much memory it takes, and how much there is.

torch and numpy are looked up among the loaded modules, never imported: whoever captures a tensor has loaded torch.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

Keep = Literal["numpy", "tensor", "graph"] | Callable[[Any], Any]
"""What to store of a value; see `keeper`."""

_MODES = ("numpy", "tensor", "graph")


def check_keep(keep: Any) -> None:
    """Raise TypeError or ValueError, with what would do, unless `keep` is a mode or a callable."""
    choices = f"one of {', '.join(map(repr, _MODES))} or a callable such as lambda a: a.mean(1)"
    if isinstance(keep, str):
        if keep not in _MODES:
            raise ValueError(f"keep must be {choices}, not {keep!r}")
    elif not callable(keep) or isinstance(keep, type(sys)):
        raise TypeError(f"keep must be {choices}, not {keep!r}")


def keeper(keep: Keep) -> Callable[..., Any]:
    """A function from a captured value to what is stored of it.

    >>> keep = keeper("numpy")
    >>> values = [1, 2]
    >>> kept = keep(values)
    >>> values.append(3)
    >>> kept
    [1, 2]

    "numpy": tensors become arrays on the CPU; types that numpy lacks (bfloat16, 8-bit floats) become float32.
    "tensor": tensors are detached and copied, and stay on their device in their type.
    "graph": the value itself.
    A callable: a snapshot of what it returns; it is not asked about None.

    In all but "graph" arrays are copied, and lists, tuples, dicts, sets and deques followed; other objects are kept as
    they are. A tensor that cannot be an array (sparse, quantized, nested, meta) is a TypeError under "numpy".

    Given a list as second argument, it does not wait for copies from a CUDA device: they are queued on the stream that
    the model runs on, so that nothing the model does later reaches them, into pinned memory, and the list gets an event
    for each. The arrays are to be read only after every `event.synchronize()`.
    """
    if keep == "graph":
        return _itself
    if keep == "numpy":
        return lambda value, copies=None: _snapshot(value, lambda tensor: _to_numpy(tensor, copies))
    if keep == "tensor":
        return lambda value, copies=None: _snapshot(value, _to_tensor)
    reduce: Callable[[Any], Any] = keep
    return lambda value, copies=None: None if value is None else _snapshot(_aside(reduce, value), _to_tensor)


_Kind = Literal["tensor", "fake tensor", "array", "proxy", "container", "other"]

_CONTAINERS = (list, tuple, dict, set, frozenset, deque)


def _kind(value: Any) -> _Kind:
    """What a value is to us, by its type: its __class__ may be code that runs, as of a lazy object or a dead proxy."""
    cls: Any = type(value)
    try:
        return _kinds[cls]
    except Exception:  # it is not there, or has a metaclass without a hash, or with one of its own that fails
        return _kind_of(cls)


_LASTING = ("builtins", "torch", "numpy", "collections")
_kinds: dict[type, _Kind] = {}
"""Of classes that do not come and go, as those of a notebook do."""


def _kind_of(cls: type) -> _Kind:
    kind = _classified(cls)
    module = cls.__module__
    if isinstance(module, str) and module.partition(".")[0] in _LASTING:
        _kinds[cls] = kind
    return kind


def _classified(cls: type) -> _Kind:
    """What values of a class are to us; the library that a class comes from is loaded, there is none to import."""

    def comes_from(module: str, name: str) -> bool:
        return issubclass(cls, getattr(sys.modules.get(module), name, ()))

    if comes_from("torch", "Tensor"):
        return "fake tensor" if comes_from("torch._subclasses.fake_tensor", "FakeTensor") else "tensor"
    if comes_from("numpy", "ndarray"):
        return "array"
    if comes_from("torch.fx", "Proxy"):
        return "proxy"
    return "container" if issubclass(cls, _CONTAINERS) else "other"


def is_tensor(value: Any) -> bool:
    """Whether it is a torch.Tensor; torch is not loaded to find out."""
    return _kind(value) in ("tensor", "fake tensor")


def is_array(value: Any) -> bool:
    """Whether it is a numpy.ndarray; numpy is not loaded to find out."""
    return _kind(value) == "array"


def runs_foreign_code(keep: Keep, value: Any) -> bool:
    """Whether to convert a value runs code that is neither ours nor torch's, and so may call the captured function.

    >>> runs_foreign_code(lambda value: value, 1), runs_foreign_code("numpy", 1)
    (True, False)
    """
    return callable(keep) or (keep != "graph" and _is_of_own_class(value))


def _is_of_own_class(value: Any) -> bool:
    """Whether it is a tensor of a class that is not torch's, whose every attribute may be somebody's code."""
    return _kind(value) == "tensor" and type(value) not in _kinds


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array or tensor; None of a nested tensor, and of anything else.

    >>> shape_of([1, 2]) is None
    True
    """
    try:
        return tuple(value.shape) if is_tensor(value) or is_array(value) else None
    except RuntimeError:  # there is no one shape
        return None


def why_unreal(value: Any) -> str | None:
    """Why a value stands for numbers without being those of a real call, or None; it completes "the value ...".

    >>> why_unreal([1.0]) is None
    True
    """
    if _is_of_own_class(value):
        with sys.modules["torch"]._C.DisableTorchFunctionSubclass():
            return _why_unreal(value)
    return _why_unreal(value)


def _why_unreal(value: Any) -> str | None:
    kind = _kind(value)
    if kind == "proxy":
        return "was a symbol of torch.fx"
    if kind == "fake tensor":
        return "was a fake tensor without numbers (torch.export, FakeTensorMode)"
    if kind != "tensor":
        return None
    torch = sys.modules["torch"]
    make_fx = getattr(sys.modules.get("torch.fx.experimental.proxy_tensor"), "get_proxy_mode", None)
    if make_fx is not None and make_fx() is not None:
        return "was traced by make_fx, whose graph a copy of it would be left in"
    if torch._C._get_tracing_state() is not None:
        return "passed through torch.jit.trace, which runs the code more than once to compare"
    if _below(value, torch)[1]:
        return "was inside a transform of torch.func, vmap, which computes all of a batch in one call"
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return "was only being captured into a CUDA graph, which does not run Python again"
    return None


def _below(tensor: Any, torch: Any) -> tuple[Any, bool]:
    """What the transforms of torch.func (grad, jvp) have wrapped, and whether one of them is vmap."""
    functorch, is_batch = getattr(torch._C, "_functorch", None), False
    while functorch is not None and functorch.is_functorch_wrapped_tensor(tensor):
        is_batch = is_batch or functorch.is_batchedtensor(tensor)
        tensor = functorch.get_unwrapped(tensor)
    return tensor, is_batch


def _itself(value: Any, copies: Any = None) -> Any:
    return value


def _aside(reduce: Callable[[Any], Any], value: Any) -> Any:
    """What a function makes of a value, hidden from those who watch what the model saves for its backward pass.

    torch.utils.checkpoint counts it, and ends the backward pass with an error where a layer saved more one time.
    """
    autograd = getattr(getattr(sys.modules.get("torch"), "autograd", None), "graph", None)
    if autograd is None:
        return reduce(value)
    hidden = autograd.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    try:
        hidden.__enter__()
    except RuntimeError:  # in a transform of torch.func, where there are no such hooks
        return reduce(value)
    try:
        return reduce(value)
    finally:
        hidden.__exit__(None, None, None)


def _to_tensor(tensor: Any) -> Any:
    return tensor.detach().clone()


def _to_numpy(tensor: Any, copies: list[Any] | None) -> Any:
    torch = sys.modules["torch"]
    problem = (
        "has no data (it is on the meta device)"
        if tensor.is_meta
        else f"has the layout {tensor.layout}"
        if tensor.layout is not torch.strided
        else "is nested"
        if tensor.is_nested
        else "is quantized"
        if tensor.is_quantized
        else None
    )
    if problem:
        raise TypeError(
            f"a tensor {problem} and cannot be kept as a numpy array; use "
            "keep='tensor', or a callable that makes a dense tensor of it, such as keep=lambda t: t.to_dense()"
        )
    below, is_batch = _below(tensor, torch)
    if below is not tensor and not is_batch:
        # The transform would wrap a copy of it again.
        with sys.modules["torch._functorch.pyfunctorch"].temporarily_clear_interpreter_stack():
            return _to_numpy(below, copies)
    name = str(tensor.dtype)
    has_no_numpy_type = name == "torch.bfloat16" or name.startswith("torch.float8")
    dtype = torch.float32 if has_no_numpy_type else torch.complex64 if name == "torch.complex32" else tensor.dtype
    try:
        if copies is not None and tensor.is_cuda:
            return _queue_copy(tensor.detach(), dtype, copies)
        return tensor.detach().to("cpu", dtype, copy=True).resolve_conj().resolve_neg().numpy()
    except (RuntimeError, NotImplementedError) as error:  # under vmap, in a fake mode: there are no numbers yet
        raise TypeError(
            f"a {type(tensor).__name__} cannot be kept as a numpy array ({error}); use keep='tensor', or keep='graph'"
        ) from error


def _queue_copy(tensor: Any, dtype: Any, copies: list[Any]) -> Any:
    """An array in pinned memory that a CUDA tensor's numbers are on their way to, and the event of their arrival."""
    torch = sys.modules["torch"]
    source = tensor.resolve_conj().resolve_neg().to(dtype).contiguous()
    # The device is said, for torch.set_default_device() may have another.
    target = torch.empty(source.shape, dtype=dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(source.device):
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    copies.append(event)
    return target.numpy()


def _is_container(value: Any) -> bool:
    return _kind(value) == "container"


def _snapshot(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The value with its tensors converted, arrays copied and containers rebuilt, to any depth."""
    kind = _kind(value)
    if kind in ("tensor", "fake tensor"):
        return convert(value)
    if kind == "array":
        return _copy_array(value, convert)
    if kind == "container":
        return _copy_container(value, convert, {})
    return value


def _copy_array(array: Any, convert: Callable[[Any], Any]) -> Any:
    """A copy of an array; one of objects, as of maps of several sizes, has copies of these."""
    copied = array.copy()
    if array.dtype == object:
        items = copied.reshape(-1)
        for place, item in enumerate(items):
            if item is not array:
                items[place] = _snapshot(item, convert)
    return copied


def _copy_container(value: Any, convert: Callable[[Any], Any], copies: dict[int, Any]) -> Any:
    """`copies` has the containers met so far: what is shared stays shared, and what holds itself holds itself."""

    def follow(item: Any) -> Any:
        if _is_container(item):
            return copies[id(item)] if id(item) in copies else _copy_container(item, convert, copies)
        return _snapshot(item, convert)

    def rebuilt(make: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        # A subclass (a model's output, a named tuple) is rebuilt as what it is, or plainly if it does not let us.
        try:
            return make()
        except Exception:
            return plain()

    kind = type(value)
    if issubclass(kind, dict):
        names, old = list(value), list(value.values())
        result: Any = {} if kind is dict else rebuilt(lambda: copy.copy(value), dict)
        copies[id(value)] = result
        new = [follow(item) for item in old]

        def fill() -> Any:
            for name, item in zip(names, new, strict=True):
                result[name] = item
            return result

        copies[id(value)] = filled = rebuilt(fill, lambda: dict(zip(names, new, strict=True)))
        return filled
    old = list(value)
    if issubclass(kind, (list, deque)):
        result = [] if kind is list else rebuilt(lambda: copy.copy(value), list)
        if kind is list:
            result.extend(old)
        copies[id(value)] = result
        new = [follow(item) for item in old]

        def fill_places() -> Any:
            for index, item in enumerate(new):
                result[index] = item
            return result

        copies[id(value)] = filled = rebuilt(fill_places, lambda: new)
        return filled
    new = [follow(item) for item in old]
    if all(one is other for one, other in zip(new, old, strict=True)):
        done = value if issubclass(kind, (tuple, frozenset)) else rebuilt(lambda: copy.copy(value), lambda: set(old))
    elif issubclass(kind, tuple):
        done = rebuilt(lambda: kind(*new) if hasattr(kind, "_fields") else kind(new), lambda: tuple(new))
    else:
        done = rebuilt(lambda: kind(new), lambda: new)  # arrays cannot be in a set: a list of them
    copies[id(value)] = done
    return done


def bytes_by_device(value: Any) -> dict[str, int]:
    """How many bytes a kept value takes on each device, e.g. {"cpu": 4096}.

    Tensors and arrays count their elements, containers what they hold, anything else its own size.
    """
    try:
        kind = _kind(value)
        if kind == "other":  # the usual cases
            return {"cpu": _size_of(value)}
        if kind == "array" and not value.dtype.hasobject:
            return {"cpu": value.nbytes}
        if kind != "tensor":
            return _sum_by_device(value)
        torch = sys.modules["torch"]
        if type(value) not in _kinds:
            with torch._C.DisableTorchFunctionSubclass():
                return _sum_by_device(value)
        if value.layout is torch.strided:
            return {"cpu" if value.is_cpu else _name_of(value.device): value.nbytes}
        return _sum_by_device(value)
    except Exception:  # of a class, of lists say, whose own code fails
        return {"cpu": object.__sizeof__(value)}


def _sum_by_device(value: Any) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    values = [value]
    while values:
        item = values.pop()
        if is_tensor(item):
            counts[_name_of(item.device)] += sum(part.nelement() * part.element_size() for part in _parts(item))
        elif is_array(item):
            counts["cpu"] += item.nbytes
            if item.dtype == object and id(item) not in seen:
                seen.add(id(item))
                values.extend(item.flat)
        elif _is_container(item):
            if id(item) not in seen:
                seen.add(id(item))
                counts["cpu"] += _size_of(item)
                values.extend(item.values() if isinstance(item, dict) else item)
        else:
            counts["cpu"] += _size_of(item)
    return dict(counts)


def _size_of(value: Any) -> int:
    try:
        return sys.getsizeof(value)
    except Exception:  # its __sizeof__ is code that anybody may have written
        return object.__sizeof__(value)


@lru_cache(maxsize=256)
def _name_of(device: Any) -> str:
    """A device as its budget is called: "cpu", "cuda:0"."""
    return str(device.type) if device.index is None else f"{device.type}:{device.index}"


def _parts(tensor: Any) -> list[Any]:
    """The dense tensors that a tensor consists of."""
    layout = str(tensor.layout)
    if layout == "torch.sparse_coo":
        return [tensor._indices(), tensor._values()]
    if layout in ("torch.sparse_csr", "torch.sparse_bsr"):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in ("torch.sparse_csc", "torch.sparse_bsc"):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def memory_of(device: str) -> int:
    """The bytes of memory that a device has; for the CPU, no more than its container may use.

    >>> memory_of("cpu") > 2**20
    True
    """
    kind, _, index = device.partition(":")
    torch = sys.modules.get("torch")
    if torch is not None and kind in ("cuda", "xpu"):
        return int(getattr(torch, kind).get_device_properties(int(index or 0)).total_memory)
    if torch is not None and kind == "mps":
        return int(torch.mps.recommended_max_memory())
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
    return 8 * 2**30  # unknown: a small laptop


def _container_limits() -> list[int]:
    """The memory limits of the control groups that this process is in; [] where there is none."""
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

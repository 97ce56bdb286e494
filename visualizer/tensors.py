"""What `keep=` makes of a captured value, and what a value is: tensor, array, container, or without real numbers.

torch and numpy are looked up among the loaded modules, never imported: whoever captures a tensor has loaded torch.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import inspect
import sys
import types
import weakref
from array import array as Array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

Keep = Literal["numpy", "tensor", "graph"] | Callable[[Any], Any]
"""What to store of a value; see `keeper`."""

_MODES = ("numpy", "tensor", "graph")


def check_keep(keep: Any) -> None:
    """Raise TypeError or ValueError unless `keep` is a mode or a callable; the message lists the choices."""
    choices = f"one of {', '.join(map(repr, _MODES))} or a callable such as lambda a: a.mean(1)"
    if isinstance(keep, str):
        if keep not in _MODES:
            raise ValueError(f"keep must be {choices}, not {keep!r}")
    elif not callable(keep) or isinstance(keep, type(sys)):
        raise TypeError(f"keep must be {choices}, not {keep!r}")


Tell = Callable[[type], None]
"""It is called with the class of each object that is kept by reference although it may change."""


def _ignore(_: type) -> None:
    pass


def keeper(keep: Keep, tell: Tell = _ignore) -> Callable[..., Any]:
    """A function that turns a captured value into what is stored of it.

    >>> keep = keeper("numpy")
    >>> values = [1, 2]
    >>> kept = keep(values)
    >>> values.append(3)
    >>> kept
    [1, 2]

    `get_local.activate` says what each mode stores. A callable is not called for None. `tell` gets the classes of the
    objects that are kept by reference, unless such objects never change. A tensor that cannot be an array (sparse,
    quantized, nested, meta) is a TypeError under "numpy".

    The function takes a list as second argument. With a list it does not wait for copies from a CUDA device. It queues
    them on the stream that the model runs on, so that nothing the model does later reaches them, into pinned memory,
    and adds an event for each to the list. Read the arrays only after every `event.synchronize()`.
    """
    if keep == "graph":
        return _itself
    if keep == "numpy":
        return lambda value, copies=None: _snapshot(value, lambda tensor: _to_numpy(tensor, copies), tell)
    if keep == "tensor":
        return lambda value, copies=None: _snapshot(value, _to_tensor, tell)
    reduce: Callable[[Any], Any] = keep
    # What the user's function makes is mostly new, and nobody else changes it: nothing is said of what is not copied.
    return lambda value, copies=None: (
        None if value is None else _snapshot(_hidden_from_autograd(reduce, value), _to_tensor, _ignore)
    )


ValueKind = Literal["tensor", "fake tensor", "array", "proxy", "container", "other"]

_CONTAINERS = (list, tuple, dict, set, frozenset, deque)


def kind_of(value: Any) -> ValueKind:
    """How a value is treated, by its type.

    `value.__class__` is not asked: on a lazy object or a dead proxy it runs code that may fail.
    """
    cls: Any = type(value)
    try:
        return _kinds[cls]
    except Exception:  # the class is not known yet, or its metaclass has no hash, or one that fails
        return _classify(cls)


_LASTING = ("builtins", "torch", "numpy", "collections")
_kinds: dict[type, ValueKind] = {}
"""The kinds of classes that last. A class of a notebook comes and goes, and must not be held here."""


def _classify(cls: type) -> ValueKind:
    kind = _kind_of_class(cls)
    module = cls.__module__
    if isinstance(module, str) and module.partition(".")[0] in _LASTING:
        _kinds[cls] = kind
    return kind


def _kind_of_class(cls: type) -> ValueKind:
    def comes_from(module: str, name: str) -> bool:  # there is nothing to import: the library of a class is loaded
        return issubclass(cls, getattr(sys.modules.get(module), name, ()))

    if comes_from("torch", "Tensor"):
        return "fake tensor" if comes_from("torch._subclasses.fake_tensor", "FakeTensor") else "tensor"
    if comes_from("numpy", "ndarray"):
        return "array"
    if comes_from("torch.fx", "Proxy"):
        return "proxy"
    return "container" if issubclass(cls, _CONTAINERS) else "other"


def is_tensor(value: Any) -> bool:
    """Whether a value is a torch.Tensor; torch is not loaded to find out."""
    return kind_of(value) in ("tensor", "fake tensor")


def is_array(value: Any) -> bool:
    """Whether a value is a numpy.ndarray; numpy is not loaded to find out."""
    return kind_of(value) == "array"


def is_container(value: Any) -> bool:
    """Whether a value is a list, tuple, dict, set or deque, whose items are followed."""
    return kind_of(value) == "container"


def runs_foreign_code(keep: Keep, value: Any) -> bool:
    """Whether converting a value runs code of others than us and torch, which may call the captured function.

    >>> runs_foreign_code(lambda value: value, 1), runs_foreign_code("numpy", 1)
    (True, False)
    """
    if callable(keep) or keep == "graph":
        return keep != "graph"
    kind = kind_of(value)
    is_object = kind == "other" and _way_to_copy(type(value)) is not _itself
    return is_object or kind == "container" or is_foreign_tensor(value)


def is_foreign_tensor(value: Any) -> bool:
    """Whether a value is a tensor of a class that is not torch's: reading any attribute may run code of that class."""
    return kind_of(value) == "tensor" and type(value) not in _kinds


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of an array or a tensor; None for a nested tensor, and for anything else.

    >>> shape_of([1, 2]) is None
    True
    """
    try:
        return tuple(value.shape) if is_tensor(value) or is_array(value) else None
    except RuntimeError:  # a nested tensor
        return None


def version_of(tensor: Any) -> int | None:
    """A number that changes whenever a tensor is changed in place; None of those of inference mode, which have none."""
    return None if tensor.is_inference() else getattr(tensor, "_version", None)


def why_unreal(value: Any) -> str | None:
    """Why a value does not have the numbers of a real call, or None. The text completes "the value ...".

    >>> why_unreal([1.0]) is None
    True
    """
    if is_foreign_tensor(value):
        with sys.modules["torch"]._C.DisableTorchFunctionSubclass():
            return _why_unreal(value)
    return _why_unreal(value)


def _why_unreal(value: Any) -> str | None:
    kind = kind_of(value)
    if kind == "proxy":
        return "was a symbol of torch.fx"
    if kind == "fake tensor":
        return "was a fake tensor without numbers (torch.export, FakeTensorMode)"
    if kind != "tensor":
        return None
    torch = sys.modules["torch"]
    make_fx = getattr(sys.modules.get("torch.fx.experimental.proxy_tensor"), "get_proxy_mode", None)
    if make_fx is not None and make_fx() is not None:
        return "was traced by make_fx, which would add our copy to its graph"
    if torch._C._get_tracing_state() is not None:
        return "passed through torch.jit.trace, which runs the code more than once to compare"
    if _unwrapped(value, torch)[1]:
        return "was inside a transform of torch.func, vmap, which computes all of a batch in one call"
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return "was only being captured into a CUDA graph, which does not run Python again"
    return None


def is_plain_torch(torch: Any) -> bool:
    """Whether torch is in none of the modes in which a tensor may have no numbers, or a copy of it is traced."""
    try:
        dispatch_modes, tracing_state, transforms = _mode_questions(torch._C)
    except AttributeError:  # a release that is not known
        return False
    return dispatch_modes() == 0 and tracing_state() is None and transforms() is None


@functools.cache
def _mode_questions(core: Any) -> tuple[Callable[[], Any], ...]:
    """Torch's functions that tell its modes, looked up once: this is asked for every captured tensor."""
    return core._len_torch_dispatch_stack, core._get_tracing_state, core._functorch.peek_interpreter_stack


def _unwrapped(tensor: Any, torch: Any) -> tuple[Any, bool]:
    """The tensor that the transforms of torch.func (grad, jvp) wrap, and whether one of them is vmap."""
    functorch, is_batch = getattr(torch._C, "_functorch", None), False
    while functorch is not None and functorch.is_functorch_wrapped_tensor(tensor):
        is_batch = is_batch or functorch.is_batchedtensor(tensor)
        tensor = functorch.get_unwrapped(tensor)
    return tensor, is_batch


def _itself(value: Any, copies: Any = None) -> Any:
    return value


def _hidden_from_autograd(reduce: Callable[[Any], Any], value: Any) -> Any:
    """The result of a function, hidden from whoever watches what the model saves for its backward pass.

    torch.utils.checkpoint counts the saved tensors, and ends the backward pass with an error where the counts of two
    runs of a layer differ.
    """
    autograd = getattr(getattr(sys.modules.get("torch"), "autograd", None), "graph", None)
    if autograd is None:
        return reduce(value)
    with contextlib.ExitStack() as hooks:
        with contextlib.suppress(RuntimeError):  # inside a transform of torch.func there are no such hooks
            hooks.enter_context(autograd.saved_tensors_hooks(lambda saved: saved, lambda saved: saved))
        return reduce(value)


def _to_tensor(tensor: Any) -> Any:
    return tensor.detach().clone()


def why_not_dense(tensor: Any) -> tuple[str, str] | None:
    """Why a tensor is no dense array of numbers, and what of it, `x`, is one; None where it is dense itself."""
    if tensor.is_nested:
        return "a nested tensor", "x.to_padded_tensor(0)"
    if tensor.layout is not sys.modules["torch"].strided:
        return f"a tensor of the layout {tensor.layout}", "x.to_dense()"
    if tensor.is_quantized:
        return "a quantized tensor", "x.dequantize()"
    return ("a tensor without numbers, on the meta device", "x.shape") if tensor.is_meta else None


def _to_numpy(tensor: Any, copies: list[Any] | None) -> Any:
    torch, problem = sys.modules["torch"], why_not_dense(tensor)
    if problem is not None:
        what, way = problem
        raise TypeError(f"{what} cannot be kept as a numpy array; use keep='tensor', or keep=lambda x: {way}")
    inner, is_batch = _unwrapped(tensor, torch)
    if inner is not tensor and not is_batch:
        # Otherwise the transform would wrap our copy again.
        with sys.modules["torch._functorch.pyfunctorch"].temporarily_clear_interpreter_stack():
            return _to_numpy(inner, copies)
    name = str(tensor.dtype)
    has_no_numpy_type = name == "torch.bfloat16" or name.startswith("torch.float8")
    dtype = torch.float32 if has_no_numpy_type else torch.complex64 if name == "torch.complex32" else tensor.dtype
    try:
        if copies is not None and tensor.is_cuda:
            return _queue_copy(tensor.detach(), dtype, copies)
        return tensor.detach().to("cpu", dtype, copy=True).resolve_conj().resolve_neg().numpy()
    except (RuntimeError, NotImplementedError) as error:  # under vmap or in a fake mode there are no numbers yet
        raise TypeError(
            f"a {type(tensor).__name__} cannot be kept as a numpy array ({error}); use keep='tensor', or keep='graph'"
        ) from error


def _queue_copy(tensor: Any, dtype: Any, copies: list[Any]) -> Any:
    """An array in pinned memory; `copies` gets the event after which it has the numbers of a CUDA tensor."""
    torch = sys.modules["torch"]
    source = tensor.resolve_conj().resolve_neg().to(dtype).contiguous()
    # torch.set_default_device() may have named another device, so this names its own.
    target = torch.empty(source.shape, dtype=dtype, device="cpu", pin_memory=True)
    with torch.cuda.device(source.device):
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    copies.append(event)
    return target.numpy()


def _snapshot(value: Any, convert: Callable[[Any], Any], tell: Tell) -> Any:
    """The value with its tensors converted, what can be copied copied, and containers rebuilt, to any depth."""
    return convert(value) if is_tensor(value) else _Snapshot(convert, tell).of(value)


class _Snapshot:
    """A copy of a value and of all that it holds."""

    def __init__(self, convert: Callable[[Any], Any], tell: Tell) -> None:
        self._convert, self._tell = convert, tell
        self._copies: dict[int, Any] = {}
        """By id, the copies of what holds others: what is shared stays shared, and what holds itself holds itself."""

    def of(self, value: Any) -> Any:
        """The copy of the value, or of an item of it."""
        kind = kind_of(value)
        if kind in ("tensor", "fake tensor"):
            return self._convert(value)
        if kind == "array":
            return self._of_array(value)
        if id(value) in self._copies:
            return self._copies[id(value)]
        way = _way_to_copy(type(value))
        if kind == "container" and not isinstance(way, functools.partial):  # a sparse matrix may be a dict too
            return self._of_container(value)
        try:
            if way is _Snapshot.of_attributes:
                return way(self, value)
            if way is not None:
                return way(value)
        except Exception:  # its class has code that fails
            pass
        self._tell(type(value))
        return value

    def _of_array(self, array: Any) -> Any:
        """A copy of an array; in an array of objects, such as maps of several sizes, these are copied too."""
        copied = array.copy()
        if array.dtype == object:
            items = copied.reshape(-1)
            for i, item in enumerate(items):
                if item is not array:
                    items[i] = _snapshot(item, self._convert, self._tell)
        return copied

    def of_attributes(self, value: Any) -> Any:
        """An object of the same class, of whose code nothing runs, with copies of all attributes."""
        cls = type(value)
        base: Any = _builtin_base(cls)
        new = self._copies[id(value)] = base.__new__(cls)
        for name, item in _in_slots(value):
            object.__setattr__(new, name, self.of(item))
        for name, item in _in_dict(value).items():
            _in_dict(new)[name] = self.of(item)
        return new

    def _of_container(self, value: Any) -> Any:
        """A subclass (a model's output, a named tuple) becomes one of its own, or its plain base if that fails."""
        cls = type(value)
        if issubclass(cls, (dict, list, deque)):
            done = self._of_places(value)
        else:
            old = list(value)
            new = [self.of(item) for item in old]
            if all(one is other for one, other in zip(new, old, strict=True)):
                is_fixed = issubclass(cls, (tuple, frozenset))
                done = value if is_fixed else _tried(lambda: copy.copy(value), lambda: set(old))
            elif issubclass(cls, tuple):
                done = _tried(lambda: cls(*new) if hasattr(cls, "_fields") else cls(new), lambda: tuple(new))
            else:
                done = _tried(lambda: cls(new), lambda: new)  # arrays have no hash: a list in place of the set
        self._copies[id(value)] = done
        return done

    def _of_places(self, value: Any) -> Any:
        """The copy of a dict, a list or a deque. It is known before it is filled, as the value may hold itself."""
        is_dict = issubclass(type(value), dict)
        places, old = (list(value), list(value.values())) if is_dict else ([*range(len(value))], list(value))
        plain: Any = dict(zip(places, old, strict=True)) if is_dict else old.copy()
        is_plain = type(value) in (dict, list)
        result = self._copies[id(value)] = plain if is_plain else _tried(lambda: copy.copy(value), lambda: plain)
        new = [self.of(item) for item in old]

        def filled(container: Any) -> Any:
            for place, item in zip(places, new, strict=True):
                container[place] = item
            return container

        return _tried(lambda: filled(result), lambda: filled(plain))


def _tried(make: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception:  # a user's class has code of its own
        return otherwise()


_ATOMS = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, object, range, slice, type(...), type(NotImplemented)),
        *(list, tuple, dict, set, frozenset, deque),
        *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, types.CodeType, type),
    )
)
"""Classes whose objects never change, or are no data (nobody wants a copy of a function); and containers."""

_ways: weakref.WeakKeyDictionary[type, Callable[..., Any] | None] = weakref.WeakKeyDictionary()


def _way_to_copy(cls: type) -> Callable[..., Any] | None:
    """What copies objects of a class: `_itself` where they never change; None where nothing is known to be safe."""
    try:
        return _itself if cls in _ATOMS else _ways[cls]
    except Exception:  # the class is not known yet, or its metaclass has no hash, or one that fails
        pass
    way = None
    with contextlib.suppress(Exception):
        way = _choose_way(cls)
        _ways[cls] = way
    return way


_WITH_ATTRIBUTES = (types.SimpleNamespace, collections.UserDict, collections.UserList, collections.ChainMap)


def _choose_way(cls: type) -> Callable[..., Any] | None:
    def has(name: str) -> bool:
        return any(name in vars(base) for base in cls.__mro__ if base not in (object, types.SimpleNamespace))

    if issubclass(cls, (bytearray, Array)):
        return copy.copy
    if issubclass(cls, (memoryview, types.MappingProxyType)):  # each shows what something else holds
        return _copy_view if cls is memoryview else None
    if issubclass(cls, (type, types.ModuleType)) or any(map(_never_changes, cls.__mro__)):
        return _itself
    has_data = has("__dataclass_fields__") or has("__attrs_attrs__") or issubclass(cls, _WITH_ATTRIBUTES)
    is_module = issubclass(cls, getattr(sys.modules.get("torch.nn"), "Module", ()))
    if has_data and not is_module and _builtin_base(cls) in (object, types.SimpleNamespace):
        # Whose class says how to copy it, or cleans up behind it, is more than its data.
        own = ("__del__", "__deepcopy__", "__reduce__", "__reduce_ex__")
        return None if any(map(has, own)) else _Snapshot.of_attributes
    method = next(filter(has, ("copy", "clone")), None)
    if method is not None and any(map(has, ("shape", "__array__", "__array_interface__"))):
        return functools.partial(_copy_by_method, method, "deep" in _parameters(getattr(cls, method)))
    return None


def _never_changes(cls: type) -> bool:
    """Whether equal objects of a class hash alike for ever: only builtin classes and Python's own keep to that."""
    is_builtin = _builtin_base(cls) is cls
    is_pythons = cls.__module__.partition(".")[0] in sys.stdlib_module_names
    hashes: Any = cls.__hash__
    by_value = hashes is not None and hashes is not object.__hash__ and (is_builtin or is_pythons)
    torch = sys.modules.get("torch")
    return by_value or cls in (getattr(torch, "dtype", None), getattr(torch, "layout", None))


def _builtin_base(cls: type) -> type:
    """The first of a class and its bases that is written in C, as far as Python says so."""
    return next(base for base in cls.__mro__ if not base.__flags__ & 1 << 9)  # Py_TPFLAGS_HEAPTYPE


def _parameters(function: Any) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin that does not say
        return ()


def _copy_by_method(method: str, takes_deep: bool, value: Any) -> Any:
    function = getattr(type(value), method)
    return function(value, deep=True) if takes_deep else function(value)


def _copy_view(view: memoryview) -> memoryview:
    flat: Any = memoryview(view.tobytes())
    copied: memoryview = flat if (view.format, view.ndim) == ("B", 1) else flat.cast(view.format, view.shape)
    return copied


def attributes(value: Any) -> dict[str, Any]:
    """What the attributes of an object hold that `keeper` copies; {} for any other."""
    way = _way_to_copy(type(value))
    is_copied = way is _Snapshot.of_attributes or isinstance(way, functools.partial)
    return {**dict(_in_slots(value)), **_in_dict(value)} if is_copied else {}


def _in_dict(value: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


def _in_slots(value: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that have slots, by the names of the slots."""
    for base in type(value).__mro__:
        for name, member in vars(base).items():
            if type(member) is types.MemberDescriptorType and name != "__dict__":
                try:
                    yield name, object.__getattribute__(value, name)
                except AttributeError:  # not set
                    continue

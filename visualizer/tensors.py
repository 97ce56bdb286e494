"""What is kept of a captured value.

torch and numpy are looked up among the loaded modules, never imported: whoever captures a tensor has loaded torch.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable
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


def keeper(keep: Keep) -> Callable[..., Any]:
    """A function that turns a captured value into what is stored of it.

    >>> keep = keeper("numpy")
    >>> values = [1, 2]
    >>> kept = keep(values)
    >>> values.append(3)
    >>> kept
    [1, 2]

    "numpy": tensors become arrays on the CPU; types that numpy lacks (bfloat16, 8-bit floats) become float32.
    "tensor": tensors are detached and copied, and stay on their device in their type.
    "graph": the value itself.
    A callable: a snapshot of what it returns. It is not called for None.

    In all but "graph", arrays are copied, and lists, tuples, dicts, sets and deques are copied with what they hold;
    other objects are kept as they are. A tensor that cannot be an array (sparse, quantized, nested, meta) is a
    TypeError under "numpy".

    The function takes a list as second argument. With a list it does not wait for copies from a CUDA device. It queues
    them on the stream that the model runs on, so that nothing the model does later reaches them, into pinned memory,
    and adds an event for each to the list. Read the arrays only after every `event.synchronize()`.
    """
    if keep == "graph":
        return _itself
    if keep == "numpy":
        return lambda value, copies=None: _snapshot(value, lambda tensor: _to_numpy(tensor, copies))
    if keep == "tensor":
        return lambda value, copies=None: _snapshot(value, _to_tensor)
    reduce: Callable[[Any], Any] = keep
    return lambda value, copies=None: (
        None if value is None else _snapshot(_hidden_from_autograd(reduce, value), _to_tensor)
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
    return callable(keep) or (keep != "graph" and is_foreign_tensor(value))


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
    core = torch._C
    try:
        return bool(
            core._len_torch_dispatch_stack() == 0
            and core._get_tracing_state() is None
            and core._functorch.peek_interpreter_stack() is None
        )
    except AttributeError:  # a release that is not known
        return False


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
    hidden = autograd.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    try:
        hidden.__enter__()
    except RuntimeError:  # inside a transform of torch.func there are no such hooks
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


def _snapshot(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The value with its tensors converted, arrays copied and containers rebuilt, to any depth."""
    kind = kind_of(value)
    if kind in ("tensor", "fake tensor"):
        return convert(value)
    if kind == "array":
        return _copy_array(value, convert)
    if kind == "container":
        return _copy_container(value, convert, {})
    return value


def _copy_array(array: Any, convert: Callable[[Any], Any]) -> Any:
    """A copy of an array; in an array of objects, such as maps of several sizes, these are copied too."""
    copied = array.copy()
    if array.dtype == object:
        items = copied.reshape(-1)
        for i, item in enumerate(items):
            if item is not array:
                items[i] = _snapshot(item, convert)
    return copied


def _copy_container(value: Any, convert: Callable[[Any], Any], copies: dict[int, Any]) -> Any:
    """A copy of a container and all it holds.

    `copies` has the containers met so far, by id: a shared one stays shared, and one that holds itself holds itself.
    """

    def follow(item: Any) -> Any:
        if is_container(item):
            return copies[id(item)] if id(item) in copies else _copy_container(item, convert, copies)
        return _snapshot(item, convert)

    def rebuilt(make: Callable[[], Any], plain: Callable[[], Any]) -> Any:
        # A subclass (a model's output, a named tuple) is rebuilt as such, or as its plain base if that fails.
        try:
            return make()
        except Exception:
            return plain()

    cls = type(value)
    if issubclass(cls, dict):
        names, old = list(value), list(value.values())
        result: Any = {} if cls is dict else rebuilt(lambda: copy.copy(value), dict)
        copies[id(value)] = result
        new = [follow(item) for item in old]

        def fill() -> Any:
            for name, item in zip(names, new, strict=True):
                result[name] = item
            return result

        copies[id(value)] = filled = rebuilt(fill, lambda: dict(zip(names, new, strict=True)))
        return filled
    old = list(value)
    if issubclass(cls, (list, deque)):
        result = [] if cls is list else rebuilt(lambda: copy.copy(value), list)
        if cls is list:
            result.extend(old)
        copies[id(value)] = result
        new = [follow(item) for item in old]

        def fill_items() -> Any:
            for index, item in enumerate(new):
                result[index] = item
            return result

        copies[id(value)] = filled = rebuilt(fill_items, lambda: new)
        return filled
    new = [follow(item) for item in old]
    if all(one is other for one, other in zip(new, old, strict=True)):
        done = value if issubclass(cls, (tuple, frozenset)) else rebuilt(lambda: copy.copy(value), lambda: set(old))
    elif issubclass(cls, tuple):
        done = rebuilt(lambda: cls(*new) if hasattr(cls, "_fields") else cls(new), lambda: tuple(new))
    else:
        done = rebuilt(lambda: cls(new), lambda: new)  # arrays have no hash: a list in place of the set
    copies[id(value)] = done
    return done

"""The mode that shows a watcher each of torch's functions; how it is added and removed among a thread's others, and how
to compute unseen by all of them."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from . import operators
from .calls import name_of
from .contractions import MULTIPLIES
from .deformable import may_read_cells, may_sample
from .kernels import KERNELS
from .softmax import (
    OUTER,
    adds_product,
    is_of_activations,
    is_of_pairs,
    makes_pairs,
    may_begin,
    multiplies_pairs,
)

MULTI_HEAD = "multi_head_attention_forward"


_ATTRIBUTES = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_nested", "_base")
)
_WITHOUT_TENSOR = frozenset(
    ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "item")
)
_TO_PYTHON = frozenset(("tolist", "numpy", "__array__"))
_CUT = frozenset(("masked_select", "nonzero", "argwhere"))
FOLLOWS, BEGINS, NO_TENSOR, TO_PYTHON = "follows", "begins", "no tensor", "to Python"
_INTEREST: dict[Any, Any] = {}
"""By function, why it may have to do with attention; filled as functions are called."""


def interest_of(func: Any) -> Any:
    """Whether a function attends, or may be the first to; or makes no tensor that could be followed, or hands its
    numbers to Python.

    All others mean something only after one that is the first. Of some, what they are called with tells; then this is
    a function of (args, kwargs).
    """
    interest = _INTEREST.get(func)
    if interest is not None:
        return interest
    name = name_of(func)
    if name in KERNELS or name == MULTI_HEAD or may_begin(name) or may_sample(name):
        interest = BEGINS
    elif func is Tensor.__getitem__:
        interest = may_read_cells
    elif name == "linear":
        interest = is_of_activations
    elif name == "addmm":
        interest = adds_product
    elif name == "bilinear":
        interest = is_of_pairs
    elif name in OUTER:
        interest = multiplies_pairs if name in MULTIPLIES else makes_pairs
    elif name in _WITHOUT_TENSOR or (name == "__get__" and getattr(func.__self__, "__name__", "") in _ATTRIBUTES):
        interest = NO_TENSOR
    elif name in _TO_PYTHON:
        interest = TO_PYTHON
    else:
        interest = FOLLOWS
    if len(_INTEREST) < 4096:
        _INTEREST[func] = interest
    return interest


def is_cut_by_numbers(func: Any, args: Any) -> bool:
    """Whether numbers of a tensor may say how long the result is."""
    if func is not Tensor.__getitem__:
        return name_of(func) in _CUT
    index = args[1] if type(args[1]) is tuple else args[1:]
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in index)


class Watcher(Protocol):
    """What is shown the functions."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one of torch's functions."""

    def see_scripted(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take note of what a scripted function returned."""


def add_mode(mode: TorchFunctionMode) -> None:
    """Begin a mode in this thread below all others: each of those ends by taking the uppermost mode away, as its own.

    For KeyboardInterrupt torch calls no hooks: a mode above the others would be taken away in place of that of a
    `with torch.device(...)` around the call, which would go on for the rest of the process. The default device stays
    below: torch asks for it there.
    """
    above = [_pop_mode() for _ in range(_len_torch_function_stack())]  # type: ignore[no-untyped-call]
    default = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    if above and above[-1] is default:
        _push_mode(above.pop())  # type: ignore[no-untyped-call]
    for other in (mode, *reversed(above)):
        _push_mode(other)  # type: ignore[no-untyped-call]


def remove_mode(mode: TorchFunctionMode) -> bool:
    """End a mode of this thread, whichever have begun behind it and go on.

    False if it is not there: torch takes it away while it is shown a function, and puts it back afterwards.
    """
    behind, is_found = [], False
    while not is_found and _len_torch_function_stack() > 0:
        last = _pop_mode()  # type: ignore[no-untyped-call]
        is_found = last is mode
        behind += [] if is_found else [last]
    for other in reversed(behind):
        _push_mode(other)  # type: ignore[no-untyped-call]
    return is_found


_ScriptFunction: Any = torch.jit.ScriptFunction
_call_script = _ScriptFunction.__call__
_scripted_lock = threading.RLock()  # a recording that nobody holds any more may end in the middle of anything
_watches = 0


def see_scripted(is_on: bool) -> None:
    """Have the calls of scripted functions seen, which no mode of torch sees, as long as anything is watched."""
    global _watches
    with _scripted_lock:
        _watches += 1 if is_on else -1
        _ScriptFunction.__call__ = _called_script if _watches else _call_script


def _called_script(function: Any, *args: Any, **kwargs: Any) -> Any:
    result = _call_script(function, *args, **kwargs)
    for place in range(_len_torch_function_stack()):
        mode = _get_function_stack_at(place)
        watch = mode.watch() if isinstance(mode, Mode) else None
        if watch is not None:
            watch.see_scripted(function, args, kwargs, result)
    return result


class Mode(TorchFunctionMode):
    """Shows a watcher what torch's functions are called with; several threads may be in it."""

    def __init__(self, watch: Watcher) -> None:
        super().__init__()
        self.watch = weakref.ref(watch)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch = self.watch()
        if watch is None or _INTEREST.get(func) is NO_TENSOR:
            return func(*args, **kwargs)
        return watch.run(func, args, kwargs)


class unseen:
    """What is computed within is seen by no recording and no other mode, and has no graph.

    Copies made in inference mode could not be worked on outside of it.
    """

    __slots__ = ("_functions", "_had_gradients", "_inference")

    def __enter__(self) -> None:
        operators.hide(1)
        functions: Any = torch._C.DisableTorchFunction()
        functions.__enter__()
        # In this order: leaving inference mode brings gradients back.
        inference: Any = torch._C._InferenceMode(False) if torch.is_inference_mode_enabled() else None
        if inference is not None:
            inference.__enter__()
        self._functions, self._inference = functions, inference
        self._had_gradients = torch.is_grad_enabled()
        if self._had_gradients:
            torch._C._set_grad_enabled(False)  # torch.no_grad() takes five times as long

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._had_gradients)
        if self._inference is not None:
            self._inference.__exit__(None, None, None)
        self._functions.__exit__(None, None, None)
        operators.hide(-1)

"""Sees the operators of torch that attend, and those that attention is made of, below Python; no other costs anything.

A mode of torch is called for each function, which takes longer than a small function does. torch's dispatcher can call
Python for a few operators alone: those that have a function under a dispatch key that is on in the thread. It passes
over the key for all others. The key here is autocast's for a kind of device that torch no longer runs on, so that
nothing else uses it. It stands above autograd, and so is seen what a model calls, whoever calls it and under whichever
name, but not what an operator calls itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from .calls import LogSums
from .kernels import KERNELS

READS = frozenset(("_local_scalar_dense", "equal"))
"""The operators behind `bool(tensor)`, `tensor.item()` and `torch.equal`: what Python does next may depend on them."""

PRODUCTS = frozenset(("bmm", "baddbmm", "addbmm"))

_OTHERS = {
    **dict.fromkeys(PRODUCTS, "default"),
    "cdist": "default",
    "softmax": "int",
    "_softmax": "default",
    "grid_sampler": "default",
    "_flash_attention_forward": "default",
    "_efficient_attention_forward": "default",
    "_cudnn_attention_forward": "default",
    "_native_multi_head_attention": "default",
    "_transformer_encoder_layer_fwd": "default",
    **dict.fromkeys(READS, "default"),
}
"""Operators that are steps of an attention, or decide whether there is one; and their overloads."""

_QUICK: dict[str, Any] = {"scaled_dot_product_attention": torch._C._nn.scaled_dot_product_attention}
"""Functions that call an operator and take less time to do so than its own face in Python."""

_KEY = "AutocastIPU"


class Observer(Protocol):
    """What is told of the operators."""

    needs_sums: bool
    """Whether `FusedCall.log_sums` is of use."""

    def see_operator(self, name: str, args: Any, kwargs: Any, output: Any, sums: LogSums | None) -> None:
        """Take note of an operator that has run."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.observers: list[weakref.ref[Any]] = []
        self.hidden = 0


_here = _Here()
_lock = threading.Lock()
_libraries: list[Any] = []
"""What is registered, from the first use on for good: without it a thread whose key is still on could run nothing."""
_is_possible: bool | None = None


def are_seen() -> bool:
    """Whether operators can be seen by this torch, and in what runs around the call."""
    global _is_possible
    with _lock:
        if _is_possible is None:
            _is_possible = False
            with suppress(Exception):  # before torch 2.6 there are no fallbacks, and the key may belong to somebody
                _register()
                _is_possible = True
    is_plain = (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )
    return _is_possible and is_plain


def begin(observer: Observer) -> None:
    """Tell an observer of the operators that this thread calls, until `end`."""
    _here.observers.append(weakref.ref(observer))
    _switch(True)


def end(observer: Observer) -> None:
    """Tell it no more."""
    _here.observers[:] = [known for known in _here.observers if known() not in (None, observer)]
    if not _here.observers:
        _switch(False)


def hide(more: int) -> None:
    """Tell no observer of this thread's operators, from 1 to -1: what a recording computes is of no other's model."""
    _here.hidden += more


def are_hidden() -> bool:
    """Whether this thread's operators are those of a recording."""
    return _here.hidden > 0


def _switch(is_on: bool) -> None:
    key: Any = getattr(torch._C.DispatchKey, _KEY)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, not is_on)
    torch._C._dispatch_tls_set_dispatch_key_included(key, is_on)


def _register() -> None:
    library: Any = torch.library.Library
    # Operators that take functions, such as flex_attention, are dispatched in Python, and know no fallbacks.
    later: list[Any] = torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS
    now: list[Any] = [*torch._ops._higher_order_ops.values()]
    rest, aten = library("_", "IMPL"), library("aten", "IMPL")
    _libraries.extend((rest, aten))
    key: Any = getattr(torch._C.DispatchKey, _KEY)
    rest.fallback(torch.library.fallthrough_kernel, _KEY)
    later.append(key)
    for taking_functions in now:
        taking_functions.fallthrough(key)
    own = torch._C.DispatchKeySet(key)
    for name, overload in {**dict.fromkeys(KERNELS, "default"), **_OTHERS}.items():
        operator = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if operator is not None:  # flex_attention is none, and other releases have other ones
            aten.impl(f"{name}.{overload}".removesuffix(".default"), _observed(name, operator, own), _KEY)


def _observed(name: str, operator: Any, own: Any) -> Callable[..., Any]:
    """The operator, which tells of its calls; what it calls itself, and what the observers do, is not seen."""
    names = [argument.name for argument in operator._schema.arguments[3:]]
    quick = _QUICK.get(name, operator)
    guard, unseen_by_modes = torch._C._ExcludeDispatchKeyGuard, torch._C.DisableTorchFunction

    def run(*args: Any, **kwargs: Any) -> Any:
        with guard(own):
            told = [] if _here.hidden else [one for known in _here.observers if (one := known()) is not None]
            sums = None
            for observer in told:
                if sums is None and observer.needs_sums and LogSums.may_see(operator, *args[:1], **kwargs):
                    sums = LogSums()
            with unseen_by_modes():  # modes saw the function
                if sums is None:
                    output = quick(*args, **kwargs)
                else:
                    with sums:
                        output = operator(*args, **kwargs)
            if len(args) > 3:  # behind query, key and value by their names, as they are passed
                args, kwargs = args[:3], dict(zip(names, args[3:], strict=False)) | kwargs
            for observer in told:
                observer.see_operator(name, args, kwargs, output, sums)
        return output

    return run

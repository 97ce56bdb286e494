"""The kernels that are registered in transformers' AttentionInterface: flash attention, kernels of a hub, one's own.

Each is called as (module, query, key, value, attention_mask, ...) and returns (batch, queries, heads, width). While a
model is watched, every one of them is wrapped, by the interface's own way to override a function. Where nothing that
attends was seen inside of a call, the call itself is what a map is made of; whether it is right, its proof tells.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from .kernels import FusedCall


class Watcher(Protocol):
    """What is told of the calls."""

    def seen_calls(self) -> int | None:
        """How many attention calls were seen in this thread; None outside of a module's call."""

    def see_interface(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """Take note of a kernel's call in which no other was seen."""


_lock = threading.Lock()
_watchers: list[weakref.ref[Any]] = []
_wrapped: dict[str, tuple[Any, Any]] = {}  # the function before and its wrapper, by the kernel's name


def begin(watcher: Watcher) -> None:
    """Have a watcher told of the kernels' calls; nothing happens before transformers is imported."""
    functions = _functions()
    with _lock:
        if functions is None:
            return
        _watchers.append(weakref.ref(watcher))
        for name in [*functions]:
            if name not in _wrapped:
                original = functions[name]
                wrapper = _wrapper(name, original)
                _wrapped[name] = original, wrapper
                functions[name] = wrapper


def end(watcher: Watcher) -> None:
    """Have it told no more; with the last one the functions are again what they were."""
    functions = _functions()
    with _lock:
        _watchers[:] = [known for known in _watchers if known() not in (None, watcher)]
        if _watchers or functions is None:
            return
        for name, (original, wrapper) in _wrapped.items():
            if functions.get(name) is wrapper:
                del functions[name]
                if functions.get(name) is not original:  # it was an override itself
                    functions[name] = original
        _wrapped.clear()


def _functions() -> Any:
    return getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)


def _wrapper(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            watchers = [watcher for known in _watchers if (watcher := known()) is not None]
        before = [watcher.seen_calls() for watcher in watchers]
        result = function(*args, **kwargs)
        for watcher, count in zip(watchers, before, strict=True):
            if count is not None and watcher.seen_calls() == count:
                watcher.see_interface(name, result, args, kwargs)
        return result

    return call


def attention_interface(
    result: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> FusedCall:
    """A call by transformers' interface: query (batch, heads, queries, width), key and value with perhaps fewer heads.

    The mask is (batch, keys), False for padding, as flash attention has it; or (batch, heads or 1, queries, keys), and
    then it says everything. Otherwise the module's `is_causal` counts: the last query sees the last key.
    """
    output = result[0] if isinstance(result, tuple) else result
    queries, keys = query.shape[-2], key.shape[-2]
    mask, causal = attention_mask, None
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :keys]
    else:
        mask = None if mask is None else mask[:, None, None, -keys:] != 0
        if getattr(module, "is_causal", False) if is_causal is None else is_causal:
            causal = keys - queries
        if sliding_window is not None:
            place = torch.arange(queries, device=query.device)[:, None] + keys - queries
            is_near = torch.arange(keys, device=query.device) > place - sliding_window
            mask = is_near[None, None] if mask is None else mask & is_near
    cap = None if not softcap else lambda score, *_: softcap * torch.tanh(score / softcap)
    return FusedCall(output.transpose(1, 2), query, key, value, scaling, mask, causal, dropout, cap)

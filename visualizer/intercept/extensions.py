"""The compiled kernels of deformable attention, which no mode of torch sees: autograd Functions call them.

Deformable DETR's repository, mmcv and what is built on them have a class each, `MSDeformAttnFunction` or the like,
whose `apply` takes what the kernel takes. While a model is watched, classes with such arguments tell of their calls.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from .sampling import SampledCall, ms_deform_attn_forward


class Watcher(Protocol):
    """What is told of the calls."""

    def seen_calls(self) -> int | None:
        """How many attention calls were seen in this thread; None outside of a module's call."""

    def see_sampled(self, name: str, describe: Callable[[], SampledCall]) -> None:
        """Take note of a deformable attention in which no other was seen; `describe` says what it was."""


_lock = threading.Lock()
_watchers: list[weakref.ref[Any]] = []
_wrapped: list[type[torch.autograd.Function]] = []
_ARGUMENTS = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")


def begin(watcher: Watcher) -> None:
    """Have a watcher told of the calls, of the classes that are imported by now."""
    with _lock:
        _watchers.append(weakref.ref(watcher))
        for cls in _below(torch.autograd.Function):
            if "apply" not in vars(cls) and cls not in _wrapped and _is_deformable(cls):
                _wrapped.append(cls)
                cls.apply = staticmethod(_wrapper(cls.__name__, cls.apply))


def end(watcher: Watcher) -> None:
    """Have it told no more; with the last one the classes are again what they were."""
    with _lock:
        _watchers[:] = [known for known in _watchers if known() not in (None, watcher)]
        while _wrapped and not _watchers:
            del _wrapped.pop().apply


def _below(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _below(one)


def _is_deformable(cls: Any) -> bool:
    """Whether its forward takes a context and the kernel's arguments; mmcv puts "value_" before some of the names."""
    try:
        names = [*inspect.signature(cls.forward).parameters][1 : 1 + len(_ARGUMENTS)]
    except (TypeError, ValueError):
        return False
    return [name if name == "value" else name.removeprefix("value_") for name in names] == [*_ARGUMENTS]


def _wrapper(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _lock:
            watchers = [watcher for known in _watchers if (watcher := known()) is not None]
        before = [watcher.seen_calls() for watcher in watchers]
        result = apply(*args, **kwargs)
        for watcher, count in zip(watchers, before, strict=True):
            if count is not None and watcher.seen_calls() == count:
                watcher.see_sampled(name, lambda: ms_deform_attn_forward(result, *args, **kwargs))
        return result

    return call

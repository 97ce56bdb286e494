"""Kernels that are Python functions, which no mode of torch sees: those of other libraries, and of transformers.

While a model is watched, three kinds of function tell of their calls. Those registered in transformers'
AttentionInterface are wrapped by the interface's own way to override one. Those of other libraries, such as
`flash_attn_func`, are found by their names in all modules, and have their code swapped: so a call is seen however the
function got there, imported by name, kept in an object, or wrapped. The autograd Functions around compiled kernels have
their `apply` wrapped: flash-attn's are found by their names, and those of deformable attention, `MSDeformAttnFunction`
or the like in Deformable DETR's repository and in mmcv, by their arguments. Where something that attends was seen
inside of a call, that is what a map is made of; else the call itself, and the proof decides whether the map is right.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import CodeType, FunctionType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .calls import FusedCall
from .deformable import SampledCall, ms_deform_attn_forward
from .kernels import FUNCTIONS, attention_interface


class Watcher(Protocol):
    """What is told of the calls."""

    def seen_calls(self) -> int | None:
        """How many attention calls were seen in this thread; None outside of a module's call."""

    def see_function(self, name: str, describe: Callable[[], FusedCall | SampledCall]) -> None:
        """Take note of a function's call in which no other was seen; `describe` says what it was."""


_lock = threading.RLock()  # the collector may end a recording, which takes it, in the thread that has it
_watchers: tuple[weakref.ref[Any], ...] = ()  # replaced as a whole: each call of a wrapped function reads it
_wrapped: dict[str, tuple[Any, Any]] = {}  # the function before and its wrapper, by the name of the interface
_swapped: dict[FunctionType, tuple[CodeType, CodeType, bool]] = {}  # the codes before and now; is the signature ours
_classes: list[type[torch.autograd.Function]] = []  # whose `apply` is wrapped
_DEFORMABLE = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
_AROUND = {
    "FlashAttnFunc": "flash_attn_func",
    "FlashAttnQKVPackedFunc": "flash_attn_qkvpacked_func",
    "FlashAttnKVPackedFunc": "flash_attn_kvpacked_func",
    "FlashAttnVarlenFunc": "flash_attn_varlen_func",
    "FlashAttnVarlenQKVPackedFunc": "flash_attn_varlen_qkvpacked_func",
    "FlashAttnVarlenKVPackedFunc": "flash_attn_varlen_kvpacked_func",
}
"""The functions that flash-attn's autograd Functions are behind; some code calls their `apply` itself."""


class _Search:
    """The functions and classes of other libraries that attend, as far as all modules were looked through."""

    def __init__(self) -> None:
        self.functions: weakref.WeakKeyDictionary[FunctionType, str] = weakref.WeakKeyDictionary()
        """Those of the names in `FUNCTIONS`."""
        self.classes: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()
        """The autograd Functions around a kernel, each with what says what its calls are."""
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()  # those around none that is known
        self._homes: set[tuple[str, str]] = set()  # the modules that the functions are in, and their names
        self._looked_through: dict[str, tuple[weakref.ref[ModuleType], int]] = {}  # and how much was in them
        # At the last time: all modules, what they hold, and how much; and how many, for a first glance.
        self._last: tuple[list[Any], list[Any], list[int]] = ([], [], [])
        self._counts = 0, 0

    @property
    def is_current(self) -> bool:
        """Whether there are as many modules as at the last time, and as much in the one that a user works in."""
        return self._counts == self._counted()

    @staticmethod
    def _counted() -> tuple[int, int]:
        return len(sys.modules), len(getattr(sys.modules.get("__main__"), "__dict__", ()))

    def look(self) -> None:
        """Look for what is new."""
        for path, name in [*self._homes]:  # where another function may stand in the place of one that was found
            self._take(path, getattr(sys.modules.get(path), "__dict__", {}), name)
        self._look_through_modules()
        self._counts = self._counted()
        for cls in _below(torch.autograd.Function):
            if cls not in self.classes and cls not in self._others and "apply" not in vars(cls):
                describe = _describes(cls)
                if describe is None:
                    self._others.add(cls)
                else:
                    self.classes[cls] = describe

    def _look_through_modules(self) -> None:
        modules, (before, members, sizes) = [*sys.modules.values()], self._last
        is_same = len(modules) == len(before) and all(map(operator.is_, modules, before))
        if is_same and sizes == [*map(len, members)]:
            return
        # What stands for a module may have no attributes.
        members = members if is_same else [getattr(module, "__dict__", {}) for module in modules]
        self._last = modules, members, [*map(len, members)]
        for path, module in [*sys.modules.items()]:
            held = getattr(module, "__dict__", {})
            known = self._looked_through.get(path)
            if known is not None and known[0]() is module and known[1] == len(held):
                continue
            if type(module) is ModuleType:
                self._looked_through[path] = weakref.ref(module), len(held)
            for name in FUNCTIONS:
                if name in held:
                    self._take(path, held, name)

    def _take(self, path: str, held: Any, name: str) -> None:
        function = held.get(name)
        if type(function) is FunctionType and function is not FUNCTIONS[name]:
            self.functions[function] = name
            self._homes.add((path, name))


_search = _Search()
_here = threading.local()  # `is_hidden`: calls of other libraries' functions are a part of the one under way


def begin(watcher: Watcher) -> None:
    """Have a watcher told of the calls. What was defined since in the modules of before is only found by `look`."""
    global _watchers
    with _lock:
        _watchers = *_watchers, weakref.ref(watcher)
        functions = _interface()
        for name in [*functions]:
            if name not in _wrapped:
                original = functions[name]
                wrapper = _wrapper(name, original)
                _wrapped[name] = original, wrapper
                functions[name] = wrapper
        if _search.is_current:
            _change()
        else:
            look()


def look() -> None:
    """Look for what has been imported or defined since the last time. In a large program that takes a while."""
    with _lock:
        _search.look()
        if _watchers:
            _change()


def _change() -> None:
    """Have all that is known tell of its calls."""
    for function, name in [*_search.functions.items()]:
        if function not in _swapped:
            _swap(name, function)
    for cls, describe in [*_search.classes.items()]:
        if "apply" not in vars(cls):
            _classes.append(cls)
            cls.apply = staticmethod(_apply(cls.__name__, cls.apply, describe))


def end(watcher: Watcher) -> None:
    """Have it told no more; with the last one the functions and classes are again what they were."""
    global _watchers
    with _lock:
        _watchers = tuple(known for known in _watchers if known() not in (None, watcher))
        if _watchers:
            return
        functions = _interface()
        for name, (original, wrapper) in _wrapped.items():
            if functions.get(name) is wrapper:
                del functions[name]
                if functions.get(name) is not original:  # it was an override itself
                    functions[name] = original
        for function, (code, ours, is_ours) in _swapped.items():
            if function.__code__ is ours:  # else another tool has swapped it meanwhile
                function.__code__ = code
            if is_ours:
                vars(function).pop("__signature__", None)
        while _classes:
            del _classes.pop().apply
        _wrapped.clear()
        _swapped.clear()


def _interface() -> Any:
    return getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})


def _wrapper(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask", args[4] if len(args) > 4 else None)
        # Flash attention takes the padding out, and packs the rest, which is not the shape that the model works with.
        hides = isinstance(mask, Tensor) and mask.ndim == 2
        return _observed(
            name, function, args, kwargs, lambda result: attention_interface(result, *args, **kwargs), hides
        )

    return call


def _swap(name: str, function: FunctionType) -> None:
    """Swap the function's code for one that tells of its calls. The function object stays the same."""
    code, describe, signature = function.__code__, FUNCTIONS[name], inspect.signature(function)
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    original.__kwdefaults__ = function.__kwdefaults__

    def call(args: Any, kwargs: Any) -> Any:
        def described(result: Any) -> FusedCall:
            return describe(result, **_by_name(signature, args, kwargs))

        return _observed(name, original, args, kwargs, described)

    ours = _code_that_calls(call, code)
    is_ours = "__signature__" not in vars(function)
    if is_ours:  # transformers asks which arguments there are
        function.__signature__ = signature  # type: ignore[attr-defined]
    function.__code__ = ours
    _swapped[function] = code, ours, is_ours


def _by_name(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names, those too that a function takes as `**kwargs`."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def _below(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _below(one)


def _describes(cls: Any) -> Callable[..., FusedCall | SampledCall] | None:
    """What says what the calls of an autograd Function are, of their output and arguments; None: it is not known."""
    if _is_deformable(cls):
        return ms_deform_attn_forward
    function = FUNCTIONS.get(_AROUND.get(cls.__name__, ""))
    if function is None:
        return None
    signature = inspect.signature(partial(cls.forward, None))  # without the context
    return lambda result, *args: function(result, **_by_name(signature, args, {}))


def _is_deformable(cls: Any) -> bool:
    """Whether its forward takes a context and the kernel's arguments; mmcv puts "value_" before some of the names."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)  # quicker than a signature, at each start
    names = () if code is None else code.co_varnames[1 : min(code.co_argcount, 1 + len(_DEFORMABLE))]
    return [name if name == "value" else name.removeprefix("value_") for name in names] == [*_DEFORMABLE]


def _apply(name: str, apply: Callable[..., Any], describe: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _observed(name, apply, args, kwargs, lambda result: describe(result, *args, **kwargs))

    return call


_PLACE = 0.125  # a constant that is replaced by the function to call


def _any_arguments(*args: Any, **kwargs: Any) -> Any:
    call: Any = 0.125
    return call(args, kwargs)


def _code_that_calls(call: Callable[[Any, Any], Any], code: CodeType) -> CodeType:
    """Code that hands its arguments to a function, for a function that has this code now."""
    template = _any_arguments.__code__
    constants = tuple(call if constant == _PLACE else constant for constant in template.co_consts)
    names = {"co_name": code.co_name, "co_qualname": code.co_qualname, "co_freevars": code.co_freevars}
    return template.replace(co_consts=constants, **names)  # type: ignore[arg-type]


def _observed(
    name: str,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    describe: Callable[[Any], FusedCall | SampledCall],
    hides: bool = False,
) -> Any:
    """Run a function, and tell of its call."""
    is_hidden = getattr(_here, "is_hidden", False)
    if is_hidden:
        return function(*args, **kwargs)
    watchers = [(one, one.seen_calls()) for known in _watchers if (one := known()) is not None]
    _here.is_hidden = hides
    try:
        result = function(*args, **kwargs)
    finally:
        _here.is_hidden = False
    for watcher, count in watchers:
        if count is not None and watcher.seen_calls() == count:
            watcher.see_function(name, lambda: describe(result))
    return result

"""Find the Python functions behind methods, wrappers, classes and modules, and which of them have a local."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from .. import opcodes
from ..errors import RewriteError
from ..rewrite import At, assigns, local_names
from .module_paths import is_module_class, module_classes

_WITH_FUNC = (
    functools.partial,
    functools.partialmethod,
    functools.cached_property,
    functools.singledispatchmethod,  # the default implementation
)


def functions_behind(target: Any) -> Iterator[FunctionType]:
    """The Python functions that an object runs, from the outermost wrapper to the wrapped function."""
    if isinstance(target, type):
        if not is_module_class(target):
            return iter(())
        target = inspect.getattr_static(target, "forward")
    return (layer for layer in layers(target) if type(layer) is FunctionType)


def layers(target: Any) -> Iterator[Any]:
    """An object and what it wraps, layer by layer, the outermost first."""
    seen: dict[int, Any] = {}  # with the objects, so that none dies and another one gets its id
    waiting = [target]
    while waiting:
        layer = waiting.pop(0)
        if layer is None or id(layer) in seen:
            continue
        seen[id(layer)] = layer
        yield layer
        if isinstance(layer, property):
            waiting.extend([layer.fdel, layer.fset, layer.fget])
        elif isinstance(layer, (staticmethod, classmethod, types.MethodType)):
            waiting.append(layer.__func__)
        else:
            if isinstance(layer, _WITH_FUNC):
                waiting.append(layer.func)
            # getattr_static first: a `__getattr__` may answer to any name, or raise anything.
            if inspect.getattr_static(layer, "__wrapped__", None) is not None:
                waiting.append(getattr(layer, "__wrapped__", None))


def bound_method(target: Any) -> types.MethodType | None:
    """The method of an object that this is; it may be behind a partial, or a wrapper such as torch.compile's."""
    return next((layer for layer in layers(target) if isinstance(layer, types.MethodType)), None)


def owner_parameter(function: FunctionType) -> str | None:
    """The parameter that holds the object whose method is called: the first."""
    code = function.__code__
    return code.co_varnames[0] if code.co_argcount else None


def members(cls: type, ends: tuple[type, ...]) -> dict[str, Any]:
    """What a class and its bases define, nested classes excepted; the bases in `ends` are left out."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base not in ends:
            for name, member in vars(base).items():
                if not isinstance(member, type):
                    found.setdefault(name, member)
    return found


def methods_of_module(cls: type) -> dict[str, list[FunctionType]]:
    """The methods that calling a module may run, with the functions behind each that get the module first.

    They are those of the class that defines `forward`, and of the classes below it. A class without a `forward` of its
    own has none: it is a container, which nobody calls.
    """
    mro = cls.__mro__
    above = next((i for i, base in enumerate(mro) if "forward" in vars(base)), -1) + 1
    if not above or mro[above - 1] in module_classes():
        return {}
    return {
        name: [function for function in functions_behind(member) if owner_parameter(function)]
        for name, member in members(cls, mro[above:]).items()
        if is_called(name) and not isinstance(member, (staticmethod, classmethod))
    }


def is_called(attribute: str) -> bool:
    """Whether calling an object may run this attribute of its class: not `__init__` and the like."""
    return attribute == "__call__" or not attribute.startswith("__")


def forward_of_instance(module: Any, methods: dict[str, list[FunctionType]]) -> list[FunctionType]:
    """The functions behind a `forward` that was put on the instance, as far as they get the module first."""
    forward = vars(module)["forward"]
    known = {function for functions in methods.values() for function in functions}
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        known.update(functions_behind(forward))
    behind = [function for function in functions_behind(forward) if function in known and owner_parameter(function)]
    return behind or methods.get("forward", [])


def definer_of_forward(cls: type) -> type:
    """The class whose `forward` the objects of a module class run."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def has_local(function: FunctionType, name: str, at: At) -> bool:
    """Whether capturing the local from the function can record anything: with at="assign" something must assign it."""
    code = function.__code__
    if name not in local_names(code) or at == "return":
        return name in local_names(code)
    try:
        return opcodes.why_unsupported() is not None or assigns(code, name)
    except RewriteError:
        return True  # only those who want it rewritten need to hear of the refusal


def methods_with(methods: dict[str, list[FunctionType]], name: str, at: At) -> dict[str, FunctionType]:
    """The methods that have the local, each with the innermost function that has it; `forward` alone if it does."""
    holders = {}
    for method, functions in methods.items():
        for function in reversed(functions):
            if has_local(function, name, at):
                holders[method] = function
                break
    return {"forward": holders["forward"]} if "forward" in holders else holders

"""What users are told when a local cannot be captured from what they named, and what to do instead."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..errors import UnknownLocalError, did_you_mean, few
from ..rewrite import At, assigned_lines, local_names
from ..store import Channel
from .module_paths import module_classes
from .swapped_code import place_of
from .unwrapping import definer_of_forward, functions_behind, has_local, is_called, members

_LISTED = 60
"""How many functions a message lists."""
_KEYS, _REASONS = 4, 3
"""How many keys without values a message names, and how many of their functions."""

MethodsByClass = dict[type, dict[str, list[FunctionType]]]
"""The functions behind each method of each class."""


def no_target(target: Any, names: tuple[str, ...]) -> str:
    """Nothing can be captured from an object that is not called itself, or that has no Python code."""
    beginning = "capture takes an nn.Module, a function, method or class, 'package.module:name', or a list of these"
    cls, is_module = type(target), isinstance(target, ModuleType)
    # Of a module without what it imports, and without its classes, whose names a user would pass.
    attributes = vars(target) if is_module else members(cls, (object,))
    functions = {
        name: function
        for name, member in attributes.items()
        for function in functions_behind(member)
        if not (is_module and (isinstance(member, type) or function.__module__ != target.__name__))
    }
    them = " and ".join(map(repr, names))
    holders = [name for name, function in functions.items() if set(names) <= set(local_names(function.__code__))]
    if holders:
        first = " or ".join(f".{name}" for name in holders[:3])
        if is_module:
            return f"{beginning}; {target.__name__} is a module. {them} is a local of {first}: pass that function of it"
        return (
            f"{beginning}; {_short(target)} is an object with methods. {them} is a local of {first}: pass that method "
            f"of it, for this object's calls, or its class {cls.__qualname__}, for all objects'"
        )
    if not functions:
        return f"{beginning}; {_short(target)} has no Python code to capture from"
    what = f"function of the module {target.__name__}" if is_module else f"method of {_short(target)}"
    hint = _close(functions.values(), *names) or "."
    inside = next(filter(None, (_inside(function, names) for function in functions.values())), "")
    return f"{beginning}; no {what} has a local {them}{hint}{inside}"


def no_code(target: Any) -> str:
    """An object without Python code cannot be decorated."""
    if isinstance(target, type):
        return (
            f"get_local decorates functions, and {target.__qualname__} is a class that is no nn.Module: "
            "put the decorator above the method that has the local"
        )
    kind = "a builtin or compiled function" if inspect.isroutine(target) else f"of type {type(target).__qualname__}"
    return f"get_local needs a function with Python code, and {_short(target)} is {kind}"


def no_forward(cls: type, names: tuple[str, ...]) -> str:
    """A module class without a `forward` cannot be decorated."""
    return (
        f"get_local takes the forward of an nn.Module class, and {cls.__qualname__} defines none."
        f"{_methods_to_decorate(cls, names)}"
    )


def why_shared(target: Any, names: tuple[str, ...]) -> str | None:
    """The warning for a decorated class that inherits its `forward`; None where it has its own."""
    if not isinstance(target, type) or "forward" in vars(target):
        return None
    own, base = target.__qualname__, definer_of_forward(target).__qualname__
    return (
        f"{own} inherits its forward, so get_local takes {base}.forward, which all {base} objects run: they are all "
        f"recorded. Decorate {base} to say so, or record {own} objects alone: capture({own}, "
        f"{', '.join(map(repr, names))})."
    )


def no_owner(function: FunctionType, names: tuple[str, ...], rebound: str | None) -> str:
    """One object's calls are wanted, and the function does not say whose call returns; `rebound` is its parameter."""
    reason = (
        "has no parameter for the object whose method is called"
        if rebound is None
        else f"binds its parameter {rebound!r} anew or deletes it (at='assign' looks at it before)"
    )
    return (
        f"{place_of(function)} {reason}, so nothing tells whose call returns. Capture from the function itself, "
        f"which means all objects' calls: capture({function.__qualname__}, {', '.join(map(repr, names))})."
    )


def never_assigned(function: FunctionType, name: str) -> str:
    """With at="assign" the function would record nothing."""
    code = function.__code__
    stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    if name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]:
        reason = "it is a parameter"
    elif name in code.co_freevars:
        reason = "it is a variable of an outer function"
    else:
        reason = "only a function inside it may do so"
    return (
        f"{place_of(function)} itself never assigns to {name!r}: {reason}. "
        "So at='assign' would record nothing; at='return' has its value."
    )


def unknown_local(target: Any, function: FunctionType, names: tuple[str, ...]) -> str:
    """The function has no such local."""
    code = function.__code__
    known = local_names(code)
    missing = [name for name in names if name not in known]
    message = f"{place_of(function)} has no local {' and no local '.join(map(repr, missing))}"
    hint = _close([function], *missing)
    if hint:
        message += hint
    elif any(name in code.co_names for name in missing):
        message += "; the name is a global or an attribute there: assign it to a local first."
    else:
        message += "."
    message += f" It has: {', '.join(known)}." if known else " It has no locals at all."
    if isinstance(target, type):
        message += _methods_to_decorate(target, names)
    for inner in _enclosed(function):
        if set(names) <= set(local_names(inner.__code__)):
            message += (
                f" {place_of(inner)}, which it uses, has it. If a decorator made {function.__qualname__} of that, "
                "put @get_local beneath the decorator, or functools.wraps into it."
            )
    return message + _inside(function, names)


def never_reached(missing: dict[str, tuple[str, Channel]], keys: int) -> str:
    """Nothing was recorded under some of the keys; `missing` has their variables and channels."""
    reasons = list(dict.fromkeys(_what_did_not_happen(*source) for source in missing.values()))
    if len(reasons) > _REASONS:
        reasons[_REASONS:] = [f"the same goes for {len(reasons) - _REASONS} more functions"]
    if any(_is_bypassed(channel) for _, channel in missing.values()):
        way_out = (
            "In eval mode torch runs its own attention and encoder layers natively, without the Python code inside: "
            "visualizer.attention(model) has their weights all the same, and after "
            "torch.backends.mha.set_fastpath_enabled(False) that code runs."
        )
    elif len(missing) == keys:
        way_out = "Call the model inside the `with`; what runs in other processes is not seen."
    else:
        way_out = "The usual causes: a branch that the model did not take, or a part that it did not call."
    what = f"nothing was recorded under {len(missing)} of {keys} keys ({few([*missing], _KEYS)})"
    return f"{what}: {'; '.join(reasons)}. {way_out}"


def _what_did_not_happen(variable: str, channel: Channel) -> str:
    lines = assigned_lines(channel.code, variable) if channel.at == "assign" and channel.code is not None else ()
    end = f"came to line {' or '.join(map(str, lines))}, which assigns {variable!r}" if lines else "returned"
    return f"no call of {channel.place()}{'' if channel.owner is None else ' on these objects'} {end}"


def _is_bypassed(channel: Channel) -> bool:
    """Whether torch may run something native in place of a function."""
    torch, code = sys.modules.get("torch"), channel.code
    if torch is None or code is None:
        return False
    *_, package, name = code.co_filename.replace("\\", "/").rpartition("/torch/nn/")
    is_torchs = package and name in ("functional.py", "modules/activation.py", "modules/transformer.py")
    return bool(is_torchs and torch.backends.mha.get_fastpath_enabled())


def nowhere_in(module: Any) -> str:
    """The beginning of a sentence: nothing in a model has ..."""
    torch = sys.modules["torch"]
    if isinstance(module, torch.jit.ScriptModule):
        return f"{type(module).__qualname__} is scripted: torch runs it without Python, and nothing in it has"
    count = sum(1 for _ in module.modules()) - 1
    return f"no submodule of {type(module).__qualname__} ({count}, and the model itself) has"


def nothing_has(name: str, at: At, beginning: str, classes: MethodsByClass) -> ValueError | UnknownLocalError:
    """The error for a local that no function has, with the locals that exist: `forward` first, torch's own last."""
    everything = (function for methods in classes.values() for functions in methods.values() for function in functions)
    holder = next((function for function in everything if name in local_names(function.__code__)), None)
    if holder is not None and at == "assign":
        return ValueError(never_assigned(holder, name))
    locals_by_method: dict[str, tuple[str, ...]] = {}
    triples = [(cls, method, functions) for cls, methods in classes.items() for method, functions in methods.items()]
    triples.sort(key=lambda triple: (triple[1] != "forward", triple[0].__module__.startswith("torch.")))
    for cls, method, functions in triples:
        known = tuple(name for function in functions[-1:] for name in local_names(function.__code__) if name != "self")
        if known:
            locals_by_method[f"{cls.__qualname__}.{method}"] = known
    listing = [f"\n  {method}: {', '.join(known)}" for method, known in locals_by_method.items()]
    if len(listing) > _LISTED:
        listing[_LISTED:] = [f"\n  and {len(listing) - _LISTED} more functions"]
    hint = _close((function for _, _, functions in triples for function in functions[-1:]), name) or "."
    elsewhere = _elsewhere(name, at, classes)
    if not elsewhere:
        inner = (_inside(function, (name,)) for _, _, functions in triples for function in functions[-1:])
        elsewhere = next(filter(None, inner), "")
    existing = f" The locals that exist:{''.join(listing)}" if listing else ""
    return UnknownLocalError(f"{beginning} a local {name!r}{hint}{elsewhere}{existing}")


def _elsewhere(name: str, at: At, classes: Iterable[type]) -> str:
    """A sentence that names what in the classes has the local, though calling their objects does not run it."""
    holders = dict.fromkeys(
        f"{base.__qualname__}.{attribute}"
        for cls in classes
        for base in cls.__mro__
        if base not in (object, *module_classes())
        for attribute, member in vars(base).items()
        if is_called(attribute) and not isinstance(member, type)
        if any(has_local(function, name, at) for function in functions_behind(member))
    )
    places = list(holders)[:5]
    calls = " or ".join(f"capture({place}, {name!r})" for place in places)
    return f" {' and '.join(places)} {'has' if len(places) == 1 else 'have'} it: {calls}." if places else ""


def _methods_to_decorate(cls: type, names: tuple[str, ...]) -> str:
    """A sentence that names the methods of a class that have the locals."""
    methods = [
        method.__qualname__
        for method in vars(cls).values()
        if isinstance(method, FunctionType) and set(names) <= set(local_names(method.__code__))
    ]
    return f" Decorate {' or '.join(methods)}, which has it." if methods else ""


def _enclosed(function: FunctionType) -> Iterator[FunctionType]:
    """The functions among the variables of outer functions that a function uses."""
    for cell in function.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not bound yet
            continue
        yield from functions_behind(content)


def _inside(function: FunctionType, names: tuple[str, ...]) -> str:
    """A sentence that names what is defined inside a function and has the locals, and how to reach it."""
    inner = [code for code in _codes_inside(function.__code__) if set(names) <= set(local_names(code))]
    if not inner:
        return ""
    # A def first: the variables of an expression cannot be captured where they are.
    inner.sort(key=lambda code: code.co_name.startswith("<"))
    outer, first = function.__qualname__, inner[0]
    has = f"which has {' and '.join(map(repr, names))}"
    if first.co_name.startswith("<"):
        what = _EXPRESSIONS.get(first.co_name, first.co_name)
        way_out = "write it as a def" if first.co_name == "<lambda>" else "write it as a loop"
        return f" {outer} has {what} in line {first.co_firstlineno}, {has}: to capture it, {way_out}."
    others = [
        f"{code.co_name} in line {code.co_firstlineno}" for code in inner[1:3] if not code.co_name.startswith("<")
    ]
    too = f" (so has {' and '.join(others)})" if others else ""
    return (
        f" {outer} defines {first.co_name} in line {first.co_firstlineno}, {has}{too}: put "
        f"@get_local({', '.join(map(repr, names))}) above that def, or pass the inner function itself to capture where "
        f"you hold it, as where {outer} returns it."
    )


_EXPRESSIONS = {
    "<lambda>": "a lambda",
    "<listcomp>": "a list comprehension",
    "<setcomp>": "a set comprehension",
    "<dictcomp>": "a dict comprehension",
    "<genexpr>": "a generator expression",
}


def _close(functions: Iterable[FunctionType], *names: str) -> str:
    """The close matches of names that neither the functions nor what is defined inside them have, for a message."""
    codes = (inner for function in functions for inner in (function.__code__, *_codes_inside(function.__code__)))
    known = dict.fromkeys(local for code in codes for local in local_names(code))
    return did_you_mean(known, *(name for name in names if name not in known))


def _codes_inside(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes_inside(constant)


def _short(target: Any) -> str:
    text = repr(target)
    return text if len(text) <= 80 else f"an instance of {type(target).__qualname__}"

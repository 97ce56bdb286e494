"""What the code of a model reads besides its arguments and its modules: globals, what functions close over, chance."""

from __future__ import annotations

import random
import sys
import threading
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SIMPLE = frozenset(
    (
        *(bool, int, float, complex, str, bytes, range, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    )
)
"""Classes of objects that are what they are equal to."""
_CALLED = ("forward", "__call__", "__getattr__")
_MOST_SETTINGS, _MOST_FUNCTIONS, _DEPTH = 100, 4096, 2
_FOREIGN = {"builtins"} | sys.stdlib_module_names | {"torch", "numpy", "visualizer"}
"""Packages whose functions do the same each time, but for those of chance."""
_NAMESPACES = (SimpleNamespace, Namespace, threading.local)
_CONTAINERS = (list, dict, set, tuple, deque)


class Surroundings:
    """The globals and closures that a forward pass may read, by the names in the code that it may run.

    It holds no object of the user, which may hold the model.

    Args:
        classes: of the modules, whose methods are found by their names.
        functions: others that run, and whatever else modules hold; functions and objects with methods are found in it.
    """

    def __init__(self, classes: Iterable[type], functions: Sequence[Any]) -> None:
        self._spaces: dict[int, tuple[weakref.ref[Any], dict[str, None]]] = {}
        self._closures: list[weakref.ref[FunctionType]] = []
        owners = [one for one in (*classes, *map(_owner_of, functions)) if one is not None]
        waiting = [found for one in functions for found in _functions(one)]
        waiting += [found for owner in owners for name in _CALLED for found in _functions(vars(owner).get(name))]
        seen, known = set[int](), set[str]()
        while waiting and len(seen) < _MOST_FUNCTIONS:
            function = waiting.pop()
            if id(function) in seen or _package(function) in _FOREIGN:
                continue
            seen.add(id(function))
            names = {*_names(function.__code__)}
            held = self._add(function, names)
            if function.__closure__:
                self._closures.append(weakref.ref(function))
                held += map(held_in, function.__closure__)
            held += [value for owner in owners for value in self._add(owner, names - known)]
            known |= names
            old = {*map(id, owners)}
            fresh = {id(owner): owner for owner in map(_owner_of, held) if owner is not None and id(owner) not in old}
            owners += fresh.values()
            held += [value for owner in fresh.values() for value in self._add(owner, known)]
            waiting += [found for value in held for found in _functions(value)]
        values = self.values()
        places = {id(value): place for place, value in enumerate(values) if has_settings(value)}
        self._with_settings = [*places.values()]
        self.is_unsteady = any(map(is_unsteady, values))
        """Whether they read what gives another answer each time."""

    def _add(self, owner: Any, names: set[str]) -> list[Any]:
        """Look at some names of a module, of a class or of a function's globals; what they stand for now."""
        space = _space_of(owner)
        found = {name: space[name] for name in names & space.keys()}
        number = id(space) if type(owner) is FunctionType else id(owner)
        _, known = self._spaces.setdefault(number, (weakref.ref(owner), {}))
        known.update(dict.fromkeys(name for name, one in found.items() if not isinstance(one, (ModuleType, type))))
        return [*found.values()]

    def values(self) -> list[Any]:
        """What the functions would read now."""
        read: list[Any] = []
        for known, names in self._spaces.values():
            owner = known()
            space: Mapping[str, Any] = {} if owner is None else _space_of(owner)
            read += map(space.get, names)
        for known in self._closures:
            function = known()
            read += () if function is None else map(held_in, function.__closure__ or ())
        return read

    def settings(self, values: list[Any]) -> Iterator[list[Any]]:
        """What those among the values hold that had settings at first."""
        return (settings(values[place]) for place in self._with_settings if place < len(values))


def held_in(cell: Any) -> Any:
    """What a function closes over; None for what is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def has_settings(value: Any) -> bool:
    """Whether an attribute may hold settings: a list, a dict, an object such as a configuration of transformers."""
    if isinstance(value, (*_CONTAINERS, *_NAMESPACES)):
        return True
    others = (nn.Module, Tensor, type, Enum)
    return _attributes(value) is not None and not isinstance(value, others) and _package(type(value)) not in _FOREIGN


def settings(value: Any, depth: int = _DEPTH) -> list[Any]:
    """The numbers, texts and the like that an attribute holds, and what it holds; a long list has something else."""
    if isinstance(value, _CONTAINERS):
        held: Any = () if len(value) > _MOST_SETTINGS else value.values() if isinstance(value, dict) else value
    else:
        held = (_attributes(value) or {}).values()
    found = []
    for one in [*held]:
        if type(one) in SIMPLE or isinstance(one, Enum):
            found.append(one)
        elif depth > 1 and type(one) is not FunctionType and has_settings(one):
            found += settings(one, depth - 1)
    return found


def _attributes(value: Any) -> dict[str, Any] | None:
    """What an object holds, if it has attributes of its own; no code of its class runs."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found


def is_unsteady(value: Any) -> bool:
    """Whether something gives another answer each time: an iterator, a generator of random numbers."""
    if isinstance(value, (MethodType, BuiltinMethodType)):
        value = value.__self__
    kinds = {random.Random, *(getattr(sys.modules.get("numpy.random"), name, None) for name in _OF_CHANCE)}
    is_own = value is not getattr(random, "_inst", None)  # whose numbers `chance` tells of
    return hasattr(type(value), "__next__") or (is_own and not kinds.isdisjoint(type(value).__mro__))


_OF_CHANCE = ("Generator", "RandomState")


def chance() -> Any:
    """Where the random numbers of Python and numpy are; the same as long as nobody takes one."""
    state, numbers = random.getstate()[1], getattr(sys.modules.get("numpy.random"), "get_state", None)
    own = numbers(legacy=False)["state"] if numbers is not None else {}
    return state[0], state[-1], str(own.get("key", ())[:1]), own.get("pos")


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind something that can be called."""
    for _ in range(8):
        if isinstance(value, FunctionType):
            yield value
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, partial):
            value = value.func
        elif isinstance(value, (MethodType, staticmethod, classmethod)):
            value = value.__func__
        elif not isinstance(value, type) and "__wrapped__" in (attributes := _attributes(value) or {}):
            value = attributes["__wrapped__"]
        else:
            return


def _owner_of(value: Any) -> Any:
    """What has the attributes that code asks of something: a module, a class; None for what is of another package."""
    owner = value if isinstance(value, (ModuleType, type)) else type(value)
    return None if owner is None or _package(owner) in _FOREIGN else owner


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _space_of(owner: Any) -> Mapping[str, Any]:
    return owner.__globals__ if type(owner) is FunctionType else vars(owner)


def _package(value: Any) -> str:
    """The package of a module, a class or a function."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return str(name).partition(".")[0]

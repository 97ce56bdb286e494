"""The settings in what modules have and code reads: numbers and texts in lists, in dicts, in configurations."""

from __future__ import annotations

import sys
import threading
import weakref
from argparse import Namespace
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from enum import Enum
from itertools import chain
from numbers import Number
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SIMPLE = frozenset(
    (
        *(bool, int, float, complex, str, bytes, range, type(None), type(...)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    )
)
"""Classes of objects that are what they are equal to."""
FOREIGN = {"builtins"} | sys.stdlib_module_names | {"torch", "numpy", "visualizer"}
"""Packages whose functions do the same each time, but for those of chance and of clocks."""
_MOST, _DEPTH = 100, 2
_attribute = object.__getattribute__
_CONTAINERS = (list, dict, set, tuple, deque)
_CHANGING = (threading.local, ContextVar)
"""Of the same object, what it holds may be in another place."""
_HOLDERS = (*_CONTAINERS, *_CHANGING, SimpleNamespace, Namespace)
_NO_HOLDERS = (nn.Module, Tensor, type, Enum)


def has_settings(value: Any) -> bool:
    """Whether an attribute may hold settings: a list, a dict, an object such as a configuration of transformers."""
    if isinstance(value, _HOLDERS):
        return True
    if attributes(value) is None or isinstance(value, _NO_HOLDERS):
        return False
    return package_of(type(value)) not in FOREIGN


def settings(value: Any, depth: int = _DEPTH) -> list[Any]:
    """The numbers, texts and the like that an attribute holds, and what it holds; a long list has something else."""
    held: Any = _space(value)
    if isinstance(value, _CONTAINERS) and len(value) > _MOST:
        return []
    found = []
    for one in [*(held.values() if isinstance(held, dict) else held)]:
        if type(one) in SIMPLE or isinstance(one, Enum):
            found.append(one)
        elif depth > 1 and _is_looked_into(one):
            found += settings(one, depth - 1)
    return [*found, *held] if type(value) is ContextVar else found


class Settings:
    """The settings of some of a list of objects, to be compared with those of a later list of the same.

    It holds no object but the settings: what else there is may hold the model.

    Args:
        held: the objects.
        places: of those with settings, in the list.
    """

    def __init__(self, held: list[Any], places: Iterable[int]) -> None:
        self._places = [*places]
        self._numbers = [*map(id, self._of(held))]
        self._levels = _levels(held, self._places)  # these keep them, so that no other has their number

    def are_same(self, held: list[Any]) -> bool:
        """Whether they are as they were, of the same objects."""
        inner: list[Any] | None = held
        for level in self._levels:
            inner = level.look(inner or [])
            if inner is None:
                return self._are_equal(held)
        return True

    def _are_equal(self, held: list[Any]) -> bool:
        """As `are_same`, also where something moved that is no setting, such as a tensor in a list."""
        if [*map(id, self._of(held))] != self._numbers:
            return False
        self._levels = _levels(held, self._places)
        return True

    def _of(self, held: list[Any]) -> list[Any]:
        return [one for place in self._places for one in settings(held[place])]


class Objects:
    """Some objects, to be compared with those of a later list by what they are. None is held but what holds no other.

    Args:
        held: the objects.
    """

    def __init__(self, held: list[Any]) -> None:
        self._addresses = _addresses(held)
        # As long as an object is there, no other has its address. Of most others it is told when they go.
        self._kept = [*filter(_is_simple, held)]
        self._gone = list[Any]()
        self._known = [*_references({id(one): one for one in held}.values(), self._gone)]

    def are(self, held: list[Any]) -> bool:
        """Whether these are the same objects."""
        return not self._gone and _addresses(held) == self._addresses


class _Level:
    """What some objects hold that have settings, to be compared with what they hold later.

    Args:
        held: a list with those objects.
        places: where they are in it.
    """

    def __init__(self, held: list[Any], places: Iterable[int]) -> None:
        places = [place for place in places if not _is_simple(held[place])]
        lists = [place for place in places if isinstance(held[place], _CONTAINERS)]
        self._long = [place for place in lists if len(held[place]) > _MOST]  # they are not looked into
        self._lists = [place for place in lists if place not in self._long]
        others = [place for place in places if place not in lists]
        self._changing = [place for place in others if isinstance(held[place], _CHANGING)]
        self._others = [place for place in others if place not in self._changing]
        self._lengths, inner = self._look(held)
        self._inner = Objects(inner)

    def look(self, held: list[Any]) -> list[Any] | None:
        """All that they hold now; None if that is not what they held."""
        try:
            lengths, inner = self._look(held)
        except (AttributeError, TypeError):  # there is something else now
            return None
        return inner if lengths == self._lengths and self._inner.are(inner) else None

    def _look(self, held: list[Any]) -> tuple[list[int], list[Any]]:
        spaces = [held[place] for place in self._lists]
        spaces += [_attribute(held[place], "__dict__") for place in self._others]
        spaces += [_space(held[place]) for place in self._changing]
        lengths = [*map(len, spaces), *[len(held[place]) for place in self._long]]
        inner = chain.from_iterable([space.values() if isinstance(space, dict) else space for space in spaces])
        return lengths, [*inner]


def _levels(held: list[Any], places: Iterable[int]) -> list[_Level]:
    """What the objects at some places hold, and what that holds, as far as `settings` looks."""
    levels = []
    for _ in range(_DEPTH):
        levels.append(_Level(held, places))
        held = levels[-1].look(held) or []
        places = [place for place, one in enumerate(held) if _is_looked_into(one)]
    return levels


def _is_simple(value: Any) -> bool:
    """Whether an object is what it is equal to, and will be: a number, a tuple of numbers."""
    if type(value) in SIMPLE or isinstance(value, Number):
        return True
    if type(value) is slice:
        value = value.start, value.stop, value.step
    return type(value) in (tuple, frozenset) and all(map(_is_simple, value))


def _is_looked_into(value: Any) -> bool:
    return type(value) is not FunctionType and has_settings(value)


def _space(value: Any) -> Collection[Any]:
    """What holds the settings of an object."""
    if isinstance(value, _CONTAINERS):
        return value
    if type(value) is ContextVar:
        return (value.get(...),)
    return attributes(value) or {}


def attributes(value: Any) -> dict[str, Any] | None:
    """What an object holds, if it has attributes of its own; no code of its class runs."""
    ask = threading.local.__getattribute__ if isinstance(value, threading.local) else _attribute
    try:
        found: dict[str, Any] = ask(value, "__dict__")
    except AttributeError:
        return None
    return found


def package_of(value: Any) -> str:
    """The package of a module, a class or a function."""
    name = value.__name__ if isinstance(value, ModuleType) else value.__module__
    return str(name).partition(".")[0]


def _addresses(held: list[Any]) -> bytes:
    """Where objects are: the numbers that `id` gives, in an eighth of the time."""
    return np.fromiter(held, object, len(held)).tobytes()


def _references(objects: Iterable[Any], gone: list[Any]) -> Iterator[weakref.ref[Any]]:
    """References to those that can have one; where an object goes, it is added to a list."""
    for one in objects:
        with suppress(TypeError):
            yield weakref.ref(one, gone.append)

"""What a model is given and what its modules are, so that two passes can be compared."""

from __future__ import annotations

import itertools
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from operator import itemgetter
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..instrument import named_modules
from .hooks import Hook
from .modules import cannot_attend, has_global_hooks, is_compiled, works_by_token
from .settings import SIMPLE, Objects, Settings, has_settings
from .surroundings import Surroundings, chance, held_in, is_unsteady

_VALUES = (int, float, complex, str, bytes, np.generic, Enum, type)
"""Bases of classes whose objects are what they are equal to."""
_MOST_OBJECTS, _MOST_NUMBERS = 200, 4096
_BASES = frozenset(nn.Module.__mro__)
_OWN = frozenset(vars(nn.Module()))
_PARTS = itemgetter("_modules")


class Forms:
    """What arguments are, but for the lengths and the numbers of tensors."""

    def __init__(self) -> None:
        self.sizes = list[int]()
        """The lengths of the tensors up to now."""
        self._known = dict[int, int]()  # the tensors and objects up to now, which tell whether two are the same
        self._objects = 0

    def of(self, value: Any) -> Any:
        """What an argument is. Two have the same form if the code may take them for the same."""
        kind = type(value)
        if kind in SIMPLE:
            return kind, value
        if isinstance(value, Tensor):
            dtype, is_nested = value.dtype, value.is_nested
            self.sizes.extend(() if is_nested else value.shape)
            number = self._known.setdefault(id(value), len(self._known))
            return kind, is_nested, dtype.is_floating_point or dtype, value.ndim, number
        if isinstance(value, _VALUES):
            return kind, value
        if isinstance(value, tuple):
            return kind, *map(self.of, value)
        if id(value) in self._known:
            return kind, self._known[id(value)]
        self._known[id(value)] = len(self._known)
        if isinstance(value, list):
            return kind, *map(self.of, value)
        if isinstance(value, dict):
            return kind, *((str(name), self.of(one)) for name, one in value.items())
        self._objects += 1
        if self._objects <= _MOST_OBJECTS:
            with suppress(Exception):  # of the code of its class
                return kind, self._of_object(value)
        return kind, object()  # it is like no other

    def _of_object(self, value: Any) -> Any:
        """What an object holds; a new object where that is too much, or another one each time."""
        if is_unsteady(value):
            return object()
        if isinstance(value, np.ndarray):
            return object() if value.nbytes > _MOST_NUMBERS else (value.dtype.str, value.shape, value.tobytes())
        if isinstance(value, (set, frozenset)):
            return frozenset(map(self.of, value))
        if isinstance(value, deque):
            return self.of(tuple(value))
        if isinstance(value, FunctionType):
            cells = [held_in(cell) for cell in value.__closure__ or ()]
            return value.__code__, *map(self.of, (value.__defaults__, value.__kwdefaults__, *cells))
        if isinstance(value, MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, partial):
            return self.of((value.func, value.args, value.keywords))
        if hasattr(value, "get_seq_length"):  # a cache of keys, whose lengths are those of what attends
            return None
        return tuple((name, self.of(one)) for name, one in _attributes(value))


class Given:
    """What a call was given, to be compared with what others are; none of it is held.

    `fits` says what the comparison of `Forms` says, without making one: all values are taken into one list, those that
    hold others before what they hold, and of that list all is compared by its kinds.

    Args:
        args, kwargs: of the call.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.form = Forms().of((args, kwargs))
        """See `Forms.of`."""
        values: list[Any] = [args, kwargs]
        forms = [*self.form[1:]]
        self._holders: list[tuple[int, type, Any]] = []  # where, of what class, and how many or by what names
        self._simple: list[int] = []
        self._nodes: list[int] = []  # what may be there twice
        self._tensors: list[tuple[int, int, Any]] = []
        self._caches: list[int] = []
        self._is_flat = True
        """Whether nothing is among it that has to be looked into in another way."""
        for place, value in enumerate(values):  # which become more
            kind, form = type(value), forms[place]
            is_known = len(form) == 2 and type(form[1]) is int and kind not in SIMPLE
            if kind in SIMPLE or (isinstance(value, _VALUES) and not isinstance(value, Tensor)):
                self._simple.append(place)
                continue
            if kind is not tuple:
                self._nodes.append(place)
            if isinstance(value, Tensor):
                self._tensors.append((place, form[3], form[2]))
                self._is_flat = self._is_flat and not value.is_nested
            elif kind in (tuple, list) and not is_known:
                self._holders.append((place, kind, len(value)))
                values += value
                forms += form[1:]
            elif kind is dict and not is_known:
                self._holders.append((place, kind, [*map(str, value)]))
                values += value.values()
                forms += [own for _, own in form[1:]]
            elif form == (kind, None):
                self._caches.append(place)
            else:
                self._is_flat = self._is_flat and is_known
        self._kinds = [*map(type, values)]
        self._same = [values[place] for place in self._simple]
        numbers = [id(values[place]) for place in self._nodes]
        self._first = [numbers.index(number) for number in numbers]
        self._different = len({*numbers})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and bool(self.form == other.form)

    __hash__ = None  # type: ignore[assignment]

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is given the same, as `Forms` has it."""
        if not self._is_flat:
            return bool(self.form == Forms().of((args, kwargs)))
        values: Any = [args, kwargs]
        for place, kind, known in self._holders:
            holder = values[place]
            its_kind = type(holder)
            if its_kind is not kind or (len(holder) if kind is not dict else [*map(str, holder)]) != known:
                return False
            values += holder.values() if kind is dict else holder
        if [*map(type, values)] != self._kinds or [values[place] for place in self._simple] != self._same:
            return False
        for place, ndim, dtype in self._tensors:
            one = values[place]
            own = one.dtype
            if one.ndim != ndim or (own.is_floating_point or own) is not dtype or one.is_nested:
                return False
        numbers = [id(values[place]) for place in self._nodes]
        if len({*numbers}) != self._different or [numbers[first] for first in self._first] != numbers:
            return False
        try:
            return all(hasattr(values[place], "get_seq_length") for place in self._caches)
        except Exception:  # of the code of its class
            return False


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


class States:
    """What modules are at one time, besides the numbers in their tensors.

    It holds no object of the user, which may hold the model.

    Args:
        follows_code: whether what the code of the modules reads besides them is part of it.
    """

    def __init__(self, modules: Sequence[nn.Module], follows_code: bool = True) -> None:
        self._watched = [weakref.ref(module) for module in modules]
        parts = {part for module in modules for part in module._modules.values() if part is not None}
        self._parts = [weakref.ref(part) for part in parts.difference(modules)]
        classes = {cls: None for kind in {*map(type, modules)} for cls in kind.__mro__ if cls not in _BASES}
        self._classes = [*map(weakref.ref, classes)]
        own = [value for module in modules for name, value in vars(module).items() if name not in _OWN]
        hooks = [hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())]
        functions = [*own, *(hook for hook in hooks if type(hook) is not Hook)]
        self._around = Surroundings(classes, functions) if follows_code else Surroundings((), ())
        self.are_steady = not (self._around.is_unsteady or any(map(is_unsteady, own)))
        """Whether nothing was found that gives another answer each time."""
        self._chance = chance()
        self._environment = {**_environment()} if follows_code else None
        held, read = self._held() or [], self._around.values() or []
        places = {id(one): place for place, one in enumerate(held)}
        with_settings = {id(one) for one in (*own, *read) if has_settings(one)}
        # Another thread may have put others in their place between these looks: what they have is not followed then.
        self.are_steady &= with_settings <= places.keys()
        followed = [places[number] for number in with_settings if number in places]
        self._objects, self._settings = Objects(held), Settings(held, followed)
        # Modules hold them, so that they are found at once.
        self._leaves = [places[id(part)] for part in parts.difference(modules)]
        self._lengths, inner = self._in_leaves(held)
        self._inner = Objects(inner)
        self._hooks, self._next = self._keys_of_hooks(), RemovableHandle.next_id

    def are_same(self) -> bool:
        """Whether the modules are still that."""
        if RemovableHandle.next_id != self._next:
            if self._keys_of_hooks() != self._hooks:
                return False
            self._next = RemovableHandle.next_id
        return not has_global_hooks() and self.have_same_parts()

    def have_same_parts(self) -> bool:
        """Whether all but the hooks is."""
        held = self._held()
        if held is None or not self._objects.are(held):
            return False
        lengths, inner = self._in_leaves(held)
        if lengths != self._lengths or not self._inner.are(inner):
            return False
        return self._settings.are_same(held) and (self._environment is None or self._environment == _environment())

    def took_chances(self) -> bool:
        """Whether somebody took a random number of Python or numpy since."""
        return bool(self._chance != chance())

    def _held(self) -> list[Any] | None:
        """All that the modules and their classes have, and what their code reads; None where something is gone."""
        modules, classes = _there(self._watched), _there(self._classes)
        if len(modules) < len(self._watched):
            return None
        spaces = [module.__dict__ for module in modules]
        parts = [*map(_PARTS, spaces)]
        # `gc.get_referents` would take half the time; from Python 3.13 on it does not see what objects hold.
        values = [space.values() for space in (*spaces, *parts, *map(vars, classes))]
        held = [*itertools.chain.from_iterable(values)]
        held += itertools.chain.from_iterable(parts)  # their names
        held += map(type, modules)
        own = [table.values() for space in spaces for table in (space["_buffers"], space["_parameters"]) if table]
        held += map(type, itertools.chain.from_iterable(own))  # which of them are None
        read = self._around.values()
        return None if read is None else held + read

    def _in_leaves(self, held: list[Any]) -> tuple[list[int], list[Any]]:
        """What is known of parts that nobody watches: they may get a forward, or parts of their own, or be others."""
        leaves = [held[place] for place in self._leaves]
        spaces = [leaf.__dict__ for leaf in leaves]
        return [*map(len, spaces), *map(len, map(_PARTS, spaces))], [*map(type, leaves)]

    def _keys_of_hooks(self) -> list[int]:
        """The numbers of all hooks of the user, which no other gets."""
        modules = [module for known in (*self._watched, *self._parts) if (module := known()) is not None]
        both = [several for module in modules for several in (module._forward_hooks, module._forward_pre_hooks)]
        return [key for several in both if several for key, hook in several.items() if type(hook) is not Hook]


def _there(known: Sequence[weakref.ref[Any]]) -> list[Any]:
    return [one for reference in known if (one := reference()) is not None]


def _environment() -> Any:
    """The variables of the process, as they are kept: to decode them takes long."""
    return getattr(os.environ, "_data", os.environ)


class Parts:
    """The modules of a model that are watched, and what is known of them before it runs."""

    def __init__(self, model: nn.Module) -> None:
        modules = [*named_modules(model)]
        self.compiled = [path for path, module in modules if is_compiled(module)]
        """The paths of compiled modules, and of scripted ones."""
        self.scripted = [path for path, module in modules if isinstance(module, torch.jit.ScriptModule)]
        # torch asks in these alone whether there is autocast for any device, such as that of the key of the operators.
        self.are_recurrent = any(isinstance(module, nn.RNNBase) for _, module in modules)
        scripted, by_token = {*self.scripted}, dict[nn.Module, bool]()
        watched = [one for one in modules if one[0] not in scripted and not (one[0] and cannot_attend(one[1]))]
        self.watched = [
            (path, weakref.ref(module), bool(path) and works_by_token(module, by_token)) for path, module in watched
        ]
        """The path of each, the module, and whether it is a layer in which nothing attends."""
        is_plain = not self.scripted and not self.compiled
        self._states = States([module for _, module in watched], follows_code=False) if is_plain else None

    def are_same(self) -> bool:
        """Whether the model still has these, as they were."""
        return self._states is not None and self._states.have_same_parts()

"""What a model is given and what its modules are, so that two passes can be compared."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..instrument import named_modules
from .hooks import Hook
from .modules import cannot_attend, has_global_hooks, is_compiled, works_by_token
from .surroundings import SIMPLE, Surroundings, chance, has_settings, held_in, is_unsteady, settings

_VALUES = (int, float, complex, str, bytes, np.generic, Enum, type)
"""Bases of classes whose objects are what they are equal to."""
_MOST_OBJECTS, _MOST_NUMBERS = 200, 4096
_BASES = frozenset(nn.Module.__mro__)
_OWN = frozenset(vars(nn.Module()))


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
        self._leaves = [weakref.ref(part) for part in parts.difference(modules)]
        classes = {cls: None for kind in {*map(type, modules)} for cls in kind.__mro__ if cls not in _BASES}
        self._classes = [*map(weakref.ref, classes)]
        attributes = [
            (known, name, value)
            for known, module in zip(self._watched, modules, strict=True)
            for name, value in vars(module).items()
            if name not in _OWN
        ]
        held = {id(value): (known, name) for known, name, value in attributes if has_settings(value)}
        self._with_settings = [*held.values()]
        hooks = [hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())]
        own = [value for _, _, value in attributes]
        functions = [*own, *(hook for hook in hooks if type(hook) is not Hook)]
        self._around = Surroundings(classes, functions) if follows_code else Surroundings((), ())
        self.are_steady = not (self._around.is_unsteady or any(map(is_unsteady, own)))
        """Whether nothing was found that gives another answer each time."""
        self._chance = chance()
        # As long as they are there, no other has their number.
        read = self._around.values()
        owned = [*(vars(one).values() for one in (*modules, *classes)), read, *self._around.settings(read)]
        owned += [settings(vars(module)[name]) for known, name in held.values() if (module := known()) is not None]
        self._kept = [one for several in owned for one in several if type(one) in SIMPLE]
        self._hooks, self._next = self._keys_of_hooks(), RemovableHandle.next_id
        self._numbers = self._number()

    def are_same(self) -> bool:
        """Whether the modules are still that."""
        if RemovableHandle.next_id != self._next:
            if self._keys_of_hooks() != self._hooks:
                return False
            self._next = RemovableHandle.next_id
        return not has_global_hooks() and self.have_same_parts()

    def have_same_parts(self) -> bool:
        """Whether all but the hooks is."""
        return self._number() == self._numbers

    def took_chances(self) -> bool:
        """Whether somebody took a random number of Python or numpy since."""
        return bool(self._chance != chance())

    def _number(self) -> list[int]:
        modules = [module for known in self._watched if (module := known()) is not None]
        if len(modules) < len(self._watched):
            return []
        parts = [one for module in modules if (one := module._modules)]
        holders: list[Any] = [*map(vars, modules), *parts]
        holders += [vars(known() or object) for known in self._classes]
        numbers = [id(type(module)) for module in modules]
        numbers += map(hash, itertools.chain.from_iterable(parts))  # of their names
        numbers += map(id, itertools.chain.from_iterable([holder.values() for holder in holders]))
        for known in self._leaves:
            module = known()
            if module is not None:  # it may get a forward or parts of its own
                numbers += id(type(module)), len(module.__dict__), len(module._modules)
        for known, name in self._with_settings:
            module = known()
            numbers += () if module is None else map(id, settings(vars(module).get(name)))
        values = self._around.values()
        numbers += map(id, itertools.chain(values, *self._around.settings(values)))
        return numbers

    def _keys_of_hooks(self) -> list[int]:
        """The numbers of all hooks of the user, which no other gets."""
        modules = [module for known in (*self._watched, *self._leaves) if (module := known()) is not None]
        both = [several for module in modules for several in (module._forward_hooks, module._forward_pre_hooks)]
        return [key for several in both if several for key, hook in several.items() if type(hook) is not Hook]


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

"""What the code of a model reads besides its arguments and its modules: globals, what functions close over, chance,
clocks."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from gc import get_referents
from operator import itemgetter
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ..opcodes import attributes_of, imports_of
from .settings import FOREIGN, attributes, package_of

_CALLED = ("forward", "__call__", "__getattr__")
_MOST_FUNCTIONS = 4096
_CHANGING = {
    "time": {
        *("time", "monotonic", "perf_counter", "process_time", "thread_time", "clock_gettime"),
        *("time_ns", "monotonic_ns", "perf_counter_ns", "process_time_ns", "thread_time_ns", "clock_gettime_ns"),
        *("localtime", "gmtime", "ctime", "asctime", "strftime"),
    },
    "datetime": {"now", "utcnow", "today"},
    "os": {"urandom", "getrandom", "times"},
    "secrets": {"randbits", "randbelow", "choice", "token_bytes", "token_hex", "token_urlsafe"},
    "uuid": {"uuid1", "uuid4"},
}
"""Functions that give another answer each time, of modules, and of classes in them."""


class Surroundings:
    """The globals and closures that a forward pass may read, by the names in the code that it may run.

    It holds no object of the user, which may hold the model.

    Args:
        classes: of the modules, whose methods are found by their names.
        functions: others that run, and whatever else modules hold; functions and objects with methods are found in it.
    """

    def __init__(self, classes: Iterable[type], functions: Sequence[Any]) -> None:
        self._spaces: dict[int, tuple[Callable[[], Any], dict[str, None]]] = {}
        self._closures: list[Callable[[], Any]] = []
        owners = [one for one in (*classes, *map(_owner_of, functions)) if one is not None]
        waiting = [found for one in functions for found in _functions(one)]
        waiting += [found for owner in owners for name in _CALLED for found in _functions(vars(owner).get(name))]
        seen, known = set[int](), set[str]()
        reads_changing = False
        while waiting and len(seen) < _MOST_FUNCTIONS:
            function = waiting.pop()
            if id(function) in seen or package_of(function) in FOREIGN:
                continue
            seen.add(id(function))
            names = {*_names(function.__code__)}
            held = self._add(function, names)
            if function.__closure__:
                self._closures.append(weakref.ref(function))
                held += map(held_in, function.__closure__)
            reads_changing = reads_changing or _reads_changing(function.__code__, names, held)
            held += [value for owner in owners for value in self._add(owner, names - known)]
            known |= names
            old = {*map(id, owners)}
            fresh = {id(owner): owner for owner in map(_owner_of, held) if owner is not None and id(owner) not in old}
            owners += fresh.values()
            held += [value for owner in fresh.values() for value in self._add(owner, known)]
            waiting += [found for value in held for found in _functions(value)]
        # One name twice, for of a single one there is no tuple.
        spaces = [(known, itemgetter(*names, next(iter(names)))) for known, names in self._spaces.values() if names]
        self._of_functions = [space for space in spaces if type(space[0]()) is FunctionType]
        self._of_others = [space for space in spaces if type(space[0]()) is not FunctionType]
        values = self.values()
        self.is_unsteady = reads_changing or values is None or any(map(is_unsteady, values))
        """Whether they read what gives another answer each time."""

    def _add(self, owner: Any, names: set[str]) -> list[Any]:
        """Look at some names of a module, of a class or of a function's globals; what they stand for now."""
        space = _space_of(owner)
        found = {name: space[name] for name in names & space.keys()}
        number = id(space) if type(owner) is FunctionType else id(owner)
        _, known = self._spaces.setdefault(number, (weakref.ref(owner), {}))
        known.update(dict.fromkeys(name for name, one in found.items() if not isinstance(one, (ModuleType, type))))
        return [*found.values()]

    def values(self) -> list[Any] | None:
        """What the functions would read now; None where something is gone."""
        read: list[Any] = []
        try:
            for known, take in self._of_functions:
                read += take(known().__globals__)
            for known, take in self._of_others:
                read += take(known().__dict__)
            cells = [cell for known in self._closures for cell in known().__closure__]
        except (AttributeError, KeyError, TypeError):
            return None
        return read + get_referents(*cells)


def held_in(cell: Any) -> Any:
    """What a function closes over; None for what is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def is_unsteady(value: Any) -> bool:
    """Whether something gives another answer each time: an iterator, a generator of random numbers, a clock."""
    if isinstance(value, (FunctionType, BuiltinMethodType)) and value.__name__ in _CHANGING.get(_home_of(value), ()):
        return True
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
        elif not isinstance(value, type) and "__wrapped__" in (own := attributes(value) or {}):
            value = own["__wrapped__"]
        else:
            return


def _owner_of(value: Any) -> Any:
    """What has the attributes that code asks of something: a module, a class; None for what is of another package."""
    owner = value if isinstance(value, (ModuleType, type)) else type(value)
    return None if owner is None or package_of(owner) in FOREIGN else owner


def _names(code: CodeType) -> Iterator[str]:
    return (name for one in _codes(code) for name in one.co_names)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Code, and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _reads_changing(code: CodeType, names: set[str], held: Iterable[Any]) -> bool:
    """Whether code asks a module or a class for what gives another answer each time, by what it reads by name."""
    if not any(names & changing for changing in _CHANGING.values()):
        return False
    codes = [*_codes(code)]
    homes = {_home_of(one) for one in held if isinstance(one, (ModuleType, type))}.union(*map(imports_of, codes))
    asked = set[str]().union(*map(attributes_of, codes))
    return any(home in homes and asked & changing for home, changing in _CHANGING.items())


def _home_of(value: Any) -> str:
    """The module that something is, or is from."""
    owner = value.__self__ if isinstance(value, BuiltinMethodType) else value
    if not isinstance(owner, (ModuleType, type, FunctionType)):
        owner = type(owner)
    return str(owner.__name__ if isinstance(owner, ModuleType) else owner.__module__)


def _space_of(owner: Any) -> Mapping[str, Any]:
    return owner.__globals__ if type(owner) is FunctionType else vars(owner)

"""What is recorded of a program that is not known yet: its models are met as they are first called.

Nothing is imported before the program does so: it may have to set up its environment before torch reads it.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..errors import UnknownLocalError, VisualizerError, VisualizerWarning
from ..instrument import Captured, Uncompiled, get_local
from ..instrument.imports import after_import
from ..instrument.module_paths import WRAPPERS
from ..instrument.skipped import never_compiled
from ..store import Cache, Record, Saved, bytes_by_device, human
from ..store.files import write
from .outcome import Mistake

if TYPE_CHECKING:
    from ..intercept import Maps

Found: TypeAlias = "Cache | Maps"


class Recording(Protocol):
    """One way of recording a program."""

    trouble: Exception | None
    """Why it could not begin, where it could not."""

    def start(self) -> None:
        """Record from now on, or from when there is something to record."""

    def watch(self, name: str, value: Any) -> None:
        """Hear of a name that the program's own module defines."""

    def stop(self) -> list[tuple[str, Found]]:
        """Record no more; what was found, each part by the name of its model."""

    def why_nothing(self) -> str:
        """Why nothing was found, and what to do."""


class Decorated:
    """The functions that the program has decorated by `get_local`."""

    def __init__(self, limit: int | None, max_bytes: int | None) -> None:
        self.trouble: Exception | None = None
        self._limits = limit, max_bytes

    def start(self) -> None:
        """Activate them."""
        get_local.activate(limit=self._limits[0], max_bytes=self._limits[1])

    def watch(self, name: str, value: Any) -> None:
        """They are found without."""

    def stop(self) -> list[tuple[str, Found]]:
        """What is in the cache; the program may have cleared it, or switched capture off."""
        get_local.deactivate()
        try:
            cache = get_local.cache
        except Exception as error:  # of a `keep` function; the next reading has what there is
            self.trouble, cache = error, get_local.cache
        return [("get_local", cache)]

    def why_nothing(self) -> str:
        """Whether there are any."""
        names = ", ".join(get_local.cache)
        why = f"{names} did not run, or the script cleared the cache" if names else "nothing in it has @get_local"
        return f"{why}. --var NAME captures a local of the models' modules, --attention their attention"


class Target:
    """The locals of one function, from when its module has been imported."""

    def __init__(self, target: str, own: set[str], make: Callable[[str], Captured]) -> None:
        self.trouble: Exception | None = None
        self._module, colon, self._qualname = target.partition(":")
        if not (self._module and colon and self._qualname):
            raise Mistake(f"{target!r} is no target: write package.module:function or package.module:Class.method")
        self.is_own = self._module in own
        self._make = make
        self._found: Captured | None = None

    def start(self) -> None:
        """Wait for the module."""
        if not self.is_own:
            after_import(self._module, lambda _: self._begin(self._module))

    def watch(self, name: str, value: Any) -> None:
        """Begin where the program itself defines the function or its class."""
        if self.is_own and name == self._qualname.partition(".")[0] and callable(value):
            self._begin("__main__")

    def _begin(self, module: str) -> None:
        if self._found is not None:
            self._found.stop()
        try:
            self._found = self._make(f"{module}:{self._qualname}").start()
        except (VisualizerError, AttributeError, TypeError, ValueError) as error:
            self.trouble = Mistake(first_sentences(error))
            raise SystemExit(2) from None  # a program that runs for hours should not first do so

    def stop(self) -> list[tuple[str, Found]]:
        """The function's values."""
        if self._found is None:
            return []
        self._found.stop()
        return [(self._qualname, self._found)]

    def why_nothing(self) -> str:
        """Whether the function was there."""
        if self._found is not None:
            return f"{self._qualname} was not called, or left without binding the local"
        if self.is_own:
            return f"the script defines no {self._qualname.partition('.')[0]}"
        return f"the script did not import {self._module}"


class Models:
    """Every model that the program calls; `make` says how it is recorded, or raises UnknownLocalError.

    A model is an `nn.Module` that is called and is no part of one that was called before. It is met at its first call,
    as the call is looked up: nothing of ours stands between the caller and the module.
    """

    def __init__(self, make: Callable[[Any], Any], nothing: str, *, uncompiled: bool = False) -> None:
        self.trouble: Exception | None = None
        self._make, self._nothing = make, nothing
        self._has_to_run_uncompiled = uncompiled
        self._uncompiled: Uncompiled | None = None
        self._lock = threading.RLock()
        self._known: dict[int, weakref.ref[Any]] = {}
        self._without: dict[frozenset[type], str] = {}
        self._models: list[tuple[weakref.ref[Any], str, Any]] = []
        self._call: _Call | None = None

    def start(self) -> None:
        """Wait for torch."""
        if self._has_to_run_uncompiled:  # from the start: a model may be met as it is being compiled
            self._uncompiled = Uncompiled()
        after_import("torch.nn.modules.module", self._begin)

    def watch(self, name: str, value: Any) -> None:
        """Models are met without."""

    def _begin(self, module: ModuleType) -> None:
        self._class = module.Module
        self._call = _Call(self._class.__call__, self._known, self._meet)
        self._class.__call__ = self._call

    @never_compiled
    def _meet(self, module: Any) -> None:
        while type(module).__name__ in WRAPPERS and type(module).__module__.startswith("torch."):
            self._know(id(module), module)  # what torch.compile and the like put around a model
            module = getattr(module, WRAPPERS[type(module).__name__])
        if type(module).__module__.startswith("torch._"):
            return  # of the compiler, which must not wait here: to start, a capture waits for the compiler
        with self._lock:
            if id(module) in self._known or getattr(module, "_is_replica", False):
                return
            parts = {id(part): part for part in module.modules()}
            for number, part in parts.items():
                self._know(number, part)
            kinds = frozenset(map(type, parts.values()))
            if kinds in self._without or _is_plain(module):
                return
            try:
                found = self._make(module)
                for model, _, other in self._models:
                    if model() is None or id(model()) in parts:  # gone, or a part of this one
                        other.stop()
                found.start()
            except UnknownLocalError as error:
                self._without[kinds] = first_sentences(error)
                return
            except Exception as error:  # said at the end: the script must not fail for us
                self.trouble = self.trouble or error
                return
            self._models.append((weakref.ref(module), type(module).__qualname__, found))

    def _know(self, number: int, part: Any) -> None:
        self._known[number] = weakref.ref(part, lambda _: self._known.pop(number, None))

    def stop(self) -> list[tuple[str, Found]]:
        """The values or maps of each model."""
        if self._call is not None and vars(self._class).get("__call__") is self._call:
            self._class.__call__ = self._call.original
        with self._lock:
            if self._uncompiled is not None:
                self._uncompiled.end()
            for _, _, found in self._models:
                with warnings.catch_warnings():
                    if not len(found):  # a loss, say: no news that it has no attention
                        warnings.simplefilter("ignore", VisualizerWarning)
                    found.stop()
            return [(name, found) for _, name, found in self._models]

    def why_nothing(self) -> str:
        """Whether there were models, and what they are without."""
        if self._models:
            return f"{', '.join(dict.fromkeys(name for _, name, _ in self._models))} ran, and {self._nothing}"
        if self._without:
            return max(self._without.items(), key=lambda item: len(item[0]))[1]
        return "no model of torch was called" if self._known else "the script called no nn.Module"


class _Call:
    """In the place of `nn.Module.__call__`: shows modules that are not known as their call is looked up."""

    def __init__(self, original: Any, known: dict[int, Any], meet: Callable[[Any], None]) -> None:
        self.original, self._known, self._meet = original, known, meet

    @never_compiled
    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.original
        if id(module) not in self._known:
            self._meet(module)
        return self.original.__get__(module, owner)


def _is_plain(module: Any) -> bool:
    """Whether it is one of torch's own layers without parts, such as a loss."""
    kind = type(module)
    is_own = kind.__module__.startswith("torch.nn.modules.") and kind.__name__ != "MultiheadAttention"
    return is_own and next(module.children(), None) is None


def first_sentences(error: Exception) -> str:
    """An error's message without the long list of what there is."""
    return str(error).partition(" The locals that exist:")[0]


def brought_something(found: Found) -> bool:
    """Whether there is any value; None, as fused attention has in the place of its weights, is none."""
    if isinstance(found, Cache):
        return any(record.value is not None for record in found.records)
    return len(found) > 0


def summary(parts: list[tuple[str, Found]]) -> str:
    """Such as "12 values of 12 keys, 7.2 MB"."""
    values = keys = size = 0
    for _, found in parts:
        if isinstance(found, Cache):
            lists = [values for values in found.values() if values]
            size += sum(sum(bytes_by_device(value).values()) for values in lists for value in values)
        else:
            lists = [found.calls(path) for path in found.paths]
            size += sum(item.nbytes for item in found)
        values, keys = values + sum(map(len, lists)), keys + len(lists)
    return f"{values} value{'s'[: values != 1]} of {keys} key{'s'[: keys != 1]}, {human(size)}"


def save(parts: list[tuple[str, Found]], path: Path) -> None:
    """Write what was found of one model, or of several: their keys then begin with the name of the model's class.

    Raises OSError, TypeError and ValueError as `Cache.save` does.
    """
    if len(parts) == 1:
        parts[0][1].save(path)
        return
    keys: list[str] = []
    records: list[Record] = []
    taken: set[str] = set()
    for name, found in parts:
        beginning = next(one for one in chain([name], (f"{name}@{number}" for number in count(2))) if one not in taken)
        taken.add(beginning)
        saved = found.saved()
        new = {key: f"{beginning}.{key}" if key and key[0] != ":" else beginning + key for key in saved.keys}
        keys += new.values()
        first = len(records) if saved.kind == "maps" else 0  # maps of all models are numbered in one row
        records += [replace(record, key=new[record.key], call=first + record.call) for record in saved.records]
    write(path, Saved(saved.kind, tuple(keys), records, {}))

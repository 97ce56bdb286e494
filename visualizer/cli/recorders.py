"""How `visualizer run` records a program (its decorated functions, one target, or every model) and saves the results.

Nothing heavy is imported before the program does so: it may have to set its environment before torch reads it.
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
from typing import Any, TypeAlias

from ..errors import UnknownLocalError, VisualizerError, VisualizerWarning
from ..instrument import Captured, Uncompiled, get_local
from ..instrument.imports import after_import
from ..instrument.module_paths import WRAPPERS
from ..instrument.untraced import never_compiled
from ..loading import joined
from ..store import Recorded, Saved, human
from ..store.files import write
from .outcome import Mistake
from .saved import size_of


class Decorated:
    """Records the functions that the program has decorated by `get_local`."""

    trouble: Exception | None = None
    """Why not everything was recorded; None where it was."""

    def __init__(self, limit: int | None, max_bytes: int | None) -> None:
        self._limits = limit, max_bytes

    def start(self) -> None:
        """Activate `get_local`."""
        get_local.activate(limit=self._limits[0], max_bytes=self._limits[1])

    def stop(self) -> list[tuple[str, Recorded]]:
        """What is in the cache. The program may have cleared it, or deactivated `get_local`."""
        get_local.deactivate()
        try:
            cache = get_local.cache
        except Exception as error:  # raised by a `keep` function; the next read returns the rest
            self.trouble, cache = error, get_local.cache
        return [("get_local", cache)]

    def why_nothing(self) -> str:
        """Whether the program has decorated functions at all."""
        names = ", ".join(get_local.cache)
        why = f"{names} did not run, or the script cleared the cache" if names else "nothing in it has @get_local"
        return f"{why}. --var NAME captures a local of the models' modules, --attention their attention"


class Target:
    """Records the locals of one function, once its module has been imported.

    `program_names` are the module names by which a user may mean the program itself.
    """

    trouble: Exception | None = None

    def __init__(self, target: str, program_names: set[str], make: Callable[[str], Captured[Any]]) -> None:
        self._module, colon, self._qualname = target.partition(":")
        if not (self._module and colon and self._qualname):
            raise Mistake(f"{target!r} is no target: write package.module:function or package.module:Class.method")
        self.is_in_program = self._module in program_names
        self._make = make
        self._captured: Captured[Any] | None = None

    def start(self) -> None:
        """Capture the function as soon as its module is imported."""
        if not self.is_in_program:
            after_import(self._module, lambda _: self._begin(self._module))

    def on_define(self, name: str, value: Any) -> None:
        """Capture the function as soon as the program itself defines it, or its class."""
        if name == self._qualname.partition(".")[0] and callable(value):
            self._begin("__main__")

    def _begin(self, module: str) -> None:
        if self._captured is not None:
            self._captured.stop()
        try:
            self._captured = self._make(f"{module}:{self._qualname}").start()
        except (VisualizerError, AttributeError, TypeError, ValueError) as error:
            self.trouble = Mistake(_without_list(error))
            raise SystemExit(2) from None  # else the program would run, for hours perhaps, and save nothing

    def stop(self) -> list[tuple[str, Recorded]]:
        """The function's values."""
        if self._captured is None:
            return []
        self._captured.stop()
        return [(self._qualname, self._captured)]

    def why_nothing(self) -> str:
        """Whether the program has the function."""
        if self._captured is not None:
            return f"{self._qualname} was not called, or returned before it assigned the local"
        if self.is_in_program:
            return f"the script defines no {self._qualname.partition('.')[0]}"
        return f"the script did not import {self._module}"


class Models:
    """Records every model that the program calls.

    A model is an `nn.Module` that is called and is not a part of a module that was called before. It is found when
    `Module.__call__` is looked up for its first call, so that no frame of ours is between the caller and the module.

    `make` returns what records a model, or raises UnknownLocalError; `nothing` says what is wrong with models that ran
    without a result; `uncompiled` runs them without torch.compile.
    """

    trouble: Exception | None = None

    def __init__(self, make: Callable[[Any], Any], nothing: str, *, uncompiled: bool = False) -> None:
        self._make, self._nothing = make, nothing
        self._has_to_run_uncompiled = uncompiled
        self._uncompiled: Uncompiled | None = None
        self._lock = threading.RLock()
        self._known: dict[int, weakref.ref[Any]] = {}  # models and their parts, by their ids
        self._without: dict[frozenset[type], str] = {}  # why models of these classes have no such local
        self._models: list[tuple[weakref.ref[Any], str, Any]] = []  # with the name of its class and what records it
        self._call: _Call | None = None

    def start(self) -> None:
        """Wait until the program imports torch."""
        if self._has_to_run_uncompiled:  # from the start, as a model's first call may be the compiler's
            self._uncompiled = Uncompiled()
        after_import("torch.nn.modules.module", self._begin)

    def _begin(self, module: ModuleType) -> None:
        self._class = module.Module
        self._call = _Call(self._class.__call__, self._known, self._meet)
        self._class.__call__ = self._call

    @never_compiled
    def _meet(self, module: Any) -> None:
        while type(module).__name__ in WRAPPERS and type(module).__module__.startswith("torch."):
            self._know(id(module), module)  # the wrapper that torch.compile and its like put around a model
            module = getattr(module, WRAPPERS[type(module).__name__])
        if type(module).__module__.startswith("torch._"):
            return  # a module of the compiler. It must not wait for the lock: who holds it may wait for the compiler
        with self._lock:
            if id(module) in self._known or getattr(module, "_is_replica", False):
                return
            parts = {id(part): part for part in module.modules()}
            for number, part in parts.items():
                self._know(number, part)
            classes = frozenset(map(type, parts.values()))
            if classes in self._without or _is_plain(module):
                return
            try:
                recorder = self._make(module)
                for model, _, earlier in self._models:
                    if model() is None or id(model()) in parts:  # it is gone, or a part of this one
                        earlier.stop()
                recorder.start()
            except UnknownLocalError as error:
                self._without[classes] = _without_list(error)
                return
            except Exception as error:  # reported at the end: the script must not fail because of us
                self.trouble = self.trouble or error
                return
            self._models.append((weakref.ref(module), type(module).__qualname__, recorder))

    def _know(self, number: int, part: Any) -> None:
        self._known[number] = weakref.ref(part, lambda _: self._known.pop(number, None))

    def stop(self) -> list[tuple[str, Recorded]]:
        """The values or maps of each model."""
        if self._call is not None and vars(self._class).get("__call__") is self._call:
            self._class.__call__ = self._call.original
        with self._lock:
            if self._uncompiled is not None:
                self._uncompiled.end()
            for _, _, recorder in self._models:
                with warnings.catch_warnings():
                    if not len(recorder):  # a loss, for example: nobody expects attention from it
                        warnings.simplefilter("ignore", VisualizerWarning)
                    recorder.stop()
            return [(name, recorder) for _, name, recorder in self._models]

    def why_nothing(self) -> str:
        """Whether there were models, and what they lack."""
        if self._models:
            return f"{', '.join(dict.fromkeys(name for _, name, _ in self._models))} ran, and {self._nothing}"
        if self._without:
            return max(self._without.items(), key=lambda item: len(item[0]))[1]
        return "no model of torch was called" if self._known else "the script called no nn.Module"


Recording: TypeAlias = Decorated | Target | Models
"""A way to record a program. `start` records from now on, or as soon as there is something to record; `stop` returns
the results of each model under the name of its class; `why_nothing` says why there is none, and what to do."""


class _Call:
    """Stands in for `nn.Module.__call__`, and reports each unknown module when its call is looked up."""

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
    """Whether it is a layer of torch without parts or attention, such as a loss."""
    cls = type(module)
    is_of_torch = cls.__module__.startswith("torch.nn.modules.") and cls.__name__ != "MultiheadAttention"
    return is_of_torch and next(module.children(), None) is None


def _without_list(error: Exception) -> str:
    """An error's message without its long list of existing locals."""
    return str(error).partition(" The locals that exist:")[0]


def has_values(results: Recorded) -> bool:
    """Whether any value was recorded. None does not count: fused attention assigns it in place of its weights."""
    return any(record.value is not None for record in results.records)


def summary(parts: list[tuple[str, Recorded]]) -> str:
    """Such as "12 values of 12 keys, 7.2 MB"."""
    values = keys = size = 0
    for _, results in parts:
        records = results.records
        values, keys = values + len(records), keys + len({record.key for record in records})
        size += sum(size_of(record.value) for record in records)
    return f"{values} value{'s'[: values != 1]} of {keys} key{'s'[: keys != 1]}, {human(size)}"


def save(parts: list[tuple[str, Recorded]], path: Path) -> None:
    """Write the results of one model, or of several, whose keys then begin with the name of the model's class.

    Raises OSError, TypeError and ValueError as `Recorded.save` does.
    """
    if len(parts) == 1:
        parts[0][1].save(path)
        return
    prefixes: list[str] = []
    for name, _ in parts:
        names = chain([name], (f"{name}@{number}" for number in count(2)))
        prefixes.append(next(prefix for prefix in names if prefix not in prefixes))
    write(path, joined([_prefixed(results.saved(), name) for name, (_, results) in zip(prefixes, parts, strict=True)]))


def _prefixed(saved: Saved, prefix: str) -> Saved:
    """The same with another beginning of the keys; a model's own key is "" or begins with the colon of a local."""
    keys = {key: f"{prefix}.{key}" if key and key[0] != ":" else prefix + key for key in saved.keys}
    records = [replace(record, key=keys[record.key]) for record in saved.records]
    return replace(saved, keys=tuple(keys.values()), records=records)

"""Act when a module has been imported, without importing it."""

from __future__ import annotations

import sys
from _thread import get_ident
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module as soon as somebody has imported it; now, if that is so already."""
    if name in sys.modules:
        then(import_module(name))  # not sys.modules[name]: another thread may be loading it, and this waits for that
    elif not any(type(finder) is _Finder and (finder.name, finder.then) == (name, then) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder:
    """Waits on sys.meta_path for one import, then removes itself."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then
        self._searching: set[int] = set()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the other finders have, with a loader that calls `then` behind its work."""
        thread = get_ident()
        if name != self.name or thread in self._searching:  # another one that waits for the module asks back
            return None
        self._searching.add(thread)
        try:
            specs = (finder.find_spec(name, path, target) for finder in list(sys.meta_path) if finder is not self)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._searching.discard(thread)
        loader: Any = None if spec is None else spec.loader
        run = getattr(loader, "exec_module", None)
        if run is None:
            return spec

        def load(module: ModuleType) -> None:
            run(module)
            if module.__name__ == name:
                vars(loader).pop("exec_module", None)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.then(module)

        loader.exec_module = load
        return spec

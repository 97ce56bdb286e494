"""Whose calls of a function are recorded, and under which module path."""

from __future__ import annotations

import weakref
from typing import Any

from ..errors import warn


class Owners:
    """The objects whose calls are recorded, with their paths. It keeps none of them alive."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}
        self._alive: dict[int, Any] = {}
        self._has_warned = False

    def add(self, owner: Any, path: str) -> None:
        """Record this object's calls too."""
        number = id(owner)
        paths, alive = self._paths, self._alive

        def remove(_: Any) -> None:
            paths.pop(number, None)
            alive.pop(number, None)

        paths[number] = path
        try:
            alive[number] = weakref.ref(owner, remove)
        except TypeError:  # it has slots and none for weak references
            alive[number] = owner

    def has(self, owner: Any) -> bool:
        """Whether the object has a path already."""
        return id(owner) in self._paths

    @property
    def paths(self) -> list[str]:
        """The paths of the objects that are alive."""
        return list(self._paths.values())

    def path_of(self, owner: Any) -> str | None:
        """The path of the object, or None where its calls are not recorded."""
        path = self._paths.get(id(owner))
        if path is None and not self._has_warned and getattr(owner, "__dict__", {}).get("_is_replica"):
            self._has_warned = True
            warn(
                f"a {type(owner).__qualname__} is a copy that nn.DataParallel made of the model: it is not recorded. "
                "Capture from the class's forward instead of the model, or use one device.",
                "copies-of-dataparallel",
            )
        return path


class InstancesOf(Owners):
    """All instances of a class that inherits the captured function; for class methods the class itself, too."""

    def __init__(self, cls: type) -> None:
        super().__init__()
        self._class = cls

    def path_of(self, owner: Any) -> str | None:
        """ "" for an object of the class, else None."""
        of_the_class = isinstance(owner, self._class) or (isinstance(owner, type) and issubclass(owner, self._class))
        return "" if of_the_class else None

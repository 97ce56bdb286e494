"""Our hooks on the modules of a model, and how to do without most of them for a while."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container
from contextlib import nullcontext
from types import FrameType
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from .modules import cannot_attend

_PACKAGE = __name__.rpartition(".")[0]


class Hook:
    """A hook of a module that is recorded; a copy of the module, in memory or in a file, has one that does nothing."""

    def __init__(self, function: Callable[..., Any], path: str, module: weakref.ref[nn.Module]) -> None:
        self._function, self._path, self._module = function, path, module

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """What the function returns, if it is that module's call."""
        if self._module() is module or getattr(module, "_is_replica", False):
            return self._function(self._path, module, *args)
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # a file with it can be read where this package is not installed


def _is_idle(hook: Any) -> bool:
    """Whether a hook is what a copy of one of ours is."""
    return getattr(hook, "__func__", None) is nullcontext.__exit__


class _Pair(NamedTuple):
    """The two hooks of a module, and the tables of torch that they are in."""

    path: str
    before: Hook
    after: Hook
    tables: tuple[Any, Any]
    options: tuple[Any, Any]


class Hooks:
    """Two hooks on each of some modules, before and behind its calls, until `remove`.

    Torch takes several times as long to call a module that has hooks. Where it is known that the calls of some do not
    matter, `hide` takes theirs out of torch's tables, and `show` puts them back.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a recording that nobody holds any more may end in the middle of anything
        """Held while some are hidden or shown."""
        # One number of torch's for all tables: a handle for each hook takes ten times as long as the hook itself.
        self._number = RemovableHandle(OrderedDict()).id
        self._pairs: list[_Pair] = []
        self._hidden: list[_Pair] = []
        self._to_hide: tuple[Container[str] | None, list[_Pair]] = None, []

    def add(self, path: str, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Have functions called with (path, module, arguments ...) around the calls of a module.

        That is before all other hooks, also with arguments by keyword; and behind the call, also if it failed.
        """
        known, number = weakref.ref(module), self._number
        tables: Any = module._forward_pre_hooks, module._forward_hooks
        options: Any = module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called
        for table, kinds in zip(tables, options, strict=True):
            for idle in [one for one, hook in table.items() if _is_idle(hook)] if table else ():
                del table[idle]
                kinds.pop(idle, None)
        pair = _Pair(path, Hook(before, path, known), Hook(after, path, known), tables, options)
        options[0][number] = options[1][number] = True
        tables[0][number], tables[1][number] = pair.before, pair.after
        tables[0].move_to_end(number, last=False)
        self._pairs.append(pair)

    def hide(self, paths: Container[str]) -> None:
        """Hide those of the modules with these paths, and of all within. Where there are hooks of others, ours stay."""
        number = self._number
        with self.lock:
            if self._to_hide[0] is not paths:
                self._to_hide = paths, [pair for pair in self._pairs if _is_among(pair.path, paths)]
            for pair in self._to_hide[1]:
                before, after = pair.tables
                if len(before) == len(after) == 1 and number in before and number in after:
                    self._hidden.append(pair)
                    del before[number], after[number]

    def show(self) -> None:
        """Put back what is hidden, where it was."""
        number = self._number
        with self.lock:
            for pair in self._hidden:
                before, after = pair.tables
                before[number], after[number] = pair.before, pair.after
                for table in (before, after) if len(before) > 1 or len(after) > 1 else ():
                    table.move_to_end(number, last=False)  # somebody added one meanwhile
            self._hidden.clear()

    def remove(self) -> None:
        """Remove all."""
        with self.lock:
            self._hidden.clear()
            for pair in self._pairs:
                for table in (*pair.tables, *pair.options):
                    table.pop(self._number, None)


def _is_among(path: str, paths: Container[str]) -> bool:
    """Whether a path is one of these, or within one."""
    while path not in paths and path:
        path = path.rpartition(".")[0]
    return path in paths


def is_as_built(module: nn.Module) -> bool:
    """Whether the classes of a layer and of its parts say all that happens in it: hooks of the user may attend too."""
    inner = [one for one in module._modules.values() if one is not None]
    return (
        len(module._forward_hooks) == len(module._forward_pre_hooks)
        and all(type(hook) is Hook for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
        and "forward" not in vars(module)
        and all((one._forward_hooks or cannot_attend(one)) and is_as_built(one) for one in inner)
    )


def frame_of_call() -> FrameType | None:
    """The frame that runs the call of a module which one of our hooks belongs to: that behind our own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return frame


def has_ended(frame: FrameType | None) -> bool:
    """Whether a frame has run to its end, such as that of a call that was interrupted: what follows is not of it.

    Only clearing a frame tells. It is a frame of torch's, whose locals nobody reads afterwards.
    """
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:  # it is running
        return False
    return True

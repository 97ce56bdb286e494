"""Our hooks on the modules of a model, and how to do without most of them for a while."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from torch import nn

from .modules import cannot_attend


class Hook:
    """A hook of a module that is recorded; on a copy of the module, in memory or in a file, it does nothing."""

    def __init__(self, function: Callable[..., Any], path: str, module: weakref.ref[nn.Module]) -> None:
        self._function, self._path, self._module = function, path, module

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """What the function returns, if it is that module's call."""
        if self._module() is module or getattr(module, "_is_replica", False):
            return self._function(self._path, module, *args)
        return None

    def __deepcopy__(self, memo: Any) -> Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_hook, ()


def _idle_hook() -> Hook:
    return Hook(lambda *_: None, "", lambda: None)  # type: ignore[arg-type]


class _Pair(NamedTuple):
    """The two hooks of a module: the tables that they are in, with the numbers that they have there."""

    path: str
    before: Any
    number_before: int
    hook_before: Hook
    after: Any
    number_after: int
    hook_after: Hook


class Hooks:
    """Two hooks on each of some modules, before and behind its calls, until `remove`.

    Torch takes several times as long to call a module that has hooks. Where it is known beforehand which calls matter,
    `hide` takes the others out of torch's tables, and `show` puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a recording that nobody holds any more may end in the middle of anything
        self._handles: list[Any] = []
        self._pairs: list[_Pair] = []
        self._hidden: list[_Pair] = []
        self._to_hide: tuple[Container[str] | None, list[_Pair]] = None, []

    def add(self, path: str, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Have functions called with (path, module, arguments ...) before and behind the calls of a module."""
        known = weakref.ref(module)
        hooks = Hook(before, path, known), Hook(after, path, known)
        handles = (
            module.register_forward_pre_hook(hooks[0], prepend=True, with_kwargs=True),
            module.register_forward_hook(hooks[1], always_call=True),
        )
        self._handles += handles
        tables: Any = module._forward_pre_hooks, module._forward_hooks
        self._pairs.append(_Pair(path, tables[0], handles[0].id, hooks[0], tables[1], handles[1].id, hooks[1]))

    @property
    def are_hidden(self) -> bool:
        """Whether some are."""
        return bool(self._hidden)

    def hide(self, needed: Container[str]) -> None:
        """Hide those of all modules but of those with these paths. Where there are others' hooks, ours stay."""
        with self._lock:
            if self._to_hide[0] is not needed:
                self._to_hide = needed, [pair for pair in self._pairs if pair.path not in needed]
            for pair in self._to_hide[1]:
                _, before, number_before, _, after, number_after, _ = pair
                if len(before) == len(after) == 1 and number_before in before and number_after in after:
                    self._hidden.append(pair)
                    del before[number_before], after[number_after]

    def show(self) -> None:
        """Put back what is hidden, where it was."""
        with self._lock:
            for _, before, number_before, hook_before, after, number_after, hook_after in self._hidden:
                before[number_before], after[number_after] = hook_before, hook_after
                if len(before) > 1:  # somebody added one meanwhile
                    before.move_to_end(number_before, last=False)
                if len(after) > 1:
                    after.move_to_end(number_after, last=False)
            self._hidden.clear()

    def remove(self) -> None:
        """Remove all."""
        with self._lock:
            self._hidden.clear()
            for handle in self._handles:
                handle.remove()


def is_as_built(module: nn.Module) -> bool:
    """Whether the classes of a layer and of its parts say all that happens in it: hooks of the user may attend too."""
    inner = [one for one in module._modules.values() if one is not None]
    return (
        len(module._forward_hooks) == len(module._forward_pre_hooks)
        and all(type(hook) is Hook for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
        and "forward" not in vars(module)
        and all((one._forward_hooks or cannot_attend(one)) and is_as_built(one) for one in inner)
    )

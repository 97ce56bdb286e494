"""Which functions have their code swapped, and for which channels; how the code is put back.

Capturing swaps a function's `__code__`. The function object stays the same, so everything that refers to it (a class, a
subclass, an instance's bound method, a compiled model) sees the change, and sees it undone. Any number of channels may
listen to one function, and they may leave in any order: its code is made anew from the original each time.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any

from ..errors import News
from ..rewrite import HOOK, Capture, original_of, rewrite
from ..store import Channel, ForkSafeLock, listener, receive


class _Swap:
    """One function: its own code, the code that it has now, and the channels that listen to it."""

    def __init__(self, original: CodeType) -> None:
        self.original = self.installed = original
        self.channels: list[Channel] = []


_swaps: weakref.WeakKeyDictionary[FunctionType, _Swap] = weakref.WeakKeyDictionary()

_lock = ForkSafeLock()
_deferred: deque[Callable[[], None]] = deque()


@contextmanager
def switching() -> Iterator[None]:
    """Hold the lock of whoever changes what is captured; at its end, make the changes that had to wait."""
    try:
        with _lock.working():
            yield
    finally:
        _catch_up()


def when_idle(action: Callable[[], None]) -> None:
    """Change what is captured, for a finalizer: at once, or as soon as nobody else is changing it.

    A finalizer can run while this thread is switching; acting now would undo half of it. It can also run while this
    thread is filing values; waiting now could deadlock with a thread that switches and waits for those values.
    """
    _deferred.append(action)
    _catch_up()


def _catch_up() -> None:
    while _deferred and _lock.acquire(blocking=False):
        is_free = not _lock.depth
        try:
            if is_free:
                _deferred.popleft()()
        finally:
            _lock.release()
        if not is_free:  # this very thread is switching, in a caller; it catches up at its end
            return


def new_site(function: FunctionType) -> str:
    """A key for a channel's hook calls that nobody else has: rewritten code may be sent to other processes."""
    return f"{function.__qualname__}#{os.urandom(8).hex()}"


def attach(pairs: Iterable[tuple[FunctionType, Channel]]) -> None:
    """Make each function's code bring its variables to its channel.

    Raises:
        RewriteError: one of the functions cannot be rewritten with proof. Then all are as they were.
    """
    attached: list[tuple[FunctionType, Channel]] = []
    with switching():
        try:
            for function, channel in pairs:
                swap = _swaps.get(function)
                if swap is None or function.__code__ is not swap.installed:
                    swap = _found(function.__code__)
                _install(function, swap, [*(other for other in swap.channels if other is not channel), channel])
                _swaps[function] = swap
                attached.append((function, channel))
        except BaseException:
            detach(attached)
            raise


def _found(code: CodeType) -> _Swap:
    """The swap of a function whose code we did not put in place: from here on its code is the original.

    Where that is a copy of rewritten code, from another process say, the original is in it. Channels of this process
    that it brings something to, as a copy of a captured function does, go on to get that.
    """
    swap = _Swap(original_of(code))
    if swap.original is not code:
        found = (listener(constant) for constant in code.co_consts if isinstance(constant, str))
        swap.channels = [channel for channel in found if channel is not None]
    return swap


def detach(pairs: Iterable[tuple[FunctionType, Channel]]) -> list[News]:
    """Undo `attach`; when the last channel leaves a function, it gets its original code object back.

    Returns what to warn of once everything is done, because a warning may be turned into an error.
    """
    with switching():
        found = [_detach(function, channel) for function, channel in pairs]
    return [news for news in found if news is not None]


def _detach(function: FunctionType, channel: Channel) -> News | None:
    swap = _swaps.get(function)
    if swap is None or channel not in swap.channels:
        return None
    code = function.__code__
    if code is not swap.installed:
        del _swaps[function]
        ours = next((made for c in swap.channels if (made := c.made) is not None and made[2] is code), None)
        if ours is not None:  # a tool that reloads modules has given it the rewritten code of its newer definition
            function.__code__ = ours[0]
            return None
        return News(
            f"the code of {place_of(function)} was replaced by another tool while it was captured: it stays as that "
            "tool made it. What it still brings is ignored.",
            "code-replaced",
        )
    _install(function, swap, [other for other in swap.channels if other is not channel])
    if not swap.channels:
        del _swaps[function]
    return None


def _install(function: FunctionType, swap: _Swap, channels: list[Channel]) -> None:
    code = _rewritten(swap.original, tuple(channels)) if channels else swap.original
    # Among the builtins, not the function's globals: tools that pickle functions by value take its globals along, and
    # the hook would have to be imported wherever they arrive. The name stays when the capture ends, because a change
    # of the builtins slows the whole process down for a moment.
    known: Any = function  # not all releases of the type checkers know the attribute
    builtins = known.__builtins__
    if builtins.get(HOOK) is not receive:
        builtins[HOOK] = receive
    function.__code__ = swap.installed = code
    swap.channels = channels


def _rewritten(code: CodeType, channels: tuple[Channel, ...]) -> CodeType:
    # If another tool has made the code from rewritten code, it already has the hook calls of some channels.
    channels = tuple(channel for channel in channels if channel.site not in code.co_consts)
    if not channels:
        return code
    # A factory makes many functions from one code object: rewrite it once.
    made, sites = channels[-1].made, tuple(channel.site for channel in channels)
    if made is None or made[0] is not code or made[1] != sites:
        captures = [Capture(channel.names, channel.at, channel.site, channel.owner) for channel in channels]
        made = channels[-1].made = code, sites, rewrite(code, *captures)
    return made[2]


def place_of(function: FunctionType) -> str:
    """The function, file and line, for messages."""
    code = function.__code__
    return f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"

"""Functions with their code swapped, for whom, and the way back.

A function is instrumented by swapping its `__code__`: the object stays the same, so everything that refers to it (a
class, a subclass, an instance's bound method, a compiled model) sees the change, and sees it undone. Any number of
channels may listen to one function, and they may go in any order: its code is made anew from the original each time.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from types import CodeType, FunctionType

from ..rewrite import HOOK, Capture, rewrite_for
from ..store import Channel, ForkSafeLock, receive


class _Patch:
    """The channels that listen to one function, its own code and the code that it has for them."""

    def __init__(self, original: CodeType) -> None:
        self.original = self.installed = original
        self.channels: list[Channel] = []


_patches: weakref.WeakKeyDictionary[FunctionType, _Patch] = weakref.WeakKeyDictionary()
_numbers = count(1)

_lock = ForkSafeLock()
_put_off: deque[Callable[[], None]] = deque()


class _Switching:
    """Held by whoever changes what is captured."""

    def __enter__(self) -> None:
        _lock.acquire()
        _lock.depth += 1

    def __exit__(self, *_: object) -> None:
        _lock.depth -= 1
        _lock.release()
        _catch_up()


switching = _Switching()


def finally_do(action: Callable[[], None]) -> None:
    """Change what is captured, for a finalizer: at once, or as soon as who is switching now has ended.

    A finalizer runs in the middle of anything: of this thread's switching too, which it would undo half of. And were it
    to wait here while its thread is filing values, whoever switches now and waits for that would wait for ever.
    """
    _put_off.append(action)
    _catch_up()


def _catch_up() -> None:
    while _put_off and _lock.acquire(blocking=False):
        is_free = not _lock.depth
        try:
            if is_free:
                _put_off.popleft()()
        finally:
            _lock.release()
        if not is_free:  # this thread is switching, further up
            return


def new_site(function: FunctionType) -> str:
    """A key for a channel's hook calls, unique in the process."""
    return f"{function.__qualname__}#{next(_numbers)}"


def attach(pairs: Iterable[tuple[FunctionType, Channel]]) -> None:
    """Make the functions' code bring the channels' variables: all of them, or none and raise RewriteError."""
    attached: list[tuple[FunctionType, Channel]] = []
    with switching:
        try:
            for function, channel in pairs:
                patch = _patches.get(function)
                if patch is None or function.__code__ is not patch.installed:
                    # What another tool has put in place meanwhile is the original from here on.
                    patch = _Patch(function.__code__)
                _install(function, patch, [*patch.channels, channel])
                _patches[function] = patch
                attached.append((function, channel))
        except BaseException:
            detach(attached)
            raise


def detach(pairs: Iterable[tuple[FunctionType, Channel]]) -> list[str]:
    """Undo `attach`; the last channel's leaving puts a function's original code object back.

    Returns what is to be warned of, once all is done: a warning may be turned into an error.
    """
    with switching:
        messages = [_detach(function, channel) for function, channel in pairs]
    return [message for message in messages if message is not None]


def _detach(function: FunctionType, channel: Channel) -> str | None:
    patch = _patches.get(function)
    if patch is None or channel not in patch.channels:
        return None
    code = function.__code__
    if code is not patch.installed:
        del _patches[function]
        ours = next((made for c in patch.channels if (made := c.made) is not None and made[2] is code), None)
        if ours is not None:  # a reloading tool has given it the code of its newer definition
            function.__code__ = ours[0]
            return None
        return (
            f"{place_of(function)} has had its code replaced by another tool while it was captured: it is left as that "
            "tool made it. What it would still bring is ignored."
        )
    _install(function, patch, [other for other in patch.channels if other is not channel])
    if not patch.channels:
        del _patches[function]
    return None


def _install(function: FunctionType, patch: _Patch, channels: list[Channel]) -> None:
    code = _rewritten(patch.original, tuple(channels)) if channels else patch.original
    # The name stays when the capture goes: a generator that was suspended in rewritten code still looks it up.
    function.__globals__[HOOK] = receive
    function.__code__ = patch.installed = code
    patch.channels = channels


def _rewritten(code: CodeType, channels: tuple[Channel, ...]) -> CodeType:
    # What another tool has made of rewritten code brings these channels' values already.
    channels = tuple(channel for channel in channels if channel.site not in code.co_consts)
    if not channels:
        return code
    # A factory makes function after function from one code object: rewrite it once.
    made, sites = channels[-1].made, tuple(channel.site for channel in channels)
    if made is None or made[0] is not code or made[1] != sites:
        captures = [Capture(channel.names, channel.at, channel.site, channel.owner) for channel in channels]
        made = channels[-1].made = code, sites, rewrite_for(code, captures)
    return made[2]


def place_of(function: FunctionType) -> str:
    """The function, file and line, for messages."""
    code = function.__code__
    return f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})"

"""Locks that stay usable in a forked child, and a lock as the mark of a thread."""

from __future__ import annotations

import os
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_RLock: Any = type(threading.RLock())


class ForkSafeLock(_RLock):  # type: ignore[misc]
    """A reentrant lock that a forked child finds free, unless the thread that forked holds it itself.

    After a fork, a lock held by another thread is never released, because that thread does not exist in the child.
    """

    depth = 0
    """How many pieces of work its holder is in the middle of. A finalizer or a signal handler that runs in the holder's
    thread can take the lock too, and sees here that it has to wait."""

    def __init__(self) -> None:
        super().__init__()
        _locks.add(self)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the lock, in the middle of a piece of work."""
        with self:
            self.depth += 1
            try:
                yield
            finally:
                self.depth -= 1


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_in_child() -> None:
    for lock in _locks:
        if lock.acquire(blocking=False):  # nobody holds it, or this thread does
            lock.release()
        else:
            lock._at_fork_reinit()
            lock.depth = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_in_child)


is_current: dict[int, Callable[[], bool]] = {}
"""By the number of a thread that `this_thread` has given: whether it is the thread that asks."""


def this_thread() -> int:
    """The number of the thread that calls, for which `is_current` can be asked from now on."""
    thread = get_ident()
    if thread not in is_current:
        # A lock that is never released: whether the caller owns it takes half the time of comparing get_ident(). A
        # later thread with the same number owns it too, as for get_ident() the two are one.
        lock: Any = threading.RLock()
        lock.acquire()
        is_current[thread] = lock._is_owned
    return thread

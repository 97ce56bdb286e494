"""Locks that stay usable in a forked child."""

from __future__ import annotations

import os
import threading
import weakref
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

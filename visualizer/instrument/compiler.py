"""Capture and torch's compiler: make it know the hook, run without it, and have it notice that code was swapped.

`dynamo.py` says what a hook call means within a graph; `untraced.py` has what the compiler must leave alone. The
compiler is never loaded from here, unless `compiler_trouble` is asked.
"""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from threading import RLock
from types import CodeType, FrameType, ModuleType
from typing import Any, ClassVar

from ..store import receive
from .imports import after_import
from .untraced import skip_own_code

_COMPILER = "torch._dynamo"

_knows_hook = False
_trouble: str | None = None


def prepare() -> None:
    """Make torch's compiler know the hook: now, or as soon as somebody loads the compiler."""
    after_import(_COMPILER, _loaded)


def compiler_trouble() -> str | None:
    """Why a captured function ends the graphs of `torch.compile` here; None where it does not.

    >>> from visualizer.instrument import compiler_trouble
    >>> print(compiler_trouble())
    None

    It loads torch's compiler, which takes a second. Without torch it is None, too. Where there is trouble, capture
    still works: compiled functions run in more and smaller graphs, and with fullgraph=True they raise torch's error.
    """
    try:
        import_module(_COMPILER)
    except Exception as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name in ("torch", _COMPILER)
        return None if is_missing else f"torch's compiler cannot be loaded: {type(error).__name__}: {error}"
    _register_hook()
    return _trouble


def _loaded(_: ModuleType) -> None:
    _register_hook()
    Uncompiled.begin()


def _register_hook() -> None:
    """Make the compiler know the hook, unless it does; where that fails, remember why."""
    global _knows_hook, _trouble
    if _knows_hook:
        return
    try:
        skip_own_code()
        from .dynamo import register_hook

        register_hook()
    except Exception as error:  # an unknown release of torch must not keep anybody from capturing plain calls
        _trouble = f"{type(error).__name__}: {error}"
    else:
        _knows_hook, _trouble = True, None


class Uncompiled:
    """Makes compiled functions run uncompiled, in all threads, from its creation to its `end`."""

    _active: ClassVar[set[Uncompiled]] = set()
    _stance: ClassVar[Any] = None

    def __init__(self) -> None:
        self._active.add(self)
        if _COMPILER in sys.modules:
            self.begin()
        else:  # it takes a second to load, and nothing is compiled without it
            prepare()

    @staticmethod
    def is_possible() -> bool:
        """Whether this release of torch can do that (2.6 and later)."""
        return hasattr(sys.modules["torch"].compiler, "set_stance")

    @classmethod
    def begin(cls) -> None:
        """Switch compiled code off, if anybody wants that."""
        if cls._active and cls._stance is None and cls.is_possible():
            with suppress(RuntimeError):  # this thread is just compiling
                cls._stance = sys.modules["torch"].compiler.set_stance("force_eager")

    def end(self) -> None:
        """Let compiled functions run compiled again, unless somebody else wants them not to."""
        self._active.discard(self)
        if not self._active:
            stance, Uncompiled._stance = self._stance, None
            if stance is not None:
                stance.__exit__(None, None, None)


def paused() -> AbstractContextManager[Any]:
    """Within it no other thread compiles: code that is swapped meanwhile would confuse the compiler."""
    return getattr(sys.modules.get(f"{_COMPILER}.convert_frame"), "compile_lock", nullcontext())


def recompile(wait: bool = True) -> None:
    """Have compiled functions compiled again, because the compiler does not notice that a method's code was swapped.

    Args:
        wait: wait for a compilation that is under way in another thread. Otherwise do nothing then.
    """
    compiler: Any = sys.modules.get(_COMPILER)
    if not hasattr(compiler, "reset"):  # not loaded, or not quite
        return
    frames = compiler.convert_frame
    lock = getattr(frames, "compile_lock", RLock())
    if not lock.acquire(blocking=wait):
        return
    try:
        codes = [code for codes in (frames.input_codes, frames.output_codes) for seen in codes.seen if (code := seen())]
        if not codes or (_is_running() and (_invalidate(codes) or not wait)):
            return
        # Not compiler.reset(): that also drops the user's callbacks, and what was learnt about changing shapes.
        for code in codes:
            compiler.reset_code(code)
        _invalidated.clear()
    except AttributeError:  # a release that is not known yet
        compiler.reset()
    finally:
        lock.release()


_invalidated: list[tuple[float, Any]] = []
"""Compiled code that must not run any more, with the time at which it was invalidated."""
atexit.register(_invalidated.clear)  # later, what the compiler needs to free it is gone


def _is_running() -> bool:
    """Whether any thread, this one included, is inside compiled code or is compiling."""
    inside = vars(sys.modules[f"{_COMPILER}.eval_frame"])
    step: FrameType | None = None
    frames = list(sys._current_frames().values())
    try:
        while frames:
            step = frames.pop()
            while step is not None:
                if step.f_globals is inside:
                    return True
                step = step.f_back
        return False
    finally:  # this function's own frame is among them, and a reference to it would keep all its callers' locals
        del step, frames


def _invalidate(codes: Iterable[CodeType]) -> bool:
    """Let nobody enter what was compiled from the codes; False where this release of torch has no way to do so.

    Resetting a code crashes the process if another thread is looking through its compiled forms, or adding to them.
    Declaring each form void does not, if none is freed while that thread uses it: they are kept for 10 seconds.
    """
    try:
        entries_of = import_module("torch._C._dynamo.eval_frame")._debug_get_cache_entry_list
        void = import_module(f"{_COMPILER}.guards").DeletedGuardManagerWrapper
        now = time.monotonic()
        _invalidated[:] = [(since, entry) for since, entry in _invalidated if now - since < 10]
        time.sleep(0.01)  # let a thread that has just compiled add its result
        for entry in [entry for code in codes for entry in entries_of(code)]:
            manager = entry.guard_manager
            state = manager.extra_state
            if state is not None:
                substitute = void("what is captured was switched")
                substitute.id_matched_objs = {"": weakref.ref(receive)}  # not counted by the limit on recompilations
                _invalidated.append((now, (manager, manager.root, entry.code, getattr(entry, "backend", None))))
                state.invalidate(entry, substitute)
    except (ImportError, AttributeError, TypeError):
        return False
    return True

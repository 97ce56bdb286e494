"""Brings captured values from rewritten code into a store.

Rewritten code calls `receive(key, value)`. The key names a `Channel`, which brings the variables of one function into
one `Store`. The store keeps them in lists by key, within its limits. Whatever `keep` is, the channel converts a value
at once and hands it to the store as a `Put`. Where the store has opened a run for the channel, the next value of that
thread is appended to its list directly: see `Store`.
"""

from __future__ import annotations

import os
import signal
import sys
from _thread import get_ident
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, repeat
from operator import length_hint
from traceback import walk_tb
from types import CodeType
from typing import Any

from ..errors import VisualizerWarning, shown
from ..rewrite import At, assigned_lines, deletes
from ..tensors import Keep, is_array, is_tensor, keeper, kind_of, runs_foreign_code, why_unreal
from .budget import LARGEST, NUMBER_BYTES, Purse
from .locks import this_thread
from .quick import ARRAY, is_light, quick_keeper
from .store import Call, Put, Store

_listening: dict[str, Channel] = {}

_keeping: list[int] = []
"""The threads that run foreign code to convert a value, or in which torch runs the model again for its own purposes.
Calls of that code are not calls of the model."""

_SMALL, _AHEAD = 2**14, 2**20
"""Arrays of fewer bytes are paid for ahead, for so many bytes together. What larger ones cost is their copy."""

_raised: dict[int, Exception] = {}
"""By thread, what a `keep` function has just raised: of all errors in recording, these alone reach the program."""


def receive(key: str, value: Any) -> None:
    """The hook that all rewritten code calls; a key without a listener is ignored.

    The function itself stands for the value of an unbound variable, because no variable of a user holds it.
    """
    try:
        channel = _listening[key]
    except KeyError:
        return
    if _keeping and get_ident() in _keeping:
        return
    try:
        append = channel.append
        if channel.is_in_thread():
            cls = type(value)  # compared by identity, because a class may have its own __eq__ or __hash__
            if cls is channel.array and value.dtype is channel.dtype:
                kept = value.copy()
                if kept.__sizeof__() == channel.size and channel.append is append:  # see `Store`: nothing comes between
                    for _ in channel.places:
                        append(kept)  # type: ignore[misc]  # where there is a place, there is an append
                        return
            elif append is not None and (cls is float or (cls is int and -LARGEST < value < LARGEST)):
                purse = channel.purse
                left = purse.left - NUMBER_BYTES
                if left >= 0 and channel.append is append:
                    purse.left = left
                    append(value)
                    return
        append = None  # it refers to the list, which the store would take for one that a user holds
        channel.deliver(value)
    except RecursionError:  # our own call must not make the user's function hit the recursion limit
        skipped = channel.store.skipped_near_recursion_limit
        skipped[channel] = skipped.get(channel, 0) + 1
    except Exception as error:
        if not channel.survives(error):
            raise


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within it, no call in this thread is recorded."""
    thread = get_ident()
    try:
        _keeping.append(thread)
        yield
    finally:
        _keeping.remove(thread)


def is_recorded() -> bool:
    """Whether calls in this thread are those of a program, which may be recorded."""
    return get_ident() not in _keeping


def _ignore(value: Any) -> None:
    pass


def _nobody_is() -> bool:
    return False


def _forget_other_threads() -> None:
    """In a forked child: a new thread may get the number of a thread that does not exist there."""
    _keeping[:] = [thread for thread in _keeping if thread == get_ident()]
    _raised.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def _is_traced(value: Any) -> bool:
    """Whether copying a value would become part of what torch.jit.trace is tracing."""
    return (
        kind_of(value) in ("tensor", "container")
        and (torch := sys.modules.get("torch")) is not None
        and (torch._C._get_tracing_state() is not None)
    )


def _is_of_signal_handler(error: Exception) -> bool:
    """Whether a handler of a signal raised it, which came while we were recording, such as a timeout of the program."""
    codes = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        if callable(handler):
            handler = getattr(handler, "func", handler)  # of a partial
            method = handler if hasattr(handler, "__code__") else type(handler).__call__
            codes.add(getattr(method, "__code__", None))
    return any(frame.f_code in codes for frame, _ in walk_tb(error.__traceback__))


def listener(key: str) -> Channel | None:
    """The channel that receives what rewritten code with this key delivers now, or None."""
    return _listening.get(key)


class Channel:
    """Brings the variables of one function from its rewritten code into a store."""

    def __init__(
        self,
        store: Store,
        site: str,
        names: tuple[str, ...],
        at: At,
        keep: Keep | None,
        key: Callable[[str, str | None], str],
        owner: str | None = None,
        path_of: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.store, self.names, self.at, self.own_keep = store, names, at, keep
        self.keep: Keep = "numpy" if keep is None else keep
        """What is kept of a value: `own_keep`, or for None what the last `connect` was given."""
        self.site = site
        """The key that the rewritten code passes to the hook: unique in the process."""
        self.key_of = key
        """Gives the store's key for a variable and the path of the module that was called."""
        self.owner, self.path_of = owner, path_of
        """The local that holds the object whose method is called, and a function that gives the object's path, or None
        if its calls are not wanted. With `owner` the rewritten code delivers the object before the values."""
        self.calls = count()
        self.code: CodeType | None = None
        """The original code of the function, for messages."""
        self.made: tuple[CodeType, tuple[str, ...], CodeType] | None = None
        """The last rewriting that had this channel as its last: the original code, the sites, and the result."""
        self.append: Callable[[Any], None] | None = None
        """Appends to the list directly, for one thread; None while nobody may. The store alone opens and closes."""
        self.is_in_thread: Callable[[], bool] = _nobody_is
        """Whether that thread is the one that asks."""
        self.purse = Purse(0)
        """How many bytes it may append."""
        self.array: type | None = None
        self.dtype: Any = None
        self.size = 0
        """The class and the type of small arrays that come again and again, and what a copy says that it takes."""
        self.places: Iterable[None] = ()
        """Ends after so many of these as the purse has paid for: to take a place costs less than to count bytes."""
        self.deliver: Callable[[Any], None] = _ignore
        """Convert and file what the rewritten code delivers."""
        self._convert: Callable[..., Any]
        self._last: tuple[Any, ...] = (None, None, 0)
        self._frames: dict[int, tuple[Call, str | None]] = {}
        self._warned: set[str] = set()
        self._unreal: set[str] = set()

    def connect(self, default: Keep) -> None:
        """Receive what the rewritten code delivers from now on; `default` is for a channel without its own `keep`."""
        self.keep = default if self.own_keep is None else self.own_keep
        self._convert = keeper(self.keep, self._tell_shared)
        if _listening.get(self.site) is not self:
            self._frames.clear()  # their calls went on, or ended, without a listener
        if self.at == "assign":
            self.deliver = self._assignments()
        elif self.owner is not None:
            self.deliver = self._deliver_owned
        else:
            self.deliver = self._returns_of_one() if len(self.names) == 1 else self._deliver_all
        self.store.switch(self, True)
        _listening[self.site] = self

    def disconnect(self) -> None:
        """Ignore what the rewritten code delivers from now on, in calls that are under way too."""
        if _listening.pop(self.site, None) is None:
            return
        self.deliver = _ignore  # the closure would hold the channel, and with it the store and its values
        self.store.switch(self, False)

    def name_values(self, value: Any) -> list[tuple[str, Any]]:
        """The variables with their values, of what was put; unbound variables are left out."""
        pairs = [value] if self.at == "assign" else zip(self.names, value, strict=True)
        return [pair for pair in pairs if pair[1] is not receive]

    def accept(self, values: Sequence[Any], path: str | None) -> None:
        """Convert and file the values that a call has at its return, in the order of the names."""
        if self.store.is_full:
            return
        copies: list[Any] = []
        kept = [
            self._converted_or_told(name, value, copies, path) for name, value in zip(self.names, values, strict=True)
        ]
        light = not copies and all(map(is_light, kept))
        self.store.put(Put(self, kept, get_ident(), module=path, copies=copies, is_light=light))

    def pass_over(self, name: str, reason: str) -> None:
        """Warn, once for a variable, that a value is not recorded because it has no numbers.

        `reason` is that of `why_unreal`.
        """
        if name not in self._unreal:
            self._unreal.add(name)
            what = f"{name!r} of {self.place()} {reason}: such calls are not recorded."
            self.store.warn_in_call(what, "values-without-numbers")

    def survives(self, error: Exception) -> bool:
        """Take note of an error in recording; False where it is for the program to see."""
        if _raised.pop(get_ident(), None) is error or _is_of_signal_handler(error):
            return False
        if isinstance(error, VisualizerWarning):  # warnings are errors
            self.store.warn_in_call(str(error.message), error.section)
        else:
            self.store.miss(self, ", ".join(self.key_of(name, None) for name in self.names), error)
        return True

    def halt(self) -> None:
        """Append nothing directly any more: the next value may not overtake one that waits."""
        self.append = self.array = None
        self._give_back()

    def _give_back(self) -> None:
        """Give back to the purse what was paid for places that were not taken."""
        places, self.places = self.places, ()
        back = length_hint(places) * (self.size + ARRAY)
        self.purse.left += back

    def _pay_ahead(self, kept: Any, append: Callable[[Any], None]) -> None:
        """Pay for more arrays like one that was just appended, if the one before was like it too."""
        self._give_back()
        last, self._last = self._last, (type(kept), kept.dtype, kept.__sizeof__())
        cls, dtype, size = self._last
        price, purse = size + ARRAY, self.purse
        number = min(purse.left // 4, _AHEAD) // price if cls is last[0] and dtype is last[1] and size == last[2] else 0
        places = repeat(None, number)
        left = purse.left - number * price
        if number and left >= 0 and self.append is append:  # see `Store`: nothing comes between here and the next lines
            purse.left = left
            self.array, self.dtype, self.size, self.places = cls, dtype, size, places
        else:
            self.array = None

    def _deliver_all(self, values: tuple[Any, ...]) -> None:
        self.accept(values, None)

    def _deliver_owned(self, values: tuple[Any, ...]) -> None:
        assert self.path_of is not None
        path = self.path_of(values[0])
        if path is not None:
            self.accept(values[1:], path)

    def _returns_of_one(self) -> Callable[[Any], None]:
        quick, store, is_copied = quick_keeper(self.keep), self.store, self.keep in ("numpy", "tensor")

        def deliver(value: Any) -> None:
            kept, size = quick(value)
            if not size or store.is_full:
                self.accept((value,), None)
                return
            append = self.append
            if append is not None and self.is_in_thread():
                purse = self.purse
                left = purse.left - size
                if left >= 0 and self.append is append:  # see `Store`: nothing comes between here and the append
                    purse.left = left
                    append(kept)
                    if is_copied and size < _SMALL and is_array(value):
                        self._pay_ahead(kept, append)
                    return
            append = None
            store.put(Put(self, (kept,), this_thread(), is_light=is_light(kept), may_append=True))

        return deliver

    def _assignments(self) -> Callable[[Any], None]:
        store, frames, path_of = self.store, self._frames, self.path_of

        def deliver(event: Any) -> None:
            # A frame object lives as long as its call, so its id identifies the call while that is under way.
            frame = id(sys._getframe(2))
            if event is None or len(event) == 1:  # a call begins; with an owner, the event has its object
                frames.pop(frame, None)
                path = None
                if event is not None and path_of is not None:
                    path = path_of(event[0])
                    if path is None:
                        return
                frames[frame] = Call(self), path
                if len(frames) > 100_000:
                    for old in list(frames)[:50_000]:
                        frames.pop(old, None)
            elif not store.is_full:
                name, line, value = event
                if frame in frames:
                    call, path = frames[frame]
                elif path_of is None:
                    # The call began without a listener: a later frame at the same address could not be told from it.
                    call, path = Call(self), None
                else:
                    return  # the call of another object, or one whose object is not known
                copies: list[Any] = []
                kept = self._converted(name, value, copies, path)
                light = not copies and is_light(kept)
                store.put(Put(self, (name, kept), get_ident(), call, line, path, copies, light))

        return deliver

    def _converted_or_told(self, name: str, value: Any, copies: list[Any], path: str | None) -> Any:
        if value is None or value is receive:
            self._report_missing(name, value, path)
            return value
        return self._converted(name, value, copies, path)

    def _converted(self, name: str, value: Any, copies: list[Any], path: str | None) -> Any:
        """What is kept of a variable's value; where it cannot be kept, `receive`, which stands for nothing.

        An error of a `keep` function is raised, with the variable and its function named, and remembered.
        """
        if self.keep != "graph" and _is_traced(value):
            # torch.jit.trace has real numbers, and our copies are not for its graph.
            core = sys.modules["torch"]._C
            tracing = core._get_tracing_state()
            core._set_tracing_state(None)
            try:
                return self._converted(name, value, copies, path)
            finally:
                core._set_tracing_state(tracing)
        if self.keep != "graph" and (reason := why_unreal(value)) is not None:
            self.pass_over(name, reason)
            return receive
        thread = get_ident() if runs_foreign_code(self.keep, value) else None
        try:
            if thread is not None:
                _keeping.append(thread)
            return self._convert(value, copies)
        except RecursionError:
            raise
        except Exception as error:
            if callable(self.keep):
                with suppress(Exception):  # the class of the error may take no notes
                    error.add_note(f"while keeping {name!r} of {self.place()} with keep={shown(repr, self.keep)}")
                self.store.fail(error)
                _raised[get_ident()] = error
                raise
            if _is_of_signal_handler(error):
                raise
            self.store.miss(self, self.key_of(name, path), error)
            return receive
        finally:
            if thread is not None:
                _keeping.remove(thread)

    def _tell_shared(self, cls: type) -> None:
        self.store.tell_shared(cls, f"{' or '.join(map(repr, self.names))} of {self.place()}")

    def was_told(self, name: str) -> bool:
        """Whether a warning said that calls had no value of this variable, or none with numbers."""
        return name in self._unreal or name in self._warned

    def place(self) -> str:
        """The function, file and line, for messages."""
        code = self.code
        return "?" if code is None else f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"

    def _report_missing(self, name: str, value: Any, path: str | None) -> None:
        """Warn, once, that a call had no value under the name, with the likely cause."""
        code = self.code
        if name in self._warned or code is None:
            return
        if value is None:
            sounds_like_a_map = "torch" in sys.modules and any(
                part in name.lower() for part in ("attn", "attention", "weight", "prob")
            )
            last = self.store.last(self.key_of(name, path))
            if not (is_tensor(last) or is_array(last) or sounds_like_a_map):
                return
        self._warned.add(name)
        lines = ", ".join(map(str, assigned_lines(code, name)))
        state = "was None, and None was recorded" if value is None else "was not bound, and nothing was recorded"
        where = f"it is assigned on line {lines}" if lines else "it is a parameter, or an outer function's variable"
        deleted = value is receive and deletes(code, name)
        causes = (
            "The function deletes it before it returns: capture it with at='assign'."
            if deleted
            else "The usual causes: a fused attention kernel that never makes the weights (visualizer.attention(model) "
            "has them all the same; or build the model with timm.layers.set_fused_attn(False), or "
            'attn_implementation="eager" in transformers), or a flag of the model that guards those lines.'
        )
        self.store.warn_in_call(f"{name!r} {state} when {self.place()} returned; {where}. {causes}", "no-value")

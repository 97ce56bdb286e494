"""The way of captured values from rewritten code into a store.

Rewritten code calls `receive(key, value)`. The key names a `Channel`: one function's variables on their way into one
`Store`, which keeps them in lists by key within its limits. A channel that converts what it keeps files each value at
once. One that keeps the very object (`keep="graph"`) only appends it to what has arrived at the store, which is atomic
without a lock; it is filed when somebody reads, or when what waits there has grown heavy.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident
from collections.abc import Callable, Sequence
from itertools import count
from types import CodeType
from typing import Any

from ..errors import warn
from ..rewrite import At, assigned_lines, deletes
from ..tensors import Keep, bytes_by_device, is_array, is_tensor, keeper, runs_foreign_code, why_unreal
from .store import BATCH, Arrived, Call, Store

_listening: dict[str, Channel] = {}

_keeping: set[int] = set()
"""The threads that run somebody's code to convert a value: what that calls is no call of the model."""


def receive(key: str, value: Any) -> None:
    """The hook of all rewritten code; a key that nobody listens to any more is ignored.

    As a value it stands for "unbound": no variable of the user's holds it.
    """
    try:
        channel = _listening[key]
    except KeyError:
        return
    if _keeping and get_ident() in _keeping:
        return
    arrived = channel.arrived
    try:
        if arrived is None or value is None or value is receive:
            channel.take(value)
        else:
            arrived.append((channel, value, get_ident()))
            kind = type(value)  # compared by identity, for a class may have an __eq__ or __hash__ of its own
            if kind is not int and kind is not float:
                channel.store.hold(bytes_by_device(value))
            elif len(arrived) > channel.store.many:
                channel.store.many += BATCH
                channel.store.hold({"cpu": BATCH * 32})
    except RecursionError:  # what a call needs below the limit shall not be what the function fails for
        missed = channel.store.missed
        missed[channel] = missed.get(channel, 0) + 1


def _ignore(value: Any) -> None:
    pass


def _forget_other_threads() -> None:
    """In a forked child: new threads may get the numbers of those that are not there."""
    _keeping.intersection_update({get_ident()})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def listener(key: str) -> Channel | None:
    """The channel that the rewritten code of this key brings its values to now."""
    return _listening.get(key)


class Channel:
    """One function's variables on their way from its rewritten code into a store."""

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
        self.store, self.names, self.at, self.keep = store, names, at, keep
        self.site = site
        """What the rewritten code passes as the hook's key: unique in the process."""
        self.key_of = key
        """Says the store's key for a variable, given the path of the module that was called."""
        self.owner, self.path_of = owner, path_of
        """The local that holds the object whose method is called, and what says that object's path, or None where its
        calls are not wanted. With `owner` the rewritten code brings the object before the values."""
        self.calls = count()
        self.code: CodeType | None = None
        """The code that is captured from, for messages."""
        self.made: tuple[CodeType, tuple[str, ...], CodeType] | None = None
        """The code that was last rewritten with this channel as the last, for which sites, and the result."""
        self.arrived: Arrived | None = None
        """Where values go just as they are; None where each has work to be done at once."""
        self.take: Callable[[Any], None] = _ignore
        """Convert and file what the rewritten code brings."""
        self._keep: Keep = "numpy"
        self._convert: Callable[[Any, list[Any]], Any] = lambda value, copies: value
        self._frames: dict[int, tuple[Call, str | None]] = {}
        self._warned: set[str] = set()
        self._has_told = False

    @property
    def mode(self) -> Keep:
        """What is kept of a value, as of the last `connect`."""
        return self._keep

    def connect(self, default: Keep) -> None:
        """Receive what the rewritten code brings, from now on; `default` where the channel has no `keep` of its own."""
        self._keep = default if self.keep is None else self.keep
        self._convert = keeper(self._keep)
        if _listening.get(self.site) is not self:
            self._frames.clear()  # of calls that went on, or ended, unseen
        self.take = self._assignments() if self.at == "assign" else self._returns()
        self.adjust()
        self.store.switch(self, True)
        _listening[self.site] = self

    def disconnect(self) -> None:
        """Ignore what the rewritten code brings, calls that are under way included."""
        if _listening.pop(self.site, None) is None:
            return
        self.take = _ignore  # which holds on to the channel, and so to the store and its values
        self.store.switch(self, False)

    def adjust(self) -> None:
        """Let values wait as they are only where each needs no work of its own."""
        is_plain = self._keep == "graph" and self.at == "return" and len(self.names) == 1 and self.owner is None
        may_wait = is_plain and self.store.limit is None and not self.store.is_full
        self.arrived = self.store.arrived if may_wait else None

    def name_values(self, value: Any) -> list[tuple[str, Any]]:
        """The variables with their values, of what was put: unbound ones have none."""
        pairs = [value] if self.at == "assign" else zip(self.names, value, strict=True)
        return [pair for pair in pairs if pair[1] is not receive]

    def accept(self, values: Sequence[Any], path: str | None) -> None:
        """Convert and file the values that a call has at its return, in the order of the names."""
        if self.store.is_full:
            return
        copies: list[Any] = []
        kept = [self._kept(name, value, copies, path) for name, value in zip(self.names, values, strict=True)]
        self.store.put(self, kept, None, None, path, copies)

    def pass_over(self, name: str, reason: str) -> None:
        """Warn, once, that a value is not recorded because it has no numbers; the reason as `why_unreal` says it."""
        if not self._has_told:
            self._has_told = True
            warn(f"{name!r} of {self.place()} {reason}: such calls are not recorded.")

    def _returns(self) -> Callable[[Any], None]:
        accept, path_of = self.accept, self.path_of

        def take_one(value: Any) -> None:
            accept((value,), None)

        def take_all(values: tuple[Any, ...]) -> None:
            accept(values, None)

        def take_owned(values: tuple[Any, ...]) -> None:
            assert path_of is not None
            path = path_of(values[0])
            if path is not None:
                accept(values[1:], path)

        return take_owned if self.owner is not None else take_one if len(self.names) == 1 else take_all

    def _assignments(self) -> Callable[[Any], None]:
        store, frames, path_of = self.store, self._frames, self.path_of

        def take(event: Any) -> None:
            # A frame object lives as long as its call, so its id tells apart the calls that are under way.
            frame = id(sys._getframe(2))
            if event is None or len(event) == 1:  # a call begins; with an owner, its object
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
                    # Its beginning was not seen, so nothing tells this frame from a later one at the same address.
                    call, path = Call(self), None
                else:
                    return  # another object's call, or one that cannot be told from it
                copies: list[Any] = []
                kept = self._guarded(name, value, copies)
                store.put(self, (name, kept), call, line, path, copies)

        return take

    def _kept(self, name: str, value: Any, copies: list[Any], path: str | None) -> Any:
        if value is None or value is receive:
            self._report_missing(name, value, path)
            return value
        return self._guarded(name, value, copies)

    def _guarded(self, name: str, value: Any, copies: list[Any]) -> Any:
        """What is kept of a variable's value; errors say whose they are, and are remembered."""
        if self._keep != "graph" and (reason := why_unreal(value)) is not None:
            self.pass_over(name, reason)
            return receive
        thread = get_ident() if runs_foreign_code(self._keep, value) else None
        try:
            if thread is not None:
                _keeping.add(thread)
            return self._convert(value, copies)
        except Exception as error:
            error.add_note(f"while keeping {name!r} of {self.place()} with keep={self._keep!r}")
            self.store.fail(error)
            raise
        finally:
            if thread is not None:
                _keeping.discard(thread)

    def place(self) -> str:
        """The function, file and line, for messages."""
        code = self.code
        return "?" if code is None else f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"

    def _report_missing(self, name: str, value: Any, path: str | None) -> None:
        """Warn, once, that a call had nothing under the name, with the likely cause."""
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
        what = "was None, and None was recorded" if value is None else "was not bound, and nothing was recorded"
        where = f"it is assigned on line {lines}" if lines else "it is a parameter, or an outer function's variable"
        deleted = value is receive and deletes(code, name)
        causes = (
            "The function deletes it before it returns: capture it with at='assign'."
            if deleted
            else "The usual causes: a fused attention kernel that never makes the weights (visualizer.attention(model) "
            "has them all the same; or build the model with timm.layers.set_fused_attn(False), or "
            'attn_implementation="eager" in transformers), or a flag of the model that guards those lines.'
        )
        warn(f"{name!r} {what} when {self.place()} returned; {where}. {causes}")

"""Attention calls that wait until the model tells their axes apart, and whose maps are then made, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from .axes import Output
from .modes import unseen
from .modules import ModuleCall
from .snapshots import Copy, joined_copy

File = Callable[[str, Copy, Output, str], Callable[[], None] | None]
"""Makes the map of a module's call whose axes are known now, and returns what keeps it; the last text says which kernel
ran."""


@dataclass(frozen=True)
class _Pending:
    """An attention call that is seen, and whose axes the model has not told apart yet."""

    output: Output
    calls: tuple[ModuleCall, ...]
    kernel: str
    copy: Copy


class Filing:
    """The attention calls of a thread that are not filed yet."""

    def __init__(self) -> None:
        self._pending = deque[_Pending]()
        self.calls: tuple[ModuleCall, ...] | None = None
        """While a map is filed, the calls that were under way when it was made."""

    def __len__(self) -> int:
        return len(self._pending)

    def clear(self) -> None:
        """Forget all."""
        self._pending.clear()

    def add(self, output: Output, calls: Sequence[ModuleCall], kernel: str, copy: Copy) -> None:
        """Have a call wait for its axes."""
        self._pending.append(_Pending(output, tuple(calls), kernel, copy))

    def settle(
        self,
        file: File,
        unharmed: Callable[[Sequence[ModuleCall]], AbstractContextManager[None]],
        ending: int | None = None,
    ) -> None:
        """File the maps of calls whose axes are known, in order.

        Args:
            file: what makes a map of each.
            unharmed: makes a context, of the calls under way, in which errors of ours are told and go no further.
            ending: how many calls are under way, when the last of them ends. What was returned to it by modules in it
                has had its chance then; at the end of the outermost call everything has.
        """
        while self._pending and self.calls is None:
            first = self._pending[0]
            whole = first.output.outermost
            if whole.order is None and (ending is None or not (ending == 1 or len(first.calls) > ending)):
                return
            with unharmed(first.calls):
                whole.settle_steps()
                given = next(iter(first.copy.call.shapes), ())
                whole.settle_windows(first.copy.call.shapes)
                whole.settle_experts(getattr(first.calls[-1].module, "num_heads", None), given)
            whole = first.output.outermost
            self._pending.popleft()
            with unseen():
                copy = None
                with unharmed(first.calls):
                    copy = self._copy_of(first)
                if copy is not None:
                    self.file(file, unharmed, first.calls, copy, whole, first.kernel)

    def file(
        self,
        file: File,
        unharmed: Callable[[Sequence[ModuleCall]], AbstractContextManager[None]],
        calls: tuple[ModuleCall, ...],
        copy: Copy,
        output: Output,
        kernel: str,
    ) -> None:
        """File the map of one call, whose axes are known."""
        keep = None
        self.calls = calls
        try:
            with unharmed(calls):
                keep = file(calls[-1].path, copy, output, kernel)
            if keep is not None:
                keep()  # which may call the user's own function
        finally:
            self.calls = None

    def _copy_of(self, first: _Pending) -> Copy:
        """The copy of a call, with those of the calls that are one attention with it, which are not filed again."""
        whole = first.output.outermost
        together = [first, *(pending for pending in self._pending if pending.output.outermost is whole)]
        copies = {id(pending.output): pending.copy for pending in together}
        for pending in together:
            pending.output.attended = None
        if whole is first.output:
            return first.copy
        for pending in together[1:]:
            self._pending.remove(pending)
        parts, whole.parts, whole.attended = whole.parts, [], None
        sizes = [leaf.size for leaf in whole.leaves()[0]]
        return joined_copy([(copies[id(part.output)], part.numbers, part.first) for part in parts], sizes)

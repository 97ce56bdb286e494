"""Signs of life: what processes that work each for itself tell one another meanwhile.

A thread of its own does all the talking: where the process that holds the store hangs, so does whoever asks the store.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

_QUIET = 60.0
"""Seconds without a sign after which a process is given up. It gives one each second, whatever Python runs there."""
_LEFT = 2**31
"""The meetings of a process that comes to no more."""
_MESSAGES = 5000  # a second, that the store is asked to serve in all


class Stopped(Exception):
    """Another process has failed: what this one does is in vain."""


class Lost(RuntimeError):
    """Another process died, hangs or never came: the message says which."""


class Failed(Lost):
    """Another process has told why it failed, and so has the message."""


class _Sign(NamedTuple):
    beat: int = 0
    """Signs so far: it lives."""
    steps: int = 0
    """Batches so far: it does not hang."""
    meetings: int = 0
    """How many it has come to."""
    trouble: str = ""
    """Why it failed."""


class Signs:
    """The signs that this process gives and those of the others, by way of a store of `torch.distributed`.

    Nothing here waits for the store, so all can be interrupted.
    """

    def __init__(self, store: Any, rank: int, count: int, timeout: float) -> None:
        self._store, self._rank, self._count = store, rank, count
        # Each asks for the signs of all others, who may be many: then less often.
        self._pause = max(1.0, count**2 / _MESSAGES)
        self._timeout = max(timeout, 5 * self._pause)
        self._patience = max(min(timeout, _QUIET), 5 * self._pause)
        self._steps, self._meetings, self._trouble = 0, 0, ""
        self._seen: dict[int, _Sign] = {}
        self._met = 0
        """The last meeting to which all have come."""
        self._rounds = 0
        """How often the store has answered."""
        self._said = ""
        """Of which trouble the store knows."""
        self._is_trouble = self._is_gone = self._is_waiting = self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="visualizer signs", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Stop, if another process has failed."""
        if self._is_trouble or self._is_gone:
            raise Stopped

    def step(self) -> None:
        """Tell that another batch is done, and look."""
        self._steps += 1
        self.look()

    def tell(self, error: BaseException) -> None:
        """Tell the others why this process fails: now, for it may end at once."""
        try:
            why = str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}"
        except Exception:  # of an exception of somebody's own
            why = type(error).__name__
        self._trouble = why.encode(errors="backslashreplace")[:2000].decode(errors="ignore")  # what any store takes
        end = time.monotonic() + 5
        while self._said != self._trouble and not self._is_gone and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.01)

    def meet(self, is_brief: bool = False) -> None:
        """Wait until all have come here, as long as each of the others lives and gets on.

        Args:
            is_brief: wait no longer than it takes to find out who died.

        Raises:
            Lost: a process died, hangs, or did not come.
            Failed: it told why.
        """
        self._meetings += 1
        self._wait(self._meetings, 2 * self._patience if is_brief else math.inf)

    def linger(self, seconds: float) -> None:
        """Wait until the others have failed or left too, no longer than that: what they hear is in a store."""
        self._wait(_LEFT, seconds, is_told=False)

    def close(self) -> None:
        """Give no sign any more."""
        self._is_over = True
        self._wake.set()
        self._thread.join(5)  # it may hang with the store

    def _wait(self, meeting: int, seconds: float, is_told: bool = True) -> None:
        self._is_waiting = True
        self._wake.set()
        others = [rank for rank in range(self._count) if rank != self._rank]
        known = dict(self._seen)
        quiet, idle = dict.fromkeys(others, 0.0), dict.fromkeys(others, 0.0)
        rounds, unanswered, waited, now = self._rounds, 0.0, 0.0, time.monotonic()
        while True:
            before, now = now, time.monotonic()
            passed = min(now - before, 1.0)  # where this process itself was stopped, the others are not to blame
            waited += passed
            if rounds != self._rounds:
                rounds, unanswered = self._rounds, 0.0
            else:
                unanswered += passed
            for rank in others:
                old, new = known.get(rank, _Sign()), self._seen.get(rank, _Sign())
                quiet[rank] = quiet[rank] + passed if new.beat == old.beat else 0.0
                idle[rank] = idle[rank] + passed if new[1:3] == old[1:3] else 0.0
                known[rank] = new
            absent = [rank for rank in others if known[rank].meetings < meeting]
            is_over = waited > seconds or self._met == meeting
            if not is_told:
                is_over = is_over or self._is_gone or all(known[rank].trouble for rank in absent)
            elif not is_over:
                self._complain(known, absent, quiet, idle, unanswered)
            if is_over:
                self._is_waiting = False
                return
            time.sleep(0.01)

    def _complain(
        self,
        known: dict[int, _Sign],
        absent: list[int],
        quiet: dict[int, float],
        idle: dict[int, float],
        unanswered: float,
    ) -> None:
        """Raise Lost, if anything is wrong with the others."""
        failed = [f"rank {rank} failed, with {sign.trouble}" for rank, sign in sorted(known.items()) if sign.trouble]
        if failed:
            raise Failed(f"there are no statistics of all processes: {'; '.join(failed)}")
        never = [rank for rank in absent if not known[rank].beat and idle[rank] > self._timeout]
        dead = [rank for rank in quiet if known[rank].beat and quiet[rank] > self._patience]
        # What has died does no batch either, and is found out a little later.
        alive = [rank for rank in absent if known[rank].beat and quiet[rank] < 3 * self._pause]
        stuck = [rank for rank in alive if idle[rank] > self._timeout]
        about = []
        if self._is_gone or unanswered > self._patience:
            about.append("rank 0 died or hangs: torch.distributed's store, which it usually holds, gives no answer")
        elif never or dead or stuck:
            about += [f"{_ranks(never)} did not come within {self._timeout:g} s"] if never else []
            about += [f"{_ranks(dead)} died, or gives no sign of life for {self._patience:g} s"] if dead else []
            about += [f"{_ranks(stuck)} hangs: it did no batch within {self._timeout:g} s"] if stuck else []
        if about:
            raise Lost(
                f"rank {self._rank} of {self._count} is here, but {'; '.join(about)}. What each had written to "
                "checkpoint= is there, and load() merges it."
            )

    def _talk(self) -> None:
        beat, come, read, pause = 0, 0, 0.0, self._pause
        try:
            while True:
                beat, is_last = beat + 1, self._is_over
                is_waiting = self._is_waiting  # before its meeting is looked up: so it is this meeting
                trouble, meeting = self._trouble, self._meetings
                self._store.set(str(self._rank), f"{beat} {self._steps} {_LEFT if is_last else meeting} {trouble}")
                if trouble:
                    self._store.set("trouble", "")
                self._said = trouble
                is_trouble = bool(self._store.check(["trouble"]))
                if is_trouble or (is_waiting and time.monotonic() >= read + self._pause):
                    self._read()
                    read = time.monotonic()
                self._is_trouble = is_trouble
                if is_waiting:
                    if self._store.add(f"at meeting {meeting}", int(come < meeting)) >= self._count:
                        self._met = meeting
                    come = meeting
                self._rounds += 1
                if is_last:
                    return
                # All may come at once, and then nobody is to wait for a second.
                pause = min(2 * pause, self._pause) if self._is_waiting else self._pause
                if self._wake.wait(pause):
                    self._wake.clear()
                    pause = 0.02
        except Exception:  # what a store raises whose process is gone differs from one kind of store to the next
            self._is_gone = True

    def _read(self) -> None:
        for rank in range(self._count):
            if rank != self._rank and self._store.check([str(rank)]):
                beat, steps, meetings, trouble = self._store.get(str(rank)).decode(errors="replace").split(" ", 3)
                self._seen[rank] = _Sign(int(beat), int(steps), int(meetings), trouble)


def _ranks(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"

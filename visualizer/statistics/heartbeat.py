"""`Heartbeat`: processes that work independently tell one another that they live, make progress, or fail.

They may arrive at a meeting hours apart, and nothing in torch waits so long. `monitored_barrier(wait_all_ranks=True)`
counts its seconds from the first arrival, so that a longer share looks like a death; only rank 0 learns who is absent;
it does not react to Ctrl-C, and hangs if the process with the store stands still. torchelastic's heartbeats are between
its agents, one a machine, and exist under torchrun alone.

So each process writes its signs into torch.distributed's store and reads those of the others. A thread does all the
talking, because whoever asks the store hangs if the process that holds it hangs.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

_QUIET = 60.0
"""Seconds without a sign after which a process is given up. It gives one each second, whatever Python runs there."""
_LEFT = 2**31
"""The number of meetings of a process that has left for good."""
_REQUESTS = 5000
"""How many requests a second all processes together may make of the store."""


class Stopped(Exception):
    """Another process has failed, so this one need not go on."""


class Lost(RuntimeError):
    """Another process died, hangs or never came: the message says which."""


class Failed(Lost):
    """Another process has failed, and the message says why."""


class _Sign(NamedTuple):
    """What a process last said."""

    beats: int = 0
    """How many signs it gave: it lives."""
    steps: int = 0
    """How many batches it did: it does not hang."""
    meetings: int = 0
    """To how many meetings it has come."""
    trouble: str = ""
    """Why it failed."""


@dataclass
class _Other:
    """Another process, while this one waits for it."""

    sign: _Sign
    quiet: float = 0.0
    """Seconds since its last sign."""
    idle: float = 0.0
    """Seconds since it last did a batch or came to a meeting."""

    def hear(self, sign: _Sign, seconds: float) -> None:
        """Compare with what it said so many seconds ago."""
        is_quiet = sign.beats == self.sign.beats
        is_idle = (sign.steps, sign.meetings) == (self.sign.steps, self.sign.meetings)
        self.quiet = self.quiet + seconds if is_quiet else 0.0
        self.idle = self.idle + seconds if is_idle else 0.0
        self.sign = sign


class Heartbeat:
    """The signs of life of this process and of the others.

    No method waits for the store, so Ctrl-C ends all of them.
    """

    def __init__(self, store: Any, rank: int, count: int, timeout: float) -> None:
        self._store, self._rank, self._count = store, rank, count
        # Each process asks for the signs of all others: where they are many, less often.
        self._pause = max(1.0, count**2 / _REQUESTS)
        self._timeout = max(timeout, 5 * self._pause)
        self._patience = max(min(timeout, _QUIET), 5 * self._pause)
        self._steps, self._meetings, self._trouble = 0, 0, ""
        # The thread writes what follows.
        self._signs: dict[int, _Sign] = {}
        self._met = 0
        """The last meeting to which all have come."""
        self._rounds = 0
        """How often the store has answered."""
        self._told = ""
        """The trouble that has reached the store."""
        self._is_trouble = False
        """Whether any process has failed."""
        self._is_gone = False
        """Whether the store is gone."""
        self._is_waiting = self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="visualizer heartbeat", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Say that this process comes to another batch.

        Raises:
            Stopped: another process has failed.
        """
        self._steps += 1
        if self._is_trouble or self._is_gone:
            raise Stopped

    def tell(self, error: BaseException) -> None:
        """Tell the others why this process fails; returns once the store has it, as the process may end then."""
        try:
            why = str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}"
        except Exception:  # an exception class of the user's, whose __str__ fails
            why = type(error).__name__
        self._trouble = why.encode(errors="backslashreplace")[:2000].decode(errors="ignore")  # what any store takes
        end = time.monotonic() + 5
        while self._told != self._trouble and not self._is_gone and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.01)

    def meet(self, is_brief: bool = False) -> None:
        """Wait until all have come here, as long as each of the others lives and makes progress.

        Args:
            is_brief: wait no longer than it takes to notice that one died.

        Raises:
            Lost: a process died, hangs, or did not come.
            Failed: a process failed.
        """
        self._meetings += 1
        self._wait(self._meetings, 2 * self._patience if is_brief else math.inf)

    def linger(self, seconds: float) -> None:
        """Wait until the others have failed or left too, but not longer: they may still read the store."""
        self._wait(_LEFT, seconds, is_leaving=True)

    def close(self) -> None:
        """Give no more signs."""
        self._is_over = True
        self._wake.set()
        self._thread.join(5)  # it may hang with the store

    def _wait(self, meeting: int, seconds: float, is_leaving: bool = False) -> None:
        self._is_waiting = True
        self._wake.set()
        others = {rank: _Other(self._signs.get(rank, _Sign())) for rank in range(self._count) if rank != self._rank}
        rounds, unanswered, waited, now = self._rounds, 0.0, 0.0, time.monotonic()
        while True:
            before, now = now, time.monotonic()
            passed = min(now - before, 1.0)  # if this process stood still itself, the others are not to blame
            waited += passed
            unanswered = unanswered + passed if rounds == self._rounds else 0.0
            rounds = self._rounds
            for rank, other in others.items():
                other.hear(self._signs.get(rank, _Sign()), passed)
            absent = {rank: other for rank, other in others.items() if other.sign.meetings < meeting}
            is_over = waited > seconds or self._met == meeting
            if is_leaving:
                is_over = is_over or self._is_gone or all(other.sign.trouble for other in absent.values())
            elif not is_over:
                self._check(others, absent, unanswered)
            if is_over:
                self._is_waiting = False
                return
            time.sleep(0.01)

    def _check(self, others: dict[int, _Other], absent: dict[int, _Other], unanswered: float) -> None:
        """Raise Failed or Lost if anything is wrong with the others."""
        troubles = [
            f"rank {rank} failed, with {other.sign.trouble}" for rank, other in others.items() if other.sign.trouble
        ]
        if troubles:
            raise Failed(f"there are no statistics of all processes: {'; '.join(troubles)}")
        never = [rank for rank, other in absent.items() if not other.sign.beats and other.idle > self._timeout]
        dead = [rank for rank, other in others.items() if other.sign.beats and other.quiet > self._patience]
        if unanswered > 3 * self._pause:  # without the store all are silent, whether they live or not
            dead = []
        # A dead process does no batch either. A little later its silence shows that it does not hang but is dead.
        lively = {rank: other for rank, other in absent.items() if other.sign.beats and other.quiet < 3 * self._pause}
        stuck = [rank for rank, other in lively.items() if other.idle > self._timeout]
        if self._is_gone or unanswered > self._patience:
            what = ["rank 0 died or hangs: torch.distributed's store, which it usually holds, gives no answer"]
        else:
            what = [f"{_ranks(never)} did not come within {self._timeout:g} s"] if never else []
            what += [f"{_ranks(dead)} died, or gives no sign of life for {self._patience:g} s"] if dead else []
            what += [f"{_ranks(stuck)} hangs: it did no batch within {self._timeout:g} s"] if stuck else []
        if what:
            raise Lost(
                f"rank {self._rank} of {self._count} is here, but {'; '.join(what)}. What each had written to "
                "checkpoint= is there, and load() merges it."
            )

    def _talk(self) -> None:
        """What the thread runs."""
        beats, come, read, pause = 0, 0, 0.0, self._pause
        try:
            while True:
                beats, is_last = beats + 1, self._is_over
                is_waiting = self._is_waiting  # read before the number of the meeting, so that it is of this meeting
                trouble, meeting = self._trouble, self._meetings
                self._store.set(str(self._rank), f"{beats} {self._steps} {_LEFT if is_last else meeting} {trouble}")
                if trouble:
                    self._store.set("trouble", "")
                self._told = trouble
                is_trouble = bool(self._store.check(["trouble"]))
                if is_trouble or (is_waiting and time.monotonic() >= read + self._pause):
                    self._read()
                    read = time.monotonic()
                self._is_trouble = is_trouble  # after the signs, which say whose it is
                if is_waiting:
                    if self._store.add(f"at meeting {meeting}", int(come < meeting)) >= self._count:
                        self._met = meeting
                    come = meeting
                self._rounds += 1
                if is_last:
                    return
                # Often all come at once, and then nobody should wait for a second: short pauses first.
                pause = min(2 * pause, self._pause) if self._is_waiting else self._pause
                if self._wake.wait(pause):
                    self._wake.clear()
                    pause = 0.02
        except Exception:  # each kind of store raises errors of its own when its process is gone
            self._is_gone = True

    def _read(self) -> None:
        """Read the signs of the others from the store."""
        for rank in range(self._count):
            if rank != self._rank and self._store.check([str(rank)]):
                beats, steps, meetings, trouble = self._store.get(str(rank)).decode(errors="replace").split(" ", 3)
                self._signs[rank] = _Sign(int(beats), int(steps), int(meetings), trouble)


def _ranks(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, sorted(ranks)))}"

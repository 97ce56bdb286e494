"""The processes that collect together: what each takes of the data, and where they meet."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from .collected import Collected, few, numbers
from .measures import gathered

_NUMBERS = count()  # of the calls, in which processes meet

_T = TypeVar("_T")


class Batch(NamedTuple):
    """A batch of a process's share."""

    number: int
    """Where it is in the data that the process was given."""
    value: Any
    error: Exception | None = None
    """What the loader raised in its place."""
    counts: bool = True


class Stopped(Exception):
    """Another process has failed, and waits for this one to tell it why."""


class Ranks:
    """The processes that work together; one, where `torch.distributed` is not at work."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.count = 0, 1
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None
        self._times = 0
        self._looked = time.monotonic()
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        elif distributed.is_available() and distributed.is_torchelastic_launched():
            started = int(os.environ.get("WORLD_SIZE", 1))
            if started > 1:
                raise RuntimeError(
                    f"torchrun has started {started} processes, which do not know each other: call "
                    "torch.distributed.init_process_group() before collect"
                )
        if self.count > 1:
            store = distributed.distributed_c10d._get_default_store()
            self._store = distributed.distributed_c10d.PrefixStore(f"visualizer {next(_NUMBERS)}", store)
            self._come()
            try:
                # Its own group, on the CPU: it knows who is missing, and its time is ours.
                self._group = distributed.new_group(backend="gloo", timeout=self._timeout)
            except RuntimeError as error:
                raise self._incomplete(error) from error

    def share(self, batches: Iterable[Any], is_share: bool | None) -> Share:
        """This process's batches."""
        if is_share is None:
            is_share = _is_share(batches)
        return Share(batches, 0, 1) if is_share else Share(batches, self.rank, self.count)

    def in_step(self, share: Share, done: int) -> Iterator[Batch]:
        """As many batches as the process with the most has: one that has fewer gets its last again, not to count."""
        batches, spare = share.behind(max(done - 1, 0)), None
        for step in count(0 if done else 1):
            batch = next(batches, None)
            if batch is not None and batch.error is None:
                spare = batch._replace(counts=False)
            if step == 0:  # the last of those that are done
                continue
            has = torch.tensor([batch is not None, spare is not None], dtype=torch.int64)
            distributed.all_reduce(has, group=self._group)
            if has[0] == 0:
                return
            if has[1] < self.count:
                raise ValueError(
                    f"{self.count - has[1]} of {self.count} processes have no batch, and a sharded model runs on all "
                    "at once: give each at least one"
                )
            if batch is not None:
                yield batch
            if spare is not None and (batch is None or batch.error is not None):
                yield spare

    def look(self) -> None:
        """Stop, if another process has failed."""
        if self._group is not None and time.monotonic() > self._looked + 1:
            self._looked = time.monotonic()
            if self._store.check(["trouble"]):
                raise Stopped

    def all(self, do: Callable[[], _T], is_in_step: bool = False) -> list[_T]:
        """What each process makes of `do`; where one fails all do. None waits for one that is out of step."""
        if self._group is None:
            return [do()]
        self._times += 1
        own, trouble = None, None
        try:
            own = do()
        except Stopped:
            pass
        except BaseException as error:
            self._tell("trouble")
            if is_in_step or not isinstance(error, Exception):
                raise
            trouble = error
        others: list[Any] = [None] * self.count
        why = None if trouble is None else f"{type(trouble).__name__}: {trouble}"
        try:
            self._come()
            distributed.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)
            distributed.all_gather_object(others, (own, why), self._group)
        except RuntimeError as error:
            self._tell("trouble")
            raise trouble or self._incomplete(error) from error
        if trouble is not None:
            raise trouble
        failed = [f"rank {rank} failed, with {why}" for rank, (_, why) in enumerate(others) if why is not None]
        if failed:
            raise RuntimeError(f"there are no statistics of all processes: {'; '.join(failed)}")
        return [made for made, _ in others]

    def _come(self) -> None:
        """Say that this process is where all meet."""
        self._patience = time.monotonic() + self._timeout.total_seconds()
        self._tell(f"{self._times} {self.rank}")

    def _tell(self, what: str) -> None:
        with contextlib.suppress(RuntimeError):  # the process that has the store is gone
            self._store.set(what, "")

    def _incomplete(self, error: RuntimeError) -> RuntimeError:
        """Says who is missing."""
        try:
            # Rank 0's death is felt at once, and some of the others are at work yet.
            while len(missing := self._missing()) > 1 and time.monotonic() < self._patience:
                time.sleep(0.1)
        except RuntimeError:
            missing = [0]  # with it went the store
        return RuntimeError(
            f"rank {self.rank} of {self.count} is here, and rank {numbers(missing) or '?'} did not come within "
            f"{self._timeout.total_seconds():g} s, or died. What each had written to checkpoint= is there, and load() "
            f"merges it. ({str(error).partition(chr(10))[0]})"
        )

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.count) if not self._store.check([f"{self._times} {rank}"])]

    def merge(self, found: Collected) -> None:
        """Make what was found that of all processes, in each."""
        if self._group is None:
            return
        others = self.all(lambda: (found.paths, found.samples, found.batches, found.failed))
        paths = {paths for paths, *_ in others if paths}
        if len(paths) > 1:
            raise ValueError(f"the processes saw attention in different modules: {', '.join(map(few, sorted(paths)))}")
        for statistic in found._statistics:
            statistic.cpu()
            statistic.sync(dist_sync_fn=gathered, process_group=self._group)
        found.paths = paths.pop() if paths else ()
        found.samples, found.batches = sum(one for _, one, *_ in others), sum(one for _, _, one, _ in others)
        found.failed = sorted(failure for *_, failed in others for failure in failed)
        found._part = {}

    def close(self) -> None:
        """Take the group away."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)


class Share:
    """A process's batches: every n-th from the r-th on."""

    def __init__(self, batches: Iterable[Any], first: int, step: int) -> None:
        self._batches, self._first, self._step = batches, first, step
        self._length: int | None = None
        self.size: int | None = None
        """How many these are, where it is known."""
        with contextlib.suppress(TypeError, NotImplementedError):  # a loader of an iterable data set has no length
            self._length = len(batches)  # type: ignore[arg-type]
            self.size = len(range(first, self._length, step))

    def behind(self, done: int) -> Iterator[Batch]:
        """Each batch but the first."""
        return islice(self._each(), self._first + done * self._step, None, self._step)

    def _each(self) -> Iterator[Batch]:
        batches, error = iter(self._batches), None
        for number in count():
            try:
                value = next(batches)
            except StopIteration:
                if error is not None and number != self._length:  # a generator, say: what it would have given is lost
                    raise error from None
                return
            except Exception as raised:
                error = raised
                yield Batch(number, None, error)
            else:
                error = None
                yield Batch(number, value)


def _is_share(batches: Any) -> bool:
    """Whether a loader gives each process a share of its own, as torch, timm and accelerate make them."""
    samplers = [getattr(holder, "sampler", None) for holder in (batches, getattr(batches, "batch_sampler", None))]
    is_split = any(hasattr(sampler, "num_replicas") for sampler in samplers)
    return is_split or type(batches).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")

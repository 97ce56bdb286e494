"""The processes that collect together: which batches each takes, and where they wait for one another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import distributed

from .base import gathered
from .collected import Collected, without_states
from .heartbeat import Failed, Heartbeat, Lost, Stopped
from .moments import merge_states

_number = count()
_worlds: WeakKeyDictionary[Any, tuple[int, count[int]]] = WeakKeyDictionary()
"""A number for each default group that there has been, and a counter of its calls of `collect`. Together they make a
prefix in the store, because a store may outlive a group, and would still hold what was said there."""

_T = TypeVar("_T")


class Batch(NamedTuple):
    """A batch of a process's share."""

    number: int
    """Its place in the data that the process was given."""
    value: Any
    error: Exception | None = None
    """What the loader raised instead of giving it."""
    counts: bool = True


class Processes:
    """The processes that work together; this one alone where `torch.distributed` is not initialised."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.count = 0, 1
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None
        self._heartbeat: Heartbeat | None = None
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
            inside = distributed.distributed_c10d
            world, calls = _worlds.setdefault(inside._get_default_group(), (next(_number), count()))
            store = inside.PrefixStore(f"visualizer {world} {next(calls)}", _reconnected(inside._get_default_store()))
            self._heartbeat = Heartbeat(store, self.rank, self.count, timeout)
            try:
                self._heartbeat.meet()
                # A group of our own, on the CPU, whatever the default group is.
                self._group = distributed.new_group(backend="gloo", timeout=self._timeout)
            except BaseException as error:
                self._give_up(error)
                self.close()
                raise

    def share(self, batches: Iterable[Any], is_share: bool | None) -> Share:
        """This process's batches."""
        if is_share is None:
            is_share = _is_share(batches)
        first, step = (0, 1) if is_share else (self.rank, self.count)
        return Share(batches, first, step, None if self._heartbeat is None else self._heartbeat.step)

    def in_step(self, share: Share, done: int) -> Iterator[Batch]:
        """The batches of a share behind those that are done, as many as the process with the most has.

        A sharded model needs all processes for each batch, so a process that has fewer gets its last batch again; that
        one does not count.
        """
        batches = share.behind(max(done - 1, 0))
        spare = _as_spare(next(batches, None)) if done else None  # the last one that is done
        while True:
            batch = next(batches, None)
            while spare is None and batch is not None and batch.error is not None:
                yield batch  # without a batch to run in its place, the model cannot run yet
                batch = next(batches, None)
            spare = _as_spare(batch) or spare
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

    def all_gather(self, do: Callable[[], _T], is_in_step: bool = False) -> list[_T]:
        """Call a function in each process; what it returned in all of them, by rank. If it fails in one, all raise.

        Args:
            is_in_step: the processes need each other inside `do`. If one fails there, torch raises errors in the others
                that do not say why: they wait for the reason.
        """
        if self._heartbeat is None:
            return [do()]
        own: Any = None
        by_rank: list[Any] = [None] * self.count
        try:
            try:
                with contextlib.suppress(Stopped):  # `meet` says why
                    own = do()
                self._heartbeat.meet()
                is_in_step = True
                distributed.all_gather_object(by_rank, own, self._group)
            except RuntimeError as error:
                if is_in_step and _is_of_others(error):
                    self._heartbeat.meet(is_brief=True)  # raises the reason
                raise
        except BaseException as error:
            self._give_up(error)
            raise
        return by_rank

    def _give_up(self, error: BaseException) -> None:
        """Tell the others why this process fails, and stay until they have read it."""
        if self._heartbeat is None:
            return
        if not isinstance(error, Failed):
            self._heartbeat.tell(error)
        if self.rank == 0:  # the store usually ends with this process, and with it the reason
            self._heartbeat.linger(10 if isinstance(error, Exception) and type(error) is not Lost else 2)

    def merge(self, found: Collected) -> Collected:
        """The statistics of all processes, in each of them; `found` are those of this one."""
        if self._heartbeat is None:
            return found
        states, found.states = found.states, {}
        whole = without_states(self.all_gather(lambda: found))
        whole.failed.sort()

        def gather_states() -> None:
            for name, state in states.items():
                whole.states[name] = merge_states(torch.stack(gathered(state.cpu(), self._group)))

        self.all_gather(gather_states, is_in_step=True)
        return whole

    def close(self) -> None:
        """End the group and the heartbeat."""
        group, self._group = self._group, None  # an error's traceback may hold `self`, and with it the connections
        try:
            if group is not None:
                distributed.destroy_process_group(group)
        finally:
            if self._heartbeat is not None:
                self._heartbeat.close()


class Share:
    """A process's batches: every n-th from the r-th on."""

    def __init__(
        self, batches: Iterable[Any], first: int, step: int, on_batch: Callable[[], None] | None = None
    ) -> None:
        self._batches, self._first, self._step = batches, first, step
        self._on_batch = on_batch
        """Called before each batch is loaded, also before those that are skipped."""
        self._length: int | None = None
        self.size: int | None = None
        """How many batches these are; None: not known."""
        with contextlib.suppress(TypeError, NotImplementedError):  # a loader of an iterable data set has no length
            self._length = len(batches)  # type: ignore[arg-type]
            self.size = len(range(first, self._length, step))

    def behind(self, done: int) -> Iterator[Batch]:
        """All batches but the first `done`."""
        return islice(self._load(), self._first + done * self._step, None, self._step)

    def _load(self) -> Iterator[Batch]:
        batches, error = iter(self._batches), None
        for number in count():
            if self._on_batch is not None:
                self._on_batch()
            try:
                value = next(batches)
            except StopIteration:
                # An error ends a generator, so batches are missing behind it; a loader of known length had no more.
                if error is not None and number != self._length:
                    raise error from None
                return
            except Exception as raised:
                error = raised
                yield Batch(number, None, error)
            else:
                error = None
                yield Batch(number, value)


def _as_spare(batch: Batch | None) -> Batch | None:
    """The batch to be run again without counting; None where there is none that can be run."""
    return None if batch is None or batch.error is not None else batch._replace(counts=False)


def _reconnected(store: Any) -> Any:
    """The store by a connection of its own, if it has one: another thread may wait on the first for long."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError, NotImplementedError):
        return store


def _is_of_others(error: RuntimeError) -> bool:
    """Whether torch only says that another process is gone or late."""
    kinds = getattr(distributed, "DistError", ())
    return isinstance(error, kinds) or any(name in str(error) for name in ("gloo", "NCCL"))


def _is_share(batches: Any) -> bool:
    """Whether a loader gives each process a share of its own, as those of torch, timm and accelerate do."""
    while hasattr(batches, "iterable"):  # inside a progress bar of tqdm
        batches = batches.iterable
    samplers = [getattr(holder, "sampler", None) for holder in (batches, getattr(batches, "batch_sampler", None))]
    is_split = any(getattr(sampler, "num_replicas", 1) > 1 for sampler in samplers)
    return is_split or type(batches).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")

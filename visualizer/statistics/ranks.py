"""The processes that collect together: what each takes of the data, and where they meet."""

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

from .collected import Collected, few
from .measures import gathered
from .signs import Failed, Lost, Signs, Stopped

_number = count()
_worlds: WeakKeyDictionary[Any, tuple[int, count[int]]] = WeakKeyDictionary()
"""The groups of all processes that there have been, numbered, and of each its calls of `collect`: a store of theirs may
outlive a group, with what was said there."""

_T = TypeVar("_T")


class Batch(NamedTuple):
    """A batch of a process's share."""

    number: int
    """Where it is in the data that the process was given."""
    value: Any
    error: Exception | None = None
    """What the loader raised in its place."""
    counts: bool = True


class Ranks:
    """The processes that work together; one, where `torch.distributed` is not at work."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.count = 0, 1
        self._timeout = timedelta(seconds=timeout)
        self._group: Any = None
        self._signs: Signs | None = None
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
            store = inside.PrefixStore(f"visualizer {world} {next(calls)}", _own(inside._get_default_store()))
            self._signs = Signs(store, self.rank, self.count, timeout)
            try:
                self._signs.meet()
                # Its own group, on the CPU.
                self._group = distributed.new_group(backend="gloo", timeout=self._timeout)
            except BaseException as error:
                self._give_up(error)
                self.close()
                raise

    def share(self, batches: Iterable[Any], is_share: bool | None) -> Share:
        """This process's batches."""
        if is_share is None:
            is_share = _is_share(batches)
        first, each = (0, 1) if is_share else (self.rank, self.count)
        return Share(batches, first, each, None if self._signs is None else self._signs.step)

    def in_step(self, share: Share, done: int) -> Iterator[Batch]:
        """As many batches as the process with the most has: one that has fewer gets its last again, not to count."""
        batches, spare = share.behind(max(done - 1, 0)), None
        for step in count(0 if done else 1):
            batch = next(batches, None)
            while step and spare is None and batch is not None and batch.error is not None:
                yield batch  # it needs no model, and the model needs one that can be loaded
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

    def all(self, do: Callable[[], _T], is_in_step: bool = False) -> list[_T]:
        """What each process makes of `do`; where one fails all do.

        Args:
            is_in_step: the processes need each other for it: where one fails, the others fail in the middle.
        """
        if self._signs is None:
            return [do()]
        own: Any = None
        others: list[Any] = [None] * self.count
        try:
            try:
                with contextlib.suppress(Stopped):
                    own = do()
                self._signs.meet()
                is_in_step = True
                distributed.all_gather_object(others, own, self._group)
            except RuntimeError as error:
                if is_in_step and _is_of_others(error):
                    self._signs.meet(is_brief=True)  # finds out who it is
                raise
        except BaseException as error:
            self._give_up(error)
            raise
        return others

    def _give_up(self, error: BaseException) -> None:
        """Tell the others of an error, and let them hear of it."""
        if self._signs is None:
            return
        if not isinstance(error, Failed):
            self._signs.tell(error)
        if self.rank == 0:  # with it goes the store, usually, and nobody hears anything any more
            self._signs.linger(10 if isinstance(error, Exception) and type(error) is not Lost else 2)

    def merge(self, found: Collected) -> None:
        """Make what was found that of all processes, in each."""
        if self._signs is None:
            return
        others = self.all(lambda: (found.paths, found.samples, found.batches, found.failed, found._part["runs"]))
        paths = {paths for paths, *_ in others if paths}
        if len(paths) > 1:
            raise ValueError(f"the processes saw attention in different modules: {', '.join(map(few, sorted(paths)))}")

        def sync() -> None:
            for statistic in found._statistics:
                statistic.cpu()
                statistic.sync(dist_sync_fn=gathered, process_group=self._group)

        self.all(sync, is_in_step=True)
        found.paths = paths.pop() if paths else ()
        found.samples, found.batches = sum(one for _, one, *_ in others), sum(one for _, _, one, *_ in others)
        found.failed = sorted(failure for *_, failed, _ in others for failure in failed)
        found._part["runs"] = [run for *_, runs in others for run in runs]
        del found._part["rank"]

    def close(self) -> None:
        """Take the group away, and give no sign any more."""
        group, self._group = self._group, None  # whoever holds an error holds this, and would hold the connections
        try:
            if group is not None:
                distributed.destroy_process_group(group)
        finally:
            if self._signs is not None:
                self._signs.close()


class Share:
    """A process's batches: every n-th from the r-th on."""

    def __init__(self, batches: Iterable[Any], first: int, step: int, told: Callable[[], None] | None = None) -> None:
        self._batches, self._first, self._step = batches, first, step
        self._told = told
        """What hears of each batch, those too that are skipped."""
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
            if self._told is not None:
                self._told()
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


def _own(store: Any) -> Any:
    """The store by a connection of its own, where it has one: another thread may wait on the first for long."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError, NotImplementedError):
        return store


def _is_of_others(error: RuntimeError) -> bool:
    """Whether it only says that another process is gone, or late."""
    kinds = getattr(distributed, "DistError", ())
    return isinstance(error, kinds) or any(name in str(error) for name in ("gloo", "NCCL"))


def _is_share(batches: Any) -> bool:
    """Whether a loader gives each process a share of its own, as torch, timm and accelerate make them."""
    while hasattr(batches, "iterable"):  # a bar of tqdm's
        batches = batches.iterable
    samplers = [getattr(holder, "sampler", None) for holder in (batches, getattr(batches, "batch_sampler", None))]
    is_split = any(getattr(sampler, "num_replicas", 1) > 1 for sampler in samplers)
    return is_split or type(batches).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")

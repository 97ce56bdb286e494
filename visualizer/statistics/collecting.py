"""`collect(model, batches, *statistics)`: a model over a data set, of which only what adds up is kept."""

from __future__ import annotations

import contextlib
import copy
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import count, islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ..errors import FileFormatError, warn
from ..instrument import named_modules
from ..intercept import attention
from ..store import Record, as_html, as_text, load, write
from .measures import Statistic, Texts, gathered, measured
from .moments import Moments, as_large, merged

_VARIABLE = "statistics moments"  # in a file's records; no local variable is called so
_FEW, _MANY = 3, 100  # failures in a row, before a batch has worked and after: then it is not the data that is wrong

_NUMBERS = count()  # of the calls, in which processes meet

_T = TypeVar("_T")


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *statistics: Statistic,
    call: Callable[[nn.Module, Any], Any] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    every: int = 100,
    is_share: bool | None = None,
    timeout: float = 1800.0,
    progress: bool = True,
) -> Collected:
    """Statistics of a model's attention over a whole data set, in memory that does not grow with it.

    >>> import torch
    >>> from visualizer.statistics import Confidence, Entropy, collect
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=3)
    >>> found = collect(model, torch.randn(10, 8, 5, 16), Entropy(), Confidence())  # 10 batches of 8
    >>> found
    <statistics of 80 images or texts in 10 batches
      statistic   numbers            samples
      entropy     3 layers, 2 heads  80
      confidence  3 layers, 2 heads  80>
    >>> found["entropy"].mean.shape
    (3, 2)
    >>> found.save("/tmp/entropy.safetensors")  # doctest: +SKIP

    Each call of attention is reduced to its moments as it is made, fused or not, so no map outlives its call. The model
    runs without gradients and in eval mode, and has its own mode back at the end; autocast around `collect` holds,
    modules that `torch.compile` has compiled run uncompiled.

    **Many processes.** Under `torchrun` or `accelerate launch`, with `torch.distributed` initialised, each process runs
    its share of the batches, and all return the statistics of all. A process that fails ends the others behind the
    batch they are at, one that dies ends them as they come to the end, `timeout` seconds later at most.
    `DistributedDataParallel` leaves out what only training needs, so shares may be of any size. A model sharded by FSDP
    (1 or 2; tested on CPUs) runs on all processes at once: one that has fewer batches runs its last one again, which
    does not count, and a batch that fails in the model ends the run. Models that accelerate spread over devices
    (`device_map`, offloading) run as they are; tensor-parallel ones are not supported.

    Args:
        model: any model that `visualizer.attention` reads.
        batches: any iterable: a `DataLoader`, a generator, a tensor of batches. A mapping goes to the model as keyword
            arguments, of a tuple or list the first entry, anything else as it is; tensors are moved to the model's
            device. The "attention_mask" and "input_ids" of a mapping tell the statistics what is padding, and which
            tokens repeat.
        statistics: what to measure; they are copied, and those you pass stay as they are.
        call: how the model is called, if not so: `lambda model, batch: model.encode(batch["image"])`.
        checkpoint: a folder. Every so many batches what is known is written there, as rank-0.safetensors, in one step;
            a run that is started again goes on behind it, and skips the batches that are done: they must come in the
            same order. What is finished there is returned at once.
        every: how many batches lie between two writings.
        is_share: whether `batches` is this process's share already; None: rank r of n loads all and runs every n-th
            from the r-th on, unless the loader has a `DistributedSampler` or is one of accelerate's. (These load only
            what they run, but repeat samples to make shares even, which count twice.)
        timeout: how many seconds a process waits for the others, before it says which are missing.
        progress: whether a bar is shown, on terminals only.

    Returns:
        The statistics by their names, over all processes, in each of them.

    Raises:
        ValueError: there is no statistic, two have one name, there is no batch or no attention, or a checkpoint is of
            other statistics, another model, or another number of processes.
        FileFormatError: the checkpoint is damaged.
        RuntimeError: another process failed, or did not come in time; or `torchrun` has started several, and
            `torch.distributed` is not initialised.
        Exception: what the model or the loader raised, where the first three batches fail, or later a hundred in a row,
            or where the loader has no more behind it. Any other batch that fails is warned about and counted in
            `failed`, and the rest goes on.
    """
    names = [statistic.name for statistic in statistics]
    if not statistics:
        raise ValueError("pass the statistics to collect, such as visualizer.statistics.Entropy()")
    if len({*names}) < len(names):
        raise ValueError(f"two statistics have one name: {names}; give one of them another, by name=")
    if every < 1:
        raise ValueError(f"every={every!r}: pass how many batches, 1 or more")
    ranks = _Ranks(timeout)
    file = None if checkpoint is None else Path(checkpoint) / f"rank-{ranks.rank}.safetensors"
    found = Collected(copy.deepcopy(statistics))
    found._is_complete = False
    found._part = {"rank": ranks.rank, "ranks": ranks.count, "model": _fingerprint(model)}
    is_in_step = _is_sharded(model) and ranks.count > 1

    def begin() -> bool:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                found._resume(file)
            if not found._is_complete:
                found._save(file)  # that this cannot be done is better known now than after hours
        return found._is_complete

    def run() -> None:
        done = found.batches + len(found.failed)
        share = ranks.share(batches, is_share)
        some = ranks.in_step(share, done) if is_in_step else share.behind(done)
        with _bar(share.size, done, progress and not ranks.rank) as bar:

            def after(is_good: bool) -> None:
                bar.update()
                ranks.look()
                # Not among failures: a run that they end, as when a GPU hangs, is to go on behind what was good.
                if file is not None and is_good and (found.batches + len(found.failed)) % every == 0:
                    found._save(file)

            _run(model, some, found, call, is_in_step, after)
        found._is_complete = True
        if file is not None:
            found._save(file)

    try:
        if not all(ranks.all(begin)):
            ranks.all(run, is_in_step)
        ranks.merge(found)
    finally:
        ranks.close()
    if not found.paths:
        why = f"{len(found.failed)} failed, with {found.failed[0][1]}" if found.failed else "there were none"
        raise ValueError(f"no batch gave statistics: {why}")
    return found


def _bar(size: int | None, done: int, is_shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=size, initial=done, unit="batch", disable=None if is_shown else True)  # None: without a terminal


class _Batch(NamedTuple):
    number: int
    """Where it is in the data that the process was given."""
    value: Any
    error: Exception | None = None
    """What the loader raised in its place."""
    counts: bool = True


def _run(
    model: nn.Module,
    batches: Iterator[_Batch],
    found: Collected,
    call: Callable[[nn.Module, Any], Any] | None,
    is_in_step: bool,
    after: Callable[[bool], None],
) -> None:
    """Run each batch and take its statistics in, or note that it failed; `after` is told which."""
    # On the meta device are parameters that accelerate holds elsewhere until they are needed.
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    texts, row = Texts(), 0

    def reduced(layer: Any) -> tuple[str, int, list[Tensor]]:
        return layer.path, layer.shape[0], measured(layer, texts, found._statistics)

    with _evaluating(model), torch.no_grad(), attention(model, keep=reduced, max_bytes=2**62) as maps:
        for number, value, trouble, counts in batches:
            maps.clear()
            try:
                if trouble is not None:
                    raise trouble
                batch = _moved(value, device)
                texts.mask, texts.ids = _about(batch, "attention_mask"), _about(batch, "input_ids")
                _called(model, batch) if call is None else call(model, batch)
                if not counts:
                    continue
                found._take(list(maps))
                row = 0
            except Exception as error:
                row += 1
                is_out_of_step = is_in_step and trouble is None
                if is_out_of_step or row == (_MANY if found.batches else _FEW):
                    raise
                found.failed.append((number, f"{type(error).__name__}: {error}"))
                warn(f"batch {number} failed and does not count: {found.failed[-1][1]}")
            after(row == 0)


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the model's device."""
    if callable(getattr(batch, "to", None)):  # what transformers' tokenizers make has it too
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [_moved(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def _about(batch: Any, name: str) -> Tensor | None:
    found = batch.get(name) if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model as it is to be without training, and then again as it was."""
    training = [module for module in model.modules() if module.training]
    # Their first forward pass sends buffers around, and would wait for a process that has no batch.
    wrappers = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    sending = [wrapper for wrapper in wrappers if wrapper.require_forward_param_sync]
    model.eval()
    for wrapper in sending:
        wrapper.require_forward_param_sync = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for wrapper in sending:
            wrapper.require_forward_param_sync = True


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP holds parts of the model on each process, so that no process runs it alone."""
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return not classes.isdisjoint({"FullyShardedDataParallel", "FSDPModule"})


def _fingerprint(model: nn.Module) -> str:
    """What tells models apart: their parameters' names and shapes, and of each the first numbers."""
    told = []
    for path, module in named_modules(model):
        for name, tensor in module.named_parameters(recurse=False):
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                continue
            own = tensor.detach()
            own = own.to_local() if hasattr(own, "to_local") else own
            told.append((path, name, tuple(own.shape), [] if own.is_meta else own.reshape(-1)[:4].cpu().tolist()))
    return f"{zlib.crc32(repr(told).encode()):08x}"


class Collected(Mapping[str, Moments]):
    """Statistics by their names, made by `collect` or read by `visualizer.load`: `found["entropy"].mean`."""

    paths: tuple[str, ...]
    """The modules that the layers are, in the order of their calls."""

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        self._statistics = list(statistics)
        self._settings = {statistic.name: statistic.settings for statistic in statistics}
        for statistic in self._statistics:
            statistic.reset()
        self._states: dict[str, Tensor] = {}
        self._is_complete = True
        self._part: dict[str, Any] = {}
        """Of a process's file: its "rank", of how many "ranks", and the fingerprint of its "model"."""
        self.paths = ()
        self.samples = 0
        """How many images or texts were seen: the smallest batch of a layer, as windows are more, over all batches."""
        self.batches = 0
        """How many batches counted."""
        self.failed: list[tuple[int, str]] = []
        """The batches that failed, by their numbers in the data (or in their process's share of it), and why."""
        self.about: dict[str, Any] = {}
        """What `save` was given beside the statistics."""

    def __getitem__(self, name: str) -> Moments:
        if name not in self._settings:
            raise KeyError(f"there is no statistic {name!r}; there are {', '.join(map(repr, self))}")
        return Moments.of(self._state(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def save(self, path: str | PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write the statistics to a `.safetensors` file, which `visualizer.load` reads and merges with others."""
        self._save(path, about)

    def __repr__(self) -> str:
        return as_text(*self._table())

    def _repr_html_(self) -> str:
        return as_html(*self._table())

    def _table(self) -> tuple[str, list[tuple[str, ...]]]:
        rows: list[tuple[str, ...]] = [("statistic", "numbers", "samples")]
        for name, moments in self.items():
            axes = ("layers", "heads", "of each")
            shape = moments.count.shape
            numbers = ", ".join([f"{size} {axis}" for size, axis in zip(shape, axes, strict=False)])
            numbers = numbers if len(shape) < 4 else f"{shape[0]} layers, {shape[1]} heads, {shape[2]} x {shape[3]}"
            least, most = (int(f(moments.count)) if moments.count.size else 0 for f in (np.min, np.max))
            rows.append((name, numbers, str(most) if least == most else f"{least} to {most}"))
        more = f", {len(self.failed)} failed" if self.failed else ""
        more += "" if self._is_complete else ", unfinished"
        return f"statistics of {self.samples} images or texts in {self.batches} batches{more}", rows

    def _state(self, name: str) -> Tensor:
        if name in self._states:
            return self._states[name]
        return next(statistic.moments for statistic in self._statistics if statistic.name == name)

    def _take(self, calls: list[tuple[str, int, list[Tensor]]]) -> None:
        """Take in what was made of a batch's calls, all or nothing."""
        paths = tuple(path for path, _, _ in calls)
        if not paths:
            raise ValueError("no attention was seen in this batch. Has the model any?")
        if self.paths and paths != self.paths:
            raise ValueError(
                f"this batch had attention in {len(paths)} calls, {_few(paths)}, and those before in "
                f"{len(self.paths)}, {_few(self.paths)}: statistics are those of the same layers"
            )
        before = [statistic.moments for statistic in self._statistics]
        try:
            for number, statistic in enumerate(self._statistics):
                statistic.take([states[number] for _, _, states in calls])
        except BaseException:
            for statistic, moments in zip(self._statistics, before, strict=True):
                statistic.moments = moments
            raise
        self.paths = paths
        self.samples += min(size for _, size, _ in calls)  # windows are more than images
        self.batches += 1

    def _save(self, path: str | PathLike[str], about: dict[str, Any] | None = None) -> None:
        records = [
            Record(name, _VARIABLE, self._state(name).detach().cpu().numpy(), number, None, 0, None)
            for number, name in enumerate(self)
        ]
        own = {
            "part": self._part,
            "paths": list(self.paths),
            "samples": self.samples,
            "batches": self.batches,
            "failed": [list(one) for one in self.failed],
            "settings": self._settings,
            "is complete": self._is_complete,
        }
        write(path, list(self), records, {"statistics": own, "about": self.about if about is None else about})

    def _resume(self, file: Path) -> None:
        """Go on from what a run before wrote."""
        try:
            cache = load(file)
        except FileFormatError as error:
            raise FileFormatError(f"{error}; or remove it, and this process's share begins anew") from error
        if not are_statistics(cache.records):
            raise ValueError(f"{file} is no checkpoint of statistics: choose another folder")
        before = restored(cache.records, cache.about)
        for what, own, others in (
            ("statistics", self._settings, before._settings),
            (
                "a number of processes, each of which goes on with its own share,",
                self._part["ranks"],
                before._part.get("ranks"),
            ),
            ("a model", self._part["model"], before._part.get("model")),
        ):
            if own != others:
                raise ValueError(
                    f"{file} is of another run, with {what} {others}, where this one has {own}: choose a new folder"
                )
        for statistic in self._statistics:
            statistic.moments = before._states[statistic.name].to(statistic.moments.device)
        self.paths, self.samples, self.batches = before.paths, before.samples, before.batches
        self.failed, self._is_complete = before.failed, before._is_complete


def restored(records: Sequence[Record], about: dict[str, Any]) -> Collected:
    """The statistics that a file's records are."""
    found, own = Collected([]), about["statistics"]
    found._states = {record.key: torch.from_numpy(np.array(record.value)) for record in records}
    found._settings, found._part, found.paths = own["settings"], own["part"], tuple(own["paths"])
    found.samples, found.batches, found._is_complete = own["samples"], own["batches"], own["is complete"]
    found.failed = [(number, why) for number, why in own["failed"]]
    found.about = about["about"]
    return found


def are_statistics(records: Sequence[Record]) -> bool:
    """Whether a file's records are those of statistics."""
    return bool(records) and records[0].variable == _VARIABLE


def merge(parts: Sequence[Collected]) -> Collected:
    """All parts together; ValueError where they are of different statistics or models."""
    first = next((part for part in parts if part.paths), parts[0])
    whole = Collected([])
    for part in parts:
        if part._settings != first._settings or (part.paths and part.paths != first.paths):
            raise ValueError("these are of different statistics or models, which cannot be merged")
    ranks = {part._part.get("ranks", 1) for part in parts}
    missing = {*range(max(ranks))} - {part._part.get("rank", 0) for part in parts}
    if missing:
        warn(f"of a run of {max(ranks)} processes the files of these are missing: {_numbers(missing)}")
    whole._settings, whole.paths = first._settings, first.paths
    for name in first:
        whole._states[name] = merged(torch.stack(as_large([part._state(name) for part in parts])))
    whole.samples, whole.batches = sum(part.samples for part in parts), sum(part.batches for part in parts)
    whole.failed = [failure for part in parts for failure in part.failed]
    whole.about = first.about
    whole._is_complete = all(part._is_complete for part in parts)
    return whole


class _Stopped(Exception):
    """Another process has failed, and waits for this one to tell it why."""


class _Ranks:
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
            self._tell(f"{self._times} {self.rank}")
            try:
                # Its own group, on the CPU: it knows who is missing, and its time is ours.
                self._group = distributed.new_group(backend="gloo", timeout=self._timeout)
            except RuntimeError as error:
                raise self._incomplete(error) from error

    def share(self, batches: Iterable[Any], is_share: bool | None) -> _Share:
        """This process's batches."""
        if is_share is None:
            is_share = _is_share(batches)
        return _Share(batches, 0, 1) if is_share else _Share(batches, self.rank, self.count)

    def in_step(self, share: _Share, done: int) -> Iterator[_Batch]:
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
                raise _Stopped

    def all(self, do: Callable[[], _T], is_in_step: bool = False) -> list[_T]:
        """What each process makes of `do`; where one fails all do. None waits for one that is out of step."""
        if self._group is None:
            return [do()]
        self._times += 1
        own, trouble = None, None
        try:
            own = do()
        except _Stopped:
            pass
        except BaseException as error:
            self._tell("trouble")
            if is_in_step or not isinstance(error, Exception):
                raise
            trouble = error
        others: list[Any] = [None] * self.count
        why = None if trouble is None else f"{type(trouble).__name__}: {trouble}"
        try:
            self._tell(f"{self._times} {self.rank}")
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

    def _tell(self, what: str) -> None:
        with contextlib.suppress(RuntimeError):  # the process that has the store is gone
            self._store.set(what, "")

    def _incomplete(self, error: RuntimeError) -> RuntimeError:
        """Says who is missing."""
        try:
            missing = [rank for rank in range(self.count) if not self._store.check([f"{self._times} {rank}"])]
        except RuntimeError:
            missing = [0]  # with it went the store
        return RuntimeError(
            f"rank {self.rank} of {self.count} is here, and rank {_numbers(missing) or '?'} did not come within "
            f"{self._timeout.total_seconds():g} s, or died. What each had written to checkpoint= is there, and load() "
            f"merges it. ({str(error).partition(chr(10))[0]})"
        )

    def merge(self, found: Collected) -> None:
        """Make what was found that of all processes, in each."""
        if self._group is None:
            return
        others = self.all(lambda: (found.paths, found.samples, found.batches, found.failed))
        paths = {paths for paths, *_ in others if paths}
        if len(paths) > 1:
            raise ValueError(f"the processes saw attention in different modules: {', '.join(map(_few, sorted(paths)))}")
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


class _Share:
    """A process's batches: every n-th from the r-th on."""

    def __init__(self, batches: Iterable[Any], first: int, step: int) -> None:
        self._batches, self._first, self._step = batches, first, step
        self._length: int | None = None
        self.size: int | None = None
        """How many these are, where it is known."""
        with contextlib.suppress(TypeError, NotImplementedError):  # a loader of an iterable data set has no length
            self._length = len(batches)  # type: ignore[arg-type]
            self.size = len(range(first, self._length, step))

    def behind(self, done: int) -> Iterator[_Batch]:
        """Each batch but the first."""
        return islice(self._each(), self._first + done * self._step, None, self._step)

    def _each(self) -> Iterator[_Batch]:
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
                yield _Batch(number, None, error)
            else:
                error = None
                yield _Batch(number, value)


def _is_share(batches: Any) -> bool:
    """Whether a loader gives each process a share of its own, as torch, timm and accelerate make them."""
    samplers = [getattr(holder, "sampler", None) for holder in (batches, getattr(batches, "batch_sampler", None))]
    is_split = any(hasattr(sampler, "num_replicas") for sampler in samplers)
    return is_split or type(batches).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")


def _few(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (" ..." if len(paths) > 3 else "")


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))

"""`collect(model, batches, *statistics)`: a model over a data set, of which only what adds up is kept."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from os import PathLike
from pathlib import Path
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ..errors import warn
from ..intercept import attention
from ..store import Record, as_html, as_text, load, write
from .measures import Statistic, Texts, gathered
from .moments import Moments, as_large, merged

_VARIABLE = "statistics moments"  # in a file's records; no local variable is called so
_HOPELESS = 3  # batches that fail before any has worked: then it is the call that is wrong, not the data


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
        is_share: whether `batches` is this process's share already; None: where `torch.distributed` is at work, rank r
            of n takes every n-th batch from the r-th on, unless the loader has a `DistributedSampler` or is one of
            accelerate's. (A `DistributedSampler` repeats some samples to make shares even, which count twice.)
        timeout: how many seconds a process waits for the others at the end, before it says which are missing.
        progress: whether a bar is shown, on terminals only.

    Returns:
        The statistics by their names, over all processes, in each of them.

    Raises:
        ValueError: there is no statistic, two have one name, no batch had attention, or a checkpoint is of other
            statistics, another model, or another number of processes.
        RuntimeError: another process failed, or did not come to the end in time.
        Exception: what the model raised, where the first three batches all fail. Later, a batch that fails is warned
            about and counted in `failed`, and the rest goes on.
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
    trouble: Exception | None = None
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            found._resume(file, ranks)
        if not found._is_complete:
            share = ranks.share(batches, is_share)
            _run(model, share, found, call, lambda: _write(found, file, ranks), every, progress and not ranks.rank)
            found._is_complete = True
            _write(found, file, ranks)
    except Exception as error:  # the others wait for this process
        if ranks.count == 1:
            raise
        trouble = error
    ranks.merge(found, trouble)
    if not found.paths:
        why = f"; {len(found.failed)} failed, with {found.failed[0][1]}" if found.failed else ""
        raise ValueError(f"no attention was seen in {found.batches} batches{why}. Has the model any?")
    return found


def _write(found: Collected, file: Path | None, ranks: _Ranks) -> None:
    if file is not None:
        found._save(file, {"rank": ranks.rank, "ranks": ranks.count})


def _run(
    model: nn.Module,
    share: _Share,
    found: Collected,
    call: Callable[[nn.Module, Any], Any] | None,
    write: Callable[[], None],
    every: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    devices = [tensor.device for tensor in model.parameters() if not tensor.is_meta]  # meta: offloaded by accelerate
    device = devices[0] if devices else torch.device("cpu")
    texts, worked, missed = Texts(), 0, 0

    def reduced(layer: Any) -> tuple[str, int, list[Tensor]]:
        return layer.path, layer.shape[0], [statistic.reduced(layer, texts) for statistic in found._statistics]

    done = found.batches + len(found.failed)
    bar = tqdm(total=share.size, initial=done, unit="batch", disable=None if progress else True)  # None: no terminal
    with _evaluating(model), torch.no_grad(), bar, attention(model, keep=reduced, max_bytes=2**62) as maps:
        for batch, trouble in share.behind(done):
            maps.clear()
            try:
                if trouble is not None:
                    raise trouble
                batch = _moved(batch, device)
                texts.mask, texts.ids = _about(batch, "attention_mask"), _about(batch, "input_ids")
                _called(model, batch) if call is None else call(model, batch)
                found._take(list(maps))
                worked += 1
            except Exception as error:
                found.failed.append((done, f"{type(error).__name__}: {error}"))
                missed += 1
                if not worked and missed == _HOPELESS:
                    raise
                warn(f"batch {done} failed and does not count: {type(error).__name__}: {error}")
            done += 1
            bar.update()
            if done % every == 0:
                write()


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the model's device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return [_moved(value, device) for value in batch] if type(batch) in (tuple, list) else batch


def _about(batch: Any, name: str) -> Tensor | None:
    found = batch.get(name) if isinstance(batch, Mapping) else None
    return found if isinstance(found, Tensor) and found.ndim == 2 else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Collected(Mapping[str, Moments]):
    """Statistics by their names, made by `collect` or read by `visualizer.load`: `found["entropy"].mean`."""

    paths: tuple[str, ...]
    """The modules that the layers are, in the order of their calls."""

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        self._statistics = list(statistics)
        self._names = [statistic.name for statistic in statistics]
        self._settings = [statistic.settings for statistic in statistics]
        for statistic in self._statistics:
            statistic.reset()
        self._states: dict[str, Tensor] = {}
        self._is_complete = False
        self.paths = ()
        self.samples = 0
        """How many images or texts were seen: the largest batch of a layer, over all batches."""
        self.batches = 0
        """How many batches counted."""
        self.failed: list[tuple[int, str]] = []
        """The batches that failed, by their numbers in their process's share, and why."""
        self.about: dict[str, Any] = {}
        """What `save` was given beside the statistics."""

    def __getitem__(self, name: str) -> Moments:
        if name not in self._names:
            raise KeyError(f"there is no statistic {name!r}; there are {', '.join(map(repr, self._names))}")
        return Moments.of(self._state(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def save(self, path: str | PathLike[str], about: dict[str, Any] | None = None) -> None:
        """Write the statistics to a `.safetensors` file, which `visualizer.load` reads and merges with others."""
        self._save(path, {}, about)

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
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"statistics of {self.samples} images or texts in {self.batches} batches{failed}", rows

    def _state(self, name: str) -> Tensor:
        if name in self._states:
            return self._states[name]
        return self._statistics[self._names.index(name)].moments

    def _take(self, calls: list[tuple[str, int, list[Tensor]]]) -> None:
        """Take in what was made of a batch's calls, all or nothing."""
        paths = tuple(path for path, _, _ in calls)
        if not self.batches:
            self.paths = paths
        if paths != self.paths:
            raise ValueError(
                f"this batch had attention in {len(paths)} calls, {_few(paths)}, and those before in "
                f"{len(self.paths)}, {_few(self.paths)}: statistics are those of the same layers"
            )
        for number, statistic in enumerate(self._statistics):
            statistic.take([states[number] for _, _, states in calls])
        self.samples += min((size for _, size, _ in calls), default=0)  # windows are more than images
        self.batches += 1

    def _save(self, path: str | PathLike[str], own: dict[str, Any], about: dict[str, Any] | None = None) -> None:
        records = [
            Record(name, _VARIABLE, self._state(name).detach().cpu().numpy(), number, None, 0, None)
            for number, name in enumerate(self._names)
        ]
        own = {
            **own,
            "paths": list(self.paths),
            "samples": self.samples,
            "batches": self.batches,
            "failed": [list(one) for one in self.failed],
            "settings": self._settings,
            "is complete": self._is_complete,
        }
        write(path, self._names, records, {"statistics": own, "about": self.about if about is None else about})

    def _resume(self, file: Path, ranks: _Ranks) -> None:
        """Go on from what a run before wrote."""
        if not file.exists():
            return
        cache = load(file)
        before = restored(cache.records, cache.about)
        own = cache.about["statistics"]
        if before._settings != self._settings:
            raise ValueError(
                f"{file} has other statistics, {before._settings}, not {self._settings}: choose a new folder"
            )
        if own.get("ranks") != ranks.count:
            raise ValueError(
                f"{file} is of a run of {own.get('ranks')} processes, and this one has {ranks.count}: each goes on "
                "with its own share, so run as many, or choose a new folder"
            )
        for statistic in self._statistics:
            statistic.moments = before._states[statistic.name].to(statistic.moments.device)
        self.paths, self.samples, self.batches = before.paths, before.samples, before.batches
        self.failed, self._is_complete = before.failed, own["is complete"]


def restored(records: Sequence[Record], about: dict[str, Any]) -> Collected:
    """The statistics that a file's records are."""
    found, own = Collected([]), about["statistics"]
    found._names = [record.key for record in records]
    found._states = {record.key: torch.from_numpy(np.array(record.value)) for record in records}
    found._settings, found.paths = own["settings"], tuple(own["paths"])
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
    whole._names, whole._settings, whole.paths = first._names, first._settings, first.paths
    for name in first._names:
        whole._states[name] = merged(torch.stack(as_large([part._state(name) for part in parts])))
    whole.samples, whole.batches = sum(part.samples for part in parts), sum(part.batches for part in parts)
    whole.failed = [failure for part in parts for failure in part.failed]
    whole.about = first.about
    whole._is_complete = all(part._is_complete for part in parts)
    return whole


class _Ranks:
    """The processes that work together; one, where `torch.distributed` is not at work."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.count = 0, 1
        self._timeout = timedelta(seconds=timeout)
        self._group = None
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        if self.count > 1:
            # Its own group, on the CPU: it knows who is missing, and its time is ours.
            self._group = distributed.new_group(backend="gloo", timeout=self._timeout)

    def share(self, batches: Iterable[Any], is_share: bool | None) -> _Share:
        """This process's batches."""
        if is_share is None:
            is_share = _is_sharded(batches)
        return _Share(batches, 0, 1) if is_share else _Share(batches, self.rank, self.count)

    def merge(self, found: Collected, trouble: Exception | None) -> None:
        """Make what was found that of all processes, in each; RuntimeError where one failed or is missing."""
        if self._group is None:
            return
        try:
            distributed.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waited {self._timeout.total_seconds():.0f} s for the other processes, which did not "
                f"come to the end: {error}. What each had written to checkpoint= is there, and load() merges it"
            ) from error
        others: list[Any] = [None] * self.count
        own = found.paths, found.samples, found.batches, found.failed, None if trouble is None else repr(trouble)
        distributed.all_gather_object(others, own, self._group)
        if trouble is not None:
            raise trouble
        for rank, (*_, why) in enumerate(others):
            if why is not None:
                raise RuntimeError(f"rank {rank} failed, so there are no statistics of all: {why}")
        paths = {paths for paths, *_ in others if paths}
        if len(paths) > 1:
            raise ValueError(f"the processes saw attention in different modules: {', '.join(map(_few, sorted(paths)))}")
        for statistic in found._statistics:
            statistic.cpu()
            statistic._update_count += 1  # torchmetrics merges no metric that was never updated
            statistic.sync(dist_sync_fn=gathered, process_group=self._group)
        found.paths = paths.pop() if paths else ()
        found.samples, found.batches = (sum(other[place] for other in others) for place in (1, 2))
        found.failed = [failure for other in others for failure in other[3]]


class _Share:
    """A process's batches: every n-th from the r-th on."""

    def __init__(self, batches: Iterable[Any], first: int, step: int) -> None:
        self._batches, self._first, self._step = batches, first, step
        self.size: int | None = None
        """How many these are, where it is known."""
        with contextlib.suppress(TypeError, NotImplementedError):  # a loader of an iterable data set has no length
            self.size = len(range(first, len(batches), step))  # type: ignore[arg-type]

    def behind(self, done: int) -> Iterator[tuple[Any, Exception | None]]:
        """Each batch but the first, or what the loader raised in its place."""
        return islice(self._each(), self._first + done * self._step, None, self._step)

    def _each(self) -> Iterator[tuple[Any, Exception | None]]:
        batches = iter(self._batches)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if isinstance(batches, GeneratorType):  # it has no more, and what comes next is not known to be nothing
                    raise
                yield None, error
            else:
                yield batch, None


def _is_sharded(batches: Any) -> bool:
    """Whether a loader gives each process a share of its own, as torch and accelerate make them."""
    is_torchs = isinstance(getattr(batches, "sampler", None), torch.utils.data.DistributedSampler)
    return is_torchs or type(batches).__name__ == "DataLoaderShard"


def _few(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (" ..." if len(paths) > 3 else "")

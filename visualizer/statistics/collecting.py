"""`collect(model, batches, *statistics)`: a model over a data set, of which only what adds up is kept."""

from __future__ import annotations

import contextlib
import copy
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from ..instrument import named_modules
from ..intercept import attention
from ..store import NO_LIMIT
from .collected import Collected
from .measures import Statistic, Texts, check_statistics, measured, texts_of
from .ranks import Batch, Ranks
from .signs import Stopped

_FEW, _MANY = 3, 100  # failures in a row, before a batch has worked and after: then it is not the data that is wrong


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
    batch they are at. As they come to the end they wait for those that get on, however long, and give up one that has
    died (a minute without a sign of life) or hangs (`timeout` seconds without a batch), by its rank.
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
            same order and be as many. What is finished there is returned at once.
        every: how many batches lie between two writings.
        is_share: whether `batches` is this process's share already; None: rank r of n loads all and runs every n-th
            from the r-th on, unless the loader has a `DistributedSampler` or is one of accelerate's. (These load only
            what they run, but repeat samples to make shares even, which count twice.)
        timeout: how many seconds a process may take for one batch, or to begin, before the others give it up.
        progress: whether a bar is shown, on terminals only.

    Returns:
        The statistics by their names, over all processes, in each of them.

    Raises:
        TypeError: it is no model, what is no statistic was passed for one, or one batch for an iterable of them.
        ValueError: there is no statistic, two have one name, there is no batch or no attention, a checkpoint is of
            other statistics, another model, other data or another number of processes, or the processes have different
            statistics or models.
        FileFormatError: the checkpoint is damaged.
        RuntimeError: another process failed, died, hangs or never began; or `torchrun` has started several, and
            `torch.distributed` is not initialised.
        Exception: what the model or the loader raised, where the first three batches fail, or later a hundred in a row,
            or where the loader has no more behind it. Any other batch that fails is warned about and counted in
            `failed`, and the rest goes on.
    """
    check_statistics(model, statistics)
    if every < 1:
        raise ValueError(f"every={every!r}: pass how many batches, 1 or more")
    if isinstance(batches, (Mapping, str)):
        raise TypeError(f"batches is a {type(batches).__name__}, one batch: pass an iterable of such, as [batch]")
    found = Collected(copy.deepcopy(statistics))
    found._is_complete = False
    is_sharded, seen = _is_sharded(model), _fingerprint(model)
    folder, data = None if checkpoint is None else Path(checkpoint).absolute(), _size(batches)
    ranks = Ranks(timeout)
    is_in_step = is_sharded and ranks.count > 1
    file = None if folder is None else folder / f"rank-{ranks.rank}.safetensors"
    found._part = {"rank": ranks.rank, "ranks": ranks.count, "model": seen, "data": data, "sharded": is_in_step}
    found._part["runs"] = [os.urandom(8).hex()]

    def begin() -> tuple[bool, Any, Any]:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                found._resume(file)
            if not found._is_complete:
                found.save(file)  # that this cannot be done is better known now than after hours
        return found._is_complete, list(found._settings.items()), None if is_sharded else seen

    def run() -> None:
        done = written = found.batches + len(found.failed)
        share = ranks.share(batches, is_share)
        some = ranks.in_step(share, done) if is_in_step else share.behind(done)
        with _bar(share.size, done, progress and not ranks.rank) as bar:

            def after(is_good: bool) -> None:
                nonlocal written
                bar.update()
                now = found.batches + len(found.failed)
                # Not among failures: a run that they end, as when a GPU hangs, is to go on behind what was good.
                if file is not None and is_good and now >= written + every:
                    found.save(file)
                    written = now

            try:
                _run(model, some, found, call, is_in_step, after)
            except (Stopped, KeyboardInterrupt):
                if file is not None and found._is_whole:
                    found.save(file)
                raise
        found._is_complete = True
        if file is not None:
            found.save(file)

    try:
        are_complete, *told = zip(*ranks.all(begin), strict=True)
        for what, each in zip(("statistics", "models"), told, strict=True):
            other = next((rank for rank, one in enumerate(each) if one != each[0]), None)
            if other is not None:
                raise ValueError(
                    f"the processes have different {what}, rank 0 {each[0]} and rank {other} {each[other]}: "
                    "pass the same to collect in each"
                )
        if not all(are_complete):
            ranks.all(run, is_in_step)
        ranks.merge(found)
    finally:
        ranks.close()
    if not found.paths:
        if file is not None:
            file.unlink(missing_ok=True)  # it says that all is done, and is to be tried again
        why = f"{len(found.failed)} failed, with {found.failed[0][1]}" if found.failed else "there were none"
        raise ValueError(f"no batch gave statistics: {why}")
    return found


def _bar(size: int | None, done: int, is_shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=size, initial=done, unit="batch", disable=None if is_shown else True)  # None: without a terminal


def _run(
    model: nn.Module,
    batches: Iterator[Batch],
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
        return layer.path, layer.shape[0], measured(layer, texts_of(layer, maps, texts), found._statistics)

    with _evaluating(model), torch.no_grad(), attention(model, keep=reduced, max_bytes=NO_LIMIT) as maps:
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


def _size(batches: Any) -> Any:
    """What tells data from other data: a fingerprint that says so, or how many batches there are."""
    try:
        return getattr(batches, "fingerprint", None) or len(batches)
    except Exception:  # as of many a loader of an iterable data set
        return None


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
            own, first = own.to_local() if hasattr(own, "to_local") else own, []
            with contextlib.suppress(RuntimeError, NotImplementedError):  # meta, sparse, and types without numbers
                first = own.reshape(-1)[:4].cpu().tolist()
            told.append((path, name, tuple(own.shape), first))
    return f"{zlib.crc32(repr(told).encode()):08x}"

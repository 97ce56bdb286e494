"""`collect(model, batches, *statistics)`: runs a model over a data set and keeps moments, no maps."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import warn
from ..instrument import named_modules
from ..intercept import attention
from ..store import NO_LIMIT
from .base import Statistic, check_statistics, measured
from .checkpoint import Checkpoint
from .collected import Collected, Source
from .heartbeat import Stopped
from .processes import Batch, Processes
from .tokens import Tokens, tokens_of_call

__all__ = ["collect"]

_FEW, _MANY = 3, 100  # so many failures in a row end the run: before any batch has worked, and later


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

    Each call of attention, fused or not, is reduced to its moments at once, so no map outlives its call. The model runs
    without gradients and in eval mode, and returns to its own mode at the end. Autocast around `collect` applies;
    modules that `torch.compile` has compiled run uncompiled.

    **Many processes.** Under `torchrun` or `accelerate launch`, with `torch.distributed` initialised, each process runs
    its share of the batches, and each returns the statistics of all. If one fails, the others stop after their present
    batch. A process that is done waits for those that still work, however long. It gives up one that has died (no sign
    of life for a minute) or hangs (no batch for `timeout` seconds), and names its rank. With `DistributedDataParallel`
    shares may be of any size, as what only training needs is left out. A model sharded by FSDP (1 or 2; tested on CPUs)
    needs all processes for each batch: one that has fewer batches runs its last one again, which does not count, and a
    batch that fails in the model ends the run. Models that accelerate spreads over devices (`device_map`, offloading)
    run as they are; tensor-parallel ones are not supported.

    Args:
        model: any model that `visualizer.attention` reads.
        batches: any iterable: a `DataLoader`, a generator, a tensor of batches. The model gets a mapping as keyword
            arguments, the first entry of a tuple or list, and anything else as it is; tensors are moved to its device.
            A mapping's "attention_mask" says what is padding, its "input_ids" which tokens repeat.
        statistics: what to measure. The objects that you pass are not changed.
        call: how to call the model, if not as above: `lambda model, batch: model.encode(batch["image"])`.
        checkpoint: a folder. What is known is written there every so many batches, as rank-0.safetensors, in one step.
            A run that is started again skips the batches that are done; batches must come in the same order and be as
            many. If the run in the folder is finished, its result is returned at once.
        every: how many batches lie between two writings.
        is_share: whether `batches` is this process's share already. None: rank r of n loads all and runs every n-th
            from the r-th on, unless the loader has a `DistributedSampler` or is one of accelerate's. (These load only
            what they run, but repeat samples to make shares even, and repeated samples count twice.)
        timeout: how many seconds a process may take for one batch, or to begin, before the others give it up.
        progress: whether to show a progress bar, on terminals only.

    Returns:
        The statistics by their names. Each process returns those of all processes.

    Raises:
        TypeError: `model` is no `nn.Module`, `statistics` holds something else, or `batches` is one batch.
        ValueError: there is no statistic, no batch or no attention; two statistics have one name; the checkpoint is of
            other statistics, another model, other data or another number of processes; or the processes have different
            statistics or models.
        FileFormatError: the checkpoint is damaged.
        RuntimeError: another process failed, died, hangs or never began; or `torchrun` has started several processes,
            and `torch.distributed` is not initialised.
        Exception: what the model or the loader raised, if the first three batches fail, or later a hundred in a row, or
            if the loader ends with its error. After any other batch that fails the run goes on, with a warning and an
            entry in `failed`.
    """
    check_statistics(model, statistics)
    if every < 1:
        raise ValueError(f"every={every!r}: pass how many batches, 1 or more")
    if isinstance(batches, (Mapping, str)):
        raise TypeError(f"batches is a {type(batches).__name__}, one batch: pass an iterable of such, as [batch]")
    found, file = Collected(statistics), Checkpoint(checkpoint, every)
    is_sharded, fingerprint, data = _is_sharded(model), _fingerprint(model), _size(batches)
    processes = Processes(timeout)
    is_in_step = is_sharded and processes.count > 1
    found.source = Source([os.urandom(8).hex()], processes.rank, processes.count, fingerprint, data, is_in_step)
    found.is_complete = False

    def begin() -> tuple[bool, Any, Any]:
        nonlocal found
        found = file.begin(found)
        return found.is_complete, list(found.settings.items()), None if is_sharded else fingerprint

    def run() -> None:
        from tqdm import tqdm

        share = processes.share(batches, is_share)
        todo = processes.in_step(share, found.tried) if is_in_step else share.behind(found.tried)
        is_hidden = None if progress and not processes.rank else True  # None: hidden where there is no terminal
        with tqdm(total=share.size, initial=found.tried, unit="batch", disable=is_hidden) as bar:
            _run(model, statistics, todo, call, found, file, bar, is_in_step)

    try:
        are_complete, settings, models = zip(*processes.all_gather(begin), strict=True)
        _check_alike("statistics", settings)
        _check_alike("models", models)
        if not all(are_complete):
            processes.all_gather(run, is_in_step)
        found = processes.merge(found)
    finally:
        processes.close()
    if not found.paths:
        file.remove()  # it says that all is done, and the next run is to try again
        why = f"{len(found.failed)} failed, with {found.failed[0][1]}" if found.failed else "there were none"
        raise ValueError(f"no batch gave statistics: {why}")
    return found


def _check_alike(what: str, by_rank: Sequence[Any]) -> None:
    """Raise ValueError unless all processes have the same."""
    other = next((rank for rank, one in enumerate(by_rank) if one != by_rank[0]), None)
    if other is not None:
        raise ValueError(
            f"the processes have different {what}, rank 0 {by_rank[0]} and rank {other} {by_rank[other]}: "
            "pass the same to collect in each"
        )


def _run(
    model: nn.Module,
    statistics: Sequence[Statistic],
    batches: Iterator[Batch],
    call: Callable[[nn.Module, Any], Any] | None,
    found: Collected,
    file: Checkpoint,
    bar: Any,
    is_in_step: bool,
) -> None:
    """Run the model over this process's batches, add each to `found` or note that it failed, and write the file."""
    # Parameters on the meta device are those that accelerate keeps elsewhere until they are needed.
    device = next((tensor.device for tensor in model.parameters() if not tensor.is_meta), torch.device("cpu"))
    tokens, failures = Tokens(), 0

    def reduced(layer: Any) -> tuple[str, int, list[Tensor]]:
        return layer.path, layer.shape[0], measured(layer, tokens_of_call(layer, maps, tokens), statistics)

    try:
        with _evaluating(model), torch.no_grad(), attention(model, keep=reduced, max_bytes=NO_LIMIT) as maps:
            for batch in batches:
                maps.clear()
                try:
                    if batch.error is not None:
                        raise batch.error
                    value = _moved(batch.value, device)
                    tokens.mask, tokens.ids = _matrix(value, "attention_mask"), _matrix(value, "input_ids")
                    _called(model, value) if call is None else call(model, value)
                    if not batch.counts:
                        continue
                    found.add(list(maps))
                    failures = 0
                except Exception as error:
                    failures += 1
                    is_out_of_step = is_in_step and batch.error is None
                    if is_out_of_step or failures == (_MANY if found.batches else _FEW):
                        raise
                    found.failed.append((batch.number, f"{type(error).__name__}: {error}"))
                    what = f"batch {batch.number} failed and does not count: {found.failed[-1][1]}"
                    warn(what, "failed-batch")
                bar.update()
                if not failures:  # so a run that failures end, as when a GPU hangs, resumes behind the last good batch
                    file.write_if_due(found)
        found.is_complete = True
    except (Stopped, KeyboardInterrupt):
        file.write(found)
        raise
    file.write(found)


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


def _matrix(batch: Any, name: str) -> Tensor | None:
    """The batch's tensor of that name, if it is (batch, tokens)."""
    value = batch.get(name) if isinstance(batch, Mapping) else None
    return value if isinstance(value, Tensor) and value.ndim == 2 else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and then again as it was."""
    training = [module for module in model.modules() if module.training]
    # A wrapper's first forward pass sends buffers to all processes, and would wait for one that has no batch.
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
    """A fingerprint of the data: its attribute `fingerprint`, or how many batches there are; None: not known."""
    try:
        return getattr(batches, "fingerprint", None) or len(batches)
    except Exception:  # many loaders of an iterable data set raise an error of their own
        return None


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has split the model between the processes, so that none can run it alone."""
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return not classes.isdisjoint({"FullyShardedDataParallel", "FSDPModule"})


def _fingerprint(model: nn.Module) -> str:
    """A fingerprint of the model, from the names and shapes of its parameters and the first four numbers of each."""
    facts = []
    for path, module in named_modules(model):
        for name, tensor in module.named_parameters(recurse=False):
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                continue
            local, first = tensor.detach(), []
            local = local.to_local() if hasattr(local, "to_local") else local
            with contextlib.suppress(RuntimeError, NotImplementedError):  # meta, sparse, and types without numbers
                first = local.reshape(-1)[:4].cpu().tolist()
            facts.append((path, name, tuple(local.shape), first))
    return f"{zlib.crc32(repr(facts).encode()):08x}"

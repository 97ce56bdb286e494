"""Statistics during training, every so many steps. When entropy collapses, it shows before the loss does."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..intercept import attention
from ..maps import AttentionMap
from ..store import NO_LIMIT
from .base import Statistic, check_statistics, measured
from .collected import Collected
from .moments import merge_states, to_one_shape
from .tokens import Tokens, tokens_of_call

__all__ = ["Monitor", "lightning_callback", "trainer_callback"]


class Monitor:
    """Statistics of the attention, measured every so many training steps, for a logger. Other steps are not touched.

    >>> import torch
    >>> from visualizer.statistics import Entropy, Monitor
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=2)
    >>> monitor = Monitor(model, Entropy(), every=50)
    >>> for step in range(101):
    ...     with monitor(step) as values:
    ...         loss = model(torch.randn(8, 5, 16)).square().mean()  # and the rest of the step
    ...     for name, value in values.items():                       # empty except in steps 0, 50, 100
    ...         pass                                                 # writer.add_scalar(name, value, step)
    >>> list(values)
    ['attention/entropy/layers.0.self_attn', 'attention/entropy/layers.1.self_attn']

    Each number is the mean of a layer over images or texts, calls in the step, and heads. A layer without numbers, for
    example because all its weights are NaN, is left out. Calls that gradient checkpointing repeats in the backward pass
    do not count. An argument "attention_mask", (batch, tokens), says what is padding. The model runs as it does in
    training; the weights are measured before dropout. In a measured step, modules that `torch.compile` has compiled run
    uncompiled. Each of several processes measures its own share of the batch.

    Args:
        model: the model, or a part of it.
        statistics: statistics with one number for each head: not `Received`, `Patterns` or `MeanMap`.
        every: measure one step in this many, step 0 first.
        prefix: the beginning of each name.

    Raises:
        TypeError: `model` is no `nn.Module`, or `statistics` holds something else.
        ValueError: there is no statistic, two have one name, or one has more than one number a head.
    """

    model: nn.Module
    """The model that the next steps measure; you may change it."""
    last: Collected | None = None
    """The results of the last measured step, head by head: `monitor.last["entropy"].minimum`."""

    def __init__(self, model: nn.Module, *statistics: Statistic, every: int = 50, prefix: str = "attention/") -> None:
        check_statistics(model, statistics)
        for statistic in statistics:
            if statistic.axes:
                raise ValueError(f"{statistic.name} has many numbers a head, and only one can be logged: see Sink")
        if every < 1:
            raise ValueError(f"every={every!r}: pass how many steps, 1 or more")
        self.model, self._statistics, self._every, self._prefix = model, statistics, every, prefix

    @contextmanager
    def __call__(self, step: int) -> Iterator[dict[str, float]]:
        """Measure what runs inside the `with`, if `step` is due. At its end the dict has the numbers."""
        values: dict[str, float] = {}
        if step % self._every:
            yield values
            return

        def reduced(layer: AttentionMap) -> tuple[str, int, list[Tensor]]:
            return layer.path, layer.shape[0], measured(layer, tokens_of_call(layer, maps, Tokens()), self._statistics)

        with attention(self.model, keep=reduced, max_bytes=NO_LIMIT) as maps:
            yield values
        calls: dict[str, list[tuple[int, list[Tensor]]]] = {}
        for path, size, states in maps:
            calls.setdefault(path, []).append((size, states))
        if not calls:
            return
        found = self.last = Collected(self._statistics)
        found.add([(path, *_as_one_call(several)) for path, several in calls.items()])
        for name, moments in found.items():
            for path, heads in zip(found.paths, moments.mean, strict=True):
                if not np.isnan(heads).all():
                    values[f"{self._prefix}{name}/{path}"] = float(np.nanmean(heads))


def _as_one_call(calls: list[tuple[int, list[Tensor]]]) -> tuple[int, list[Tensor]]:
    """Merge the calls of a layer that runs several times in a step."""
    sizes, states = zip(*calls, strict=True)
    return sum(sizes), [merge_states(torch.stack(to_one_shape([*parts]))) for parts in zip(*states, strict=True)]


def lightning_callback(*statistics: Statistic, every: int = 50, prefix: str = "attention/") -> Any:
    """A callback for Lightning that logs statistics of a module's attention to its trainer's loggers.

        trainer = lightning.Trainer(callbacks=[lightning_callback(Entropy(), Sink(), every=50)])

    For the numbers and the arguments see `Monitor`; the callback has one as its attribute `monitor`. Steps are counted
    as in Lightning's own logs, for any number of optimizers: every=50 measures the steps that log_every_n_steps=50
    logs, 49, 99 and so on. If gradients are accumulated, the first batch of a step is measured.

    Raises:
        ImportError: neither lightning nor pytorch_lightning is installed.
        TypeError, ValueError: as `Monitor` raises them.
    """

    class AttentionMonitor(*_lightning_bases()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.monitor = Monitor(nn.Identity(), *statistics, every=every, prefix=prefix)
            self._open, self._step = ExitStack(), -1
            self._values: dict[str, float] = {}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.monitor.model, self._step = pl_module, -1

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            # Lightning's own callbacks log this number; `global_step` counts the steps of all optimizers.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            if step != self._step:
                self._step = step
                self._values = self._open.enter_context(self.monitor(step + 1))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self._open.close()
            values, self._values = self._values, {}
            for logger in trainer.loggers if values else ():
                logger.log_metrics(values, step=self._step)

        def on_train_epoch_end(self, *_: Any) -> None:  # `on_train_batch_end` is not called for a skipped batch
            self._open.close()
            self._step = -1

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._open.__exit__(type(exception), exception, exception.__traceback__)

    return AttentionMonitor()


def _lightning_bases() -> list[Any]:
    """Lightning's callback classes: it has two package names, and neither accepts callbacks of the other."""
    names = ("lightning.pytorch", "pytorch_lightning")
    used = [sys.modules[name] for name in names if sys.modules.get(name)]
    for name in () if used else names:
        with suppress(ImportError):
            used.append(importlib.import_module(name))
            break
    if not used:
        raise ImportError("lightning_callback needs Lightning: pip install lightning")
    return [module.Callback for module in used]


def trainer_callback(trainer: Any, *statistics: Statistic, every: int = 50, prefix: str = "attention/") -> Any:
    """A callback for transformers' `Trainer` that logs statistics of the model's attention where the trainer logs.

        trainer.add_callback(trainer_callback(trainer, Entropy(), Sink(), every=50))

    For the numbers and the arguments see `Monitor`; the callback has one as its attribute `monitor`. Steps are counted
    as in the `Trainer`'s own logs: every=50 measures the steps that logging_steps=50 logs, 50, 100 and so on. If
    gradients are accumulated, the first batch of a step is measured.

    Args:
        trainer: the `Trainer` that the callback is added to. transformers does not pass it to callbacks.
        statistics, every, prefix: as for `Monitor`.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: as `Monitor` raises them.
    """
    from transformers import TrainerCallback

    class AttentionMonitor(TrainerCallback):
        def __init__(self) -> None:
            self.monitor = Monitor(nn.Identity(), *statistics, every=every, prefix=prefix)
            self._values: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.monitor.model = model

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Callbacks are not called for errors, so a `with` around the call of `training_step` ends the measurement.
            if (state.global_step + 1) % every == 0:
                self._measure_next(state.global_step + 1)

        def _measure_next(self, step: int) -> None:
            replaced, run = vars(trainer).get("training_step"), trainer.training_step  # the user may have set one

            @functools.wraps(run)
            def once(*args: Any, **kwargs: Any) -> Any:
                del trainer.training_step
                if replaced is not None:
                    trainer.training_step = replaced
                with self.monitor(step) as self._values:
                    return run(*args, **kwargs)

            trainer.training_step = once

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            values, self._values = self._values, {}
            if values:
                is_due = control.should_log
                trainer.log(values)
                control.should_log = is_due  # log() resets it, and the loss is still to be logged

    return AttentionMonitor()

"""Statistics during training, every so many steps: entropy that collapses warns before the loss does."""

from __future__ import annotations

import copy
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
from .collected import Collected
from .measures import Statistic, Texts, check_statistics, measured, texts_of
from .moments import as_large, merged


class Monitor:
    """Statistics of the attention in single steps of a training, as numbers to log; it does nothing between these.

    >>> import torch
    >>> from visualizer.statistics import Entropy, Monitor
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=2)
    >>> monitor = Monitor(model, Entropy(), every=50)
    >>> for step in range(101):
    ...     with monitor(step) as values:
    ...         loss = model(torch.randn(8, 5, 16)).square().mean()  # and the rest of the step
    ...     for name, value in values.items():                       # empty but in steps 0, 50 and 100
    ...         pass                                                 # writer.add_scalar(name, value, step)
    >>> list(values)
    ['attention/entropy/layers.0.self_attn', 'attention/entropy/layers.1.self_attn']

    A number is a layer's mean over images or texts, its calls in the step, and heads; a layer that has none, as where
    all of its weights are NaN, is left out. Calls that gradient checkpointing makes again in the backward pass do not
    count. A call's "attention_mask", (batch, tokens), tells what is padding, if it is passed by that name. The model
    runs as it does in training, and what is measured are the weights before dropout. In a step that is measured,
    modules that `torch.compile` has compiled run uncompiled. Of several processes each measures its own share of the
    batch.

    Args:
        model: the model, or the part of it that is of interest.
        statistics: of one number a head: not `Received`, `Patterns` and `MeanMap`.
        every: how many steps lie between two that are measured.
        prefix: what the names begin with.

    Raises:
        TypeError: it is no model, or what is no statistic was passed for one.
        ValueError: there is no statistic, two have one name, or one has more than a number a head.
    """

    model: nn.Module
    """What is measured from the next step on."""
    last: Collected | None = None
    """All that is known of the last step that was measured: `monitor.last["entropy"].minimum`."""

    def __init__(self, model: nn.Module, *statistics: Statistic, every: int = 50, prefix: str = "attention/") -> None:
        check_statistics(model, statistics)
        for statistic in statistics:
            if statistic.axes:
                raise ValueError(f"{statistic.name} has many numbers a head, and what is logged is one: see Sink")
        if every < 1:
            raise ValueError(f"every={every!r}: pass how many steps, 1 or more")
        self.model, self._statistics, self._every, self._prefix = model, statistics, every, prefix

    @contextmanager
    def __call__(self, step: int) -> Iterator[dict[str, float]]:
        """Measure what runs inside the `with`, if it is the step's turn; at its end the dict has the numbers."""
        values: dict[str, float] = {}
        if step % self._every:
            yield values
            return

        def reduced(layer: AttentionMap) -> tuple[str, int, list[Tensor]]:
            return layer.path, layer.shape[0], measured(layer, texts_of(layer, maps, Texts()), self._statistics)

        with attention(self.model, keep=reduced, max_bytes=NO_LIMIT) as maps:
            yield values
        calls: dict[str, list[tuple[int, list[Tensor]]]] = {}
        for path, size, states in maps:
            calls.setdefault(path, []).append((size, states))
        if not calls:
            return
        found = self.last = Collected(copy.deepcopy(self._statistics))
        found._take([(path, *_together(some)) for path, some in calls.items()])
        for name, moments in found.items():
            for path, heads in zip(found.paths, moments.mean, strict=True):
                if not np.isnan(heads).all():
                    values[f"{self._prefix}{name}/{path}"] = float(np.nanmean(heads))


def _together(calls: list[tuple[int, list[Tensor]]]) -> tuple[int, list[Tensor]]:
    """One call in place of a layer's calls in a step."""
    sizes, states = zip(*calls, strict=True)
    return sum(sizes), [merged(torch.stack(as_large([*parts]))) for parts in zip(*states, strict=True)]


def lightning_callback(*statistics: Statistic, every: int = 50, prefix: str = "attention/") -> Any:
    """A callback of Lightning that logs statistics of a module's attention, to the loggers that its trainer has.

        trainer = lightning.Trainer(callbacks=[lightning_callback(Entropy(), Sink(), every=50)])

    For the numbers and the arguments see `Monitor`, which the callback has as its `monitor`. Steps are those of
    Lightning's own logs, whatever the number of optimizers: every=50 measures those that log_every_n_steps=50 logs, 49,
    99 and so on. Where gradients are accumulated, the first batch of a step is measured.

    Raises:
        ImportError: neither lightning nor pytorch_lightning is installed.
        ValueError: as of `Monitor`.
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
            # What Lightning's own callbacks log by; `global_step` counts several optimizers each.
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            if step != self._step:
                self._step = step
                self._values = self._open.enter_context(self.monitor(step + 1))

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self._open.close()
            values, self._values = self._values, {}
            for logger in trainer.loggers if values else ():
                logger.log_metrics(values, step=self._step)

        def on_train_epoch_end(self, *_: Any) -> None:  # the last batch may have been skipped, and has no end then
            self._open.close()
            self._step = -1

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._open.__exit__(type(exception), exception, exception.__traceback__)

    return AttentionMonitor()


def _lightning_bases() -> list[Any]:
    """What a callback is: Lightning is installed under two names, whose classes do not know each other."""
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
    """A callback of transformers that logs statistics of a model's attention where its `Trainer` logs.

        trainer.add_callback(trainer_callback(trainer, Entropy(), Sink(), every=50))

    For the numbers and the arguments see `Monitor`, which the callback has as its `monitor`. Steps are those of the
    `Trainer`'s own logs: every=50 measures those that logging_steps=50 logs, 50, 100 and so on. Where gradients are
    accumulated, the first batch of a step is measured.

    Args:
        trainer: whose `log` is used; transformers does not tell a callback whose it is.
        statistics, every, prefix: as of `Monitor`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: as of `Monitor`.
    """
    from transformers import TrainerCallback

    class AttentionMonitor(TrainerCallback):
        def __init__(self) -> None:
            self.monitor = Monitor(nn.Identity(), *statistics, every=every, prefix=prefix)
            self._values: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.monitor.model = model

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Callbacks are not told of errors, so what is measured has to be a call.
            if (state.global_step + 1) % every == 0:
                self._measure_next(state.global_step + 1)

        def _measure_next(self, step: int) -> None:
            own, run = vars(trainer).get("training_step"), trainer.training_step

            @functools.wraps(run)
            def once(*args: Any, **kwargs: Any) -> Any:
                del trainer.training_step
                if own is not None:
                    trainer.training_step = own
                with self.monitor(step) as self._values:
                    return run(*args, **kwargs)

            trainer.training_step = once

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            values, self._values = self._values, {}
            if values:
                is_due = control.should_log
                trainer.log(values)
                control.should_log = is_due  # logging takes it for done, and the loss is still to be logged

    return AttentionMonitor()

"""Statistics during training, every so many steps: entropy that collapses warns before the loss does."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..intercept import attention
from .collecting import Collected
from .measures import Statistic, Texts
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

    A number is a layer's mean over heads, and over all calls of the layer in the step; those that gradient
    checkpointing makes again in the backward pass do not count. The model runs as it does in training, and what is
    measured are the weights before dropout. In a step that is measured, modules that `torch.compile` has compiled run
    uncompiled. Of several processes each measures its own share of the batch.

    Args:
        model: the model, or the part of it that is of interest.
        statistics: of one number a head: not `Received`, `Patterns` and `MeanMap`.
        every: how many steps lie between two that are measured.
        prefix: what the names begin with.

    Raises:
        ValueError: there is no statistic, two have one name, or one has more than a number a head.
    """

    def __init__(self, model: nn.Module, *statistics: Statistic, every: int = 50, prefix: str = "attention/") -> None:
        names = [statistic.name for statistic in statistics]
        if not names or len({*names}) < len(names):
            raise ValueError(f"pass statistics of different names, such as Entropy() and Sink(), not {names}")
        for statistic in statistics:
            if statistic.axes:
                raise ValueError(f"{statistic.name} has many numbers a head, and what is logged is one: see Sink")
        if every < 1:
            raise ValueError(f"every={every!r}: pass how many steps, 1 or more")
        self.last: Collected | None = None
        """All that is known of the last step that was measured: `monitor.last["entropy"].minimum`."""
        self._model, self._statistics, self._every, self._prefix = model, statistics, every, prefix

    @contextmanager
    def __call__(self, step: int) -> Iterator[dict[str, float]]:
        """Measure what runs inside the `with`, if it is the step's turn; at its end the dict has the numbers."""
        values: dict[str, float] = {}
        if step % self._every:
            yield values
            return
        with attention(self._model, keep=self._reduced, max_bytes=2**62) as maps:
            yield values
        calls: dict[str, list[tuple[int, list[Tensor]]]] = {}
        for path, size, states in filter(None, maps):
            calls.setdefault(path, []).append((size, states))
        if not calls:
            return
        found = self.last = Collected(copy.deepcopy(self._statistics))
        found.paths, found.batches = tuple(calls), 1
        found.samples = min(sum(size for size, _ in some) for some in calls.values())
        for number, statistic in enumerate(found._statistics):
            statistic.take(
                [merged(torch.stack(as_large([states[number] for _, states in some]))) for some in calls.values()]
            )
        for name, moments in found.items():
            for path, row in zip(found.paths, moments.mean, strict=True):
                if not np.isnan(row).all():
                    values[f"{self._prefix}{name}/{path}"] = float(np.nanmean(row))

    def _reduced(self, layer: Any) -> tuple[str, int, list[Tensor]] | None:
        if torch._C._current_graph_task_id() != -1:  # in the backward pass
            return None
        return layer.path, layer.shape[0], [statistic.reduced(layer, Texts()) for statistic in self._statistics]


def _monitor(statistics: tuple[Statistic, ...], every: int, prefix: str, model: nn.Module) -> Monitor:
    return Monitor(model, *statistics, every=every, prefix=prefix)


class _Steps:
    """A monitor for frameworks that tell when a step begins and ends, and have the model only then."""

    def __init__(self, statistics: tuple[Statistic, ...], every: int, prefix: str) -> None:
        self._make = partial(_monitor, statistics, every, prefix)
        self._make(nn.Identity())  # which complains now of what is wrong
        self._monitor: Monitor | None = None
        self._open, self._step = ExitStack(), -1
        self._values: dict[str, float] = {}

    def begin(self, model: nn.Module, step: int) -> None:
        """A step begins; where gradients are accumulated, its first batch counts."""
        self.end()
        if step == self._step:
            return
        self._step = step
        if self._monitor is None:
            self._monitor = self._make(model)
        self._values = self._open.enter_context(self._monitor(step))

    def end(self) -> dict[str, float]:
        """It ends; the numbers, if it was measured."""
        self._open.close()
        values, self._values = self._values, {}
        return values


def lightning_callback(*statistics: Statistic, every: int = 50, prefix: str = "attention/") -> Any:
    """A callback of Lightning that logs statistics of a module's attention, to the loggers that its trainer has.

        trainer = lightning.Trainer(callbacks=[lightning_callback(Entropy(), Sink(), every=50)])

    For the numbers and the arguments see `Monitor`; a step is one of `trainer.global_step`.

    Raises:
        ImportError: neither lightning nor pytorch_lightning is installed.
        ValueError: as of `Monitor`.
    """
    steps = _Steps(statistics, every, prefix)
    # Both are one library under two names, whose classes do not know each other: the one that is in use.
    names = ["lightning.pytorch", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)
    for name in names:
        try:
            base: Any = importlib.import_module(name).Callback
            break
        except ImportError as error:
            missing = error
    else:
        raise ImportError("lightning_callback needs Lightning: pip install lightning") from missing

    class AttentionMonitor(base):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            steps.begin(pl_module, trainer.global_step)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            values = steps.end()
            for logger in trainer.loggers if values else ():
                logger.log_metrics(values, step=steps._step)

        def on_exception(self, *_: Any) -> None:
            steps.end()

    return AttentionMonitor()


def trainer_callback(trainer: Any, *statistics: Statistic, every: int = 50, prefix: str = "attention/") -> Any:
    """A callback of transformers that logs statistics of a model's attention where its `Trainer` logs.

        trainer.add_callback(trainer_callback(trainer, Entropy(), Sink(), every=50))

    For the numbers and the other arguments see `Monitor`; a step is one of `trainer.state.global_step`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: as of `Monitor`.
    """
    from transformers import TrainerCallback

    steps = _Steps(statistics, every, prefix)

    class AttentionMonitor(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            steps.begin(model, state.global_step)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            values = steps.end()
            if values:
                trainer.log(values)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            steps.end()

    return AttentionMonitor()

"""`Collected`: statistics by their names, in memory and in files; `merge` makes one of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileFormatError, few, warn
from ..store import Record, Recorded, Saved, stacked
from .base import Statistic, with_layers
from .moments import Moments, empty_state, merge_states, samples_in, to_one_shape

__all__ = ["Collected"]

_VARIABLE = "statistics moments"  # in a file's records; no local variable is called so
_FACTS = ("paths", "samples", "batches", "failed", "settings", "labels", "number_names", "is_complete")
"""The attributes of a `Collected` that a file has as plain data, under these names with spaces."""


@dataclass
class Source:
    """Where statistics come from: so that shares merge once each, and a checkpoint goes on with the same run."""

    runs: list[str] = field(default_factory=list)
    """A random name for each run that is in it."""
    rank: int | None = None
    """The process whose share it is; None: all processes together."""
    ranks: int = 1
    """How many processes ran."""
    model: str | None = None
    """A fingerprint of the model."""
    data: Any = None
    """A fingerprint of the data, or how many batches there are; None: not known."""
    sharded: bool = False
    """Whether each process saw a part of the model alone, so that `model` differs between them."""


class Collected(Recorded, Mapping[str, Moments]):
    """Statistics by their names, made by `collect` or read by `visualizer.load`: `found["entropy"].mean`."""

    paths: tuple[str, ...]
    """The modules that the layers are, in the order of their calls."""
    samples: int
    """How many images or texts were seen: of each batch the smallest number that a layer saw, as windows are more."""
    batches: int
    """How many batches counted."""
    failed: list[tuple[int, str]]
    """The batches that failed, by their numbers in the data (or in their process's share of it), and why."""
    states: dict[str, Tensor]
    """The moments of each statistic as they add up, (5, layers, heads, ...)."""
    settings: dict[str, dict[str, Any]]
    """The class and the arguments of each statistic."""
    labels: dict[str, str]
    """What a plot writes at the axis of each statistic."""
    number_names: dict[str, tuple[str, ...]]
    """What the numbers of a head are called, for statistics where each has a meaning of its own, such as `Patterns`."""
    source: Source
    is_complete: bool
    """Whether the run came to the end of its data."""

    def __init__(self, statistics: Sequence[Statistic], source: Source | None = None) -> None:
        self.states = {one.name: empty_state((0,) * (2 + one.axes)).to(one.moments.device) for one in statistics}
        self.settings = {one.name: one.settings for one in statistics}
        self.labels = {one.name: one.label for one in statistics}
        self.number_names = {one.name: one.number_names for one in statistics}
        self.source = source or Source()
        self.paths, self.samples, self.batches, self.failed = (), 0, 0, []
        self.is_complete, self.about = True, {}

    def __getitem__(self, name: str) -> Moments:
        if name not in self.states:
            raise KeyError(f"there is no statistic {name!r}; there are {', '.join(map(repr, self))}")
        return Moments.of(self.states[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def tried(self) -> int:
        """How many batches counted or failed."""
        return self.batches + len(self.failed)

    @property
    def records(self) -> list[Record]:
        """Each statistic with its `Moments`."""
        return [
            Record(name, "statistic", moments, number, None, 0) for number, (name, moments) in enumerate(self.items())
        ]

    def stack(self, call: int | None = None) -> Any:
        """The means of all statistics in one array, (statistics, layers, heads), where each is one number a head."""
        return stacked({name: [moments.mean] for name, moments in self.items()}, call)

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line about the whole, and a row for each statistic."""
        rows: list[tuple[str, ...]] = [("statistic", "numbers", "samples")]
        for name, moments in self.items():
            axes = ("layers", "heads", "of each")
            shape = moments.count.shape
            sizes = ", ".join([f"{size} {axis}" for size, axis in zip(shape, axes, strict=False)])
            sizes = sizes if len(shape) < 4 else f"{shape[0]} layers, {shape[1]} heads, {shape[2]} x {shape[3]}"
            rows.append((name, sizes, samples_in(moments.count)))
        more = f", {len(self.failed)} failed" if self.failed else ""
        more += "" if self.is_complete else ", unfinished"
        return f"statistics of {self.samples} images or texts in {self.batches} batches{more}", rows

    def add(self, calls: Sequence[tuple[str, int, list[Tensor]]]) -> None:
        """Add one batch, all of it or nothing: for each call its module's path, its batch size, and a state of each
        statistic, as `measured` makes them.

        Raises:
            ValueError: there is no call, or the calls are not those of the batches before.
        """
        paths = tuple(path for path, _, _ in calls)
        if not paths:
            raise ValueError("no attention was seen in this batch. Has the model any?")
        if self.paths and paths != self.paths:
            raise ValueError(
                f"this batch had attention in {len(paths)} calls, {few(paths)}, and those before in "
                f"{len(self.paths)}, {few(self.paths)}: statistics are those of the same layers"
            )
        layers = zip(*(states for _, _, states in calls), strict=True)  # for each statistic
        states = {name: with_layers(self.states[name], each) for name, each in zip(self.states, layers, strict=True)}
        samples = self.samples + min(size for _, size, _ in calls)
        # In one step: Ctrl-C comes before or after it, and what is written then has whole batches.
        vars(self).update(states=states, paths=paths, samples=samples, batches=self.batches + 1)

    def saved(self, about: dict[str, Any] | None = None) -> Saved:
        """The statistics as plain data."""
        records = [
            Record(name, _VARIABLE, state.detach().cpu().numpy(), number, None, 0)
            for number, (name, state) in enumerate(self.states.items())
        ]
        content = {name.replace("_", " "): getattr(self, name) for name in _FACTS} | {"part": asdict(self.source)}
        about = self.about if about is None else about
        return Saved("statistics", tuple(self), records, {"statistics": content, "about": about})

    @classmethod
    def from_saved(cls, saved: Saved) -> Collected:
        """The statistics that were saved; FileFormatError if no released version wrote them."""
        content = saved.about["statistics"]
        facts = {name: name.replace("_", " ") for name in _FACTS}
        if lacking := [repr(fact) for fact in facts.values() if fact not in content]:
            raise FileFormatError(
                f"the statistics in the file lack {', '.join(lacking)}: this package wrote them before its first "
                "release. Collect them again"
            )
        found = Collected([], Source(**content["part"]))
        found.states = {record.key: torch.from_numpy(np.array(record.value)) for record in saved.records}
        found.about = saved.about["about"]
        for name, fact in facts.items():
            setattr(found, name, content[fact])
        return found


def merge(parts: Sequence[Collected]) -> Collected:
    """All parts together.

    Warns of processes whose part is missing.

    Raises:
        ValueError: the parts are of different statistics or models, or hold the same run twice.
    """
    times_by_run: dict[tuple[int, Any], Counter[int]] = {}  # there may be several runs, and all as often
    for source in (part.source for part in parts):
        if source.rank is not None:
            times_by_run.setdefault((source.ranks, source.data), Counter())[source.rank] += 1
    for (ranks, _), times in times_by_run.items():
        missing = [str(rank) for rank in range(ranks) if times[rank] < max(times.values())]
        if missing:
            what = f"of a run of {ranks} processes the files of these are missing: {', '.join(missing)}"
            warn(what, "missing-parts")
    whole = without_states(parts)
    whole.states = {
        name: merge_states(torch.stack(to_one_shape([part.states[name] for part in parts]))) for name in parts[0]
    }
    return whole


def without_states(parts: Sequence[Collected]) -> Collected:
    """All that parts are together but their states; raises what `merge` raises."""
    first = next((part for part in parts if part.paths), parts[0])
    for part in parts:
        if part.settings != first.settings or (part.paths and part.paths != first.paths):
            raise ValueError(
                "these are of different statistics or models, which cannot be merged: "
                f"{', '.join(first.settings)} of {few(first.paths)} and {', '.join(part.settings)} of {few(part.paths)}"
            )
    if len({part.source.model for part in parts if not part.source.sharded} - {None}) > 1:
        raise ValueError("these are of models with different weights, which cannot be merged")
    runs = [run for part in parts for run in part.source.runs]
    if len({*runs}) < len(runs):
        raise ValueError("the same run is in several of these: they are copies, or parts beside their whole")
    whole = Collected([], replace(first.source, runs=runs, rank=first.source.rank if len(parts) == 1 else None))
    whole.settings, whole.labels, whole.number_names = first.settings, first.labels, first.number_names
    whole.paths, whole.about = first.paths, first.about
    whole.samples, whole.batches = sum(part.samples for part in parts), sum(part.batches for part in parts)
    whole.failed = [failure for part in parts for failure in part.failed]
    whole.is_complete = all(part.is_complete for part in parts)
    return whole

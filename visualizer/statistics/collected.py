"""`Collected`: statistics by their names, in memory and in files, and several of them made one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileFormatError, warn
from ..store import Record, Recorded, Saved, stacked
from ..store.files import read
from .measures import Statistic
from .moments import Moments, as_large, merged

_VARIABLE = "statistics moments"  # in a file's records; no local variable is called so


class Collected(Recorded, Mapping[str, Moments]):
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
        self._is_whole = True
        """Whether no batch is just being taken in."""
        self._part: dict[str, Any] = {}
        """Of a process's file: its "rank", of how many "ranks", and what tells its "model" and its "data" apart, and
        whether it saw a shard of the model alone; and of which "runs" it is, so that none counts twice. What several
        found together has no "rank"."""
        self.paths = ()
        self.samples = 0
        """How many images or texts were seen: the smallest batch of a layer, as windows are more, over all batches."""
        self.batches = 0
        """How many batches counted."""
        self.failed: list[tuple[int, str]] = []
        """The batches that failed, by their numbers in the data (or in their process's share of it), and why."""
        self.about = {}

    def __getitem__(self, name: str) -> Moments:
        if name not in self._settings:
            raise KeyError(f"there is no statistic {name!r}; there are {', '.join(map(repr, self))}")
        return Moments.of(self._state(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

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
                f"this batch had attention in {len(paths)} calls, {few(paths)}, and those before in "
                f"{len(self.paths)}, {few(self.paths)}: statistics are those of the same layers"
            )
        before = [statistic.moments for statistic in self._statistics]
        self._is_whole = False
        try:
            for number, statistic in enumerate(self._statistics):
                statistic.take([states[number] for _, _, states in calls])
        except BaseException:
            for statistic, moments in zip(self._statistics, before, strict=True):
                statistic.moments = moments
            self._is_whole = True
            raise
        self.paths = paths
        self.samples += min(size for _, size, _ in calls)  # windows are more than images
        self.batches += 1
        self._is_whole = True

    def saved(self, about: dict[str, Any] | None = None) -> Saved:
        """The statistics as plain data."""
        records = [
            Record(name, _VARIABLE, self._state(name).detach().cpu().numpy(), number, None, 0)
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
        about = self.about if about is None else about
        return Saved("statistics", tuple(self), records, {"statistics": own, "about": about})

    @classmethod
    def from_saved(cls, saved: Saved) -> Collected:
        """The statistics that these were."""
        found, own = Collected([]), saved.about["statistics"]
        found._states = {record.key: torch.from_numpy(np.array(record.value)) for record in saved.records}
        found._settings, found._part, found.paths = own["settings"], own["part"], tuple(own["paths"])
        found.samples, found.batches, found._is_complete = own["samples"], own["batches"], own["is complete"]
        found.failed = [(number, why) for number, why in own["failed"]]
        found.about = saved.about["about"]
        return found

    def _resume(self, file: Path) -> None:
        """Go on from what a run before wrote."""
        try:
            saved = read(file)
        except FileFormatError as error:
            raise FileFormatError(f"{error}; or remove it, and this process's share begins anew") from error
        if saved.kind != "statistics":
            raise ValueError(f"{file} is no checkpoint of statistics: choose another folder")
        before = Collected.from_saved(saved)
        differences: list[tuple[str, Any, Any]] = [("statistics", self._settings, before._settings)]
        for key, what in (
            ("ranks", "a number of processes, each of which goes on with its own share,"),
            ("rank", "a rank"),
            ("model", "a model"),
            ("data", "data, by their number of batches or fingerprint,"),
        ):
            differences.append((what, self._part[key], before._part.get(key)))
        for what, own, others in differences:
            if own != others and not (what.startswith("data") and None in (own, others)):  # of an unknown length
                raise ValueError(
                    f"{file} is of another run, with {what} {others}, where this one has {own}: choose a new folder"
                )
        for statistic in self._statistics:
            statistic.moments = before._states[statistic.name].to(statistic.moments.device)
        self.paths, self.samples, self.batches = before.paths, before.samples, before.batches
        self.failed, self._is_complete = before.failed, before._is_complete
        self._part["runs"] = before._part.get("runs", self._part["runs"])


def merge(parts: Sequence[Collected]) -> Collected:
    """All parts together; ValueError where they are of different statistics or models."""
    first = next((part for part in parts if part.paths), parts[0])
    whole = Collected([])
    for part in parts:
        if part._settings != first._settings or (part.paths and part.paths != first.paths):
            raise ValueError("these are of different statistics or models, which cannot be merged")
    models = {part._part.get("model") for part in parts if not part._part.get("sharded")} - {None}
    if len(models) > 1:
        raise ValueError("these are of models with different weights, which cannot be merged")
    runs = [run for part in parts for run in part._part.get("runs", ())]
    if len({*runs}) < len(runs):
        raise ValueError("the same run is in several of these: they are copies, or parts beside their whole")
    found_by: dict[tuple[Any, ...], Counter[int]] = {}
    for part in parts:
        if "rank" in part._part:
            ranks, data = part._part["ranks"], part._part["data"]
            found_by.setdefault((ranks, data), Counter())[part._part["rank"]] += 1
    for (ranks, _), times in found_by.items():
        missing = [rank for rank in range(ranks) if times[rank] < max(times.values())]
        if missing:
            warn(f"of a run of {ranks} processes the files of these are missing: {numbers(missing)}")
    whole._settings, whole.paths = first._settings, first.paths
    whole._part = {**first._part, "runs": runs}
    if len(parts) > 1:
        whole._part.pop("rank", None)
    for name in first:
        whole._states[name] = merged(torch.stack(as_large([part._state(name) for part in parts])))
    whole.samples, whole.batches = sum(part.samples for part in parts), sum(part.batches for part in parts)
    whole.failed = [failure for part in parts for failure in part.failed]
    whole.about = first.about
    whole._is_complete = all(part._is_complete for part in parts)
    return whole


def few(paths: Sequence[str]) -> str:
    """The first paths of many, for a message."""
    return ", ".join(map(repr, paths[:3])) + (" ..." if len(paths) > 3 else "")


def numbers(numbers: Iterable[int]) -> str:
    """Numbers in their order, for a message."""
    return ", ".join(map(str, sorted(numbers)))

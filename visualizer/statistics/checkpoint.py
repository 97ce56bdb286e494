"""The file of a process, from which a run that was stopped goes on."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path

from ..errors import FileFormatError
from ..store.files import read
from .collected import Collected


class Checkpoint:
    """A process's file in the folder of a run; without a folder nothing is written."""

    def __init__(self, folder: str | PathLike[str] | None, every: int) -> None:
        # Absolute, because the model may change the working directory.
        self._folder = None if folder is None else Path(folder).absolute()
        self._file: Path | None = None
        self._every = every
        self._written = 0
        """How many batches were tried when it was written."""

    def begin(self, new: Collected) -> Collected:
        """What an earlier run wrote for this process, or else `new`.

        Raises:
            FileFormatError: the file is damaged.
            ValueError: it is of another run.
            OSError: the folder cannot be written.
        """
        if self._folder is None:
            return new
        if self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"{str(self._folder)!r} is no folder: checkpoint= takes a folder, new or old")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._folder / f"rank-{new.source.rank}.safetensors"
        found = _resumed(self._file, new) if self._file.exists() else new
        if not found.is_complete:
            self.write(found)  # if this cannot be done, it should fail now and not after hours
        return found

    def write(self, found: Collected) -> None:
        """Write the file again."""
        if self._file is not None:
            found.save(self._file)
            self._written = found.tried

    def write_if_due(self, found: Collected) -> None:
        """Write the file again if `every` batches were tried since the last time."""
        if found.tried >= self._written + self._every:
            self.write(found)

    def remove(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _resumed(file: Path, new: Collected) -> Collected:
    """What the file holds, if it is of the run that `new` begins."""
    try:
        saved = read(file)
    except FileFormatError as error:
        raise FileFormatError(f"{error}; or remove it, and this process's share starts from the beginning") from error
    if saved.kind != "statistics":
        raise ValueError(f"{file} is no checkpoint of statistics: choose another folder")
    found = Collected.from_saved(saved)
    here, there = new.source, found.source
    compared = [
        ("statistics", new.settings, found.settings),
        ("a number of processes, each of which goes on with its own share,", here.ranks, there.ranks),
        ("a rank", here.rank, there.rank),
        ("a model", here.model, there.model),
    ]
    if None not in (here.data, there.data):
        compared.append(("data, by their number of batches or fingerprint,", here.data, there.data))
    for what, mine, others in compared:
        if mine != others:
            raise ValueError(
                f"{file} is of another run, with {what} {others}, where this one has {mine}: choose a new folder"
            )
    found.source = replace(here, runs=there.runs or here.runs)
    for name, state in found.states.items():
        found.states[name] = state.to(new.states[name].device)
    return found

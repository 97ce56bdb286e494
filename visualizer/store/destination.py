"""Looks at where a file is to be written, before a byte is; and writes it in one step."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from os import PathLike
from typing import IO

_FORMATS = {
    **{"safetensors": "safetensors", "html": "HTML", "htm": "HTML", "csv": "tables of text", "tsv": "tables of text"},
    **dict.fromkeys(("pt", "pth", "ckpt", "bin"), "torch.save"),
    **{"npy": "numpy.save", "npz": "numpy.savez", "pkl": "pickle", "pickle": "pickle", "joblib": "joblib"},
    **{"json": "JSON", "jsonl": "JSON", "yaml": "YAML", "yml": "YAML", "toml": "TOML", "xml": "XML"},
    **{"txt": "plain text", "log": "plain text", "md": "Markdown", "db": "databases", "sqlite": "databases"},
    **{"h5": "HDF5", "hdf5": "HDF5", "parquet": "Parquet", "feather": "Arrow", "arrow": "Arrow", "mat": "MATLAB"},
    **{"onnx": "ONNX", "gguf": "GGUF", "tflite": "TensorFlow", "pb": "TensorFlow"},
    **dict.fromkeys(("png", "jpg", "jpeg", "gif", "webp", "avif", "bmp"), "pictures"),
    **dict.fromkeys(("svg", "svgz", "pdf", "eps", "ps", "pgf", "tif", "tiff"), "pictures"),
    **dict.fromkeys(("zip", "tar", "tgz", "gz", "xz", "bz2", "zst", "7z"), "archives"),
    **{"py": "Python", "ipynb": "notebooks", "xls": "Excel", "xlsx": "Excel"},
}
"""By suffix, what a file of that name is taken for."""


def check_destination(path: str | PathLike[str], suffix: str) -> None:
    """Raise, with the way out, unless a file of the format `suffix` ("safetensors") may be written to this path.

    Suffixes of one format, such as "png" and "svg", stand for each other.

    Raises:
        FileNotFoundError: the path is empty.
        IsADirectoryError: it is a folder.
        OSError: it is a device, a named pipe or a socket, which a file must not replace.
        ValueError: its suffix says another format, so that every program would take the file for what it is not.
    """
    name = os.fsdecode(path)
    base, _, ending = os.path.basename(name).rpartition(".")
    other = _FORMATS.get(ending.lower()) if base else None
    if other is not None and other != _FORMATS[suffix]:
        better = os.path.join(os.path.dirname(name), f"{base}.{suffix}")
        raise ValueError(f"{name!r} has the suffix of {other}, and this writes {_FORMATS[suffix]}: name it {better!r}")
    if not name:
        raise FileNotFoundError(f"the path is empty: name a file, such as {'x.' + suffix!r}")
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return  # it does not exist, or writing says what is wrong
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            f"{name!r} is a folder: name a file in it, such as {os.path.join(name, 'x.' + suffix)!r}"
        )
    if not stat.S_ISREG(mode):
        raise OSError(f"{name!r} is {special(mode)}, which a file must not replace: name a file")


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[IO[bytes]]:
    """A new file to be written, which takes the place of what the path had once all of it is on the disk.

    A process that is killed, or an error, leaves the old file or none.
    """
    target = os.path.realpath(os.fsdecode(path))
    # The file's own name with an ending may be too long for a name, and mkstemp hides its files from other users.
    temporary = os.path.join(os.path.dirname(target), f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, OSError) and error.filename == temporary:
            # The folder is missing or not writable, or the name is too long. The user knows the file by this name.
            error.filename = target
            del error.filename2  # with None in its place the message would end in "-> None"
        raise


def special(mode: int) -> str:
    """What a path is that is neither a file nor a folder, as `os.stat` says it."""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a device",
        stat.S_IFCHR: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")

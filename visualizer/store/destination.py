"""Looks at where a file is to be written, before a byte is."""

from __future__ import annotations

import os
import stat
from os import PathLike

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
        IsADirectoryError: the path is a folder.
        OSError: it is a device, a named pipe or a socket, which a file must not replace.
        ValueError: its suffix says another format, so that every program would take the file for what it is not.
    """
    name = os.fspath(path)
    base, _, ending = os.path.basename(name).rpartition(".")
    other = _FORMATS.get(ending.lower()) if base else None
    if other is not None and other != _FORMATS[suffix]:
        better = os.path.join(os.path.dirname(name), f"{base}.{suffix}")
        raise ValueError(f"{name!r} has the suffix of {other}, and this writes {_FORMATS[suffix]}: name it {better!r}")
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


def special(mode: int) -> str:
    """What a path is that is neither a file nor a folder, as `os.stat` says it."""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a device",
        stat.S_IFCHR: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")

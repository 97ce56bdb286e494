"""Installed packages that contain weights and pictures."""

import importlib.util
from pathlib import Path


def package_folder(module: str, distribution: str, install: str = '"get-local[demo]"') -> Path:
    """The folder of a package. It is found without an import, because these packages import much that is not needed."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise not_installed(distribution, install)
    return Path(spec.origin).parent


def not_installed(distribution: str, install: str = '"get-local[demo]"') -> ImportError:
    """The error for a missing package; its message says what to give to ``pip install``."""
    return ImportError(f"{distribution} is not installed: pip install {install}", name=distribution)

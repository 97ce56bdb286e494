"""Installed packages that carry weights and pictures."""

import importlib.util
from pathlib import Path


def package_folder(module: str, distribution: str, install: str = '"get-local[demo]"') -> Path:
    """Where a package lies, found without importing it: these import much that is not needed here."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise not_installed(distribution, install)
    return Path(spec.origin).parent


def not_installed(distribution: str, install: str = '"get-local[demo]"') -> ImportError:
    """What to raise where a package is missing, with what to give to ``pip install``."""
    return ImportError(f"{distribution} is not installed: pip install {install}", name=distribution)

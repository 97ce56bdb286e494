"""Functions of the user's own that build a model, named on the command line as `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .outcome import Mistake


def is_builder(name: str) -> bool:
    """Whether the name of a model is one of a function: it has a colon, and no file is called so."""
    return ":" in name and not os.path.exists(name)


def build(name: str) -> Any:
    """What `package.module:function` returns, or the model that `package.module:model` is.

    The module may lie in the current folder. Mistake where there is no such function, or where it raises.
    """
    import torch

    module, _, qualname = name.partition(":")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        value: Any = importlib.import_module(module)
        for part in qualname.split("."):
            value = getattr(value, part)
        if isinstance(value, torch.nn.Module):
            return value
        try:
            return value()
        except Exception as error:
            raise Mistake(f"{name}() raised {type(error).__name__}: {error}") from error
    except (ImportError, AttributeError, ValueError) as error:
        raise Mistake(f"{name!r} leads nowhere: {error}") from error
    finally:
        sys.path.remove(folder)

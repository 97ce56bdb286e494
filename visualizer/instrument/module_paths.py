"""The modules of a model by the paths that they have in the plain model. torch is looked up here, never imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""For torch's wrappers, by the names of their classes: the attribute that holds the wrapped model."""


def named_modules(module: Any) -> Iterator[tuple[str, Any]]:
    """`module.named_modules()` with the paths of the plain model: without those of torch's wrappers."""
    plain, modules = {"": ""}, {"": module}
    for path, submodule in module.named_modules():
        modules[path] = submodule
        parent, _, name = path.rpartition(".")
        if path:
            holder = modules[parent]
            is_wrapped = name == WRAPPERS.get(type(holder).__name__) and type(holder).__module__.startswith("torch.")
            above = plain[parent]
            plain[path] = above if is_wrapped else f"{above}.{name}" if above else name
        yield plain[path], submodule


def module_classes() -> tuple[type, ...]:
    """`nn.Module`; nothing where torch is not loaded, because then nobody has one."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.nn.Module,)


def is_module(target: Any) -> bool:
    """Whether it is an `nn.Module` object."""
    return isinstance(target, module_classes())


def is_module_class(target: Any) -> bool:
    """Whether it is a class of `nn.Module` objects."""
    return isinstance(target, type) and issubclass(target, module_classes())

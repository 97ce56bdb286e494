"""Of timm: of each file of models, the smallest of each family in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from .making import BATCH, NotBuilt, in_words, is_small, normal, prepared, runner

_SIZES = (
    *(
        "test",
        "pico",
        "femto",
        "atto",
        "zepto",
        "nano",
        "xxs",
        "xxt",
        "xxtiny",
        "tiny",
        "xtiny",
        "t",
        "ti",
        "micro",
        "xs",
        "mini",
    ),
    *("n0", "n", "m0", "s0", "00", "b0", "0", "s", "small", "s1", "12", "l1", "medium", "m", "base", "b"),
)


def names() -> list[str]:
    """One name a family."""
    import timm
    from timm.models import _registry

    first: dict[tuple[str, str], str] = {}
    for module in sorted(_registry._module_to_models):
        for name in sorted(timm.list_models(module=module), key=_size):
            family = re.split(r"[_\d]", name)[0]
            first.setdefault((module, family), name)
    return sorted(set(first.values()))


def _size(name: str) -> tuple[Any, ...]:
    words = name.split("_")
    sizes = [_SIZES.index(word) for word in words if word in _SIZES]
    numbers = re.findall(r"_(\d{3})(?:$|_)", name)
    return min(sizes, default=len(_SIZES)), int(numbers[-1]) if numbers else 224, len(name), name


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model as it is by default, its picture as small as it takes."""
    import timm

    errors = []
    shallow: dict[str, Any]
    for shallow in ({"img_size": 64, "depth": 2}, {"img_size": 64}, {"depth": 2}, {}):
        for size in (64, 96, 128, 192, 224, None):
            if shallow.get("img_size") and size != 64:
                continue

            def make() -> torch.nn.Module:
                return timm.create_model(name, pretrained=False, num_classes=7, **shallow)

            try:
                is_small(make)
                torch.manual_seed(0)
                model = prepared(make())
                shape = model.default_cfg["input_size"]
                run = runner(model, normal(BATCH, shape[0], *((size, size) if size else shape[1:])))
                with torch.no_grad():
                    run()
            except Exception as error:
                errors.append(in_words(error))
                if "positional" in errors[-1] or "unexpected" in errors[-1] or isinstance(error, NotBuilt):
                    break
                continue
            yield f"{size or shape[1]} pixels" + (", depth 2" if "depth" in shallow else ""), model, run, None
            return
    raise NotBuilt("; ".join(dict.fromkeys(errors)))

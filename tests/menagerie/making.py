"""What the builders of all libraries share."""

from __future__ import annotations

import inspect
from typing import Any

import torch

BATCH = 2
MOST_PARAMETERS = 400e6


class NotBuilt(Exception):
    """Says why a model could not be built or run."""


def in_words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:220]


def prepared(model: torch.nn.Module) -> torch.nn.Module:
    """A model in evaluation mode, with weights so large that rows of attention are far from even; none are all zero."""
    model = model.float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point() and parameter.numel() and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 2 and parameter.is_floating_point() and float(parameter.std()) < 0.05:
                parameter.mul_(4)
    return model


def runner(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a model with copies of its inputs, every time from the same random state."""

    def copied(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.clone()
        if isinstance(item, (list, tuple)):
            return type(item)(map(copied, item))
        return {key: copied(value) for key, value in item.items()} if isinstance(item, dict) else item

    def run(**more: Any) -> Any:
        torch.manual_seed(1)
        return model(*map(copied, args), **{key: copied(value) for key, value in kwargs.items()}, **more)

    return run


def normal(*shape: int) -> torch.Tensor:
    """The same random numbers whenever the shape is the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    """The same random integers whenever the shape is the same."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(2))


def accepted(function: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Of some arguments, those that a function takes."""
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in values.items() if key in parameters}


def is_small(make: Any) -> None:
    """Raise NotBuilt if what a function makes has too many parameters."""
    with torch.device("meta"):
        count = sum(one.numel() for one in make().parameters())
    if count > MOST_PARAMETERS:
        raise NotBuilt(f"{count / 1e6:.0f} million parameters")

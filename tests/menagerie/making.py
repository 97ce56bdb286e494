"""What the builders of all libraries share."""

from __future__ import annotations

import inspect
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

BATCH = 2
MOST_PARAMETERS = 400e6
TRIES = 24


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
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            largest = float(parameter.abs().max())  # of memory that nobody filled it may be anything
            if not largest < 1e3 or (parameter.ndim > 1 and not largest):
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


def fitted(model: torch.nn.Module, inputs: dict[str, Any], more: Callable[..., Any]) -> dict[str, Any]:
    """Inputs that a model runs with: what it refuses is changed by what its error says of shapes and of names.

    Args:
        more: makes an input by its name, beside those that are given; None if it cannot.

    Raises:
        Exception: what the model said at last, if nothing that is made of the inputs fits.
    """
    until = time.process_time() + 2
    waiting, tried, last = [inputs], set[str](), None
    while waiting and len(tried) < TRIES and time.process_time() < until:
        given = waiting.pop(0)
        try:
            with torch.no_grad():
                runner(model, **given)()
            return given
        except Exception as error:
            last = error
            for changed in _mended(model, given, error, more):
                shapes = str({key: getattr(value, "shape", value) for key, value in changed.items()})
                if shapes not in tried:
                    tried.add(shapes)
                    waiting.append(changed)
    assert last is not None
    raise last


def _mended(
    model: torch.nn.Module, given: dict[str, Any], error: Exception, more: Callable[..., Any]
) -> Iterator[dict[str, Any]]:
    """What the inputs may be in place of those that a model refused."""
    named, near = _missing(model, given, error)
    made = {name: value for name in named or near if (value := more(name, given)) is not None}
    if made:
        yield {**given, **made}
    for pattern, change in _CHANGES:
        match = re.search(pattern, str(error), re.DOTALL)
        if match is None:
            continue
        numbers = [[*map(int, re.findall(r"\d+", group))] for group in match.groups()]
        for key, value in given.items():
            for shape in change(list(value.shape), *numbers) if isinstance(value, torch.Tensor) and value.ndim else ():
                other = normal(*shape) if value.is_floating_point() else integers(int(value.max()) + 1, *shape)
                yield {**given, key: other.to(value.dtype)}


def _missing(model: torch.nn.Module, given: dict[str, Any], error: Exception) -> tuple[list[str], list[str]]:
    """Arguments that were not given: those that the error names, and those in the line of a forward that failed."""
    wanted = [name for name in inspect.signature(model.forward).parameters if given.get(name) is None]
    words, frame = set(re.findall(r"\w+", str(error))), error.__traceback__
    near: list[str] = []
    while frame is not None:
        known, code = frame.tb_frame.f_locals, frame.tb_frame.f_code
        unset = [name for name in wanted if name in known and known[name] is None]
        if unset:
            lines, first = inspect.getsourcelines(code)
            words_of_line = set(re.findall(r"\w+", "".join(lines[max(0, frame.tb_lineno - first) :][:4])))
            near = [name for name in unset if name in words_of_line] or near
        frame = frame.tb_next
    return [name for name in wanted if name in words], near


def _last(shape: list[int], old: int, new: int) -> list[list[int]]:
    """The last axis is what the layer takes; or what it takes was made of an axis, which must be larger or smaller."""
    if shape[-1] == old:
        return [[*shape[:-1], new]]
    axes = [axis for axis in range(1, len(shape)) if shape[axis] * new % old == 0 and old != new]
    return [[*shape[:axis], shape[axis] * new // old, *shape[axis + 1 :]] for axis in reversed(axes)]


def _either(shape: list[int], one: list[int], other: list[int]) -> list[list[int]]:
    """One axis of one of two sizes that should be the same gets the other size."""
    pairs = [(*one, *other), (*other, *one)]
    return [
        [*shape[:axis], new, *shape[axis + 1 :]]
        for old, new in pairs
        for axis, size in enumerate(shape)
        if size == old and new > 0
    ]


def _axes(shape: list[int], count: int) -> list[list[int]]:
    """One axis more, of frames or of channels, or one fewer."""
    return [[shape[0], 2, *shape[1:]], [shape[0], 1, *shape[1:]]] if len(shape) <= count else [[shape[0], *shape[2:]]]


def _channels(shape: list[int], given: list[int], wanted: list[int]) -> list[list[int]]:
    if shape == given[1:]:  # a batch without channels, or tokens where a picture is wanted
        return [[shape[0], *wanted, shape[1]]] if len(shape) == 2 else [[shape[0], *wanted, 64, 64]]
    return [[*shape[:axis], *wanted, *shape[axis + 1 :]] for axis in range(1, len(shape)) if shape[axis] == given[1]]


_CHANGES: list[tuple[str, Callable[..., list[list[int]]]]] = [
    (r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x", lambda shape, old, new: _last(shape, *old, *new)),
    (r"expected input\[(.*?)\] to have (\d+) channels", _channels),
    (r"normalized_shape=\[(\d+)\].*size ?\[(.*?)\]", lambda shape, new, old: _last(shape, old[-1], *new)),
    (r"not enough values to unpack \(expected (\d+)", lambda shape, count: _axes(shape, *count)),
    (r"too many values to unpack \(expected (\d+)", lambda shape, count: _axes(shape, *count)),
    (r"(\d)D\b", lambda shape, count: _axes(shape, *count)),
    (r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)", _either),
    (r"Expected size (\d+) but got size (\d+)", _either),
    (
        r"shape '\[-1, (.*?)\]' is invalid for input of size (\d+)",
        lambda shape, parts, size: (
            [[*shape[:-1], math.prod(parts)], [shape[0] * parts[0], *shape[1:]]] if math.prod(shape) == size[0] else []
        ),
    ),
    (r"doesn't match model \((\d+)\*(\d+)\)", lambda shape, *size: [[*shape[:-2], *size[0], *size[1]]]),
    (r"\bmono\b", lambda shape: [[shape[0], 1, *shape[1:]]]),
]
"""What an error says of shapes, and what it makes of the shape of an input."""

"""Stacks the values of several keys into one array."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..tensors import is_tensor, shape_of


def stacked(
    lists: Mapping[str, Sequence[Any]],
    call: int | None,
    convert: Callable[[Any], Any] = lambda value: value,
    state: str = "nothing was recorded",
) -> Any:
    """One array or tensor of shape (keys, *shape of a value): see `Cache.stack`.

    `convert` makes an array or a tensor of each chosen value; `state` says for the error why there may be no values.
    """
    if not lists:
        raise ValueError("there is nothing to stack: no key")
    if call is None and len(lists) == 1:
        [(key, values)] = lists.items()
        chosen = [(f"{key}[{i}]", value) for i, value in enumerate(values)]
        if not chosen:
            raise ValueError(f"there is nothing to stack: {key!r} has no values; {state}")
    else:
        chosen = []
        for key, values in lists.items():
            if call is None and len(values) != 1:
                raise ValueError(
                    f"{key!r} has {len(values)} values where stack() needs one of each key; stack(call=-1) takes "
                    "the newest, and limit=1 keeps only that"
                    if values
                    else f"{key!r} has no values: it did not run, or had nothing to record; pop the keys that you "
                    "do not want"
                )
            try:
                chosen.append((key, values[0 if call is None else call]))
            except IndexError:
                raise ValueError(f"{key!r} has {len(values)} values, none at {call}") from None
    return _stacked([(name, convert(value)) for name, value in chosen])


def _stacked(chosen: list[tuple[str, Any]]) -> Any:
    nested = next((name for name, value in chosen if is_tensor(value) and shape_of(value) is None), None)
    if nested is not None:
        raise ValueError(f"{nested!r} has no one shape: it is a nested tensor")
    shapes = {name: getattr(value, "shape", None) for name, value in chosen}
    first, shape = next(iter(shapes.items()))
    for name, other in shapes.items():
        if other != shape:
            raise ValueError(f"{name!r} cannot be stacked on {first!r}: {_of(other)} on {_of(shape)}")
    values = [value for _, value in chosen]
    if all(map(is_tensor, values)):
        torch = sys.modules["torch"]
        if len({value.device for value in values}) > 1:
            values = [value.cpu() for value in values]
        return torch.stack(values)
    import numpy

    stacked = numpy.stack([numpy.asarray(value) for value in values])
    if stacked.dtype == object:
        raise ValueError(f"{first!r} and the others are no arrays, tensors or numbers, but {type(values[0]).__name__}")
    return stacked


def _of(shape: Any) -> str:
    return "a value without a shape" if shape is None else f"shape {tuple(shape)}"

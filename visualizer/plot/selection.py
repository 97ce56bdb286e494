"""The weights that a plot draws, as numpy arrays: those of the chosen layers, heads and queries.

An axis is chosen by an index or by a named reduction. An axis of length 1 stays, so that a batch of one image and a
model of one head cannot be confused. Only the chosen layers are converted, and of an `AttentionMap` only the
rows that are drawn are computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np

from ..reading import Array, Reduction, RowCheck, as_numbers, check_not_empty, layers_in

Choice: TypeAlias = int | Reduction


@dataclass(frozen=True)
class Selection:
    """The weights to draw, and a label that says which these are."""

    weights: Array
    """(queries, keys), or (heads, queries, keys) for all heads."""
    label: str
    """Such as "layer 11, mean of 6 heads"; empty if there was nothing to choose from."""


def select(
    maps: Any,
    *,
    layer: Choice | None,
    batch: Choice,
    head: Choice | None = None,
    all_heads: bool = False,
    query: int | None = None,
) -> Selection:
    """The weights of one layer and image, and of one head or of all; of all queries or of one.

    >>> select(np.full((1, 6, 2, 2), 0.5), layer=None, batch=0, head=-1).label
    'head 5'

    Warns of rows that do not sum to one and of rows with NaN.

    Raises:
        ValueError: there are no attention maps; all rows hold NaN, or there are infinite values; or there are several
            layers, images or heads and none is chosen.
        IndexError: a choice is out of range.
        TypeError: a choice is neither an index nor a reduction.
    """
    layers, check = read_layers(maps), RowCheck()
    at = _position("layer", layer, len(layers), layers)
    if at is None:
        same_shape(layers, f"layer={layer!r}")
    chosen = layers if at is None else [layers[at]]
    weights = np.stack([_image(one, layers, batch, head, all_heads, query, check) for one in chosen])
    check.warn("left blank", "drawn")
    weights = _reduce(weights, layer if at is None else None, axis=0)[0]
    words = [_words("layer", layer, at, len(layers)), "" if all_heads else head_words(chosen[0], head)]
    return Selection(weights if all_heads else weights[0], ", ".join(word for word in words if word))


def select_layers(maps: Any, *, batch: Choice, head: Choice | None, query: int | None) -> Iterator[Array]:
    """The weights of one image, one layer at a time: (heads, queries, keys), with one head if it is chosen.

    >>> [weights.shape for weights in select_layers([np.full((1, 6, 2, 2), 0.5)] * 2, batch=0, head=None, query=0)]
    [(6, 1, 2), (6, 1, 2)]

    Raises as `select` does, and warns after the last layer.
    """
    layers, check = read_layers(maps), RowCheck()
    for one in layers:
        yield _image(one, layers, batch, head, head is None, query, check)
    check.warn("left blank", "drawn")


def token_axes(maps: Any, layer: Choice | None) -> tuple[int, int]:
    """(queries, keys) of the chosen layer, or of the layers that are reduced to one; computes no weights."""
    layers = read_layers(maps)
    at = _position("layer", layer, len(layers), layers)
    if at is None:
        same_shape(layers, f"layer={layer!r}")
    queries, keys = layers[at or 0].shape[2:]
    return int(queries), int(keys)


def head_words(layer: Any, head: Choice | None) -> str:
    """Such as "head 3" or "mean of 6 heads"; empty if the layer has one head."""
    heads = int(layer.shape[1])
    return _words("head", head, _position("head", head, heads, [layer]), heads)


def same_shape(layers: Sequence[Any], user: str) -> None:
    """Raise ValueError unless the layers agree in all axes but the batch; `user` is what needs it, for the message."""
    shapes = [tuple(map(int, one.shape[1:])) for one in layers]
    if len(set(shapes)) > 1:
        listing = ", ".join(map(str, shapes))
        raise ValueError(f"{user} needs layers of one shape, got (heads, queries, keys) {listing}")


def _image(
    one: Any, layers: list[Any], batch: Choice, head: Choice | None, all_heads: bool, query: int | None, check: RowCheck
) -> Array:
    """(heads, queries, keys) of one layer, for one image or for all images reduced to one."""
    images, heads = map(int, one.shape[:2])
    image = _position("batch", batch, images, layers)
    which = None if all_heads else _position("head", head, heads, layers)
    if hasattr(one, "rows") and hasattr(one, "dense"):  # an AttentionMap
        weights = one.dense() if query is None else one.rows(query)
    else:
        weights = one if query is None else one[:, :, query : query + 1]
    weights = as_numbers(weights if image is None else weights[image : image + 1])
    weights = weights if which is None else weights[:, which : which + 1]
    if check.look(weights, "the map").all():
        raise ValueError("every row of the chosen map holds NaN: there is nothing to draw")
    # Heads are reduced before layers, as in a rollout; max and mean do not commute.
    if not all_heads:
        weights = _reduce(weights, head if which is None else None, axis=1)
    chosen: Array = _reduce(weights, batch if image is None else None, axis=0)[0]
    return chosen


def read_layers(maps: Any) -> list[Any]:
    """The layers in whatever holds attention, as in `layers_in`; raises ValueError if one is empty, too."""
    layers = layers_in(maps).layers
    check_not_empty(layers)
    return layers


def _position(name: str, choice: Choice | None, size: int, layers: list[Any]) -> int | None:
    """The chosen index along an axis, counted from the front; None for a reduction."""
    options = f'{name}=0 to {size - 1} (negative counts from the end) or {name}="mean", "max" or "min"'
    if choice is None:
        if size > 1:
            raise ValueError(f"there are {size} {name}s and none is chosen: pass {options}")
        return 0
    if isinstance(choice, str):
        if choice not in get_args(Reduction):
            raise ValueError(f"{name}={choice!r} is not a reduction: pass {options}")
        return None
    try:
        index = operator.index(choice)
    except TypeError:
        raise TypeError(f"{name}={choice!r} is a {type(choice).__name__}: pass {options}") from None
    if not -size <= index < size:
        shape = tuple(map(int, layers[0].shape))
        hint = ""
        if name == "layer" and size == 1 and shape[0] > 1:
            hint = "; if its first axis is the layers, pass list(maps), or maps[:, None] with an axis for the batch"
        raise IndexError(
            f"{name}={choice} is out of range: {len(layers)} layer(s) of (batch, heads, queries, keys) = {shape} have "
            f"{size} along {name}: pass {options}{hint}"
        )
    return index % size


def _reduce(weights: Array, reduction: Choice | None, axis: int) -> Array:
    if reduction is None:
        return weights
    reduced: Array = getattr(weights, str(reduction))(axis=axis, keepdims=True)
    return reduced


def _words(name: str, choice: Choice | None, position: int | None, size: int) -> str:
    if size == 1:
        return ""
    return f"{choice} of {size} {name}s" if position is None else f"{name} {position}"

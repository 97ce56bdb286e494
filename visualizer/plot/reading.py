"""What a user hands to a plot, read into plain numpy: the maps of the chosen layers, heads and queries.

An axis is picked by an index or by a named reduction, never dropped because its length happens to be one: a batch
of one image and a model of one head would otherwise be taken for each other. Only the layers asked for are converted,
and of an `AttentionMap` only the rows that are drawn are computed. torch is recognised by what its tensors can do and
never imported.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import warn

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Reduction: TypeAlias = Literal["mean", "max", "min"]
Choice: TypeAlias = int | Reduction

_SHAPES = "(queries, keys), (heads, queries, keys), (batch, heads, queries, keys)"

# Rounding of a whole row in bfloat16 stays below this; logits and dropout do not.
_ROW_SUM_TOLERANCE = 0.02


@dataclass(frozen=True)
class Selection:
    """The weights to draw and the words that say which they are."""

    weights: Array
    """(queries, keys), or (heads, queries, keys) where all heads were asked for."""
    label: str
    """Such as "layer 11, mean of 6 heads"; empty where there was nothing to choose from."""


def select(
    maps: Any, *, layer: Choice | None, batch: Choice, head: Choice | None, query: int | None = None
) -> Selection:
    """One layer's weights of one image, for one head; `select_all` takes every head. Of one query only, if told so.

    >>> select(np.full((1, 6, 2, 2), 0.5), layer=None, batch=0, head=-1).label
    'head 5'

    Raises ValueError for shapes and contents that are no attention maps and for a choice left open, IndexError for
    one out of range, TypeError for one that is neither an index nor a reduction. Warns of rows that do not sum to
    one and of NaN.
    """
    layers = read_layers(maps)
    at = _position("layer", layer, len(layers), layers)
    weights = _selected(layers, layer, at, batch, head, all_heads=False, query=query)[0]
    words = [_words("layer", layer, at, len(layers)), head_words(layers[at or 0], head)]
    return Selection(weights, ", ".join(word for word in words if word))


def select_all(maps: Any, *, layer: Choice | None, batch: Choice) -> Selection:
    """Every head's weights of one layer and one image, (heads, queries, keys); raises and warns as `select` does.

    >>> select_all([np.full((1, 6, 2, 2), 0.5)] * 12, layer=-1, batch=0).label
    'layer 11'
    """
    layers = read_layers(maps)
    at = _position("layer", layer, len(layers), layers)
    weights = _selected(layers, layer, at, batch, None, all_heads=True, query=None)
    return Selection(weights, _words("layer", layer, at, len(layers)))


def select_layers(maps: Any, *, batch: Choice, head: Choice | None, query: int | None) -> Iterator[Array]:
    """Each layer's weights of one image, one layer at a time: (heads, queries, keys), one head where it is chosen.

    >>> [weights.shape for weights in select_layers([np.full((1, 6, 2, 2), 0.5)] * 2, batch=0, head=None, query=0)]
    [(6, 1, 2), (6, 1, 2)]

    Raises as `select` does, and warns behind the last.
    """
    layers, doubts = read_layers(maps), _Doubts()
    for one in layers:
        yield _image(one, layers, batch, head, head is None, query, doubts)
    doubts.warn()


def token_axes(maps: Any, layer: Choice | None) -> tuple[int, int]:
    """(queries, keys) of the chosen layer, or of all that are reduced; no weight is computed."""
    layers = read_layers(maps)
    at = _position("layer", layer, len(layers), layers)
    if at is None:
        same_shape(layers, f"layer={layer!r}")
    queries, keys = layers[at or 0].shape[-2:]
    return int(queries), int(keys)


def head_words(layer: Any, head: Choice | None) -> str:
    """Such as "head 3" or "mean of 6 heads"; empty where a layer has one head."""
    heads = _axes_of(layer)[1]
    return _words("head", head, _position("head", head, heads, [layer]), heads)


def same_shape(layers: Sequence[Any], what: str) -> None:
    """Raise ValueError unless the layers agree in all axes but the batch."""
    shapes = [_axes_of(one)[1:] for one in layers]
    if len(set(shapes)) > 1:
        listing = ", ".join(map(str, shapes))
        raise ValueError(f"{what} needs layers of one shape, got (heads, queries, keys) {listing}")


def _selected(
    layers: list[Any],
    layer: Choice | None,
    at: int | None,
    batch: Choice,
    head: Choice | None,
    all_heads: bool,
    query: int | None,
) -> Array:
    """(heads, queries, keys) of one layer, or of all layers reduced."""
    if at is None:
        same_shape(layers, f"layer={layer!r}")
    doubts = _Doubts()
    chosen = layers if at is None else [layers[at]]
    reduced = [_image(one, layers, batch, head, all_heads, query, doubts) for one in chosen]
    doubts.warn()
    whole: Array = _reduce(np.stack(reduced), layer if at is None else None, axis=0)[0]
    return whole


def _image(
    one: Any, layers: list[Any], batch: Choice, head: Choice | None, all_heads: bool, query: int | None, doubts: _Doubts
) -> Array:
    """One layer's (heads, queries, keys) of one image, or of all reduced."""
    images, heads, _, _ = _axes_of(one)
    image = _position("batch", batch, images, layers)
    which = None if all_heads else _position("head", head, heads, layers)
    if hasattr(one, "rows") and hasattr(one, "dense"):  # an AttentionMap
        weights = one.dense() if query is None else one.rows(query)
    else:
        weights = one[(None,) * (4 - len(one.shape))]
        weights = weights if query is None else weights[:, :, query : query + 1]
    weights = as_numbers(weights if image is None else weights[image : image + 1])
    weights = weights if which is None else weights[:, which : which + 1]
    doubts.look(weights)
    # Heads before layers, as rollout has it; max and mean do not commute.
    if not all_heads:
        weights = _reduce(weights, head if which is None else None, axis=1)  # one head or the reduction
    chosen: Array = _reduce(weights, batch if image is None else None, axis=0)[0]
    return chosen


def read_layers(maps: Any) -> list[Any]:
    """One unconverted tensor, array or AttentionMap per layer, each of two to four axes."""
    if isinstance(maps, Mapping):
        maps = _of_mapping(maps)
    if isinstance(maps, Sequence) and not isinstance(maps, (list, tuple, str)):
        maps = list(maps)  # what attention(model) found
    if maps is None or (isinstance(maps, (list, tuple)) and (not maps or any(one is None for one in maps))):
        what = "None" if maps is None else f"a {type(maps).__name__} " + ("of None" if maps else "without entries")
        raise ValueError(
            f"there are no attention maps here: got {what}. A transformers model with "
            'attn_implementation="sdpa" (the default) or another fused kernel does not return weights: load it with '
            'attn_implementation="eager" and call it with output_attentions=True, or record them with '
            "visualizer.attention(model). For captured maps: capture has to be active while the model runs"
        )
    if isinstance(maps, (list, tuple)):
        if any(isinstance(one, (list, tuple)) and any(is_array(inner) for inner in one) for one in maps):
            raise ValueError(
                f"maps is a {type(maps).__name__} of {len(maps)} lists of arrays: choose one of them. "
                "generate() returns one tuple of layers per step, maps[step] is what a plot takes"
            )
        if all(is_array(one) and len(one.shape) >= 2 for one in maps):
            layers = list(maps)
            for number, one in enumerate(layers):
                if len(one.shape) > 4 or 0 in one.shape:
                    raise ValueError(
                        f"layer {number} of the {len(layers)} has shape {tuple(one.shape)}; expected a non-empty "
                        + _SHAPES
                    )
            return layers
    if not is_array(maps):
        maps = as_numbers(maps)  # nested lists of numbers
    shape = tuple(maps.shape)
    if not 2 <= len(shape) <= 5 or 0 in shape:
        raise ValueError(
            f"maps has shape {shape}; expected a non-empty {_SHAPES} or (layers, batch, heads, queries, keys)"
        )
    return [maps[number] for number in range(shape[0])] if len(shape) == 5 else [maps]


def _of_mapping(maps: Mapping[Any, Any]) -> Any:
    """The list of layers in a cache: its only entry, or one array of each entry."""
    values = [value for value in maps.values() if not isinstance(value, list) or value]  # a key that nothing ran under
    if len(values) == 1:
        return values[0]
    singles = [value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value for value in values]
    if not all(is_array(one) for one in singles):
        counts = ", ".join(
            f"{key!r}: {len(value) if isinstance(value, (list, tuple)) else type(value).__name__}"
            for key, value in list(maps.items())[:6]
        )
        raise ValueError(f"maps has {len(values)} keys and not one array for each ({counts}): pass maps[key]")
    return singles


def is_array(value: Any) -> bool:
    """Whether it is an array, a tensor or an AttentionMap."""
    return hasattr(value, "shape") and (hasattr(value, "__getitem__") or hasattr(value, "__array__"))


def as_numbers(value: Any, name: str = "maps") -> Array:
    """The value as floats of at least 32 bits; raises ValueError or TypeError where it holds no numbers.

    >>> as_numbers([[1, 2]]).dtype
    dtype('float32')
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biufV" and array.dtype.names is None:  # V: bfloat16 as jax and ml_dtypes have it
            return array.astype(np.result_type(array.dtype, np.float32) if array.dtype.kind == "f" else np.float32)
    except ValueError as error:
        raise ValueError(f"{name} is a ragged {type(value).__name__}, not an array: {error}") from error
    raise TypeError(f"{name}: expected numbers, got {type(value).__name__} of {array.dtype}")


def _axes_of(one: Any) -> tuple[int, int, int, int]:
    """(batch, heads, queries, keys) of a layer, ones for the axes that it does not have."""
    shape = [int(size) for size in one.shape]
    batch, heads, queries, keys = [1] * (4 - len(shape)) + shape
    return batch, heads, queries, keys


def _position(name: str, choice: Choice | None, size: int, layers: list[Any]) -> int | None:
    """The axis' chosen index, counted from the front; None for a reduction."""
    options = f'{name}=0 to {size - 1} (negative counts from the end) or {name}="mean", "max" or "min"'
    if choice is None:
        if size > 1:
            raise ValueError(f"maps has {size} {name}s and none is chosen: pass {options}")
        return 0
    if isinstance(choice, str):
        if choice not in get_args(Reduction):
            raise ValueError(f"{name}={choice!r} is no reduction: pass {options}")
        return None
    try:
        index = operator.index(choice)
    except TypeError:
        raise TypeError(f"{name}={choice!r} is a {type(choice).__name__}: pass {options}") from None
    if not -size <= index < size:
        shape = tuple(layers[0].shape)
        axes = ["batch", "heads", "queries", "keys"][-len(shape) :]
        hint = ""
        if name == "layer" and size == 1 and len(shape) == 4:
            hint = "; if its first axis is the layers, pass list(maps), or maps[:, None] with an axis for the batch"
        raise IndexError(
            f"{name}={choice} is out of range: {len(layers)} layer(s) of shape {shape}, read as ({', '.join(axes)}), "
            f"have {size} along {name}: pass {options}{hint}"
        )
    return index % size


class _Doubts:
    """What makes weights doubtful as attention, counted over all that are looked at."""

    def __init__(self) -> None:
        self._rows = self._missing = self._odd = 0
        self._low, self._high = np.inf, -np.inf

    def look(self, weights: Array) -> None:
        """Count the doubtful rows of (batch, heads, queries, keys); raises ValueError where nothing can be drawn."""
        if np.isinf(weights).any():
            raise ValueError(
                "maps holds infinite values, which no colour scale can show: these look like masked logits, take "
                "their softmax over the keys first"
            )
        missing = np.isnan(weights).any(-1)
        if missing.all():
            raise ValueError("every row of the chosen map holds NaN: there is nothing to draw")
        sums = weights.sum(-1, dtype=np.float64)
        # A fully masked row is all zeros in torch's fused attention: rightly so, and no reason to warn.
        odd = ~missing & (np.abs(sums - 1) > _ROW_SUM_TOLERANCE) & weights.any(-1)
        self._rows += missing.size
        self._missing += int(missing.sum())
        self._odd += int(odd.sum())
        if odd.any():
            self._low, self._high = min(self._low, sums[odd].min()), max(self._high, sums[odd].max())

    def warn(self) -> None:
        """Say what was found."""
        if self._missing:
            warn(
                f"{self._missing} of {self._rows} rows hold NaN and are left blank (a fully masked row gives NaN in a "
                "softmax)"
            )
        if self._odd:
            warn(
                f"{self._odd} of {self._rows} rows do not sum to 1 (sums from {self._low:.3g} to {self._high:.3g}): "
                "are these logits before the softmax, or weights after dropout? They are drawn as they are"
            )


def _reduce(weights: Array, reduction: Choice | None, axis: int) -> Array:
    if reduction is None:
        return weights
    reduced: Array = getattr(weights, str(reduction))(axis=axis, keepdims=True)
    return reduced


def _words(name: str, choice: Choice | None, position: int | None, size: int) -> str:
    if size == 1:
        return ""
    return f"{choice} of {size} {name}s" if position is None else f"{name} {position}"

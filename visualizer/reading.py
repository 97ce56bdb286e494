"""Read whatever holds attention maps: the layers in it, and whether their numbers are attention weights.

Analyses, plots, the explorer and the statistics all read their input here, so that each takes what the others take: an
`AttentionMap`, a tensor, an array, nested lists of numbers, several of these as layers, a cache of captured values, or
what `attention` recorded. Missing axes have length 1: (queries, keys) and (heads, queries, keys) are a batch of one.

Nothing is converted before it is needed, and torch is never imported: a tensor is recognised by its `detach`, an
`AttentionMap` by its `rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import warn

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Reduction: TypeAlias = Literal["mean", "max", "min"]
"""How several maps become one."""

_AXES = "(queries, keys), (heads, queries, keys) or (batch, heads, queries, keys)"
_ROW_SUM_TOLERANCE = 0.02  # rounding of a whole row in bfloat16 stays below it; logits and dropout do not
_LEAST = -1e-6  # numbers between it and 0 are weights with a rounding error


class Layers(NamedTuple):
    """The layers in whatever holds attention; made by `layers_in`."""

    layers: list[Any]
    """For each layer an AttentionMap, a tensor or an array, of the axes (batch, heads, queries, keys)."""
    is_one: bool
    """Whether the input was one map, not a sequence of layers."""
    are_arrays: bool
    """Whether there was neither an AttentionMap nor a tensor among them."""
    sources: list[Any]
    """The objects that the layers were read from: one for each layer, or a single one of five axes for all."""


def layers_in(attention: Any) -> Layers:
    """The layers in whatever holds attention, from the first to the last; of a generation, those of the whole text.

    >>> read = layers_in(np.full((6, 4, 4), 1 / 4))                # one map of 6 heads
    >>> read.layers[0].shape, read.is_one
    ((1, 6, 4, 4), True)
    >>> len(layers_in({"blocks.0.attn": [np.eye(4)], "blocks.1.attn": [np.eye(4)]}).layers)
    2

    Raises:
        ValueError: there are no maps, as a fused kernel returns None for its weights; an array has too few or too many
            axes; or a mapping has several maps under a key.
        TypeError: this holds no numbers.
    """
    if getattr(attention, "is_generation", False):
        attention = attention.generated()  # one map of each module, in place of one of each step
    attention = _means_in(attention)
    if isinstance(attention, Mapping):
        is_output = hasattr(attention, "to_tuple")  # what a model of transformers returns
        attention = _layers_of_output(attention) if is_output else _layers_of_mapping(attention)
    if not is_array(attention):
        attention = _layers_of_sequence(attention)
    if isinstance(attention, list):
        sources, is_one = attention, False
        layers = [_with_four_axes(source, f"layer {number}") for number, source in enumerate(sources)]
    elif len(attention.shape) == 5:
        attention = _dense_numbers(attention, "the input")
        sources, is_one = [attention], False
        layers = [attention[number] for number in range(attention.shape[0])]
    else:
        sources, is_one = [attention], True
        layers = [_with_four_axes(attention, "the input")]
    if not layers:
        raise _no_maps(f"the shape {tuple(attention.shape)}")
    are_arrays = not any(hasattr(layer, "rows") or hasattr(layer, "detach") for layer in layers)
    return Layers(layers, is_one, are_arrays, sources)


def _means_in(value: Any) -> Any:
    """The mean maps that a statistic collected, a layer each; any other value as it is."""
    if isinstance(value, Mapping) and value and all(_is_statistic(one) for one in value.values()):
        maps = {name: one for name, one in value.items() if one.mean.ndim == 4}
        if len(maps) != 1:
            raise ValueError(
                f"the statistics {', '.join(map(repr, value))} have {len(maps) or 'no'} maps: MeanMap collects them; "
                "pass one, such as found['mean_map']"
            )
        [value] = maps.values()
    if not _is_statistic(value):
        return value
    if value.mean.ndim != 4:
        raise ValueError(
            f"this statistic has a mean of the shape {value.mean.shape}, not (layers, heads, queries, keys): "
            "plot.statistic draws it"
        )
    is_known = ~np.isnan(value.mean).all((0, 1))  # the end of long texts may be padding in all of them
    return list(value.mean[:, :, is_known.any(1)][..., is_known.any(0)][:, None])


def _is_statistic(value: Any) -> bool:
    """Whether it holds moments of a statistic; of an array `mean` is a method."""
    return isinstance(getattr(value, "mean", None), np.ndarray) and hasattr(value, "count")


def _layers_of_mapping(mapping: Mapping[Any, Any]) -> Any:
    """The values under the only key that has any, or one map of each key."""
    lists = {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in mapping.items()}
    filled = {key: value for key, value in lists.items() if not isinstance(value, list) or value}
    if len(filled) == 1:
        [value] = filled.values()
        return value if isinstance(value, list) or _axes(value) == 5 else [value]
    counts = {key: len(value) for key, value in filled.items() if isinstance(value, list) and len(value) > 1}
    if counts:
        several = ", ".join(f"{key!r} ({count} values)" for key, count in list(counts.items())[:3])
        raise ValueError(
            f"each key must have one map, a layer's, and {several} has not: pass the values of one key, or choose by "
            "hand, such as [values[-1] for values in found.values()]"
        )
    if not filled:
        raise _no_maps(f"a {type(mapping).__name__} without entries")
    return [value[0] if isinstance(value, list) else value for value in filled.values()]


def _layers_of_output(output: Mapping[str, Any]) -> Any:
    """The attentions among all that a model of transformers returned."""
    names = [name for name in output if name.endswith("attentions")]
    names = [name for name in names if output[name] is not None and len(output[name])] or names[:1]
    if len(names) > 1:
        raise ValueError(f"a {type(output).__name__} has {', '.join(names)}: pass one of them")
    if not names:
        raise _no_maps(f"a {type(output).__name__} without attentions")
    return output[names[0]]


def _layers_of_sequence(sequence: Any) -> Any:
    """A list of maps, or an array where the sequence is one of numbers."""
    if sequence is None:
        raise _no_maps("None")
    if isinstance(sequence, (str, bytes)) or not hasattr(sequence, "__iter__"):
        if hasattr(sequence, "__array__") or hasattr(sequence, "__array_interface__"):
            return as_numbers(sequence)
        raise TypeError(f"attention is made of AttentionMaps, tensors or arrays, not of {type(sequence).__name__}")
    items = list(sequence)
    if not items or any(item is None for item in items):
        raise _no_maps(f"a {type(sequence).__name__} {'of None' if items else 'without entries'}")
    if any(isinstance(item, (list, tuple)) and any(_axes(inner) >= 2 for inner in item) for item in items):
        raise ValueError(
            f"this is a {type(sequence).__name__} of {len(items)} lists of maps: choose one of them. generate() "
            "returns one tuple of layers for each step, so pass attentions[step]"
        )
    return items if all(_axes(item) >= 2 for item in items) else as_numbers(items)


def _with_four_axes(layer: Any, name: str) -> Any:
    layer = _dense_numbers(layer, name)
    missing = 4 - len(layer.shape)
    if not 0 <= missing <= 2:
        raise ValueError(
            f"{name} has the shape {tuple(layer.shape)}; a map has the axes {_AXES}. One array of several layers has "
            "five: (layers, batch, heads, queries, keys)"
        )
    return layer[(None,) * missing] if missing else layer


def _dense_numbers(layer: Any, name: str) -> Any:
    """The layer, without the blanks of a sparse tensor; TypeError where it has no real numbers to read."""
    if _is_map(layer):
        return layer
    dtype, what = getattr(layer, "dtype", None), ""
    if hasattr(layer, "detach"):
        layer = layer.to_dense() if "sparse" in str(layer.layout) else layer
        what = "a tensor on the meta device, which holds no numbers" if layer.is_meta else ""
    elif isinstance(layer, np.ma.MaskedArray) and layer.mask.any():
        what = "a masked array: pass its numbers, such as array.filled(0)"
    if not what and (getattr(dtype, "kind", "f") in "cOSUmM" or "complex" in str(dtype)):
        what = f"of {dtype}, and weights are real numbers"
    if what:
        raise TypeError(f"{name} is {what}")
    return layer


def _no_maps(got: str) -> ValueError:
    return ValueError(
        f"there are no attention maps here: got {got}. A transformers model with "
        'attn_implementation="sdpa" (the default) or another fused kernel does not return weights: load it with '
        'attn_implementation="eager" and call it with output_attentions=True, or record them with '
        "visualizer.attention(model). For captured maps: capture has to be active while the model runs"
    )


def _is_map(value: Any) -> bool:
    return hasattr(value, "rows") and hasattr(value, "dense")


def _axes(value: Any) -> int:
    return len(value.shape) if is_array(value) else 0


def is_array(value: Any) -> bool:
    """Whether it is an array of any library, a tensor or an AttentionMap."""
    return hasattr(value, "shape") and (hasattr(value, "__getitem__") or hasattr(value, "__array__"))


def as_numbers(value: Any, name: str = "maps") -> Array:
    """The value as floats of at least 32 bits; `name` is what an error calls it.

    >>> as_numbers([[1, 2]]).dtype
    dtype('float32')

    Raises:
        ValueError: nested lists have different lengths.
        TypeError: the value holds no numbers.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.to_dense() if "sparse" in str(value.layout) else value
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
        if array.dtype.kind in "biufV" and array.dtype.names is None:  # V: bfloat16 as jax and ml_dtypes have it
            return array.astype(np.result_type(array.dtype, np.float32) if array.dtype.kind == "f" else np.float32)
    except ValueError as error:
        raise ValueError(f"{name} is a ragged {type(value).__name__}, not an array: {error}") from error
    raise TypeError(f"{name}: expected numbers, got {type(value).__name__} of {array.dtype}")


def check_not_empty(layers: list[Any]) -> None:
    """Raise ValueError if a layer has an axis of length 0."""
    for number, layer in enumerate(layers):
        if 0 in layer.shape:
            raise ValueError(
                f"layer {number} is empty: read as (batch, heads, queries, keys), its shape is {tuple(layer.shape)}"
            )


def check_least(least: float, name: str, most: float = 1.0) -> None:
    """Raise ValueError if the smallest number of a map, which the error calls `name`, is below 0 by more than rounding,
    or if it or the largest is infinite.

    >>> check_least(-1e-7, "layer 0")
    """
    if least == -np.inf or most == np.inf:
        raise ValueError(_not_weights(name, "infinite values"))
    if least < _LEAST:
        raise ValueError(_not_weights(name, f"{least:.3g}"))


def _not_weights(name: str, what: str) -> str:
    return (
        f"{name} holds {what}, and attention weights are finite and not negative: are these scores before the softmax? "
        "Take their softmax over the keys first"
    )


class RowCheck:
    """Which rows are doubtful as attention weights, counted over all rows that it looks at.

    >>> check = RowCheck()
    >>> check.look(np.array([[0.5, 0.5], [np.nan, np.nan]]), "layer 0")
    array([False,  True])
    """

    def __init__(self) -> None:
        self._rows = self._missing = self._odd = 0
        self._low, self._high = np.inf, -np.inf

    def look(self, weights: Array, name: str, may_lack: bool = False) -> npt.NDArray[np.bool_]:
        """Count the doubtful rows of (..., queries, keys), and get which rows (..., queries) hold NaN.

        `may_lack`: whether it is known that rows need not sum to 1.

        Raises ValueError for infinite values, which neither a colour nor a byte can show.
        """
        sums = weights.sum(-1, dtype=np.float64)
        if not np.isfinite(sums).all() and np.isinf(weights).any():
            raise ValueError(_not_weights(name, "infinite values"))
        missing: npt.NDArray[np.bool_] = np.isnan(sums)
        odd = (np.abs(sums - 1) > _ROW_SUM_TOLERANCE) & (not may_lack)  # NaN compares as False
        # The row of a query whose keys are all masked is zeros in torch's fused kernels: rightly so.
        odd[odd] = weights[odd].any(-1)
        self._rows += sums.size
        self._missing += int(missing.sum())
        self._odd += int(odd.sum())
        if odd.any():
            self._low, self._high = min(self._low, sums[odd].min()), max(self._high, sums[odd].max())
        return missing

    def warn(self, missing: str, odd: str) -> None:
        """Warn of rows that hold NaN and of rows that do not sum to one; the arguments say how these are shown."""
        if self._missing:
            warn(
                f"{self._missing} of {self._rows} rows hold NaN and are {missing} (the softmax of a row whose keys are "
                "all masked is NaN)",
                "rows-of-nan",
            )
        if self._odd:
            warn(
                f"{self._odd} of {self._rows} rows do not sum to 1 (sums from {self._low:.3g} to {self._high:.3g}): "
                f"are these scores before the softmax, or weights after dropout? They are {odd} as they are",
                "rows-that-do-not-sum-to-1",
            )

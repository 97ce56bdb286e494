"""What the analyses share: layers as AttentionMaps, a function of each layer, and checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from ..layout import Layout
from ..maps import AttentionMap
from ..reading import Layers, Reduction, as_numbers, check_least, layers_in


def maps_of(attention: Any) -> Layers:
    """What `layers_in` finds in whatever holds attention, with an AttentionMap for each layer."""
    read = layers_in(attention)
    return read._replace(layers=[_as_map(layer) for layer in read.layers])


def _as_map(layer: Any) -> AttentionMap:
    if isinstance(layer, AttentionMap):
        return layer
    return AttentionMap(layer if isinstance(layer, (Tensor, np.ndarray)) else as_numbers(layer))


def layers_of(attention: Any) -> Layers:
    """Like `maps_of`, but NaN rows (a softmax over nothing) become zeros.

    Raises ValueError where a weight is below zero by more than rounding, or infinite.
    """
    read = maps_of(attention)
    return read._replace(layers=[without_nan(layer, number) for number, layer in enumerate(read.layers)])


def without_nan(layer: AttentionMap, number: int = 0) -> AttentionMap:
    """The layer with zeros for NaN and for what rounding left below zero; itself where it has neither.

    Raises ValueError where a weight is below zero by more than rounding, or infinite.
    """
    if not layer.is_dense or 0 in layer.shape:
        return layer
    least, most = torch.stack([torch.stack(rows.aminmax()) for _, rows in layer.chunks()]).unbind(1)
    if bool(((least >= 0) & (most < math.inf)).all()):  # NaN compares as False
        return layer
    weights = layer.dense().nan_to_num(0, math.inf, -math.inf)
    check_least(weights.amin().item(), layer_label(number, layer), weights.amax().item())
    clean = AttentionMap(weights.clamp_(min=0), path=layer.path, kind=layer.kind).described_as(layer)
    clean.gradient = layer.gradient
    return clean


def per_layer(attention: Any, analyse: Callable[[AttentionMap], Tensor]) -> Any:
    """The result of a function of one layer; of several layers the stacked results, with the layers first."""
    read = layers_of(attention)
    results = [analyse(layer) for layer in read.layers]
    if read.is_one:
        return like_input(results[0], read.are_arrays)
    for number, (layer, result) in enumerate(zip(read.layers, results, strict=True)):
        if result.shape != results[0].shape:
            raise ValueError(
                f"layers of different shapes make no common array: {layer_label(0, read.layers[0])} is "
                f"{read.layers[0].shape} and {layer_label(number, layer)} {layer.shape}. Pass them one by one"
            )
    return like_input(torch.stack([result.to(results[0].device) for result in results]), read.are_arrays)


def real_tokens(layout: Layout | None, batch: int, tokens: int) -> Tensor | None:
    """Which tokens are not padding, (batch, tokens) as bool on the CPU; None where that is not known, or all are real.

    >>> from visualizer.layout import Part
    >>> real_tokens(Layout((Part("padding", 1), Part("text", 2))), 2, 3)
    tensor([[False,  True,  True],
            [False,  True,  True]])
    """
    if layout is None or layout.count != tokens or len(layout.samples) not in (0, batch):
        return None
    real = torch.from_numpy(np.stack([~one.are("padding") for one in layout.samples or (layout,)]))
    return None if bool(real.all()) else real.expand(batch, tokens)


def for_each_token(name: str, values: Any, batch: int, tokens: int) -> Tensor:
    """The argument of that name as a number for each token, (batch, tokens), on the CPU; ValueError where it is not."""
    numbers = torch.as_tensor(values).detach().cpu()
    if numbers.shape not in ((tokens,), (1, tokens), (batch, tokens)):
        raise ValueError(f"{name} has the shape ({batch}, {tokens}) or ({tokens},), not {tuple(numbers.shape)}")
    return numbers.expand(batch, tokens)


def layer_label(number: int, layer: AttentionMap) -> str:
    """What an error calls a layer: its number and, where it is known, the path of its module."""
    return f"layer {number} ({layer.path!r})" if layer.path else f"layer {number}"


def like_input(result: Tensor, as_array: bool) -> Any:
    """The result as an array if the input was one."""
    return result.numpy() if as_array else result


def as_floats(values: Any) -> tuple[Tensor, bool]:
    """Numbers in whatever holds them as a detached tensor of float64 or float32, and whether they were an array.

    Raises TypeError where it holds none.
    """
    tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(as_numbers(values, "the argument"))
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32), not isinstance(values, Tensor)


def fused(rows: Tensor, heads: Reduction) -> Tensor:
    """Rows (batch, heads, queries, keys) as those of the map that the heads make together; new, free to be changed."""
    return rows.mean(1) if heads == "mean" else rows.amax(1) if heads == "max" else rows.amin(1)


def check_heads(heads: Any) -> None:
    """Raise ValueError unless this is a way to make one map of the heads."""
    if heads not in get_args(Reduction):
        raise ValueError(f'heads={heads!r}: pass "mean", "max" or "min"')


def check_residual(residual: float) -> None:
    """Raise ValueError unless this is a share."""
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual!r} is a share from 0 to 1")


def check_tokens(maps: list[AttentionMap], what: str, may_merge: bool = False) -> None:
    """Raise ValueError unless the layers can be multiplied: the same images and tokens in all.

    `may_merge`: or patches that each was made of by merging those of the layer before.
    """
    for number, layer in enumerate(maps):
        own, before = layer_label(number, layer), maps[max(0, number - 1)]
        why = None
        if layer.kind == "cross":
            why = f"{own} is cross attention, whose keys are others than its queries"
        elif layer.shape[2] != layer.shape[3]:
            why = f"{own} has {layer.shape[2]} queries and {layer.shape[3]} keys: cross attention, or a cache of keys"
        elif layer.kind == "window" and len(maps) > 1:
            why = f"{own} attends within windows, whose tokens are others in the next layer"
        elif (layer.shape[0], layer.shape[3]) != (before.shape[0], before.shape[3]) and not (
            may_merge and layer.shape[0] == before.shape[0] and merged_into(before.layout, layer.layout) is not None
        ):
            why = (
                f"{own} has {layer.shape[3]} tokens of {layer.shape[0]} images, {layer_label(number - 1, before)} "
                f"{before.shape[3]} of {before.shape[0]}: windows, pooled tokens, or other inputs"
            )
        if why is not None:
            raise ValueError(f"{what} multiplies square maps of the same tokens, and {why}. Leave such layers out")


def pools_patches(layer: AttentionMap, before: AttentionMap) -> bool:
    """Whether a layer has a query of its own that looks at the patches of another layer, as the head of SigLIP."""
    is_known = layer.layout is not None and layer.layout.patches is not None
    return layer.kind == "cross" and layer.shape[2] == 1 and is_known and layer.layout == before.layout


def merged_into(finer: Layout | None, coarser: Layout | None) -> Tensor | None:
    """Which patch of a later layer each patch of a layer is a part of, (patches,), where 2 x 2 were merged into one.

    >>> merged_into(Layout.picture((2, 4)), Layout.picture((1, 2)))
    tensor([0, 0, 1, 1, 0, 0, 1, 1])

    None where it is not known that these are the patches of one picture, and merged so.
    """
    if finer is None or coarser is None or not (finer.is_picture and coarser.is_picture):
        return None
    before, after = (one.sheet.shape for one in (finer, coarser))
    if after != tuple(-(-side // 2) for side in before):
        return None
    rows, columns = (torch.arange(side) // 2 for side in before)
    merged: Tensor = rows[:, None] * after[1] + columns
    return merged.flatten()

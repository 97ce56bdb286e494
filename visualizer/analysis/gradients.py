"""The gradients that belong to attention maps: those that were passed, or those that a backward pass left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..maps import AttentionMap
from .layers import layer_label, layers_of, maps_of

Rows: TypeAlias = Callable[[slice | Tensor], Tensor]
"""A function of queries that gives their rows of a matrix, (batch, heads, chosen queries, keys)."""


def with_gradients(attention: Any, gradients: Any) -> tuple[list[AttentionMap], list[Rows], bool]:
    """The maps, the gradient of each as a function of queries, and whether all input was arrays.

    The gradient is 0 for a layer that the backward pass did not reach though it reached others: such a layer had no
    part in the output.
    """
    read = layers_of(attention)
    if gradients is None:
        return read.layers, _gradients_left(read.layers, read.sources), read.are_arrays
    passed = maps_of(gradients)
    if len(passed.layers) != len(read.layers):
        raise ValueError(f"there are gradients of {len(passed.layers)} layers for the maps of {len(read.layers)}")
    for number, (layer, gradient) in enumerate(zip(read.layers, passed.layers, strict=True)):
        if gradient.shape != layer.shape:
            raise ValueError(
                f"the gradient of {layer_label(number, layer)} has the shape {gradient.shape}, its weights have "
                f"{layer.shape}"
            )
    rows = [_rows_on(layer.device, gradient) for layer, gradient in zip(read.layers, passed.layers, strict=True)]
    return read.layers, rows, read.are_arrays and passed.are_arrays


def _rows_on(device: torch.device, gradient: AttentionMap) -> Rows:
    if gradient.device == device:
        return gradient.rows

    def rows(queries: slice | Tensor) -> Tensor:
        return gradient.rows(queries if isinstance(queries, slice) else queries.to(gradient.device)).to(device)

    return rows


def _gradients_left(maps: list[AttentionMap], sources: list[Any]) -> list[Rows]:
    """What a backward pass left at the maps, or at the tensors that they were read from."""
    left = [_grad_of(source) for source in sources]
    if len(sources[0].shape) == 5:  # one tensor has all layers
        left = [None] * len(maps) if left[0] is None else list(left[0])
        sources = sources * len(maps)
    known = [_known_rows(layer, grad) for layer, grad in zip(maps, left, strict=True)]
    is_any_known = any(rows is not None for rows in known)
    every: list[Rows] = []
    for number, (layer, source, rows) in enumerate(zip(maps, sources, known, strict=True)):
        is_recorded = layer.gradient is not None
        if rows is not None:
            every.append(rows)
        elif is_any_known and (is_recorded or (isinstance(source, Tensor) and source.retains_grad)):
            every.append(_zeros(layer))
        elif is_recorded:
            every.append(layer.grad_rows)  # which raises, and says that there was no backward pass
        else:
            raise ValueError(
                f"there is no gradient of {layer_label(number, layer)}. Record with attention(model, gradients=True) "
                "and run a backward pass, such as model(images)[:, target].sum().backward(); or pass gradients= of the "
                "shapes of the maps; or pass tensors on which retain_grad() was called before the backward pass"
            )
    return every


def _known_rows(layer: AttentionMap, grad: Tensor | None) -> Rows | None:
    recorded = layer.gradient
    if recorded is not None:
        return None if recorded.is_awaited else layer.grad_rows
    return None if grad is None else _rows_on(layer.device, maps_of(grad).layers[0])


def _zeros(layer: AttentionMap) -> Rows:
    zero = torch.zeros(1, 1, 1, 1, dtype=layer.dtype, device=layer.device)
    return lambda queries: zero


def _grad_of(source: Any) -> Tensor | None:
    # torch warns if a tensor that is neither is asked for its gradient.
    if isinstance(source, Tensor) and (source.is_leaf or source.retains_grad):
        return source.grad
    return None

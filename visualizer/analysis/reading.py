"""What the analyses share: a function of each layer, the gradients that belong to maps, the grid of patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ..maps import AttentionMap, maps_of

Fusion: TypeAlias = Literal["mean", "max", "min"]
Rows: TypeAlias = Callable[[slice | Tensor], Tensor]

_PREFIXES = (0, 1)  # what a grid is guessed behind: with more to choose from, many grids that are no square become one


def layers_of(attention: Any) -> tuple[list[AttentionMap], bool, bool]:
    """As `maps_of`, of weights alone: what an open softmax over nothing leaves, NaN, is zeros as in a fused kernel.

    Raises ValueError for negative numbers.
    """
    maps, is_one, arrays = maps_of(attention)
    checked = []
    for number, layer in enumerate(maps):
        if layer.is_dense:
            weights = layer.rows(slice(None))
            least = weights.amin() if weights.numel() else weights.new_zeros(())
            if bool(least.isnan()):
                clean = AttentionMap(weights.nan_to_num(0), path=layer.path, kind=layer.kind)
                clean.gradient = layer.gradient
                layer, least = clean, clean.rows(slice(None)).amin()
            if bool(least < 0):
                raise ValueError(
                    f"{name(number, layer)} holds {least.item():.3g}, and weights of attention are not negative: are "
                    "these scores before the softmax?"
                )
        checked.append(layer)
    return checked, is_one, arrays


def each(attention: Any, analyse: Callable[[AttentionMap], Tensor]) -> Any:
    """What a function makes of each map, on each other where there are several layers."""
    maps, is_one, arrays = layers_of(attention)
    found = [analyse(layer) for layer in maps]
    if is_one:
        return given(found[0], arrays)
    for number, (layer, result) in enumerate(zip(maps, found, strict=True)):
        if result.shape != found[0].shape:
            raise ValueError(
                f"layers of different shapes make no common array: {name(0, maps[0])} is {maps[0].shape} and "
                f"{name(number, layer)} {layer.shape}. Pass them one by one"
            )
    return given(torch.stack([result.to(found[0].device) for result in found]), arrays)


def name(number: int, layer: AttentionMap) -> str:
    """A layer in an error's message."""
    return f"layer {number} ({layer.path!r})" if layer.path else f"layer {number}"


def given(result: Tensor, as_array: bool) -> Any:
    """The result as what came in: arrays alone give arrays."""
    return result.numpy() if as_array else result


def as_tensor(values: Any) -> tuple[Tensor, bool]:
    """Numbers in whatever holds them, detached, and whether they were an array (or a list)."""
    if isinstance(values, Tensor):
        return values.detach(), False
    return torch.from_numpy(np.array(values)), True


def fused(rows: Tensor, heads: Fusion) -> Tensor:
    """Rows (batch, heads, queries, keys) as those of the map that the heads make together; new, free to be changed."""
    return rows.mean(1) if heads == "mean" else rows.amax(1) if heads == "max" else rows.amin(1)


def check_heads(heads: Any) -> None:
    """Raise ValueError unless this is a way to make one map of the heads."""
    if heads not in get_args(Fusion):
        raise ValueError(f'heads={heads!r}: pass "mean", "max" or "min"')


def check_residual(residual: float) -> None:
    """Raise ValueError unless this is a share."""
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual!r} is a share from 0 to 1")


def check_tokens(maps: list[AttentionMap], what: str) -> None:
    """Raise ValueError unless the layers can be multiplied: the same images and tokens in all."""
    batch, tokens = maps[0].shape[0], maps[0].shape[3]
    for number, layer in enumerate(maps):
        own = name(number, layer)
        why = None
        if layer.kind == "cross":
            why = f"{own} is cross attention, whose keys are others than its queries"
        elif layer.shape[2] != layer.shape[3]:
            why = f"{own} has {layer.shape[2]} queries and {layer.shape[3]} keys: cross attention, or a cache of keys"
        elif layer.kind == "window" and len(maps) > 1:
            why = f"{own} attends within windows, whose tokens are others in the next layer"
        elif (layer.shape[0], layer.shape[3]) != (batch, tokens):
            why = (
                f"{own} has {layer.shape[3]} tokens of {layer.shape[0]} images, {name(0, maps[0])} {tokens} of "
                f"{batch}: windows, pooled tokens, or other inputs"
            )
        if why is not None:
            raise ValueError(f"{what} multiplies square maps of the same tokens, and {why}. Leave such layers out")


def with_gradients(attention: Any, gradients: Any) -> tuple[list[AttentionMap], list[Rows], bool]:
    """The maps, for each a function of queries that gives the gradient of these rows, and whether all were arrays.

    A layer that a backward pass did not reach, though it did others, had no part in the output: its gradient is 0.
    """
    if isinstance(attention, dict):
        values = [value if isinstance(value, (list, tuple)) else [value] for value in attention.values()]
        handed = [layer for layers in values for layer in layers]
    elif isinstance(attention, (AttentionMap, Tensor, np.ndarray)) or not hasattr(attention, "__iter__"):
        handed = [attention]
    else:
        attention = handed = list(attention)  # it is read twice
    maps, _, arrays = layers_of(attention)
    if gradients is None:
        return maps, _own_gradients(maps, handed), arrays
    found, _, are_arrays = maps_of(gradients)
    if len(found) != len(maps):
        raise ValueError(f"there are gradients of {len(found)} layers for the maps of {len(maps)}")
    for number, (layer, grad) in enumerate(zip(maps, found, strict=True)):
        if grad.shape != layer.shape:
            raise ValueError(
                f"the gradient of {name(number, layer)} has the shape {grad.shape}, its weights have {layer.shape}"
            )
    return maps, [_rows_on(layer.device, grad) for layer, grad in zip(maps, found, strict=True)], arrays and are_arrays


def _rows_on(device: torch.device, grad: AttentionMap) -> Rows:
    if grad.device == device:
        return grad.rows
    return lambda queries: grad.rows(queries if isinstance(queries, slice) else queries.to(grad.device)).to(device)


def _own_gradients(maps: list[AttentionMap], handed: list[Any]) -> list[Rows]:
    """What a backward pass left at the maps, or at the tensors that they were made of."""
    if getattr(handed[0], "ndim", 4) == 5:  # one tensor has the layers
        stacked = _grad_of(handed[0])
        grads = [None] * len(maps) if stacked is None else list(stacked)
    else:
        grads = [_grad_of(layer) for layer in handed]
    found: list[Rows | None] = []
    for layer, grad in zip(maps, grads, strict=True):
        own = layer.gradient
        if own is not None:
            found.append(None if own.is_awaited else layer.grad_rows)
        else:
            found.append(None if grad is None else _rows_on(layer.device, AttentionMap(grad)))
    for number, (layer, values) in enumerate(zip(maps, handed, strict=False)):
        if found[number] is not None:
            continue
        is_expected = layer.gradient is not None or (isinstance(values, Tensor) and values.retains_grad)
        if is_expected and any(rows is not None for rows in found):
            found[number] = _nothing(layer)
        elif layer.gradient is not None:
            found[number] = layer.grad_rows  # which says that there was no backward pass
        else:
            raise ValueError(
                f"there is no gradient of {name(number, layer)}. Record with attention(model, gradients=True) and run "
                "a backward pass, such as model(images)[:, target].sum().backward(); or pass gradients=, of the shapes "
                "of the maps; or tensors on which retain_grad() was called before the backward pass"
            )
    return [rows for rows in found if rows is not None]


def _nothing(layer: AttentionMap) -> Rows:
    zero = torch.zeros(1, 1, 1, 1, dtype=layer.dtype, device=layer.device)
    return lambda queries: zero


def _grad_of(values: Any) -> Tensor | None:
    # Asked of any other tensor, torch warns.
    if isinstance(values, Tensor) and (values.is_leaf or values.retains_grad):
        return values.grad
    return None


def patches(tokens: int, grid: tuple[int, int] | None, prefix_tokens: int | None) -> tuple[int, int, int]:
    """(rows, columns, prefix tokens) of that many tokens, as told or guessed."""
    if grid is not None:
        rows, columns = grid
        left = tokens - rows * columns
        if rows < 1 or columns < 1 or left < 0 or (prefix_tokens is not None and left != prefix_tokens):
            before = "" if prefix_tokens is None else f" behind {prefix_tokens} prefix tokens"
            raise ValueError(
                f"grid={grid!r} makes {rows * columns} patches, which does not fit {tokens} tokens{before}"
            )
        return rows, columns, left
    for prefix in _PREFIXES if prefix_tokens is None else (prefix_tokens,):
        side = math.isqrt(max(0, tokens - prefix))
        if prefix >= 0 and side > 0 and side * side == tokens - prefix:
            return side, side, prefix
    less = "0 or 1" if prefix_tokens is None else f"{prefix_tokens!r}"
    raise ValueError(
        f"cannot tell the patch grid of {tokens} tokens: less {less} prefix tokens they are no square. Pass "
        "grid=(rows, columns), or prefix_tokens= of a square with registers"
    )

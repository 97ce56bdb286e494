"""The gradient of a loss by the weights of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sources import without_autograd


class Gradient:
    """The gradient of a loss by the weights, computed from what a backward pass brings.

    Args:
        shape: of the map, (batch, heads, queries, keys).
        values: of a fused call, (batch, key heads, keys, width): the gradient is that of the output times the values.
            None where the gradient of the weights themselves arrives.
        reason: why the gradient cannot be known; None if it can.
    """

    def __init__(self, shape: tuple[int, int, int, int], values: Tensor | None, reason: str | None = None) -> None:
        self._shape, self._values, self._reason = shape, values, reason
        self._arrange: Callable[[Tensor], Tensor] | None = None
        self._incoming: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        return self._shape

    @property
    def device(self) -> torch.device | None:
        """The device that it lives on; None if it is not known yet."""
        return None if self._incoming is None else self._incoming.device

    @property
    def is_awaited(self) -> bool:
        """Whether it can be known, and no backward pass has brought it yet."""
        return self._incoming is None and self._reason is None

    def arrange(
        self,
        arrange: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int, int] | None = None,
        values: Tensor | None = None,
    ) -> None:
        """Make (batch, heads, queries, ...) of what arrives; and take another shape, and other values, if given."""
        self._arrange = arrange
        self._shape = self._shape if shape is None else shape
        self._values = self._values if values is None else values

    def accumulate(self, incoming: Tensor) -> None:
        """Add the gradient of the output, or of the weights, that a backward pass brings."""
        incoming = incoming.detach()
        self._incoming = incoming.clone() if self._incoming is None else self._incoming + incoming

    @without_autograd
    def rows(self, queries: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient by the weights of some queries; RuntimeError if it is not known."""
        if self._reason is not None:
            raise RuntimeError(self._reason)
        if self._incoming is None:
            raise RuntimeError("the gradient is not known yet: no backward pass has come through this attention call")
        incoming = self._incoming if self._arrange is None else self._arrange(self._incoming)
        incoming = incoming.reshape(*self._shape[:3], incoming.shape[-1])[:, :, queries].to(dtype)
        if self._values is None:
            return incoming[..., : self._shape[3]]  # without an attention sink behind the keys
        values = self._values.to(incoming.dtype)
        batch, heads, count, width = incoming.shape
        grouped = incoming.reshape(batch, values.shape[1], heads // values.shape[1] * count, width)
        return (grouped @ values.mT).view(batch, heads, count, values.shape[2])

    def __getstate__(self) -> dict[str, Any]:
        """Arranged, for a copy or a file: what arranges it may be a function that no file can hold."""
        state = vars(self).copy()
        if self._arrange is not None and self._incoming is not None:
            state["_incoming"] = self._arrange(self._incoming)
        return state | {"_arrange": None}

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [tensor for tensor in (self._values, self._incoming) if tensor is not None]

    def to(self, device: torch.device | str) -> Gradient:
        """The same on another device."""
        values = None if self._values is None else self._values.to(device)
        moved = Gradient(self._shape, values, self._reason)
        moved._arrange = self._arrange
        moved._incoming = None if self._incoming is None else self._incoming.to(device)
        return moved

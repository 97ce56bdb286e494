"""Where the rows of a map come from that several calls made: each has some of the heads, the images or the queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .samples import Samples
from .sources import Factors, Weights, without_autograd


class Block(NamedTuple):
    """A call that made a part of a map."""

    source: Any
    """Of its own rows: its batch and heads, taken as one axis, are those of `places`."""
    places: Tensor
    """Which of the batch x heads of the map, taken as one axis: (those of the source,)."""
    first: int
    """The number of its first query."""


class Joined:
    """Several calls of a module that are one attention, as where it calls a kernel for each head or for some queries.

    >>> import torch
    >>> from visualizer.maps import Weights
    >>> weights = torch.eye(3).expand(1, 2, 3, 3)
    >>> heads = [Block(Weights(weights[:, [head]]), torch.tensor([head]), 0) for head in range(2)]
    >>> torch.equal(Joined(heads, (1, 2, 3, 3)).rows(slice(None)), weights)
    True

    Args:
        blocks: of the same type and device, which have each row of the map once.
        shape: (batch, heads, queries, keys) of the map.
    """

    def __init__(self, blocks: Sequence[Block], shape: tuple[int, int, int, int]) -> None:
        self.blocks, self.shape = tuple(blocks), shape
        first = self.blocks[0].source
        self.dtype: torch.dtype = first.dtype
        self.device: torch.device = first.device
        self.kept: str = first.kept
        """What is held, in words."""

    @property
    def is_dense(self) -> bool:
        """Whether all of its weights exist."""
        return all(isinstance(block.source, Weights) for block in self.blocks)

    @without_autograd
    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries."""
        return _assembled(self.blocks, self.shape, queries, lambda source, chosen: source.rows(chosen))

    def tensors(self) -> list[Tensor]:
        """The tensors that are held; other maps may hold masks and keys too."""
        tensors = [tensor for block in self.blocks for tensor in block.source.tensors()]
        return [*{(one.data_ptr(), one.shape): one for one in tensors}.values()]  # chunks of queries share their keys

    def to(self, device: torch.device | str) -> Joined:
        """The same on another device."""
        return Joined([block._replace(source=block.source.to(device)) for block in self.blocks], self.shape)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file. `shared` has the keys that several maps share, by their Keys."""
        blocks = [
            {"source": source.packed(shared), "places": places.tolist(), "first": first}
            for source, places, first in self.blocks
        ]
        return {"blocks": blocks, "shape": [*self.shape]}


Source = Weights | Factors | Samples | Joined


def unpacked_source(packed: dict[str, Any]) -> Source:
    """What `packed` of a source made, as it was."""
    if "weights" in packed:
        return Weights(packed["weights"])
    if "blocks" not in packed:
        return (Samples if "cells" in packed else Factors).unpacked(packed)
    blocks = [
        Block(unpacked_source(block["source"]), torch.tensor(block["places"]), block["first"])
        for block in packed["blocks"]
    ]
    batch, heads, queries, keys = packed["shape"]
    return Joined(blocks, (batch, heads, queries, keys))


class JoinedGradient:
    """The gradient of a loss by the weights of several calls that are one attention.

    Args:
        blocks: as those of the map, each with the gradient of its call as its source.
        shape: (batch, heads, queries, keys) of the map.
    """

    def __init__(self, blocks: Sequence[Block], shape: tuple[int, int, int, int]) -> None:
        self._blocks, self._shape = tuple(blocks), shape

    @property
    def is_awaited(self) -> bool:
        """Whether it can be known, and no backward pass has brought all of it yet."""
        return any(block.source.is_awaited for block in self._blocks)

    def rows(self, queries: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient by the weights of some queries; RuntimeError if it is not known."""
        return _assembled(self._blocks, self._shape, queries, lambda source, chosen: source.rows(chosen, dtype))

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [tensor for block in self._blocks for tensor in block.source.tensors()]

    def to(self, device: torch.device | str) -> JoinedGradient:
        """The same on another device."""
        return JoinedGradient([block._replace(source=block.source.to(device)) for block in self._blocks], self._shape)


def _assembled(
    blocks: Sequence[Block],
    shape: tuple[int, int, int, int],
    queries: slice | Tensor,
    rows_of: Callable[[Any, slice | Tensor], Tensor],
) -> Tensor:
    """Some rows of the whole; `rows_of` gives those of a block's source."""
    batch, heads, count, keys = shape
    index = torch.arange(count)[queries if isinstance(queries, slice) else queries.cpu()]
    made: Tensor | None = None
    for source, places, first in blocks:
        here, chosen = torch.arange(len(index)), queries
        if source.shape[2] < count:
            [here] = ((index >= first) & (index < first + source.shape[2])).nonzero(as_tuple=True)
            chosen = index[here] - first
        if made is None or len(here):
            rows = rows_of(source, chosen if isinstance(chosen, slice) else chosen.to(source.device)).flatten(0, 1)
            made = rows.new_empty(batch * heads, len(index), keys) if made is None else made
            made[places[:, None], here] = rows
    assert made is not None
    return made.view(batch, heads, len(index), keys)

"""Where the rows of a map come from that is made of parts: several calls, or the windows of a picture.

Each call has some of the heads, the images or the queries. The calls of one pass are put together where the model
itself does so; the steps of a generation, in generated.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .samples import Samples
from .sources import Factors, Weights, without_autograd


class Block(NamedTuple):
    """A call that made a part of a map. Batch and heads count as one axis here."""

    source: Any
    """Of its own rows."""
    places: Tensor
    """Which of the batch x heads of the map it has, (those of the source,), or as many as are taken of it."""
    first: int
    """The number of its first query; below 0 where the map begins with a later one."""
    first_key: int = 0
    """The number of its first key. Keys that the map has, and it has not, get no weight."""
    taken: Tensor | None = None
    """Which of its own batch x heads are those of `places`; None: all, in this order."""

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file."""
        packed = {"source": self.source.packed(shared), "places": self.places.tolist(), "first": self.first}
        if self.first_key:
            packed["first key"] = self.first_key
        return packed if self.taken is None else {**packed, "taken": self.taken.tolist()}

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Block:
        """What `packed` made, as it was."""
        taken, places = packed.get("taken"), torch.tensor(packed["places"], dtype=torch.long)
        taken = None if taken is None else torch.tensor(taken, dtype=torch.long)
        return cls(unpacked_source(packed["source"]), places, packed["first"], packed.get("first key", 0), taken)


class Joined:
    """Several calls of a module that are one attention, as where it calls a kernel for each head or for some queries.

    >>> import torch
    >>> from visualizer.maps import Weights
    >>> weights = torch.eye(3).expand(1, 2, 3, 3)
    >>> heads = [Block(Weights(weights[:, [head]]), torch.tensor([head]), 0) for head in range(2)]
    >>> torch.equal(Joined(heads, (1, 2, 3, 3)).rows(slice(None)), weights)
    True

    Args:
        blocks: of the same type and device. What none of them has is zero.
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
        sources = [block.source for block in self.blocks]
        tensors = [one.tensors(are_shared=True) if isinstance(one, Factors) else one.tensors() for one in sources]
        unlike = {(one.data_ptr(), one.shape): one for several in tensors for one in several}
        return [*unlike.values()]  # chunks of queries share their keys, and so do the steps of a generation

    def to(self, device: torch.device | str) -> Joined:
        """The same on another device."""
        moved = dict[int, Any]()  # keys that are shared stay shared
        sources = [
            block.source.to(device, moved) if isinstance(block.source, Factors) else block.source.to(device)
            for block in self.blocks
        ]
        blocks = [block._replace(source=source) for block, source in zip(self.blocks, sources, strict=True)]
        return Joined(blocks, self.shape)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file. `shared` has the keys that several maps share, by their owners."""
        return {"blocks": [block.packed(shared) for block in self.blocks], "shape": [*self.shape]}


def stitched_rows(places: Tensor, rows_of: Callable[[Tensor], Tensor], queries: slice | Tensor) -> Tensor:
    """Some rows of the whole grid of patches, (images, heads, those patches, patches), from the rows of its windows.

    Args:
        places: (windows, tokens), which patch each token of each window is; -1: padding.
        rows_of: gives the rows of some tokens in all windows, (images x windows, heads, those tokens, tokens).
        queries: the patches.
    """
    places = places.to(queries.device if isinstance(queries, Tensor) else "cpu")
    is_patch = places.flatten() >= 0
    patches = int(is_patch.sum())
    at = torch.empty(patches, dtype=torch.long, device=places.device)  # the place of each patch in the flat windows
    at[places.flatten()[is_patch]] = is_patch.nonzero().flatten()
    window, token = at[queries] // places.shape[1], at[queries] % places.shape[1]
    tokens, order = torch.unique(token, return_inverse=True)
    rows = rows_of(tokens)
    rows = rows.view(len(rows) // len(places), len(places), *rows.shape[1:])  # (images, windows, heads, tokens, tokens)
    rows = rows[:, window, :, order].movedim(0, 2)  # (images, heads, queries, tokens)
    keys = torch.where(places >= 0, places, patches)[window].to(rows.device)  # what goes to padding is left out
    made = rows.new_zeros(*rows.shape[:3], patches + 1)
    made.scatter_(3, keys.expand_as(rows), rows)
    return made[..., :patches]


class Stitched:
    """The windows of an attention as one map of the whole grid; keys outside of a query's window have no weight.

    >>> import torch
    >>> from visualizer.maps import Weights
    >>> windows = torch.tensor([[0, 2], [1, 3]])  # of a grid of 2 x 2 patches its columns
    >>> Stitched(Weights(torch.full((2, 1, 2, 2), 0.5)), windows).rows(slice(0, 2))
    tensor([[[[0.5000, 0.0000, 0.5000, 0.0000],
              [0.0000, 0.5000, 0.0000, 0.5000]]]])

    Args:
        source: of the windows, (images x windows, heads, tokens, tokens).
        places: (windows, tokens), which patch each token of each window is; -1: padding.
    """

    def __init__(self, source: Any, places: Tensor) -> None:
        patches = int((places >= 0).sum())
        self._source, self._places = source, places
        self.shape: tuple[int, int, int, int] = (source.shape[0] // len(places), source.shape[1], patches, patches)
        self.dtype: torch.dtype = source.dtype
        self.device: torch.device = source.device
        self.kept = f"{source.kept} of windows"
        """What is held, in words."""
        self.has_padding = patches < places.numel()
        """Whether some of the tokens of its windows are no patches, which get a share of each row."""

    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries."""
        return stitched_rows(self._places, lambda tokens: self._source.rows(tokens.to(self.device)), queries)

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        held: list[Tensor] = self._source.tensors()
        return held

    def to(self, device: torch.device | str) -> Stitched:
        """The same on another device."""
        return Stitched(self._source.to(device), self._places)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file."""
        return {"windows": self._source.packed(shared), "places": self._places.tolist()}


Source = Weights | Factors | Samples | Joined | Stitched


def unpacked_source(packed: dict[str, Any]) -> Source:
    """What `packed` of a source made, as it was."""
    if "weights" in packed:
        return Weights(packed["weights"])
    if "windows" in packed:
        return Stitched(unpacked_source(packed["windows"]), torch.tensor(packed["places"]))
    if "blocks" not in packed:
        return (Samples if "cells" in packed else Factors).unpacked(packed)
    batch, heads, queries, keys = packed["shape"]
    return Joined([Block.unpacked(block) for block in packed["blocks"]], (batch, heads, queries, keys))


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


class StitchedGradient:
    """The gradient of a loss by the weights of windows, as one map of the whole grid; see `Stitched`."""

    def __init__(self, gradient: Any, places: Tensor) -> None:
        self._gradient, self._places = gradient, places

    @property
    def is_awaited(self) -> bool:
        """Whether it can be known, and no backward pass has brought it yet."""
        return bool(self._gradient.is_awaited)

    def rows(self, queries: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient by the weights of some queries; RuntimeError if it is not known."""
        return stitched_rows(self._places, lambda tokens: self._gradient.rows(tokens, dtype), queries)

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        held: list[Tensor] = self._gradient.tensors()
        return held

    def to(self, device: torch.device | str) -> StitchedGradient:
        """The same on another device."""
        return StitchedGradient(self._gradient.to(device), self._places)


def _assembled(
    blocks: Sequence[Block],
    shape: tuple[int, int, int, int],
    queries: slice | Tensor,
    rows_of: Callable[[Any, slice | Tensor], Tensor],
) -> Tensor:
    """Some rows of the whole; `rows_of` gives those of a block's source."""
    batch, heads, count, keys = shape
    index = torch.arange(count)[queries if isinstance(queries, slice) else queries.cpu()]
    least, most = (int(index.min()), int(index.max())) if len(index) else (0, -1)
    made: Tensor | None = None
    for source, places, first, first_key, taken in blocks:
        size = source.shape[2]
        if made is not None and not (first <= most and least < first + size):
            continue
        here, chosen = torch.arange(len(index)), queries
        if size != count or first:
            [here] = ((index >= first) & (index < first + size)).nonzero(as_tuple=True)
            chosen = index[here] - first
        rows = rows_of(source, chosen if isinstance(chosen, slice) else chosen.to(source.device)).flatten(0, 1)
        rows = rows if taken is None else rows[taken]
        made = rows.new_zeros(batch * heads, len(index), keys) if made is None else made
        # A static cache has room for more keys than there are.
        rows = rows[..., : keys - first_key]
        made[places[:, None], here, first_key : first_key + rows.shape[-1]] = rows
    assert made is not None
    return made.view(batch, heads, len(index), keys)

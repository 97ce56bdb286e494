"""Tokens that draw far more attention than their share, and maps without them: `sinks`, `without_sinks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..maps import AttentionMap, Source, without_autograd
from .layers import layers_of, per_layer

__all__ = ["sinks", "without_sinks"]

TIMES = 8.0
"""How many times its even share a token draws that is a sink."""


def sinks(attention: Any, times: float = TIMES) -> Any:
    """Which keys are attention sinks, in each head: those that draw far more than an even share.

    >>> import torch
    >>> from visualizer.analysis import sinks
    >>> weights = torch.full((1, 1, 20, 20), 0.5 / 19)
    >>> weights[..., 3] = 0.5                          # half of all attention goes to one of twenty
    >>> sinks(weights).nonzero().tolist()              # image, head, key
    [[0, 0, 3]]

    In trained models heads send attention that they have no use for to the first token, to a separator, or to some
    patches of the background (Xiao et al. 2023, https://arxiv.org/abs/2309.17453; Darcet et al. 2023,
    https://arxiv.org/abs/2309.16588): there the map says little about the picture or the text.

    Args:
        attention: one map, or layers of one shape.
        times: how many times the even share. The even share of a query is 1 / the keys that it sees; a key counts by
            the mean over the queries that see it, without its own, and only if they are a quarter of all: so the first
            token of a causal text is no sink because early tokens see little else, nor the last because it sees itself.

    Returns:
        True or False, (batch, heads, keys); several layers are the first axis.

    Raises:
        ValueError: the layers differ in shape, or `times` is not above 1.
    """
    _check(times)
    return per_layer(attention, lambda layer: sinks_of(layer, times))


def sinks_of(layer: AttentionMap, times: float = TIMES) -> Tensor:
    """Which keys of one layer are sinks, (batch, heads, keys)."""
    batch, heads, queries, keys = layer.shape
    times_share = torch.zeros(batch, heads, keys, dtype=layer.dtype, device=layer.device)
    seen_by = torch.zeros_like(times_share)
    own = torch.arange(queries, device=layer.device) + keys - queries  # with a cache the last query is the last key
    numbers = torch.arange(keys, device=layer.device)
    for part, rows in layer.chunks():
        is_seen = (rows > 0).to(rows.dtype)
        rows = rows * is_seen.sum(-1, keepdim=True)
        if layer.kind != "cross":
            is_other = numbers != own[part][:, None]
            rows, is_seen = rows * is_other, is_seen * is_other
        times_share += rows.sum(2)
        seen_by += is_seen.sum(2)
    return (times_share > times * seen_by) & (seen_by >= max(1, queries / 4))


@without_autograd
def without_sinks(attention: Any, times: float = TIMES) -> list[AttentionMap]:
    """The maps without their sinks, each row rescaled to its sum; for plots, a rollout, or any analysis.

    >>> import torch
    >>> from visualizer.analysis import rollout, without_sinks
    >>> weights = torch.full((1, 1, 20, 20), 0.5 / 19)
    >>> weights[..., 3] = 0.5
    >>> [clean] = without_sinks(weights)
    >>> clean.rows([0])[..., 3].item(), round(clean.rows([0]).sum().item(), 4)
    (0.0, 1.0)
    >>> rollout(without_sinks(weights), query=0).shape
    torch.Size([1, 20])

    A row that has nothing but sinks stays as it is. The weights are computed as they are read, as those of the maps.

    Args, and what is raised, as in `sinks`; the layers may differ in shape.

    Returns:
        A map for each layer.
    """
    _check(times)
    made = []
    for layer in layers_of(attention).layers:
        source: Any = _Without(layer.source, sinks_of(layer, times))
        made.append(AttentionMap.from_source(source, path=layer.path, kind=layer.kind).described_as(layer))
    return made


class _Without:
    """Weights without those of some keys of each head, (batch, heads, keys)."""

    kept = "weights without sinks"
    """What is held, in words."""

    def __init__(self, source: Source, are_sinks: Tensor) -> None:
        self._source, self._are_sinks = source, are_sinks
        self.shape, self.dtype, self.device = source.shape, source.dtype, source.device

    @without_autograd
    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries."""
        rows = self._source.rows(queries)
        rest = rows.masked_fill(self._are_sinks[:, :, None], 0)
        left = rest.sum(-1, keepdim=True)
        return torch.where(left > 0, rest * (rows.sum(-1, keepdim=True) / left.clamp_min(1e-12)), rows)

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [*self._source.tensors(), self._are_sinks]

    def to(self, device: torch.device | str) -> _Without:
        """The same on another device."""
        return _Without(self._source.to(device), self._are_sinks.to(device))

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors, for a file."""
        return {"weights": self.rows(slice(None))}


def _check(times: float) -> None:
    if not times > 1:
        raise ValueError(f"times={times!r}: a sink draws more than its share, so pass a number above 1")

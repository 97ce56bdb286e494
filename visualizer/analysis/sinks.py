"""Tokens that draw far more attention than their share, and maps without them: `sinks`, `without_sinks`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..maps import AttentionMap, without_autograd
from .layers import layers_of, per_layer

__all__ = ["sinks", "without_sinks"]

Sinks: TypeAlias = Literal["keep", "remove"]
"""Whether sinks stay in the maps that are read, or are taken out of them."""

TIMES = 8.0
"""How many times its even share a token draws that is a sink."""
_FEW = 16  # eight times the even share of fewer tokens would be more than half of all
_LEAST = 2.5  # of two or three tokens one always draws half
_ROUNDS = 32  # more are needed only where each weight is half of the one before
_TINY = 1e-12


def sink_limit(keys: Tensor | int, times: float = TIMES) -> Tensor:
    """How many times its even share a token draws at least that is a sink, where that many keys are seen.

    This is the one place that says what a sink is, for maps, plots, the page and `word_maps`.

    >>> sink_limit(torch.tensor([1000, 16, 8, 4])) / torch.tensor([1000, 16, 8, 4])  # as a share of all attention
    tensor([0.0080, 0.5000, 0.5000, 0.6250])
    """
    return (times / _FEW * torch.as_tensor(keys, dtype=torch.float32)).clamp(min(_LEAST, times), times)


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
        times: how many times the even share. The even share of a query is 1 / the keys that it sees, and counts as 1/16
            where it sees fewer than 16: there a sink draws more than half (times=8). A key counts by the mean over the
            queries that see it, without its own, and only if they are a quarter of all: so the first token of a causal
            text is no sink because early tokens see little else, nor the last because it sees itself. Rows that do not
            sum to one count as if they did. A large sink can hide a smaller one, so the search is repeated without the
            sinks that were found, until it finds no more.

    Returns:
        True or False, (batch, heads, keys); several layers are the first axis.

    Raises:
        ValueError: the layers differ in shape, or `times` is not above 1.
    """
    _check(times)
    return per_layer(attention, lambda layer: sinks_of(layer, times))


def sinks_of(layer: AttentionMap, times: float = TIMES) -> Tensor:
    """Which keys of one layer are sinks, (batch, heads, keys)."""
    least = max(1, layer.shape[2] / 4)
    found = torch.zeros(*layer.shape[:2], layer.shape[3], dtype=torch.bool, device=layer.device)
    for _ in range(_ROUNDS):
        drawn, limit, seen_by = _drawn(layer, times, found)
        more = (drawn > limit) & (seen_by >= least)
        if not bool(more.any()):
            break
        found |= more
    return found


def common_sinks(layers: Sequence[AttentionMap], times: float = TIMES) -> Tensor:
    """Which keys are sinks in the mean over all heads of layers of one shape, (batch, keys)."""
    sums = [sum(one.sum(1).cpu() for one in each) for each in zip(*(_drawn(one, times) for one in layers), strict=True)]
    drawn, limit, seen_by = (torch.as_tensor(one) for one in sums)
    return (drawn > limit) & (seen_by >= len(layers) * layers[0].shape[1] * max(1, layers[0].shape[2] / 4))


def _drawn(layer: AttentionMap, times: float, without: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For each key, (batch, heads, keys): what it draws, in even shares, summed over the queries that see it; what a
    sink would draw; how many queries see it. The keys `without` do not count."""
    batch, heads, queries, keys = layer.shape
    drawn, limit, seen_by = torch.zeros(3, batch, heads, keys, dtype=layer.dtype, device=layer.device)
    own = torch.arange(queries, device=layer.device) + keys - queries  # with a cache the last query is the last key
    for part, rows in layer.chunks():
        rows = rows.nan_to_num(0)
        rows = rows if without is None else rows.masked_fill_(without[:, :, None], 0)
        if layer.kind != "cross":  # the row's own key counts among the keys that it sees, but draws nothing
            at = torch.arange(rows.shape[2], device=layer.device)[own[part] >= 0]
            own_weights = rows[:, :, at, own[part][at]]
        is_seen = (rows > 0).to(rows.dtype)
        seen, sums = is_seen.sum(-1), rows.sum(-1).clamp_min_(_TINY)
        limits = sink_limit(seen, times).to(rows)
        factors = seen / sums
        drawn += (factors[:, :, None] @ rows)[:, :, 0]
        limit += (limits[:, :, None] @ is_seen)[:, :, 0]
        seen_by += is_seen.sum(2)
        if layer.kind != "cross":
            places = own[part][at].expand(batch, heads, -1)
            drawn.scatter_add_(2, places, -factors[:, :, at] * own_weights)
            limit.scatter_add_(2, places, -limits[:, :, at] * (own_weights > 0))
            seen_by.scatter_add_(2, places, -(own_weights > 0).to(rows))
    return drawn, limit, seen_by


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

    A row that has nothing but sinks, to a part in 10^12, stays as it is. The weights are computed as they are read, as
    those of the maps.

    Args, and what is raised, as in `sinks`; the layers may differ in shape.

    Returns:
        A map for each layer.
    """
    _check(times)
    made = []
    for layer in layers_of(attention).layers:
        source: Any = _Without(layer, times)
        made.append(AttentionMap.from_source(source, path=layer.path, kind=layer.kind).described_as(layer))
    return made


def check_sinks(sinks: Any) -> bool:
    """Whether sinks are to be removed; ValueError for what says neither that nor the opposite."""
    if sinks not in get_args(Sinks):
        raise ValueError(f"sinks={sinks!r}: pass {' or '.join(map(repr, get_args(Sinks)))}")
    return bool(sinks == "remove")


class _Without:
    """The weights of a layer without its sinks, which are looked for when the first row is read."""

    kept = "weights without sinks"
    """What is held, in words."""
    note = "sinks removed"
    """What a title says of them."""

    def __init__(self, layer: AttentionMap, times: float) -> None:
        self._layer, self._times = layer, times
        self.shape, self.dtype, self.device = layer.shape, layer.source.dtype, layer.device

    @cached_property
    def _are_sinks(self) -> Tensor:
        return sinks_of(self._layer, self._times)

    @without_autograd
    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries."""
        rows = self._layer.source.rows(queries)
        rest = rows.masked_fill(self._are_sinks[:, :, None], 0)
        left = rest.sum(-1, keepdim=True)
        return torch.where(left > _TINY, rest * (rows.sum(-1, keepdim=True) / left), rows)

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return self._layer.source.tensors()

    def to(self, device: torch.device | str) -> _Without:
        """The same on another device."""
        return _Without(self._layer.to(device), self._times)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors, for a file."""
        return {"weights": self.rows(slice(None))}


def _check(times: float) -> None:
    if not times > 1:
        raise ValueError(f"times={times!r}: a sink draws more than its share, so pass a number above 1")

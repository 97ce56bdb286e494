"""Spiking attention: how often neurons fire, and the map that query and key spikes imply."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..maps import without_autograd
from .layers import as_floats, like_input

__all__ = ["spike_rate", "spike_scores"]


@without_autograd
def spike_rate(spikes: Any, axes: str = "time batch heads tokens channels", keep: str = "batch tokens") -> Any:
    """How often neurons fire: the share of ones, 0 to 1, as the mean over all axes except those to keep.

    >>> import torch
    >>> from visualizer.analysis import spike_rate
    >>> spikes = (torch.rand(4, 1, 8, 196, 32) < 0.2).float()  # 4 time steps, 8 heads, 196 tokens
    >>> spike_rate(spikes).shape                               # a map of the tokens
    torch.Size([1, 196])
    >>> spike_rate(spikes, keep="time").shape                  # over the time steps
    torch.Size([4])
    >>> spike_rate(torch.ones(4, 2, 3, 14, 14), "time batch channels rows columns", "batch rows columns").shape
    torch.Size([2, 14, 14])

    Yao et al. 2023, fig. 3 (https://arxiv.org/abs/2307.01694) show maps of the firing rates of the value, before and
    after query and key mask it.

    Args:
        spikes: a tensor or an array of 0 and 1.
        axes: the names of its axes, in order, with spaces between them; you choose the names.
        keep: the names of the axes of the result, in order; "" for one rate of all neurons.

    Returns:
        The rates, with the axes of `keep`; float64 for float64, else float32, on the device of the spikes.

    Raises:
        ValueError: the names do not fit the axes, or there are values other than 0 and 1, such as membrane potentials,
            real-valued activations, rates, or spikes that count to more than one.
    """
    values, is_array = as_floats(spikes)
    names, kept = axes.split(), keep.split()
    if len(names) != values.ndim or len(set(names)) != len(names):
        raise ValueError(
            f"axes={axes!r} must name each of the {values.ndim} axes of spikes of the shape {tuple(values.shape)} once"
        )
    if not set(kept) <= set(names) or len(set(kept)) != len(kept):
        raise ValueError(f"keep={keep!r} must name axes of {axes!r}, each at most once")
    _check_spikes("spikes", values)
    reduced = [axis for axis, name in enumerate(names) if name not in kept]
    rates = values.mean(reduced) if reduced else values
    remaining = [name for name in names if name in kept]
    return like_input(rates.permute([remaining.index(name) for name in kept]), is_array)


@without_autograd
def spike_scores(query: Any, key: Any, scale: float = 0.125) -> Any:
    """How often each token's query spikes meet each token's key spikes: the attention map that the spikes imply.

    >>> import torch
    >>> from visualizer.analysis import spike_scores
    >>> query, key = (torch.rand(2, 4, 1, 8, 49, 32) < 0.1).float()
    >>> spike_scores(query, key).shape  # (batch, heads, queries, keys)
    torch.Size([1, 8, 49, 49])

    The mean over the time steps of scale * q k^T. Such attention has no softmax: rows do not sum to one. A model that
    multiplies k^T v first (Meta-SpikeFormer, Yao et al. 2024, https://arxiv.org/abs/2404.03663) never makes this map,
    but its output is the same: q (k^T v) = (q k^T) v.

    Args:
        query, key: spikes, 0 and 1, of the shape (time, batch, heads, tokens, channels).
        scale: the factor in the model; 0.125 in Spikformer and in Meta-SpikeFormer.

    Returns:
        (batch, heads, queries, keys), from 0 to scale * channels; float64 for float64, else float32, on the device of
        the spikes.

    Raises:
        ValueError: the shapes do not fit, or there are values other than 0 and 1.
    """
    (queries, is_query_array), (keys, is_key_array) = as_floats(query), as_floats(key)
    for name, spikes in (("query", queries), ("key", keys)):
        if spikes.ndim != 5:
            raise ValueError(
                f"{name} has the shape (time, batch, heads, tokens, channels), this one {tuple(spikes.shape)}"
            )
    if queries.shape[:3] != keys.shape[:3] or queries.shape[4] != keys.shape[4]:
        raise ValueError(
            f"query {tuple(queries.shape)} and key {tuple(keys.shape)} do not fit: of (time, batch, heads, tokens, "
            "channels) only the tokens may differ"
        )
    _check_spikes("query", queries)
    _check_spikes("key", keys)
    # The sum over time and the one over channels are one sum.
    left, right = (spikes.permute(1, 2, 3, 0, 4).flatten(3) for spikes in (queries, keys))
    return like_input(left @ right.mT * (scale / len(queries)), is_query_array and is_key_array)


def _check_spikes(name: str, values: Tensor) -> None:
    """Raise ValueError if there are values other than 0 and 1."""
    if values.numel() == 0:
        raise ValueError(f"{name} of the shape {tuple(values.shape)} hold no values")
    wrong = values[(values != 0) & (values != 1)]
    if len(wrong):
        raise ValueError(
            f"{name} are 0 and 1, and {len(wrong)} of these {values.numel()} values are neither, such as "
            f"{wrong[0].item():.6g}: these are not spikes but what comes before or after them (membrane potentials, "
            "rates, currents), or spikes that count to more than one"
        )

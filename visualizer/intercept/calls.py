"""A call of a fused kernel, whichever kernel it is: what it computed, and the same with four axes and with its type."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ..maps import Modifiers, may_be_autocast


@dataclass(frozen=True)
class FusedCall:
    """A call of a fused kernel: output = softmax(scale * query . key^T + mask) . value."""

    output: Tensor
    """(..., queries, width of the values)."""
    query: Tensor
    """(..., queries, width)."""
    key: Tensor
    """(..., keys, width)."""
    value: Tensor
    """(..., keys, width of the values)."""
    scale: float | None = None
    """None: 1 / sqrt(width)."""
    mask: Tensor | None = None
    """Bool, or numbers that are added to the scores."""
    causal: int | None = None
    """Query i sees the keys 0 to i + causal; None: no such bound."""
    dropout: float = 0.0
    """The share of the weights that is dropped."""
    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    modifiers: Modifiers | None = None
    """What else happens to the scores; None: nothing."""
    has_heads: bool = False
    """Whether it is known that all of this has the axes (batch, heads, ...), for the kernel itself tells them apart."""
    returned: Tensor | None = None
    """The tensor that the kernel returned, where the output is another view of it. The gradient arrives there."""
    as_output: Callable[[Tensor], Tensor] | None = None
    """Gives a tensor that has the axes of `returned` those of the output."""
    is_foreign: bool = False
    """Whether it is not torch's own: of such a kernel more is compared."""
    log_sums: Tensor | None = None
    """Of each query the logarithm of the sum that its softmax is divided by, (batch, heads, queries), as far as the
    kernel returned it."""


class LogSums(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, fused attention leaves in `found` what its kernel returns beside the output, see `FusedCall.log_sums`.

    Kernels that torch chooses for a graph-less call on a GPU may return none.
    """

    @classmethod
    def may_see(cls, func: Any, query: Any, **others: Any) -> bool:
        """Whether a call can be looked at: one of torch's own, with plain tensors, under no mode of somebody else."""
        is_own = func in (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
        is_plain = is_own and type(query) is Tensor and query.ndim == 4
        return is_plain and torch._C._len_torch_dispatch_stack() == 0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "scaled_dot_product_attention.default":  # in inference mode the kernel is chosen only now
            with self:
                return func.decompose(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if func.__name__.startswith("_scaled_dot_product") and isinstance(made, tuple):
            self.found = made[1]
        return made


def with_sums(call: FusedCall, seen: LogSums | None) -> FusedCall:
    """The call with the sums that were seen of it, if they have its axes."""
    found = None if seen is None else seen.found
    return call if found is None or found.shape != call.query.shape[:-1] else replace(call, log_sums=found)


_globals = {**vars(F), "has_torch_function": lambda *_: False}
multi_head_attention: Any = types.FunctionType(
    F.multi_head_attention_forward.__code__, _globals, argdefs=F.multi_head_attention_forward.__defaults__
)
"""`F.multi_head_attention_forward`, whose calls a mode can see: the original hands itself to the mode whole."""
multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


@lru_cache(maxsize=4096)
def name_of(func: Any) -> str:
    """The name of a function, a method, or an operator of an exported program, such as "softmax" of softmax.int."""
    name = getattr(func, "__name__", None) or str(func)
    return name.partition(".")[0]


def four_axes(tensor: Tensor, heads: int | None) -> Tensor:
    """A tensor as (batch, heads, ., .). Axes before these, such as windows, become part of the batch."""
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim > 4:
        return tensor.flatten(0, tensor.ndim - 4)
    if tensor.ndim == 3 and heads is not None:
        return tensor.reshape(len(tensor) // heads, heads, *tensor.shape[1:])
    return tensor.unsqueeze(0).unsqueeze(0) if tensor.ndim == 2 else tensor.unsqueeze(1)


def in_four_axes(call: FusedCall, heads: int | None, groups: int) -> FusedCall:
    """The call with the axes (batch, heads, tokens, width), query and key of one batch and number of heads.

    Args:
        heads: how many heads share the first of three axes.
        groups: how many query heads lie on the axis of queries, each with a single query.
    """
    if call.has_heads:
        return call
    lead, mask = call.output.shape[:-2], call.mask
    if groups == 1 and len(lead) == 2 and call.query.shape[:-2] == lead:
        own = call.key.shape[:-2]
        if own == call.value.shape[:-2] and (own == lead or (len(own) == 2 and own[0] == lead[0] and own[1] > 1)):
            return call  # as nearly always
    if mask is not None and len(lead) != 2:
        mask = four_axes(mask.expand(*lead, *mask.shape[-2:]), heads)
    query, key, value = (four_axes(_broadcast(tensor, lead), heads) for tensor in (call.query, call.key, call.value))
    if groups > 1:
        query = query.flatten(1, 2).unsqueeze(2)
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask.flatten(1, 2).unsqueeze(2)
    return replace(call, query=query, key=key, value=value, mask=mask)


def _broadcast(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """A tensor with the axes of the output before its own two; key heads that several heads share stay as they are."""
    own = tensor.shape[:-2]
    if own == lead:
        return tensor
    is_grouped = len(own) == len(lead) == 2 and own[1] > 1
    return tensor.expand(*((lead[0], own[1]) if is_grouped else lead), *tensor.shape[-2:])


def as_computed(call: FusedCall) -> FusedCall:
    """The call with the type that autocast gives to query and key: the kernel is seen before that."""
    dtype = _autocast_dtype(call.query)
    return call if dtype is None else replace(call, query=call.query.to(dtype), key=call.key.to(dtype))


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    if tensor.dtype == torch.float64 or not may_be_autocast():
        return None
    device = tensor.device.type
    with suppress(TypeError, AttributeError, RuntimeError):  # other devices; torch before 2.4 has other functions
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None

"""The module calls under way, and what they say about an attention call: its path, its kind, its heads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


class ModuleCall(NamedTuple):
    """A module's call under way."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def kind_of(calls: Sequence[ModuleCall], queries: int, keys: int) -> Literal["self", "cross", "window"] | None:
    """Where the keys come from, as far as the calls under way tell; the last call is the innermost."""
    for number, call in enumerate(reversed(calls[-2:])):
        is_cross = getattr(call.module, "is_cross_attention", None)
        if isinstance(is_cross, bool):
            return "cross" if is_cross else "self"
        # What the module around was given is of this call if it is handed queries and keys, not hidden states.
        is_of_call = number == 0 or _is_handed_keys(calls[-1])
        names = ("encoder_hidden_states", "key_value_states")
        if is_of_call and any(call.kwargs.get(name) is not None for name in names):
            return "cross"
        if isinstance(call.module, nn.MultiheadAttention):
            inputs = [*call.args, *(call.kwargs[name] for name in ("query", "key") if name in call.kwargs)]
            return "self" if inputs[0] is inputs[1] else "cross"
        window = getattr(call.module, "window_size", None)
        # BEiT, whose attention is global, calls the whole grid its window; the class token is not in it.
        if window and queries == (window**2 if isinstance(window, int) else math.prod(window)):
            return "window"
    return "self" if queries == keys else None


def _is_handed_keys(call: ModuleCall) -> bool:
    """Whether a module is given several tensors of tokens."""
    values = [*call.args, *(value for name, value in call.kwargs.items() if "mask" not in name)]
    return sum(isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3 for value in values) > 1


def heads_of(call: ModuleCall, tensor: Tensor) -> int | None:
    """How many heads share the first axis of a tensor with three axes; None if that is not known."""
    if tensor.ndim != 3:
        return None
    heads = getattr(call.module, "num_heads", None)
    batch = next((item.shape[0] for item in call.args if isinstance(item, Tensor) and item.ndim), None)
    return heads if isinstance(heads, int) and batch is not None and tensor.shape[0] == batch * heads else None


def packed_groups(call: ModuleCall, query: Tensor, key: Tensor) -> int:
    """How many query heads lie on the axis of queries, where transformers puts them for single queries; else 1."""
    if query.ndim != 4:
        return 1
    groups = getattr(call.module, "num_key_value_groups", 1)
    heads = getattr(getattr(call.module, "config", None), "num_attention_heads", None)
    is_packed = (
        isinstance(groups, int)
        and groups > 1
        and query.shape[1] == key.shape[1]
        and query.shape[2] == groups
        and heads == query.shape[1] * groups
    )
    return groups if is_packed else 1


def arguments_named(calls: Sequence[ModuleCall], name: str) -> list[Any]:
    """What the calls under way were given by that keyword, the innermost call first."""
    values = []
    for call in reversed(calls):
        if name in call.kwargs:
            values.append(call.kwargs[name])
        elif {"pixel_values", "input_features"} & call.kwargs.keys():
            return [*values, None]  # the calls around it have masks of the text that goes with the picture
    return values


def as_native(call: ModuleCall, output: Any) -> Any:
    """The output that nn.TransformerEncoder has on torch's native path, which it does not take while it is recorded.

    There padding comes out as zeros, and as what the last norm makes of them. None where that path would not be taken.
    """
    encoder = call.module
    if not isinstance(encoder, nn.TransformerEncoder) or not getattr(encoder, "use_nested_tensor", False):
        return None
    src, mask, padding = (*call.args, None, None, None)[:3]
    src, mask = call.kwargs.get("src", src), call.kwargs.get("mask", mask)
    padding = call.kwargs.get("src_key_padding_mask", padding)
    if padding is None or mask is not None or src.ndim != 3 or encoder.training or torch.is_autocast_enabled():
        return None
    if torch.is_grad_enabled() and (src.requires_grad or any(one.requires_grad for one in encoder.parameters())):
        return None
    mha = getattr(torch.backends, "mha", None)  # since torch 2.3
    if mha is not None and not mha.get_fastpath_enabled():
        return None
    is_padding = padding != 0
    if not torch._nested_tensor_from_mask_left_aligned(src, ~is_padding):
        return None
    empty = output.new_zeros(output.shape[-1])
    return output.where(~is_padding[..., None], empty if encoder.norm is None else encoder.norm(empty))


def is_compiled(module: nn.Module) -> bool:
    """Whether its calls run what torch.compile made of it."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


def cannot_attend(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers without submodules, such as nn.Linear, whose calls are of no interest."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return is_torchs and not module._modules and not isinstance(module, nn.MultiheadAttention)


@lru_cache(maxsize=4096)
def is_called_attention(qualname: str) -> bool:
    """Whether a class is called attention. Those like LxmertAttentionOutput only project what was attended to."""
    name = qualname.rpartition(".")[2]
    return re.search("attention|attn", name, re.IGNORECASE) is not None and not name.endswith("Output")


def is_within(path: str, other: str) -> bool:
    """Whether a path is the other one, or that of a module within it."""
    return path == other or not other or path.startswith(f"{other}.")

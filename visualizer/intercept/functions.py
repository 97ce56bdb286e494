"""What torch's functions are to attention, by their names, and what their arguments say."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Role = Literal["sdpa", "flex", "heads", "softmax", "product", "carries", "mixes", "in place"]

# By name: functions, methods and the operators of exported programs have the same ones.
_ROLES: dict[str, Role] = {
    "scaled_dot_product_attention": "sdpa",
    "flex_attention": "flex",
    "multi_head_attention_forward": "heads",
    **dict.fromkeys(("softmax", "_softmax"), "softmax"),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm"), "product"),
    **dict.fromkeys(("linear", "conv2d"), "mixes"),
    **dict.fromkeys(
        (
            *("to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous", "alias"),
            *("view", "reshape", "permute", "transpose", "swapaxes", "__get__", "unsqueeze", "squeeze", "flatten"),
            *("unflatten", "expand", "__getitem__", "slice", "narrow", "cat", "concat", "dropout", "native_dropout"),
            *("add", "__add__", "__radd__", "sub", "__sub__", "mul", "__mul__", "__rmul__", "div", "__truediv__"),
            *("masked_fill", "where", "nan_to_num", "clamp", "tanh"),
        ),
        "carries",
    ),
}


BEGINNINGS = frozenset({"sdpa", "flex", "heads", "product"})
"""What is attention, or the beginning of it; the other roles mean something only after a product."""


@lru_cache(maxsize=4096)
def role_of(func: Any) -> Role | None:
    """What a function, a method or an operator is to attention; None for most."""
    name = getattr(func, "__name__", None) or str(func)
    name = name.partition(".")[0]  # softmax.int, of an exported program
    if name.endswith("_") and not name.endswith("__"):
        return "in place"
    return _ROLES.get(name)


def is_in_place(args: Any, kwargs: Any) -> bool:
    """Whether a function that can is asked to change its argument: F.dropout(input, p, training, inplace), out=."""
    return bool(kwargs.get("inplace") or (len(args) == 4 and args[3] is True)) or kwargs.get("out") is not None


def mixes_heads(args: Any, output: Tensor) -> bool:
    """Whether a linear map is one of heads, (batch, queries, keys, heads): "talking heads"; not one of features."""
    return output.ndim == 4 and output.shape == args[0].shape


_shown = dict(vars(F))
_shown["has_torch_function"] = lambda *_: False
seen_through: Any = types.FunctionType(
    F.multi_head_attention_forward.__code__, _shown, argdefs=F.multi_head_attention_forward.__defaults__
)
"""F.multi_head_attention_forward for whoever watches what it calls. Left alone, it hands itself to a mode whole."""
seen_through.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__

MADE_UP = ("_identity", "noop_mask")  # what flex_attention puts in where there is no function


def with_buffers(function: Callable[..., Tensor], buffers: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A function of flex_attention without the tensors that it was given apart."""
    return (lambda *args: function(*args, *buffers)) if buffers else function


def four_axes(tensor: Tensor, heads: int | None) -> Tensor:
    """A tensor as (batch, heads, ., .): windows and the like, on axes before these, are part of the batch."""
    if tensor.ndim == 4:
        return tensor
    if tensor.ndim > 4:
        return tensor.flatten(0, tensor.ndim - 4)
    if tensor.ndim == 3 and heads is not None:
        return tensor.view(-1, heads, *tensor.shape[1:])
    return tensor.unsqueeze(0).unsqueeze(0) if tensor.ndim == 2 else tensor.unsqueeze(1)


_may_be_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""The quick answer, which is nearly always no."""


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast gives a fused kernel's arguments, which are seen before that."""
    if tensor.dtype == torch.float64 or not _may_be_autocast():
        return None
    kind = tensor.device.type
    with suppress(TypeError, AttributeError, RuntimeError):  # other devices; torch before 2.4 has other functions
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
    return None

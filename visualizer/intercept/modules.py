"""The module calls under way, and what they say about an attention call: its path, its inputs, its heads."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..opcodes import globals_of, multiplies_matrices
from ..tensors import shape_of


class ModuleCall(NamedTuple):
    """A module's call under way."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def inputs_of(call: ModuleCall, axes: int = 2) -> list[tuple[str, Tensor]]:
    """The tensors of numbers that a module's call is given, of at least so many axes, with the names of the
    arguments."""
    found: list[tuple[str, Tensor]] = []
    if call.args:
        names = names_taken(type(call.module).forward)
        for place, value in enumerate(call.args):
            if value is not None:
                _add_tensors(found, axes, names[min(place, len(names) - 1)] if names else str(place), value)
    for name, value in call.kwargs.items():
        if type(value) is Tensor:  # as most are, so that it need not be asked elsewhere
            if value.ndim >= axes and value.is_floating_point():
                found.append((name, value))
        elif value is not None:
            _add_tensors(found, axes, name, value)
    return found


def argument_names(module: nn.Module) -> list[str]:
    """The names of the arguments that a module's calls take."""
    return names_taken(type(module).forward)


@lru_cache(maxsize=4096)
def names_taken(forward: Any) -> list[str]:
    """The names of the arguments that a method takes; they are not to be changed."""
    return [*inspect.signature(forward).parameters][1:]


def arguments_of(call: ModuleCall) -> dict[str, Any]:
    """What a module's call was given, by the names of the arguments; it is not to be changed."""
    if not call.args:
        return call.kwargs
    return {**dict(zip(names_taken(type(call.module).forward), call.args, strict=False)), **call.kwargs}


def may_have(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether a module has one of these attributes, or has ways of its own to find one. To ask for each costs more:
    most modules lack what we look for, and torch then words an error of it."""
    kind, own = type(module), module.__dict__
    if kind.__getattr__ is not nn.Module.__getattr__:
        return True
    parameters, buffers, modules = own["_parameters"], own["_buffers"], own["_modules"]
    for name in names:
        if name in own or hasattr(kind, name) or name in parameters or name in buffers or name in modules:
            return True
    return False


def _add_tensors(found: list[tuple[str, Tensor]], axes: int, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.ndim >= axes and value.is_floating_point():
            found.append((name, value))
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            _add_tensors(found, axes, name, one)


def shapes_of(
    calls: Sequence[ModuleCall], known: dict[int, tuple[int, ...] | None] | None = None
) -> list[tuple[int, ...]]:
    """The shapes of the first tensor of tokens or pixels that each call under way was given, the innermost first.

    Args:
        known: those of calls that are still under way, by their ids; the others are added.
    """
    known = {} if known is None else known
    shapes = []
    for call in reversed(calls):
        number = id(call)
        if number not in known:
            known[number] = _shape_of_tokens(call)
        shape = known[number]
        if shape is not None:
            shapes.append(shape)
    return shapes


def _shape_of_tokens(call: ModuleCall) -> tuple[int, ...] | None:
    first = call.args[0] if call.args else None
    if type(first) is Tensor and first.ndim > 2 and first.is_floating_point():
        return shape_of(first)  # as nearly always
    return shape_of(next((one for _, one in inputs_of(call) if one.ndim > 2), None))


def are_windows(batch: int, queries: int, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the batch of a map is images x windows: a module was given fewer images, of more tokens each.

    Args:
        batch, queries: of the map.
        shapes: see `shapes_of`.
    """
    for number, (first, *rest) in enumerate(shapes):
        if first == batch:
            continue
        if not batch > first > 0 or batch % first or (first == queries and rest[:1] == [batch]):
            return False  # not split, or (tokens, batch, width)
        inner = shapes[number - 1]
        within = rest if number == 0 else [inner[-1], inner[1 if len(inner) == 4 else -1]]
        counts = {width: math.prod(rest) // width for width in rest if width}
        is_covered = batch // first * queries in counts.values()
        return is_covered or any(count > queries and width in within for width, count in counts.items())
    return False


def are_given_the_same(calls: Sequence[ModuleCall], others: Sequence[ModuleCall]) -> bool:
    """Whether two modules are as one layer and another of a stack: within the same calls, and all that they are given
    is the same but for the numbers of their tokens, (batch, tokens, width)."""
    if len(calls) != len(others):
        return False
    for one, other in zip(calls, others, strict=True):
        if one is other:
            continue
        is_like = (
            type(one.module) is type(other.module)
            and "window_size" not in vars(one.module)
            and not hasattr(type(one.module), "window_size")
            and len(one.args) == len(other.args)
            and [*one.kwargs] == [*other.kwargs]
        )
        if not is_like:
            return False
        pairs = (*zip(one.args, other.args, strict=True), *zip(one.kwargs.values(), other.kwargs.values(), strict=True))
        for value, others in pairs:
            if value is not others and not _is_same_but_tokens(value, others):
                return False
    return True


def _is_same_but_tokens(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.ndim == 3
        and one.is_floating_point()
        and one.shape == other.shape
    )


def heads_of(call: ModuleCall, tensor: Tensor) -> int | None:
    """How many heads share the first axis of a tensor with three axes; None if that is not known."""
    if tensor.ndim != 3:
        return None
    heads = getattr(call.module, "num_heads", None)
    batch = next((item.shape[0] for item in call.args if isinstance(item, Tensor) and item.ndim), None)
    return heads if isinstance(heads, int) and batch is not None and tensor.shape[0] == batch * heads else None


def packed_groups(call: ModuleCall, query: Tensor, key: Tensor) -> int:
    """How many query heads lie on the axis of queries, where transformers puts them for single queries; else 1."""
    if query.ndim != 4 or query.shape[2] < 2 or query.shape[1] != key.shape[1]:
        return 1
    groups = getattr(call.module, "num_key_value_groups", 1)
    if not isinstance(groups, int) or query.shape[2] != groups:
        return 1
    heads = getattr(getattr(call.module, "config", None), "num_attention_heads", None)
    return groups if heads == query.shape[1] * groups else 1


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


def has_global_hooks() -> bool:
    """Whether there are hooks of all modules, of which we have none."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def cannot_attend(module: nn.Module) -> bool:
    """Whether it is one of torch's own layers without submodules, such as nn.Linear, whose calls are of no interest."""
    is_torchs = type(module).__module__.startswith("torch.nn.modules.")
    return is_torchs and not module._modules and not isinstance(module, nn.MultiheadAttention)


_BY_TOKEN = frozenset(
    (
        *(
            "add",
            "bfloat16",
            "clamp",
            "contiguous",
            "dtype",
            "float",
            "float16",
            "float32",
            "functional",
            "gelu",
            "half",
        ),
        *("layer_norm", "mean", "mul", "normalize", "pow", "relu", "rms_norm", "rsqrt", "sigmoid", "silu", "sqrt"),
        *("square", "tanh", "to", "type", "type_as", "var"),
    )
)
"""Names in code that belong to torch, and stand for nothing that mixes tokens."""


def works_by_token(module: nn.Module, known: dict[nn.Module, bool] | None = None) -> bool:
    """Whether it is sure that nothing in a layer attends, such as a norm or an MLP: by its code, and by its submodules.

    The code may use torch's functions that do not mix tokens, call torch's own layers and others like itself, and no
    function else; what it is called with has to be tensors, of which the caller makes sure.

    Args:
        known: what was found of other modules, to which this one is added.
    """
    known = {} if known is None else known
    if module not in known:
        known[module] = _works_by_token(module, known)
    return known[module]


def _works_by_token(module: nn.Module, known: dict[nn.Module, bool]) -> bool:
    forward = type(module).forward
    if type(forward) is not FunctionType or "forward" in vars(module) or is_called_attention(type(module).__qualname__):
        return False
    if forward.__closure__ or hasattr(forward, "__wrapped__"):
        return False
    if any(map(callable, (*(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values()))):
        return False
    names, globals_ = _names_in(forward.__code__)
    if names is None or any(forward.__globals__.get(name) not in _TORCH for name in globals_):
        return False
    for name in names:
        if name in _BY_TOKEN and (not hasattr(module, name) or hasattr(nn.Module, name)):
            continue
        if not isinstance(getattr(module, name, None), (nn.Module, Tensor, int, float, str, torch.dtype)):
            return False
    inner = [one for one in module._modules.values() if one is not None]
    return all(cannot_attend(one) or works_by_token(one, known) for one in inner)


_TORCH = (torch, nn, nn.functional)


@lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> tuple[set[str] | None, set[str]]:
    """The names of attributes and of globals in code; None in place of the former where it does more than use them."""
    has_functions = any(isinstance(constant, CodeType) for constant in code.co_consts)
    found = globals_of(code)
    return (None if has_functions or multiplies_matrices(code) else {*code.co_names} - found), found


@lru_cache(maxsize=4096)
def is_called_attention(qualname: str) -> bool:
    """Whether a class is called attention. Those like LxmertAttentionOutput only project what was attended to."""
    name = qualname.rpartition(".")[2]
    return re.search("attention|attn", name, re.IGNORECASE) is not None and not name.endswith("Output")


def is_within(path: str, other: str) -> bool:
    """Whether a path is the other one, or that of a module within it."""
    return path == other or not other or path.startswith(f"{other}.")

"""Products of two tensors that are no matrix product by name, in one form: a letter for each axis, as of an einsum.

torch.tensordot, torch.inner and torch.linalg.vecdot are such products, and so are two tensors that are broadcast
against each other, multiplied, and summed over an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .axes import einsum_labels, einsum_operands

MULTIPLIES = frozenset(("mul", "multiply", "__mul__", "__rmul__"))
CONTRACTS = frozenset(("tensordot", "inner", "linalg_vecdot"))
EXPANDS = frozenset(("expand", "expand_as", "broadcast_to"))
_BROADCAST = frozenset((*MULTIPLIES, "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "bilinear"))
"""Of these and the features, which are the last axis, scores are made."""
_TOLD_BY_AXES = frozenset((*CONTRACTS, "cosine_similarity", "pairwise_distance"))
_ORDER = {"self": 0, "input": 0, "mat1": 1, "batch1": 1, "a": 1, "x": 1, "x1": 1, "input1": 1}
"""Where operands are that are passed by their names; all others are behind them."""
_ABSENT = "."
"""In place of the letter of an axis along which a tensor is the same."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Terms(NamedTuple):
    """Which axes of two tensors a function multiplied, and which ones are left in its result."""

    operands: tuple[Tensor, Tensor]
    labels: tuple[str, str]
    output: str
    are_aligned: bool = False
    """Whether they were broadcast: axes of one lie on those of the other, from the last one on."""

    def of(self, tensor: Tensor) -> tuple[str, str, Tensor]:
        """The letters of one of the two, and those of the other, and the other."""
        place = 0 if self.operands[0] is tensor else 1
        return self.labels[place], self.labels[1 - place], self.operands[1 - place]

    def summed(self, tensor: Tensor) -> list[int]:
        """The axes of one of the two that are summed over."""
        return [axis for axis, label in enumerate(self.of(tensor)[0]) if label not in (*self.output, _ABSENT)]


def operands_of(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments of a product, in its order; without a bias, and where a result is written to."""
    items = args
    if kwargs:
        named = sorted((key for key in kwargs if key != "out"), key=lambda key: _ORDER.get(key, 2))
        items = (*args, *map(kwargs.__getitem__, named))
    found = [item for item in items if isinstance(item, Tensor)]
    return found[-2:] if name in ("baddbmm", "addmm") else found


def is_parameter(tensor: Any) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(getattr(tensor, "_base", None), nn.Parameter)


def makes_row(args: Any) -> bool:
    """Whether two tensors are (..., 1, features) and (..., keys, features): a single query, and all keys.

    One that is a parameter is no query, and scales features.
    """
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return False
    one, other = args[0].shape, args[1].shape
    if one == other or len(one) != len(other) or len(one) < 2 or not args[0].is_floating_point():
        return False
    is_one_row = 1 in (one[-2], other[-2]) and one[-1] == other[-1] > 1 and one[:-2] == other[:-2]
    return is_one_row and not is_parameter(args[0]) and not is_parameter(args[1])


def has_strides(tensor: Any) -> bool:
    """Whether it is a tensor whose shape and strides can be asked; those of sparse and of nested ones cannot."""
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested


def real_sizes(tensor: Tensor) -> tuple[int, ...]:
    """The lengths of its axes, 1 where an axis was expanded."""
    return tuple(size if step else 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def terms_of(name: str, args: Any, kwargs: Any) -> Terms | None:
    """The axes of a call of one of `CONTRACTS`, or of the like."""
    operands = operands_of(name, args, kwargs)
    if len(operands) != 2 or not all(map(has_strides, operands)):
        return None
    one, other = operands
    if name == "cosine_similarity":
        return multiplied(one, other, kwargs.get("dim", args[2] if len(args) > 2 else 1))
    if name in ("linalg_vecdot", "pairwise_distance"):
        return multiplied(one, other, kwargs.get("dim", -1), kwargs.get("keepdim", False))
    own, others = _LETTERS[: one.ndim], _LETTERS[one.ndim : one.ndim + other.ndim]
    if name == "inner":
        pairs = [(one.ndim - 1, other.ndim - 1)]
    else:
        dims = kwargs.get("dims", args[2] if len(args) > 2 else 2)
        if isinstance(dims, Tensor):
            dims = dims.tolist()
        if isinstance(dims, int):
            pairs = [(one.ndim - dims + place, place) for place in range(dims)]
        else:
            left, right = ([axis] if isinstance(axis, int) else axis for axis in dims)
            pairs = [(axis % one.ndim, place % other.ndim) for axis, place in zip(left, right, strict=True)]
    for axis, place in pairs:
        others = others.replace(others[place], own[axis])
    output = "".join(label for label in (*own, *others) if own.count(label) + others.count(label) == 1)
    return Terms((one, other), (own, others), output)


def multiplied(one: Tensor, other: Tensor, dim: Any, keeps: bool = False) -> Terms | None:
    """The axes of two tensors that are multiplied and then summed over an axis; None if that is none or several."""
    dims = [dim] if isinstance(dim, int) else dim
    count = max(one.ndim, other.ndim)
    if not isinstance(dims, Sequence) or len(dims) != 1 or not count:
        return None
    own, others = ((1,) * (count - tensor.ndim) + real_sizes(tensor) for tensor in (one, other))
    pairs = [*zip(_LETTERS, own, others, strict=False)]
    left, right = (
        "".join(_ABSENT if size[place] == 1 < size[1 - place] else label for label, *size in pairs)[
            count - tensor.ndim :
        ]
        for place, tensor in enumerate((one, other))
    )
    over = dims[0] % count
    output = [_ABSENT if axis == over else label for axis, (label, *_) in enumerate(pairs)]
    if not keeps:
        del output[over]
    return Terms((one, other), (left, right), "".join(output), are_aligned=True)


def without_absent(tensor: Tensor, labels: str) -> tuple[Tensor, str]:
    """A tensor without the axes along which it is the same, and its letters."""
    kept = labels.replace(_ABSENT, "")
    if kept != labels:
        tensor = tensor[tuple(0 if label == _ABSENT else slice(None) for label in labels)]
    return tensor, kept


_NEITHER = True, True
"""What is known of an axis of length 1, which tells nothing."""


class Sides(NamedTuple):
    """The two tensors that scores were made of, as far as it is to be remembered; `axes` is asked rarely."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    of_parameters: bool
    """Whether one of them is a parameter."""
    told: Any = None
    """Of an einsum its equation; or the `Terms`, without the tensors; else the function's name tells."""

    def axes(self) -> list[tuple[bool, bool]]:
        """Of each axis of the scores, whether it is one of the first tensor and of the second."""
        if self.told is not None:
            labels, output = self.told, ""
            if self.name == "einsum":
                labels, output = einsum_labels(self.told, [*map(len, self.shapes)])
            else:
                labels, output = self.told
            return [(label in labels[0], label in labels[1]) if label != _ABSENT else _NEITHER for label in output]
        own, others = (
            [size if step else 1 for size, step in zip(shape, steps, strict=True)]
            for shape, steps in zip(self.shapes, self.strides, strict=True)
        )
        if self.name == "linear":
            return [*((True, False) for _ in own[:-1]), (False, True)]
        if self.name in _BROADCAST:
            made = _shared(own[:-1], others[:-1])
            return [*made, _NEITHER]  # which stays with keepdim=True
        if len(own) == 1 or len(others) == 1:
            return [(len(others) == 1, len(own) == 1) for _ in range(max(len(own), len(others)) - 1)]
        return [*_shared(own[:-2], others[:-2]), (True, False), (False, True)]


def _shared(one: Sequence[int], other: Sequence[int]) -> list[tuple[bool, bool]]:
    """Which of two tensors has each of the axes that they are broadcast to."""
    count = max(len(one), len(other))
    own, others = ([*(0,) * (count - len(sizes)), *sizes] for sizes in (one, other))
    return [(size == max(size, other), other == max(size, other)) for size, other in zip(own, others, strict=True)]


def sides_of(name: str, args: Any, kwargs: Any) -> Sides | None:
    """What is known of the two tensors that a function made scores of; None if that is not known."""
    told: Any = None
    if name == "addbmm":
        return None
    if name == "einsum":
        tensors, told = einsum_operands(args), args[0]
    else:
        tensors = operands_of(name, args, kwargs)
        if name in _TOLD_BY_AXES:
            terms = terms_of(name, args, kwargs)
            if terms is None:
                return None
            told = terms.labels, terms.output
        elif name == "__rmatmul__":
            tensors = tensors[::-1]
        elif name in ("linear", "bilinear"):
            tensors = tensors[:2]
    if len(tensors) != 2 or (name == "einsum" and not isinstance(told, str)):
        return None
    one, other = tensors
    if not has_strides(one) or not has_strides(other):
        return None
    shapes, strides = (one.shape, other.shape), (one.stride(), other.stride())
    return Sides(name, shapes, strides, is_parameter(one) or is_parameter(other), told)

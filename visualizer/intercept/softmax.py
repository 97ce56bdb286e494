"""Attention that is computed in the open: a softmax between two matrix products.

Its scores come from a matrix product, and another one takes its weights: as they are, or after operations that keep
each number in its place, such as a mask, dropout, or a new shape.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

from torch import Tensor

from .kernels import name_of

Role = Literal["softmax", "product", "carries", "mixes heads", "in place"]

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("softmax", "_softmax"), "softmax"),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm"), "product"),
    **dict.fromkeys(("linear", "conv2d"), "mixes heads"),
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


@lru_cache(maxsize=4096)
def role_of(func: Any) -> Role | None:
    """What a function does with scores and weights; None for most functions."""
    name = name_of(func)
    if name.endswith("_") and not name.endswith("__"):
        return "in place"
    return _ROLES.get(name)


class Softmax:
    """The weights that a softmax has made, until a product shows that they are attention."""

    def __init__(self, weights: Tensor) -> None:
        self._reference = weakref.ref(weights)
        self._weights: Tensor | None = None
        self.copy: Tensor | None = None
        """The weights before they were changed in place; None if they were not."""
        self.keys = weights.shape[-1]
        """How many entries of the last axis are keys: an attention sink behind them is cut off before the product."""
        self.is_recorded = False

    @property
    def weights(self) -> Tensor | None:
        """What the softmax returned; None once it is gone, and nothing was made of it."""
        return self._reference() if self._weights is None else self._weights

    def hold(self) -> None:
        """Keep the weights alive, now that another tensor stands for them."""
        self._weights = self._reference()

    def note_slice(self, whole: Any, part: Any) -> None:
        """Note if a function takes only the first keys."""
        if not isinstance(whole, Tensor) or not isinstance(part, Tensor) or part.shape[:-1] != whole.shape[:-1]:
            return
        if whole.shape[-1] == self.keys > part.shape[-1] and part.data_ptr() == whole.data_ptr():
            self.keys = part.shape[-1]

    def save(self) -> None:
        """Copy the weights before a function changes them in place."""
        weights = self.weights
        if weights is not None and self.copy is None:
            self.copy = weights.detach().clone()


_SCORES = object()  # in a lineage: the tensor comes from a matrix product, and may be scores


class Tracing:
    """Follows scores and weights from function to function, in one thread."""

    def __init__(self) -> None:
        self.lineage: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        """By their ids, the tensors that come from a matrix product or from a Softmax, and from which."""

    def see(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Softmax | None]:
        """Run a function: its output, and the softmax whose weights it multiplies with values, the first time."""
        role = role_of(func)
        origin = self._origin_of(args) or self._origin_of(kwargs.values())
        softmax = origin if isinstance(origin, Softmax) else None
        if softmax is not None and (role == "in place" or _is_in_place(args, kwargs)):
            softmax.save()
        output = func(*args, **kwargs)
        if role == "product":
            if softmax is None:
                self._follow(output, _SCORES)
            elif softmax.weights is not None and not softmax.is_recorded:
                softmax.is_recorded = True
                return output, softmax
        elif role == "softmax" and origin is _SCORES:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if output.ndim >= 2 and axis in (-1, output.ndim - 1):
                self._follow(output, Softmax(output))
        elif origin is not None and (role == "carries" or (role == "mixes heads" and _has_same_axes(args, output))):
            if softmax is not None and output is not softmax.weights:
                softmax.hold()
                softmax.note_slice(args[0], output)
            self._follow(output, origin)
        return output, None

    def _follow(self, tensor: Any, origin: Any) -> None:
        if isinstance(tensor, Tensor):
            lineage, number = self.lineage, id(tensor)
            lineage[number] = weakref.ref(tensor, lambda _: lineage.pop(number, None)), origin

    def _origin_of(self, args: Iterable[Any]) -> Any:
        """What a function's arguments come from: a Softmax before scores, None if from neither."""
        found, lineage = None, self.lineage
        if lineage:
            for item in args:
                known = lineage.get(id(item))
                origin = known[1] if known is not None and known[0]() is item else None
                if origin is None and isinstance(item, (list, tuple)):
                    origin = self._origin_of(item)
                if isinstance(origin, Softmax):
                    return origin
                found = origin or found
        return found


def _is_in_place(args: Any, kwargs: Any) -> bool:
    """Whether a function is asked to change its argument: F.dropout(input, p, training, inplace), or out=."""
    return bool(kwargs.get("inplace") or (len(args) == 4 and args[3] is True)) or kwargs.get("out") is not None


def _has_same_axes(args: Any, output: Tensor) -> bool:
    """Whether a linear map mixes the heads of weights, "talking heads", and not features."""
    return output.ndim == 4 and output.shape == args[0].shape

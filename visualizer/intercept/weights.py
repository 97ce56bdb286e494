"""What is known of scores, and of the weights that are made of them, as functions change them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tensors import is_plain_torch
from .axes import REORDERS, Factor, Layout, is_in, layout_of, layout_of_product
from .contractions import EXPANDS, MULTIPLIES, Sides, real_sizes

PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm", "linalg_matmul"))
ENDS = frozenset(("layer_norm", "group_norm", "batch_norm", "rms_norm", "conv1d", "conv3d", "embedding", "bilinear"))
"""After these functions a tensor is no longer scores or weights, even if its shape is the same."""
_SCALES = frozenset((*MULTIPLIES, "div", "__truediv__", "to", "float", "half", "bfloat16", "double"))
_BENDS = frozenset(
    (
        *("tanh", "tanh_", "relu", "relu_", "leaky_relu", "gelu", "elu", "silu", "selu", "sigmoid", "softplus", "exp"),
        *("abs", "square", "pow", "__pow__", "norm", "linalg_norm", "linalg_vector_norm"),
    )
)
"""Functions that are not linear."""
_ADDS_AXES = frozenset(("__getitem__", "unsqueeze", "squeeze", "view", "reshape", *EXPANDS))
SUMS_TO_ONE = 0.02  # rounding of a whole row in bfloat16 stays below it


class Softmax:
    """The output of a softmax over scores, or of what stands in its place."""

    def __init__(
        self,
        weights: Tensor,
        is_normalised: bool = True,
        is_of_scores: bool = True,
        axis: int = -1,
        scores: Scores | None = None,
    ) -> None:
        self.is_normalised = is_normalised
        """Whether it sums to one over the keys."""
        self.is_over_last = axis in (-1, weights.ndim - 1)
        """Whether these are the last axis."""
        self.is_of_scores = is_of_scores
        """Whether it is known to be of scores. Others count where they are mixed with one that is, as in ConViT."""
        self.is_changed = False
        """Whether it, or what was made of it, was changed in place."""
        self.keys = weights.shape[axis]
        """How many keys it is over."""
        self.scores = scores
        """What is known of the scores."""
        self.factors: Sequence[Factor] = ()
        """Its axes."""
        self.empty: Tensor | None = None
        """Where queries may attend to nothing, see `EmptyRows.of`."""
        self._reference = weakref.ref(weights)
        self._held: Tensor | None = None
        self._copy: Tensor | None = None
        self._recorded = set[Any]()

    def take(self, part: Tensor) -> bool:
        """Put a part of the weights, or all, into a map; False if they are in one already."""
        weights = self._reference()
        is_part = weights is not None and part.numel() < weights.numel() and is_plain_torch(torch)
        which = (part.data_ptr(), part.shape, part.stride()) if is_part else None
        if None in self._recorded or which in self._recorded:
            return False
        self._recorded.add(which)
        return True

    @property
    def made(self) -> Tensor | None:
        """The tensor that the softmax returned; None where it is gone."""
        return self._held if self._held is not None else self._reference()

    @property
    def maps(self) -> int:
        """How many maps they, or parts of them, are in."""
        return len(self._recorded)

    def hold(self) -> None:
        """Keep the tensor alive, now that others are made of it."""
        self._held = self._reference()

    def save(self) -> None:
        """Copy the weights before a function changes them in place."""
        weights = self._reference()
        if weights is not None and self._copy is None:
            self._copy = weights.detach().clone()

    @property
    def weights(self) -> Tensor | None:
        """The weights as the softmax made them; None where they are gone."""
        return self._copy if self._copy is not None else self._held if self._held is not None else self._reference()


@dataclass
class Weights:
    """What is known of a tensor that was computed from the outputs of softmaxes."""

    softmaxes: tuple[Softmax, ...]
    is_softmax: bool = True
    """Whether its numbers are those of one softmax, perhaps reshaped, or cut to its first keys."""
    without_dropout: Tensor | None = None
    """The same without dropout, if there was some."""
    before_dropout: Tensor | None = None
    """What went into the dropout; the gradient of the weights arrives here."""
    layout: Layout | None = None
    """The axes of the tensor; None: they are not known."""
    pair: tuple[Factor, ...] = ()
    """The axes of the keys that the softmax was over, and of the queries, if they are known."""
    before_axes: Tensor | None = None
    """What was given more axes, if it was; the gradient of the weights arrives here."""

    def in_pair(self, axis: int) -> bool:
        """Whether queries or keys may be in an axis."""
        if self.layout is None or not self.layout[axis]:
            return True
        if any(is_in(factor, self.layout[axis]) for factor in self.pair):
            return True
        is_of_one = not any(factor.smallest() for factor in self.layout[axis])  # a single query, for example
        return is_of_one and any(factor.size == 1 for factor in self.pair)

    def is_over(self, axis: int) -> bool:
        """Whether they are those of one softmax, over an axis."""
        keys = self.pair[0]
        return self.is_softmax and (self.layout is None or keys.size == 1 or is_in(keys, self.layout[axis]))


@dataclass(frozen=True)
class Scores:
    """A tensor that comes from a matrix product, and may be scores."""

    is_outer: bool = False
    """Whether the product summed over nothing, as where positions are multiplied with frequencies."""
    sides: Sides | None = None
    """The two tensors that were multiplied, if they and the axes are known."""
    layout: Layout | None = None
    """The axes; None: they are as the product made them."""
    factors: Sequence[Factor] = ()
    """The axes as the product made them, in its order."""

    def moved(self, func: Any, name: str, args: Any, kwargs: Any, before: Tensor, after: Tensor) -> Scores:
        """What is known of what a function made of them, which changes their shape or order."""
        if self.sides is None:
            return self
        factors = self.factors or [*map(Factor, before.shape)]
        layout = self.layout or [[factor] for factor in factors]
        made = layout_of_weights(func, name, args, kwargs, before, layout, after)
        if made is None:
            return Scores(self.is_outer)
        return replace(self, layout=made, factors=factors)

    def axes(self, count: int) -> list[tuple[bool, bool]] | None:
        """Of each of so many axes, whether one of the two tensors has it, and the other; None: it is not known."""
        made = [] if self.sides is None else self.sides.axes()
        if self.layout is None:
            return made[:count] if 0 < len(made) - count < 2 or len(made) == count > 0 else None
        if len(made) not in (len(self.factors), len(self.factors) + 1) or len(self.layout) != count:
            return None

        def has(axis: Sequence[Factor], side: int) -> bool:
            known = [factor for factor, sides in zip(self.factors, made, strict=False) if sides[side]]
            return all(any(is_in(factor, [one]) for factor in known) for one in axis)

        return [(has(axis, 0), has(axis, 1)) for axis in self.layout]

    def are_after(self, name: str) -> bool:
        """Whether a function may leave them scores; the cosines of angles are none."""
        return name not in ENDS and not (self.is_outer and name in ("cos", "sin"))


@dataclass(frozen=True)
class Pairs:
    """A tensor made of each query with each key, (..., queries, keys, features), or without features.

    As in additive attention, it becomes scores where a function that is not linear was applied and the features are
    made one number, or one a head. Without such a function a softmax over the keys would be the same for all queries.
    """

    has_features: bool
    is_bent: bool
    sides: Sides | None = None

    def made(self, name: str, before: Tensor, after: Tensor) -> object:
        """What is known of what a function made of it; None: nothing."""
        is_bent = self.is_bent or name in _BENDS
        if not self.has_features:
            return (Scores(sides=self.sides) if is_bent else self) if after.shape == before.shape else None
        is_layer = name == "linear" and after.shape[-1] > 1
        if after.shape == before.shape or (is_layer and after.shape[:-1] == before.shape[:-1]):
            return Pairs(True, is_bent, self.sides)
        is_reduced = after.shape in (before.shape[:-1], (*before.shape[:-1], 1))
        if name in ("permute", "transpose", "movedim", "swapaxes") and not is_reduced:
            if after.stride(-1) == before.stride(-1):
                return self
            is_reduced = True  # the features are heads
        return Scores(sides=self.sides) if is_bent and is_reduced else None


@dataclass(frozen=True)
class Row:
    """A tensor made of a single query times each key, (..., keys, features), whose sums over the features are scores.

    A scale of the features, as of FiLM, is the same but for that sum: nothing else is followed.
    """

    sides: Sides | None

    def made(self, name: str, args: Any, kwargs: Any, before: Tensor, after: Any) -> object:
        """What is known of what a function made of it; None: nothing."""
        if not isinstance(after, Tensor):
            return None
        if name in _SCALES and sum(isinstance(one, Tensor) for one in args) == 1:
            return self
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
        is_of_features = isinstance(dim, int) and dim % before.ndim == before.ndim - 1
        return Scores(sides=self.sides) if name in ("sum", "mean") and is_of_features else None


def new_weights(weights: Tensor, softmax: Softmax, axis: int = -1) -> Weights:
    """Weights that a softmax made over one of their axes, which is that of the keys."""
    layout = [[Factor(size)] for size in weights.shape]
    softmax.factors = [factor for (factor,) in layout]
    last = weights.ndim - 1
    queries = {last: [last - 1], last - 1: [last]}.get(axis % weights.ndim, [])
    return Weights((softmax,), layout=layout, pair=tuple(layout[one][0] for one in (axis, *queries)))


def layout_of_weights(
    func: Any, name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout, result: Tensor
) -> Layout | None:
    """The axes of what a function made of weights with these axes; None: they are not known."""
    if name == "linear" or name in PRODUCTS:
        return layout_of_product(name, args, kwargs, tensor, layout, result)
    if only_adds_axes(name, args, tensor, result) and name not in REORDERS:
        return _layout_with_more_axes(name, args, layout, tensor, result)
    if name == "conv2d" and len(layout) == result.ndim == 4:
        return [layout[0], [Factor(result.shape[1])], *layout[2:]]
    return layout_of(func, name, args, kwargs, tensor, layout, result)


def only_adds_axes(name: str, args: Any, before: Tensor, after: Tensor) -> bool:
    """Whether a function only gave a tensor axes along which it is the same, or took such axes away."""
    if name not in _ADDS_AXES or not isinstance(after, Tensor):
        return False
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(one is None or one is Ellipsis or isinstance(one, (slice, int)) for one in index):
            return False
    return [size for size in real_sizes(after) if size != 1] == [size for size in real_sizes(before) if size != 1]


def _layout_with_more_axes(name: str, args: Any, layout: Layout, before: Tensor, after: Tensor) -> Layout:
    """The axes of what only has more or fewer of those along which it is the same."""
    if name == "unsqueeze" and len(args) > 1:
        dim = args[1] % after.ndim
        return [*layout[:dim], [], *layout[dim:]]
    if name in EXPANDS:
        rest = [
            axis if size == now else []
            for axis, size, now in zip(layout, before.shape, after.shape[after.ndim - before.ndim :], strict=True)
        ]
        return [*([] for _ in range(after.ndim - before.ndim)), *rest]
    index = args[1] if name == "__getitem__" else None
    if index is not None and after.ndim > before.ndim:
        index = index if isinstance(index, tuple) else (index,)
        place = next((place for place, one in enumerate(index) if one is Ellipsis), len(index))
        behind = sum(one is not None for one in index[place + 1 :])
        left = before.ndim - behind - sum(one is not None for one in index[:place])
        index = (*index[:place], *(slice(None),) * left, *index[place + 1 :])
        if all(one is None or isinstance(one, slice) for one in index):
            own = iter(layout)
            return [[] if one is None else next(own) for one in index]
    known, made = [*zip(layout, real_sizes(before), strict=True)], list[list[Factor]]()
    for size in real_sizes(after):
        while size != 1 and known[0][1] == 1:
            known.pop(0)
        made.append(known.pop(0)[0] if known and known[0][1] == size else [])
    return made

"""Which axes are heads: found from what the model does with the output of an attention call.

The output has the axes (..., queries, width). What the model does next tells them apart: the axis that becomes part of
the features, beside the width, is heads; all others are batch: images, texts, windows, frames. Nothing is guessed from
positions or sizes. Where the model mixes the features before any axis has become part of them, nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import name_of

REORDERS = frozenset(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "t", "__get__"))
"""Functions that put the axes of a tensor into another order."""
_KEEPS_ORDER = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"),
        *("contiguous", "clone", "to", "type", "type_as", "float", "half", "bfloat16", "double", "alias"),
        *("_unsafe_view", "_reshape_alias", "stack"),
    )
)
_CUTS = frozenset(
    ("__getitem__", "narrow", "slice", "split", "chunk", "cat", "concat", "tensor_split", "pad", "unbind", "select")
)
_MIXES_LAST = frozenset(("linear", "matmul", "__matmul__", "linalg_matmul", "mm", "addmm"))
_MIXES_CHANNELS = frozenset(("conv1d", "conv2d", "conv3d"))
_SUMS = frozenset(("linear", "matmul", "__matmul__", "__rmatmul__", "linalg_matmul", "bmm", "einsum"))


@dataclass(frozen=True)
class Order:
    """The axes before (queries, width), told apart.

    >>> order = Order((2, 4), (False, True))             # from 8 to 2 images x 4 heads
    >>> order.arranged(torch.zeros(8, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    sizes: tuple[int, ...]
    """The axes, each split into the factors that the model tells apart."""
    are_heads: tuple[bool, ...]
    are_known: bool = True
    """Whether no factor of the queries may be heads too: several heads that share their keys can be further queries."""

    def arranged(self, tensor: Tensor) -> Tensor:
        """(..., ., .) as (batch, heads, ., .)."""
        count = len(self.sizes)
        split = tensor.reshape(*self.sizes, *tensor.shape[-2:])
        batch = [axis for axis in range(count) if not self.are_heads[axis]]
        heads = [axis for axis in range(count) if self.are_heads[axis]]
        return split.permute(*batch, *heads, count, count + 1).reshape(*self.shape, *tensor.shape[-2:])

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(batch, heads)."""
        pairs = list(zip(self.sizes, self.are_heads, strict=True))
        return math.prod(size for size, is_head in pairs if not is_head), math.prod(
            size for size, is_head in pairs if is_head
        )

    @property
    def is_sorted(self) -> bool:
        """Whether all of the batch comes before the heads."""
        return sorted(self.are_heads) == list(self.are_heads)


class Factor:
    """An axis, or a factor of one."""

    def __init__(self, size: int, origins: Sequence[Factor] = ()) -> None:
        self.size = size
        self.origins = origins or (self,)  # what it is a cut or a join of
        self.parts: tuple[Factor, ...] = ()
        self.cut: tuple[list[Factor], int] | None = None
        """The axis of which it is a block, and where that begins there."""

    def split(self, outer: int, inner: int) -> None:
        """Tell two factors apart, of these lengths."""
        kept = () if self.origins == (self,) else self.origins
        self.parts = Factor(outer, kept), Factor(inner, kept)

    def smallest(self) -> list[Factor]:
        """The factors that it has been split into, outermost first; none of an axis of length 1."""
        if self.size == 1:
            return []
        return [factor for part in self.parts for factor in part.smallest()] if self.parts else [self]

    def replaced(self, new: dict[Factor, Factor]) -> Factor:
        """The same with others in place of some of its factors."""
        if self in new or not self.parts:
            return new.get(self, self)
        parts = tuple(part.replaced(new) for part in self.parts)
        made = Factor(math.prod(part.size for part in parts))
        made.parts = parts
        return made


Layout = list[list[Factor]]
_NOTHING = math.factorial(256)
"""In place of an axis of length 0 where lengths are divided: it can be split as any other."""


class Part(NamedTuple):
    """An attention call that is a part of another one, or all of it."""

    output: Output
    numbers: Tensor
    """Which of the axes before (queries, width) of the whole, taken as one, are those of the part."""
    first: int
    """Which of the whole's queries is its first one."""


class Output:
    """The output of an attention call, as the model's functions change its shape.

    Args:
        axes: the axes, or their lengths.
    """

    def __init__(self, axes: Sequence[int | Factor]) -> None:
        self._axes = [axis if isinstance(axis, Factor) else Factor(axis) for axis in axes]
        self.layout: Layout = [[axis] for axis in self._axes]
        """The axes of the output itself, for `follow`."""
        self.order: Order | None = None
        """What is known of its axes."""
        self._without_heads: Order | None = None
        """The same where a convolution took the features of one head, which may still be joined with others."""
        self._are_windows = False
        """Whether an axis was taken for windows, because the model put it together with the queries."""
        self.attended: Any = None
        """What the call must have in common with others to be one attention; None once its map is made."""
        self.parts: list[Part] = []
        """Of several calls that are one attention, each of them."""
        self.whole: Output | None = None
        """Of a call that is a part of such an attention, its output."""
        self.why_apart = ""
        """Why it is not one attention with others that it was joined with."""
        self.steps: Factor | None = None
        """Of calls with a single query each, the axis on which they were joined, which may be heads or queries."""
        self.has_one_sequence = False
        """Whether all of these looked at the same keys and values."""
        self.said: tuple[str | None, bool, bool] | None = None
        """What was said of its map, the first of `Said`; None: there is no map."""

    @property
    def is_open(self) -> bool:
        """Whether it may still become a part of another one."""
        return self.order is None and self.whole is None and self.attended is not None

    @property
    def outermost(self) -> Output:
        """The output itself, or that of the attention which it is a part of."""
        return self if self.whole is None else self.whole.outermost

    def leaves(self) -> tuple[list[Factor], list[Factor], list[Factor]]:
        """The factors of the axes before queries and width, of the queries, and of the width."""
        lead = [leaf for axis in self._axes[:-2] for leaf in axis.smallest()]
        return lead, self._axes[-2].smallest(), self._axes[-1].smallest()

    def settle_steps(self) -> None:
        """Take the axis on which calls with a single query were joined for queries, if it is not heads.

        They are one attention only if they looked at the same keys and values; else each is an attention of its own.
        """
        self.order = self.order or self._without_heads
        lead = self.leaves()[0]
        if self.steps not in lead:
            return
        place = lead.index(self.steps)
        sizes = [leaf.size for leaf in lead]
        order, count, inner = self.order, sizes[place], math.prod(sizes[place + 1 :])
        if order is not None and (len(order.sizes) != len(sizes) or order.are_heads[place]):
            return
        if order is not None:
            left = slice(place), slice(place + 1, None)
            are_heads = order.are_heads[left[0]] + order.are_heads[left[1]]
            order = Order(order.sizes[left[0]] + order.sizes[left[1]], are_heads)
        if self.has_one_sequence:
            self.order, self.steps = order, None
            self._axes = [axis for axis in self._axes if axis is not lead[place]]
            self.parts = [
                Part(
                    part.output, numbers // (inner * count) * inner + numbers % inner, int(numbers[0]) // inner % count
                )
                for part in self.parts
                for numbers in (part.numbers,)
            ]
        elif all(len(part.numbers) * count == math.prod(sizes) for part in self.parts):
            for part in self.parts:
                part.output.order, part.output.whole = order, None
                part.output.why_apart = "each has a single query, and keys and values of its own"

    def settle_experts(self, heads: Any, given: Sequence[int]) -> None:
        """Take experts for heads, where each token has queries for several of them, as in JetMoE.

        The model works on each expert's output by itself, as it does with images. But then there are more rows than the
        module was given tokens, and its own number of heads says that they are heads.

        Args:
            heads: the module's own number of heads, if it has one.
            given: the shape of the tokens that it was given.
        """
        sizes = [axis.size for axis in self._axes]
        if self.order is None or len(sizes) != 4 or sizes[1] != heads or heads == self.order.shape[1]:
            return
        if sizes[0] * sizes[2] == math.prod(given[:-1]) < self.order.shape[0] * sizes[2]:
            self.order = Order((sizes[0], sizes[1]), (False, True))

    def settle_windows(self, given: Iterable[Sequence[int]]) -> None:
        """Take windows for windows only if all of them together have each token once.

        Heads have it as often as there are heads, and some models put these together with the tokens too, for a layer
        that they share.

        Args:
            given: the shapes of what the calls under way were given, the innermost first.
        """
        if not self._are_windows:
            return
        *own, width = (axis.size for axis in self._axes)
        for shape in given:
            if [*shape[:-1]] == own:
                continue  # a module that is handed query and key
            counts = {size: math.prod(shape) // size for size in (shape[1], shape[-1]) if size}  # by the width
            tokens = counts.get(shape[-1], 0) if len(shape) == 3 else counts.get(width, min(counts.values(), default=0))
            if math.prod(own) < 2 * tokens:  # the last windows may be padded
                return
            break
        self.order = None

    def grown(self, new: dict[Factor, Factor], more: Sequence[Factor]) -> Output:
        """An output with other factors in place of some of its own, and with one more axis before the queries."""
        lead, last = [axis.replaced(new) for axis in self._axes[:-2]], self._axes[-2:]
        if more and lead and lead[-1].size == 1:
            lead.pop()
        return Output([*lead, *more, *(axis.replaced(new) for axis in last)])

    def follow(self, func: Any, args: Any, kwargs: Any, tensor: Tensor, layout: Layout, result: Any) -> Layout | None:
        """The axes of what a function made of a tensor with these axes; None if it is followed no further.

        Takes note where the function tells heads from batch.
        """
        name = name_of(func)
        made = layout_of(func, name, args, kwargs, tensor, layout, result)
        if made is not None or self.order is not None:
            return made
        if name in _SUMS and isinstance(result, Tensor) and self._mixes_lead(name, args, kwargs, tensor, layout):
            return layout_of_product(name, args, kwargs, tensor, layout, result)
        self._note(name, args, kwargs, tensor, layout)
        return None

    def _mixes_lead(self, name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout) -> bool:
        """Whether a product sums over windows, heads or queries, such as a second attention whose values these are."""
        operands = (*einsum_operands(args), *kwargs.values()) if name == "einsum" else (*args, *kwargs.values())
        is_layer = any(isinstance(one, Tensor) and one is not tensor and one.ndim < 3 for one in operands)
        summed = {small for axis in summed_axes(name, args, kwargs, tensor) for small in _origins(layout[axis])}
        ends = {small for axis in self._axes[-2 if is_layer else -1 :] for small in axis.smallest()}
        return bool(summed) and self._axes[-1].size > 1 and summed.isdisjoint(ends)

    def _note(self, name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout) -> None:
        place = 1 if name == "addmm" else 0  # behind the bias
        is_first = len(args) > place and args[place] is tensor
        is_linear = is_first and name in _MIXES_LAST and getattr(args[place + 1], "ndim", 2) <= 2
        is_convolution = name in _MIXES_CHANNELS and is_first and len(layout) > 2
        mixed: list[list[Factor]]
        if is_linear:
            mixed = [layout[-1]]
        elif is_convolution:
            mixed = [layout[1]]
        elif name == "einsum":
            mixed = [layout[axis] for axis in summed_axes(name, args, kwargs, tensor)]
        else:
            width = set(self._axes[-1].smallest())
            mixed = [axis for axis in layout if width & _origins(axis)]
        features = set().union(*map(_origins, mixed)) if mixed else set()
        lead = self.leaves()[0]
        are_heads = tuple(factor in features for factor in lead)
        queries = self.leaves()[1]
        are_mixed = {factor in features for factor in queries}
        is_whole = not any(one.cut and one.size == 1 for axis in layout for one in axis)  # and not one of several heads
        places = set[Factor]()
        if is_convolution:  # what it goes over are frames, rows or columns
            places = places.union(*map(_origins, layout[2:]))
        elif features.isdisjoint(queries) and len(layout) > 2:
            # What stands beside the queries are windows that tokens were split into; all may be where images do too.
            images = self._axes[0].smallest()
            beside = [one for one in map(_origins, layout) if not one.isdisjoint(queries)]
            places = places.union(*(one for one in beside if one.isdisjoint(images)))
        is_of_one_head = is_whole and (len(self._axes) != 4 or places.issuperset(self._axes[-3].smallest()))
        order = Order(tuple(factor.size for factor in lead), are_heads, any(are_heads) or len(are_mixed) < 2)
        if any(are_heads) or (is_linear and is_of_one_head):
            self.order = order
            self._are_windows = len(self._axes) == 4 and not any(are_heads) and bool(self._axes[-3].smallest())
        elif is_convolution and is_of_one_head and not features.isdisjoint(self._axes[-1].smallest()):
            self._without_heads = order


def _origins(axis: Iterable[Factor]) -> set[Factor]:
    """The factors of the output's own axes that are in an axis."""
    found = set[Factor]()
    for factor in axis:
        for small in factor.smallest():
            found |= {small} if small.origins == (small,) else _origins(small.origins)
    return found


def is_in(factor: Factor, axis: Iterable[Factor]) -> bool:
    """Whether an axis has a factor in it, or a part of that factor, of length 1 too."""
    parts = {factor, *factor.smallest()}
    return not (parts.isdisjoint(_origins(axis)) and all(parts.isdisjoint(one.origins) for one in axis))


def layout_of(
    func: Any, name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout, result: Any
) -> Layout | None:
    """The axes of what a function made of a tensor with these axes; None where it mixes them, or is not known."""
    if not isinstance(result, Tensor) or name in _MIXES_LAST or name in _MIXES_CHANNELS or name == "einsum":
        return None
    if name in REORDERS and result.ndim == tensor.ndim:
        order = _permutation(func, tensor.ndim, *args[1:], **kwargs)
        return [layout[axis] for axis in order]
    if result.shape == tensor.shape:
        return layout
    if name in _KEEPS_ORDER and result.numel() == tensor.numel():
        return _regrouped(layout, result.shape)
    return _cut(tensor, layout, result) if name in _CUTS else None


def _cut(tensor: Tensor, layout: Layout, result: Tensor) -> Layout | None:
    """The axes of a part of a tensor. An axis of which one place was taken is a factor of length 1 in the last axis."""
    if result.ndim == tensor.ndim:
        made = [
            axis if after == before else [Factor(after, [small for factor in axis for small in factor.smallest()])]
            for axis, before, after in zip(layout, tensor.shape, result.shape, strict=True)
        ]
        changed = [axis for axis, own in enumerate(made) if own is not layout[axis]]
        blocks = [made[axis][0] for axis in changed]
    else:
        shape = [*zip(tensor.shape, tensor.stride(), strict=True)]
        rest = [*zip(result.shape, result.stride(), strict=True)]
        changed = [axis for axis in range(tensor.ndim) if shape[:axis] + shape[axis + 1 :] == rest][:1]
        blocks = [Factor(1)]
        if not changed or changed == [tensor.ndim - 1]:
            return None
        made = [axis for place, axis in enumerate(layout) if place not in changed]
        if tensor.shape[changed[0]] > 1:  # else all of it was taken
            made[-1] = made[-1] + blocks
    if len(changed) == 1 and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        begin = int(result.storage_offset()) - int(tensor.storage_offset())
        blocks[0].cut = layout[changed[0]], begin // max(1, tensor.stride(changed[0]))
    return made


def put_together(layouts: Sequence[Layout], dim: int, is_new: bool) -> Layout | None:
    """The axes of the blocks of one axis, side by side on another; None where they are not all of it, in order.

    Args:
        dim: the axis on which they are joined.
        is_new: whether this is a new one.
    """
    count, blocks = len(layouts), [one for axis in layouts[0] for one in axis if one.cut]
    cuts = [[one.cut for axis in layout for one in axis if one.cut] for layout in layouts]
    for block, (axis, _) in zip(blocks, cuts[0], strict=True):
        starts = [start for several in cuts for other, start in several if other is axis]
        is_all = starts == [*range(0, block.size * count, block.size)] and _length(axis) == block.size * count
        parts = _regrouped([axis], (count, block.size)) if is_all else None
        if parts is not None:
            outer, inner = parts
            made = [[new for one in own for new in (inner if one is block else [one])] for own in layouts[0]]
            joined = [outer] if is_new else [outer + made.pop(dim)]
            return made[:dim] + joined + made[dim:]
    return None


def _length(axis: Iterable[Factor]) -> int:
    return math.prod(factor.size for factor in axis)


def _regrouped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The axes after a change of shape that leaves all numbers in their order; None if they do not fit it."""
    factors = [small for axis in layout for factor in axis for small in factor.smallest()]
    left = [(factor, factor.size or _NOTHING) for factor in factors]
    sizes = [*shape]
    if 0 in sizes:  # which fits anything: the other axes tell what is in it
        more, rest = math.prod(length for _, length in left), math.prod(size for size in sizes if size)
        if sizes.count(0) > 1 or more % rest:
            return None
        sizes[sizes.index(0)] = more // rest
    made: Layout = []
    for size, own in zip(sizes, shape, strict=True):
        axis: list[Factor] = []
        while size != 1:
            if not left:
                return None
            factor, length = left.pop(0)
            if size % length:
                if length % size:
                    return None
                inner = length // size
                # Of a factor of length 0 that of one of the two is.
                factor.split(size if own or factor.size else 0, 0 if own and not factor.size else inner)
                factor, rest_of_it = factor.parts
                left.insert(0, (rest_of_it, inner))
                length = size
            axis.append(factor)
            size //= length
        made.append(axis)
    return made


def _permutation(func: Any, axes: int, *args: Any, **kwargs: Any) -> list[int]:
    """Where the axes of a function's result come from, by asking it about a tensor with axes of different lengths."""
    try:
        return _cached_permutation(func, axes, args, tuple(kwargs.items()))
    except TypeError:  # lists of axes have no hash
        return _cached_permutation.__wrapped__(func, axes, args, tuple(kwargs.items()))


@lru_cache(maxsize=1024)
def _cached_permutation(func: Any, axes: int, args: Any, kwargs: Any) -> list[int]:
    sizes = range(2, axes + 2)
    probe = torch.empty(*sizes, device="meta")
    return [size - 2 for size in func(probe, *args, **dict(kwargs)).shape]


def summed_axes(name: str, args: Any, kwargs: Any, tensor: Tensor) -> list[int]:
    """Which axes of one of its operands a product sums over."""
    if name == "einsum":
        own, _, output = _labels_of(args, tensor)
        return [axis for axis, label in enumerate(own) if label not in output]
    is_last = tensor.ndim == 1 or name == "linear" or _is_left(name, args, kwargs, tensor)
    return [-1 if is_last else -2]


def layout_of_product(
    name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout, result: Tensor
) -> Layout | None:
    """The axes of a product. The axis that takes the place of the one that is summed over stands for it."""
    [*summed] = summed_axes(name, args, kwargs, tensor)
    mixed = [small for axis in summed for factor in layout[axis] for small in factor.smallest()]
    if name == "einsum":
        own, _, output = _labels_of(args, tensor)
        fresh = [label for label in output if label not in own]
        stands_for = mixed if len(fresh) == 1 else []
        return [
            [Factor(size, stands_for)] if label in fresh else layout[own.index(label)]
            for label, size in zip(output, result.shape, strict=True)
        ]
    if result.ndim != tensor.ndim or (name == "linear" and not _is_left(name, args, kwargs, tensor)):
        return None
    made = [*layout]
    made[summed[0]] = [Factor(result.shape[summed[0]], mixed)]
    return made


def _is_left(name: str, args: Any, kwargs: Any, tensor: Tensor) -> bool:
    """Whether a tensor is the left operand of a matrix product, (..., rows, summed)."""
    operands = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
    operands = operands[1:] if name in ("addmm", "baddbmm") else operands
    return (operands[-1] if name == "__rmatmul__" else operands[0]) is tensor


def _labels_of(args: Any, tensor: Tensor) -> tuple[str, list[str], str]:
    """The letters of an operand of an einsum, of all its operands, and of its output."""
    operands = einsum_operands(args)
    place = next((place for place, operand in enumerate(operands) if operand is tensor), 0)
    inputs, output = einsum_labels(args[0], [operand.ndim for operand in operands])
    return inputs[place], inputs, output


def einsum_operands(args: Any) -> list[Tensor]:
    """The operands among the arguments of an einsum, which takes them one by one or as a list."""
    return list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])


def einsum_labels(equation: str, axes: Sequence[int]) -> tuple[list[str], str]:
    """A letter for each axis of the operands of an einsum, and of its output.

    >>> einsum_labels("...ij,...jd->...id", (4, 4))
    (['01ij', '01jd'], '01id')
    """
    left, _, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "->" not in equation:
        letters = [letter for letter in left if letter.isalpha()]
        output = "..." * ("..." in left) + "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
    rest = max((count - len(term) + 3 for term, count in zip(terms, axes, strict=True) if "..." in term), default=0)
    dots = "0123456789"[:rest]
    full = [
        term.replace("...", dots[rest - (count - len(term) + 3) :]) if "..." in term else term
        for term, count in zip(terms, axes, strict=True)
    ]
    return full, output.replace("...", dots)

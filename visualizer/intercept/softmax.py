"""Attention without a fused kernel: scores become weights, which a matrix product takes.

The scores come from a matrix product. They may change in any way that leaves each in its place, and so may the weights
before they are multiplied with the values: masked, mixed, subtracted. The map is what is multiplied, without dropout.
Where no softmax is seen the numbers tell: weights are not negative. Rows that sum to one are as good as a softmax's;
others are those of a sigmoid, a relu and the like.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tensors import is_plain_torch
from .axes import (
    REORDERS,
    Factor,
    Layout,
    Output,
    einsum_labels,
    einsum_operands,
    is_in,
    layout_of,
    layout_of_product,
    summed_axes,
)
from .calls import name_of
from .joins import Joins
from .lineage import Lineage

_PRODUCTS = frozenset(("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm"))
_MAKES_SCORES = frozenset(  # besides the products
    ("cdist", "inner", "tensordot", "addbmm", "cosine_similarity", "pairwise_distance")
)
_PUTS = frozenset(("cat", "concat", "__setitem__", "copy_", "index_copy_", "index_put_", "slice_scatter", "pad"))
"""Functions that put a tensor into a larger one."""
_CUTS = frozenset(
    ("__getitem__", "narrow", "slice", "split", "chunk", "unbind", "select", "index_select", "gather", "take_along_dim")
)
"""Functions that take some places of a tensor."""
_SOFTMAXES = frozenset(("softmax", "_softmax"))
_DROPOUTS = frozenset(("dropout", "native_dropout", "dropout_", "feature_dropout", "alpha_dropout"))
_ENDS = frozenset(("layer_norm", "group_norm", "batch_norm", "rms_norm", "conv1d", "conv3d", "embedding", "bilinear"))
"""After these functions a tensor is no longer scores or weights, even if its shape is the same."""
OUTER = frozenset(("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__"))
_BENDS = frozenset(
    (
        *("tanh", "tanh_", "relu", "relu_", "leaky_relu", "gelu", "elu", "silu", "selu", "sigmoid", "softplus", "exp"),
        *("abs", "square", "pow", "__pow__", "norm", "linalg_norm", "linalg_vector_norm"),
    )
)
"""Functions that are not linear."""
_SAME_NUMBERS = frozenset(
    (
        *("to", "type", "type_as", "float", "half", "bfloat16", "double", "clone", "contiguous", "alias", "view"),
        *("reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "nan_to_num", "view_as", "reshape_as"),
        *_DROPOUTS,
    )
)


def may_begin(name: str) -> bool:
    """Whether a function of that name can be the first step of an attention: the scores, query times key.

    A softmax of something else counts where it is mixed with one of scores.
    """
    return name in _PRODUCTS or name in _MAKES_SCORES or name in _SOFTMAXES


def is_of_activations(args: Any, kwargs: Any) -> bool:
    """Whether F.linear is given a second tensor that is no parameter, such as keys: then it is a product of both."""
    second = args[1] if len(args) > 1 else kwargs.get("weight")
    return type(second) is not nn.Parameter and not _is_parameter(second)  # the first is quicker, and nearly always so


def makes_pairs(args: Any, kwargs: Any) -> bool:
    """Whether a function broadcasts two tensors against each other, each query against each key.

    That is (..., queries, 1, features) and (..., 1, keys, features), or without features. The first of four axes or
    more is the batch, which a mask has alone, and a bias has not.
    """
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return False
    one, other = args[0].shape, args[1].shape
    if one == other or len(one) != len(other) or not args[0].is_floating_point():
        return False
    if len(one) > 3 and one[0] != other[0]:
        return False
    differ = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
    return len(differ) == 2 and 1 in differ[0] and 1 in differ[1] and differ[0].index(1) != differ[1].index(1)


def _is_parameter(tensor: Any) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(getattr(tensor, "_base", None), nn.Parameter)


def _is_product(name: str, args: Any, kwargs: Any) -> bool:
    return name in _PRODUCTS or (name == "linear" and is_of_activations(args, kwargs))


class Softmax:
    """The output of a softmax over scores, or of what stands in its place."""

    def __init__(self, weights: Tensor, is_normalised: bool = True, is_of_scores: bool = True, axis: int = -1) -> None:
        self.is_normalised = is_normalised
        """Whether it sums to one over the keys."""
        self.is_over_last = axis in (-1, weights.ndim - 1)
        """Whether these are the last axis."""
        self.is_of_scores = is_of_scores
        """Whether it is known to be of scores. Others count where they are mixed with one that is, as in ConViT."""
        self.is_changed = False
        """Whether it, or what was made of it, was changed in place."""
        self.keys = weights.shape[axis]
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
class _Weights:
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
class _View:
    """A view of some of the weights: writing to it changes the weights."""

    whole: _Weights


@dataclass(frozen=True)
class Product:
    """A matrix product of weights with values, (..., queries, keys) and (..., keys, width)."""

    output: Tensor
    """(..., queries, width)."""
    returned: Tensor
    """What the product returned: the output, with its axes perhaps in another order."""
    places: tuple[int | None, ...]
    """`places[i]` is the axis of the output that is axis i of `returned`; None: it is one more of the width."""
    weights: Tensor
    """What is multiplied, without dropout."""
    made_of: Tensor
    """What was multiplied itself."""
    values: Tensor
    source: Tensor
    """The tensor that the gradient of the weights arrives at."""
    order: tuple[int, ...]
    """Which axis of that tensor each axis of the weights is."""
    softmaxes: tuple[Softmax, ...]
    is_softmax: bool
    """Whether the weights are known to be what one softmax made; else their numbers tell."""
    has_dropout: bool
    is_own: bool
    """Whether the weights are a copy that nothing else will change."""


@dataclass(frozen=True)
class _Scores:
    """A tensor that comes from a matrix product, and may be scores."""

    is_outer: bool = False
    """Whether the product summed over nothing, as where positions are multiplied with frequencies."""

    def are_after(self, name: str) -> bool:
        """Whether a function may leave them scores; the cosines of angles are none."""
        return name not in _ENDS and not (self.is_outer and name in ("cos", "sin"))


@dataclass(frozen=True)
class _Pairs:
    """A tensor made of each query with each key, (..., queries, keys, features), or without features.

    As in additive attention, it becomes scores where a function that is not linear was applied and the features are
    made one number, or one a head. Without such a function a softmax over the keys would be the same for all queries.
    """

    has_features: bool
    is_bent: bool

    def made(self, name: str, before: Tensor, after: Tensor) -> object:
        """What is known of what a function made of it; None: nothing."""
        is_bent = self.is_bent or name in _BENDS
        if not self.has_features:
            return (_Scores() if is_bent else self) if after.shape == before.shape else None
        is_layer = name == "linear" and after.shape[-1] > 1
        if after.shape == before.shape or (is_layer and after.shape[:-1] == before.shape[:-1]):
            return _Pairs(True, is_bent)
        is_reduced = after.shape in (before.shape[:-1], (*before.shape[:-1], 1))
        if name in ("permute", "transpose", "movedim", "swapaxes") and not is_reduced:
            if after.stride(-1) == before.stride(-1):
                return self
            is_reduced = True  # the features are heads
        return _Scores() if is_bent and is_reduced else None


_SUMS_TO_ONE = 0.02  # rounding of a whole row in bfloat16 stays below it


class Tracing:
    """Follows scores, weights and the outputs of attention calls from function to function, in one thread."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        """The tensors that are followed, and what they are."""
        self.are_keyless = False
        """Whether the last product took weights that a softmax made of something else than scores."""
        self._joins = Joins()

    def clear(self) -> None:
        """Forget all."""
        self.lineage.clear()
        self._joins.clear()

    def follow_output(self, tensor: Tensor, output: Output, layout: Any = None) -> None:
        """Find out what the model does with the axes of an attention call's output."""
        known = next((origin for _, origin in self.lineage.known_in((tensor,)) if isinstance(origin, tuple)), ())
        others = [pair for pair in known if pair[0] is not output]  # a later attention may work on an earlier one's
        self.lineage.follow(tensor, (*others, (output, output.layout if layout is None else layout)))

    def before(self, func: Any, args: Any, kwargs: Any) -> Callable[[Any], Product | None] | None:
        """Look at the arguments of a function that is about to run.

        Returns what to call with its result, which finds out what that is, and returns the product of weights with
        values if it is one. None if the result is of no interest.
        """
        name = name_of(func)
        known = list(self.lineage.known_in([*args, *kwargs.values()]))
        begins = name in _MAKES_SCORES or _is_product(name, args, kwargs)
        begins |= name in OUTER and makes_pairs(args, kwargs)
        if not known and not begins and name not in _SOFTMAXES:
            return None
        if known and not begins and all(isinstance(origin, tuple) for _, origin in known):
            return lambda result: self._follow_all(func, args, kwargs, known, result)
        weights = [(tensor, origin) for tensor, origin in known if isinstance(origin, _Weights)]
        changed = args[0] if args and _is_in_place(name, args, kwargs) else None
        if changed is not None:
            self._prepare_change(name, changed, known)
        undropped = None
        is_dropped_scores = name in _DROPOUTS and not weights and isinstance(known[0][1], _Scores)
        if is_dropped_scores and _drops(args, kwargs) and is_plain_torch(torch):
            weights = [(known[0][0], _weights_of_scores(known[0][0]))]
        if weights and name in _DROPOUTS and _drops(args, kwargs):
            tensor, origin = weights[0]
            undropped = tensor if origin.without_dropout is None else origin.without_dropout
            if changed is not None:
                undropped = undropped.detach().clone()
        return lambda result: self._after(func, name, args, kwargs, known, weights, changed, undropped, result)

    def after_scripted(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Find out what a scripted function made, of which nothing but its arguments and its result is seen.

        A result of another shape than every argument comes from a product in it. Its numbers tell whether a softmax
        was there too.
        """
        if not isinstance(result, Tensor) or result.ndim < 2 or not result.is_floating_point():
            return
        known = list(self.lineage.known_in([*args, *kwargs.values()]))
        weights = [(tensor, origin) for tensor, origin in known if isinstance(origin, _Weights)]
        if weights:
            self._carry_weights(function, "", args, kwargs, result, weights, None)
            return
        given = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        if any(isinstance(origin, _Scores) for _, origin in known) or all(item.shape != result.shape for item in given):
            made = _weights_of_scores(result) if is_plain_torch(torch) and not bool((result < 0).any()) else None
            is_softmax = made is not None and made.softmaxes[0].is_normalised
            self.lineage.follow(result, made if is_softmax else _Scores())

    def _after(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        known: Sequence[tuple[Tensor, Any]],
        weights: Sequence[tuple[Tensor, _Weights]],
        changed: Tensor | None,
        undropped: Tensor | None,
        result: Any,
    ) -> Product | None:
        self._follow_all(func, args, kwargs, known, result)
        made = result if changed is None else changed
        is_product = _is_product(name, args, kwargs)
        if is_product:
            of_scores = [one for one in weights if any(softmax.is_of_scores for softmax in one[1].softmaxes)]
            self.are_keyless = len(of_scores) < len(weights)
            weights = of_scores
        is_one = len(weights) < 2 and (name != "einsum" or len(einsum_operands(args)) > 1)
        if is_product and is_one and not (weights and _mixes_heads(name, args, kwargs, *weights[0])):
            if not weights:
                weights = _scores_as_weights(name, args, known)
            if weights:
                return self._product(name, args, kwargs, result, weights)
            self.lineage.follow(result, _Scores(_is_outer(name, args)))
        elif name in _MAKES_SCORES:
            self.lineage.follow(result, _Scores())
        elif name in _SOFTMAXES and result.ndim >= 2:
            is_of_scores = any(isinstance(origin, (_Scores, _Weights)) for _, origin in known)
            axis = kwargs.get("dim", args[1] if len(args) > 1 else -1) % result.ndim
            softmax = Softmax(result, is_of_scores=is_of_scores, axis=axis)
            if softmax.is_over_last or is_of_scores:
                self.lineage.follow(result, _new_weights(result, softmax, axis))
        elif weights:
            self._carry_weights(func, name, args, kwargs, made, weights, undropped)
        elif name in OUTER and not known and makes_pairs(args, kwargs):
            has_features = args[0].shape[-1] == args[1].shape[-1]
            if has_features or "mul" not in name:
                self.lineage.follow(result, _Pairs(has_features, "mul" in name))
        else:
            for one in made if isinstance(made, (list, tuple)) else (made,):
                if isinstance(one, Tensor) and one.ndim > 1 and one.is_floating_point():
                    self._carry_scores(name, known, one)
        return None

    def _carry_scores(self, name: str, known: Sequence[tuple[Tensor, Any]], result: Tensor) -> None:
        """Follow what a function made of scores, or of what may become scores."""
        made: object = None
        for tensor, origin in known:
            if isinstance(origin, _Scores) and origin.are_after(name) and _has_same_places(name, tensor, result):
                made = origin
            elif isinstance(origin, _Pairs) and made is None:  # else they are added to scores, as a bias
                made = origin.made(name, tensor, result)
        if made is not None or any(isinstance(origin, _Pairs) for _, origin in known):
            self.lineage.follow(result, made)

    def _follow_all(self, func: Any, args: Any, kwargs: Any, known: Sequence[tuple[Tensor, Any]], result: Any) -> None:
        latest = [(tensor, origin[-1] if isinstance(origin, tuple) else origin) for tensor, origin in known]
        joined = self._joins.joined(name_of(func), args, kwargs, latest, result)
        if joined is not None:
            self.follow_output(*joined)
            return
        for tensor, origin in known:
            if isinstance(origin, tuple):
                for output, layout in origin:
                    self._follow_on(func, args, kwargs, tensor, output, layout, result)

    def _follow_on(
        self, func: Any, args: Any, kwargs: Any, tensor: Tensor, output: Output, layout: Layout, result: Any
    ) -> None:
        for one in result if isinstance(result, (list, tuple)) else (result,):
            made = output.follow(func, args, kwargs, tensor, layout, one) if isinstance(one, Tensor) else None
            if made is not None:
                self.follow_output(one, output, made)
        if output.order is not None:  # found: fewer functions to look at
            for number, (reference, other) in list(self.lineage.items()):
                if isinstance(other, tuple) and any(one is output for one, _ in other):
                    left = tuple(pair for pair in other if pair[0] is not output)
                    if left:
                        self.lineage[number] = reference, left
                    else:
                        del self.lineage[number]

    def _prepare_change(self, name: str, changed: Tensor, known: Iterable[tuple[Tensor, Any]]) -> None:
        """Save what a function is about to change in place, and mark what is no longer a softmax."""
        for tensor, origin in known:
            if tensor is not changed:
                continue
            whole = origin.whole if isinstance(origin, _View) else origin
            if isinstance(whole, _Weights):
                for softmax in whole.softmaxes:
                    softmax.save()
                    softmax.is_changed |= name not in _DROPOUTS
                if whole is not origin:  # a change through a view cannot be repeated on the copy without dropout
                    whole.without_dropout = None

    def _carry_weights(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        result: Any,
        weights: Sequence[tuple[Tensor, _Weights]],
        before: Tensor | None,
    ) -> None:
        """Follow what a function made of weights, if they may still be multiplied with values."""
        tensor, origin = weights[0]
        if name == "native_dropout":
            result = result[0]
        if isinstance(result, (list, tuple)):  # split, chunk, unbind
            for one in result:
                self._carry_weights(func, name, args, kwargs, one, weights, before)
            return
        if not isinstance(result, Tensor) or result.ndim < 2 or not result.is_floating_point():
            return
        if name in _ENDS and not _normalises_heads(name, args, kwargs, origin, result):
            return
        if not any(_has_same_places(name, one, result) for one, _ in weights):
            if result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                self.lineage.follow(result, _View(origin))
            return
        softmaxes = tuple(dict.fromkeys(softmax for _, item in weights for softmax in item.softmaxes))
        for softmax in softmaxes:
            softmax.hold()
        is_cut = name in ("__getitem__", "narrow", "slice") and _is_without_sink(tensor, result)
        keeps = len(weights) == 1 and (
            (name in _SAME_NUMBERS and result.shape[-1] == tensor.shape[-1])
            or is_cut
            or (name in _CUTS and result.shape[-1] == tensor.shape[-1] and result.stride(-1) == tensor.stride(-1))
            or (name in REORDERS and origin.layout is not None)
        )
        made = _Weights(softmaxes, keeps and origin.is_softmax, pair=origin.pair)
        if origin.layout is not None:
            made.layout = _layout_of_weights(func, name, args, kwargs, tensor, origin.layout, result)
        if before is not None:
            made.without_dropout = before.detach()
            made.before_dropout = tensor if origin.before_dropout is None else origin.before_dropout
            if result is tensor:
                made.before_dropout = None
        elif any(item.without_dropout is not None for _, item in weights):
            made.without_dropout = _without_dropout(func, args, kwargs, weights, result is tensor)
            made.before_dropout = origin.before_dropout
        self.lineage.follow(result, made)

    def _product(
        self, name: str, args: Any, kwargs: Any, result: Any, weights: Sequence[tuple[Tensor, _Weights]]
    ) -> Product | None:
        tensor, origin = weights[0]
        operands = _operands(name, args, kwargs, tensor, result, origin)
        if operands is None:
            if any(softmax.maps for softmax in origin.softmaxes):
                return None
            raise ValueError(f"einsum {args[0]!r} is no product of (queries, keys) with (keys, width)")
        taken = [softmax.take(tensor) for softmax in origin.softmaxes]
        if not any(taken):
            return None
        shown = tensor if origin.without_dropout is None else origin.without_dropout
        order, values, output, places = operands
        source = tensor if origin.without_dropout is None else origin.before_dropout
        return Product(
            output,
            result,
            places,
            shown.permute(order),
            tensor,
            values,
            tensor if source is None else source,
            order,
            tuple(softmax for softmax in origin.softmaxes if softmax.is_normalised and softmax.is_over_last),
            origin.is_over(order[-1]) and not any(one.is_changed or not one.is_normalised for one in origin.softmaxes),
            origin.without_dropout is not None,
            origin.without_dropout is not None and origin.without_dropout is not source,
        )


def _new_weights(weights: Tensor, softmax: Softmax, axis: int = -1) -> _Weights:
    """Weights that a softmax made over one of their axes, which is that of the keys."""
    layout = [[Factor(size)] for size in weights.shape]
    last = weights.ndim - 1
    queries = {last: [last - 1], last - 1: [last]}.get(axis % weights.ndim, [])
    return _Weights((softmax,), layout=layout, pair=tuple(layout[one][0] for one in (axis, *queries)))


def _mixes_heads(name: str, args: Any, kwargs: Any, weights: Tensor, origin: _Weights) -> bool:
    """Whether a product sums over neither queries nor keys of its weights: what comes of it is weights again."""
    return not any(origin.in_pair(axis) for axis in summed_axes(name, args, kwargs, weights))


def _normalises_heads(name: str, args: Any, kwargs: Any, origin: _Weights, result: Tensor) -> bool:
    """Whether a layer brings the heads of weights to one scale, at each pair of query and key, as in DeepViT."""
    if origin.layout is None or len(origin.layout) != result.ndim:
        return False
    if name in ("layer_norm", "rms_norm"):
        normalised = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return not any(map(origin.in_pair, range(result.ndim - len(normalised), result.ndim)))
    return name in ("batch_norm", "group_norm") and not origin.in_pair(1)


def _layout_of_weights(
    func: Any, name: str, args: Any, kwargs: Any, tensor: Tensor, layout: Layout, result: Tensor
) -> Layout | None:
    """The axes of what a function made of weights with these axes; None: they are not known."""
    if name == "linear" or name in _PRODUCTS:
        return layout_of_product(name, args, kwargs, tensor, layout, result)
    if name == "conv2d" and len(layout) == result.ndim == 4:
        return [layout[0], [Factor(result.shape[1])], *layout[2:]]
    return layout_of(func, name, args, kwargs, tensor, layout, result)


def _is_outer(name: str, args: Any) -> bool:
    """Whether a product sums over nothing, or over an axis of length 1."""
    if name == "einsum":
        labels, output = einsum_labels(args[0], [operand.ndim for operand in einsum_operands(args)])
        return all(label in output for own in labels for label in own)
    return name in ("matmul", "__matmul__", "bmm", "mm") and bool(args) and args[0].shape[-1] == 1


def _weights_of_scores(scores: Tensor) -> _Weights:
    """Scores that are used as weights, though no softmax was seen."""
    numbers = scores.detach()
    sums = numbers.sum(-1, dtype=torch.promote_types(numbers.dtype, torch.float32))
    is_normalised = bool(((sums - 1).abs() < _SUMS_TO_ONE).logical_or(sums == 0).all()) and bool(sums.any())
    return _new_weights(scores, Softmax(scores, is_normalised))


def _scores_as_weights(name: str, args: Any, known: Sequence[tuple[Tensor, Any]]) -> list[tuple[Tensor, _Weights]]:
    """The scores that a product takes as its weights: its first operand, of which no number is negative.

    Where linear attention multiplies key and value first, what comes of it is the second operand, or has negative ones.
    A product with a parameter is a layer.
    """
    if name == "linear":  # its second operand may be a weight that was computed, as by a weight norm
        return []
    found = [tensor for tensor, origin in known if isinstance(origin, _Scores)]
    operands = args[1:] if name in ("einsum", "baddbmm") else args[::-1] if name == "__rmatmul__" else args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if len(found) != 1 or len(operands) != 2 or not is_plain_torch(torch):
        return []
    [scores], (first, second) = found, operands
    if (
        first is not scores
        or _is_parameter(second)
        or scores.ndim < 2
        or not scores.numel()
        or not scores.is_floating_point()
    ):
        return []
    if name == "einsum":
        order = _einsum_order(args, scores)
        if order is None or order.weights != (*range(scores.ndim),):
            return []
    return [] if bool((scores.detach() < 0).any()) else [(scores, _weights_of_scores(scores))]


def _is_in_place(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a function changes its first argument, or the one it is given as out=."""
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")
        or bool(kwargs.get("inplace") or (len(args) == 4 and args[3] is True))
        or kwargs.get("out") is not None
    )


def _drops(args: Any, kwargs: Any) -> bool:
    """Whether a dropout is on: F.dropout(input, p=0.5, training=True, inplace=False)."""
    share = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    is_training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(share) and bool(is_training)


def _has_same_places(name: str, before: Tensor, after: Tensor) -> bool:
    """Whether a function's result may have a number for each pair of query and key, as its argument has."""
    if name in _CUTS and after.ndim == before.ndim:
        return True
    if name in _PUTS and after.ndim == before.ndim and after.numel() > before.numel():
        return True
    if name in ("linear", "conv2d"):  # talking heads, (batch, queries, keys, heads) or (batch, heads, queries, keys)
        return after.ndim == 4 and after.numel() // after.shape[-1 if name == "linear" else 1] == (
            before.numel() // before.shape[-1 if name == "linear" else 1]
        )
    if after.numel() == before.numel() or after.shape[-2:] == before.shape[-2:]:
        return True
    return after.shape[:-1] == before.shape[:-1] and after.shape[-1] > 1  # fewer keys, or one more: an attention sink


def _is_without_sink(whole: Tensor, part: Tensor) -> bool:
    """Whether a part is the whole, perhaps without an attention sink behind the keys.

    More than one key is no sink: in Longformer the softmax goes over keys near by and keys of all, and each of the two
    parts is multiplied with values of its own.
    """
    is_near = part.shape[-1] >= whole.shape[-1] - 1
    return is_near and part.shape[:-1] == whole.shape[:-1] and part.data_ptr() == whole.data_ptr()


def _without_dropout(
    func: Any, args: Any, kwargs: Any, weights: Sequence[tuple[Tensor, _Weights]], is_in_place: bool
) -> Tensor:
    """What a function would have made if nothing had been dropped before."""
    instead = {id(tensor): item.without_dropout for tensor, item in weights if item.without_dropout is not None}
    first = instead.get(id(args[0]))
    if is_in_place and first is not None:
        instead[id(args[0])] = first = first.clone()

    def exchanged(item: Any) -> Any:
        if isinstance(item, (list, tuple)):
            return type(item)(map(exchanged, item))
        return instead.get(id(item), item)

    with torch.no_grad():
        made = func(*map(exchanged, args), **{key: exchanged(item) for key, item in kwargs.items()})
    changed: Tensor = first if is_in_place and first is not None else made
    return changed.detach()


def _operands(
    name: str, args: Any, kwargs: Any, weights: Tensor, result: Tensor, origin: _Weights
) -> tuple[tuple[int, ...], Tensor, Tensor, tuple[int | None, ...]] | None:
    """The order in which the axes of the weights are (..., queries, keys), the values, the output, `Product.places`.

    None for an einsum that does something else with the weights.
    """
    if name == "einsum":
        order = _einsum_order(args, weights, origin)
        if order is None:
            return None
        values = next(operand for operand in einsum_operands(args) if operand is not weights)
        values = values.permute([axis for axis in order.values if axis is not None])
        lead = weights.ndim - 2
        for place in (place for place, axis in enumerate(order.values) if axis is None):
            values = values.unsqueeze(place)
        return (
            order.weights,
            values.flatten(lead + 1),
            result.permute(order.output).flatten(lead + 1),
            order.places,
        )
    operands = [item for item in [*args, *kwargs.values()] if isinstance(item, Tensor)]
    left, right = operands[-2:] if name == "baddbmm" else operands[:2]
    if name == "__rmatmul__":
        left, right = right, left
    output = result - operands[0] if name == "baddbmm" else result
    if name == "linear" and len(operands) > 2:
        output = result - operands[2]  # the bias
    own, axes = range(weights.ndim), range(result.ndim)
    if left is weights:
        return (*own,), right.mT if name == "linear" else right, output, (*axes,)
    turned = (*axes[:-2], axes[-1], axes[-2])
    if name == "linear":
        return (*own,), left.mT, output.mT, turned
    return (*own[:-2], own[-1], own[-2]), left.mT, output.mT, turned


class _EinsumOrder(NamedTuple):
    """The axes of an einsum of weights and values: which ones are (..., queries, keys), (..., keys, width)."""

    weights: tuple[int, ...]
    values: tuple[int | None, ...]
    """What the weights have not is width, which may be several axes, such as the rows that share a map. None: the
    values are the same for all of that axis, such as heads that share them."""
    output: tuple[int, ...]
    places: tuple[int | None, ...]
    """See `Product.places`: the last axis of several of the width is that of the output."""


def _einsum_order(args: Any, tensor: Tensor, origin: _Weights | None = None) -> _EinsumOrder | None:
    """How an einsum multiplies weights with values; None if it does something else.

    Args:
        origin: tells the axis of the queries, where values that several heads share have neither.
    """
    operands = einsum_operands(args)
    if len(operands) != 2:
        return None
    place = 0 if operands[0] is tensor else 1
    labels, out = einsum_labels(args[0], [operand.ndim for operand in operands])
    weights, values = labels[place], labels[1 - place]
    keys = [label for label in weights if label in values and label not in out]
    queries = [label for label in weights if label in out and label not in values]
    if len(queries) > 1 and origin is not None and origin.layout is not None:
        pair = origin.pair
        queries = [label for label in queries if len(pair) > 1 and is_in(pair[1], origin.layout[weights.index(label)])]
    queries = queries[-1:]
    lead = [label for label in out if label in weights and label not in queries]
    width = [label for label in out if label in values and label not in weights]
    if len(keys) != 1 or not queries or not width or len(weights) != len(lead) + 2:
        return None
    if len(values) != sum(label in values for label in lead) + 1 + len(width):
        return None
    output = [*lead, *queries, width[-1]]
    return _EinsumOrder(
        tuple(weights.index(label) for label in (*lead, *queries, *keys)),
        tuple(values.index(label) if label in values else None for label in (*lead, *keys, *width)),
        tuple(out.index(label) for label in (*lead, *queries, *width)),
        tuple(output.index(label) if label in output else None for label in out),
    )

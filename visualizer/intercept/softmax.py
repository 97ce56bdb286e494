"""Attention without a fused kernel: scores become weights, which are multiplied with values.

The scores come from a matrix product, or from another function that makes one number of each query and key. They may
change in any way that leaves each in its place, and so may the weights before they are multiplied with the values:
masked, mixed, subtracted. The map is what is multiplied, without dropout. `weighing` judges products that are none by
name.
Where no softmax is seen the numbers tell: weights are not negative. Rows that sum to one are as good as a softmax's;
others are those of a sigmoid, a relu and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tensors import is_plain_torch
from .axes import (
    REORDERS,
    Layout,
    Output,
    einsum_labels,
    einsum_operands,
    is_in,
    summed_axes,
)
from .calls import name_of
from .contractions import (
    CONTRACTS,
    EXPANDS,
    MULTIPLIES,
    Terms,
    has_strides,
    is_parameter,
    makes_row,
    multiplied,
    operands_of,
    sides_of,
    terms_of,
)
from .emptiness import EmptyRows
from .joins import Joins
from .lineage import Lineage
from .weighing import normalised, order_of_terms
from .weights import (
    ENDS,
    PRODUCTS,
    SUMS_TO_ONE,
    Pairs,
    Row,
    Scores,
    Softmax,
    Weights,
    layout_of_weights,
    new_weights,
    only_adds_axes,
)

_MAKES_SCORES = frozenset(  # besides the products
    (*CONTRACTS, "cdist", "addbmm", "cosine_similarity", "pairwise_distance")
)
_PUTS = frozenset(("cat", "concat", "__setitem__", "copy_", "index_copy_", "index_put_", "slice_scatter", "pad"))
"""Functions that put a tensor into a larger one."""
_CUTS = frozenset(
    ("__getitem__", "narrow", "slice", "split", "chunk", "unbind", "select", "index_select", "gather", "take_along_dim")
)
"""Functions that take some places of a tensor."""
_SOFTMAXES = frozenset(("softmax", "_softmax"))
_DROPOUTS = frozenset(("dropout", "native_dropout", "dropout_", "feature_dropout", "alpha_dropout"))
_OF_SEVERAL = frozenset(("linalg_multi_dot", "chain_matmul"))
"""Functions that multiply more than two matrices, and return none of the products between them."""
OUTER = frozenset(("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", *MULTIPLIES))
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
    return name in PRODUCTS or name in _MAKES_SCORES or name in _SOFTMAXES


def is_of_activations(args: Any, kwargs: Any) -> bool:
    """Whether F.linear is given a second tensor that is no parameter, such as keys: then it is a product of both."""
    second = args[1] if len(args) > 1 else kwargs.get("weight")
    return type(second) is not nn.Parameter and not is_parameter(second)  # the first is quicker, and nearly always so


def adds_product(args: Any, kwargs: Any) -> bool:
    """Whether torch.addmm(bias, one, other) multiplies two tensors that are no parameters: else it is a layer."""
    second = args[2] if len(args) > 2 else kwargs.get("mat2")
    if type(second) is nn.Parameter:
        return False
    return not any(map(is_parameter, operands_of("addmm", args, kwargs)))


def is_of_pairs(args: Any, kwargs: Any) -> bool:
    """Whether F.bilinear makes one number of each two vectors, as of query and key, and no classes."""
    weight = args[2] if len(args) > 2 else kwargs.get("weight")
    return isinstance(weight, Tensor) and weight.ndim == 3 and len(weight) == 1


def multiplies_pairs(args: Any, kwargs: Any) -> bool:
    """Whether a product broadcasts two tensors against each other: each query or a single one, and each key."""
    if len(args) < 2 or not isinstance(args[1], Tensor):
        return False
    return makes_pairs(args, kwargs) or makes_row(args)


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


def _is_product(name: str, args: Any, kwargs: Any) -> bool:
    if name in PRODUCTS:
        return True
    return (name == "linear" and is_of_activations(args, kwargs)) or (name == "addmm" and adds_product(args, kwargs))


@dataclass(frozen=True)
class _View:
    """A view of some of the weights: writing to it changes the weights."""

    whole: Weights


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
    """Those that may be maps of their own."""
    is_softmax: bool
    """Whether the weights are known to be what one softmax made; else their numbers tell."""
    has_dropout: bool
    is_own: bool
    """Whether the weights are a copy that nothing else will change."""
    empty: Tensor | None
    """Where queries may attend to nothing, see `EmptyRows.of`; in the order of the weights."""


class _Weighed(NamedTuple):
    """Weights times values, before they are summed over the keys."""

    weights: Tensor
    origin: Weights | Scores
    operands: tuple[Tensor, Tensor]


class Tracing:
    """Follows scores, weights and the outputs of attention calls from function to function, in one thread."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        """The tensors that are followed, and what they are."""
        self.are_keyless = False
        """Whether the last product took weights that a softmax made of something else than scores."""
        self._joins = Joins()
        self._weighed = Lineage()
        self._empty = EmptyRows()

    def clear(self) -> None:
        """Forget all."""
        self.lineage.clear()
        self._joins.clear()
        self._weighed.clear()
        self._empty.clear()

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
        begins |= name in OUTER and (multiplies_pairs if name in MULTIPLIES else makes_pairs)(args, kwargs)
        begins |= name == "bilinear" and is_of_pairs(args, kwargs)
        if not known and not begins and name not in _SOFTMAXES:
            return None
        if known and not begins and all(isinstance(origin, tuple) for _, origin in known):
            return lambda result: self._follow_all(func, args, kwargs, known, result)
        weights = [(tensor, origin) for tensor, origin in known if isinstance(origin, Weights)]
        changed, was = args[0] if args and _is_in_place(name, args, kwargs) else None, None
        if changed is not None:
            self._prepare_change(name, changed, known)
            if EmptyRows.may_begin(name) and any(isinstance(origin, Scores) for _, origin in known):
                was = changed.detach().clone()
        undropped = None
        is_dropped_scores = name in _DROPOUTS and not weights and isinstance(known[0][1], Scores)
        if is_dropped_scores and _drops(args, kwargs) and is_plain_torch(torch):
            weights = [(known[0][0], _weights_of_scores(*known[0], self._empty.of(known[0][0])))]
        if weights and name in _DROPOUTS and _drops(args, kwargs):
            tensor, origin = weights[0]
            undropped = tensor if origin.without_dropout is None else origin.without_dropout
            if changed is not None:
                undropped = undropped.detach().clone()

        def after(result: Any) -> Product | None:
            product = self._after(func, name, args, kwargs, known, weights, changed, undropped, result)
            if product is None and name not in _SOFTMAXES:
                self._follow_empty(func, name, args, kwargs, known, changed, was, result)
            return product

        return after

    def after_scripted(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Find out what a scripted function made, of which nothing but its arguments and its result is seen.

        A result of another shape than every argument comes from a product in it. Its numbers tell whether a softmax
        was there too.
        """
        if not isinstance(result, Tensor) or result.ndim < 2 or not result.is_floating_point():
            return
        known = list(self.lineage.known_in([*args, *kwargs.values()]))
        weights = [(tensor, origin) for tensor, origin in known if isinstance(origin, Weights)]
        if weights:
            self._carry_weights(function, "", args, kwargs, result, weights, None)
            return
        given = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
        if any(isinstance(origin, Scores) for _, origin in known) or all(item.shape != result.shape for item in given):
            made = _weights_of_scores(result) if is_plain_torch(torch) and not bool((result < 0).any()) else None
            is_softmax = made is not None and made.softmaxes[0].is_normalised
            self.lineage.follow(result, made if is_softmax else Scores())

    def _after(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        known: Sequence[tuple[Tensor, Any]],
        weights: Sequence[tuple[Tensor, Weights]],
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
                weights = _scores_as_weights(name, args, known, self._empty)
            if weights:
                return self._product(name, args, kwargs, result, weights)
            is_layer = name == "addmm" and is_parameter(args[0] if args else kwargs["input"])  # by its bias
            sides = None if is_layer else sides_of(name, args, kwargs)
            self.lineage.follow(result, None if is_layer else Scores(_is_outer(name, args), sides))
        elif known and (product := self._contracted(name, args, kwargs, known, result)):
            return product
        elif name in _MAKES_SCORES or (name == "bilinear" and not weights and is_of_pairs(args, kwargs)):
            if not weights or name != "linalg_vecdot":
                self.lineage.follow(result, Scores(sides=sides_of(name, args, kwargs)))
        elif name in _SOFTMAXES and result.ndim >= 2:
            is_of_scores = any(isinstance(origin, (Scores, Weights)) for _, origin in known)
            axis = kwargs.get("dim", args[1] if len(args) > 1 else -1) % result.ndim
            scores = _scores_of(known[0][1], result) if is_of_scores else None
            softmax = Softmax(result, is_of_scores=is_of_scores, axis=axis, scores=scores)
            if softmax.is_over_last or is_of_scores:
                self._empty.follow(func, name, args, kwargs, result, False)
                self._empty.find(name, args[0] if args else kwargs["input"], result, (axis,))
                softmax.empty = self._empty.of(result)
                self.lineage.follow(result, new_weights(result, softmax, axis))
        elif weights and name == "sum" and any(self._weighed.known_in(args)):
            self.lineage.follow(result, None)  # values that were weighed are no weights
        elif weights:
            if name in _OF_SEVERAL and not any(one.maps for _, origin in weights for one in origin.softmaxes):
                raise ValueError(f"{name} multiplies more than weights with values")
            self._carry_weights(func, name, args, kwargs, made, weights, undropped)
        elif name in OUTER and not known and makes_pairs(args, kwargs):
            has_features = args[0].shape[-1] == args[1].shape[-1]
            if has_features or name not in MULTIPLIES:
                self.lineage.follow(result, Pairs(has_features, name in MULTIPLIES, sides_of(name, args, {})))
        elif name in MULTIPLIES and not known and makes_row(args):
            self.lineage.follow(result, Row(sides_of(name, args, {})))
        elif known and isinstance(known[0][1], Row):
            self.lineage.follow(result, known[0][1].made(name, args, kwargs, known[0][0], result))
        else:
            for one in made if isinstance(made, (list, tuple)) else (made,):
                if isinstance(one, Tensor) and one.ndim > 1 and one.is_floating_point():
                    self._carry_scores(func, name, args, kwargs, known, one)
        if name in MULTIPLIES and known:
            self._weigh(name, args, kwargs, known, result)
        return None

    def _weigh(self, name: str, args: Any, kwargs: Any, known: Sequence[tuple[Tensor, Any]], result: Any) -> None:
        """Take note of weights times values, where that has more axes than the weights."""
        operands = operands_of(name, args, kwargs)
        found = [one for one in known if isinstance(one[1], (Weights, Scores))]
        if len(operands) != 2 or len(found) != 1 or not all(map(has_strides, (*operands, result))):
            return
        [(tensor, origin)], [one, other] = found, operands
        if (result.shape == tensor.shape and 0 not in tensor.stride()) or one is other:
            return
        if id(result) not in self.lineage:
            self.lineage.follow(result, _UNKNOWN)
        self._weighed.follow(result, _Weighed(tensor, origin, (one, other)))

    def _summed(self, args: Any, kwargs: Any, result: Any) -> Product | None:
        """The product of weights with values that a sum over the keys completes."""
        found = next(self._weighed.known_in([*args, *kwargs.values()]), None)
        if found is None:
            return None
        weighed: _Weighed = found[1]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        keeps = args[2] if len(args) > 2 else kwargs.get("keepdim", kwargs.get("keepdims", False))
        terms = multiplied(*weighed.operands, dim, keeps)
        return None if terms is None else self._product_of_terms(terms, weighed.weights, weighed.origin, result)

    def _contracted(
        self, name: str, args: Any, kwargs: Any, known: Sequence[tuple[Tensor, Any]], result: Any
    ) -> Product | None:
        """The product of weights with values that one of `CONTRACTS` makes, or a sum completes."""
        if name == "sum":
            return self._summed(args, kwargs, result)
        if name not in CONTRACTS:
            return None
        found = [one for one in known if isinstance(one[1], (Weights, Scores))]
        terms = terms_of(name, args, kwargs) if len(found) == 1 else None
        return None if terms is None else self._product_of_terms(terms, *found[0], result)

    def _product_of_terms(
        self, terms: Terms, tensor: Tensor, origin: Weights | Scores, result: Tensor
    ) -> Product | None:
        """The product of weights with values, written as another function than a matrix product; None if it is none.

        So are written gates of experts, class probabilities and losses too: see `order_of_terms`.
        """
        if isinstance(origin, Scores):
            weights = normalised(terms, tensor, origin, self._empty.of(tensor))
            if weights is None:
                return None
            origin = weights
        order = order_of_terms(terms, tensor, origin, result)
        if order is None:
            return None
        taken = [softmax.take(tensor) for softmax in origin.softmaxes]
        if not any(taken):
            return None
        shown = tensor if origin.without_dropout is None else origin.without_dropout
        source = origin.before_axes if origin.before_axes is not None else origin.before_dropout
        [softmax, *others] = origin.softmaxes
        is_plain = not others and softmax.is_over_last and softmax.made is not None
        empty = self._empty.of(tensor)
        return Product(
            order.output,
            result,
            order.places,
            order.arranged(shown),
            softmax.made if is_plain and softmax.made is not None else tensor,
            order.values,
            tensor if source is None else source,
            order.order,
            tuple(one for one in origin.softmaxes if one.is_normalised and one.is_over_last),
            origin.is_softmax and not any(one.is_changed or not one.is_normalised for one in origin.softmaxes),
            origin.without_dropout is not None,
            False,
            None if empty is None else order.arranged(empty),
        )

    def _follow_empty(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        known: Sequence[tuple[Tensor, Any]],
        changed: Tensor | None,
        was: Tensor | None,
        result: Any,
    ) -> None:
        """Find out where in a result queries may attend to nothing; `was` has what was changed, as it was before."""
        made = result if changed is None else changed
        if any(isinstance(origin, (Scores, Weights)) for _, origin in self.lineage.known_in((made,))):
            self._empty.follow(func, name, args, kwargs, made, changed is not None)
        if EmptyRows.may_begin(name) and isinstance(made, Tensor) and is_plain_torch(torch):
            for tensor, origin in known:
                if isinstance(origin, Scores):
                    axes = origin.axes(tensor.ndim) or ()
                    own = [place for place, sides in enumerate(axes) if sides[0] != sides[1]]
                    before = tensor if was is None or tensor is not changed else was
                    self._empty.find(name, before, made, own or (tensor.ndim - 1,))

    def _carry_scores(
        self, func: Any, name: str, args: Any, kwargs: Any, known: Sequence[tuple[Tensor, Any]], result: Tensor
    ) -> None:
        """Follow what a function made of scores, or of what may become scores."""
        made: object = None
        for tensor, origin in known:
            if isinstance(origin, Scores) and origin.are_after(name) and _has_same_places(name, tensor, result):
                is_moved = result.shape != tensor.shape or name in REORDERS
                made = origin.moved(func, name, args, kwargs, tensor, result) if is_moved else origin
            elif isinstance(origin, Pairs) and made is None:  # else they are added to scores, as a bias
                made = origin.made(name, tensor, result)
        if made is not None or any(isinstance(origin, Pairs) for _, origin in known):
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
            if isinstance(whole, Weights):
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
        weights: Sequence[tuple[Tensor, Weights]],
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
        if name in ENDS and not _normalises_heads(name, args, kwargs, origin, result):
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
        adds_axes = len(weights) == 1 and only_adds_axes(name, args, tensor, result)
        keeps |= adds_axes and origin.layout is not None
        made = Weights(softmaxes, keeps and origin.is_softmax, pair=origin.pair)
        if adds_axes:
            made.before_axes = tensor if origin.before_dropout is None else origin.before_dropout
            made.before_axes = made.before_axes if origin.before_axes is None else origin.before_axes
        if origin.layout is not None:
            made.layout = layout_of_weights(func, name, args, kwargs, tensor, origin.layout, result)
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
        self, name: str, args: Any, kwargs: Any, result: Any, weights: Sequence[tuple[Tensor, Weights]]
    ) -> Product | None:
        tensor, origin = weights[0]
        operands = _operands(name, args, kwargs, tensor, result, origin)
        if operands is None:
            terms = _einsum_terms(args)
            product = None if terms is None else self._product_of_terms(terms, tensor, origin, result)
            if product is not None:
                return product
            if any(softmax.maps for softmax in origin.softmaxes):
                return None
            raise ValueError(f"einsum {args[0]!r} is no product of (queries, keys) with (keys, width)")
        taken = [softmax.take(tensor) for softmax in origin.softmaxes]
        if not any(taken):
            return None
        shown = tensor if origin.without_dropout is None else origin.without_dropout
        order, values, output, places = operands
        source = tensor if origin.without_dropout is None else origin.before_dropout
        empty = self._empty.of(tensor)
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
            None if empty is None else empty.permute(order),
        )


_UNKNOWN = object()
"""What is known of weights times values that are not followed as weights."""


def _scores_of(origin: Any, made: Tensor) -> Scores | None:
    """What is known of the scores that a softmax was given, or the weights of another softmax with the same axes."""
    if isinstance(origin, Weights) and len(origin.softmaxes) == 1:
        [softmax] = origin.softmaxes
        is_same = origin.layout is not None and [[factor] for factor in softmax.factors] == origin.layout
        return softmax.scores if is_same else None
    return origin if isinstance(origin, Scores) else None


def _mixes_heads(name: str, args: Any, kwargs: Any, weights: Tensor, origin: Weights) -> bool:
    """Whether a product sums over neither queries nor keys of its weights: what comes of it is weights again."""
    return not any(origin.in_pair(axis) for axis in summed_axes(name, args, kwargs, weights))


def _normalises_heads(name: str, args: Any, kwargs: Any, origin: Weights, result: Tensor) -> bool:
    """Whether a layer brings the heads of weights to one scale, at each pair of query and key, as in DeepViT."""
    if origin.layout is None or len(origin.layout) != result.ndim:
        return False
    if name in ("layer_norm", "rms_norm"):
        normalised = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        return not any(map(origin.in_pair, range(result.ndim - len(normalised), result.ndim)))
    return name in ("batch_norm", "group_norm") and not origin.in_pair(1)


def _is_outer(name: str, args: Any) -> bool:
    """Whether a product sums over nothing, or over an axis of length 1."""
    if name == "einsum":
        labels, output = einsum_labels(args[0], [operand.ndim for operand in einsum_operands(args)])
        return all(label in output for own in labels for label in own)
    return name in ("matmul", "__matmul__", "linalg_matmul", "bmm", "mm") and bool(args) and args[0].shape[-1] == 1


def _weights_of_scores(
    scores: Tensor, origin: Scores | None = None, empty: Tensor | None = None, axis: int = -1
) -> Weights:
    """Scores that are used as weights, though no softmax was seen.

    Args:
        origin: what is known of them.
        empty: as `EmptyRows.of` has it.
        axis: that of the keys.
    """
    numbers = scores.detach()
    sums = numbers.sum(axis, dtype=torch.promote_types(numbers.dtype, torch.float32))
    sums = sums.nan_to_num_()  # of queries that may attend to nothing
    is_normalised = bool(((sums - 1).abs() < SUMS_TO_ONE).logical_or(sums == 0).all()) and bool(sums.any())
    softmax = Softmax(scores, is_normalised, axis=axis, scores=origin)
    softmax.empty = empty
    return new_weights(scores, softmax, axis)


def _scores_as_weights(
    name: str, args: Any, known: Sequence[tuple[Tensor, Any]], empty: EmptyRows
) -> list[tuple[Tensor, Weights]]:
    """The scores that a product takes as its weights: its first operand, of which no number is negative.

    Where linear attention multiplies key and value first, what comes of it is the second operand, or has negative ones.
    With other axes, or as the second operand, they are weights only where they sum to one over the keys. A product with
    a parameter is a layer.
    """
    if name in ("linear", "addmm"):  # the second operand may be a weight that was computed, as by a weight norm
        return []
    found = [(tensor, origin) for tensor, origin in known if isinstance(origin, Scores)]
    operands = args[1:] if name in ("einsum", "baddbmm") else args[::-1] if name == "__rmatmul__" else args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    if len(found) != 1 or len(operands) != 2 or not is_plain_torch(torch):
        return []
    [(scores, origin)], (first, second) = found, operands
    other = second if first is scores else first
    if is_parameter(other) or scores.ndim < 2 or not scores.numel() or not scores.is_floating_point():
        return []
    order: Sequence[int] = range(scores.ndim)
    if name == "einsum":
        found_order = _einsum_order(args, scores)
        if found_order is None:
            return []
        order = found_order.weights
    elif first is not scores:
        order = (*order[:-2], *order[:-3:-1])
    if bool((scores.detach() < 0).any()):
        return []
    weights = _weights_of_scores(scores, origin, empty.of(scores), order[-1])
    is_usual = first is scores and (*order,) == (*range(scores.ndim),)
    return [(scores, weights)] if is_usual or weights.softmaxes[0].is_normalised else []


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
    if name in EXPANDS:
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
    func: Any, args: Any, kwargs: Any, weights: Sequence[tuple[Tensor, Weights]], is_in_place: bool
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
    name: str, args: Any, kwargs: Any, weights: Tensor, result: Tensor, origin: Weights
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
    operands = operands_of(name, args, kwargs)
    left, right = operands[:2]
    if name == "__rmatmul__":
        left, right = right, left
    output = result
    if name in ("addmm", "baddbmm"):
        output = _without_added(args, kwargs, result)
    elif name == "linear" and len(operands) > 2:
        output = result - operands[2]  # the bias
    own, axes = range(weights.ndim), range(result.ndim)
    if left is weights:
        return (*own,), right.mT if name == "linear" else right, output, (*axes,)
    turned = (*axes[:-2], axes[-1], axes[-2])
    if name == "linear":
        return (*own,), left.mT, output.mT, turned
    return (*own[:-2], own[-1], own[-2]), left.mT, output.mT, turned


def _without_added(args: Any, kwargs: Any, result: Tensor) -> Tensor:
    """The product alone of beta x added + alpha x product."""
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    added = args[0] if args else kwargs["input"]
    output = result - beta * added if beta else result
    return output if alpha == 1 else output / alpha


class _EinsumOrder(NamedTuple):
    """The axes of an einsum of weights and values: which ones are (..., queries, keys), (..., keys, width)."""

    weights: tuple[int, ...]
    values: tuple[int | None, ...]
    """What the weights have not is width, which may be several axes, such as the rows that share a map. None: the
    values are the same for all of that axis, such as heads that share them."""
    output: tuple[int, ...]
    places: tuple[int | None, ...]
    """See `Product.places`: the last axis of several of the width is that of the output."""


def _einsum_order(args: Any, tensor: Tensor, origin: Weights | None = None) -> _EinsumOrder | None:
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


def _einsum_terms(args: Any) -> Terms | None:
    operands = einsum_operands(args)
    if len(operands) != 2:
        return None
    (one, other), out = einsum_labels(args[0], [operand.ndim for operand in operands])
    has_repeated = len({*one}) < len(one) or len({*other}) < len(other)
    return None if has_repeated else Terms((operands[0], operands[1]), (one, other), out)

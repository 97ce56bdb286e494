"""Where queries may attend to nothing: all their scores are -inf, and a softmax makes no numbers of them.

A map has zeros there, as that of a fused call. What a model lost for another reason stays lost: so these places are
followed from function to function, as scores and weights are. Where there are none, that takes a look at some numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors import is_plain_torch
from .axes import REORDERS
from .contractions import CONTRACTS
from .lineage import Lineage

_LESS = frozenset(("sub", "__sub__", "__rsub__", "rsub", "sub_", "__isub__", "subtract", "subtract_", "log_softmax"))
"""Functions that make -inf less -inf of such scores: no numbers."""
_TO_ZERO = frozenset(
    ("exp", "exp_", "exp2", "exp2_", "special_exp2", "sigmoid", "sigmoid_", "relu", "relu_", "softplus")
)
"""Functions that make zeros of them, which are no numbers once they are divided by their sum."""
_FILLS = frozenset(("nan_to_num", "nan_to_num_"))
"""Functions behind which what has no numbers is something else."""
_MOVES = frozenset(
    (
        *(*REORDERS, *CONTRACTS, "matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "linalg_matmul"),
        *("linear", "conv2d", "flip", "fliplr", "flipud", "rot90", "roll", "sort", "gather", "take_along_dim", "pad"),
        *("index_select", "__getitem__", "cat", "concat", "concatenate", "__setitem__", "copy_", "index_copy"),
        *("index_copy_", "index_put", "index_put_", "scatter", "scatter_", "slice_scatter", "select_scatter"),
        *("split", "chunk", "unbind"),
    )
)
"""Functions whose result has other places than what they are given, though it may be of the same shape."""


class EmptyRows:
    """Of scores and of weights, the places that are those of queries that may attend to nothing."""

    def __init__(self) -> None:
        self._known = Lineage()

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    def of(self, tensor: Tensor) -> Tensor | None:
        """True at those places of a tensor; None: none are known."""
        return next((places for _, places in self._known.known_in((tensor,))), None)

    @staticmethod
    def may_begin(name: str) -> bool:
        """Whether a function hides that its scores were -inf."""
        return name in _LESS or name in _TO_ZERO

    def find(self, name: str, before: Tensor, after: Tensor, axes: Sequence[int]) -> None:
        """Look for scores that are -inf along all of one of these axes. On a GPU nobody waits for the answer.

        A key that no query may attend to is found too, where it is not known which axis is that of the keys: its
        weights are zeros as well.

        Args:
            name: of the function, a softmax or one of `may_begin`.
            before, after: what it was given, and made of it.
        """
        is_strided = after.layout is torch.strided and not after.is_nested and after.is_floating_point()
        if not (is_strided and after.numel() and before.shape == after.shape):
            return
        before, made = before.detach(), after.detach()
        may_look = made.is_cpu and is_plain_torch(torch)
        for axis in axes:
            first = made.select(axis, 0)
            if may_look and not (first == 0 if name in _TO_ZERO else first.isnan()).any():
                continue
            are_empty = before.amax(axis, keepdim=True) == -torch.inf
            if not may_look or are_empty.any():
                known, places = self.of(after), are_empty.expand(before.shape)
                self._known.follow(after, places if known is None else known | places)

    def follow(
        self, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any], made: Any, is_own: bool
    ) -> None:
        """Find the places in what a function made.

        Args:
            is_own: whether that is the first argument, which it changed.
        """
        if not self._known:
            return
        known = [*self._known.known_in([*args, *kwargs.values()])]
        if not known:
            return
        if is_own:
            self._known.follow(made, None)
        if name == "native_dropout":
            made = made[0]
        if name in _FILLS:
            return
        if name not in _MOVES and isinstance(made, Tensor) and all(_spreads(tensor, made) for tensor, _ in known):
            for _, places in known:
                before, places = self.of(made), places.expand(made.shape)
                self._known.follow(made, places if before is None else before | places)
            return
        if not is_plain_torch(torch):  # what a mode traces would have this in it too
            return
        several = isinstance(made, (list, tuple))
        try:
            found = _lost(func, args, kwargs, known, is_own)
        except Exception:  # it takes no ones: the map has there what the model had
            return
        for one, own in zip(made if several else (made,), found if several else (found,), strict=True):
            if isinstance(one, Tensor) and isinstance(own, Tensor) and one.shape == own.shape:
                places = own.isnan()
                if not places.is_cpu or places.any():
                    self._known.follow(one, places)


def _spreads(tensor: Tensor, made: Tensor) -> bool:
    """Whether each place of a tensor is one of what was made of it, or all along an axis of length 1."""
    return tensor.ndim == made.ndim and all(
        own in (size, 1) for own, size in zip(tensor.shape, made.shape, strict=True)
    )


def _lost(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    known: Sequence[tuple[Tensor, Any]],
    is_own: bool,
) -> Any:
    """What a function makes of tensors without numbers at some places and ones elsewhere, as all others are: it has no
    numbers where these places go."""
    with torch.no_grad():
        instead = {id(one): torch.ones_like(one).masked_fill_(places, torch.nan) for one, places in known}

        def exchanged(item: Any) -> Any:
            if isinstance(item, (list, tuple)):
                return type(item)(map(exchanged, item))
            if isinstance(item, Tensor) and item.is_floating_point() and id(item) not in instead:
                instead[id(item)] = torch.ones_like(item)
            return instead.get(id(item), item)

        given = [*map(exchanged, args)]
        made = func(*given, **{key: exchanged(item) for key, item in kwargs.items() if key != "out"})
    return given[0] if is_own and made is None else made


def without_empty_rows(weights: Tensor, places: Tensor | None) -> Tensor | None:
    """A copy of weights with zeros for queries that may attend to nothing; None where there are none.

    Args:
        places: see `EmptyRows.of`.
    """
    if places is None:
        return None
    weights = weights.detach()
    return torch.where(weights.isnan() & places, 0, weights)

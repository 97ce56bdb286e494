"""Several attention calls that are one attention: a call for each head, or for slices of heads, images or queries.

A model puts their outputs together, by `torch.cat` or `torch.stack`, or writes each into a slice of one tensor. Where
that joins the axis of queries, they are one attention only if all of them looked at the same keys and values. Where it
joins any other axis, each call has heads, images or windows of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axes import Factor, Layout, Output, Part, put_together
from .lineage import Lineage

_CATS = frozenset(("cat", "concat", "concatenate"))
_STACKS = {"vstack": 0, "hstack": 1, "dstack": 2}
"""Functions that are torch.cat for tensors of three axes or more, on that axis."""
_WRITES = frozenset(("__setitem__", "copy_"))


@dataclass(frozen=True)
class Attended:
    """What calls must have in common to be one attention."""

    call: object
    """The call of the module that attended."""
    origin: Any
    """Where queries and keys come from."""
    keys: int
    query_and_key: tuple[Tensor, ...]
    """Of a fused call; else ()."""
    keys_and_values: tuple[Tensor, ...]
    """The values, and the keys if they are known."""


class _Piece(NamedTuple):
    """Where a tensor lies in the one that it is put into."""

    output: Output
    layout: Layout
    shape: Sequence[int]
    starts: Sequence[int]


class Joins:
    """Finds the calls that a model joins, in one thread."""

    def __init__(self) -> None:
        self._written = Lineage()  # the tensors that are written to, and what was written up to now

    def clear(self) -> None:
        """Forget what was written."""
        self._written.clear()

    def joined(
        self, name: str, args: Any, kwargs: Any, known: Sequence[tuple[Tensor, Any]], result: Any
    ) -> tuple[Tensor, Output, Layout] | None:
        """The tensor in which a function that has run completed an attention, with the output that it is.

        Args:
            known: the outputs of attention calls among the arguments, each with its `Output` and its axes.
        """
        if name not in _WRITES and name not in _CATS and name != "stack" and name not in _STACKS:
            return None
        with torch._C.DisableTorchFunction():  # the default device is not for what is computed here
            if name in _WRITES:
                return self._after_write(name, args, known)
            return self._after_cat(name, args, kwargs, known, result)

    def _after_cat(
        self, name: str, args: Any, kwargs: Any, known: Sequence[tuple[Tensor, Any]], result: Any
    ) -> tuple[Tensor, Output, Layout] | None:
        if isinstance(result, Tensor):
            origins = {id(tensor): origin for tensor, origin in known if isinstance(origin, tuple)}
            tensors = args[0] if args else kwargs.get("tensors", ())
            if len(tensors) > 1 and all(id(tensor) in origins for tensor in tensors):
                dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
                dim = _STACKS.get(name, dim) % result.ndim
                outputs, layouts = zip(*(origins[id(tensor)] for tensor in tensors), strict=True)
                if any(output is not outputs[0] for output in outputs):
                    return _as_one(result, _in_a_row(name, tensors, origins, dim))
                layout = put_together(layouts, dim, name == "stack")
                return None if layout is None else (result, outputs[0], layout)
        return None

    def _after_write(
        self, name: str, args: Any, known: Sequence[tuple[Tensor, Any]]
    ) -> tuple[Tensor, Output, Layout] | None:
        written = args[-1]
        origin = next((one for tensor, one in known if tensor is written and isinstance(one, tuple)), None)
        if origin is None:
            return None
        if name == "__setitem__":
            whole, view = args[0], args[0][args[1]]
        else:
            base, view = getattr(args[0], "_base", None), args[0]
            whole = view if base is None else base
        output, layout = origin
        piece = _block(output, layout, whole, view) if view.shape == written.shape else None
        if piece is None:
            return None
        before = [one for _, pieces in self._written.known_in([whole]) for one in pieces]
        pieces = [*(one for one in before if not _overlap(one, piece)), piece]
        is_full = sum(math.prod(one.shape) for one in pieces) == whole.numel()
        self._written.follow(whole, None if is_full else pieces)
        if is_full and len(pieces) == 1:
            return whole, output, piece.layout
        return _as_one(whole, pieces) if is_full else None


def _in_a_row(name: str, tensors: Sequence[Tensor], origins: dict[int, Any], dim: int) -> list[_Piece]:
    pieces, start = [], 0
    for tensor in tensors:
        output, layout = origins[id(tensor)]
        shape = list(tensor.shape)
        if name == "stack":
            shape.insert(dim, 1)
            layout = [*layout[:dim], [], *layout[dim:]]
        pieces.append(_Piece(output, layout, shape, [start if axis == dim else 0 for axis in range(len(shape))]))
        start += shape[dim]
    return pieces


def _block(output: Output, layout: Layout, whole: Tensor, view: Tensor) -> _Piece | None:
    """Where a view lies in the whole, which an output is written to; None where it is no block of it."""
    steps, starts = whole.stride(), [0] * whole.ndim
    if whole.untyped_storage().data_ptr() != view.untyped_storage().data_ptr() or 0 in steps:
        return None
    rest: int = int(view.storage_offset()) - int(whole.storage_offset())
    for axis in sorted(range(whole.ndim), key=lambda axis: -steps[axis]):
        if whole.shape[axis] > 1:
            starts[axis], rest = divmod(rest, steps[axis])
    axes, joined, shape = list(zip(layout, view.shape, view.stride(), strict=True)), list[list[Factor]](), list[int]()
    for step in steps:
        is_there = bool(axes) and axes[0][2] == step  # else an index took one place of the axis
        own, size, _ = axes.pop(0) if is_there else ([], 1, step)
        joined.append(own)
        shape.append(size)
    return None if axes or rest else _Piece(output, joined, shape, starts)


def _overlap(one: _Piece, other: _Piece) -> bool:
    axes = zip(one.starts, one.shape, other.starts, other.shape, strict=True)
    return all(start < begin + size and begin < start + length for start, length, begin, size in axes)


def _as_one(whole: Tensor, pieces: Sequence[_Piece]) -> tuple[Tensor, Output, Layout] | None:
    """The output that several are, which fill a tensor, and its axes there; None if they are not one."""
    outputs = [piece.output for piece in pieces]
    if len({*map(id, outputs)}) < len(outputs) or not all(output.is_open for output in outputs):
        return None
    model = max(pieces, key=lambda piece: sum(map(len, _leaves(piece.layout))))
    roles, leaves = _roles(model), _leaves(model.layout)
    grown, added = dict[_Role, int](), list[int]()  # the axes of the whole on which something is joined
    for axis, size in enumerate(whole.shape):
        if any(piece.shape[axis] != size for piece in pieces):
            role = roles[axis][0].role if roles[axis] else ("width", 0)
            if role[0] == "width":
                added.append(axis)
            else:
                grown[role] = axis
    if any(name == "cut" or (name == "query" and place > 0) for name, place in grown) or len(added) > 1:
        return None
    if not all(_is_like(piece, roles, grown) for piece in pieces):
        return None
    lead_axes = [axis for (name, _), axis in grown.items() if name == "lead"] + added
    why = _why_apart(pieces, len(grown) + len(added) > len(lead_axes), lead_axes)
    if why is not None:
        for part in (part for output in outputs for part in _parts(output)):
            part.output.why_apart = why or part.output.why_apart
        return None

    inner = {axis: math.prod(leaf.size for leaf in leaves[axis][1:]) for axis in grown.values()}
    inner |= {axis: math.prod(leaf.size for leaf in leaves[axis]) for axis in added}
    new = {leaves[axis][0]: Factor(whole.shape[axis] // inner[axis]) for axis in grown.values()}
    more = [Factor(whole.shape[axis] // inner[axis]) for axis in added]
    made = model.output.grown(new, more)
    lead, queries, _ = model.output.leaves()
    sizes = [leaf.size for leaf in made.leaves()[0]]
    numbers = torch.arange(math.prod(sizes)).view(sizes)
    for piece in pieces:
        places, first = [slice(0, leaf.size) for leaf in lead], 0
        for (name, place), axis in grown.items():
            start = piece.starts[axis] // inner[axis]
            if name == "lead":
                places[place] = slice(start, start + piece.shape[axis] // inner[axis])
            else:
                first = start * math.prod(leaf.size for leaf in queries[1:])
        for start in (piece.starts[axis] // inner[axis] for axis in added):
            places.append(slice(start, start + 1))
        block = numbers[tuple(places)].flatten()
        for part in _parts(piece.output):
            made.parts.append(Part(part.output, block[part.numbers], first + part.first))
        piece.output.whole, piece.output.parts = made, []
    made.attended = outputs[0].attended
    if added and not leaves[added[0]] and not queries:
        made.steps, made.has_one_sequence = more[0], _see_the_same(pieces, ())
    layout = [[new.get(leaf, leaf) for leaf in axis] for axis in leaves]
    for axis in added:
        layout[axis] = [*more, *layout[axis]]
    return whole, made, layout


_Role = tuple[str, int]
"""What a factor of an axis is: "lead", "query" or "width", and its number among those; or "cut"."""


class _Leaf(NamedTuple):
    role: _Role
    size: int


def _leaves(layout: Layout) -> list[list[Factor]]:
    return [[leaf for factor in axis for leaf in factor.smallest()] for axis in layout]


def _roles(piece: _Piece, absent: Sequence[_Role] = ()) -> list[list[_Leaf]]:
    """What the factors of each axis are. Those that have a length of 1 here, and more elsewhere, are absent."""
    roles = dict[Factor, _Role]()
    for name, leaves in zip(("lead", "query", "width"), piece.output.leaves(), strict=True):
        places = (place for place in range(len(leaves) + len(absent)) if (name, place) not in absent)
        roles |= {leaf: (name, place) for leaf, place in zip(leaves, places, strict=False)}
    return [[_Leaf(roles.get(leaf, ("cut", 0)), leaf.size) for leaf in axis] for axis in _leaves(piece.layout)]


def _is_like(piece: _Piece, roles: Sequence[Sequence[_Leaf]], grown: dict[_Role, int]) -> bool:
    """Whether a piece has the axes of the others, but for their lengths where they are joined."""
    counts = [len(axis) for axis in _leaves(piece.layout)]
    absent = [role for role, axis in grown.items() if counts[axis] < len(roles[axis])]
    for axis, (own, others) in enumerate(zip(_roles(piece, absent), roles, strict=True)):
        if any(leaf.role[0] == "cut" for leaf in own):
            return False
        if axis in grown.values():
            role, rest = others[0].role, others[1:]
            if (own if role in absent else own[1:]) != rest or (role not in absent and own[0].role != role):
                return False
        elif own != others:
            return False
    return True


def _why_apart(pieces: Sequence[_Piece], is_of_queries: bool, lead: Sequence[int]) -> str | None:
    """Why calls are not one attention, in words; None if they are one, "" if there is nothing to say.

    Args:
        is_of_queries: whether they are joined as queries.
        lead: the axes on which they are joined as images or heads.
    """
    parts = [[part.output.attended for part in _parts(piece.output)] for piece in pieces]
    flat = [one for several in parts for one in several]
    if any(one is None or one.call is not flat[0].call for one in flat):
        return ""
    if any(one.keys != flat[0].keys for one in flat):
        return "they have different numbers of keys"
    if any(one.origin != flat[0].origin for one in flat):
        return "their queries or keys come from different inputs"
    if not is_of_queries:
        pairs = [tuple(map(_memory, one.query_and_key)) for one in flat]
        is_repeated = any(pair and pairs.count(pair) > 1 for pair in pairs)
        return "several of them have the same query and key, and other values" if is_repeated else None
    if not _see_the_same(pieces, lead):
        return "they are of different queries, and do not look at the same keys and values"
    return None


def _see_the_same(pieces: Sequence[_Piece], lead: Sequence[int]) -> bool:
    """Whether all calls with the same images and heads, which are joined on these axes, have the same keys and values.

    Where no keys are known, the values tell.
    """
    firsts = dict[tuple[int, ...], Sequence[Part]]()
    for piece in pieces:
        own = _parts(piece.output)
        others = firsts.setdefault(tuple(piece.starts[axis] for axis in lead), own)
        pairs = [(one.output.attended, other.output.attended) for one, other in zip(own, others, strict=False)]
        if not all(_are_same(one.keys_and_values, other.keys_and_values) for one, other in pairs):
            return False
    return True


def _parts(output: Output) -> Sequence[Part]:
    return output.parts or [Part(output, torch.arange(math.prod(leaf.size for leaf in output.leaves()[0])), 0)]


def _memory(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _are_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and (_memory(one) == _memory(other) or torch.equal(one, other))
        for one, other in zip(some, others, strict=True)
    )

"""Deformable attention: values read at a few points of feature maps, times weights, summed over the points.

In plain torch a call of `F.grid_sample` for each level reads the values, or an index does where the points are rounded
to cells. The samples are stacked, multiplied with the weights, and summed over the points. Fused kernels do all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..maps import without_autograd
from .axes import Factor, Layout, Order, layout_of
from .calls import name_of
from .lineage import Lineage

_MULTIPLIES = frozenset(("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"))
_ROUNDING = 0.02  # how far a sum of weights in half precision may be from one


@dataclass(frozen=True)
class SampledCall:
    """A deformable attention: output = sum over the points of weight x value read at the point."""

    output: Tensor
    """(..., queries, width)."""
    returned: Tensor
    """What the last function returned: the output, with its axes perhaps in another order."""
    places: tuple[int, ...]
    """`places[i]` is the axis of the output that is axis i of `returned`."""
    values: tuple[Tensor, ...]
    """Of each level, (..., width, its height, its width)."""
    cells: Tensor
    """(..., queries, points, 2), see `Samples`."""
    weights: Tensor
    """(..., queries, points)."""
    counts: tuple[int, ...]
    """How many of the points lie on each level."""
    made_of: tuple[Tensor, Tensor]
    """What the model made of its queries, the weights, and of its keys, the values."""
    order: Order | None = None
    """Which axes are heads, where the kernel's own arguments say so."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each level."""
        return tuple((value.shape[-2], value.shape[-1]) for value in self.values)


def ms_deform_attn_forward(
    output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> SampledCall:
    """The kernel of Deformable DETR's repository, of mmcv and of the Hugging Face hub.

    value: (batch, cells of all levels, heads, width). sampling_locations: (batch, queries, heads, levels, points, 2),
    in shares of the level. attention_weights: (batch, queries, heads, levels, points). output: (batch, queries,
    heads x width).
    """
    batch, _, heads, width = value.shape
    sizes = [(int(height), int(across)) for height, across in spatial_shapes.tolist()]
    starts = level_start_index.tolist()
    values = tuple(
        value[:, start : start + height * across].permute(0, 2, 3, 1).reshape(batch, heads, width, height, across)
        for start, (height, across) in zip(starts, sizes, strict=True)
    )
    across_and_height = sampling_locations.new_tensor([[across, height] for height, across in sizes])
    cells = sampling_locations.detach() * across_and_height[:, None] - 0.5
    joined = output.reshape(batch, -1, heads, width).transpose(1, 2)
    return SampledCall(
        joined,
        output,
        (),
        values,
        cells.transpose(1, 2).flatten(3, 4),
        attention_weights.transpose(1, 2).flatten(3),
        (attention_weights.shape[-1],) * len(sizes),
        (attention_weights, value),
        Order((batch, heads), (False, True)),
    )


SAMPLING_KERNELS: dict[str, Callable[..., SampledCall]] = {"ms_deform_attn_forward": ms_deform_attn_forward}
"""By the name of the operator."""


def may_sample(name: str) -> bool:
    """Whether a function of that name can be the first step of a deformable attention, or all of it."""
    return name == "grid_sample" or name in SAMPLING_KERNELS


def may_read_cells(args: Any, kwargs: Any) -> bool:
    """Whether an index may be values[image, :, y, x]."""
    return type(args[1]) is tuple and len(args[1]) == 4 and isinstance(args[1][0], Tensor)


@dataclass(frozen=True)
class _Level:
    """The values of a level, and the cells that are read."""

    values: Tensor
    """(lead, width, height, width of the level)."""
    cells: Tensor
    """(lead, queries, points, 2), or (lead, queries x points, 2)."""
    lead: Factor
    width: Factor
    places: tuple[Factor, ...]
    """Queries and points; or both as one axis, which is split later."""

    @property
    def points(self) -> list[Factor]:
        """The axis of points; nothing if it has length 1."""
        return self.places[-1].smallest()[2 - len(self.places) :]


@dataclass(frozen=True)
class _Read:
    """The samples of some levels; with weights, once they are multiplied."""

    levels: tuple[_Level, ...]
    layout: Layout
    joined: Sequence[Factor] = ()
    """The axes of the points of all levels, once they are joined."""
    weights: Tensor | None = None

    @property
    def points(self) -> list[Factor]:
        """The axes of points, outermost first; none of length 1."""
        return _smallest(self.joined) if self.joined else self.levels[0].points


class Sampling:
    """Follows the samples of feature maps from function to function, in one thread."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        """The tensors that are followed, and what they are."""

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> SampledCall | None:
        """Look at a function that has run; returns the deformable attention if it was the last step of one."""
        name = name_of(func)
        if name == "grid_sample":
            self.lineage.follow(result, _of_grid(*args, **kwargs))
            return None
        known = list(self.lineage.known_in([*args, *kwargs.values()])) if self.lineage else []
        if not known:
            if name == "__getitem__":
                self.lineage.follow(result, _of_index(*args))
            return None
        tensor, read = known[0]
        if not isinstance(result, Tensor):
            return None
        made: _Read | None
        if name in ("stack", "cat", "concat", "concatenate"):
            made = _joined(name != "stack", known, result, *args, **kwargs)
        elif name in _MULTIPLIES:
            made = _weighted(read, tensor, args, result)
        elif name == "sum":
            return _summed(read, tensor, result, *args[1:], **kwargs)
        else:
            layout = layout_of(func, name, args, kwargs, tensor, read.layout, result)
            made = None if layout is None else replace(read, layout=layout)
        self.lineage.follow(result, made)
        return None


@without_autograd
def _of_grid(
    values: Tensor, grid: Tensor, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: Any = None
) -> _Read | None:
    """The samples that F.grid_sample reads of (lead, width, height, width of the level)."""
    if values.ndim != 4 or mode not in ("bilinear", "nearest") or padding_mode not in ("zeros", "border"):
        return None
    sides = grid.new_tensor([values.shape[3], values.shape[2]])
    cells = (grid.detach() + 1) / 2 * (sides - 1) if align_corners else ((grid.detach() + 1) * sides - 1) / 2
    if padding_mode == "border":
        cells = cells.clamp(sides.new_zeros(2), sides - 1)
    if mode == "nearest":
        cells = cells.round()
    lead, width, queries, points = map(Factor, (values.shape[0], values.shape[1], *grid.shape[1:3]))
    level = _Level(values, cells, lead, width, (queries, points))
    return _Read((level,), [[lead], [width], [queries], [points]])


@without_autograd
def _of_index(values: Any, index: Any) -> _Read | None:
    """The samples values[image, :, y, x], whose points are whole cells; None for other indices."""
    is_read = (
        isinstance(values, Tensor)
        and values.ndim == 4
        and isinstance(index, tuple)
        and len(index) == 4
        and index[1] == slice(None)
        and all(
            isinstance(one, Tensor) and one.ndim == 2 and one.dtype == torch.int64 for one in (index[0], *index[2:])
        )
    )
    if not is_read:
        return None
    images, _, y, x = index
    own = torch.arange(len(values), device=values.device)[:, None]
    if images.shape != x.shape or len(x) != len(values) or not torch.equal(images, own.expand_as(images)):
        return None
    lead, width, places = map(Factor, (values.shape[0], values.shape[1], x.shape[1]))
    cells = torch.stack([x, y], -1).to(values.dtype if values.dtype == torch.float64 else torch.float32)
    level = _Level(values, cells, lead, width, (places,))
    return _Read((level,), [[lead], [places], [width]])


def _joined(
    is_cat: bool, known: Sequence[tuple[Tensor, Any]], result: Tensor, tensors: Any, dim: int = 0, **_: Any
) -> _Read | None:
    """What torch.cat makes along the axis of points, or torch.stack beside it; None if other tensors are among them."""
    if len(tensors) != len(known) or any(read.weights is not None for _, read in known):
        return None
    axis = dim % result.ndim
    layout = [*known[0][1].layout]
    joined = Factor(result.shape[axis])
    if is_cat:
        if any(_smallest(read.layout[axis]) != read.points for _, read in known):
            return None
        layout[axis], points = [joined], [joined]
    else:
        layout.insert(axis, [joined])
        points = [joined, *known[0][1].points]
    return _Read(tuple(level for _, read in known for level in read.levels), layout, points)


def _weighted(read: _Read, tensor: Tensor, args: Any, result: Tensor) -> _Read | None:
    """Samples times weights, which are the same for all of the width."""
    others = [item for item in args if isinstance(item, Tensor) and item is not tensor]
    if len(others) != 1 or read.weights is not None or result.shape != tensor.shape:
        return None
    return replace(read, weights=others[0])


def _summed(
    read: _Read, tensor: Tensor, result: Tensor, dim: Any = None, keepdim: bool = False, **_: Any
) -> SampledCall | None:
    """The deformable attention whose samples, times weights, are summed over all points and nothing else."""
    if read.weights is None or dim is None or keepdim:
        return None
    parts = [_smallest(axis) for axis in read.layout]
    summed = [axis % tensor.ndim for axis in ([dim] if isinstance(dim, int) else dim)]
    over = sorted(summed, key=lambda axis: [read.points.index(part) for part in parts[axis] if part in read.points])
    widths = [axis for axis, own in enumerate(parts) if own == read.levels[0].width.smallest()]
    rest = [axis for axis in range(tensor.ndim) if axis not in over and axis not in widths]
    if [part for axis in over for part in parts[axis]] != read.points or len(widths) != 1 or not rest:
        return None
    of_lead = read.levels[0].lead.smallest()
    queries = next((axis for axis in rest if not set(parts[axis]) <= set(of_lead)), rest[-1])
    lead = [axis for axis in rest if axis != queries]
    weights = read.weights.reshape((1,) * (tensor.ndim - read.weights.ndim) + read.weights.shape)
    if weights.shape[widths[0]] != 1 or [part for axis in lead for part in parts[axis]] != of_lead:
        return None
    weights = weights.expand(*(1 if axis in widths else size for axis, size in enumerate(tensor.shape)))
    weights = weights.detach().permute(*widths, *lead, queries, *over)[0].flatten(len(lead) + 1)
    if not ((weights.sum(-1, dtype=torch.float32) - 1).abs() < _ROUNDING).all():
        return None
    sizes = weights.shape[:-1]
    cells = [level.cells.reshape(*sizes, -1, 2) for level in read.levels]
    kept = [axis for axis in range(tensor.ndim) if axis not in over]
    order = [kept.index(axis) for axis in [*lead, queries, *widths]]
    return SampledCall(
        result.permute(order),
        result,
        tuple(order.index(axis) for axis in range(len(kept))),
        tuple(level.values.detach().reshape(*sizes[:-1], *level.values.shape[1:]) for level in read.levels),
        torch.cat(cells, -2),
        weights,
        tuple(one.shape[-2] for one in cells),
        (read.weights, read.levels[0].values),
    )


def _smallest(axis: Sequence[Factor]) -> list[Factor]:
    return [part for factor in axis for part in factor.smallest()]

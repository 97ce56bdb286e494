"""What the trained weights before the first layer show: the filters and position embeddings of a vision transformer."""

from __future__ import annotations

from typing import Any

import torch

from ..layout import layout_of
from ..maps import without_autograd
from .layers import as_floats, like_input

__all__ = ["filter_components", "position_similarity"]


@without_autograd
def position_similarity(
    positions: Any, grid: tuple[int, int] | None = None, *, prefix_tokens: int | None = None
) -> Any:
    """How alike the position embeddings of patches are: for each patch a grid of its cosine similarity to all patches.

    >>> import torch
    >>> from visualizer.analysis import position_similarity
    >>> similarity = position_similarity(torch.randn(1, 197, 384))
    >>> similarity.shape
    torch.Size([14, 14, 14, 14])
    >>> round(similarity[3, 5, 3, 5].item(), 4)  # a position with itself
    1.0

    Dosovitskiy et al. 2021, fig. 7, centre (https://arxiv.org/abs/2010.11929).

    Args:
        positions: (tokens, width) or (1, tokens, width), such as a model's `pos_embed`.
        grid: (rows, columns) of patches; None: the square that is left behind `prefix_tokens`.
        prefix_tokens: how many tokens come before the patches; they are left out. None: those that the grid leaves
            over; without a grid 0 or 1, whichever leaves a square.

    Returns:
        (rows, columns, rows, columns), -1 to 1; [i, j] is the grid of patch (i, j). 0 for an embedding of zeros.
        Detached, float64 for float64, else float32.

    Raises:
        ValueError: the positions have another shape, or the grid does not fit them.
    """
    table, is_array = as_floats(positions)
    if table.ndim == 3 and len(table) == 1:
        table = table[0]
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"positions are (tokens, width) or (1, tokens, width), these are {tuple(table.shape)}")
    layout = layout_of(len(table), {"grid": grid, "prefix_tokens": prefix_tokens})
    rows, columns = layout.sheet.shape
    unit = torch.nn.functional.normalize(table[layout.first_patch :], dim=-1)
    return like_input((unit @ unit.mT).view(rows, columns, rows, columns), is_array)


@without_autograd
def filter_components(weight: Any, count: int = 28) -> Any:
    """What a patch embedding reacts to: the principal components of its filters, as small pictures.

    >>> import torch
    >>> from visualizer.analysis import filter_components
    >>> embedding = torch.nn.Conv2d(3, 384, kernel_size=16, stride=16)
    >>> filter_components(embedding.weight).shape
    torch.Size([28, 3, 16, 16])

    Dosovitskiy et al. 2021, fig. 7, left (https://arxiv.org/abs/2010.11929): the eigenvectors of the covariance of the
    filters. Each filter is flattened to channels * height * width numbers, and the mean filter is subtracted.

    Args:
        weight: (filters, channels, height, width), the weight of the convolution that turns patches into tokens.
        count: how many components.

    Returns:
        (count, channels, height, width), the largest variance first. Each has length 1 and a sign that makes its
        largest entry positive. Detached, float64 for float64, else float32.

    Raises:
        ValueError: the weight has another shape, or `count` is too large: there is one component fewer than filters,
            and no more than numbers in a filter.
    """
    filters, is_array = as_floats(weight)
    if filters.ndim != 4 or 0 in filters.shape:
        raise ValueError(
            f"weight is a convolution's, (filters, channels, height, width); this one is {tuple(filters.shape)}"
        )
    most = min(len(filters) - 1, filters[0].numel())  # subtracting the mean costs one
    if not 1 <= count <= most:
        raise ValueError(f"count={count!r}: filters of the shape {tuple(filters.shape)} have 1 to {most} components")
    flat = filters.flatten(1).double()
    components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = (components * largest.sign()).view(count, *filters.shape[1:])
    return like_input(components.to(filters.dtype), is_array)

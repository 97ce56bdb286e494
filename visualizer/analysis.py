"""What attention maps say: where the layers together look, how far, how broadly, and at what.

Everything reads the maps some rows at a time, so that what a fused kernel attends to is analysed in the memory of some
rows; no function makes an N x N map. The axes of a map are (batch, heads, queries, keys), and its rows sum to one. All
functions take an `AttentionMap`, a tensor or an array with these axes, or several of them as layers: a list, one tensor
or array with the layers before the other axes, or what `attention` and `capture` found. What they give is detached, on
the device of the maps, float64 for float64 and else float32; arrays alone give arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .maps import AttentionMap, exactly, maps_of

Fusion: TypeAlias = Literal["mean", "max", "min"]

_PREFIXES = range(9)  # a class token, one of distillation, or up to eight registers: what a grid is guessed behind
_DIGIT = 11  # bits that a pass of the search for a threshold finds: three passes for float32


@exactly
def rollout(
    attention: Any,
    query: int | Sequence[int] | Tensor | None = None,
    *,
    heads: Fusion = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
) -> Any:
    """How much each token of the input flows into a query after all layers: the attention rollout.

    >>> import torch
    >>> from visualizer.analysis import rollout
    >>> layers = torch.randn(12, 1, 6, 17, 17).softmax(-1)
    >>> flow = rollout(layers, query=0)               # of the class token
    >>> flow.shape, round(flow.sum().item(), 4)
    (torch.Size([1, 17]), 1.0)
    >>> rollout(layers).shape                         # of all tokens
    torch.Size([1, 17, 17])

    Abnar and Zuidema 2020 (https://arxiv.org/abs/2005.00928): R = Ã_L ... Ã_2 Ã_1 with
    Ã_l = normalised rows of ((1 - residual) * fused A_l + residual * I), layer 1 the first. Rows of R sum to one.

    It goes from the last layer to the first with the rows that are asked for, so one query takes the time of computing
    each map once and the memory of some rows. The whole takes two N x N matrices an image, as any product does.

    Args:
        attention: the layers, from the first to the last, all of one number of images and tokens.
        query: a token, several, or None for all; -1 is the last.
        heads: how the heads of a layer become one map.
        residual: the share of the residual connection, from 0 to 1.
        discard: the share of each fused map that is dropped, from 0 up to, not including, 1: of the N x N entries of an
            image the int(discard * N * N) smallest become 0, before the residual is added. Those that tie with the
            smallest that stays do stay, and so does the column of key 0, the class token. The threshold is found
            exactly, in three more passes over the layer (six for float64).

    Returns:
        (batch, keys) for one query; (batch, chosen queries, keys) for several; (batch, queries, keys) for all.

    Raises:
        ValueError: a layer's map is not square or of another size than the first's, as with cross attention, windows
            and pooled tokens, whose layers do not share their tokens; or an option is out of its range.
        IndexError: there is no such query.
    """
    maps, _, arrays = maps_of(attention)
    if heads not in get_args(Fusion):
        raise ValueError(f'heads={heads!r}: pass "mean", "max" or "min"')
    if not 0 <= residual <= 1:
        raise ValueError(f"residual={residual!r} is a share from 0 to 1")
    if not 0 <= discard < 1:
        raise ValueError(f"discard={discard!r} is a share from 0 up to, not including, 1")
    _check_tokens(maps)
    last = maps[-1]
    batch, _, tokens, _ = last.shape
    everything = torch.arange(tokens, device=last.device)
    chosen = everything if query is None else everything[last._chosen(query, tokens, "query")]
    flow = torch.zeros(batch, len(chosen), tokens, dtype=last.dtype, device=last.device)
    flow[:, torch.arange(len(chosen), device=last.device), chosen] = 1
    for layer in reversed(maps):
        flow = _through(
            layer, flow.to(layer.device, torch.promote_types(flow.dtype, layer.dtype)), heads, residual, discard
        )
    is_one = isinstance(query, int) or getattr(query, "ndim", 1) == 0
    return _given(flow[:, 0] if is_one else flow, arrays)


def entropy(attention: Any) -> Any:
    """How broadly each query attends: the entropy of its row in nats, 0 for one key to ln(keys) for all alike.

    >>> import torch
    >>> from visualizer.analysis import entropy
    >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.0000, 0.6931]]])

    - sum_j A_ij ln A_ij, with 0 ln 0 = 0.

    Returns:
        (batch, heads, queries); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
    """
    return _each(attention, lambda layer: layer.reduce(lambda rows: torch.special.entr(rows).sum(-1)))


def received(attention: Any) -> Any:
    """How much attention each key gets: the mean of its column, from 0 to 1; the keys' shares sum to one.

    >>> import torch
    >>> from visualizer.analysis import received
    >>> received(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[[0.7500, 0.2500]]])

    A first token that gets far more than 1/keys is an attention sink.

    Returns:
        (batch, heads, keys); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
    """

    def columns(layer: AttentionMap) -> Tensor:
        batch, _, queries, _ = layer.shape
        return layer.row_product(torch.full((batch, queries), 1 / queries, dtype=layer.dtype, device=layer.device))

    return _each(attention, columns)


def confidence(attention: Any) -> Any:
    """How sure a head is: the largest weight of each row, in the mean over the queries, 1/keys to 1.

    >>> import torch
    >>> from visualizer.analysis import confidence
    >>> confidence(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 2, 2))
    tensor([[0.7500]])

    Returns:
        (batch, heads); with the layers first where there are several.

    Raises:
        ValueError: the layers differ in shape.
    """
    return _each(attention, lambda layer: layer.reduce(lambda rows: rows.amax(-1)).mean(-1))


def cls_attention(attention: Any, query: int = 0, *, prefix_tokens: int = 1) -> Any:
    """What the class token attends to among the patches: its row without the tokens before them.

    >>> import torch
    >>> from visualizer.analysis import cls_attention
    >>> cls_attention(torch.randn(1, 6, 197, 197).softmax(-1)).shape
    torch.Size([1, 6, 196])

    The weights are as the layer has them, so they sum to one less what goes to the tokens that are left out.

    Args:
        attention: one map, or layers of one shape.
        query: the token whose row it is.
        prefix_tokens: how many keys come before the patches.

    Returns:
        (batch, heads, keys - prefix_tokens); with the layers first where there are several.

    Raises:
        ValueError: no patch is left, or the layers differ in shape.
        IndexError: there is no such query.
    """

    def row(layer: AttentionMap) -> Tensor:
        keys = layer.shape[3]
        if not 0 <= prefix_tokens < keys:
            raise ValueError(f"prefix_tokens={prefix_tokens!r} does not leave a patch among {keys} keys")
        return layer.rows([query])[:, :, 0, prefix_tokens:]

    return _each(attention, row)


def attention_distance(
    attention: Any,
    grid: tuple[int, int] | None = None,
    *,
    patch_size: float = 1,
    prefix_tokens: int | None = None,
    renormalise: bool = True,
) -> Any:
    """How far a head looks over the picture: the mean distance of a patch to what it attends to, weighted.

    >>> import torch
    >>> from visualizer.analysis import attention_distance
    >>> everywhere = torch.full((1, 1, 197, 197), 1 / 197)
    >>> attention_distance(everywhere, patch_size=16).round()  # in pixels of a picture of 224 x 224
    tensor([[116.]])
    >>> attention_distance(torch.eye(196).expand(1, 1, 196, 196))  # each patch sees itself
    tensor([[0.]])

    The mean over the patches i of sum_j A_ij * patch_size * |x_i - x_j|, with x a patch's (row, column): Dosovitskiy et
    al. 2021, fig. 7 (https://arxiv.org/abs/2010.11929); Raghu et al. 2021 (https://arxiv.org/abs/2108.08810).

    Args:
        attention: one map of self-attention over patches, or layers of one shape.
        grid: (rows, columns) of patches; None: the square that `prefix_tokens` leave.
        patch_size: the side of a patch, in the unit that the distance is to have: pixels; 1 gives patches.
        prefix_tokens: how many tokens come before the patches; None: what the grid leaves over, or the fewest up to 8
            that leave a square. They are left out, as queries and as keys.
        renormalise: whether a row's weights are scaled to sum to one over the patches; a row that gives them nothing
            then stays out of the mean (and a head where all are so has NaN). Else what goes to the tokens before them
            counts as distance 0.

    Returns:
        (batch, heads), in the unit of `patch_size`; with the layers first where there are several.

    Raises:
        ValueError: queries and keys are not the same tokens, the grid does not fit them, or the layers differ in shape.
    """

    def mean_distance(layer: AttentionMap) -> Tensor:
        batch, heads, queries, keys = layer.shape
        if queries != keys:
            raise ValueError(f"distances are those within one grid of patches, not of {queries} queries to {keys} keys")
        rows, columns, prefix = _patches(keys, grid, prefix_tokens)
        row = torch.arange(rows, device=layer.device, dtype=layer.dtype).repeat_interleave(columns)
        column = torch.arange(columns, device=layer.device, dtype=layer.dtype).repeat(rows)
        total = torch.zeros(batch, heads, dtype=layer.dtype, device=layer.device)
        counted = torch.zeros_like(total)
        for part, weights in layer.chunks():
            own = slice(max(part.start - prefix, 0), max(part.stop - prefix, 0))  # as patches
            weights = weights[:, :, max(prefix - part.start, 0) :, prefix:]
            apart = torch.hypot(row[own, None] - row, column[own, None] - column)  # (some queries, patches)
            distances = (weights * apart).sum(-1)
            if renormalise:
                mass = weights.sum(-1)
                distances = torch.where(mass > 0, distances / mass, 0)
                counted += (mass > 0).sum(-1)
            else:
                counted += distances.shape[-1]
            total += distances.sum(-1)
        return patch_size * total / counted

    return _each(attention, mean_distance)


def _check_tokens(maps: list[AttentionMap]) -> None:
    """Raise ValueError unless the layers can be multiplied: the same images and tokens in all."""
    batch, tokens = maps[0].shape[0], maps[0].shape[3]
    for number, layer in enumerate(maps):
        name = _name(number, layer)
        why = None
        if layer.kind == "cross":
            why = f"{name} is cross attention, whose keys are others than its queries"
        elif layer.shape[2] != layer.shape[3]:
            why = f"{name} has {layer.shape[2]} queries and {layer.shape[3]} keys: cross attention, or a cache of keys"
        elif layer.kind == "window" and len(maps) > 1:
            why = f"{name} attends within windows, whose tokens are others in the next layer"
        elif (layer.shape[0], layer.shape[3]) != (batch, tokens):
            why = (
                f"{name} has {layer.shape[3]} tokens of {layer.shape[0]} images, {_name(0, maps[0])} {tokens} of "
                f"{batch}: windows, pooled tokens, or other inputs"
            )
        if why is not None:
            raise ValueError(f"a rollout multiplies square maps of the same tokens, and {why}. Leave such layers out")


def _through(layer: AttentionMap, flow: Tensor, heads: Fusion, residual: float, discard: float) -> Tensor:
    """The shares that queries have of the tokens behind a layer, (batch, any, tokens), as those before it."""
    tokens = layer.shape[3]
    dropped = int(discard * tokens * tokens)
    least = _order_statistic(layer, heads, dropped)[:, None, None] if dropped else None
    before = torch.zeros_like(flow)
    wanted = flow.flatten(0, 1).any(0).cpu()
    for part in layer._parts():
        some = wanted[part].nonzero().flatten() + part.start
        if not len(some):
            continue
        # Against a threshold rows must be what they were when it was found, to the last bit: the same part of them.
        chosen = part if len(some) == part.stop - part.start or least is not None else some.to(layer.device)
        fused = _fused(layer, chosen, heads)
        if least is not None:
            is_small = fused < least
            is_small[..., 0] = False  # the class token
            fused.masked_fill_(is_small, 0)
        fused *= 1 - residual
        own = torch.arange(tokens, device=layer.device)[chosen]
        fused[:, torch.arange(len(own), device=layer.device), own] += residual
        sums = fused.sum(-1, keepdim=True)
        fused /= sums.masked_fill_(sums == 0, 1)  # a masked row without a residual stays zeros
        before += flow[..., chosen] @ fused.to(flow.dtype)
    return before


def _fused(layer: AttentionMap, queries: slice | Tensor, heads: Fusion) -> Tensor:
    """Rows of the map that the heads make together, (batch, some queries, keys); new, so free to be changed."""
    rows = layer.rows(queries)
    return rows.mean(1) if heads == "mean" else rows.amax(1) if heads == "max" else rows.amin(1)


def _order_statistic(layer: AttentionMap, heads: Fusion, rank: int) -> Tensor:
    """The entry of each image's fused map that `rank` others come before in rising order: (batch,).

    Without the map: numbers are ordered as their bits are, so each pass over the rows counts the next bits of those
    entries whose first bits are known to be those of the answer.
    """
    bits, whole = (64, torch.int64) if layer.dtype == torch.float64 else (32, torch.int32)
    batch = layer.shape[0]
    image = torch.arange(batch, device=layer.device)[:, None]
    known = torch.zeros(batch, 1, dtype=whole, device=layer.device)
    ranks = torch.full((batch, 1), rank, device=layer.device)
    shift = bits
    while shift:
        width = min(_DIGIT, shift)
        counts = torch.zeros(batch << width, dtype=torch.int64, device=layer.device)
        # The first digit has the sign: it runs from -half to half.
        half = 1 << width - 1 if shift == bits else 0
        for part in layer._parts():
            ordered = _as_ordered(_fused(layer, part, heads).view(whole).flatten(1))
            digits = (ordered >> shift - width) + half if half else ordered >> shift - width & (1 << width) - 1
            digits += image.to(whole) << width
            counts += torch.bincount(
                digits.flatten() if half else digits[ordered >> shift == known], minlength=len(counts)
            )
        below = counts.view(batch, -1).cumsum(1)
        digit = (below <= ranks).sum(1, keepdim=True)
        ranks -= torch.where(digit > 0, below.gather(1, (digit - 1).clamp(0)), 0)
        known = (known << width) + digit.to(whole) - half
        shift -= width
    return _as_ordered(known).view(layer.dtype).flatten()


def _as_ordered(bits: Tensor) -> Tensor:
    """The bits of floats as integers that are ordered as the floats are; and back again."""
    highest = torch.iinfo(bits.dtype)
    return bits ^ (bits >> highest.bits - 1 & highest.max)  # of negative numbers all bits but the sign turn round


def _patches(tokens: int, grid: tuple[int, int] | None, prefix_tokens: int | None) -> tuple[int, int, int]:
    """(rows, columns, prefix tokens) of that many tokens, as told or guessed."""
    if grid is not None:
        rows, columns = grid
        left = tokens - rows * columns
        if rows < 1 or columns < 1 or left < 0 or (prefix_tokens is not None and left != prefix_tokens):
            before = "" if prefix_tokens is None else f" behind {prefix_tokens} prefix tokens"
            raise ValueError(
                f"grid={grid!r} makes {rows * columns} patches, which does not fit {tokens} tokens{before}"
            )
        return rows, columns, left
    for prefix in _PREFIXES if prefix_tokens is None else (prefix_tokens,):
        side = math.isqrt(max(0, tokens - prefix))
        if prefix >= 0 and side > 0 and side * side == tokens - prefix:
            return side, side, prefix
    less = f"{_PREFIXES[0]} to {_PREFIXES[-1]}" if prefix_tokens is None else f"{prefix_tokens!r}"
    raise ValueError(
        f"cannot tell the patch grid of {tokens} tokens: less {less} prefix tokens they are no square. Pass "
        "grid=(rows, columns)"
    )


def _each(attention: Any, analyse: Callable[[AttentionMap], Tensor]) -> Any:
    """What a function makes of each map, on each other where there are several layers."""
    maps, is_one, arrays = maps_of(attention)
    found = [analyse(layer) for layer in maps]
    if is_one:
        return _given(found[0], arrays)
    for number, (layer, result) in enumerate(zip(maps, found, strict=True)):
        if result.shape != found[0].shape:
            raise ValueError(
                f"layers of different shapes make no common array: {_name(0, maps[0])} is {maps[0].shape} and "
                f"{_name(number, layer)} {layer.shape}. Pass them one by one"
            )
    return _given(torch.stack([result.to(found[0].device) for result in found]), arrays)


def _name(number: int, layer: AttentionMap) -> str:
    return f"layer {number} ({layer.path!r})" if layer.path else f"layer {number}"


def _given(result: Tensor, as_array: bool) -> Any:
    return result.numpy() if as_array else result

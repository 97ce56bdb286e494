"""What the layers together do: how the tokens of the input reach a query at the end, with and without gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..maps import AttentionMap, without_autograd
from .reading import (
    Fusion,
    Rows,
    check_heads,
    check_residual,
    check_tokens,
    fused,
    given,
    layers_of,
    name,
    with_gradients,
)

_DIGIT = 11  # bits that a pass of the search for a threshold finds: three passes for float32
_UNIT = 2**20  # a capacity of 1 in the whole numbers that a maximum flow is computed in


@without_autograd
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
        attention: the layers, from the first to the last, all of one number of images and tokens. A tensor with four
            axes is one layer, (batch, heads, queries, keys); layers have an axis before these.
        query: a token's number, several, or None for all; -1 is the last.
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
    maps, _, arrays = layers_of(attention)
    check_heads(heads)
    check_residual(residual)
    if not 0 <= discard < 1:
        raise ValueError(f"discard={discard!r} is a share from 0 up to, not including, 1")
    check_tokens(maps, "a rollout")
    return _from_the_last(
        maps, query, arrays, lambda number, flow: _through(maps[number], flow, heads, residual, discard)
    )


@without_autograd
def attention_flow(
    attention: Any,
    query: int = 0,
    *,
    keys: int | Sequence[int] | Tensor | None = None,
    heads: Fusion = "mean",
    residual: float = 0.5,
) -> Any:
    """How much of each token of the input can flow into a query after all layers: the attention flow.

    >>> import torch
    >>> from visualizer.analysis import attention_flow
    >>> attention_flow(torch.full((2, 1, 1, 3, 3), 1 / 3), query=0)
    tensor([[1.0000, 0.5000, 0.5000]])

    Abnar and Zuidema 2020 (https://arxiv.org/abs/2005.00928): the maximum flow from the query behind the last layer to
    a token of the input, in the network whose edges between two layers have as capacities the rows of Ã, those of
    `rollout`. Each token has the whole network for itself, so the flows are not shares of one: none is above 1, and
    together they may be. Where a rollout multiplies the weights along a path, here the narrowest edge counts.

    The flow is computed in whole numbers, with scipy, after capacities were rounded to multiples of 2^-20.

    Args:
        attention: the layers, from the first to the last, all of one number of images and tokens.
        query: the token behind the last layer; -1 is the last.
        keys: the tokens of the input, one or several; None for all. With 197 tokens and 12 layers one takes
            10 to 20 ms and all 2 to 4 s, measured on one core of a CPU.
        heads: how the heads of a layer become one map.
        residual: the share of the residual connection, from 0 to 1.

    Returns:
        (batch, keys), or (batch,) for one key: 0 to 1, on the device of the last layer. The network of an image has
        layers x N x N edges in memory.

    Raises:
        ImportError: scipy is not installed.
        ValueError, IndexError: as of `rollout`; or there is no such key.
    """
    try:
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError("attention_flow needs scipy, which computes maximum flows: pip install scipy") from error
    maps, _, arrays = layers_of(attention)
    check_heads(heads)
    check_residual(residual)
    check_tokens(maps, "an attention flow")
    last, depth = maps[-1], len(maps)
    batch, _, tokens, _ = last.shape
    try:
        source = int(last.query_indices(operator.index(query))[0])
    except TypeError:
        raise TypeError(f"query={query!r}: an attention flow is that of one token, by its number") from None
    sinks = last.key_indices(slice(None) if keys is None else keys).tolist()
    flows = torch.zeros(batch, len(sinks), dtype=last.dtype)
    for image in range(batch):
        # Node l * N + i is token i before layer l, so the edges of a layer run from its upper nodes to its lower.
        edges = [_capacities(layer, image, heads, residual) for layer in maps]
        ends = [
            torch.stack([places[0] + (number + 1) * tokens, places[1] + number * tokens])
            for number, (places, _) in enumerate(edges)
        ]
        whole = csr_matrix(
            (torch.cat([capacities for _, capacities in edges]).numpy(), torch.cat(ends, 1).numpy()),
            shape=((depth + 1) * tokens, (depth + 1) * tokens),
        )
        for place, sink in enumerate(sinks):
            flows[image, place] = maximum_flow(whole, depth * tokens + source, sink).flow_value / _UNIT
    flows = flows.clamp(max=1).to(last.device)  # more is rounding: the query's own row sums to one
    is_one = isinstance(keys, int) or getattr(keys, "ndim", 1) == 0
    return given(flows[:, 0] if is_one else flows, arrays)


@without_autograd
def gradient_rollout(
    attention: Any,
    query: int | Sequence[int] | Tensor | None = None,
    *,
    gradients: Any = None,
    residual: float = 0.5,
) -> Any:
    """How much each token of the input flows into a query, counting what spoke for one output: a rollout of gradients.

    >>> import torch
    >>> from visualizer import analysis, attention
    >>> from visualizer.models import VisionTransformer
    >>> model = VisionTransformer(patch=4, width=8, depth=2, heads=2, hidden=16, grid=3, classes=10)
    >>> with attention(model, gradients=True) as maps:
    ...     logits = model(torch.randn(1, 3, 12, 12))
    >>> logits[:, 7].sum().backward()
    >>> analysis.gradient_rollout(maps, query=0).shape
    torch.Size([1, 10])

    `rollout` with relu(mean_h(A_h * dA_h)) in the place of the mean of the heads, dA the gradient of the output by the
    weights. How large the gradients are counts: where they are small beside the residual connection, rows stay near
    the token itself. Compare the patches with each other, and leave the query's own entry out.

    Args:
        attention: the layers, from the first to the last; see `relevance` for which have gradients.
        query: a token, several, or None for all; -1 is the last.
        gradients: of the shapes of the maps and in their order; None: those that belong to the maps.
        residual: the share of the residual connection, from 0 to 1.

    Returns:
        (batch, keys) for one query; (batch, chosen queries, keys) for several; (batch, queries, keys) for all. Rows
        sum to one.

    Raises:
        ValueError: as of `rollout`; or there are no gradients, or of other shapes.
        RuntimeError: no backward pass has come through a layer.
        IndexError: there is no such query.
    """
    check_residual(residual)
    maps, grads, arrays = with_gradients(attention, gradients)
    check_tokens(maps, "a rollout")
    return _from_the_last(
        maps,
        query,
        arrays,
        lambda number, flow: _times(
            maps[number],
            flow,
            lambda queries: _with_residual(
                (maps[number].rows(queries) * grads[number](queries)).mean(1).relu_(), queries, residual
            ),
        ),
    )


@without_autograd
def relevance(attention: Any, query: int | Sequence[int] | Tensor | None = None, *, gradients: Any = None) -> Any:
    """How much each token of the input counts for one output of the model: relevance by attention and its gradients.

    >>> import torch
    >>> from visualizer import analysis, attention
    >>> from visualizer.models import VisionTransformer
    >>> model = VisionTransformer(patch=4, width=8, depth=2, heads=2, hidden=16, grid=3, classes=10)
    >>> with attention(model, gradients=True) as maps:
    ...     logits = model(torch.randn(1, 3, 12, 12))
    >>> logits[:, 7].sum().backward()                        # why class 7?
    >>> analysis.relevance(maps, query=0)[:, 1:].shape       # of the 3 x 3 patches, for the class token
    torch.Size([1, 9])

    Chefer et al. 2021 (https://arxiv.org/abs/2103.15679): R = I, and with each layer, the first first,
    R <- R + Â R, where Â = mean_h relu(dA_h * A_h) and dA is the gradient of the output by the weights. The row of the
    token that the output is read from is the answer, without that token itself: [0, 1:] of a class token; of the last
    token in a language model.

    Other than in a rollout the answer is to a question, the output that the backward pass began at; heads count by what
    they did for it; and nothing is normalised, so that the numbers compare within one picture, not between pictures.

    It goes from the last layer to the first with the rows that are asked for, r <- r + r Â, and computes only rows of
    maps and gradients that count.

    Args:
        attention: the layers, from the first to the last: maps recorded with `attention(model, gradients=True)`, fused
            or not; or tensors on which `retain_grad()` was called before the backward pass, such as those that
            `capture` has with keep="graph"; or anything else with `gradients`. The backward pass is that of one output,
            summed over the images: `logits[:, target].sum().backward()`.
        query: a token, several, or None for all; -1 is the last.
        gradients: of the shapes of the maps and in their order, the first layer first, where hooks on the backward pass
            come the other way round; None: those that belong to the maps.

    Returns:
        (batch, keys) for one query; (batch, chosen queries, keys) for several; (batch, queries, keys) for all; 0 and
        above.

    Raises:
        ValueError: as of `rollout`; or there are no gradients, or of other shapes.
        RuntimeError: no backward pass has come through a layer.
        IndexError: there is no such query.
    """
    maps, grads, arrays = with_gradients(attention, gradients)
    check_tokens(maps, "relevance")
    return _from_the_last(
        maps,
        query,
        arrays,
        lambda number, flow: flow + _times(maps[number], flow, _relevant(maps[number], grads[number])),
    )


@without_autograd
def cross_relevance(
    attention: Any,
    streams: Sequence[tuple[str, str] | Sequence[tuple[str, str]]],
    *,
    gradients: Any = None,
) -> dict[tuple[str, str], Any]:
    """How much each token counts for one output of a model of two streams, such as a text and a picture.

    >>> import torch
    >>> from visualizer import attention
    >>> from visualizer.analysis import cross_relevance
    >>> model = torch.nn.Transformer(16, 2, num_encoder_layers=1, num_decoder_layers=1, batch_first=True).eval()
    >>> with attention(model, gradients=True) as maps:
    ...     y = model(torch.randn(1, 7, 16), torch.randn(1, 5, 16))
    >>> y[:, -1, 3].sum().backward()
    >>> found = cross_relevance(maps, [("source", "source"), ("target", "target"), ("target", "source")])
    >>> found["target", "source"][:, -1].shape  # what the last word written owes to the words read
    torch.Size([1, 7])

    The rules of Chefer et al. 2021 (https://arxiv.org/abs/2103.15679) for co-attention and for encoder and decoder.
    With s and q the streams of the queries and of the keys, R_ss = I and R_sq = 0 at first, and
    Â = mean_h relu(dA_h * A_h):

    - a layer of self-attention: R_ss <- R_ss + Â R_ss and R_sq <- R_sq + Â R_sq;
    - a layer of cross-attention: R_sq <- R_sq + N(R_ss)^T Â N(R_qq) and R_ss <- R_ss + Â R_qs, where N(R) is
      I + (R - I) with its rows normalised (a row of zeros stays one).

    Args:
        attention: the layers in the order in which they ran; see `relevance` for which have gradients.
        streams: for each layer the names of (the stream of the queries, the stream of the keys), in the same order.
            Where layers ran side by side, neither reading what the other wrote, as the two directions of a
            co-attention layer in LXMERT, they stand together in a list of their own:
            [("text", "text"), ("image", "image"), [("text", "image"), ("image", "text")]].
        gradients: of the shapes of the maps and in their order; None: those that belong to the maps.

    Returns:
        For each pair of streams (s, q) what the tokens of q count for each of s: (batch, tokens of s, tokens of q), 0
        and above. The answer is the row of the token that the output is read from. The maps are read some rows at a
        time; the matrices of relevance are whole, one for each pair.

    Raises:
        ValueError: there are not as many pairs as layers, more than two streams, or layers that do not fit them; or
            there are no gradients, or of other shapes.
        RuntimeError: no backward pass has come through a layer.
    """
    maps, grads, arrays = with_gradients(attention, gradients)
    groups: list[list[Any]] = [[group] if _is_pair(group) else list(group) for group in streams]
    pairs = [pair for group in groups for pair in group]
    if len(pairs) != len(maps) or not all(map(_is_pair, pairs)):
        raise ValueError(
            f"streams is to have a pair (stream of the queries, stream of the keys) for each of {len(maps)} layers, "
            f"and has {len(pairs)} entries: {pairs[:4]}{' ...' if len(pairs) > 4 else ''}"
        )
    sizes = _sizes(maps, pairs)
    first = maps[0]
    found = {
        (s, q): torch.zeros(first.shape[0], sizes[s], sizes[q], dtype=first.dtype, device=first.device)
        for s in sizes
        for q in sizes
    }
    for stream in sizes:
        found[stream, stream].diagonal(dim1=1, dim2=2).fill_(1)
    layers = iter(zip(maps, grads, strict=True))
    for group in groups:
        # What a group adds is computed before any of it is added.
        added: list[tuple[tuple[str, str], Tensor]] = []
        for s, q in group:
            layer, grad = next(layers)
            relevant = _relevant(layer, grad)
            if s == q:
                added += [((s, x), _on_rows(layer, relevant, found[s, x])) for x in sizes]
            else:
                through = _on_rows(layer, relevant, _normalised(found[q, q]))
                added += [
                    ((s, q), _normalised(found[s, s]).to(through.device, through.dtype).mT @ through),
                    ((s, s), _on_rows(layer, relevant, found[q, s])),
                ]
        for pair, more in added:
            found[pair] = found[pair].to(torch.promote_types(found[pair].dtype, more.dtype)) + more.to(first.device)
    return {pair: given(matrix, arrays) for pair, matrix in found.items()}


def _is_pair(entry: Any) -> bool:
    return not isinstance(entry, str) and len(entry) == 2 and all(isinstance(stream, str) for stream in entry)


def _sizes(maps: list[AttentionMap], pairs: list[tuple[str, str]]) -> dict[str, int]:
    """How many tokens each stream has; ValueError where the layers disagree."""
    sizes: dict[str, int] = {}
    for number, (layer, pair) in enumerate(zip(maps, pairs, strict=True)):
        for stream, size, what in zip(pair, layer.shape[2:], ("queries", "keys"), strict=True):
            if sizes.setdefault(stream, size) != size:
                raise ValueError(
                    f"{name(number, layer)} has {size} {what}, and the stream {stream!r}, from which they are said to "
                    f"be, has {sizes[stream]} tokens: check the order of streams"
                )
        if layer.shape[0] != maps[0].shape[0]:
            raise ValueError(
                f"{name(number, layer)} is of {layer.shape[0]} inputs, {name(0, maps[0])} of {maps[0].shape[0]}"
            )
    if len(sizes) > 2:
        raise ValueError(f"the rules are for one stream or two, not for {len(sizes)}: {', '.join(sizes)}")
    return sizes


def _from_the_last(maps: list[AttentionMap], query: Any, arrays: bool, through: Callable[[int, Tensor], Tensor]) -> Any:
    """The rows of a product of layers, begun with those of the identity; `through` multiplies by a layer's matrix."""
    last = maps[-1]
    batch, _, tokens, _ = last.shape
    chosen = last.query_indices(slice(None) if query is None else query)
    flow = torch.zeros(batch, len(chosen), tokens, dtype=last.dtype, device=last.device)
    flow[:, torch.arange(len(chosen), device=last.device), chosen] = 1
    for number in reversed(range(len(maps))):
        layer = maps[number]
        flow = through(number, flow.to(layer.device, torch.promote_types(flow.dtype, layer.dtype)))
    is_one = isinstance(query, int) or getattr(query, "ndim", 1) == 0
    return given(flow[:, 0] if is_one else flow, arrays)


def _through(layer: AttentionMap, flow: Tensor, heads: Fusion, residual: float, discard: float) -> Tensor:
    """The shares that queries have of the tokens behind a layer, (batch, any, tokens), as those before it."""
    tokens = layer.shape[3]
    dropped = int(discard * tokens * tokens)
    least = _order_statistic(layer, heads, dropped)[:, None, None] if dropped else None

    def mixed(queries: slice | Tensor) -> Tensor:
        rows = fused(layer.rows(queries), heads)
        if least is not None:
            is_small = rows < least
            is_small[..., 0] = False  # the class token
            rows.masked_fill_(is_small, 0)
        return _with_residual(rows, queries, residual)

    # Against a threshold rows must be what they were when it was found, to the last bit: the same parts of the map.
    return _times(layer, flow, mixed, in_parts=least is not None)


def _times(layer: AttentionMap, flow: Tensor, rows: Rows, in_parts: bool = False) -> Tensor:
    """flow, (batch, any, tokens), times the matrix of which a function gives rows; those that count nothing are not
    computed. `in_parts`: the function is to be given the parts of the map, never some queries of one."""
    product = torch.zeros_like(flow)
    wanted = flow.flatten(0, 1).any(0).cpu()
    for part in layer.parts():
        some = wanted[part].nonzero().flatten() + part.start
        if not len(some):
            continue
        chosen = part if in_parts or len(some) == part.stop - part.start else some.to(layer.device)
        made, shares = rows(chosen).to(flow.dtype), flow[..., chosen]
        if len(flow) > 1:  # a row that another image needs may be NaN here, by the gradient of a masked query: 0 x NaN
            made = made.masked_fill(~shares.any(1)[..., None], 0)
        product += shares @ made
    return product


def _on_rows(layer: AttentionMap, rows: Rows, right: Tensor) -> Tensor:
    """The matrix of which a function gives rows times another, (batch, queries, any)."""
    right = right.to(layer.device)
    wide = torch.promote_types(right.dtype, layer.dtype)
    return torch.cat([rows(part).to(wide) @ right.to(wide) for part in layer.parts()], 1)


def _relevant(layer: AttentionMap, grad: Rows) -> Rows:
    """Rows of mean_h relu(dA * A)."""
    return lambda queries: (layer.rows(queries) * grad(queries)).relu_().mean(1)


def _normalised(matrix: Tensor) -> Tensor:
    """I + (R - I) with its rows normalised."""
    own = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    gathered = matrix - own
    sums = gathered.sum(-1, keepdim=True)
    return gathered / sums.masked_fill_(sums == 0, 1) + own


def _with_residual(rows: Tensor, queries: slice | Tensor, residual: float) -> Tensor:
    """Ã: rows (batch, some queries, tokens) with the share of the residual connection, normalised; in place."""
    own = torch.arange(rows.shape[-1], device=rows.device)[queries]
    rows *= 1 - residual
    rows[:, torch.arange(len(own), device=rows.device), own] += residual
    sums = rows.sum(-1, keepdim=True)
    rows /= sums.masked_fill_(sums == 0, 1)  # a masked row without a residual stays zeros
    return rows


def _capacities(layer: AttentionMap, image: int, heads: Fusion, residual: float) -> tuple[Tensor, Tensor]:
    """The entries of one image's Ã that are not 0: places (2, entries), and multiples of 1 / _UNIT (entries,)."""
    found = []
    for part in layer.parts():
        rows = _with_residual(fused(layer.rows(part), heads), part, residual)[image].cpu()
        whole = (rows.double() * _UNIT).round().to(torch.int32)
        places = whole.nonzero()
        found.append((places + torch.tensor([part.start, 0]), whole[places[:, 0], places[:, 1]]))
    return torch.cat([places for places, _ in found]).T, torch.cat([values for _, values in found])


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
        for part in layer.parts():
            ordered = _as_ordered(fused(layer.rows(part), heads).view(whole).flatten(1))
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

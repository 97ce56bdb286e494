"""What all layers do together: how the tokens of the input reach a query at the end, with and without gradients."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import few
from ..maps import AttentionMap, stitched_rows, without_autograd
from ..reading import Reduction
from .gradients import Rows, with_gradients
from .layers import (
    check_heads,
    check_residual,
    check_tokens,
    fused,
    layer_label,
    layers_of,
    like_input,
    merged_into,
)
from .sinks import Sinks, check_sinks, without_sinks

__all__ = ["attention_flow", "cross_relevance", "gradient_rollout", "relevance", "rollout"]

_UNIT = 2**20  # maximum flows are computed in whole numbers, with this one for a capacity of 1


@without_autograd
def rollout(
    attention: Any,
    query: int | Sequence[int] | Tensor | None = None,
    *,
    heads: Reduction = "mean",
    residual: float = 0.5,
    discard: float = 0.0,
    sinks: Sinks = "keep",
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

    The product starts at the last layer with the rows of the chosen queries only. So one query takes the time to
    compute each map once, and the memory of some rows. All queries take two N x N matrices for each image.

    Maps of windows, as of a Swin, count as maps of the whole picture. Where 2 x 2 patches were merged between two
    layers, each has a quarter of the share of the patch that they became: the keys are the patches of the first layer,
    the queries those of the last. What a patch gives to the padding of a window is left out.

    Args:
        attention: the layers, from the first to the last, all with the same number of images and tokens, or with
            patches that are merged as above. A tensor with four axes is one layer, (batch, heads, queries, keys);
            layers have an axis before these.
        query: a token's number, several, or None for all; -1 is the last.
        heads: how the heads of a layer become one map.
        residual: the share of the residual connection, from 0 to 1.
        discard: the share of each fused map that is dropped, at least 0 and below 1. Of the N x N entries of an image
            the int(discard * N * N) smallest become 0, before the residual is added. Entries that tie with the smallest
            one that stays, stay too; so does the column of key 0, the class token. The fused map of one layer is then
            in memory, N x N numbers for each image.
        sinks: "remove": each layer without its sinks, rescaled, see `without_sinks`. In trained vision transformers a
            few patches take most of a plain rollout.

    Returns:
        (batch, keys) for one query; (batch, chosen queries, keys) for several; (batch, queries, keys) for all.

    Raises:
        ValueError: a layer's map is not square, or not of the first layer's size. Layers with cross attention, or with
            windows or pooled tokens whose places are not known, do not share their tokens. Or an option is out of its
            range.
        IndexError: there is no such query.
    """
    read = layers_of(attention)
    maps = [layer.stitched() for layer in read.layers]
    if check_sinks(sinks):
        maps = without_sinks(maps)
    check_heads(heads)
    check_residual(residual)
    if not 0 <= discard < 1:
        raise ValueError(f"discard={discard!r} is a share from 0 up to, not including, 1")
    check_tokens(maps, "a rollout", may_merge=True)

    return _from_the_last(
        maps, query, read.are_arrays, lambda number: _mixed_rows(maps[number], heads, residual, discard)
    )


@without_autograd
def attention_flow(
    attention: Any,
    query: int = 0,
    *,
    keys: int | Sequence[int] | Tensor | None = None,
    heads: Reduction = "mean",
    residual: float = 0.5,
) -> Any:
    """How much of each token of the input can flow into a query through all layers: the attention flow.

    >>> import torch
    >>> from visualizer.analysis import attention_flow
    >>> attention_flow(torch.full((2, 1, 1, 3, 3), 1 / 3), query=0)
    tensor([[1.0000, 0.5000, 0.5000]])

    Abnar and Zuidema 2020 (https://arxiv.org/abs/2005.00928): the maximum flow from the query after the last layer to a
    token of the input. The capacities of the network's edges between two layers are the entries of Ã, as in `rollout`.
    Each token has the whole network for itself, so the flows are not shares of one: each is at most 1, but their sum
    may be more. A rollout multiplies the weights along a path; here the narrowest edge of a path counts.

    scipy computes the flow in whole numbers, from capacities that are rounded to multiples of 2^-20.

    Args:
        attention, heads, residual: as in `rollout`.
        query: the token after the last layer; -1 is the last.
        keys: the tokens of the input, one or several; None for all. With 197 tokens and 12 layers one token takes
            10 to 20 ms and all take 2 to 4 s on one core of a CPU.

    Returns:
        (batch, keys), or (batch,) for one key: 0 to 1, on the device of the last layer. The network of one image is in
        memory, with layers x N x N edges.

    Raises:
        ImportError: scipy is not installed.
        ValueError, IndexError: as in `rollout`; or there is no such key.
    """
    try:
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import maximum_flow
    except ImportError as error:
        raise ImportError("attention_flow needs scipy, which computes maximum flows: pip install scipy") from error
    read = layers_of(attention)
    maps = read.layers
    check_heads(heads)
    check_residual(residual)
    check_tokens(maps, "an attention flow")
    last, depth = maps[-1], len(maps)
    batch, _, tokens, _ = last.shape
    try:
        source = int(last.query_indices(operator.index(query))[0])
    except TypeError:
        raise TypeError(f"query={query!r}: pass the number of one token, an attention flow has one query") from None
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
    flows = flows.clamp(max=1).to(last.device)  # more is rounding: the row of the query sums to one
    return like_input(flows[:, 0] if _is_one_token(keys) else flows, read.are_arrays)


@without_autograd
def gradient_rollout(
    attention: Any,
    query: int | Sequence[int] | Tensor | None = None,
    *,
    gradients: Any = None,
    residual: float = 0.5,
) -> Any:
    """How much each token of the input flows into a query in favour of one output: a rollout weighted by gradients.

    >>> import torch
    >>> from visualizer import analysis, attention
    >>> from visualizer.models import VisionTransformer
    >>> model = VisionTransformer(patch=4, width=8, depth=2, heads=2, hidden=16, grid=3, classes=10)
    >>> with attention(model, gradients=True) as maps:
    ...     logits = model(torch.randn(1, 3, 12, 12))
    >>> logits[:, 7].sum().backward()
    >>> analysis.gradient_rollout(maps, query=0).shape
    torch.Size([1, 10])

    `rollout` with relu(mean_h(A_h * dA_h)) in place of the mean of the heads, where dA is the gradient of the output by
    the weights. The size of the gradients counts: where they are small beside the residual connection, a row stays
    near the token itself. Compare the patches with each other, and leave the query's own entry out.

    Args:
        attention, query, gradients: as in `relevance`, which raises the same errors.
        residual: the share of the residual connection, from 0 to 1.

    Returns:
        Of the shapes of `relevance`. Rows sum to one.
    """
    check_residual(residual)
    maps, grads, are_arrays = _stitched(*with_gradients(attention, gradients))
    check_tokens(maps, "a rollout", may_merge=True)

    def mixed(number: int) -> Rows:
        layer, grad = maps[number], grads[number]
        return lambda queries: _with_residual((layer.rows(queries) * grad(queries)).mean(1).relu_(), queries, residual)

    return _from_the_last(maps, query, are_arrays, mixed)


@without_autograd
def relevance(attention: Any, query: int | Sequence[int] | Tensor | None = None, *, gradients: Any = None) -> Any:
    """How relevant each token of the input is to one output of the model, by attention and its gradients.

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
    R <- R + Â R, where Â = mean_h relu(dA_h * A_h) and dA is the gradient of the output by the weights. Read the row of
    the token that the output is computed from, without that token itself: [0, 1:] for a class token; the row of the
    last token in a language model.

    A rollout has no question; here the question is the output at which the backward pass began, and each head counts by
    what it did for that output. Nothing is normalised: compare the numbers within one picture, not between pictures.

    The product starts at the last layer with the rows of the chosen queries, r <- r + r Â, and computes only those rows
    of maps and gradients that count.

    Args:
        attention: the layers, from the first to the last: maps recorded with `attention(model, gradients=True)`, fused
            or not; or tensors on which `retain_grad()` was called before the backward pass, such as those that
            `capture` keeps with keep="graph"; or any attention together with `gradients`. The backward pass starts at
            one output, summed over the images: `logits[:, target].sum().backward()`.
        query: a token, several, or None for all; -1 is the last.
        gradients: with the shapes and in the order of the maps: the first layer first, though hooks on the backward
            pass run in the opposite order. None: the gradients that belong to the maps.

    Returns:
        (batch, keys) for one query; (batch, chosen queries, keys) for several; (batch, queries, keys) for all; 0 and
        above.

    Raises:
        ValueError: as in `rollout`; or there are no gradients, or they have other shapes.
        RuntimeError: no backward pass has reached a layer.
        IndexError: there is no such query.
    """
    maps, grads, are_arrays = _stitched(*with_gradients(attention, gradients))
    check_tokens(maps, "relevance", may_merge=True)
    return _from_the_last(maps, query, are_arrays, lambda number: _relevant(maps[number], grads[number]), is_added=True)


@without_autograd
def cross_relevance(
    attention: Any,
    streams: Sequence[tuple[str, str] | Sequence[tuple[str, str]]],
    *,
    gradients: Any = None,
) -> dict[tuple[str, str], Any]:
    """How relevant each token is to one output of a model with two streams, such as a text and a picture.

    >>> import torch
    >>> from visualizer import attention
    >>> from visualizer.analysis import cross_relevance
    >>> model = torch.nn.Transformer(16, 2, num_encoder_layers=1, num_decoder_layers=1, batch_first=True).eval()
    >>> with attention(model, gradients=True) as maps:
    ...     y = model(torch.randn(1, 7, 16), torch.randn(1, 5, 16))
    >>> y[:, -1, 3].sum().backward()
    >>> shares = cross_relevance(maps, [("source", "source"), ("target", "target"), ("target", "source")])
    >>> shares["target", "source"][:, -1].shape  # how relevant each word read was to the last word written
    torch.Size([1, 7])

    The rules of Chefer et al. 2021 (https://arxiv.org/abs/2103.15679) for co-attention and for encoder and decoder. The
    queries are of stream s, the keys of stream q. At first R_ss = I and R_sq = 0. With Â = mean_h relu(dA_h * A_h):

    - a layer of self-attention: R_ss <- R_ss + Â R_ss and R_sq <- R_sq + Â R_sq;
    - a layer of cross-attention: R_sq <- R_sq + N(R_ss)^T Â N(R_qq) and R_ss <- R_ss + Â R_qs, where N(R) is
      I + (R - I) with its rows normalised (a row of zeros stays a row of zeros).

    Args:
        attention: the layers in the order in which they ran, with gradients as in `relevance`.
        streams: for each layer the names (stream of the queries, stream of the keys), in the same order. Layers that
            run side by side, so that neither reads what the other writes, stand together in an inner list. The two
            directions of a co-attention layer in LXMERT do so:
            [("text", "text"), ("image", "image"), [("text", "image"), ("image", "text")]].
        gradients: as in `relevance`.

    Returns:
        For each pair of streams (s, q) the relevance of the tokens of q to each token of s: (batch, tokens of s, tokens
        of q), 0 and above. Read the row of the token that the output is computed from. The maps are read some rows at a
        time; the matrices of relevance are whole, one for each pair.

    Raises:
        ValueError: there are not as many pairs as layers, more than two streams, or layers that do not fit them; or
            there are no gradients, or they have other shapes.
        RuntimeError: no backward pass has reached a layer.
    """
    maps, grads, are_arrays = with_gradients(attention, gradients)
    groups: list[list[Any]] = [[group] if _is_pair(group) else list(group) for group in streams]
    pairs = [pair for group in groups for pair in group]
    if len(pairs) != len(maps) or not all(map(_is_pair, pairs)):
        raise ValueError(
            f"streams needs a pair (stream of the queries, stream of the keys) for each of {len(maps)} layers, and has "
            f"{len(pairs)} entries: {few(pairs)}"
        )
    sizes = _sizes(maps, pairs)
    first = maps[0]
    matrices = {
        (s, q): torch.zeros(first.shape[0], sizes[s], sizes[q], dtype=first.dtype, device=first.device)
        for s in sizes
        for q in sizes
    }
    for stream in sizes:
        matrices[stream, stream].diagonal(dim1=1, dim2=2).fill_(1)
    layers = iter(zip(maps, grads, strict=True))
    for group in groups:
        # All that a group adds is computed before any of it is added: its layers do not read each other.
        added: list[tuple[tuple[str, str], Tensor]] = []
        for s, q in group:
            layer, grad = next(layers)
            relevant = _relevant(layer, grad)
            if s == q:
                added += [((s, x), _on_rows(layer, relevant, matrices[s, x])) for x in sizes]
            else:
                through = _on_rows(layer, relevant, _normalised(matrices[q, q]))
                added += [
                    ((s, q), _normalised(matrices[s, s]).to(through.device, through.dtype).mT @ through),
                    ((s, s), _on_rows(layer, relevant, matrices[q, s])),
                ]
        for pair, more in added:
            wide = torch.promote_types(matrices[pair].dtype, more.dtype)
            matrices[pair] = matrices[pair].to(wide) + more.to(first.device)
    return {pair: like_input(matrix, are_arrays) for pair, matrix in matrices.items()}


def _is_pair(entry: Any) -> bool:
    return not isinstance(entry, str) and len(entry) == 2 and all(isinstance(stream, str) for stream in entry)


def _sizes(maps: list[AttentionMap], pairs: list[tuple[str, str]]) -> dict[str, int]:
    """How many tokens each stream has; ValueError where the layers disagree."""
    sizes: dict[str, int] = {}
    for number, (layer, pair) in enumerate(zip(maps, pairs, strict=True)):
        for stream, size, side in zip(pair, layer.shape[2:], ("queries", "keys"), strict=True):
            if sizes.setdefault(stream, size) != size:
                raise ValueError(
                    f"{layer_label(number, layer)} has {size} {side} of the stream {stream!r}, which has "
                    f"{sizes[stream]} tokens in an earlier layer: check the order of streams"
                )
        if layer.shape[0] != maps[0].shape[0]:
            raise ValueError(
                f"{layer_label(number, layer)} has a batch of {layer.shape[0]}, {layer_label(0, maps[0])} of "
                f"{maps[0].shape[0]}"
            )
    if len(sizes) > 2:
        raise ValueError(f"the rules are for one stream or two, not for {len(sizes)}: {', '.join(sizes)}")
    return sizes


def _is_one_token(chosen: Any) -> bool:
    """Whether a token was chosen by its number, so that the result has no axis for it."""
    return isinstance(chosen, int) or getattr(chosen, "ndim", 1) == 0


def _from_the_last(
    maps: list[AttentionMap], query: Any, as_array: bool, matrix: Callable[[int], Rows], is_added: bool = False
) -> Any:
    """Rows of the product of a matrix for each layer, the last layer first; `is_added`: of I + the matrix."""
    last = maps[-1]
    batch, _, tokens, _ = last.shape
    chosen = last.query_indices(slice(None) if query is None else query)
    flow = torch.zeros(batch, len(chosen), tokens, dtype=last.dtype, device=last.device)
    flow[:, torch.arange(len(chosen), device=last.device), chosen] = 1
    for number in reversed(range(len(maps))):
        layer = maps[number]
        flow = flow.to(layer.device, torch.promote_types(flow.dtype, layer.dtype))
        if flow.shape[2] != layer.shape[3]:  # patches that were merged behind this layer
            merged = merged_into(layer.layout, maps[number + 1].layout)
            assert merged is not None
            flow = (flow / merged.bincount().to(flow))[..., merged.to(flow.device)]
        product = _times(layer, flow, matrix(number))
        flow = flow + product if is_added else product
    return like_input(flow[:, 0] if _is_one_token(query) else flow, as_array)


def _stitched(
    maps: list[AttentionMap], grads: list[Rows], are_arrays: bool
) -> tuple[list[AttentionMap], list[Rows], bool]:
    """Maps of whole pictures in place of those of windows, and their gradients."""

    def whole(layer: AttentionMap, grad: Rows) -> Rows:
        layout = layer.layout
        if layout is None or layout.windows is None or layout.patches is None:
            return grad
        places = torch.from_numpy(layout.windows.places(*layout.patches.shape))
        return lambda queries: stitched_rows(places, grad, queries)

    return [one.stitched() for one in maps], [*map(whole, maps, grads)], are_arrays


def _mixed_rows(layer: AttentionMap, heads: Reduction, residual: float, discard: float) -> Rows:
    """Rows of Ã: the fused map without its smallest entries, with the residual connection; each row is read once."""
    tokens = layer.shape[3]
    dropped = int(discard * tokens * tokens)
    if not dropped:
        return lambda queries: _with_residual(fused(layer.rows(queries), heads), queries, residual)
    whole = torch.cat([fused(rows, heads) for _, rows in layer.chunks()], 1)
    for image in whole:
        is_small = image < image.flatten().kthvalue(dropped + 1).values
        is_small[:, 0] = False  # the class token
        image.masked_fill_(is_small, 0)
    return lambda queries: _with_residual(whole[:, queries], queries, residual)


def _times(layer: AttentionMap, flow: Tensor, rows: Rows) -> Tensor:
    """flow, (batch, any, tokens), times the matrix whose rows the function gives; only rows that count are made."""
    product = torch.zeros_like(flow)
    wanted = flow.flatten(0, 1).any(0).cpu()
    for part in layer.parts():
        some = wanted[part].nonzero().flatten() + part.start
        if not len(some):
            continue
        chosen = part if len(some) == part.stop - part.start else some.to(layer.device)
        made, shares = rows(chosen).to(flow.dtype), flow[..., chosen]
        if len(flow) > 1:
            # A row that only another image needs may be NaN here, by the gradient of a masked query; 0 x NaN is NaN.
            made = made.masked_fill(~shares.any(1)[..., None], 0)
        product += shares @ made
    return product


def _on_rows(layer: AttentionMap, rows: Rows, right: Tensor) -> Tensor:
    """The matrix whose rows the function gives times another matrix: (batch, queries, any)."""
    right = right.to(layer.device)
    wide = torch.promote_types(right.dtype, layer.dtype)
    return torch.cat([rows(part).to(wide) @ right.to(wide) for part in layer.parts()], 1)


def _relevant(layer: AttentionMap, grad: Rows) -> Rows:
    """Rows of mean_h relu(dA_h * A_h)."""
    return lambda queries: (layer.rows(queries) * grad(queries)).relu_().mean(1)


def _normalised(matrix: Tensor) -> Tensor:
    """I + (R - I) with its rows normalised."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    gained = matrix - identity
    sums = gained.sum(-1, keepdim=True)
    return gained / sums.masked_fill_(sums == 0, 1) + identity


def _with_residual(rows: Tensor, queries: slice | Tensor, residual: float) -> Tensor:
    """Rows of Ã: rows (batch, some queries, tokens) with the residual connection, normalised; in place."""
    places = torch.arange(rows.shape[-1], device=rows.device)[queries]
    rows *= 1 - residual
    rows[:, torch.arange(len(places), device=rows.device), places] += residual
    sums = rows.sum(-1, keepdim=True)
    rows /= sums.masked_fill_(sums == 0, 1)  # a masked row without a residual stays zeros
    return rows


def _capacities(layer: AttentionMap, image: int, heads: Reduction, residual: float) -> tuple[Tensor, Tensor]:
    """The entries of one image's Ã that are not 0: places (2, entries), and multiples of 1 / _UNIT (entries,)."""
    entries = []
    for part in layer.parts():
        rows = _with_residual(fused(layer.rows(part), heads), part, residual)[image].cpu()
        whole = (rows.double() * _UNIT).round().to(torch.int32)
        places = whole.nonzero()
        entries.append((places + torch.tensor([part.start, 0]), whole[places[:, 0], places[:, 1]]))
    return torch.cat([places for places, _ in entries]).T, torch.cat([values for _, values in entries])

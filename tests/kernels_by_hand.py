"""Attention computed plainly, number by number as the kernels' own documentation tells it, and stand-ins made of it.

No mode of torch sees what is computed here, as it sees nothing of a compiled kernel.
"""

from itertools import pairwise

import torch


def weights_of(q, k, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None, sinks=None, chunk=0):
    """The weights of one sequence, (heads, queries, keys), of (queries, heads, width) and (keys, key heads, width)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, heads = q.shape[:2]
    keys = len(k)
    k = k.repeat_interleave(heads // k.shape[1], 1)
    scores = scale * torch.einsum("qhd,khd->hqk", q.double(), k.double())
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    shift = keys - queries
    distance = torch.tensor([[i + shift - j for j in range(keys)] for i in range(queries)]).view(queries, keys)
    if slopes is not None:
        scores = scores - slopes.double().view(-1, 1, 1) * distance.abs()
    left, right = window
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    if causal:
        hidden |= distance < 0
    if chunk:
        hidden |= torch.tensor([[(i + shift) // chunk != j // chunk for j in range(keys)] for i in range(queries)])
    terms = scores.exp().masked_fill(hidden, 0)
    total = terms.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(-1, 1, 1)
    return terms / total.where(total > 0, 1)


def attend(q, k, v, **options):
    """The output for one sequence, (queries, heads, width): weights times values, in the type of the query."""
    with torch._C.DisableTorchFunction():
        weights = weights_of(q, k, **options)
        v = v.double().repeat_interleave(weights.shape[0] // v.shape[1], 1)
        return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def attend_batch(q, k, v, slopes=None, lengths=None, lefts=None, **options):
    """The output for a batch, (batch, queries, heads, width), of keys from `lefts` to `lengths`."""
    with torch._C.DisableTorchFunction():
        rows = []
        for number in range(len(q)):
            used = slice(0 if lefts is None else int(lefts[number]), None if lengths is None else int(lengths[number]))
            own = slopes if slopes is None or slopes.ndim == 1 else slopes[number]
            rows.append(attend(q[number], k[number, used], v[number, used], slopes=own, **options))
        return torch.stack(rows)


def attend_packed(q, k, v, q_ends, k_ends, slopes=None, **options):
    """The output for packed sequences, (queries of all, heads, width); `q_ends` and `k_ends` are pairs."""
    with torch._C.DisableTorchFunction():
        whole = torch.zeros(*q.shape[:2], v.shape[-1], dtype=q.dtype)
        for number, ((start, end), (first, behind)) in enumerate(zip(q_ends, k_ends, strict=True)):
            own = slopes if slopes is None or slopes.ndim == 1 else slopes[number]
            whole[start:end] = attend(q[start:end], k[first:behind], v[first:behind], slopes=own, **options)
        return whole


def pairs(cumulative):
    """[(0, 2), (2, 5)] of the cumulative lengths 0, 2, 5."""
    return [*pairwise(cumulative.tolist())]


def block_diagonal(parts):
    """One map (heads, queries of all, keys of all) of those of several sequences."""
    return torch.stack([torch.block_diag(*(part[head] for part in parts)) for head in range(parts[0].shape[0])])

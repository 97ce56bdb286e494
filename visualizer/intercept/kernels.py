"""Fused attention kernels: for each, a function that says what its arguments and its output are.

A new kernel needs one function here, with the kernel's own signature behind its output, and its name in a table: in
KERNELS if it is torch's, or an operator; in FUNCTIONS if it is a Python function of another library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..maps import Modifiers
from .calls import FusedCall
from .key_intervals import KeyIntervals, ends_of, packed, unpacked


def scaled_dot_product_attention(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedCall:
    """`torch.nn.functional.scaled_dot_product_attention`."""
    if query.is_nested:
        return _nested(output, query, key, value, dropout_p, is_causal, scale)
    mask, causal = attn_mask, 0 if is_causal else None
    if type(mask).__name__ == "CausalBias":  # a tensor without numbers: its variant says what it means
        lower = mask.variant.name == "LOWER_RIGHT"
        mask, causal = None, key.shape[-2] - query.shape[-2] if lower else 0
    return FusedCall(output, query, key, value, scale, mask, causal, dropout_p)


def _nested(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float | None
) -> FusedCall:
    """A call with nested tensors, (batch, heads, ragged, width), as one of packed sequences."""
    queries, keys = (
        torch.tensor([0, *(part.shape[1] for part in tensor.unbind())], device=query.device).cumsum(0)
        for tensor in (query, key)
    )
    places = packed(ends_of(queries, keys), int(queries[-1]), is_from_end=False)
    modifiers = Modifiers(spans=places.spans(-1, 0 if is_causal else -1), sequences=places.ends)
    call = _arranged_call(_joined, output, query, key, value, has_heads=True)
    return replace(call, scale=scale, dropout=dropout, modifiers=modifiers)


def _arranged_call(
    arranged: Callable[[Tensor], Tensor], returned: Tensor, query: Tensor, key: Tensor, value: Tensor, has_heads: bool
) -> FusedCall:
    """A call whose tensors have other axes; `arranged` gives them those of a FusedCall."""
    tensors = arranged(returned), arranged(query), arranged(key), arranged(value)
    return FusedCall(*tensors, has_heads=has_heads, returned=returned, as_output=arranged)


def _joined(nested: Tensor) -> Tensor:
    return torch.cat(nested.unbind(), 1)[None]


def _scaled_dot_product_flash_attention(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> FusedCall:
    """The operator of that name, and the one of the same name for CPUs."""
    return scaled_dot_product_attention(output[0], query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def _scaled_dot_product_efficient_attention(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> FusedCall:
    """The operator of that name, and the one that calls cuDNN."""
    return scaled_dot_product_attention(output[0], query, key, value, attn_bias, dropout_p, is_causal, scale=scale)


def _scaled_dot_product_attention_math(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> FusedCall:
    """The operator of that name."""
    dropout = dropout_p if dropout_mask is None else 1.0
    return scaled_dot_product_attention(output[0], query, key, value, attn_mask, dropout, is_causal, scale=scale)


def _varlen_attn(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> FusedCall:
    """`torch.nn.attention.varlen.varlen_attn`, as the operator that it calls."""
    return flash_attn_varlen_func(
        output,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        seqused_k=seqused_k,
        block_table=block_table,
        softmax_scale=scale,
        causal=is_causal,
        window_size=window_size or (-1, -1),
    )


def _varlen_attn_out(lse: Any, out: Tensor, *args: Any, **kwargs: Any) -> FusedCall:
    """`torch.nn.attention.varlen.varlen_attn_out`, which writes its output into a tensor that it is given."""
    return _varlen_attn(out, *args, **kwargs)


def flex_attention(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: tuple[Any, ...],
    scale: float | None,
    kernel_options: Any = None,
    score_mod_buffers: tuple[Any, ...] = (),
    mask_mod_buffers: tuple[Any, ...] = (),
) -> FusedCall:
    """`torch.nn.attention.flex_attention`, as the operator that it calls."""
    mask_mod = block_mask[-1] if block_mask else None
    return FusedCall(
        output[0],
        query,
        key,
        value,
        scale,
        score_mod=_with_buffers(score_mod, score_mod_buffers),
        mask_mod=_with_buffers(mask_mod, mask_mod_buffers),
    )


def _with_buffers(function: Callable[..., Tensor] | None, buffers: tuple[Any, ...]) -> Callable[..., Tensor] | None:
    """A function of flex_attention with the tensors bound that are passed beside it; None for torch's stand-in."""
    if function is None or function.__name__ in ("_identity", "noop_mask"):  # in place of no function
        return None
    return (lambda *args: function(*args, *buffers)) if buffers else function


def flash_attn_func(output: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> FusedCall:
    """`flash_attn.flash_attn_func`: query, key and value are (batch, tokens, heads, width)."""
    return _flash(output, q, k, v, None, **options)


def flash_attn_qkvpacked_func(output: Any, qkv: Tensor, num_heads_q: int | None = None, **options: Any) -> FusedCall:
    """(batch, tokens, 3, heads, width), or flash attention 3's (batch, tokens, heads of all three, width)."""
    if num_heads_q is None:
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = qkv.tensor_split((num_heads_q, (qkv.shape[2] + num_heads_q) // 2), 2)
    return _flash(output, q, k, v, None, **options)


def flash_attn_kvpacked_func(output: Any, q: Tensor, kv: Tensor, **options: Any) -> FusedCall:
    """Key and value are (batch, tokens, 2, heads, width)."""
    k, v = kv.unbind(2)
    return _flash(output, q, k, v, None, **options)


def flash_attn_varlen_func(
    output: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    page_table: Tensor | None = None,
    **options: Any,
) -> FusedCall:
    """`flash_attn.flash_attn_varlen_func`: packed sequences, (tokens of all, heads, width), or pages of a cache."""
    table = page_table if block_table is None else block_table
    if cu_seqlens_q is None:  # a batch, of which the keys in use may differ
        return flash_attn_with_kvcache(output, q, k, v, cache_seqlens=seqused_k, block_table=table, **options)
    starts, lengths = cu_seqlens_k, seqused_k
    if table is not None:
        k, v = _paged(k, table), _paged(v, table)
        lengths = cu_seqlens_k.diff() if lengths is None and cu_seqlens_k is not None else lengths
        starts = None
    if k.ndim == 4:  # each sequence has room for the same number of keys
        starts = k.shape[1] * torch.arange(len(k) + 1, device=k.device)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    ends = ends_of(cu_seqlens_q, cu_seqlens_q if starts is None else starts, lengths)
    if seqused_q is not None:
        ends[:, 1] = ends[:, 0] + seqused_q
    return _flash(output, q, k, v, packed(ends, len(q)), **options)


def flash_attn_varlen_qkvpacked_func(output: Any, qkv: Tensor, cu_seqlens: Tensor, **options: Any) -> FusedCall:
    """(tokens of all, 3, heads, width)."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(output, q, k, v, cu_seqlens, cu_seqlens, **options)


def flash_attn_varlen_kvpacked_func(output: Any, q: Tensor, kv: Tensor, **options: Any) -> FusedCall:
    """Key and value are (tokens of all, 2, heads, width)."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(output, q, k, v, **options)


def flash_attn_with_kvcache(
    output: Any,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    **options: Any,
) -> FusedCall:
    """`flash_attn.flash_attn_with_kvcache`, behind which the cache has the new keys too; queries may be packed."""
    table = page_table if block_table is None else block_table
    if table is not None:
        k_cache, v_cache = _paged(k_cache, table), _paged(v_cache, table)
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx.long()], v_cache[cache_batch_idx.long()]
    lengths = cache_seqlens
    if isinstance(lengths, int):
        lengths = torch.full((len(k_cache),), lengths, device=q.device)
    if lengths is not None and k is not None:
        lengths = lengths + (k.shape[1] if cu_seqlens_k_new is None else cu_seqlens_k_new.diff())
    if cu_seqlens_q is not None:
        return flash_attn_varlen_func(output, q, k_cache, v_cache, cu_seqlens_q, seqused_k=lengths, **options)
    if lengths is None and cache_leftpad is None:
        return _flash(output, q, k_cache, v_cache, None, **options)
    places = unpacked(q.shape[1], k_cache.shape[1], q.device, cache_leftpad, lengths)
    return _flash(output, q, k_cache, v_cache, places, **options)


def _paged(cache: Tensor, table: Tensor) -> Tensor:
    """(pages, tokens, heads, width) as (batch, tokens, heads, width), by a table of each one's pages."""
    return cache[table.long().clamp_min(0)].flatten(1, 2)


def _flash(
    output: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: KeyIntervals | None,
    *,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window_size: Sequence[int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    **others: Any,
) -> FusedCall:
    """What flash attention's functions have in common.

    An option that is not named here changes no weights, or the proof refuses the map.

    Args:
        places: None: the last query stands at the last key, and all keys are in use.
    """
    returned = output[0] if isinstance(output, (tuple, list)) else output
    arranged = _heads_first if q.ndim == 4 else _packed_heads_first
    call = _arranged_call(arranged, returned, q, k, v, has_heads=True)
    queries, keys = call.query.shape[2], call.key.shape[2]
    left, right = (-1 if bound is None else bound for bound in window_size or (-1, -1))
    modifiers, offset = Modifiers(softcap=softcap or 0.0), None
    right = 0 if causal else right
    if attention_chunk:
        places = (unpacked(queries, keys, q.device) if places is None else places).chunks(attention_chunk)
    if places is None and left < 0 and right <= 0:
        offset = None if right < 0 else keys - queries
    else:
        places = unpacked(queries, keys, q.device) if places is None else places
        modifiers = replace(modifiers, spans=places.spans(left, right), sequences=places.ends)
    if alibi_slopes is not None:
        places = unpacked(queries, keys, q.device) if places is None else places
        slopes = alibi_slopes.reshape(-1, call.query.shape[1], 1, 1)
        if len(slopes) > 1 and places.sequence is not None:
            slopes = slopes[places.sequence, :, 0, 0].T[None, :, :, None]
        modifiers = replace(modifiers, slopes=slopes, places=places.place[:, None, :, None])
    sinks = learnable_sink if s_aux is None else s_aux
    if sinks is not None:
        modifiers = replace(modifiers, sinks=sinks.reshape(1, -1, 1, 1))
    return replace(call, scale=softmax_scale, causal=offset, dropout=dropout_p, modifiers=modifiers)


def _heads_first(tensor: Tensor) -> Tensor:
    """(batch, tokens, heads, width) as (batch, heads, tokens, width)."""
    return tensor.transpose(1, 2)


def _packed_heads_first(tensor: Tensor) -> Tensor:
    """(tokens, heads, width) as (1, heads, tokens, width)."""
    return tensor.transpose(0, 1)[None]


def memory_efficient_attention(
    output: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    **others: Any,
) -> FusedCall:
    """`xformers.ops.memory_efficient_attention`: (batch, tokens, heads, width), without heads, or with grouped ones."""
    returned = output[0] if isinstance(output, (tuple, list)) else output
    arranged = {3: _as_it_is, 4: _heads_first, 5: _groups_first}[query.ndim]
    if query.ndim == 5 and key.stride(3) == value.stride(3) == 0:  # the heads of a group share one of these
        key, value = key[:, :, :, :1], value[:, :, :, :1]
    call = _arranged_call(arranged, returned, query, key, value, has_heads=query.ndim > 3)
    call = replace(call, scale=scale, dropout=p)
    if isinstance(attn_bias, Tensor):
        return replace(call, mask=attn_bias.flatten(1, 2) if attn_bias.ndim == 5 else attn_bias)
    return call if attn_bias is None else _with_bias(call, attn_bias)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _groups_first(tensor: Tensor) -> Tensor:
    """(batch, tokens, groups, heads of each, width) as (batch, heads, tokens, width)."""
    return tensor.flatten(2, 3).transpose(1, 2)


def _with_bias(call: FusedCall, bias: Any) -> FusedCall:
    """The call with what one of xformers' classes adds to the scores."""
    name, own = type(bias).__name__, getattr(bias, "_bias", None)
    queries, keys, device = call.query.shape[-2], call.key.shape[-2], call.query.device
    window, is_paged = getattr(bias, "_window_size", None), hasattr(bias, "block_tables")
    is_known = name.startswith(("LowerTriangular", "LocalAttention", "BlockDiagonal")) and not is_paged
    if not is_known:
        shape = (*call.output.shape[:-2], queries, keys)
        return replace(call, mask=bias.materialize(shape, dtype=call.query.dtype, device=device))
    left, right = getattr(bias, "window_left", -1), getattr(bias, "window_right", -1)
    if "Causal" in name or "LowerTriangular" in name:
        left, right = -1 if window is None else window - 1, 0
    is_from_end = "FromBottomRight" in name or "Keys" in name
    if isinstance(own, Tensor):
        call = replace(call, mask=own.flatten(1, 2) if own.ndim == 5 else own)
    if not hasattr(bias, "q_seqinfo"):
        if left < 0:
            return replace(call, causal=keys - queries if is_from_end else 0)
        places = unpacked(queries, keys, device)
        return replace(call, modifiers=Modifiers(spans=places.spans(left, right)))
    pairs = zip(bias.q_seqinfo.intervals(), bias.k_seqinfo.intervals(), strict=False)
    ends = torch.tensor([[*of_queries, *of_keys] for of_queries, of_keys in pairs], device=device)
    places = packed(ends, queries, is_from_end)
    return replace(call, modifiers=Modifiers(spans=places.spans(left, right), sequences=ends))


def attention_interface(
    output: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    position_ids: Tensor | None = None,
    **others: Any,
) -> FusedCall:
    """A kernel that is registered in transformers' AttentionInterface, and has no function here by its own name.

    Query, key and value are (batch, heads, tokens, width), the output (batch, queries, heads, width). The mask is
    (batch, keys), False for padding, as flash attention has it; or (batch, heads or 1, queries, keys), and then it says
    everything. Otherwise the module's `is_causal` counts: the last query sees the last key. Sequences are packed where
    their lengths are given, or where the positions of a batch of one begin again.
    """
    returned = output[0] if isinstance(output, tuple) else output
    options: dict[str, Any] = {"softmax_scale": scaling, "dropout_p": dropout, "softcap": softcap, "s_aux": s_aux}
    mask, queries, keys = attention_mask, query.shape[2], key.shape[2]
    if mask is None and cu_seq_lens_q is None and position_ids is not None:
        cu_seq_lens_q = cu_seq_lens_k = _restarts(position_ids, query)
    q, k, v = map(_heads_first, (query, key, value))
    if mask is not None and mask.ndim == 4:
        call = _flash(returned, q, k, v, None, **options)
        return replace(call, mask=_with_numbers(mask[..., :keys], position_bias))
    options["causal"] = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if sliding_window is not None:
        options["window_size"] = sliding_window - 1, sliding_window - 1
    if mask is not None:
        is_token = mask[:, :keys] != 0
        places = _padded(is_token, queries, returned)
        call = _flash(returned, q, k, v, places, **options)
        is_token = torch.nn.functional.pad(is_token, (0, keys - is_token.shape[1]))
        return replace(call, mask=_with_numbers(is_token[:, None, None], position_bias))
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return replace(_flash(returned, q, k, v, None, **options), mask=position_bias)
    ends = ends_of(cu_seq_lens_q, cu_seq_lens_k)
    returned_flat, q, k, v = (tensor.flatten(0, 1) for tensor in (returned, q, k, v))
    call = _flash(returned_flat, q, k, v, packed(ends, len(q)), **options)
    return replace(call, returned=returned, as_output=lambda tensor: _packed_heads_first(tensor.flatten(0, 1)))


def _restarts(position_ids: Tensor, query: Tensor) -> Tensor | None:
    """Where the sequences begin that are packed into a batch of one, and where the last ends; None if it is one."""
    if len(query) > 1 or query.shape[2] == 1 or position_ids.shape != (1, query.shape[2]):
        return None
    positions = position_ids[0]
    starts = (positions == positions.min()).nonzero().flatten()
    return None if len(starts) < 2 else torch.cat([starts, starts.new_tensor([len(positions)])])


def _padded(is_token: Tensor, queries: int, output: Tensor) -> KeyIntervals:
    """The places of queries that may be padding; (batch, keys) says which keys are not."""
    keys = is_token.shape[1]
    places = unpacked(queries, keys, is_token.device)
    if queries == 1:
        last = (is_token * torch.arange(keys, device=is_token.device)).amax(1)
        return replace(places, place=last[:, None])
    # Flash attention returns zeros for padding, other kernels may return what it would attend to.
    is_zero = (output == 0).flatten(2).all(-1)
    has_none = is_zero & ~is_token[:, keys - queries :]
    return replace(places, behind=places.behind.where(~has_none, 0))


def _with_numbers(mask: Tensor, numbers: Tensor | None) -> Tensor:
    """A mask, with numbers that are added to the scores."""
    if numbers is None:
        return mask
    numbers = numbers[..., : mask.shape[-1]]
    return numbers.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask + numbers


KERNELS: dict[str, Callable[..., FusedCall]] = {
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "flex_attention": flex_attention,
    "_scaled_dot_product_flash_attention": _scaled_dot_product_flash_attention,
    "_scaled_dot_product_flash_attention_for_cpu": _scaled_dot_product_flash_attention,
    "_scaled_dot_product_efficient_attention": _scaled_dot_product_efficient_attention,
    "_scaled_dot_product_cudnn_attention": _scaled_dot_product_efficient_attention,
    "_scaled_dot_product_attention_math": _scaled_dot_product_attention_math,
    "_varlen_attn": _varlen_attn,
    "_varlen_attn_out": _varlen_attn_out,
}
"""By their names, functions of torch and operators, which a mode of torch sees. Arguments come as they were passed."""

FUNCTIONS: dict[str, Callable[..., FusedCall]] = {
    "flash_attn_func": flash_attn_func,
    "flash_attn_qkvpacked_func": flash_attn_qkvpacked_func,
    "flash_attn_kvpacked_func": flash_attn_kvpacked_func,
    "flash_attn_varlen_func": flash_attn_varlen_func,
    "flash_attn_varlen_qkvpacked_func": flash_attn_varlen_qkvpacked_func,
    "flash_attn_varlen_kvpacked_func": flash_attn_varlen_kvpacked_func,
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
    "memory_efficient_attention": memory_efficient_attention,
}
"""By their names, Python functions of other libraries, in whichever module. Arguments come by their names, for these
and what they mean stay the same from version to version, and their order does not."""

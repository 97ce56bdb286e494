"""Attention maps: the weights themselves, or the query and key that they can be computed from, part by part.

A fused kernel never makes its N x N weights, and neither need we: each row is softmax(scale * q_i . K^T + bias), so
whatever reads a map row by row (a rollout, an entropy, the best keys of each query) runs in the memory of some rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**23
"""Bytes of the rows that are computed at a time, where nothing else is said: what stays in a processor's cache."""
_SMALL = 2**20  # of weights that are there already: what is made of them stays in the innermost cache

_P = ParamSpec("_P")
_T = TypeVar("_T")


def exactly(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function without autograd and autocast: inside a model's forward pass they would hold on to the rows that it
    computes, or make them of half precision."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


class AttentionMap:
    """The attention weights of one call, shape (batch, heads, queries, keys), made as far as they are asked for.

    >>> import torch
    >>> from visualizer import AttentionMap
    >>> weights = torch.randn(1, 2, 5, 5).softmax(-1)
    >>> AttentionMap(weights)                      # what you have got already: a tensor or an array
    <AttentionMap (1, 2, 5, 5), dense, float32, cpu>
    >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    >>> fused = AttentionMap.from_query_key(q, k)  # what a fused kernel is given
    >>> torch.allclose(fused.rows([3]), (q[:, :, [3]] @ k.mT / 8**0.5).softmax(-1))
    True

    Both kinds give the same answers. What they give is detached, on the device of the map, float32 for half types and
    otherwise of the type of the weights or of query and key.
    """

    path: str
    """The path of the module that attended; "" for the model itself, or where it is not known."""
    kind: str | None
    """"self", "cross" or "window" (its batch is images x windows), where the call told; else None."""

    def __init__(self, weights: Tensor | np.ndarray[Any, Any], *, path: str = "", kind: str | None = None) -> None:
        if isinstance(weights, np.ndarray):
            # torch knows neither read-only memory nor steps backwards.
            is_plain = weights.flags.writeable and min(weights.strides, default=0) >= 0
            weights = torch.from_numpy(weights if is_plain else weights.copy())
        if not isinstance(weights, Tensor):
            raise TypeError(f"an AttentionMap is made of a tensor or an array, not of {type(weights).__name__}")
        if weights.ndim != 4:
            raise ValueError(
                f"weights have the shape (batch, heads, queries, keys), and these have {tuple(weights.shape)}"
            )
        self._source: _Weights | _Factors = _Weights(weights.detach())
        self.path, self.kind = path, kind
        self._gradient: _Gradient | None = None

    @classmethod
    def from_query_key(
        cls,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        path: str = "",
        kind: str | None = None,
    ) -> AttentionMap:
        """The map softmax(scale * query . key^T + mask), as `F.scaled_dot_product_attention` reads its arguments.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)  # two query heads for each key head
        >>> AttentionMap.from_query_key(q, k, is_causal=True).dense()[0, 0, 0]
        tensor([1., 0., 0., 0., 0.])

        Args:
            query: (batch, heads, queries, width).
            key: (batch, key heads, keys, width); the heads are a multiple of the key heads, and consecutive heads
                share one.
            scale: None: 1 / sqrt(width).
            mask: broadcasts to (batch, heads, queries, keys): bool, True where attention is allowed; or numbers that
                are added to the scores. A query that may attend to nothing has a row of zeros.
            is_causal: query i sees the keys 0 to i.
            path, kind: as the attributes.
        """
        for name, tensor in (("query", query), ("key", key)):
            if tensor.ndim != 4:
                raise ValueError(f"{name} has the shape (batch, heads, tokens, width), this one {tuple(tensor.shape)}")
        if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3] or query.shape[0] != key.shape[0]:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit")
        offset = 0 if is_causal else None
        return cls._of(_Factors(query.detach(), _Keys(key.detach()), key.shape[2], scale, mask, offset), path, kind)

    @classmethod
    def _of(cls, source: _Weights | _Factors, path: str, kind: str | None) -> AttentionMap:
        made = cls.__new__(cls)
        made._source, made.path, made.kind, made._gradient = source, path, kind, None
        return made

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        return self._source.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of what the map gives: float64 for float64, else float32."""
        return _working(self._source.dtype)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self._source.device

    @property
    def is_dense(self) -> bool:
        """Whether the weights are there already; else they are computed each time."""
        return isinstance(self._source, _Weights)

    @property
    def nbytes(self) -> int:
        """The bytes that it holds, a mask and keys that it shares with other maps included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    def rows(self, queries: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The weights of some queries only: (batch, heads, chosen queries, keys).

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> AttentionMap(torch.eye(4).expand(1, 1, 4, 4)).rows([2])
        tensor([[[[0., 0., 1., 0.]]]])

        `queries` is one index (which keeps the axis, of length 1), several, or a slice; -1 is the last.
        """
        return self._source.rows(self._chosen(queries, self.shape[2], "query"))

    def columns(self, keys: int | slice | Sequence[int] | Tensor) -> Tensor:
        """How much every query attends to some keys: (batch, heads, queries, chosen keys)."""
        chosen = self._chosen(keys, self.shape[3], "key")
        return self.reduce(lambda rows: rows[..., chosen])

    def dense(self) -> Tensor:
        """All weights, (batch, heads, queries, keys): for N tokens N x N numbers a head."""
        if self.is_dense or self._rows_at_once(CHUNK) >= self.shape[2]:
            return self._source.rows(slice(None))
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for queries, rows in self.chunks():
            whole[:, :, queries] = rows
        return whole

    def numpy(self) -> np.ndarray[Any, Any]:
        """All weights as an array on the CPU."""
        return np.asarray(self.dense().cpu().numpy())

    def chunks(self, max_bytes: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time: pairs of which queries they are and the rows, which take at most `max_bytes`.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> attention = AttentionMap(torch.full((1, 2, 3, 4), 0.25))
        >>> [(queries, tuple(rows.shape)) for queries, rows in attention.chunks(max_bytes=64)]
        [(slice(0, 2, None), (1, 2, 2, 4)), (slice(2, 3, None), (1, 2, 1, 4))]

        At least one row of each head comes at a time. Computing them takes two to three times as much for a moment.
        """
        for chosen in self._parts(max_bytes):
            yield chosen, self._source.rows(chosen)

    def reduce(self, fn: Callable[[Tensor], Tensor], max_bytes: int = CHUNK) -> Tensor:
        """What a function makes of each row, without ever having all: (batch, heads, queries, ...).

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> attention = AttentionMap(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).expand(1, 1, 2, 2))
        >>> attention.reduce(lambda rows: rows.amax(-1))
        tensor([[[0.9000, 0.5000]]])

        Args:
            fn: gets (batch, heads, some queries, keys), gives (batch, heads, those queries, ...).
            max_bytes: as of `chunks`.
        """
        return torch.cat([fn(rows) for _, rows in self.chunks(max_bytes)], 2)

    @exactly
    def row_product(self, r: Tensor) -> Tensor:
        """r^T A, the weights summed over the queries with the shares r: one step of a rollout, without the map.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> attention = AttentionMap(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).expand(1, 1, 2, 2))
        >>> attention.row_product(torch.tensor([[0.5, 0.5]]))
        tensor([[[0.7000, 0.3000]]])

        Args:
            r: (batch, queries), the same for all heads; or (batch, heads or 1, any, queries).

        Returns:
            (batch, heads, keys); or (batch, heads, any, keys). Queries whose shares are 0 are not computed.
        """
        batch, heads, queries, keys = self.shape
        is_plain = r.ndim == 2
        shares = r[:, None, None] if is_plain else r
        fits = shares.ndim == 4 and shares.shape[0] in (1, batch) and shares.shape[1] in (1, heads)
        if not fits or shares.shape[3] != queries:
            raise ValueError(
                f"r has the shape (batch, queries) or (batch, heads, any, queries), here ({batch}, {queries}) or "
                f"({batch}, {heads}, any, {queries}), not {tuple(r.shape)}"
            )
        shares = shares.to(self.device, self.dtype)
        wanted = shares.flatten(0, 2).any(0).nonzero().flatten()
        product = torch.zeros(batch, heads, shares.shape[2], keys, dtype=self.dtype, device=self.device)
        for chosen in self._parts() if len(wanted) == queries else torch.split(wanted, self._rows_at_once(CHUNK)):
            product += shares[..., chosen] @ self._source.rows(chosen)
        return product[:, :, 0] if is_plain else product

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k keys that each query attends to most: (weights, keys), each (batch, heads, queries, k), best first."""
        if not 1 <= k <= self.shape[3]:
            raise ValueError(f"topk takes 1 to {self.shape[3]} keys, not {k}")
        found = [rows.topk(k) for _, rows in self.chunks()]
        return torch.cat([top.values for top in found], 2), torch.cat([top.indices for top in found], 2)

    def grad_rows(self, queries: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The gradient of the loss by the weights of some queries: (batch, heads, chosen queries, keys).

        For a fused call dL/dA = dL/dO . V^T, with the gradient of its output O, so it needs no map either. A backward
        pass must have been run, and recording been started with `attention(model, gradients=True)`.

        Raises:
            RuntimeError: the gradient is not known; the message says why.
        """
        if self._gradient is None:
            raise RuntimeError("no gradients were recorded: use attention(model, gradients=True), with gradients on")
        return self._gradient.rows(self._chosen(queries, self.shape[2], "query"), self.dtype)

    def grad_dense(self) -> Tensor:
        """The gradient of the loss by all weights: (batch, heads, queries, keys); see `grad_rows`."""
        return self.grad_rows(slice(None))

    def to(self, device: torch.device | str) -> AttentionMap:
        """The map on another device."""
        moved = AttentionMap._of(self._source.to(device), self.path, self.kind)
        moved._gradient = None if self._gradient is None else self._gradient.to(device)
        return moved

    def _packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """What a file needs to have it again; `shared` has the keys that several maps begin with, by their _Keys."""
        return {"path": self.path, "kind": self.kind, **self._source.packed(shared)}

    @classmethod
    def _unpacked(cls, packed: dict[str, Any]) -> AttentionMap:
        if "weights" in packed:
            return cls._of(_Weights(packed["weights"]), packed["path"], packed["kind"])
        query, key = packed["query"], packed["key"]
        source = _Factors(query, _Keys(key), packed["length"], packed["scale"], packed["mask"], packed["causal"])
        return cls._of(source, packed["path"], packed["kind"])

    def _tensors(self) -> list[Tensor]:
        return self._source.tensors() + ([] if self._gradient is None else self._gradient.tensors())

    def _rows_at_once(self, max_bytes: int) -> int:
        batch, heads, _, keys = self.shape
        return max(1, max_bytes // max(1, batch * heads * keys * self.dtype.itemsize))

    def _parts(self, max_bytes: int = CHUNK) -> Iterator[slice]:
        """All queries, as many at a time as have rows of at most `max_bytes`."""
        if self.is_dense and self.device.type == "cpu":
            max_bytes = min(max_bytes, _SMALL)
        return _slices(self.shape[2], self._rows_at_once(max_bytes))

    def _chosen(self, chosen: int | slice | Sequence[int] | Tensor, count: int, what: str) -> slice | Tensor:
        if isinstance(chosen, slice):
            if chosen.step is None or chosen.step > 0:
                return chosen
            chosen = list(range(*chosen.indices(count)))
        if chosen is None or isinstance(chosen, str):
            raise TypeError(f"a {what} is told by its number, not by {chosen!r}")
        index = torch.as_tensor(chosen, device=self.device).reshape(-1)
        if index.dtype == torch.bool and len(index) == count:
            index = index.nonzero().flatten()
        if len(index) and (index.is_floating_point() or index.dtype == torch.bool):
            raise TypeError(f"a {what} is an integer, not {index.dtype}")
        index = index.long()  # torch takes 8-bit numbers for a mask
        wrong = index[(index < -count) | (index >= count)]
        if len(wrong):
            plural = "queries" if what == "query" else "keys"
            raise IndexError(f"there is no {what} {int(wrong[0])}: the map has {count} {plural}")
        return index % count

    def __repr__(self) -> str:
        place = f" of {self.path!r}" if self.path else ""
        kind = f", {self.kind}" if self.kind else ""
        how = "dense" if self.is_dense else "from query and key"
        dtype = str(self._source.dtype).removeprefix("torch.")
        return f"<AttentionMap{place} {self.shape}{kind}, {how}, {dtype}, {self.device}>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.numpy(), dtype=dtype)


def _working(dtype: torch.dtype) -> torch.dtype:
    """The type that weights are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Weights:
    """A map whose weights are there."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        batch, heads, queries, keys = weights.shape
        self.shape = batch, heads, queries, keys
        self.dtype, self.device = weights.dtype, weights.device

    def rows(self, queries: slice | Tensor) -> Tensor:
        return self._weights[:, :, queries].to(_working(self.dtype))

    def tensors(self) -> list[Tensor]:
        return [self._weights]

    def to(self, device: torch.device | str) -> _Weights:
        return _Weights(self._weights.to(device))

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        return {"weights": self._weights}


class _Keys:
    """The keys of a call, or of all calls up to now where a cache grows: each has the beginning of a common buffer."""

    def __init__(self, keys: Tensor) -> None:
        self.buffer, self.length = keys, keys.shape[2]

    def first(self, length: int) -> Tensor:
        return self.buffer[:, :, :length]

    def begins(self, keys: Tensor) -> bool:
        """Whether these keys go on from those that are known."""
        batch, heads, length, width = keys.shape
        fits = self.buffer.dtype == keys.dtype and self.buffer.device == keys.device and length >= self.length
        return (
            fits
            and (batch, heads, width) == (*self.buffer.shape[:2], self.buffer.shape[3])
            and torch.equal(keys[:, :, : self.length], self.first(self.length))
        )

    def grow(self, keys: Tensor) -> int:
        """Take in the keys behind those that are known; the bytes that this took."""
        length, before = keys.shape[2], self.buffer.shape[2]
        if length > before:
            batch, heads, _, width = keys.shape
            larger = keys.new_empty(batch, heads, max(length, before + before // 2 + 16), width)
            larger[:, :, : self.length] = self.first(self.length)
            self.buffer = larger
        self.buffer[:, :, self.length : length] = keys[:, :, self.length :]
        self.length = length
        return (self.buffer.shape[2] - before) * keys[:, :, :1].numel() * keys.element_size()


class _Factors:
    """A map that is softmax(scale * query . key^T + bias).

    `causal` is how many keys beyond its own number a query sees: 0 for the square of a decoder, None for no such bound.
    `score_mod` and `mask_mod` are those of flex_attention: functions of (score, batch, head, query, key) and of
    (batch, head, query, key).
    """

    def __init__(
        self,
        query: Tensor,
        keys: _Keys,
        length: int,
        scale: float | None,
        mask: Tensor | None,
        causal: int | None,
        score_mod: Callable[..., Tensor] | None = None,
        mask_mod: Callable[..., Tensor] | None = None,
    ) -> None:
        self._query, self._keys, self._length = query, keys, length
        self._scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        if mask is not None and mask.requires_grad:  # else the same object, which maps of one mask share in a file too
            mask = mask.detach()
        self._mask, self._causal = mask, causal
        self._score_mod, self._mask_mod = score_mod, mask_mod
        self.shape = query.shape[0], query.shape[1], query.shape[2], length
        self.dtype, self.device = query.dtype, query.device
        self._bias = None
        if mask is not None:
            if mask.ndim > 4:
                raise ValueError(f"a mask broadcasts to (batch, heads, queries, keys), not {tuple(mask.shape)}")
            self._bias = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
            for size, whole in zip(self._bias.shape, self.shape, strict=True):
                if size not in (1, whole):
                    raise ValueError(f"a mask of {tuple(mask.shape)} does not fit a map of {self.shape}")

    @exactly
    def rows(self, queries: slice | Tensor) -> Tensor:
        working = _working(self.dtype)
        query = self._query[:, :, queries].to(working) * self._scale
        key = self._keys.first(self._length).to(working)
        batch, heads, count, width = query.shape
        groups = heads // key.shape[1]
        query = query.reshape(batch, key.shape[1], groups * count, width)  # consecutive heads share a key head
        scores = (query @ key.mT).view(batch, heads, count, self._length)
        may_be_empty = False
        if self._score_mod is not None or self._mask_mod is not None:
            scores, may_be_empty = self._modified(scores, queries), True
        if self._causal is not None:
            index = torch.arange(self.shape[2], device=self.device)[queries]
            hidden = torch.arange(self._length, device=self.device) > index[:, None] + self._causal
            scores.masked_fill_(hidden, -math.inf)
            may_be_empty |= self._causal < 0
        if self._bias is not None:
            bias = self._bias if self._bias.shape[2] == 1 else self._bias[:, :, queries]
            if bias.dtype == torch.bool:
                scores.masked_fill_(~bias, -math.inf)
            else:
                scores += bias
            may_be_empty = True
        empty = scores.amax(-1, keepdim=True) == -math.inf if may_be_empty else None
        torch.softmax(scores, -1, out=scores)  # in place: new memory costs more than the softmax
        return scores if empty is None else scores.masked_fill_(empty, 0)

    def _modified(self, scores: Tensor, queries: slice | Tensor) -> Tensor:
        """The scores after flex_attention's functions, which are written for single numbers."""
        batch, heads, _, keys = scores.shape
        index = torch.arange(self.shape[2], device=self.device)[queries]
        places = [torch.arange(size, device=self.device) for size in (batch, heads)]
        places += [index, torch.arange(keys, device=self.device)]
        for function, is_mask in ((self._score_mod, False), (self._mask_mod, True)):
            if function is None:
                continue
            for axis in (3, 2, 1, 0):
                dims = tuple(0 if place == axis else None for place in range(4))
                function = torch.vmap(function, in_dims=dims if is_mask else (0, *dims))
            if is_mask:
                scores = scores.masked_fill(~function(*places).expand(scores.shape), -math.inf)
            else:
                scores = function(scores, *places)
        return scores

    def tensors(self) -> list[Tensor]:
        return [self._query, self._keys.first(self._length), *([] if self._mask is None else [self._mask])]

    def to(self, device: torch.device | str) -> _Factors:
        keys = _Keys(self._keys.first(self._length).to(device))
        mask = None if self._mask is None else self._mask.to(device)
        rest = self._score_mod, self._mask_mod
        if any(rest) and torch.device(device).type != self.device.type:
            raise ValueError(
                "a map with a score_mod or block_mask cannot move: its functions hold tensors; take dense()"
            )
        return _Factors(self._query.to(device), keys, self._length, self._scale, mask, self._causal, *rest)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        if self._score_mod is not None or self._mask_mod is not None:  # no function goes into a file
            return {"weights": torch.cat([self.rows(part) for part in _slices(self.shape[2], 256)], 2)}
        key = shared.setdefault(id(self._keys), self._keys.first(self._keys.length))
        rest = {"length": self._length, "scale": self._scale, "mask": self._mask, "causal": self._causal}
        return {"query": self._query, "key": key, **rest}


class _Gradient:
    """The gradient of a loss by the weights: that of the output O with the values, or by the weights themselves."""

    def __init__(self, shape: tuple[int, int, int, int], values: Tensor | None, reason: str | None = None) -> None:
        self._shape, self._values, self._reason = shape, values, reason
        self._incoming: Tensor | None = None

    def take(self, incoming: Tensor) -> None:
        """Take what comes back through the output, or the weights; what several passes bring adds up."""
        incoming = incoming.detach()
        self._incoming = incoming.clone() if self._incoming is None else self._incoming + incoming

    @exactly
    def rows(self, queries: slice | Tensor, dtype: torch.dtype) -> Tensor:
        if self._reason is not None:
            raise RuntimeError(self._reason)
        if self._incoming is None:
            raise RuntimeError("the gradient is not known yet: no backward pass has come through this attention call")
        incoming = self._incoming.reshape(*self._shape[:3], -1)[:, :, queries].to(dtype)
        if self._values is None:
            return incoming[..., : self._shape[3]]  # without a sink behind the keys
        values = self._values.to(dtype)
        batch, heads, count, width = incoming.shape
        grouped = incoming.reshape(batch, values.shape[1], heads // values.shape[1] * count, width)
        return (grouped @ values.mT).view(batch, heads, count, values.shape[2])

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self._values, self._incoming) if tensor is not None]

    def to(self, device: torch.device | str) -> _Gradient:
        moved = _Gradient(self._shape, None if self._values is None else self._values.to(device), self._reason)
        moved._incoming = None if self._incoming is None else self._incoming.to(device)
        return moved

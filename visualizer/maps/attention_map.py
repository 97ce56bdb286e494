"""AttentionMap: one face for weights that exist and for weights that are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..layout import Layout
from .gradients import Gradient
from .joined import Block, Joined, JoinedGradient, Source, Stitched, StitchedGradient, unpacked_source
from .sources import Factors, Keys, Weights, computed_in, slices, without_autograd

CHUNK = 2**23
"""Bytes of the rows that are computed at a time by default: they stay in a processor's cache."""
Told = Layout | Callable[[], Layout | None] | None
"""A layout, or what reads it once somebody asks."""
_SMALL_CHUNK = 2**20  # for dense maps on a CPU: results made of so few rows stay in the innermost cache


class AttentionMap:
    """The attention weights of one call, (batch, heads, queries, keys), computed only as far as they are read.

    >>> import torch
    >>> from visualizer import AttentionMap
    >>> weights = torch.randn(1, 2, 5, 5).softmax(-1)
    >>> AttentionMap(weights)                      # of weights that exist, a tensor or an array
    <AttentionMap (1, 2, 5, 5), dense, float32, cpu>
    >>> q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    >>> fused = AttentionMap.from_query_key(q, k)  # of the arguments of a fused kernel
    >>> torch.allclose(fused.rows([3]), (q[:, :, [3]] @ k.mT / 8**0.5).softmax(-1))
    True

    Both give the same answers: detached tensors on the device of the map, float64 for a float64 map and else float32.

    Raises:
        TypeError: `weights` is neither a tensor nor an array, or is complex or sparse.
        ValueError: `weights` has another number of axes than four.
    """

    path: str
    """The path of the module that attended; "" for the model itself, or if it is not known."""
    kind: str | None
    """Where queries and keys come from: "self", one sequence; "cross", two; "joint", two that are joined and attend to
    each other and themselves; "window", one, cut into windows (its batch is images x windows). None: not known."""
    source: Source
    """What the rows come from: the weights, or the query and key that they are computed from; of a deformable
    attention `Samples`, whose `points` and `weights` say where each query looks and how much; of several calls that are
    one attention `Joined`."""
    gradient: Gradient | JoinedGradient | StitchedGradient | None
    """What `grad_rows` reads; None if no gradient was recorded."""
    is_softmax: bool
    """Whether the weights are simply one softmax, or as good as one: no weight is negative and rows sum to one. False
    where they were mixed, subtracted or changed before they were multiplied with the values, or made by a sigmoid."""
    softmaxes: tuple[AttentionMap, ...]
    """The softmaxes that the weights were made of, where they are not simply one. Else ()."""
    joined: dict[str, slice]
    """Of joint attention, which tokens come from which input of the module, by the input's name; else {}."""
    axes_assumed: bool
    """Whether heads and batch could not be told apart by what the model did, and were assumed by their position."""
    key_sample: Tensor | None = None
    """Of weights, a few numbers of each of the keys, (batch, 1, keys, numbers), if these were seen. By them
    `Maps.generated` knows the keys of an earlier step again; of a fused call, by the keys themselves."""
    _layouts: tuple[Told, Told] = (None, None)

    def __init__(self, weights: Tensor | np.ndarray[Any, Any], *, path: str = "", kind: str | None = None) -> None:
        if isinstance(weights, np.ndarray):
            # torch cannot take read-only memory, negative steps, or numbers in another machine's order of bytes.
            is_plain = weights.flags.writeable and min(weights.strides, default=0) >= 0 and weights.dtype.isnative
            weights = torch.from_numpy(weights if is_plain else weights.astype(weights.dtype.newbyteorder("=")))
        if not isinstance(weights, Tensor):
            raise TypeError(f"an AttentionMap is made of a tensor or an array, not of {type(weights).__name__}")
        if weights.is_complex() or weights.layout is not torch.strided:
            what = "complex numbers" if weights.is_complex() else f"the layout {weights.layout}"
            raise TypeError(f"weights are real numbers in a dense tensor, and these have {what}")
        if weights.ndim != 4:
            raise ValueError(
                f"weights have the shape (batch, heads, queries, keys), and these have {tuple(weights.shape)}"
            )
        self.source = Weights(weights.detach())
        self.path, self.kind, self.gradient = path, kind, None
        self.is_softmax, self.softmaxes, self.joined, self.axes_assumed = True, (), {}, False

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
        """The map softmax(scale * query . key^T + mask), with the arguments of `F.scaled_dot_product_attention`.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)  # two query heads for each key head
        >>> AttentionMap.from_query_key(q, k, is_causal=True).dense()[0, 0, 0]
        tensor([1., 0., 0., 0., 0.])

        Args:
            query: (batch, heads, queries, width).
            key: (batch, key heads, keys, width). The heads are a multiple of the key heads; consecutive heads share
                one.
            scale: None: 1 / sqrt(width).
            mask: broadcasts to (batch, heads, queries, keys). Either bool, True where attention is allowed, or numbers
                that are added to the scores. A query that may attend to nothing has a row of zeros.
            is_causal: query i attends to the keys 0 to i only.
            path, kind: see the attributes.

        Raises:
            ValueError: query, key and mask have shapes that do not fit.
        """
        for name, tensor in (("query", query), ("key", key)):
            if tensor.ndim != 4:
                raise ValueError(f"{name} has the shape (batch, heads, tokens, width), this one {tuple(tensor.shape)}")
        if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3] or query.shape[0] != key.shape[0]:
            raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not fit")
        offset = 0 if is_causal else None
        source = Factors(query.detach(), Keys(key.detach()), key.shape[2], scale, mask, offset)
        return cls.from_source(source, path=path, kind=kind)

    @classmethod
    def from_source(
        cls,
        source: Source,
        *,
        path: str = "",
        kind: str | None = None,
        gradient: Gradient | JoinedGradient | StitchedGradient | None = None,
    ) -> AttentionMap:
        """The map of weights, or of query and key, that are prepared already."""
        made = cls.__new__(cls)
        made.source, made.path, made.kind, made.gradient = source, path, kind, gradient
        made.is_softmax, made.softmaxes, made.joined, made.axes_assumed = True, (), {}, False
        return made

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, queries, keys)."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights as they are read: float64 for a float64 map, else float32."""
        return computed_in(self.source.dtype)

    @property
    def device(self) -> torch.device:
        """The device that it lives on."""
        return self.source.device

    @property
    def is_dense(self) -> bool:
        """Whether the weights exist; otherwise each reading computes them."""
        return isinstance(self.source, Weights) or (isinstance(self.source, Joined) and self.source.is_dense)

    @property
    def sequences(self) -> tuple[AttentionMap, ...]:
        """Of each sequence that was packed into one call, its own map, (1, heads, its queries, its keys); else ().

        The map itself then has one batch of all tokens, as the call had, and is zero between the sequences. These are
        views of it.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> AttentionMap(torch.eye(4).expand(1, 1, 4, 4)).sequences
        ()
        """
        sources = self.source.of_sequences() if isinstance(self.source, Factors) else []
        return tuple(AttentionMap.from_source(source, path=self.path, kind=self.kind) for source in sources)

    def stitched(self, layout: Layout | None = None) -> AttentionMap:
        """Of windows the map of the whole picture, (images, heads, patches, patches); any other map as it is.

        >>> import torch
        >>> from visualizer import AttentionMap, Layout
        >>> from visualizer.layout import Windows
        >>> windows = AttentionMap(torch.full((4, 1, 4, 4), 0.25))                 # of 2 x 2 patches each
        >>> windows.stitched(Layout.picture((4, 4), windows=Windows((2, 2)))).shape
        (1, 1, 16, 16)

        Keys outside of a query's window have no weight, and what a query gives to padding is left out. Nothing is
        computed before it is read.

        Args:
            layout: how the windows lie; None: what the map knows.

        Raises:
            ValueError: there are more or fewer windows than those of whole pictures.
        """
        layout = self.layout if layout is None else layout
        if layout is None or layout.windows is None or layout.patches is None:
            return self
        places = torch.from_numpy(layout.windows.places(*layout.patches.shape))
        if self.shape[0] % len(places) or self.shape[3] != places.shape[1]:
            raise ValueError(
                f"{layout} has {len(places)} windows of {places.shape[1]} tokens a picture, and the map has the shape "
                f"{self.shape}, (pictures x windows, heads, tokens, tokens)"
            )
        gradient = None if self.gradient is None else StitchedGradient(self.gradient, places)
        source = Stitched(self.source, places)
        made = AttentionMap.from_source(source, path=self.path, kind="self", gradient=gradient)
        made.is_softmax, made.axes_assumed = self.is_softmax, self.axes_assumed
        made.layout = made.query_layout = replace(layout, windows=None)
        return made

    @property
    def layout(self) -> Layout | None:
        """What the keys are: words, patches of a picture, special tokens, padding. None: not known."""
        return self._read_layouts()[0]

    @layout.setter
    def layout(self, layout: Layout | None) -> None:
        self._layouts = layout, self._layouts[1]

    @property
    def query_layout(self) -> Layout | None:
        """What the queries are; of self-attention the same as the keys."""
        return self._read_layouts()[1]

    @query_layout.setter
    def query_layout(self, layout: Layout | None) -> None:
        self._layouts = self._layouts[0], layout

    def tell_layouts(self, keys: Told, queries: Told) -> None:
        """Say what keys and queries are, by a function if that is still to be read."""
        self._layouts = keys, queries

    def _read_layouts(self) -> tuple[Layout | None, Layout | None]:
        keys, queries = (told() if callable(told) else told for told in self._layouts)
        self._layouts = keys, queries
        return keys, queries

    def __getstate__(self) -> dict[str, Any]:
        self._read_layouts()  # functions are neither copied nor pickled
        return vars(self)

    @property
    def may_lack_weight(self) -> bool:
        """Whether its rows need not sum to 1: they are no softmax, or what windows gave to padding is left out."""
        return not self.is_softmax or (isinstance(self.source, Stitched) and self.source.has_padding)

    def described_as(self, other: AttentionMap) -> AttentionMap:
        """This map, with what is known of the tokens of another one of the same tokens."""
        self._layouts = other._layouts
        return self

    @property
    def nbytes(self) -> int:
        """The bytes that it holds, with a mask and keys that it shares with other maps."""
        tensors = self.source.tensors() + ([] if self.gradient is None else self.gradient.tensors())
        tensors += [] if self.key_sample is None else [self.key_sample]
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return own + sum(part.nbytes for part in self.softmaxes)

    def rows(self, queries: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The weights of some queries only: (batch, heads, chosen queries, keys).

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> AttentionMap(torch.eye(4).expand(1, 1, 4, 4)).rows([2])
        tensor([[[[0., 0., 1., 0.]]]])

        `queries` is one index (its axis stays, of length 1), several, or a slice; -1 is the last.

        Raises:
            IndexError: there is no such query.
            TypeError: `queries` is not made of integers.
        """
        return self.source.rows(self._indices(queries, self.shape[2], "query"))

    def columns(self, keys: int | slice | Sequence[int] | Tensor) -> Tensor:
        """How much every query attends to some keys: (batch, heads, queries, chosen keys)."""
        chosen = self._indices(keys, self.shape[3], "key")
        if isinstance(self.source, Factors) and isinstance(chosen, Tensor):
            made = self.source.columns(chosen)
            if made is not None:
                return made
        return self.reduce(lambda rows: rows[..., chosen])

    def dense(self) -> Tensor:
        """All weights, (batch, heads, queries, keys): N x N numbers a head for N tokens."""
        if self.is_dense or self._rows_at_once(CHUNK) >= self.shape[2]:
            return self.source.rows(slice(None))
        whole = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for queries, rows in self.chunks():
            whole[:, :, queries] = rows
        return whole

    def numpy(self) -> np.ndarray[Any, Any]:
        """All weights as an array on the CPU."""
        return np.asarray(self.dense().cpu().numpy())

    def chunks(self, max_bytes: int = CHUNK) -> Iterator[tuple[slice, Tensor]]:
        """All rows, some at a time: pairs of a slice of the queries and their rows, of at most `max_bytes`.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> attention = AttentionMap(torch.full((1, 2, 3, 4), 0.25))
        >>> [(queries, tuple(rows.shape)) for queries, rows in attention.chunks(max_bytes=64)]
        [(slice(0, 2, None), (1, 2, 2, 4)), (slice(2, 3, None), (1, 2, 1, 4))]

        A chunk has at least one row of each head. Computing it takes two to three times its memory for a moment.
        """
        for queries in self.parts(max_bytes):
            yield queries, self.source.rows(queries)

    def parts(self, max_bytes: int = CHUNK) -> Iterator[slice]:
        """All queries in slices whose rows take at most `max_bytes`; `chunks` without the rows."""
        if self.is_dense and self.device.type == "cpu":
            max_bytes = min(max_bytes, _SMALL_CHUNK)
        return slices(self.shape[2], self._rows_at_once(max_bytes))

    def reduce(self, fn: Callable[[Tensor], Tensor], max_bytes: int = CHUNK) -> Tensor:
        """What a function makes of each row, without all rows at once: (batch, heads, queries, ...).

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> attention = AttentionMap(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).expand(1, 1, 2, 2))
        >>> attention.reduce(lambda rows: rows.amax(-1))
        tensor([[[0.9000, 0.5000]]])

        Args:
            fn: takes (batch, heads, some queries, keys), returns (batch, heads, those queries, ...).
            max_bytes: of the rows that `fn` takes at a time, as in `chunks`.
        """
        return torch.cat([fn(rows) for _, rows in self.chunks(max_bytes)], 2)

    @without_autograd
    def row_product(self, r: Tensor) -> Tensor:
        """r^T A, the sum of the rows with the weights r: one step of a rollout, without the whole map.

        >>> import torch
        >>> from visualizer import AttentionMap
        >>> attention = AttentionMap(torch.tensor([[0.9, 0.1], [0.5, 0.5]]).expand(1, 1, 2, 2))
        >>> attention.row_product(torch.tensor([[0.5, 0.5]]))
        tensor([[[0.7000, 0.3000]]])

        Args:
            r: (batch, queries), the same for all heads; or (batch, heads or 1, any, queries).

        Returns:
            (batch, heads, keys); or (batch, heads, any, keys). Rows of queries whose r is 0 are not computed.

        Raises:
            ValueError: r has another shape.
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
        for chosen in self.parts() if len(wanted) == queries else torch.split(wanted, self._rows_at_once(CHUNK)):
            product += shares[..., chosen] @ self.source.rows(chosen)
        return product[:, :, 0] if is_plain else product

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k keys that each query attends to most: (weights, keys), each (batch, heads, queries, k), best first.

        Raises:
            ValueError: k is not from 1 to the number of keys.
        """
        if not 1 <= k <= self.shape[3]:
            raise ValueError(f"topk takes 1 to {self.shape[3]} keys, not {k}")
        best = [rows.topk(k) for _, rows in self.chunks()]
        return torch.cat([chunk.values for chunk in best], 2), torch.cat([chunk.indices for chunk in best], 2)

    def grad_rows(self, queries: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The gradient of the loss by the weights of some queries: (batch, heads, chosen queries, keys).

        Record with `attention(model, gradients=True)` and run a backward pass first. For a fused call
        dL/dA = dL/dO . V^T with the gradient of its output O, so this needs no whole map either.

        Raises:
            RuntimeError: the gradient is not known; the message says why.
        """
        if self.gradient is None:
            raise RuntimeError("no gradients were recorded: use attention(model, gradients=True), with gradients on")
        return self.gradient.rows(self._indices(queries, self.shape[2], "query"), self.dtype)

    def grad_dense(self) -> Tensor:
        """The gradient of the loss by all weights: (batch, heads, queries, keys); see `grad_rows`."""
        return self.grad_rows(slice(None))

    def to(self, device: torch.device | str) -> AttentionMap:
        """The map on another device; ValueError if it has functions of flex_attention, which hold tensors."""
        gradient = None if self.gradient is None else self.gradient.to(device)
        moved = AttentionMap.from_source(self.source.to(device), path=self.path, kind=self.kind, gradient=gradient)
        moved.softmaxes = tuple(part.to(device) for part in self.softmaxes)
        moved.is_softmax, moved.joined, moved.axes_assumed = self.is_softmax, self.joined, self.axes_assumed
        moved.key_sample = None if self.key_sample is None else self.key_sample.to(device)
        return moved.described_as(self)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """The map as tensors and numbers, for a file; `shared` has the keys that several maps share."""
        packed = {"path": self.path, "kind": self.kind, **self.source.packed(shared)}
        if self.softmaxes:
            packed["softmaxes"] = [part.packed(shared) for part in self.softmaxes]
        if not self.is_softmax:
            packed["is_softmax"] = False
        if self.joined:
            packed["joined"] = [[name, part.start, part.stop] for name, part in self.joined.items()]
        if self.key_sample is not None:
            packed["key_sample"] = self.key_sample
        for name, layout in (("layout", self.layout), ("query_layout", self.query_layout)):
            if layout is not None and not (name == "query_layout" and layout == self.layout):
                packed[name] = layout.packed()
        if self.layout is not None and self.query_layout == self.layout:
            packed["query_layout"] = "layout"
        return packed | ({"axes_assumed": True} if self.axes_assumed else {})

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> AttentionMap:
        """The map that `packed` was called on, without gradients."""
        made = cls.from_source(unpacked_source(packed), path=packed["path"], kind=packed["kind"])
        made.softmaxes = tuple(map(cls.unpacked, packed.get("softmaxes", ())))
        made.is_softmax = packed.get("is_softmax", not made.softmaxes)
        made.joined = {name: slice(start, stop) for name, start, stop in packed.get("joined", ())}
        made.axes_assumed = packed.get("axes_assumed", False)
        made.key_sample = packed.get("key_sample")
        made.layout, queries = (packed.get(name) for name in ("layout", "query_layout"))
        made.layout = None if made.layout is None else Layout.unpacked(made.layout)
        if queries is not None:
            made.query_layout = made.layout if queries == "layout" else Layout.unpacked(queries)
        return made

    def query_indices(self, queries: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The numbers of some queries, counted from the front: (chosen queries,). Raises as `rows` does."""
        return self._all_indices(queries, self.shape[2], "query")

    def key_indices(self, keys: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The numbers of some keys, counted from the front: (chosen keys,). Raises as `rows` does."""
        return self._all_indices(keys, self.shape[3], "key")

    def _all_indices(self, chosen: int | slice | Sequence[int] | Tensor, count: int, name: str) -> Tensor:
        return torch.arange(count, device=self.device)[self._indices(chosen, count, name)]

    def _rows_at_once(self, max_bytes: int) -> int:
        batch, heads, _, keys = self.shape
        return max(1, max_bytes // max(1, batch * heads * keys * self.dtype.itemsize))

    def _indices(self, chosen: int | slice | Sequence[int] | Tensor, count: int, name: str) -> slice | Tensor:
        if isinstance(chosen, slice):
            if chosen.step is None or chosen.step > 0:
                return chosen
            chosen = list(range(*chosen.indices(count)))
        if chosen is None or isinstance(chosen, str) or (isinstance(chosen, Sequence) and str in map(type, chosen)):
            raise TypeError(f"a {name} is chosen by its number, not by {chosen!r}")
        index = torch.as_tensor(chosen, device=self.device).reshape(-1)
        if index.dtype == torch.bool and len(index) == count:
            index = index.nonzero().flatten()
        if len(index) and (index.is_floating_point() or index.dtype == torch.bool):
            raise TypeError(f"a {name} is an integer, not {index.dtype}")
        index = index.long()  # torch reads 8-bit numbers as a mask
        wrong = index[(index < -count) | (index >= count)]
        if len(wrong):
            plural = "queries" if name == "query" else "keys"
            raise IndexError(f"there is no {name} {int(wrong[0])}: the map has {count} {plural}")
        return index % count

    def __repr__(self) -> str:
        place = f" of {self.path!r}" if self.path else ""
        kind = f", {self.kind}" if self.kind else ""
        how = "dense" if self.is_dense else f"from {self.source.kept}"
        dtype = str(self.source.dtype).removeprefix("torch.")
        count = len(self.softmaxes)
        made = "" if self.is_softmax else f", made of {count or 'no'} softmax" + ("es" if count > 1 else "")
        assumed = ", axes assumed" if self.axes_assumed else ""
        return f"<AttentionMap{place} {self.shape}{kind}, {how}, {dtype}, {self.device}{made}{assumed}>"

    def __getitem__(self, index: Any) -> Tensor:
        """A part of `dense()`, such as ``map[0, 3]``, the first image's head 3. `rows` and `cols` compute no more than
        they return, and this computes the whole map first."""
        return self.dense()[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.dense())

    if not TYPE_CHECKING:  # which would take any attribute for one that there is

        def __getattr__(self, name: str) -> Any:
            hint = ": dense() has its weights as a tensor, numpy() as an array" if hasattr(Tensor, name) else ""
            raise AttributeError(f"an AttentionMap has no {name!r}{hint}", name=name, obj=self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.numpy(), dtype=dtype)


def joined_map(
    maps: Sequence[AttentionMap],
    blocks: Callable[[Sequence[Any]], Sequence[Block]],
    shape: tuple[int, int, int, int],
) -> AttentionMap:
    """The map of several calls that are one attention, with the path and the kind of the first.

    Args:
        blocks: says where in the whole each of the sources lies, or each of their gradients.
        shape: (batch, heads, queries, keys) of the whole.
    """
    first, gradients = maps[0], [one.gradient for one in maps if one.gradient is not None]

    def made_of(parts: Sequence[AttentionMap]) -> AttentionMap:
        source = Joined(blocks([part.source for part in parts]), shape)
        return AttentionMap.from_source(source, path=first.path, kind=first.kind)

    made = made_of(maps)
    made.gradient = JoinedGradient(blocks(gradients), shape) if len(gradients) == len(maps) else None
    made.is_softmax = all(one.is_softmax for one in maps)
    made.axes_assumed = any(one.axes_assumed for one in maps)
    if not made.is_softmax and len({len(one.softmaxes) for one in maps}) == 1:
        for parts in zip(*(one.softmaxes for one in maps), strict=True):
            if all(part.shape == one.shape for part, one in zip(parts, maps, strict=True)):
                made.softmaxes += (made_of(parts),)
    return made

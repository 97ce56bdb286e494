"""Where the rows of a map come from: weights that exist, or the query and key of a fused call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

_COUNTS = 1e-4  # smaller weights change no sum of values by much

P = ParamSpec("P")
T = TypeVar("T")

may_be_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
"""Whether autocast is on for any device: a quick answer, which is nearly always no."""


def without_autograd(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run without autograd and autocast.

    Inside a model's forward pass autograd would keep every row that the function computes, and autocast would compute
    it in half precision.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not (torch.is_grad_enabled() or may_be_autocast()):  # entering them takes longer than a row does
            return function(*args, **kwargs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that the rows of a map of this type are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slices(count: int, size: int) -> Iterator[slice]:
    """0 to `count` in slices of at most `size`."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class Weights:
    """Weights that exist, (batch, heads, queries, keys)."""

    kept = "weights"
    """What is held, in words."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        batch, heads, queries, keys = weights.shape
        self.shape = batch, heads, queries, keys
        self.dtype, self.device = weights.dtype, weights.device

    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries."""
        return self._weights[:, :, queries].to(computed_in(self.dtype))

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [self._weights]

    def to(self, device: torch.device | str) -> Weights:
        """The same on another device."""
        return Weights(self._weights.to(device))

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file."""
        return {"weights": self._weights}


class Keys:
    """The keys of a call, (batch, key heads, keys, width).

    While a model generates, each call has the keys of the call before and some more. Such calls share one buffer that
    grows, and each knows how many of its keys it has.
    """

    def __init__(self, keys: Tensor) -> None:
        self.buffer, self.length = keys, keys.shape[2]

    def first(self, length: int) -> Tensor:
        """The first keys."""
        return self.buffer[:, :, :length]

    def begins(self, keys: Tensor) -> bool:
        """Whether these keys begin with all that are known."""
        batch, heads, length, width = keys.shape
        fits = self.buffer.dtype == keys.dtype and self.buffer.device == keys.device and length >= self.length
        return (
            fits
            and (batch, heads, width) == (*self.buffer.shape[:2], self.buffer.shape[3])
            and torch.equal(keys[:, :, : self.length], self.first(self.length))
        )

    def grow(self, keys: Tensor) -> int:
        """Copy the keys behind those that are known; returns how many bytes larger the buffer is now."""
        length, before = keys.shape[2], self.buffer.shape[2]
        if length > before:
            batch, heads, _, width = keys.shape
            larger = keys.new_empty(batch, heads, max(length, before + before // 2 + 16), width)
            larger[:, :, : self.length] = self.first(self.length)
            self.buffer = larger
        self.buffer[:, :, self.length : length] = keys[:, :, self.length :]
        self.length = length
        return (self.buffer.shape[2] - before) * keys[:, :, :1].numel() * keys.element_size()


@dataclass(frozen=True)
class Modifiers:
    """What kernels such as flash attention do to scores besides a mask. It takes no memory for pairs of tokens.

    Tensors have the axes (batch or 1, heads or 1, queries or 1, ...).
    """

    softcap: float = 0.0
    """Scores become softcap * tanh(score / softcap); 0: they stay."""
    spans: Tensor | None = None
    """(..., 2), integers: a query may attend to the keys from the first number up to the second, which is not one of
    them. So causal attention, windows, padding and packed sequences are all the same."""
    slopes: Tensor | None = None
    """(..., 1), ALiBi: slope * |place - key| is taken off the scores."""
    places: Tensor | None = None
    """(..., 1): the number of the key at which each query stands, for the slopes."""
    sinks: Tensor | None = None
    """(..., 1): one more score for each query, which takes its share of the softmax and has no value."""
    sequences: Tensor | None = None
    """(sequences, 4), where several were packed into one: the first query of each and the one behind its last, the
    first key and the one behind its last."""

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Modifiers:
        """The same with what a function makes of each tensor that has the axes of the map."""
        values = replace(self, sequences=None).packed()
        changed: dict[str, Any] = {name: function(one) for name, one in values.items() if isinstance(one, Tensor)}
        return replace(self, **changed)

    def of_sequence(self, first_query: int, behind_queries: int, first_key: int, behind_keys: int) -> Modifiers:
        """The same of one of the packed sequences."""
        made = replace(self, sequences=None).mapped(lambda one: _rows(one, slice(first_query, behind_queries)))
        spans = None if made.spans is None else (made.spans - first_key).clamp(0, behind_keys - first_key)
        return replace(made, spans=spans, places=None if made.places is None else made.places - first_key)

    def to(self, device: torch.device | str) -> Modifiers:
        """The same on another device."""
        sequences = None if self.sequences is None else self.sequences.to(device)
        return replace(self.mapped(lambda tensor: tensor.to(device)), sequences=sequences)

    def tensors(self) -> list[Tensor]:
        """The tensors that are held."""
        return [value for value in self.packed().values() if isinstance(value, Tensor)]

    def packed(self) -> dict[str, Any]:
        """As tensors and numbers, for a file: those that say something."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor) or value}


def _rows(tensor: Tensor, queries: slice | Tensor) -> Tensor:
    """Some queries of a tensor with the axes of a map, whose third may be of length 1."""
    return tensor if tensor.shape[2] == 1 else tensor[:, :, queries]


class Factors:
    """The query and key of a fused call, whose weights are softmax(scale * query . key^T + mask).

    Args:
        query: (batch, heads, queries, width).
        keys: of which the call has the first `length`.
        scale: None: 1 / sqrt(width).
        mask: bool or numbers, as `F.scaled_dot_product_attention` takes it.
        causal: query i sees the keys 0 to i + causal: 0 for a decoder's square, None for no such bound.
        score_mod, mask_mod: flex_attention's functions of (score, batch, head, query, key) and of
            (batch, head, query, key).
        modifiers: what else happens to the scores; None: nothing.
    """

    kept = "query and key"
    """What is held, in words."""

    def __init__(
        self,
        query: Tensor,
        keys: Keys,
        length: int,
        scale: float | None = None,
        mask: Tensor | None = None,
        causal: int | None = None,
        score_mod: Callable[..., Tensor] | None = None,
        mask_mod: Callable[..., Tensor] | None = None,
        modifiers: Modifiers | None = None,
    ) -> None:
        self._query, self.keys, self._length = query, keys, length
        self._scale = 1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale)
        if mask is not None and mask.requires_grad:  # a mask without a graph stays one object, shared in a file too
            mask = mask.detach()
        self.mask, self._causal = mask, causal
        self._score_mod, self._mask_mod = score_mod, mask_mod
        self._modifiers = Modifiers() if modifiers is None else modifiers
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

    @without_autograd
    def rows(self, queries: slice | Tensor) -> Tensor:
        """The weights of some queries."""
        scores, may_be_empty = self.scores(queries)
        if self._modifiers.sinks is not None:
            sinks = _rows(self._modifiers.sinks, queries).to(scores.dtype).expand(*scores.shape[:3], 1)
            return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]
        empty = scores.amax(-1, keepdim=True) == -math.inf if may_be_empty else None
        torch.softmax(scores, -1, out=scores)  # in place: new memory costs more than the softmax
        return scores if empty is None else scores.masked_fill_(empty, 0)

    @without_autograd
    def columns(self, keys: Tensor) -> Tensor | None:
        """The weights that all queries give to a few keys; None where only rows tell them, or tell them sooner.

        A fused kernel gives them at the cost of one more attention: its output is the weights of those keys whose
        values are the rows of an identity. Values are as wide as queries, for else some kernels make the whole map.
        """
        width = self._query.shape[-1]
        if self.has_functions or self._modifiers.packed() or self._bias is not None or self._causal is not None:
            return None
        if len(keys) > width or self._length < 4 * width:
            return None
        dtype = computed_in(self.dtype)
        key = self.keys.first(self._length).to(dtype)
        key = key.repeat_interleave(self.shape[1] // max(1, key.shape[1]), 1)
        values = torch.zeros(self._length, width, dtype=dtype, device=self.device)
        values[keys, torch.arange(len(keys), device=self.device)] = 1
        values = values.expand(*key.shape[:2], *values.shape)
        made = F.scaled_dot_product_attention(self._query.to(dtype), key, values, scale=self._scale)
        return made[..., : len(keys)]

    def scores(self, queries: slice | Tensor) -> tuple[Tensor, bool]:
        """What the softmax of some queries is taken of, and whether some may attend to nothing."""
        dtype = computed_in(self.dtype)
        query = self._query[:, :, queries].to(dtype) * self._scale
        key = self.keys.first(self._length).to(dtype)
        batch, heads, count, width = query.shape
        groups = heads // max(1, key.shape[1])
        query = query.reshape(batch * key.shape[1], groups * count, width)  # consecutive heads share a key head
        scores = torch.bmm(query, key.flatten(0, 1).mT).view(batch, heads, count, self._length)
        may_be_empty, modifiers = False, self._modifiers
        if modifiers.softcap:
            scores.div_(modifiers.softcap).tanh_().mul_(modifiers.softcap)
        if self.has_functions:
            scores, may_be_empty = self._modified(scores, queries), True
        if modifiers.slopes is not None and modifiers.places is not None:
            distance = (_rows(modifiers.places, queries) - torch.arange(self._length, device=self.device)).abs()
            scores -= _rows(modifiers.slopes, queries).to(dtype) * distance
        if modifiers.spans is not None:
            spans, places = _rows(modifiers.spans, queries), torch.arange(self._length, device=self.device)
            scores.masked_fill_((places < spans[..., :1]) | (places >= spans[..., 1:]), -math.inf)
            may_be_empty = True
        if self._causal is not None:
            index = torch.arange(self.shape[2], device=self.device)[queries]
            hidden = torch.arange(self._length, device=self.device) > index[:, None] + self._causal
            scores.masked_fill_(hidden, -math.inf)
            may_be_empty |= self._causal < 0
        if self._bias is not None:
            bias = _rows(self._bias, queries)
            if bias.dtype == torch.bool:
                scores.masked_fill_(~bias, -math.inf)
            else:
                scores += bias
            may_be_empty = True
        return scores, may_be_empty

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

    def of_head(self, image: int, head: int) -> Factors:
        """The same of one image or text, and of the heads that share one key head.

        Not for maps with functions of flex_attention, for which the numbers of images and heads count.
        """
        keys = self.keys.first(self._length)
        groups = self.shape[1] // keys.shape[1]
        heads = slice(head * groups, (head + 1) * groups)

        def part(tensor: Tensor) -> Tensor:
            tensor = tensor if tensor.shape[0] == 1 else tensor[image : image + 1]
            return tensor if tensor.shape[1] == 1 else tensor[:, heads]

        mask, modifiers = None if self._bias is None else part(self._bias), self._modifiers.mapped(part)
        query, key = self._query[image : image + 1, heads], keys[image : image + 1, head : head + 1]
        return Factors(query, Keys(key), self._length, self._scale, mask, self._causal, None, None, modifiers)

    def of_sequences(self) -> list[Factors]:
        """Of each of the sequences that were packed into one, the same."""
        if self._modifiers.sequences is None:
            return []
        made = []
        for ends in self._modifiers.sequences.tolist():
            queries, places = slice(*ends[:2]), slice(*ends[2:])
            mask = None if self._bias is None else _rows(self._bias, queries)
            if mask is not None and mask.shape[3] > 1:
                mask = mask[..., places]
            query, keys = self._query[:, :, queries], Keys(self.keys.first(self._length)[:, :, places])
            modifiers = self._modifiers.of_sequence(*ends)
            made.append(Factors(query, keys, keys.length, self._scale, mask, None, None, None, modifiers))
        return made

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> Factors:
        """The same with other batch and heads; `arrange` makes them of a tensor that has those of this one."""
        lead, key = self.shape[:2], self.keys.first(self._length)
        key = key.repeat_interleave(lead[1] // key.shape[1], 1)

        def expanded(tensor: Tensor) -> Tensor:
            return arrange(tensor.expand(*lead, *tensor.shape[2:]))

        mask, modifiers = None if self._bias is None else expanded(self._bias), self._modifiers.mapped(expanded)
        query, keys = arrange(self._query), Keys(arrange(key))
        return Factors(query, keys, self._length, self._scale, mask, self._causal, None, None, modifiers)

    @property
    def has_functions(self) -> bool:
        """Whether functions of flex_attention change the scores."""
        return self._score_mod is not None or self._mask_mod is not None

    @without_autograd
    def size_of_scores(self, queries: slice | Tensor) -> float:
        """How large the terms are, at most, of which the scores behind weights that count are the sums."""
        magnitude = Factors(
            self._query.abs(), Keys(self.keys.first(self._length).abs()), self._length, abs(self._scale)
        )
        scores, _ = magnitude.scores(queries)
        if self._bias is not None and self._bias.dtype != torch.bool:
            scores += _rows(self._bias, queries).abs()
        counting = scores[self.rows(queries) > _COUNTS]
        return float(counting.amax()) if counting.numel() else 0.0

    def tensors(self) -> list[Tensor]:
        """The tensors that are held; other maps may hold the mask and the keys too."""
        mask = [] if self.mask is None else [self.mask]
        return [self._query, self.keys.first(self._length), *mask, *self._modifiers.tensors()]

    def to(self, device: torch.device | str) -> Factors:
        """The same on another device."""
        keys = Keys(self.keys.first(self._length).to(device))
        mask = None if self.mask is None else self.mask.to(device)
        functions = self._score_mod, self._mask_mod
        if any(functions) and torch.device(device).type != self.device.type:
            raise ValueError(
                "a map with a score_mod or block_mask cannot move: its functions hold tensors; take dense()"
            )
        query, modifiers = self._query.to(device), self._modifiers.to(device)
        return Factors(query, keys, self._length, self._scale, mask, self._causal, *functions, modifiers)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.has_functions:  # which cannot be pickled
            return Weights, (self.packed({})["weights"],)
        return super().__reduce_ex__(protocol)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file. `shared` has the keys that several maps share, by their Keys."""
        if self.has_functions:  # a file holds no functions
            return {"weights": torch.cat([self.rows(part) for part in slices(self.shape[2], 256)], 2)}
        key = shared.setdefault(id(self.keys), self.keys.first(self.keys.length))
        rest = {"length": self._length, "scale": self._scale, "mask": self.mask, "causal": self._causal}
        modifiers = self._modifiers.packed()
        return {"query": self._query, "key": key, **rest} | ({"modifiers": modifiers} if modifiers else {})

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Factors:
        """What `packed` made, as it was."""
        length, scale, mask, causal = (packed[name] for name in ("length", "scale", "mask", "causal"))
        modifiers = Modifiers(**packed.get("modifiers", {}))
        return cls(packed["query"], Keys(packed["key"]), length, scale, mask, causal, modifiers=modifiers)

"""Where the rows of a map come from: weights that exist, or the query and key of a fused call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

_COUNTS = 1e-4  # smaller weights change no sum of values by much
_CLOSE = 1e-3  # how far a sum may be off that a kernel computes in half precision
_HIDING = -1e30  # below it a score is nothing, whatever it was
_TELLS_NOTHING = -1e3  # below it the logarithm of a sum is too coarse for weights

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
    """0 to `count` in slices of at most `size`; of none an empty one, so that what is made of them has its shape."""
    return (slice(start, min(start + size, count)) for start in range(0, max(count, 1), size))


def tokens_of(tensor: Tensor, image: int, head: int, start: int, count: int, heads: int = 0, step: int = 1) -> Tensor:
    """tensor[image, head, start : start + count * step : step] of four axes, or of several heads from that one on.

    It is called in the midst of a model, where the code that indexing takes is in no cache: that takes 20 us.
    """
    if type(tensor) is not Tensor or not tensor.is_cpu:
        return tensor[image, slice(head, head + heads) if heads else head, start : start + count * step : step]
    axes, width = tensor.stride(), tensor.shape[3]
    first = tensor.storage_offset() + image * axes[0] + head * axes[1] + start * axes[2]
    if heads:
        return tensor.as_strided((heads, count, width), (axes[1], axes[2] * step, axes[3]), first)
    return tensor.as_strided((count, width), (axes[2] * step, axes[3]), first)


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


class _Buffer:
    """Keys of several calls, (batch, key heads, keys, width), with room for more."""

    def __init__(self, keys: Tensor) -> None:
        self.tensor, self.length = keys, keys.shape[2]
        self.last_written = -1  # of a static cache, the place that was filled last

    def append(self, keys: Tensor) -> int:
        """Copy keys behind those that are there; returns how many bytes larger it is now."""
        batch, heads, count, width = keys.shape
        length, before = self.length + count, self.tensor.shape[2]
        more = 0
        if length > before:
            larger = keys.new_empty(batch, heads, max(length, before + before // 2 + 16), width)
            larger[:, :, : self.length] = self.tensor[:, :, : self.length]
            self.tensor = larger
            more = (larger.shape[2] - before) * batch * heads * width * keys.element_size()
        self.tensor.narrow(2, self.length, count).copy_(keys)
        self.length = length
        return more


class Keys:
    """The keys of a call, (batch, key heads, keys, width).

    While a model generates, each call has keys of the call before and some more. Such calls share one buffer that
    grows, and each knows which part of it is its own. As long as the texts keep their order, they have the same `Keys`.

    Args:
        keys: these, or the buffer that they lie in.
        lanes: (batch, keys), under which text of the buffer each key lies; None: under its own.
    """

    def __init__(self, keys: Tensor | _Buffer, lanes: Tensor | None = None) -> None:
        self._shared = keys if isinstance(keys, _Buffer) else _Buffer(keys)
        self.lanes = lanes
        """Under which text of the buffer each key lies, (batch, keys); None: under its own."""

    @property
    def buffer(self) -> Tensor:
        """What the keys lie in."""
        return self._shared.tensor

    @property
    def length(self) -> int:
        """How many keys are in the buffer."""
        return self._shared.length

    @property
    def owner(self) -> int:
        """A number that all keys in one buffer have in common."""
        return id(self._shared)

    def first(self, length: int) -> Tensor:
        """The first keys of the buffer; all, where it has no more."""
        return self.buffer[:, :, :length]

    def part(self, begin: int, length: int) -> Tensor:
        """Some keys of each text."""
        if self.lanes is None:
            whole = self.buffer
            return whole if length == whole.shape[2] else whole.narrow(2, begin, length)
        places = torch.arange(begin, begin + length, device=self.buffer.device)
        return self.buffer[self.lanes[:, begin : begin + length].long(), :, places].transpose(1, 2)

    def of_head(self, image: int, head: int, begin: int, length: int) -> Tensor:
        """Some keys of one text and one head, (those keys, width)."""
        if self.lanes is None:
            return tokens_of(self._shared.tensor, image, head, begin, length)
        return self.part(begin, length)[image, head]

    def begins(self, keys: Tensor) -> bool:
        """Whether these keys begin with all that are known."""
        known = self._shared.length
        if self.lanes is not None or not self._fits(keys) or keys.shape[2] < known:
            return False
        return torch.equal(keys.narrow(2, 0, known), self._shared.tensor.narrow(2, 0, known))

    def _fits(self, keys: Tensor) -> bool:
        known = self._shared.tensor
        batch, heads, _, width = keys.shape
        known_batch, known_heads, _, known_width = known.shape
        if (batch, heads, width) != (known_batch, known_heads, known_width):
            return False
        return known.dtype == keys.dtype and known.device == keys.device

    def grow(self, keys: Tensor) -> int:
        """Copy the keys behind those that are known; returns how many bytes larger the buffer is now."""
        known = self._shared.length
        return self._shared.append(keys.narrow(2, known, keys.shape[2] - known))

    def step(self, keys: Tensor, are_hidden: Callable[[int], bool]) -> tuple[Keys, int, int] | None:
        """Take the keys of a step with one query, the last of which is new; None if they do not go on from these.

        The others are the latest known, or some of them, where a window passes over them. Beams may have changed their
        order. A static cache has the new one in a place that no call before has looked at.

        Args:
            are_hidden: whether the call before looks at none of its keys from that number on.

        Returns:
            What holds them, where the part of the step begins in it, and how many more bytes that takes.
        """
        count = keys.shape[2]
        begin = self.length - count + 1
        if begin < 0 or count < 2 or not self._fits(keys):
            return None
        known, old, order = self.part(begin, count - 1), keys.narrow(2, 0, count - 1), None
        if not torch.equal(known, old):
            if count == self.length and self.lanes is None and self._fill(keys, are_hidden):
                return self, 0, 0
            same = same_texts(known, old)
            if not same.any(1).all():
                return None
            order = same.int().argmax(1)
        made, more = self, 0
        if order is not None or self.lanes is not None:
            own = torch.arange(len(keys), dtype=torch.int32, device=keys.device)[:, None]
            before = own.expand(-1, self.length) if self.lanes is None else self.lanes
            lanes = torch.cat([before if order is None else before[order], own], 1)
            if order is None:
                self.lanes = lanes
            else:
                made, more = Keys(self._shared, lanes), lanes.nbytes
        return made, begin, more + self._shared.append(keys.narrow(2, count - 1, 1))

    def _fill(self, keys: Tensor, are_hidden: Callable[[int], bool]) -> bool:
        """Take the keys of a static cache, if only one differs, in a place that was empty up to now."""
        shared = self._shared
        differ = (shared.tensor[:, :, : shared.length] != keys).any(3).flatten(0, 1).any(0)
        places = differ.nonzero().flatten().tolist()
        if len(places) != 1 or places[0] <= shared.last_written or not are_hidden(places[0]):
            return False
        [shared.last_written] = places
        shared.tensor[:, :, places] = keys[:, :, places]
        return True

    def to(self, device: torch.device | str, moved: dict[int, Any]) -> Keys:
        """The same on another device, where `moved` has what is there already, by its ids here."""
        if id(self) not in moved:
            shared = moved.get(self.owner)
            if shared is None:
                shared = moved[self.owner] = _Buffer(self.first(self.length).to(device))
            moved[id(self)] = Keys(shared, None if self.lanes is None else self.lanes.to(device))
        made: Keys = moved[id(self)]
        return made


def same_texts(before: Tensor, after: Tensor) -> Tensor:
    """Which of the texts of `before` each text of `after` is, (texts, texts before) as bool."""
    same = (after[:, None, :, -1] == before[None, :, :, -1]).flatten(2).all(2)  # the last keys tell most of them apart
    for text, other in same.nonzero().tolist():
        same[text, other] = torch.equal(after[text], before[other])
    return same


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


_UNMODIFIED = Modifiers()


def _rows(tensor: Tensor, queries: slice | Tensor) -> Tensor:
    """Some queries of a tensor with the axes of a map, whose third may be of length 1."""
    return tensor if tensor.shape[2] == 1 else tensor[:, :, queries]


class Factors:
    """The query and key of a fused call, whose weights are softmax(scale * query . key^T + mask).

    Args:
        query: (batch, heads, queries, width).
        keys: of which the call has `length`, from number `begin` on.
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
        begin: int = 0,
    ) -> None:
        self._query, self.keys, self._length, self._begin = query, keys, length, begin
        if mask is not None and mask.requires_grad:  # a mask without a graph stays one object, shared in a file too
            mask = mask.detach()
        self.mask, self._causal = mask, causal
        self._score_mod, self._mask_mod = score_mod, mask_mod
        self._modifiers = _UNMODIFIED if modifiers is None else modifiers
        batch, heads, queries, width = query.shape
        self.shape = batch, heads, queries, length
        self._scale = 1 / math.sqrt(max(1, width)) if scale is None else float(scale)
        self.dtype, self.device = query.dtype, query.device
        self.log_sums: Tensor | None = None
        """Of each query the logarithm of the sum that its softmax is divided by, (batch, heads, queries), if the kernel
        told it; not kept in files."""
        self._bias = None
        if mask is not None:
            if mask.ndim > 4:
                raise ValueError(f"a mask broadcasts to (batch, heads, queries, keys), not {tuple(mask.shape)}")
            self._bias = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
            for size, whole in zip(self._bias.shape, self.shape, strict=True):
                if size not in (1, whole):
                    raise ValueError(f"a mask of {tuple(mask.shape)} does not fit a map of {self.shape}")

    @property
    def key_heads(self) -> int:
        """How many heads the keys have, of which each may be of several heads of the queries."""
        return self.keys.buffer.shape[1]

    @property
    def key(self) -> Tensor:
        """The keys of the call, (batch, key heads, keys, width)."""
        return self.keys.part(self._begin, self._length)

    def hides(self, first: int) -> bool:
        """Whether no query may attend to any of the keys from that number on; False where that is not known."""
        spans = self._modifiers.spans
        if self._causal is not None and self.shape[2] - 1 + self._causal < first:
            return True
        if spans is not None and bool((spans[..., 1] <= first).all()):
            return True
        if self._bias is None:
            return False
        bias = self._bias if self._bias.shape[3] == 1 else self._bias[..., first:]
        return not bias.any() if bias.dtype == torch.bool else bool((bias < _HIDING).all())

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

        Where the sums of the softmax are known, they are a product of all queries with these keys. Else a fused kernel
        gives them at the cost of one more attention: its output is the weights of those keys whose values are the rows
        of an identity. Values are as wide as queries, for else some kernels make the whole map.
        """
        if self.has_functions or self._modifiers.packed() or self._causal is not None:
            return None
        dtype, groups = computed_in(self.dtype), self.shape[1] // max(1, self.key_heads)
        if self.log_sums is not None and self._are_sums_right(self.log_sums):
            chosen = (self.key[:, :, keys].to(dtype) * self._scale).repeat_interleave(groups, 1)
            # (batch, heads, chosen keys, queries): few rows and long ones are quicker than the other way.
            scores = torch.matmul(chosen, self._query.to(dtype).mT)
            if self._bias is not None:
                bias = (self._bias if self._bias.shape[3] == 1 else self._bias[..., keys]).mT
                scores = scores.masked_fill_(~bias, -math.inf) if bias.dtype == torch.bool else scores.add_(bias)
            return scores.sub_(self.log_sums[:, :, None]).exp_().mT
        width = self._query.shape[-1]
        if len(keys) > width or self._length < 4 * width or self._bias is not None:
            return None
        key = self.keys.first(self._length).to(dtype).repeat_interleave(groups, 1)
        values = torch.zeros(self._length, width, dtype=dtype, device=self.device)
        values[keys, torch.arange(len(keys), device=self.device)] = 1
        values = values.expand(*key.shape[:2], *values.shape)
        made = F.scaled_dot_product_attention(self._query.to(dtype), key, values, scale=self._scale)
        return made[..., : len(keys)]

    def _are_sums_right(self, log_sums: Tensor) -> bool:
        """Whether the sums that the kernel told are those of two queries of a head, and can tell small weights.

        Where a mask hides all keys from a query by large numbers, its sum is one of these numbers.
        """
        if self._bias is not None and not bool((log_sums > _TELLS_NOTHING).all()):
            return False
        image, head = self.shape[0] - 1, self.key_heads - 1
        ends = torch.tensor([0, -1], device=self.device)
        sums = self.of_head(image, head).scores(ends)[0].logsumexp(-1)
        told = log_sums[image:, -sums.shape[1] :, ends]
        return bool(((sums - told).abs() <= _CLOSE * sums.abs().clamp_min(1)).all())

    def scores(self, queries: slice | Tensor) -> tuple[Tensor, bool]:
        """What the softmax of some queries is taken of, and whether some may attend to nothing."""
        dtype = computed_in(self.dtype)
        query = self._query[:, :, queries].to(dtype) * self._scale
        key = self.key.to(dtype)
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
        keys = self.key
        groups = self.shape[1] // keys.shape[1]
        heads = slice(head * groups, (head + 1) * groups)

        def part(tensor: Tensor) -> Tensor:
            tensor = tensor if tensor.shape[0] == 1 else tensor[image : image + 1]
            return tensor if tensor.shape[1] == 1 else tensor[:, heads]

        mask, modifiers = None if self._bias is None else part(self._bias), self._modifiers.mapped(part)
        query, key = self._query[image : image + 1, heads], keys[image : image + 1, head : head + 1]
        return Factors(query, Keys(key), self._length, self._scale, mask, self._causal, None, None, modifiers)

    @property
    def is_plain(self) -> bool:
        """Whether nothing changes the scores, or only a causal bound that leaves each query a key."""
        has_none = self._bias is None and self._modifiers is _UNMODIFIED and not self.has_functions
        return has_none and (self._causal is None or self._causal >= 0)

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
            query, keys = self._query[:, :, queries], Keys(self.key[:, :, places])
            modifiers = self._modifiers.of_sequence(*ends)
            made.append(Factors(query, keys, keys.length, self._scale, mask, None, None, None, modifiers))
        return made

    def arranged(self, arrange: Callable[[Tensor], Tensor]) -> Factors:
        """The same with other batch and heads; `arrange` makes them of a tensor that has those of this one."""
        lead, key = self.shape[:2], self.key
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
        magnitude = Factors(self._query.abs(), Keys(self.key.abs()), self._length, abs(self._scale))
        scores, _ = magnitude.scores(queries)
        if self._bias is not None and self._bias.dtype != torch.bool:
            scores += _rows(self._bias, queries).abs()
        counting = scores[self.rows(queries) > _COUNTS]
        return float(counting.amax()) if counting.numel() else 0.0

    def tensors(self, are_shared: bool = False) -> list[Tensor]:
        """The tensors that are held; other maps may hold the mask and the keys too.

        Args:
            are_shared: whether to have the keys with those of all calls that they are shared with.
        """
        is_part = not are_shared and self.keys.lanes is None
        keys = self.key if is_part else self.keys.first(self.keys.length)
        others = [tensor for tensor in (self.keys.lanes, self.mask) if tensor is not None]
        return [self._query, keys, *others, *self._modifiers.tensors()]

    def to(self, device: torch.device | str, moved: dict[int, Any] | None = None) -> Factors:
        """The same on another device. `moved` has the keys there that several maps share, see `Keys.to`."""
        begin = 0 if moved is None else self._begin
        keys = Keys(self.key.to(device)) if moved is None else self.keys.to(device, moved)
        mask = None if self.mask is None else self.mask.to(device)
        functions = self._score_mod, self._mask_mod
        if any(functions) and torch.device(device).type != self.device.type:
            raise ValueError(
                "a map with a score_mod or block_mask cannot move: its functions hold tensors; take dense()"
            )
        query, modifiers = self._query.to(device), self._modifiers.to(device)
        return Factors(query, keys, self._length, self._scale, mask, self._causal, *functions, modifiers, begin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.has_functions:  # which cannot be pickled
            return Weights, (self.packed({})["weights"],)
        return super().__reduce_ex__(protocol)

    def packed(self, shared: dict[int, Tensor]) -> dict[str, Any]:
        """As tensors and numbers, for a file. `shared` has the keys that several maps share, by their owners."""
        if self.has_functions:  # a file holds no functions
            return {"weights": torch.cat([self.rows(part) for part in slices(self.shape[2], 256)], 2)}
        key, lanes = shared.setdefault(self.keys.owner, self.keys.first(self.keys.length)), self.keys.lanes
        lanes = None if lanes is None else lanes[:, : self._begin + self._length].clone()
        rest = {"length": self._length, "scale": self._scale, "mask": self.mask, "causal": self._causal}
        more = {"modifiers": self._modifiers.packed(), "begin": self._begin, "lanes": lanes}
        more = {name: value for name, value in more.items() if isinstance(value, Tensor) or value}
        return {"query": self._query, "key": key, **rest} | more

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> Factors:
        """What `packed` made, as it was."""
        length, scale, mask, causal = (packed[name] for name in ("length", "scale", "mask", "causal"))
        modifiers = Modifiers(**packed.get("modifiers", {}))
        keys, begin = Keys(packed["key"], packed.get("lanes")), packed.get("begin", 0)
        return cls(packed["query"], keys, length, scale, mask, causal, modifiers=modifiers, begin=begin)


class HeadRows(NamedTuple):
    """Some queries of one image or text in a map without functions, and of the heads that share one key head."""

    source: Factors
    image: int
    head: int
    places: range
    """The numbers of the queries."""

    def weights(self) -> Tensor:
        """Their weights, (heads, those queries, keys)."""
        return self.source.of_head(self.image, self.head).rows(self._slice)[0]

    def size_of_scores(self) -> float:
        """As that of `Factors`."""
        return self.source.of_head(self.image, self.head).size_of_scores(self._slice)

    @property
    def _slice(self) -> slice:
        return slice(self.places.start, self.places.stop, self.places.step)

    @property
    def form(self) -> tuple[Any, ...] | None:
        """What several must have in common for `products`; None if a mask or the like changes the scores.

        The first of it is a number of keys that none of them has more of.
        """
        one = self.source
        if not one.is_plain:
            return None
        _, heads, _, keys = one.shape
        _, key_heads, _, width = one.keys.buffer.shape
        most = 1 << keys.bit_length()  # those of many more keys would be little but padding
        return most, heads, key_heads, width, len(self.places), one.dtype, one.device, one._scale

    @staticmethod
    def products(several: Sequence[HeadRows], values: Sequence[Tensor]) -> Tensor:
        """The weights of each times its values, which are (keys, width): (several, heads, those queries, width)."""
        first = several[0].source
        groups, dtype = first.shape[1] // first.key_heads, computed_in(first.dtype)
        queries, keys, lengths, are_bounded = [], [], [], False
        for source, image, head, at in several:
            queries.append(tokens_of(source._query, image, head * groups, at.start, len(at), groups, at.step))
            keys.append(source.keys.of_head(image, head, source._begin, source._length))
            lengths.append(source._length)
            are_bounded |= source._causal is not None
        query, places = torch.stack(queries).to(dtype), _padding(lengths, first.device)
        key, value = _padded(keys, places).to(dtype), _padded(values, places).to(dtype)
        count, _, rows, width = query.shape
        # One product for all heads: what is broadcast would be copied for each.
        scores = torch.bmm((query * first._scale).view(count, -1, width), key.mT)
        if places is not None or are_bounded:
            ends = torch.tensor([one._ends() for one in several], device=first.device)
            hidden = torch.arange(key.shape[1], device=first.device) >= ends[..., None]
            scores.view(count, groups, rows, -1).masked_fill_(hidden[:, None], -math.inf)
        return torch.bmm(torch.softmax(scores, -1), value).view(count, groups, rows, -1)

    def _ends(self) -> list[int]:
        """Of each query the number behind the last key that it sees."""
        causal, length = self.source._causal, self.source._length
        if causal is None:
            return [length] * len(self.places)
        return [min(length, query + causal + 1) for query in self.places]


def _padding(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Where in the rows of several tensors, one behind the other, each row of the padded ones is; None: all are alike.

    Padding has the place behind the last.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    sizes = torch.tensor(lengths, device=device)[:, None]
    places = torch.arange(longest, device=device)
    return torch.where(places < sizes, places + (sizes.cumsum(0) - sizes), sum(lengths))


def _padded(several: Sequence[Tensor], places: Tensor | None) -> Tensor:
    """Tensors (rows, width) as one, (several, rows, width), zero where they are padded."""
    if places is None:
        return torch.stack([*several])
    together = torch.cat([*several, several[0].new_zeros(1, several[0].shape[1])])
    return together.index_select(0, places.flatten()).view(*places.shape, -1)

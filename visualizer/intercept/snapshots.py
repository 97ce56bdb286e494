"""Snapshots of attention calls: what a map keeps is copied, for the model may change its tensors later."""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maps import (
    AttentionMap,
    Block,
    Factors,
    Gradient,
    JoinedGradient,
    Keys,
    Samples,
    Source,
    Weights,
    joined_map,
)
from ..store import bytes_by_device
from .axes import Order
from .calls import FusedCall, four_axes
from .deformable import SampledCall
from .emptiness import without_empty_rows
from .evidence import Evidence, of_fused, of_plain, of_samples, of_weights
from .joins import Attended
from .memory import Memory
from .modules import are_windows
from .provenance import Origin
from .softmax import Product


@dataclass(frozen=True)
class AttentionCall:
    """An attention call of a module."""

    path: str
    origin: Origin
    shapes: list[tuple[int, ...]]
    """Of what the calls under way were given, see `shapes_of`."""
    computed: FusedCall | Product | SampledCall
    """What it computed; of a fused call with four axes, by the assumption below."""
    heads: int | None
    """How many heads are assumed to share the first of three axes."""
    number: int
    """How many attention calls came before."""
    key_sample: Tensor | None = None
    """A few numbers of each key of which weights were computed, (texts, 1, keys, numbers), if they are known."""
    is_filed_at_once: bool = False
    """Whether its map is made before the model goes on."""

    @property
    def sizes(self) -> tuple[int, int]:
        """How many queries and keys it has."""
        computed = self.computed
        if isinstance(computed, FusedCall):
            return computed.query.shape[-2], computed.key.shape[-2]
        if isinstance(computed, Product):
            return computed.weights.shape[-2], computed.weights.shape[-1]
        return computed.weights.shape[-2], sum(map(math.prod, computed.sizes))

    def attended(self, call: object) -> Attended:
        """What it must have in common with others in one call of its module."""
        computed = self.computed
        if isinstance(computed, FusedCall):
            query, key, value = computed.query, computed.key, computed.value
            return Attended(call, self.origin, key.shape[-2], (query, key), (key, value))
        if isinstance(computed, Product):
            values = () if computed.values is None else (computed.values,)
            return Attended(call, self.origin, computed.weights.shape[-1], (), values)
        return Attended(call, self.origin, sum(map(math.prod, computed.sizes)), (), computed.values)


@dataclass(frozen=True)
class Copy:
    """What is kept of an attention call."""

    call: AttentionCall
    map_of: Callable[[Order | None], AttentionMap]
    """Makes its map, once it is known which axes are heads; None: they stay unknown."""
    sizes: dict[str, int]
    """The bytes that it adds, by device."""
    evidence: Sequence[Evidence]
    """Whether the map is the one that was used; none where that cannot be seen, as with dropout."""


class PlainCall(NamedTuple):
    """A call of torch's own function, with four axes, the heads behind the batch."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: int | None
    scale: float | None
    dropout: float
    number: int
    """How many attention calls came before."""


class Taken(NamedTuple):
    """What is kept of a plain call."""

    make: Callable[[], tuple[Factors, Sequence[Evidence]]]
    """Makes what its map is made of, and the proof that it is the one that was used. Nothing of the model is needed for
    that any more; but those of one module are made in their order, for they may share their keys."""
    sizes: dict[str, int]
    """The bytes that it adds, by device."""
    nbytes: int
    """The bytes of the proof, until it is weighed."""


def joined_copy(parts: Sequence[tuple[Copy, Tensor, int]], sizes: Sequence[int]) -> Copy:
    """The copy of several calls that are one attention.

    Args:
        parts: of each call the copy, which of the axes of `sizes`, taken as one, it has, and its first query.
        sizes: the axes before (queries, keys).
    """
    copies = [copy for copy, _, _ in parts]

    def map_of(order: Order | None) -> AttentionMap:
        total, axes_assumed = math.prod(sizes), _are_assumed(order, sizes)
        order = _assumed(sizes, copies[0].call.heads) if order is None else order
        numbers = order.arranged(torch.arange(total)[:, None, None]).flatten()
        places = torch.empty_like(numbers).index_copy_(0, numbers, torch.arange(total))
        maps = [copy.map_of(None) for copy in copies]
        queries = max(first + made.shape[2] for made, (_, _, first) in zip(maps, parts, strict=True))
        shape = *order.shape, queries, maps[0].shape[3]

        def blocks(sources: Sequence[Any]) -> list[Block]:
            return [Block(one, places[which], first) for one, (_, which, first) in zip(sources, parts, strict=True)]

        return _described(joined_map(maps, blocks, shape), copies[0].call, axes_assumed)

    evidence = [one for copy in copies for one in copy.evidence]
    return Copy(copies[0].call, map_of, _sum(*(copy.sizes for copy in copies)), evidence)


class Copies:
    """Copies what maps are made of. Maps share the keys of a growing cache, and a mask that several layers are given.

    Args:
        gradients: whether maps also keep what their gradients are computed from.
        memory: of the model's maps.
        share_keys: whether the maps of a growing cache share its keys; else each has a copy of its own, which nothing
            holds any longer than the map.
    """

    def __init__(self, gradients: bool, memory: Memory, share_keys: bool = True) -> None:
        self._gradients, self._memory, self._share_keys = gradients, memory, share_keys
        # By the path of the module, the keys of its last call, and what its map is made of while there is one.
        self._latest: dict[str, tuple[Keys, weakref.ref[Factors]]] = {}
        self._masks: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def of(self, call: AttentionCall, is_lent: bool = False) -> Copy:
        """What is kept of an attention call; of one that is lent, query and key are the model's own."""
        if isinstance(call.computed, FusedCall):
            return self._of_fused(call, call.computed, is_lent)
        if isinstance(call.computed, SampledCall):
            return self._of_samples(call, call.computed)
        return self._of_product(call, call.computed)

    def of_plain(self, path: str, call: PlainCall) -> Taken:
        """What is kept of a call."""
        memory, shape = self._memory, (*call.query.shape[:3], call.key.shape[2])
        source, sizes = self._factors(path, call.query, call.key, call.mask, call.scale, call.causal)
        evidence, nbytes, values = None, 0, call.value
        if not call.dropout and math.prod(shape) and values.shape[3]:
            # Of the steps of a generation each has more values than the one before: no block of theirs is used twice.
            hold = partial(memory.held, least=math.inf if shape[2] < shape[3] else mmap.PAGESIZE)
            evidence = of_plain(shape, values, call.output, call.number, hold)
            nbytes = shape[3] * values.shape[3] * values.element_size()

        def make() -> tuple[Factors, Sequence[Evidence]]:
            made = source()
            return made, () if evidence is None else (evidence(made),)

        return Taken(make, sizes, nbytes)

    def _of_product(self, call: AttentionCall, product: Product) -> Copy:
        weights = self._copied_weights(product.weights, product.empty, product.is_own)
        multiplied = weights.shape
        lead = product.output.shape[:-2]
        weights = weights.expand(*lead, *multiplied[-2:])  # the same weights may serve several heads
        parts, is_softmax = [], _is_softmax(product)
        if not is_softmax:
            parts = self._parts_of(product)
        evidence = None
        if not product.has_dropout:
            evidence = of_weights(weights, product.values.detach(), product.output.detach(), call.number)
        reason = None
        if product.source.numel() != product.weights.numel():
            reason = "the weights were changed behind a dropout: the gradient is known with model.eval()"
        sample = call.key_sample
        if sample is not None and (len(lead) != 2 or (len(sample), sample.shape[2]) != (lead[0], multiplied[-1])):
            sample = None
        assumed = four_axes(weights, call.heads).shape
        gradient = self._gradient_of(product.source, assumed, None, reason)

        def ordered(incoming: Tensor) -> Tensor:
            shape = dict(zip(product.order, multiplied, strict=True))
            return incoming.reshape([shape[axis] for axis in range(len(shape))]).permute(product.order)

        def map_of(order: Order | None) -> AttentionMap:
            def arranged(tensor: Tensor) -> Tensor:
                if order is None or math.prod(tensor.shape[:-2]) != math.prod(order.sizes):
                    return four_axes(tensor, call.heads)
                return order.arranged(tensor)

            source = Weights(arranged(weights))
            if gradient is not None:
                gradient.arrange(
                    lambda incoming: arranged(ordered(incoming).expand(*lead, *multiplied[-2:])), source.shape
                )
            made = _map_of(call, source, gradient, _are_assumed(order, lead))
            made.is_softmax = is_softmax
            if is_softmax and any(one.keys > multiplied[-1] and one.maps > 1 for one in product.softmaxes):
                # The keys that were cut off were no sink: they have values, and a map of their own.
                made.is_softmax = False
                parts.extend(self._parts_of(product))
            made.softmaxes = tuple(AttentionMap(arranged(part), path=call.path, kind=made.kind) for part in parts)
            made.key_sample = sample
            return made

        return Copy(call, map_of, _sizes(weights, *parts, *([] if sample is None else [sample])), _known(evidence))

    def _parts_of(self, product: Product) -> list[Tensor]:
        return [self._copied_weights(one.weights, one.empty) for one in product.softmaxes if one.weights is not None]

    def _copied_weights(self, weights: Tensor, empty: Tensor | None, is_own: bool = False) -> Tensor:
        copied = without_empty_rows(weights, empty)
        if copied is not None:
            return copied
        return weights.detach() if is_own else self._memory.copied(weights)

    def _of_fused(self, call: AttentionCall, fused: FusedCall, is_lent: bool) -> Copy:
        modifiers = None if fused.modifiers is None else fused.modifiers.mapped(self._memory.copied)
        more: dict[str, Any] = {"score_mod": fused.score_mod, "mask_mod": fused.mask_mod, "modifiers": modifiers}
        if is_lent:
            query, key = fused.query.detach(), fused.key.detach()
            source = Factors(query, Keys(key), key.shape[2], fused.scale, fused.mask, fused.causal, **more)
            sizes = dict[str, int]()
        else:
            given = fused.query, fused.key, fused.mask, fused.scale, fused.causal
            make, sizes = self._factors(call.path, *given, **more)
            source = make()
        if fused.log_sums is not None and fused.log_sums.shape == source.shape[:3]:
            source.log_sums = fused.log_sums.detach()
        evidence = None
        if not fused.dropout:
            output = fused.output
            if output.shape[:-1] != source.shape[:3]:
                output = output.reshape(*source.shape[:3], output.shape[-1])
            evidence = of_fused(source, fused.value, output, call.number, fused.is_foreign)
        reason = (
            "there was dropout on the weights, whose pattern a fused kernel does not tell: the gradient is known with "
            "model.eval(), or without attention dropout"
        )
        returned = fused.output if fused.returned is None else fused.returned
        as_output, values = fused.as_output, fused.value.detach()
        gradient = self._gradient_of(returned, source.shape, values, reason if fused.dropout else None)
        if gradient is not None and as_output is not None:
            gradient.arrange(as_output)

        def map_of(order: Order | None) -> AttentionMap:
            made_of = source
            is_known = order is not None and order.is_sorted and order.shape == source.shape[:2]
            if order is not None and not is_known and not source.has_functions:
                made_of = source.arranged(order.arranged)
                if gradient is not None:
                    whole = values.repeat_interleave(source.shape[1] // values.shape[1], 1)
                    arranged = order.arranged if as_output is None else lambda one: order.arranged(as_output(one))
                    gradient.arrange(arranged, made_of.shape, self._memory.copied(order.arranged(whole)))
                is_known = True
            return _map_of(call, made_of, gradient, _are_assumed(order if is_known else None, source.shape[:2]))

        tensors = [one for several in (modifiers, gradient) if several is not None for one in several.tensors()]
        return Copy(call, map_of, _sum(sizes, _sizes(*tensors)), _known(evidence))

    def _of_samples(self, call: AttentionCall, sampled: SampledCall) -> Copy:
        weights = four_axes(self._memory.copied(sampled.weights), call.heads)
        cells = self._memory.copied(sampled.cells).reshape(*weights.shape, 2)
        source = Samples(cells, weights, sampled.sizes, sampled.counts)
        batch, heads = weights.shape[:2]
        values = [value.detach().reshape(batch, heads, *value.shape[-3:]) for value in sampled.values]
        output = sampled.output.detach().reshape(*weights.shape[:3], -1)
        evidence = of_samples(source, values, output, call.number)
        reason = "the gradient by the weights of a deformable attention is not recorded"
        gradient = self._gradient_of(sampled.output, source.shape, None, reason)

        def map_of(order: Order | None) -> AttentionMap:
            made_of = source if order is None else source.arranged(order.arranged)
            return _map_of(call, made_of, gradient, _are_assumed(order, (batch, heads)))

        return Copy(call, map_of, _sizes(cells, weights), _known(evidence))

    def _factors(
        self,
        path: str,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: int | None,
        **more: Any,
    ) -> tuple[Callable[[], Factors], dict[str, int]]:
        """Copies of what a fused call was given: what makes a map's source of them, and the bytes that they add."""
        length, begin, known, sizes = key.shape[2], 0, None, _sizes(key)
        if path in self._latest and query.shape[2] < length:
            known, begin, sizes = self._kept_keys(path, key.detach(), query.shape[2])
        # A block for each: keys that grow leave theirs, while the query stays.
        held = [self._memory.held(one) for one in ((query, key) if known is None else (query,))]
        if mask is not None:
            mask, of_mask = self._kept_mask(mask)
            sizes = _sum(sizes, of_mask)
        [device] = sizes if len(sizes) == 1 else bytes_by_device(query)  # they are all on one
        sizes[device] = sizes.get(device, 0) + query.nbytes

        def make() -> Factors:
            query, *others = (copied for copies in held for copied in copies())
            keys = Keys(*others) if known is None else known
            source = Factors(query, keys, length, scale, mask, causal, begin=begin, **more)
            if self._share_keys:
                self._latest[path] = keys, weakref.ref(source)
            return source

        return make, sizes

    def _kept_keys(self, path: str, key: Tensor, queries: int) -> tuple[Keys, int, dict[str, int]]:
        """The keys of a call that has more than its module's last one, the number of its first, and the bytes they add.

        Of a growing cache only the new keys are copied.
        """
        (known, source), device = self._latest[path], "cpu" if key.is_cpu else str(key.device)
        if known.begins(key):
            return known, 0, {device: known.grow(key)}

        def are_hidden(first: int) -> bool:
            before = source()
            return before is not None and before.hides(first)

        step = known.step(key, are_hidden) if queries == 1 else None
        if step is not None:
            keys, begin, more = step
            return keys, begin, {device: more}
        keys = Keys(self._memory.copied(key))
        return keys, 0, _sizes(keys.buffer)

    def _kept_mask(self, mask: Tensor) -> tuple[Tensor, dict[str, int]]:
        """A copy of a mask, and the bytes that it adds; layers that are given the same mask share its copy."""
        number = id(mask)
        known = self._masks.get(number)
        compact = mask.detach()
        for axis, step in enumerate(compact.stride()):
            if step == 0:  # expanded: one number is used for the whole axis
                compact = compact.narrow(axis, 0, 1)
        # Its numbers are compared: changes by .data or numpy, and in inference mode all, leave no trace.
        if known is not None and known[0]() is mask and torch.equal(known[1], compact):
            return known[1], {}
        kept = self._memory.copied(compact)
        masks = self._masks
        masks[number] = weakref.ref(mask, lambda _: masks.pop(number, None)), kept
        return kept, _sizes(kept)

    def _gradient_of(
        self, output: Tensor, shape: Any, values: Tensor | None = None, reason: str | None = None
    ) -> Gradient | None:
        """What a backward pass through a kernel's output, or through a softmax's weights, will bring."""
        if not self._gradients or not output.requires_grad:
            return None
        gradient = Gradient(shape, None if values is None else self._memory.copied(values), reason)
        output.register_hook(gradient.accumulate)  # type: ignore[no-untyped-call]
        return gradient


def _map_of(
    call: AttentionCall, source: Source, gradient: Gradient | JoinedGradient | None, axes_assumed: bool
) -> AttentionMap:
    return _described(AttentionMap.from_source(source, gradient=gradient), call, axes_assumed)


def _described(made: AttentionMap, call: AttentionCall, axes_assumed: bool) -> AttentionMap:
    """The map with what its call says about it, and about the softmaxes that it is made of."""
    batch, _, queries, _ = made.shape
    kind = call.origin.kind
    if kind == "self" and not axes_assumed and are_windows(batch, queries, call.shapes):
        kind = "window"
    for one in (made, *made.softmaxes):
        one.path, one.kind = call.path, kind
    made.joined, made.axes_assumed = call.origin.joined, axes_assumed
    return made


def _assumed(sizes: Sequence[int], heads: int | None) -> Order:
    """What `four_axes` takes the axes before (queries, keys) for."""
    if len(sizes) == 1 and heads is not None and sizes[0] % heads == 0:
        return Order((sizes[0] // heads, heads), (False, True))
    return Order((*sizes,), tuple(0 < axis == len(sizes) - 1 for axis in range(len(sizes))))


def _are_assumed(order: Order | None, sizes: Sequence[int]) -> bool:
    """Whether it is not known which of the axes before (queries, keys) are heads."""
    return math.prod(sizes) > 1 if order is None else not order.are_known


def _known(evidence: Evidence | None) -> Sequence[Evidence]:
    return () if evidence is None else (evidence,)


def _is_softmax(product: Product) -> bool:
    """Whether what was multiplied is what one softmax made, its first keys, or both in another shape."""
    if product.is_softmax:
        return True
    made = product.softmaxes[0].weights if product.softmaxes else None
    if len(product.softmaxes) > 1 or made is None or made.numel() != product.weights.numel():
        return False
    return torch.equal(made.detach().to(product.weights.dtype).reshape(product.weights.shape), product.weights)


def _sizes(*tensors: Tensor) -> dict[str, int]:
    total = 0
    for one in tensors:
        if not one.is_cpu:
            return _sum(*map(bytes_by_device, tensors))
        total += one.nbytes
    return {"cpu": total} if tensors else {}


def _sum(*several: dict[str, int]) -> dict[str, int]:
    total = dict[str, int]()
    for sizes in several:
        for device, size in sizes.items():
            total[device] = total.get(device, 0) + size
    return total

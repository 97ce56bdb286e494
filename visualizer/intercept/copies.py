"""Makes maps of attention calls. What a map keeps is copied, for the model may change its tensors later."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..maps import AttentionMap, Factors, Gradient, Keys, Weights
from ..store import bytes_by_device
from .kernels import FusedCall, four_axes
from .softmax import Softmax


@dataclass(frozen=True)
class AttentionCall:
    """An attention call of a module, with what a map is made of."""

    path: str
    kind: str | None
    computed: FusedCall | Softmax
    heads: int | None = None
    """How many heads share the first of three axes of a softmax's weights."""


class Copies:
    """The copies that maps share: the keys of a growing cache, and the mask of several layers.

    Args:
        gradients: whether maps also keep what their gradients are computed from.
    """

    def __init__(self, gradients: bool) -> None:
        self._gradients = gradients
        self._growing: dict[str, Keys] = {}
        self._masks: dict[int, tuple[weakref.ref[Tensor], Any, Tensor]] = {}

    def map_of(self, call: AttentionCall, is_brief: bool) -> tuple[AttentionMap, dict[str, int]]:
        """The map of a call, and the bytes that it adds on each device.

        `is_brief`: the map is read at once and dropped, so it copies nothing.
        """
        if isinstance(call.computed, Softmax):
            return self._dense(call, call.computed, is_brief)
        return self._fused(call, call.computed, is_brief)

    def _dense(self, call: AttentionCall, softmax: Softmax, is_brief: bool) -> tuple[AttentionMap, dict[str, int]]:
        returned = softmax.weights
        assert returned is not None  # else there would have been no product
        is_own = softmax.copy is not None or is_brief
        weights = (returned if softmax.copy is None else softmax.copy).detach()[..., : softmax.keys]
        source = Weights(four_axes(weights.contiguous() if is_own else _copied(weights), call.heads))
        gradient = self._gradient_of(returned, source.shape)
        made = AttentionMap.from_source(source, path=call.path, kind=call.kind, gradient=gradient)
        return made, _sizes(*source.tensors())

    def _fused(self, call: AttentionCall, fused: FusedCall, is_brief: bool) -> tuple[AttentionMap, dict[str, int]]:
        query, keys, mask, shared = fused.query.detach(), Keys(fused.key.detach()), fused.mask, dict[str, int]()
        if not is_brief:
            query = _copied(query)
            keys, shared = self._kept_keys(call.path, fused.key.detach(), query.shape[2])
            if mask is not None:
                mask, more = self._kept_mask(mask)
                shared = _sum(shared, more)
        functions = fused.score_mod, fused.mask_mod
        source = Factors(query, keys, fused.key.shape[2], fused.scale, mask, fused.causal, *functions)
        reason = (
            "there was dropout on the weights, whose pattern a fused kernel does not tell: the gradient is known with "
            "model.eval(), or without attention dropout"
        )
        gradient = self._gradient_of(fused.output, source.shape, fused.value, reason if fused.dropout else None)
        made = AttentionMap.from_source(source, path=call.path, kind=call.kind, gradient=gradient)
        return made, _sum(shared, _sizes(query, *([] if gradient is None else gradient.tensors())))

    def _kept_keys(self, path: str, key: Tensor, queries: int) -> tuple[Keys, dict[str, int]]:
        """The keys of a call, and the bytes that they add. Of a growing cache only the new keys are copied."""
        known = self._growing.get(path)
        if known is not None and queries < key.shape[2] and known.begins(key):
            [device] = bytes_by_device(key)
            return known, {device: known.grow(key)}
        self._growing[path] = keys = Keys(_copied(key))
        return keys, _sizes(keys.buffer)

    def _kept_mask(self, mask: Tensor) -> tuple[Tensor, dict[str, int]]:
        """A copy of a mask, and the bytes that it adds; layers that are given the same mask share its copy."""
        version = None if mask.is_inference() else mask._version
        number = id(mask)
        known = self._masks.get(number)
        if known is not None and known[0]() is mask and known[1] == version:
            return known[2], {}
        compact = mask.detach()
        for axis, step in enumerate(compact.stride()):
            if step == 0:  # expanded: one number is used for the whole axis
                compact = compact.narrow(axis, 0, 1)
        kept = _copied(compact)
        masks = self._masks
        masks[number] = weakref.ref(mask, lambda _: masks.pop(number, None)), version, kept
        return kept, _sizes(kept)

    def _gradient_of(
        self, output: Tensor, shape: Any, values: Tensor | None = None, reason: str | None = None
    ) -> Gradient | None:
        """What a backward pass through a kernel's output, or through a softmax's weights, will bring."""
        if not self._gradients or not output.requires_grad:
            return None
        gradient = Gradient(shape, None if values is None else _copied(values), reason)
        output.register_hook(gradient.accumulate)  # type: ignore[no-untyped-call]
        return gradient


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _sizes(*tensors: Tensor) -> dict[str, int]:
    return _sum(*map(bytes_by_device, tensors))


def _sum(*several: dict[str, int]) -> dict[str, int]:
    total = dict[str, int]()
    for sizes in several:
        for device, size in sizes.items():
            total[device] = total.get(device, 0) + size
    return total

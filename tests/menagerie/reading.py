"""An independent reading of attention: what torch's operators were given, below everything that the package looks at.

A dispatch mode sees each operator after autograd, with every fused kernel taken apart into products and a softmax. It
notes each product of weights (what became of a softmax of scores) with values. A second run replaces the output of such
products by numbers that say which of its leading axes they are from: what the model's next linear layer is given tells
which of these axes are features (heads) and which are rows (batch, windows). It replaces the softmax by the numbers of
its pairs of query and key: a product over anything else, such as heads, sums over numbers that are all the same.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

DISTANCES = {"_cdist_forward", "_euclidean_dist"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_scaled_mm", "convolution", "dot", "mv"}
SOFTMAXES = {"_softmax", "_safe_softmax"}
COMPOSITE = {"matmul", "linear", "einsum", "softmax"}
FUSED = {"_scaled_dot_product_flash_attention_for_cpu"}
MOST_RUNS = 3
REDUCTIONS = {
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "topk",
    "sort",
    "std",
    "var",
    "any",
    "all",
}
NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm", "rsqrt"}


@dataclass
class Seen:
    """A product of weights with values, as the operator had it."""

    weights: Tensor
    """(leading, queries, keys)."""
    softmax_shape: tuple[int, ...]
    softmaxes: int
    """How many softmaxes the weights were made of."""
    is_softmax: bool
    """Whether the weights are the numbers of that softmax, perhaps reshaped or cut."""
    over_keys: bool
    """Whether the softmax is over what the product sums over."""
    kind: str | None
    """"self", "cross" or "joint", by which linear layers query and key come from; "related" where these were given
    different tensors with a common origin: that may be one sequence or two."""
    distance: float
    """How far weights x values is from the output."""
    is_certain: bool = True
    """Whether the scores are a product of two activations; with a parameter they may be those of a learned query."""
    arrangement: list[list[int]] | None = None
    """For each of the batch, the leading index of each head; None if the model did not tell."""


@dataclass
class _Softmax:
    shape: tuple[int, ...]
    kind: str | None
    numbers: Tensor
    is_certain: bool


@dataclass
class _Fact:
    """What is known of a tensor."""

    scores: tuple[str | None, bool] | None = None
    """The kind, and whether that is certain, if they may be scores."""
    softmaxes: list[_Softmax] = field(default_factory=list)
    code: int | None = None
    """Which product's codes it has."""
    inputs: frozenset[str] = frozenset()
    """What the linear layers behind it were given."""
    further: frozenset[str] = frozenset()
    """What those behind these were given."""


class Reading(TorchDispatchMode):
    """Notes the products of weights with values; with `codes`, what the model does with the leading axes of these."""

    def __init__(self, parameters: list[Tensor], codes: set[int] | None = None) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.output: Any = None
        """What the model returned."""
        self.arrangements: list[list[list[int]] | None] = []
        self.over_keys: list[tuple[torch.Size, bool]] = []
        """Of each product the shape of the weights, and whether it sums over keys."""
        self.passed_on = False
        """Whether a product got the codes of another one in place of its own."""
        self._codes = codes
        self._parameters = {one.untyped_storage().data_ptr() for one in parameters}
        self._facts: dict[int, tuple[Tensor, _Fact]] = {}
        self._softmaxes: list[_Softmax] = []

    @property
    def softmaxes_of_scores(self) -> int:
        """How many softmaxes of products of two activations ran."""
        return sum(one.is_certain for one in self._softmaxes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in FUSED:  # a model that asks for this kernel gets it taken apart
            query, key, value, _, is_causal = [*args, *(0.0, False)[len(args) - 3 :]]
            more = {"attn_mask": (kwargs or {}).get("attn_mask"), "scale": (kwargs or {}).get("scale")}
            with self:
                apart = torch.ops.aten._scaled_dot_product_attention_math.default.decompose(
                    query, key, value, is_causal=is_causal, **more
                )
            return apart[0], func(*args, **(kwargs or {}))[1]
        if name in COMPOSITE:  # only seen whole below a kernel that was taken apart
            with self:
                return func.decompose(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        tensors = [one for one in _flat([*args, *(kwargs or {}).values()]) if isinstance(one, Tensor)]
        facts = [fact for one in tensors if (fact := self._fact(one)) is not None]
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if not isinstance(first, Tensor) or not first.is_floating_point() or first.device.type == "meta":
            return out
        if name in PRODUCTS:
            self._product(name, args, first)
        elif name in DISTANCES:
            self._note(first, _Fact(scores=(_kind(*map(self._fact, args[:2])), True)))
        elif name in SOFTMAXES:
            self._softmax(first, args, facts)
        elif facts:
            for one in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(one, Tensor):
                    self._carry(name, tensors, facts, one)
        return out

    def _fact(self, tensor: Tensor) -> _Fact | None:
        known = self._facts.get(id(tensor))
        return None if known is None else known[1]

    def _note(self, tensor: Tensor, fact: _Fact) -> None:
        self._facts[id(tensor)] = tensor, fact

    def _is_parameter(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._parameters

    def _product(self, name: str, args: Any, out: Tensor) -> None:
        left, right = args[1:3] if name in ("addmm", "baddbmm") else args[:2]
        fact, other = self._fact(left), self._fact(right)
        weighted = [known for known in (fact, other) if known is not None and known.softmaxes]
        if len(weighted) != 1 or name == "convolution" or self._is_parameter(left) or self._is_parameter(right):
            for one, known in ((left, fact), (right, other)):
                if known is not None and known.code is not None:
                    self._read_codes(known.code, one, self._feature_axis(name, one is left, one))
        if name == "convolution" or self._is_parameter(left) or self._is_parameter(right):
            given, known = (right, other) if self._is_parameter(left) else (left, fact)
            mixes = known is not None and (known.softmaxes or known.scores) and _keeps_pairs(name, given, out)
            if (
                mixes and known is not None and known.softmaxes
            ):  # a softmax that scaled the tokens is no weights of them
                mixes = any(one.numbers.numel() == given.numel() for one in known.softmaxes)
            label = frozenset([_content(given)])
            further = frozenset() if known is None else known.inputs
            made = _Fact(scores=(None, False), inputs=label, further=further)
            if name == "convolution" and args[1].shape[2:].numel() > 1:  # it pools, and the layer behind it projects
                made.inputs, made.further = (known.inputs, known.further) if known is not None else (frozenset(),) * 2
            if mixes and known is not None:
                made.softmaxes, made.scores = known.softmaxes, known.scores
            self._note(out, made)
            return
        if not weighted:  # weights need no softmax
            for one, known in ((left, fact), (right, other)):
                if known is not None and known.scores is not None and known.scores[1]:
                    instead = _Softmax(tuple(one.shape), known.scores[0], one.clone(), is_certain=False)
                    weighted = [replace(known, softmaxes=[instead])]
                    fact, other = (weighted[0], other) if one is left else (fact, weighted[0])
                    break
        labels = frozenset().union(*(known.inputs for known in (fact, other) if known is not None))
        is_of_softmax = len(weighted) == 1 and any(one.is_certain for one in weighted[0].softmaxes)
        made = _Fact(scores=(None, False) if is_of_softmax else (_kind(fact, other), True), inputs=labels)
        self._note(out, made)
        if len(weighted) == 1:
            self._weighted(name, args, left, right, out, weighted[0], fact is weighted[0])

    def _weighted(
        self, name: str, args: Any, left: Tensor, right: Tensor, out: Tensor, fact: _Fact, is_left: bool
    ) -> None:
        weights, values = (left, right) if is_left else (right.mT, left.mT)
        result = out if is_left else out.mT
        if weights.ndim == 2:
            weights, values, result = weights[None], values[None], result[None]
        if name == "baddbmm":
            result = result - (args[0] if is_left else args[0].mT)
        if self._codes is not None:
            number, known = len(self.arrangements), self._facts[id(out)][1]
            self.arrangements.append(None)
            varies = bool((weights.amax(-1) > weights.amin(-1)).any()) or weights.shape[-1] < 2
            self.over_keys.append((weights.shape, varies))
            other = self._fact(right if is_left else left)
            if other is not None and other.code is not None and values.shape[-1]:  # such as a second attention
                result.copy_(values[:, torch.arange(result.shape[1]) % values.shape[1]])
                self._note(out, replace(known, code=other.code))
                self.passed_on = True
                return
            if number not in self._codes:
                return
            codes = torch.arange(1, len(weights) + 1, dtype=out.dtype, device=out.device)
            out.copy_((codes if out.ndim == 3 else codes.squeeze(0)).reshape(-1, *[1] * 2) if out.ndim == 3 else codes)
            self._note(out, replace(known, code=number))
            if len(weights) == 1:
                self.arrangements[number] = [[0]]
            return
        one = fact.softmaxes[0]
        numbers = one.numbers
        same = len(fact.softmaxes) == 1 and numbers.numel() == weights.numel()
        is_softmax = same and torch.equal(numbers.flatten().sort().values, weights.flatten().sort().values)
        total = weights.sum(-1)
        over_keys = not is_softmax or bool(((total - 1).abs() < 1e-3).logical_or(total == 0).all())
        distance = float((weights @ values - result).abs().max()) if weights.numel() and values.numel() else 0.0
        kind = next((item.kind for item in fact.softmaxes if item.kind), None)
        certain = any(item.is_certain for item in fact.softmaxes)
        self.seen.append(
            Seen(weights.clone(), one.shape, len(fact.softmaxes), is_softmax, over_keys, kind, distance, certain)
        )

    def _softmax(self, out: Tensor, args: Any, facts: list[_Fact]) -> None:
        scores = None
        for fact in facts:
            scores = _surer(scores, fact.scores)
        if scores is None or out.ndim < 2:
            return
        if self._codes is not None and scores[1]:
            pairs = torch.arange(1, out.shape[-1] * out.shape[-2] + 1, dtype=out.dtype, device=out.device)
            out.copy_(pairs.view(out.shape[-2:]))
        made = _Softmax(tuple(out.shape), scores[0], out.clone(), scores[1])
        self._softmaxes.append(made)
        self._note(out, _Fact(softmaxes=[made]))

    def _carry(self, name: str, tensors: list[Tensor], facts: list[_Fact], out: Tensor) -> None:
        inputs = frozenset().union(*(fact.inputs for fact in facts))
        further = frozenset().union(*(fact.further for fact in facts))
        made = _Fact(inputs=inputs, further=further)
        # An operator in place returns what it was given: what was known of it stays.
        for tensor, fact in zip([one for one in tensors if self._fact(one) is not None], facts, strict=True):
            size = max(1, min(tensor.numel(), out.numel()))
            follows = name not in REDUCTIONS and out.ndim >= 2 and max(tensor.numel(), out.numel()) / size < 64
            if follows:
                made.scores = _surer(made.scores, fact.scores if name not in NORMS else None)
                made.softmaxes = list(dict.fromkeys([*map(_Same, made.softmaxes), *map(_Same, fact.softmaxes)]))
                made.softmaxes = [same.one for same in made.softmaxes]
            if fact.code is not None:
                count = int(tensor.max()) if tensor.numel() else 0
                if out.ndim and _are_codes(out, count) and out.numel() >= tensor.numel() // 2:
                    made.code = fact.code
                elif "batch_norm" in name or "group_norm" in name:
                    self._read_codes(fact.code, tensor, 1, is_sure=False)
                elif tensor.ndim in (2, 3):  # gated, normed or added to: the features are last
                    self._read_codes(fact.code, tensor, -1, is_sure=False)
        self._note(out, made)

    def _feature_axis(self, name: str, is_left: bool, tensor: Tensor) -> int:
        if name == "convolution":
            return 1
        return -1 if is_left else -2

    def _read_codes(self, number: int, tensor: Tensor, axis: int, is_sure: bool = True) -> None:
        """Which codes share a row of what a linear layer is given."""
        if self.arrangements[number] is not None or tensor.ndim < 2:
            return
        rows = tensor.movedim(axis, -1).flatten(0, -2)
        if len(rows) > 512:
            rows = rows.unique(dim=0)
        groups = dict.fromkeys(tuple(dict.fromkeys(int(code) - 1 for code in row if code)) for row in rows.tolist())
        groups.pop((), None)
        arranged = sorted((list(group) for group in groups), key=min)
        flat = [code for group in arranged for code in group]
        if not is_sure and len(flat) == len(arranged):
            return  # the heads may become features later
        if len({len(group) for group in arranged}) == 1 and sorted(flat) == list(range(len(flat))):
            self.arrangements[number] = arranged


class _Same:
    """A softmax as a key of a dict, by identity."""

    def __init__(self, one: _Softmax) -> None:
        self.one = one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.one is self.one

    def __hash__(self) -> int:
        return id(self.one)


def _surer(one: Any, other: Any) -> Any:
    return other if one is None or (other is not None and other[1] and not one[1]) else one


def _flat(items: Any) -> Any:
    for item in items:
        if isinstance(item, (list, tuple)):
            yield from _flat(item)
        else:
            yield item


def _content(tensor: Tensor) -> str:
    bits = tensor.detach().contiguous().flatten().float().view(torch.int32).long()
    return f"{bits.numel()} {bits.sum()} {(bits * bits).sum()}"  # the same numbers in any order


def _are_codes(tensor: Tensor, count: int) -> bool:
    return bool(((tensor == tensor.round()) & (tensor >= 0) & (tensor <= count)).all()) and bool(tensor.any())


def _keeps_pairs(name: str, given: Tensor, out: Tensor) -> bool:
    """Whether a layer may have mixed heads: it leaves as many pairs of query and key as there were."""
    if name == "convolution":
        return given.shape[2:] == out.shape[2:]
    return given.shape[:-1] == out.shape[:-1] and given.shape[-1] <= 64 and out.shape[-1] <= 64


def _kind(query: _Fact | None, key: _Fact | None) -> str | None:
    if query is None or key is None or not (query.inputs and key.inputs):
        return None
    if query.inputs == key.inputs:
        return "joint" if len(query.inputs) > 1 else "self"
    if query.inputs & key.inputs or not (query.further and key.further):
        return None
    near, other = query.inputs | query.further, key.inputs | key.further
    return "related" if near & other else "cross"


@contextmanager
def without_fast_path() -> Any:
    """nn.MultiheadAttention and nn.TransformerEncoder as torch's Python code has them."""
    mha = getattr(torch.backends, "mha", None)
    before = mha.get_fastpath_enabled() if mha is not None else None
    if mha is not None:
        mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        if mha is not None:
            mha.set_fastpath_enabled(before)


@contextmanager
def taken_apart() -> Any:
    """Fused kernels as products and softmaxes."""
    with without_fast_path(), sdpa_kernel(SDPBackend.MATH):
        yield


def read(model: torch.nn.Module, run: Any) -> Reading:
    """What a model's products of weights and values are, by two runs of it or more."""
    parameters = [*model.parameters(), *model.buffers()]
    with taken_apart():
        first = Reading(parameters)
        with first:
            first.output = run()
        first._facts.clear()
        for _ in range(MOST_RUNS):
            pending = {number for number, seen in enumerate(first.seen) if seen.arrangement is None}
            second = Reading(parameters, codes=pending)
            try:
                with second:
                    run()
            except Exception:  # a model may not bear the codes
                pass
            second._facts.clear()
            for number, (seen, arrangement) in enumerate(zip(first.seen, second.arrangements)):
                if arrangement is not None and number in pending and sum(map(len, arrangement)) == len(seen.weights):
                    seen.arrangement = arrangement
                shape, varies = second.over_keys[number]
                if shape != seen.weights.shape:  # what the numbers are decided what ran
                    break
                seen.over_keys &= varies
            if not second.passed_on:
                break
    return first

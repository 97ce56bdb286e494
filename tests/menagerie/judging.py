"""Compares the maps of a model's calls with the independent reading of the same calls."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visualizer import attention

from .making import BATCH, NotBuilt, in_words
from .reading import Reading, Seen, read, taken_apart, without_fast_path

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Answer:
    """Weights that a model's own code returns."""

    field: str
    """The name that they are returned under."""
    weights: Tensor

    @property
    def kind(self) -> str | None:
        """What the name says."""
        return "cross" if "cross" in self.field else None


def judge(model: torch.nn.Module, run: Any, answers: Any = None) -> dict[str, Any]:
    """The outcome for one model, as plain data.

    Args:
        model: in evaluation mode.
        run: calls it; every call does the same.
        answers: returns a list of Answer, if the model's own code has some.
    """
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        before = _tensors(run())
        said.clear()
        with attention(model) as maps:
            after = _tensors(run())
        words = [str(one.message).splitlines()[0][:300] for one in said if "visualizer" in type(one.message).__module__]
        try:
            reading = read(model, run)
        except Exception as error:  # the model ran with and without recording: it is the reading that it does not bear
            raise NotBuilt(f"it does not run while it is read: {in_words(error)}") from error
        apart = _gap(before, _tensors(reading.output))
        if apart is None or apart > 1e-2 * max([1.0, *(float(one.abs().max()) for one in before if one.numel())]):
            raise NotBuilt(f"the model computes something else while it is read (by {apart})")
        own = [] if answers is None else answers()
        reasons, compared = reasons_of(reading, list(maps), own)
        if reasons:  # a deep model may make much of the rounding of its kernels: both with the same ones
            with taken_apart(), attention(model) as same_kernels:
                run()
            instead, _ = reasons_of(reading, list(same_kernels), own)
            if instead.total() < reasons.total():
                maps, reasons = same_kernels, instead
        if not _same(before, after):
            with without_fast_path():  # torch's own two ways through nn.MultiheadAttention round differently
                before = _tensors(run())
        if not _same(before, after):
            gap, noise = _gap(before, after), _gap(before, _tensors(run()))
            if gap is None or gap > max(1e-6, 2 * (noise or 0.0)):
                reasons["the output changes while it is recorded" + (f" (by {gap:.1g})" if gap else "")] += 1
        found = _answers_found(own, list(maps), reading, reasons)
    return {
        "maps": len(maps),
        "products": compared,
        "softmaxes": reading.softmaxes_of_scores,
        "answers": found,
        "kinds": dict(Counter(str(one.kind) for one in maps)),
        "arranged": sum(seen.arrangement is not None for seen in reading.seen),
        "worst": max((seen.distance for seen in reading.seen), default=0.0),
        "said": words,
        "reasons": dict(reasons),
    }


def reasons_of(reading: Reading, maps: list[Any], own: Sequence[Answer] = ()) -> tuple[Counter[str], int]:
    """What is wrong with maps, and how many products were compared.

    Args:
        own: weights that the model's own code returns, whose axes count more than what its layers are given: it may
            hand each expert's heads to a layer of their own.
    """
    reasons = Counter[str]()
    left, compared = list(enumerate(maps)), 0
    in_windows = any(seen.arrangement is not None and len(seen.arrangement) > BATCH for seen in reading.seen)
    for seen in reading.seen:
        place, reason = _best(seen, left, maps, in_windows)
        if reason is not None and reason.startswith("axes") and any(_is_same(maps[place], one.weights) for one in own):
            reason = _kind_reason(seen, maps[place], in_windows)
        if place is None and not seen.is_certain:
            continue
        if not seen.over_keys:
            reasons["(softmax over something else than the keys)"] += 1
            reason = None
        compared += 1
        left = [pair for pair in left if pair[0] != place]
        if reason is not None:
            reasons[reason] += 1
    for _, one in left:
        if hasattr(one.source, "points"):
            reasons["(deformable attention, whose weights are compared with the model's own answer alone)"] += 1
            continue
        if one.shape[3] == 1:
            reasons["(a map of a single key, which torch multiplied without a matrix product)"] += 1
            continue
        reasons[f"a map of {one.path.rpartition('.')[2] or 'the model'} that the reading has not"] += 1
    return reasons, compared


def _is_same(one: Any, weights: Tensor) -> bool:
    return one.shape == weights.shape and bool(((one.dense() - weights).abs() <= TOLERANCE).all())


def _expected(seen: Seen) -> Tensor | None:
    if seen.arrangement is not None:
        return seen.weights[torch.tensor(seen.arrangement)]
    shape = seen.softmax_shape
    if len(shape) == 4 and shape[0] * shape[1] == len(seen.weights):
        return seen.weights.reshape(*shape[:2], *seen.weights.shape[1:])
    return None


def _best(seen: Seen, left: list[Any], whole: list[Any], in_windows: bool) -> tuple[int | None, str | None]:
    """Which map is that of a product, and what is wrong with it."""
    queries, keys = seen.weights.shape[-2:]
    expected = _expected(seen)
    nearest, unordered = float("inf"), None
    for number, one in left:
        if one.shape[2:] != (queries, keys) or one.shape[0] * one.shape[1] != len(seen.weights):
            continue
        dense = one.dense().float()
        if expected is not None and dense.shape == expected.shape:
            gap = float((dense - expected).abs().max()) if dense.numel() else 0.0
            if gap <= TOLERANCE:
                return number, _kind_reason(seen, one, in_windows)
            nearest = min(nearest, gap)
        if unordered is None and _same_matrices(dense.flatten(0, 1), seen.weights):
            unordered = number, one
    if unordered is not None:
        number, one = unordered
        if expected is None:
            return number, _kind_reason(seen, one, in_windows)
        told = ", and the map says that they are assumed" if one.axes_assumed else ""
        return number, f"axes: {tuple(one.shape)} in place of {tuple(expected.shape)}{told}"
    for number, one in [*left, *enumerate(whole)]:
        if _holds(one, seen.weights):
            return number, None
    if nearest < float("inf"):
        return None, f"numbers: the nearest map is {nearest:.1g} off"
    shape = tuple(seen.weights.shape) if expected is None else tuple(expected.shape)
    return None, f"no map of {shape}"


def _kind_reason(seen: Seen, one: Any, in_windows: bool) -> str | None:
    expected = seen.kind
    if expected is None or one.kind == expected:
        return None
    if expected == "related":
        return None if one.kind is not None else "kind: None in place of self or cross"
    if expected == "joint" and one.kind in ("self", "window"):
        return None
    if expected == "self" and one.kind in ("window", "joint"):
        if one.kind == "window" and not in_windows and seen.arrangement is not None:
            return "kind: window in place of self"
        return None
    return f"kind: {one.kind} in place of {expected}"


def _same_matrices(one: Tensor, other: Tensor) -> bool:
    """Whether they hold the same matrices, in any order."""
    if len(one) > 4096 or not one.numel():
        return one.shape == other.shape
    apart = torch.cdist(one.flatten(1).float(), other.flatten(1).float(), p=float("inf"))
    return bool((apart.amin(0) <= TOLERANCE).all() and (apart.amin(1) <= TOLERANCE).all())


def _holds(one: Any, weights: Tensor) -> bool:
    """Whether a map has all the rows of a product's weights: several calls that are one attention are one map."""
    count = one.shape[0] * one.shape[1] * one.shape[2]
    rows = weights.flatten(0, 1).float()
    if one.shape[3] != weights.shape[-1] or count < len(rows) or count > 20000 or len(rows) > 20000:
        return False
    apart = torch.cdist(rows, one.dense().float().flatten(0, 2), p=float("inf"))
    return bool((apart.amin(1) <= TOLERANCE).all())


def _answers_found(own: list[Answer], whole: list[Any], reading: Reading, reasons: Counter[str]) -> dict[str, int]:
    """How many of the model's own answers are found among the maps, comparable or not."""
    found: Counter[str] = Counter()
    is_read = not any(not reason.startswith("(") for reason in reasons)  # all that is multiplied is among the maps
    for answer in own:
        weights = answer.weights.float()
        if weights.ndim < 3 or not _are_weights(weights):
            found["not weights"] += 1
            continue
        queries, keys = weights.shape[-2:]
        same = None
        for one in whole:
            if one.shape[2:] == (queries, keys) and one.shape[0] * one.shape[1] * queries * keys == weights.numel():
                dense = one.dense().float()
                if dense.shape == weights.shape and float((dense - weights).abs().max()) <= TOLERANCE:
                    same = one
                    break
                if weights.ndim != 4 and _same_matrices(dense.flatten(0, 1), weights.flatten(0, -3)):
                    same = one
                    break
        same = next((one for one in whole if _samples_with(one, weights)), None) if same is None else same
        is_alike = any(seen.weights.shape[-2:] == (queries, keys) for seen in reading.seen)
        if same is None and is_alike and is_read:
            found["another form"] += 1
            reasons["(what its own code returns is not what it multiplies with the values)"] += 1
        elif same is None and is_alike:
            found["differs"] += 1
            reasons[f"own: {answer.field} {tuple(weights.shape)} is not among the maps"] += 1
        elif same is None:  # such as the weights of sampling points
            found["another form"] += 1
        else:
            found["found"] += 1
            if answer.kind is not None and same.kind != answer.kind:
                reasons[f"kind: {same.kind} in place of {answer.kind}"] += 1
    return dict(found)


def _samples_with(one: Any, weights: Tensor) -> bool:
    """Whether a map is of sampling points that have these weights, (batch, queries, heads, levels and points)."""
    if not hasattr(one.source, "points"):
        return False
    own = one.source.weights.transpose(1, 2)
    return own.numel() == weights.numel() and bool(((own.reshape(weights.shape) - weights).abs() <= TOLERANCE).all())


def _are_weights(weights: Tensor) -> bool:
    """Whether rows may be shares of a whole; where there is an attention sink they sum to less than one."""
    return bool((weights >= 0).all()) and bool((weights.sum(-1) < 1 + 1e-3).all())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.detach().clone()]
    if isinstance(output, dict):
        output = list(output.values())
    elif hasattr(output, "__dict__") and not isinstance(output, (list, tuple)):
        output = list(vars(output).values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in _tensors(item)]
    return []


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num())) for a, b in zip(one, other)
    )


def _gap(one: list[Tensor], other: list[Tensor]) -> float | None:
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other)):
        return None
    gaps = [float((a.double() - b.double()).nan_to_num().abs().max()) for a, b in zip(one, other) if a.numel()]
    return max(gaps, default=0.0)

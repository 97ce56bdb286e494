"""Whether weights are multiplied with values, where that is written as something else than a matrix product.

Gates of experts, probabilities of classes, codebooks and losses are written the same. What tells is not the names but
the axes: which of them the two tensors had that the scores were made of, and which ones the values have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import is_plain_torch
from .axes import Factor, is_in
from .contractions import Terms, is_parameter, without_absent
from .weights import SUMS_TO_ONE, Scores, Softmax, Weights

_NEW = "?"
"""The letter of a new axis, of a single query."""


class TermsOrder(NamedTuple):
    """Which axes of what is multiplied are (..., queries, keys), (..., keys, width), (..., queries, width)."""

    labels: str
    """A letter for each axis of the weights."""
    order: tuple[int, ...]
    """Which of these axes, without those along which they are the same, each axis of the map is."""
    values: Tensor
    output: Tensor
    places: tuple[int | None, ...]
    """See `Product.places`."""

    def arranged(self, weights: Tensor) -> Tensor:
        """Weights as (..., queries, keys)."""
        own, labels = without_absent(weights, self.labels)
        return (own if len(labels) == len(self.order) else own.unsqueeze(-1)).permute(self.order)


def order_of_terms(terms: Terms, tensor: Tensor, origin: Weights, result: Tensor) -> TermsOrder | None:
    """How weights are multiplied with values; None if that may be something else than attention.

    Neither of the two that the scores were made of is a parameter: else a layer made them, as gates of experts,
    probabilities of classes, or weights of keys without a query. The sum is over the keys, and the values have features
    that the weights have not.
    """
    own, others, values = terms.of(tensor)
    scores = [one.scores for one in origin.softmaxes if one.is_of_scores]
    if not scores or any(one is None or one.sides is None or one.sides.of_parameters for one in scores):
        return None
    if is_parameter(values) or not values.is_floating_point():
        return None
    sizes = dict(zip(others, values.shape, strict=True)) | dict(zip(own, tensor.shape, strict=True))
    keys = [label for label in own if label in others and label not in terms.output and label != "."]
    width = [label for label in terms.output if label in others and label not in own]
    if len(keys) != 1 or all(sizes[label] == 1 for label in width) or not _has_room(terms, own, others, width, origin):
        return None
    query = _query_of(own, others, keys[0], sizes, origin)
    real = own.replace(".", "")
    lead = [label for label in terms.output if label in real and label != query]
    if query is None or len(real + _NEW * (query == _NEW)) != len(lead) + 2:
        return None
    if {*others} - {".", query} != {*keys, *width, *(label for label in lead if label in others)}:
        return None
    values, labels = without_absent(values, others.replace(query, "."))
    values = values.permute([labels.index(label) for label in (*lead, *keys, *width) if label in labels])
    for place in (place for place, label in enumerate(lead) if label not in labels):
        values = values.unsqueeze(place)
    output, labels = without_absent(result, terms.output)
    if output.dtype == torch.float64 != tensor.dtype:
        output = output.float()  # to which the weights are known
    if query == _NEW:
        output, labels, real = output.unsqueeze(-1), labels + _NEW, real + _NEW
    made = [*lead, query, width[-1]]
    return TermsOrder(
        own,
        tuple(real.index(label) for label in (*lead, query, *keys)),
        values.flatten(len(lead) + 1),
        output.permute([labels.index(label) for label in (*lead, query, *width)]).flatten(len(lead) + 1),
        tuple(made.index(label) if label in made else None for label in terms.output),
    )


def normalised(terms: Terms, scores: Tensor, origin: Scores, empty: Tensor | None) -> Weights | None:
    """Scores whose sums over the keys are one, as weights; of others nobody knows whether they are any.

    Args:
        empty: where queries may attend to nothing, see `EmptyRows.of`.
    """
    own = terms.of(scores)[0]
    weights, labels = without_absent(scores.detach(), own)
    keys = [label for label in labels if label not in terms.output]
    if len(keys) != 1 or not weights.numel() or not is_plain_torch(torch):
        return None
    if not weights.is_floating_point() or bool((weights < 0).any()):
        return None
    sums = weights.sum(labels.index(keys[0]), dtype=torch.promote_types(weights.dtype, torch.float32))
    if empty is not None:
        sums = sums.masked_fill(sums.isnan(), 1)
    if not bool(((sums - 1).abs() < SUMS_TO_ONE).all()):
        return None
    made = Weights((Softmax(scores, axis=own.index(keys[0]), scores=origin),))
    made.softmaxes[0].empty = empty
    made.softmaxes[0].factors = [*map(Factor, scores.shape)]
    made.layout = [[] if label == "." else [one] for one, label in zip(made.softmaxes[0].factors, own, strict=True)]
    made.pair = (made.softmaxes[0].factors[own.index(keys[0])],)
    return made


def _has_room(terms: Terms, own: str, others: str, width: Sequence[str], origin: Weights) -> bool:
    """Whether weights were given an axis for the features: a mask has more axes than weights, too."""
    if not terms.are_aligned:
        return True
    for place in (others.index(label) + len(own) - len(others) for label in width):
        if place >= 0 and (origin.layout is None or not origin.layout[place] or place == len(own) - 1):
            return True
    return False


def _query_of(own: str, others: str, key: str, sizes: dict[str, int], origin: Weights) -> str | None:
    """The letter of the queries in weights; `_NEW` of a single one that has none.

    None if they are not known, or if the sum is not over what the softmax was over. Values that differ where the keys
    do not are no values: they are those of experts, of which each token has its own output. Nor are those of which the
    batch has none, such as a codebook's; and queries of which it has none are learned.
    """
    softmax = next(one for one in origin.softmaxes if one.is_of_scores)
    axes = _axes_of(softmax, own, origin)
    if axes is None or softmax.scores is None or not _is_over(own.index(key), own, origin):
        return None
    made_of = softmax.scores.axes(len(softmax.factors) or len(axes))
    if made_of is None:
        return None
    rest = [label for label in axes if label != key]
    only = [label for label in rest if sizes[label] > 1 and label not in others]
    with_keys = [side for side in (0, 1) if all(made_of[axis][side] for axis in axes[key])]
    for side in with_keys:
        is_of_keys = {label: all(made_of[axis][side] for axis in axes[label]) for label in rest}
        free = [label for label in rest if not is_of_keys[label]]
        queries = [label for label in free if label in only] if only else free
        if not only and not free and len(rest) == 1 and rest[0] not in others:
            queries = rest  # of length 1 in both
        if len(with_keys) == 2 and only:  # both were expanded to all pairs, which does not tell them apart
            queries = queries or only
        if len(queries) > 1 and origin.layout is not None and len(origin.pair) > 1:
            queries = [label for label in queries if is_in(origin.pair[1], origin.layout[own.index(label)])]
        is_single = not only and len(with_keys) == 1 and all(sizes[label] == 1 for label in queries)
        if len(queries) > 1 or not (is_single or (only and queries)):
            continue
        lead = [label for label in rest if label not in queries]
        of_values = [label for label in lead if label in others]
        has_batch = any(all(made_of[axis][1 - side] for axis in axes[label]) for label in lead)
        if lead and (not of_values or not has_batch or not all(map(is_of_keys.get, of_values))):
            continue
        if not lead and any(label in others for label in queries):
            continue  # they may be values of the single query
        return queries[0] if queries else _NEW
    return None


def _axes_of(softmax: Softmax, own: str, origin: Weights) -> dict[str, list[int]] | None:
    """By the letter of an axis of weights, which axes of their softmax are in it; None if they are not known."""
    labels = [label for label in own if label != "."]
    if origin.layout is None or not softmax.factors:
        count = len(softmax.factors) or len(labels)
        return {label: [axis] for axis, label in enumerate(labels)} if len(labels) == count else None
    return {
        label: [place for place, factor in enumerate(softmax.factors) if is_in(factor, axis)]
        for label, axis in zip(own, origin.layout, strict=True)
        if label != "."
    }


def _is_over(axis: int, own: str, origin: Weights) -> bool:
    """Whether an axis of weights has all that their softmax was over."""
    with_key = [place for place, axes in enumerate(origin.layout or ()) if is_in(origin.pair[0], axes)]
    if with_key or (origin.layout is not None and origin.pair[0].size > 1):
        return with_key == [axis]
    is_last = axis == max(place for place, label in enumerate(own) if label != ".")
    return is_last and all(one.is_over_last for one in origin.softmaxes)

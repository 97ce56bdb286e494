"""The statistics: what is measured of each head in each image or text of a data set.

A statistic is one class here: a method `of`, and what the command line and the plots say of it. Add its name to
`__all__`, and `visualizer.statistics`, `visualizer stats`, `visualizer plot` and `plot.statistic` have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..analysis import patterns, rows
from ..analysis.layers import check_heads, fused
from ..layout import Patches
from ..maps import AttentionMap
from ..reading import Reduction
from .base import Statistic
from .tokens import Tokens

__all__ = ["Confidence", "Distance", "Entropy", "MeanMap", "Patterns", "PrefixMass", "Received", "Sink"]


class Distance(Statistic):
    """How far each head looks over the picture: `analysis.attention_distance` of each image.

    >>> import torch
    >>> from visualizer.statistics import Distance
    >>> statistic = Distance(patch_size=16)
    >>> statistic.update(torch.full((1, 8, 2, 197, 197), 1 / 197))
    >>> statistic.compute().mean.round()                        # pixels
    array([[116., 116.]])

    grid, patch_size, prefix_tokens and renormalise are those of `visualizer.analysis.attention_distance`.
    """

    about = "how far it looks, in patches"
    default_for = ("images",)

    def __init__(
        self,
        grid: tuple[int, int] | None = None,
        *,
        patch_size: float = 1,
        prefix_tokens: int | None = None,
        renormalise: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        rows.check_patch_size(patch_size)
        self.grid, self.patch_size, self.prefix_tokens, self.renormalise = grid, patch_size, prefix_tokens, renormalise
        self.label = f"mean attention distance ({'patches' if patch_size == 1 else 'pixels'})"

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads), in the unit of `patch_size`."""
        where: Patches = {"grid": self.grid, "prefix_tokens": self.prefix_tokens}
        return rows.distance_of(layer, where, self.patch_size, self.renormalise)


class Entropy(Statistic):
    """How broadly each head attends: the mean entropy of an image's or text's queries, in nats.

    >>> import torch
    >>> from visualizer.statistics import Entropy
    >>> statistic = Entropy()
    >>> statistic.update(torch.full((2, 1, 1, 4, 4), 1 / 4))
    >>> statistic.compute().mean.round(4)                       # ln 4
    array([[1.3863],
           [1.3863]])
    """

    about = "how broadly it attends"
    default_for = ("images", "texts")
    label = "mean entropy (nats)"

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads), in nats."""
        return rows.entropy_of(layer, tokens.queries(layer)).nanmean(-1)


class Confidence(Statistic):
    """How sure each head is: the mean over an image's or text's queries of the largest weight, from 0 to 1.

    >>> import torch
    >>> from visualizer.statistics import Confidence
    >>> statistic = Confidence()
    >>> statistic.update(torch.eye(4).expand(1, 2, 1, 4, 4))
    >>> statistic.compute().mean
    array([[1.]])
    """

    about = "how sure it is: the largest weight"
    default_for = ("images", "texts")
    label = "mean of the largest weight"

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads)."""
        return rows.confidence_of(layer, tokens.queries(layer))


class Sink(Statistic):
    """How much attention one position draws: the mean of its column, from 0 to 1.

    >>> import torch
    >>> from visualizer.statistics import Sink
    >>> statistic = Sink()
    >>> statistic.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 1, 2, 2))
    >>> statistic.compute().mean
    array([[0.75]])

    Args:
        key: the position, counted from the first token that is not padding; 0: where language models send the attention
            that they have no use for.
    """

    about = "how much goes to the first token"
    default_for = ("texts",)

    def __init__(self, key: int = 0, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if not isinstance(key, int) or key < 0:
            raise ValueError(f"key={key!r}: a position is counted from 0")
        self.key, self.label = key, f"attention to token {key}"

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads); NaN where a text has no such position."""
        received = _received(layer, tokens)
        return received[..., self.key] if self.key < received.shape[2] else torch.full_like(received[..., 0], math.nan)


class PrefixMass(Statistic):
    """How much attention goes to the tokens before the patches, or before the text: class token, registers.

    >>> import torch
    >>> from visualizer.statistics import PrefixMass
    >>> statistic = PrefixMass(1)
    >>> statistic.update(torch.full((1, 1, 2, 5, 5), 1 / 5))
    >>> statistic.compute().mean.round(4)
    array([[0.2, 0.2]])

    Args:
        prefix_tokens: how many tokens; None: those that the maps know, or else 1.
    """

    about = "how much goes to the class token and registers"
    default_for = ("images",)

    def __init__(self, prefix_tokens: int | None = None, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if prefix_tokens is not None and (not isinstance(prefix_tokens, int) or prefix_tokens < 1):
            raise ValueError(f"prefix_tokens={prefix_tokens!r}: pass how many tokens, 1 or more")
        self.prefix_tokens = prefix_tokens
        self.label = "attention to prefix tokens" + (f" ({prefix_tokens})" if prefix_tokens else "")

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads), from 0 to 1."""
        received, count = _received(layer, tokens), rows.prefix_of(layer, self.prefix_tokens)
        return received[..., :count].nansum(-1).masked_fill(received.isnan().all(-1), math.nan)


class Received(Statistic):
    """How much attention each position gets from an image's or text's queries, in the mean; from 0 to 1.

    >>> import torch
    >>> from visualizer.statistics import Received
    >>> statistic = Received()
    >>> statistic.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 1, 2, 2))
    >>> statistic.compute().mean
    array([[[0.75, 0.25]]])

    The arrays are (layers, heads, positions), with as many positions as the longest text has. Positions are counted
    from a text's first token that is not padding; each has as many samples as there are texts of that length.
    """

    axes = 1
    about = "how much each position gets"
    default_for = ("images", "texts")
    label = "share of the attention"

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads, positions)."""
        return _received(layer, tokens)


class Patterns(Statistic):
    """What each head of a text model does: the scores of `analysis.head_patterns` of each text.

    >>> import torch
    >>> from visualizer.statistics import Patterns
    >>> statistic = Patterns()
    >>> statistic.update(torch.eye(8).roll(-1, 1).expand(1, 1, 1, 8, 8))  # each token sees the one before it
    >>> dict(zip(Patterns.NAMES, statistic.compute().mean[0, 0].round(2).tolist()))["previous"]
    1.0

    The arrays are (layers, heads, 7), in the order of `Patterns.NAMES`. A text is a sample of a score only where it can
    show the pattern: for induction it needs eight repeated tokens.

    Args:
        special_ids: the numbers of special tokens, such as `tokenizer.all_special_ids`.
        window: how far "local" reaches, in tokens, to either side.
    """

    axes = 1
    NAMES = number_names = patterns.SCORES
    about = "what it does with texts, a score for each pattern"
    default_for = ("texts",)
    label = "score"

    def __init__(
        self, special_ids: Sequence[int] | None = None, *, window: int = 2, name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.special_ids = None if special_ids is None else [int(number) for number in special_ids]
        if window < 0:
            raise ValueError(f"window={window!r}: pass how many tokens, 0 or more")
        self.window = window

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> Patterns:
        """With the tokenizer's special tokens."""
        return cls(getattr(tokenizer, "all_special_ids", None))

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads, 7)."""
        batch, _, queries, keys = layer.shape
        if queries != keys:
            raise ValueError(f"patterns are those of tokens among themselves, not of {queries} queries to {keys} keys")
        real, ids = tokens.keys(layer), tokens.ids
        real = torch.ones(batch, keys, dtype=torch.bool) if real is None else real.cpu()
        ids = None if ids is None else ids.cpu()
        special = None
        if ids is not None and self.special_ids is not None:
            special = torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype))
        sums, counts = patterns.score_sums(layer, patterns.facts_of([layer], ids, special, real, self.window))
        means = sums[0] / counts  # (patterns, batch, heads)
        return means.masked_fill(~patterns.has_evidence(counts), math.nan).permute(1, 2, 0)


class MeanMap(Statistic):
    """The mean map over all images of one size, or over texts, (layers, heads, queries, keys).

    >>> import torch
    >>> from visualizer.statistics import MeanMap
    >>> statistic = MeanMap()
    >>> statistic.update(torch.stack([torch.eye(2), torch.full((2, 2), 0.5)])[None, :, None])
    >>> statistic.compute().mean[0, 0]
    array([[0.75, 0.25],
           [0.25, 0.75]])

    Tokens of a text are counted from the first that is not padding; each has as many samples as there are texts of that
    length. A query that attends to nothing is no sample. Memory: five numbers of eight bytes for each weight, 224 MB
    for 12 layers of 12 heads of 197 tokens.

    Args:
        heads: how the heads of a layer become one map, "mean", "max" or "min"; None: each head has its own.
    """

    axes = 2
    about = "its mean map"
    label = "mean attention weight"

    def __init__(self, heads: Reduction | None = None, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if heads is not None:
            check_heads(heads)
        self.heads = heads

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """(batch, heads, queries, keys); one head where `heads` makes one map of them."""
        weights = layer.dense()
        weights = weights if self.heads is None else fused(weights, self.heads)[:, None]
        weights = weights.masked_fill((weights == 0).all(-1, keepdim=True), math.nan)
        return _aligned(_aligned(weights, tokens.queries(layer), -2), tokens.keys(layer), -1)


def _received(layer: AttentionMap, tokens: Tokens) -> Tensor:
    """(batch, heads, positions), counted from each text's first token that is not padding."""
    return _aligned(rows.received_of(layer, tokens.queries(layer)), tokens.keys(layer), -1)


def _aligned(values: Tensor, real: Tensor | None, axis: int) -> Tensor:
    """Values along an axis of tokens, turned so that each text's first token that is not padding comes first; the
    padding is NaN."""
    if real is None:
        return values
    tokens, real = real.shape[1], real.to(values.device)
    first = real.int().argmax(1, keepdim=True)
    places = (torch.arange(tokens, device=values.device) + first) % tokens
    shape = [len(real), *[1] * (values.ndim - 1)]
    shape[axis] = tokens
    values = values.gather(axis, places.view(shape).expand(values.shape))
    return values.masked_fill(~real.gather(1, places).view(shape), math.nan)


MEASURES: dict[str, type[Statistic]] = {measure.default_name(): measure for measure in Statistic.__subclasses__()}
"""The classes above by their names, for the command line."""

"""What is measured of the maps of a data set, a torchmetrics metric each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as error:
    raise ImportError('visualizer.statistics needs torchmetrics: pip install "get-local[stats]"') from error

from ..analysis import patterns, rows
from ..analysis.reading import Fusion, check_heads, fused, layers_of, without_nan
from ..intercept import Maps, given
from ..maps import AttentionMap, exactly
from .moments import Moments, as_large, merged, nothing, state_of

_SMALL = 2**26  # bytes of a map that several statistics read at once


@dataclass
class Texts:
    """What is known of the tokens of a batch, (batch, tokens) each; None: nothing, as of images."""

    mask: Tensor | None = None
    """0 for padding."""
    ids: Tensor | None = None
    of_keys: Tensor | None = None
    """The mask of those that are attended to, where they are others, as a decoder attends to its encoder."""

    def queries(self, layer: AttentionMap) -> Tensor | None:
        """Which queries are no padding, as a bool; None where none is known to be."""
        return _real(self.mask, layer.shape[2])

    def keys(self, layer: AttentionMap) -> Tensor | None:
        """Which keys are no padding."""
        return _real(self.of_keys if layer.kind == "cross" else self.mask, layer.shape[3])


def _real(mask: Tensor | None, tokens: int) -> Tensor | None:
    return mask != 0 if mask is not None and mask.shape[-1] == tokens else None


class Statistic(Metric):
    """A number of each head in each image or text, and its moments over all of them: the base of the statistics.

    `update` takes the maps of a batch, `compute` gives `Moments`, and all else is as in any torchmetrics metric:
    `reset`, `clone`, `to`, merging over processes. `visualizer.statistics.collect` does all of it at once.

    A statistic of your own has the method `of`:

    >>> import torch
    >>> from visualizer.statistics import Statistic
    >>> class Diagonal(Statistic):
    ...     def of(self, layer, texts):
    ...         return layer.dense().diagonal(dim1=-2, dim2=-1).mean(-1)
    >>> statistic = Diagonal()
    >>> statistic.update(torch.eye(4).expand(3, 8, 2, 4, 4))  # 3 layers, 8 images, 2 heads
    >>> statistic.compute()
    <moments of 3 x 2 heads, 8 samples
      layer  head 0  head 1
      0      1 ± 0   1 ± 0
      1      1 ± 0   1 ± 0
      2      1 ± 0   1 ± 0>

    Args:
        name: what the result calls it; None: its class's name.
        **kwargs: as of `torchmetrics.Metric`.
    """

    full_state_update = True
    is_differentiable = False
    moments: Tensor

    axes = 0
    """How many axes the number has besides those of images and heads."""

    def __init__(self, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gathered, **kwargs})
        self.name = _words(type(self).__name__) if name is None else name
        self.add_state("moments", nothing((0,) * (2 + self.axes)), dist_reduce_fx=merged)

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """The number of one layer's call: (batch, heads, ...), NaN for those that have none."""
        raise NotImplementedError(f"{type(self).__name__} has no method of(layer, texts)")

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for: files of other settings are not merged."""
        parameters = [*inspect.signature(type(self).__init__).parameters.values()][1:]
        names = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        forgotten = [name for name in names if name != "name" and name not in vars(self)]
        if forgotten:
            raise TypeError(
                f"{type(self).__name__} does not keep its argument {forgotten[0]!r} as self.{forgotten[0]}, by which "
                "statistics of other settings are told apart"
            )
        return {"statistic": type(self).__name__} | {name: vars(self)[name] for name in names if name != "name"}

    def update(self, attention: Any, attention_mask: Any = None, ids: Any = None) -> None:
        """Take the maps of one more batch in: whatever `visualizer.analysis` takes.

        attention_mask is (batch, tokens), 0 for padding: what padding attends to does not count. ids, (batch, tokens),
        are the tokens' numbers, for `Patterns`.
        """
        mask, ids = (None if given is None else torch.as_tensor(given) for given in (attention_mask, ids))
        self.take([self.reduced(layer, Texts(mask, ids)) for layer in layers_of(attention).layers])

    @exactly
    def reduced(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """The moments of one layer's call: (5, heads, ...), in which no sample is to be seen any more."""
        values = self.of(layer, texts)
        if values.ndim != 2 + self.axes:
            raise ValueError(
                f"{type(self).__name__}.of gave the shape {tuple(values.shape)}: it is (batch, heads"
                + (", ...)" if self.axes else ")")
                + f", {2 + self.axes} axes"
            )
        # Apple's GPUs have no float64.
        return state_of(values.cpu() if values.device.type == "mps" else values)

    def take(self, layers: Sequence[Tensor]) -> None:
        """Take in what `reduced` made of each layer."""
        if layers:
            here = [layer.to(self.moments.device) for layer in layers]
            self.moments = merged(torch.stack(as_large([self.moments, torch.stack(as_large(here), 1)])))
            self._update_count += 1
            self._computed = None

    def compute(self) -> Moments:
        """What is known of all samples so far."""
        return Moments.of(self.moments)


def measured(layer: AttentionMap, texts: Texts, statistics: Sequence[Statistic]) -> list[Tensor]:
    """What each statistic's `reduced` makes of a call, whose weights are computed once where they take little memory.

    Raises:
        ValueError: these are no weights, a statistic cannot read them, or its `of` gave another shape.
    """
    if layer.is_dense:
        clean = without_nan(layer)
        if clean is not layer:
            has_none = layer.rows(slice(None)).isnan().flatten(1).all(1)
            if has_none.all():
                return [nothing(tuple(statistic.reduced(clean, texts).shape[1:])) for statistic in statistics]
            clean, texts = _of_images(clean, texts, ~has_none)
        layer = clean
    elif len(statistics) > 1 and math.prod(layer.shape) * layer.dtype.itemsize <= _SMALL:
        layer = AttentionMap(layer.rows(slice(None)), path=layer.path, kind=layer.kind)
    return [statistic.reduced(layer, texts) for statistic in statistics]


def _of_images(layer: AttentionMap, texts: Texts, chosen: Tensor) -> tuple[AttentionMap, Texts]:
    """A batch without the images or texts that have no number at all, as where a model overflows."""
    if chosen.all():
        return layer, texts
    of_each = [
        known[chosen.to(known.device)] if known is not None and len(known) == len(chosen) else known
        for known in (texts.mask, texts.ids, texts.of_keys)
    ]
    return AttentionMap(layer.rows(slice(None))[chosen], path=layer.path, kind=layer.kind), Texts(*of_each)


def texts_of(layer: AttentionMap, maps: Maps, batch: Texts) -> Texts:
    """What is known of the tokens of a call that is being recorded: by its modules, else by the batch.

    The innermost module knows best: of an encoder and a decoder each has padding of its own, or is told of none.
    """
    names = {"attention_mask": batch.mask, "input_ids": batch.ids, "encoder_attention_mask": None}
    return Texts(*[_told(given(maps, name), layer.shape[0], name, known) for name, known in names.items()])


def _told(told: Sequence[Any], batch: int, name: str, known: Tensor | None) -> Tensor | None:
    for one in told:
        if one is None:
            return None
        if isinstance(one, Tensor) and one.ndim == 2 and len(one) == batch:
            one = one.detach()
            if name == "input_ids" or one.dtype == torch.bool or bool(((one == 0) | (one == 1)).all()):
                # Else it is added to scores. One of as many tokens as texts may be of tokens by tokens.
                return known if known is not None and known.shape == one.shape and batch == one.shape[1] else one
    return known


def check_statistics(model: Any, statistics: Sequence[Any]) -> None:
    """Raise TypeError or ValueError unless these are a model, and statistics with a name each."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"statistics are those of an nn.Module, not of a {type(model).__name__}")
    if not statistics:
        raise ValueError("pass the statistics to collect, such as visualizer.statistics.Entropy()")
    for statistic in statistics:
        if not isinstance(statistic, Statistic):
            what = f"the class {statistic.__name__}" if isinstance(statistic, type) else f"{statistic!r}"
            raise TypeError(f"pass statistics, such as Entropy() and Sink(key=0), not {what}")
    names = [statistic.name for statistic in statistics]
    if len({*names}) < len(names):
        raise ValueError(f"two statistics have one name: {names}; give one of them another, by name=")


def gathered(state: Tensor, group: Any = None) -> list[Tensor]:
    """Each process's state, all of one shape: one that had no samples has none."""
    return as_large(gather_all_tensors(state, group))


def _words(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """(batch, heads) of (batch, heads, queries), over those that count."""
    if real is None:
        return values.mean(-1)
    counts = real.to(values.device, values.dtype)[:, None]
    return (values * counts).sum(-1) / counts.sum(-1)


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

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads), in nats."""
        return _mean(rows.entropy_of(layer), texts.queries(layer))


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

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads), in the unit of `patch_size`."""
        return rows.distance_of(layer, self.grid, self.patch_size, self.prefix_tokens, self.renormalise)


class Confidence(Statistic):
    """How sure each head is: the mean over an image's or text's queries of the largest weight, from 0 to 1.

    >>> import torch
    >>> from visualizer.statistics import Confidence
    >>> statistic = Confidence()
    >>> statistic.update(torch.eye(4).expand(1, 2, 1, 4, 4))
    >>> statistic.compute().mean
    array([[1.]])
    """

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads)."""
        largest, real = layer.reduce(lambda some: some.amax(-1)), texts.queries(layer)
        counts = largest > 0  # a query that may see nothing is sure of nothing
        if real is not None:
            counts &= real.to(counts.device)[:, None]
        return (largest * counts).sum(-1) / counts.sum(-1)


class Received(Statistic):
    """How much attention each position gets from an image's or text's queries, in the mean; from 0 to 1.

    >>> import torch
    >>> from visualizer.statistics import Received
    >>> statistic = Received()
    >>> statistic.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 1, 2, 2))
    >>> statistic.compute().mean
    array([[[0.75, 0.25]]])

    The arrays are (layers, heads, positions), as many as the longest text had; a position is counted from a text's
    first token that is no padding, and has as many samples as texts reach so far.
    """

    axes = 1

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads, positions)."""
        return _received(layer, texts)


def _received(layer: AttentionMap, texts: Texts) -> Tensor:
    return _aligned(rows.received_of(layer, texts.queries(layer)), texts.keys(layer), -1)


def _aligned(found: Tensor, real: Tensor | None, axis: int) -> Tensor:
    """Numbers of tokens in an order in which each text's first one that is no padding is the first; NaN for padding."""
    if real is None:
        return found
    tokens, real = real.shape[1], real.to(found.device)
    first = real.int().argmax(1, keepdim=True)
    places = (torch.arange(tokens, device=found.device) + first) % tokens
    shape = [len(real), *[1] * (found.ndim - 1)]
    shape[axis] = tokens
    found = found.gather(axis, places.view(shape).expand(found.shape))
    return found.masked_fill(~real.gather(1, places).view(shape), math.nan)


class Sink(Statistic):
    """How much attention one position draws: the mean of its column, from 0 to 1.

    >>> import torch
    >>> from visualizer.statistics import Sink
    >>> statistic = Sink()
    >>> statistic.update(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(1, 1, 1, 2, 2))
    >>> statistic.compute().mean
    array([[0.75]])

    Args:
        key: the position, counted from the first token that is no padding; 0: where language models send what they
            have no use for.
    """

    def __init__(self, key: int = 0, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if not isinstance(key, int) or key < 0:
            raise ValueError(f"key={key!r}: a position is counted from 0")
        self.key = key

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads); NaN where a text has no such position."""
        found = _received(layer, texts)
        return found[..., self.key] if self.key < found.shape[2] else found.new_full(found.shape[:2], math.nan)


class PrefixMass(Statistic):
    """How much attention goes to the tokens before the patches, or before the text: class token, registers.

    >>> import torch
    >>> from visualizer.statistics import PrefixMass
    >>> statistic = PrefixMass(1)
    >>> statistic.update(torch.full((1, 1, 2, 5, 5), 1 / 5))
    >>> statistic.compute().mean.round(4)
    array([[0.2, 0.2]])

    Args:
        prefix_tokens: how many tokens.
    """

    def __init__(self, prefix_tokens: int = 1, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if not isinstance(prefix_tokens, int) or prefix_tokens < 1:
            raise ValueError(f"prefix_tokens={prefix_tokens!r}: pass how many tokens, 1 or more")
        self.prefix_tokens = prefix_tokens

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads), from 0 to 1."""
        found = _received(layer, texts)
        return found[..., : self.prefix_tokens].nansum(-1).masked_fill(found.isnan().all(-1), math.nan)


class Patterns(Statistic):
    """What each head of a text model does: the scores of `analysis.head_patterns` of each text.

    >>> import torch
    >>> from visualizer.statistics import Patterns
    >>> statistic = Patterns()
    >>> statistic.update(torch.eye(8).roll(-1, 1).expand(1, 1, 1, 8, 8))  # each token sees the one before it
    >>> dict(zip(Patterns.NAMES, statistic.compute().mean[0, 0].round(2).tolist()))["previous"]
    1.0

    The arrays are (layers, heads, 7), in the order of `Patterns.NAMES`; a score has the texts as samples that tell it,
    as eight repeated tokens for induction.

    Args:
        special_ids: the numbers of special tokens, such as `tokenizer.all_special_ids`.
        window: how far "local" reaches, in tokens, to either side.
    """

    axes = 1
    NAMES = patterns.SCORES

    def __init__(
        self, special_ids: Sequence[int] | None = None, *, window: int = 2, name: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.special_ids = None if special_ids is None else [int(number) for number in special_ids]
        if window < 0:
            raise ValueError(f"window={window!r}: pass how many tokens, 0 or more")
        self.window = window

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads, 7)."""
        batch, _, queries, keys = layer.shape
        if queries != keys:
            raise ValueError(f"patterns are those of tokens among themselves, not of {queries} queries to {keys} keys")
        real, ids = texts.keys(layer), texts.ids
        real = torch.ones(batch, keys, dtype=torch.bool) if real is None else real.cpu()
        ids = None if ids is None else ids.cpu()
        special = None
        if ids is not None and self.special_ids is not None:
            special = torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype))
        is_causal = patterns.is_causal([layer], real)
        if is_causal:
            special = torch.zeros_like(real) if special is None else special
            special[torch.arange(batch), real.int().argmax(1)] = True
        known = patterns.TokenFacts(repeats=ids, special=special, real=real, is_causal=is_causal, window=self.window)
        sums, counts = patterns.score_sums(layer, known)
        means = sums[0] / counts[..., None]  # (patterns, batch, heads)
        return means.masked_fill(~patterns.has_evidence(counts)[..., None], math.nan).permute(1, 2, 0)


class MeanMap(Statistic):
    """The mean map over all images of one size, or over texts, (layers, heads, queries, keys).

    >>> import torch
    >>> from visualizer.statistics import MeanMap
    >>> statistic = MeanMap()
    >>> statistic.update(torch.stack([torch.eye(2), torch.full((2, 2), 0.5)])[None, :, None])
    >>> statistic.compute().mean[0, 0]
    array([[0.75, 0.25],
           [0.25, 0.75]])

    A token of a text is counted from the first that is no padding, and has as many samples as texts reach so far. It
    holds five numbers of eight bytes for each weight of a map: 224 MB for 12 layers of 12 heads of 197 tokens.

    Args:
        heads: how the heads of a layer become one map, "mean", "max" or "min"; None: each by itself.
    """

    axes = 2

    def __init__(self, heads: Fusion | None = None, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        if heads is not None:
            check_heads(heads)
        self.heads = heads

    def of(self, layer: AttentionMap, texts: Texts) -> Tensor:
        """(batch, heads, queries, keys); one head where they are made one."""
        found = layer.dense()
        found = found if self.heads is None else fused(found, self.heads)[:, None]
        return _aligned(_aligned(found, texts.queries(layer), -2), texts.keys(layer), -1)

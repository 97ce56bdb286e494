"""`Statistic`, the base class of those in measures.py, and how a call of attention is measured by several of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as error:
    raise ImportError('visualizer.statistics needs torchmetrics: pip install "get-local[stats]"') from error

from ..analysis.layers import layers_of, without_nan
from ..maps import AttentionMap, without_autograd
from .moments import Moments, empty_state, merge_states, state_of, to_one_shape
from .tokens import Tokens

__all__ = ["Statistic"]

_SMALL = 2**26  # bytes of a map that is computed once for several statistics


class Statistic(Metric):
    """A number of each head in each image or text, and its moments over all of them: the base of the statistics.

    `update` takes the maps of a batch, `compute` gives `Moments`, and all else is as in any torchmetrics metric:
    `reset`, `clone`, `to`, merging over processes. `visualizer.statistics.collect` does all of it at once.

    A statistic of your own has the method `of`:

    >>> import torch
    >>> from visualizer.statistics import Statistic
    >>> class Diagonal(Statistic):
    ...     label = "mean weight of the diagonal"     # at the axis of its plots
    ...     def of(self, layer, tokens):
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
        name: its name in the result; None: its class's name, in lower case with underscores.
        **kwargs: those of `torchmetrics.Metric`.
    """

    full_state_update = True
    is_differentiable = False
    moments: Tensor

    axes: ClassVar[int] = 0
    """How many axes the number has besides those of images and heads."""
    number_names: ClassVar[tuple[str, ...]] = ()
    """What the numbers along one further axis are called, where each has its own meaning: a plot has a panel each."""
    about: ClassVar[str] = ""
    """What it says of a head, in a line for `visualizer stats --help`."""
    default_for: ClassVar[tuple[Literal["images", "texts"], ...]] = ()
    """For which data the command `visualizer stats` measures it when there is no `--measure`."""
    label: str = ""
    """What a plot writes at its axis, unit included; "": its name. `__init__` sets it where it depends on arguments."""

    def __init__(self, *, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(**{"dist_sync_fn": gathered, **kwargs})
        self.name = self.default_name() if name is None else name
        self.label = self.label or self.name.replace("_", " ")
        self.add_state("moments", empty_state((0,) * (2 + self.axes)), dist_reduce_fx=merge_states)

    @classmethod
    def default_name(cls) -> str:
        """The class's name in lower case with underscores: "prefix_mass" of PrefixMass."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")

    @classmethod
    def for_tokenizer(cls, tokenizer: Any) -> Statistic:
        """One for the texts that a tokenizer reads, as the command line makes it; for pictures, where it is None."""
        return cls()

    def of(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """The number of one layer's call: (batch, heads, ...), NaN for images, texts and heads that have none."""
        raise NotImplementedError(f"{type(self).__name__} has no method of(layer, tokens)")

    @property
    def settings(self) -> dict[str, Any]:
        """Its class and arguments: statistics of other settings are not merged."""
        parameters = [*inspect.signature(type(self).__init__).parameters.values()][1:]
        names = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        forgotten = [name for name in names if name != "name" and name not in vars(self)]
        if forgotten:
            raise TypeError(
                f"{type(self).__name__} does not keep its argument {forgotten[0]!r} as self.{forgotten[0]}, which "
                "tells statistics of other settings apart"
            )
        return {"statistic": type(self).__name__} | {name: vars(self)[name] for name in names if name != "name"}

    def update(self, attention: Any, attention_mask: Any = None, ids: Any = None) -> None:
        """Add the maps of one more batch: whatever `visualizer.analysis` takes.

        attention_mask is (batch, tokens), 0 for padding: what padding attends to does not count. ids, (batch, tokens),
        are the tokens' numbers, for `Patterns`.
        """
        mask, ids = (None if value is None else torch.as_tensor(value) for value in (attention_mask, ids))
        self.add([self.reduced(layer, Tokens(mask, ids)) for layer in layers_of(attention).layers])

    @without_autograd
    def reduced(self, layer: AttentionMap, tokens: Tokens) -> Tensor:
        """The moments of one layer's call, (5, heads, ...): they no longer contain single samples."""
        values = self.of(layer, tokens)
        if values.ndim != 2 + self.axes:
            raise ValueError(
                f"{type(self).__name__}.of gave the shape {tuple(values.shape)}: it is (batch, heads"
                + (", ...)" if self.axes else ")")
                + f", {2 + self.axes} axes"
            )
        # Apple's GPUs have no float64.
        return state_of(values.cpu() if values.device.type == "mps" else values)

    def add(self, layers: Sequence[Tensor]) -> None:
        """Add what `reduced` made of each layer."""
        if layers:
            self.moments = with_layers(self.moments, layers)
            self._update_count += 1
            self._computed = None

    def compute(self) -> Moments:
        """The moments of all samples so far."""
        return Moments.of(self.moments)


def with_layers(state: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """A state (5, layers, heads, ...) with one more state of each layer added, on its device."""
    more = torch.stack(to_one_shape([layer.to(state.device) for layer in layers]), 1)
    return merge_states(torch.stack(to_one_shape([state, more])))


def measured(layer: AttentionMap, tokens: Tokens, statistics: Sequence[Statistic]) -> list[Tensor]:
    """What each statistic's `reduced` makes of a call, whose weights are computed once where they take little memory.

    Raises:
        ValueError: these are no weights, a statistic cannot read them, or its `of` gave another shape.
    """
    if layer.is_dense:
        clean = without_nan(layer)
        if clean is not layer:
            # An image without a single number, as where a model overflows, is no sample. Cleaning made it zeros.
            has_numbers = ~layer.rows(slice(None)).isnan().flatten(1).all(1)
            if not has_numbers.any():
                return [empty_state(tuple(statistic.reduced(clean, tokens).shape[1:])) for statistic in statistics]
            if not has_numbers.all():
                weights = clean.rows(slice(None))[has_numbers]
                clean = AttentionMap(weights, path=layer.path, kind=layer.kind).described_as(layer)
                tokens = tokens.of_images(has_numbers)
        layer = clean
    elif len(statistics) > 1 and math.prod(layer.shape) * layer.dtype.itemsize <= _SMALL:
        layer = AttentionMap(layer.rows(slice(None)), path=layer.path, kind=layer.kind).described_as(layer)
    return [statistic.reduced(layer, tokens) for statistic in statistics]


def check_statistics(model: Any, statistics: Sequence[Any]) -> None:
    """Raise TypeError or ValueError unless these are a model, and statistics with different names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"statistics are those of an nn.Module, not of a {type(model).__name__}")
    if not statistics:
        raise ValueError("pass the statistics to collect, such as visualizer.statistics.Entropy()")
    for statistic in statistics:
        if not isinstance(statistic, Statistic):
            wrong = f"the class {statistic.__name__}" if isinstance(statistic, type) else f"{statistic!r}"
            raise TypeError(f"pass statistics, such as Entropy() and Sink(key=0), not {wrong}")
    names = [statistic.name for statistic in statistics]
    if len({*names}) < len(names):
        raise ValueError(f"two statistics have one name: {names}; give one of them another, by name=")


def gathered(state: Tensor, group: Any = None) -> list[Tensor]:
    """The states of all processes, in one shape: a process without samples has an empty one."""
    return to_one_shape(gather_all_tensors(state, group))

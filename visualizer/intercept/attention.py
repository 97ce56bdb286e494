"""`attention(model)` and `Maps`: the attention weights of a model's calls, recorded as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Generic, Literal, TypeVar, overload

from torch import Tensor, nn

from ..errors import UnknownKeyError, did_you_mean, warn
from ..instrument import check_max_bytes
from ..layout import Layout
from ..maps import AttentionMap, generated_maps, is_generation
from ..store import Record, RecordedMaps, Saved, bytes_by_device, human, stacked
from .recorder import Entry, Recorder, some_paths

Kept = TypeVar("Kept")
"""What is kept of a call: its map, or what `keep` makes of it."""


@overload
def attention(
    model: nn.Module,
    *,
    layers: int | str | Sequence[int | str] | None = ...,
    keep: None = ...,
    gradients: bool = ...,
    max_bytes: float | None = ...,
    tokenizer: Any = ...,
    processor: Any = ...,
) -> Maps[AttentionMap]: ...


@overload
def attention(
    model: nn.Module,
    *,
    layers: int | str | Sequence[int | str] | None = ...,
    keep: Callable[[AttentionMap], Kept],
    gradients: bool = ...,
    max_bytes: float | None = ...,
    tokenizer: Any = ...,
    processor: Any = ...,
) -> Maps[Kept]: ...


def attention(
    model: nn.Module,
    *,
    layers: int | str | Sequence[int | str] | None = None,
    keep: Callable[[AttentionMap], Any] | None = None,
    gradients: bool = False,
    max_bytes: float | None = None,
    tokenizer: Any = None,
    processor: Any = None,
) -> Maps[Any]:
    """The attention weights of a model as it runs, whether its kernels make them or not.

    >>> import torch
    >>> from visualizer import attention
    >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
    >>> with attention(model) as maps:
    ...     y = model(torch.randn(1, 5, 16))
    >>> maps
    <attention of TransformerEncoder: 2 maps of 2 modules, 1.28 kB
      module              calls  shape (batch, heads, queries, keys)  kind  kept as
      layers.0.self_attn  1      (1, 2, 5, 5)                         self  query and key, float32
      layers.1.self_attn  1      (1, 2, 5, 5)                         self  query and key, float32>
    >>> maps["layers.1.self_attn"].dense().shape
    torch.Size([1, 2, 5, 5])

    It sees `F.scaled_dot_product_attention` under any name, `flex_attention`, `nn.MultiheadAttention` and what is built
    on it, the kernels of flash-attn and xformers, those registered in transformers' `AttentionInterface`, a softmax of
    scores, be these products, distances or additive, or a sigmoid, a relu or whatever else makes them weights that are
    not negative, and deformable attention, of whose map `source` has the points and their weights. The weights are what
    is multiplied with the values, without dropout; where that is not one softmax, `is_softmax` of the map is False, and
    `softmaxes` has the softmaxes it was made of. Heads and batch are told apart by what the model does with the output;
    where that does not tell, `axes_assumed` of the map says so. Several kernel calls in one call of a module are one
    map if the model puts their outputs together, as where it calls a kernel for each head, or for some of the queries.

    Each map also knows what its tokens are, as far as the model and its input tell it: `maps[0].layout` has the grid of
    patches, the class token and registers, windows, the padding of a text, and with a tokenizer its words. Plots,
    analyses and the explorer ask it; docs/layout.md says what is known of which model.

    Each map is proven: some of its rows, times the values, must be what the kernel returned, as far as its type can
    tell. A map that is not the one that was used is not kept, and a warning says by how much it was wrong.

    The model's output does not change; where torch has a native path for encoders (under `no_grad`), which is not taken
    meanwhile, it is the same to rounding. A warning names each class called attention that ran without a map, such as
    linear attention, and each that called what may be a kernel that is not known.

    Args:
        model: whose calls are recorded, in all threads.
        layers: which modules to record; None: all. A number counts modules in the order of their first calls (-1 is
            the last); a text is a path, or a pattern of paths such as "encoder.*"; or several of these.
        keep: None keeps maps. A function of an `AttentionMap`, such as `lambda a: a.rows(0)` or
            `visualizer.analysis.entropy`, is called at once, and what it returns is kept instead. Tensors in it are
            copied and detached. Models that it runs are not recorded, and an error that it raises is raised in the
            model's call.
        gradients: also keep what `AttentionMap.grad_rows` needs: the values, and after a backward pass the gradient of
            the output.
        max_bytes: how many bytes to keep on each device; None: a quarter of its memory; `math.inf`: no limit. When
            it is used up, nothing more is recorded, and one warning says so.
        tokenizer, processor: the model's own, one of them, from which words are read: a tokenizer of transformers or
            tokenizers, or a processor of transformers that has one.

    Returns:
        The maps, recorded inside its `with` block, or from its `start()` to its `stop()`. `maps[0]` is that of the
        first call, `maps["blocks.3.attn"]` that of this module. They are on the model's device, in its type.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
        RuntimeError: on starting, if the model is compiled and torch is older than 2.6.

    Compiled modules run uncompiled while maps are recorded (torch 2.6 or newer); nothing is compiled anew. Scripted
    modules run without Python, so that nothing of them is seen: a warning names them.
    """
    if not isinstance(model, nn.Module):
        hint = "; word_maps takes a whole pipeline" if hasattr(model, "components") else ""
        raise TypeError(f"attention takes an nn.Module, not {type(model).__name__}{hint}")
    if keep is not None and not callable(keep):
        raise TypeError(
            f"keep is a function of an AttentionMap, such as lambda a: a.rows(0), or None to keep maps; not {keep!r}"
        )
    check_max_bytes(max_bytes)
    is_several = isinstance(layers, Iterable) and not isinstance(layers, (str, bytes))
    chosen: Any = None if layers is None else [*layers] if is_several else [layers]  # type: ignore[misc]
    for layer in chosen or ():
        if isinstance(layer, bool) or not isinstance(layer, (Integral, str)):
            raise TypeError(f"layers are numbers or module paths, not {layer!r}")
    words = getattr(processor if tokenizer is None else tokenizer, "tokenizer", tokenizer)
    if words is not None and not (hasattr(words, "convert_ids_to_tokens") or hasattr(words, "id_to_token")):
        raise TypeError(
            f"tokenizer is a {type(words).__name__}: pass one of transformers or tokenizers, which turns ids into "
            "tokens"
        )
    recorder = Recorder(model, chosen, keep, gradients, max_bytes, words)
    return Maps(recorder, f"attention of {type(model).__qualname__}")


class Maps(RecordedMaps, Sequence[Kept], Generic[Kept]):
    """The attention maps of a model's calls, in call order, or what was kept of each; made by `attention`."""

    def __init__(self, recorder: Recorder | None = None, title: str = "attention") -> None:
        self._title, self.about = title, {}
        self.recorder = Recorder() if recorder is None else recorder
        """What fills them."""

    def start(self) -> Maps[Kept]:
        """Record from now on; for notebooks, where a `with` cannot span cells. Returns the maps themselves."""
        if not self.is_running:
            self.recorder.start()
        return self

    def stop(self) -> None:
        """Record no more; what was recorded stays. Warns about attention that was not seen."""
        self._stop()

    def _stop(self, warns: bool = True) -> None:
        if self.is_running:
            for news in self.recorder.stop():
                if warns:
                    warn(*news)

    def __enter__(self) -> Maps[Kept]:
        return self.start()

    def __exit__(self, error: object, *_: object) -> None:
        self._stop(warns=error is None)

    @property
    def is_running(self) -> bool:
        """Whether calls are recorded now."""
        return self.recorder.watch is not None

    def clear(self) -> None:
        """Drop all maps; recording goes on."""
        self.recorder.clear()

    def call_arguments(self, name: str) -> list[Any]:
        """What the module calls under way were given by a keyword, the innermost call first; for a `keep` to ask."""
        watch = self.recorder.watch
        return [] if watch is None else watch.call_arguments(name)

    @property
    def layout(self) -> Layout | None:
        """What the tokens of the last map are, see `AttentionMap.layout`; None where nothing is known."""
        return next((one.layout for one in reversed([*self]) if isinstance(one, AttentionMap) and one.layout), None)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the modules that have maps, in the order of their first calls."""
        return tuple(dict.fromkeys(entry.path for entry in self.recorder.entries))

    def calls(self, path: str) -> list[Kept]:
        """The maps of all calls of a module, in order, such as one for each step of a generation; see `generated`."""
        values = [entry.value for entry in self.recorder.entries if entry.path == path]
        if not values:
            paths = self.paths
            hint = did_you_mean(paths, str(path)) or "."
            few = some_paths(paths) or "none yet"
            raise UnknownKeyError(f"no attention of {path!r} was recorded{hint} Modules with maps: {few}")
        return values

    @property
    def is_generation(self) -> bool:
        """Whether the calls are the steps of a generation: each module's has the keys of the one before, and more."""
        calls: dict[str, list[Any]] = (
            {path: self.calls(path) for path in self.paths} if len(self.paths) < len(self) else {}
        )
        return all(isinstance(one, AttentionMap) for one in self) and is_generation(calls)

    def generated(self, queries: Literal["all", "new"] = "all", *, beam_indices: Any = None) -> Maps[AttentionMap]:
        """The maps of a text that the model wrote: the prompt and all steps as one map of each module.

        >>> import torch
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> from visualizer import attention
        >>> class Decoder(torch.nn.Module):
        ...     def forward(self, x, cache):                     # (batch, heads, tokens, width)
        ...         cache = torch.cat([cache, x], 2)
        ...         return scaled_dot_product_attention(x, cache, cache, is_causal=x.shape[2] > 1), cache
        >>> model = Decoder()
        >>> with attention(model) as maps:
        ...     y, cache = model(torch.randn(1, 2, 5, 8), torch.empty(1, 2, 0, 8))   # the prompt
        ...     for step in range(3):
        ...         y, cache = model(y[:, :, -1:], cache)
        >>> [one.shape for one in maps]
        [(1, 2, 5, 5), (1, 2, 1, 6), (1, 2, 1, 7), (1, 2, 1, 8)]
        >>> maps.generated()[0].shape, maps.generated("new")[0].shape
        ((1, 2, 8, 8), (1, 2, 3, 8))

        It is what one pass over the whole text computes. The last token that was written has no row, for the model did
        not read it. Rows are computed when they are read, each from the query and the keys of its own step; what a step
        has no key for is zero, such as the tokens behind it and those that a sliding window has passed. The copies of
        the keys are those of the steps: this takes no memory of its own. Analyses, plots and the explorer take the
        steps as they were recorded too, and do this themselves.

        The keys prove that each step goes on from the one before. They also tell which of the beams of a beam search
        each step goes on from: without `beam_indices` there is a map of each beam that was left at the end.

        Args:
            queries: "all", or "new" for the rows behind the prompt only, which the first call had; query 0 is then the
                first behind it, and the keys are all tokens. Modules that ran only once, such as an encoder's, are
                left out.
            beam_indices: the `beam_indices` that transformers' `generate(..., return_dict_in_generate=True,
                output_scores=True)` returns, (texts, steps): the maps are then those of the texts that it returned.
                Rows behind the end of a text are zero.

        Returns:
            Maps like these, (texts, heads, queries, keys): of a decoder's self-attention square, of its
            cross-attention with the encoder's keys; encoders as they are. Keys of tokens that were in the cache before
            recording began come first, and have no rows.

        Raises:
            ValueError: the calls are not the steps of one generation: two texts, tokens that were taken back as in
                assisted decoding, or weights of several texts that do not tell whether they are beams.
            TypeError: `keep` kept something else than maps.
        """
        if queries not in ("all", "new"):
            raise ValueError(f'queries={queries!r}: pass "all", or "new" for those behind the prompt')
        other = next((one for one in self if not isinstance(one, AttentionMap)), None)
        if other is not None:
            raise TypeError(f"generated() puts maps together, and keep= kept a {type(other).__name__} of each call")
        calls: dict[str, list[Any]] = {path: self.calls(path) for path in self.paths}
        threads = {entry.path: entry.thread for entry in self.recorder.entries}
        made: Maps[AttentionMap] = Maps(title=self._title)
        made.about = self.about
        for path, several in generated_maps(calls, queries == "new", beam_indices).items():
            made.recorder.kept += [Entry(path, one, threads[path], {str(one.device): one.nbytes}) for one in several]
        return made

    @overload
    def __getitem__(self, key: int | str) -> Kept: ...

    @overload
    def __getitem__(self, key: slice) -> list[Kept]: ...

    def __getitem__(self, key: int | str | slice) -> Kept | list[Kept]:
        if not isinstance(key, str):
            if isinstance(key, slice):
                return [entry.value for entry in self.recorder.entries[key]]
            try:
                value: Kept = self.recorder[key].value
            except IndexError:
                raise IndexError(f"there is no map {key}: {len(self)} were recorded") from None
            except TypeError:
                raise TypeError(f"maps are chosen by a number, a slice or a module's path, not by {key!r}") from None
            return value
        values = self.calls(key)
        if len(values) > 1:
            why = self.recorder.why_apart.get(key)
            apart = f"; its calls that were put together are not one attention: {why}" if why else ""
            way_out = (
                f"maps.generated()[{key!r}] has them as one map of the whole text"
                if self.is_generation
                else "with one pass of the model inside the `with`, or clear() before it, each module has one"
            )
            raise UnknownKeyError(
                f"{key!r} attended {len(values)} times{apart}: maps.calls({key!r}) has all of them, in order; {way_out}"
            )
        return values[0]

    def __len__(self) -> int:
        return len(self.recorder)

    def __iter__(self) -> Iterator[Kept]:
        return iter([entry.value for entry in self.recorder.entries])

    def __contains__(self, item: object) -> bool:
        return item in self.paths if isinstance(item, str) else any(one is item for one in self)

    @property
    def records(self) -> list[Record]:
        """Each map, or what was kept of it, with its call, module and thread, in call order."""
        return [
            Record(entry.path, "attention", entry.value, number, None, entry.thread, entry.path)
            for number, entry in enumerate(self.recorder.entries)
        ]

    def stack(self, call: int | None = None) -> Tensor:
        """One tensor of all maps, layers first: (modules, batch, heads, queries, keys), as far as shapes agree.

        >>> import torch
        >>> from visualizer import attention
        >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
        >>> with attention(model) as maps:
        ...     y = model(torch.randn(1, 5, 16))
        >>> maps.stack().shape
        torch.Size([2, 1, 2, 5, 5])

        For the argument and the errors see `capture`'s `stack`. A fused map is computed in full.
        """
        whole: Tensor = stacked({path: self.calls(path) for path in self.paths}, call, lambda item: item.dense())
        return whole

    def saved(self, about: dict[str, Any] | None = None) -> Saved:
        """The maps as plain data: a fused map as query and key, one with functions of flex_attention as weights.

        Gradients are left out.
        """
        shared = dict[int, Tensor]()
        records = [
            replace(record, variable=_MAP, value=record.value.packed(shared))
            if isinstance(record.value, AttentionMap)
            else replace(record, variable=_KEPT)
            for record in self.records
        ]
        return Saved("maps", self.paths, records, self.about if about is None else about)

    @classmethod
    def from_saved(cls, saved: Saved) -> Maps[Any]:
        """The maps of which `saved` made this."""
        maps: Maps[Any] = Maps()
        maps.about = saved.about
        for record in sorted(saved.records, key=lambda record: record.call):
            value = AttentionMap.unpacked(record.value) if record.variable == _MAP else record.value
            sizes = {str(value.device): value.nbytes} if record.variable == _MAP else bytes_by_device(value)
            maps.recorder.kept.append(Entry(record.key, value, record.thread, sizes))
        return maps

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line about the whole, and a row for each module."""
        rows: list[tuple[str, ...]] = [
            ("module", "calls", "shape (batch, heads, queries, keys)", "kind", "kept as"),
        ]
        total = sum(size for entry in self.recorder.entries for size in entry.sizes.values())
        for path in self.paths:
            values: list[Any] = self.calls(path)
            first = values[0]
            if isinstance(first, AttentionMap):
                dtype = str(first.source.dtype).removeprefix("torch.")
                shapes = list(dict.fromkeys(str(item.shape) for item in values))
                more = f" and {len(shapes) - 1} others" if len(shapes) > 1 else ""
                kept = f"{first.source.kept}, {dtype}"
                rows.append((path or "''", str(len(values)), shapes[0] + more, first.kind or "", kept))
            else:
                shape = str(tuple(first.shape)) if isinstance(first, Tensor) else ""
                rows.append((path or "''", str(len(values)), shape, "", f"{type(first).__name__} by keep"))
        maps, modules = len(self), len(rows) - 1
        head = (
            f"{self._title}: {maps} map{'' if maps == 1 else 's'} of {modules} module{'' if modules == 1 else 's'}, "
            f"{human(total)}"
        )
        return head, rows


_MAP, _KEPT = "attention map", "attention kept"

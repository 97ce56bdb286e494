"""`attention(model)` and `Maps`: the attention weights of a model's calls, recorded as it runs."""

from __future__ import annotations

import fnmatch
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

from torch import Tensor, nn

from ..errors import News, Section, UnknownKeyError, did_you_mean, warn
from ..instrument import check_max_bytes
from ..layout import Layout
from ..maps import AttentionMap, generated_maps, is_generation
from ..store import Budget, Record, RecordedMaps, Saved, bytes_by_device, human, stacked
from ..tensors import keeper
from .axes import Output
from .evidence import Evidence
from .layouts import Layouts
from .memory import Memory
from .modes import unseen
from .modules import are_given_the_same
from .plans import Said, plans_of
from .snapshots import AttentionCall, Copies, Copy, PlainCall, Taken
from .watch import Watch

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
    return Maps(model, chosen, keep, gradients, max_bytes, words)


@dataclass(slots=True, eq=False)
class _Entry:
    """One recorded call: its map, or what was kept of it."""

    path: str
    value: Any
    thread: int
    sizes: dict[str, int]


class _Unproven(NamedTuple):
    """A map that is kept, and not yet proven: all of a pass are together, which is quicker."""

    entry: _Entry
    kernel: str
    evidence: Sequence[Evidence]


class _Unmade(NamedTuple):
    """A map whose copies are taken, and which is made when the pass ends or somebody asks for it.

    In the midst of a model the code that makes it is in no cache, and what it allocates parts the model's memory.
    """

    entry: _Entry
    taken: Taken
    said: Said
    layouts: Any
    kernel: str


_MOST_UNMADE = 256  # such as of many calls in one call of the outermost module
_MOST_UNPROVEN = 2**24  # bytes
_MANY, _MANY_BYTES = 64, 2**20  # maps that are proven at the end of a pass


class Maps(RecordedMaps, Sequence[Kept], Generic[Kept]):
    """The attention maps of a model's calls, in call order, or what was kept of each; made by `attention`."""

    def __init__(
        self,
        model: nn.Module | None,
        layers: list[int | str] | None,
        keep: Callable[[AttentionMap], Any] | None,
        gradients: bool,
        max_bytes: float | None,
        tokenizer: Any = None,
    ) -> None:
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self._title = "attention" if model is None else f"attention of {type(model).__qualname__}"
        self.about = {}
        self._layers, self._keep, self._gradients = layers, keep, gradients
        self._kept: list[_Entry] = []
        self._unmade: list[_Unmade] = []  # what is kept, without its value
        self._unproven: list[_Unproven] = []
        self._unproven_bytes = 0  # of both
        self._paths: dict[str, int] = {}
        self._budget = Budget(max_bytes)
        self._is_full = False
        self._lock = threading.RLock()  # a `keep` may run the model
        self._watch: Watch | None = None
        self._memory = Memory() if model is None else plans_of(model).memory
        self._copies = self._new_copies()
        self._layouts = Layouts(tokenizer)
        self._doubted = set[str]()
        self._why_apart = dict[str, str]()
        self._postponed: list[News] = []
        self.is_asked_for: Callable[[AttentionCall], bool] | None = None
        """Whether a call is recorded at all, asked before anything of it is copied; None: all are."""
        self.selection: Any = None
        """What `is_asked_for` goes by: recordings that have the same follow each other's plans."""
        self.needs_layouts, self.needs_sums, self.lends_tensors = True, False, False
        """Whether maps are told what their tokens are; whether columns are wanted, and what makes these cheap; whether
        `keep` lets go of a map, so that one that is made at once needs no copies."""

    def _new_copies(self) -> Copies:
        # What `keep` makes of a map is all that stays: keys that grow would outlive the map that they are of.
        return Copies(self._gradients, self._memory, share_keys=self._keep is None)

    def start(self) -> Maps[Kept]:
        """Record from now on; for notebooks, where a `with` cannot span cells. Returns the maps themselves."""
        if self._watch is None:
            model = self._model()
            if model is None:
                raise RuntimeError(
                    "there is nothing to record: the model is gone, as one that no variable holds is, or the maps are "
                    "from a file"
                )
            known = weakref.ref(self)  # maps that nobody holds any more stop recording

            def record(call: AttentionCall) -> Copy | None:
                maps = known()
                return None if maps is None else maps.record(call)

            def file(path: str, copy: Copy, output: Output, kernel: str) -> Callable[[], None] | None:
                maps = known()
                return None if maps is None else maps.file(path, copy, output, kernel)

            def end_pass() -> None:
                maps = known()
                if maps is not None:
                    maps.prove(may_wait=True)

            def warn_in_call(message: str, section: Section) -> None:
                maps = known()
                if maps is not None:
                    maps.warn_in_call(message, section)

            def recorded() -> Any:
                maps = known()
                return None if maps is None else maps.recorded()

            def follow(path: str, call: PlainCall, said: Said, kernel: str) -> None:
                maps = known()
                if maps is not None:
                    maps.follow(path, call, said, kernel)

            self._copies = self._new_copies()
            # What is not simply kept has to be looked at each time.
            is_simple = self._keep is None and self.is_asked_for is None and self.needs_layouts and not self._gradients
            self._watch = Watch(model, record, file, end_pass, warn_in_call, recorded, follow if is_simple else None)
            self._watch.needs_sums = self.needs_sums
            self._abandon = weakref.finalize(self, self._watch.end)
            self._abandon.atexit = False
        return self

    def stop(self) -> None:
        """Record no more; what was recorded stays. Warns about attention that was not seen."""
        self._stop()

    def _stop(self, warns: bool = True) -> None:
        watch = self._watch
        if watch is not None:
            self._abandon.detach()
            try:
                watch.end()  # which files what is pending
                self.prove()
            finally:
                self._watch = None
            postponed, self._postponed = self._postponed, []
            for news in (*postponed, *(self._unseen(watch) if watch.has_run else ())) if warns else ():
                warn(*news)

    def _unseen(self, watch: Watch) -> Iterator[News]:
        """What ran without a map, and what was asked for and did not run."""
        paths = list(self._paths)
        if not paths and not watch.has_seen_attention:
            yield News(
                f"{self._title.rpartition(' ')[2]} ran without any attention that can be seen: neither a fused "
                "kernel of torch nor a softmax between two matrix products was called in it.",
                "no-attention-seen",
            )
        for layer in self._layers or () if paths else ():
            is_there = (
                any(fnmatch.fnmatchcase(path, layer) for path in paths)
                if isinstance(layer, str)
                else -len(paths) <= layer < len(paths)
            )
            if not is_there:
                what = f"no attention was seen in {layer!r}, one of the layers to record; it was in {_some(paths)}."
                yield News(what, "layer-without-attention")
        for (name, reason), unmapped in watch.without_maps().items():
            more = f" and {len(unmapped) - 1} more" if len(unmapped) > 1 else ""
            where = f"{name} ({unmapped[0]!r}{more})"
            if reason == "without keys":
                yield News(
                    f"{where} ran, and what it multiplied were no weights of queries for keys, but a softmax over "
                    "features, as in linear attention, or weights that a layer made without keys, as VOLO's outlook "
                    "attention: it has no map here.",
                    "module-without-a-map",
                )
            elif reason == "unseen":
                yield News(
                    f"{where} called a function that is not torch's, and not known here, with what may be query, key "
                    "and value: if that attends, it has no map here. Choose a kernel that is seen, such as "
                    'attn_implementation="sdpa" in transformers.',
                    "unknown-kernel",
                )
            else:
                yield News(
                    f"{where} ran, but no softmax of it stands between two matrix products, and it called no kernel: "
                    "it has no map here. Linear attention has none at all.",
                    "module-without-a-map",
                )

    def __enter__(self) -> Maps[Kept]:
        return self.start()

    def __exit__(self, error: object, *_: object) -> None:
        self._stop(warns=error is None)

    @property
    def is_running(self) -> bool:
        """Whether calls are recorded now."""
        return self._watch is not None

    def clear(self) -> None:
        """Drop all maps; recording goes on."""
        with self._lock:
            self.prove()  # which warns of those that are wrong
            self._kept, self._unproven, self._unproven_bytes = [], [], 0
            self._paths, self._is_full = {}, False
            self._budget.clear()
            self._copies = self._new_copies()

    def call_arguments(self, name: str) -> list[Any]:
        """What the module calls under way were given by a keyword, the innermost call first; for a `keep` to ask."""
        return [] if self._watch is None else self._watch.call_arguments(name)

    @property
    def layout(self) -> Layout | None:
        """What the tokens of the last map are, see `AttentionMap.layout`; None where nothing is known."""
        return next((one.layout for one in reversed([*self]) if isinstance(one, AttentionMap) and one.layout), None)

    @property
    def _entries(self) -> list[_Entry]:
        """What is kept, made and proven. The model may go on meanwhile, in another thread: a list of its own."""
        with self._lock:
            self.prove()
            return [*self._kept]

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the modules that have maps, in the order of their first calls."""
        return tuple(dict.fromkeys(entry.path for entry in self._entries))

    def calls(self, path: str) -> list[Kept]:
        """The maps of all calls of a module, in order, such as one for each step of a generation; see `generated`."""
        values = [entry.value for entry in self._entries if entry.path == path]
        if not values:
            paths = self.paths
            hint = did_you_mean(paths, str(path)) or "."
            few = _some(paths) or "none yet"
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
        threads = {entry.path: entry.thread for entry in self._entries}
        made: Maps[AttentionMap] = Maps(None, None, None, False, None)
        made._title, made.about = self._title, self.about
        for path, several in generated_maps(calls, queries == "new", beam_indices).items():
            made._kept += [_Entry(path, one, threads[path], {str(one.device): one.nbytes}) for one in several]
        return made

    @overload
    def __getitem__(self, key: int | str) -> Kept: ...

    @overload
    def __getitem__(self, key: slice) -> list[Kept]: ...

    def __getitem__(self, key: int | str | slice) -> Kept | list[Kept]:
        if not isinstance(key, str):
            if isinstance(key, slice):
                return [entry.value for entry in self._entries[key]]
            try:
                with self._lock:
                    self.prove()
                    value: Kept = self._kept[key].value
            except IndexError:
                raise IndexError(f"there is no map {key}: {len(self)} were recorded") from None
            except TypeError:
                raise TypeError(f"maps are chosen by a number, a slice or a module's path, not by {key!r}") from None
            return value
        values = self.calls(key)
        if len(values) > 1:
            why = self._why_apart.get(key)
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
        with self._lock:
            self.prove()
            return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter([entry.value for entry in self._entries])

    def __contains__(self, item: object) -> bool:
        return item in self.paths if isinstance(item, str) else any(entry.value is item for entry in self._entries)

    @property
    def records(self) -> list[Record]:
        """Each map, or what was kept of it, with its call, module and thread, in call order."""
        return [
            Record(entry.path, "attention", entry.value, number, None, entry.thread, entry.path)
            for number, entry in enumerate(self._entries)
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
        maps: Maps[Any] = Maps(None, None, None, False, None)
        maps.about = saved.about
        for record in sorted(saved.records, key=lambda record: record.call):
            value = AttentionMap.unpacked(record.value) if record.variable == _MAP else record.value
            sizes = {str(value.device): value.nbytes} if record.variable == _MAP else bytes_by_device(value)
            maps._kept.append(_Entry(record.key, value, record.thread, sizes))
        return maps

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line about the whole, and a row for each module."""
        rows: list[tuple[str, ...]] = [
            ("module", "calls", "shape (batch, heads, queries, keys)", "kind", "kept as"),
        ]
        total = sum(size for entry in self._entries for size in entry.sizes.values())
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

    def _wants(self, path: str) -> bool:
        """Whether a module is among the layers to record, as far as the modules called up to now tell."""
        number = self._paths.setdefault(path, len(self._paths))
        if self._is_full:
            return False
        if self._layers is None:
            return True
        return any(
            fnmatch.fnmatchcase(path, layer) if isinstance(layer, str) else number - layer in (0, len(self._paths))
            for layer in self._layers
        )

    def warn_in_call(self, message: str, section: Section) -> None:
        """Warn at once, from within a call of the model. Where warnings are errors, `stop` does, not to disturb it."""
        try:
            warn(message, section)
        except Exception:
            self._postponed.append(News(message, section))

    def recorded(self) -> Any:
        """What says which calls are recorded."""
        layers = None if self._layers is None else tuple(self._layers)
        return layers, self._is_full, self.selection

    def record(self, call: AttentionCall) -> Copy | None:
        """Copy what is kept of an attention call."""
        with self._lock:
            if self._watch is None or not (self.is_asked_for is None or self.is_asked_for(call)):
                return None
            if not self._wants(call.path):
                return None
            self._make_all()  # its keys may be those of the map before, and more
            return self._copies.of(call, self.lends_tensors and call.is_filed_at_once)

    def file(self, path: str, copy: Copy, output: Output, kernel: str) -> Callable[[], None] | None:
        """Make the map of a call whose axes are known, and keep it; return what does, where the user's `keep` is to."""
        if output.why_apart:
            self._why_apart[path] = output.why_apart
        if self._keep is not None and self._is_doubted(path, kernel, copy.evidence):
            return None
        value, shares_layouts = copy.map_of(output.order), False
        if self._watch is not None and self.needs_layouts:
            shares_layouts = self._describe(value, self._watch)
        output.said = value.kind, value.axes_assumed, shares_layouts
        if self._keep is not None:
            return lambda: self._keep_map(path, value, copy.sizes)
        self._keep_map(path, value, copy.sizes, kernel, copy.evidence)
        return None

    def _is_doubted(self, path: str, kernel: str, evidence: Sequence[Evidence]) -> bool:
        """Whether a map is not the one that was used; then a warning says so."""
        doubt = None
        for one in evidence:
            doubt = one.doubt() if doubt is None else doubt
        if doubt is not None and path not in self._doubted:
            self._doubted.add(path)
            self.warn_in_call(
                f"the map of {path!r} is not kept, for it is not the one that was used: times the values it is not "
                f"what {kernel} returned, {doubt}.",
                "map-not-kept",
            )
        return doubt is not None

    def prove(self, may_wait: bool = False) -> None:
        """Keep only those maps that were used, of all up to now.

        Args:
            may_wait: whether a few maps may wait for those of later passes, as those of the steps of a generation:
                many at once take a third of the time. Nobody reads them before they are proven.
        """
        with self._lock:
            self._make_all()
            # A map that is dropped would stay as long as it waits.
            are_few = len(self._unproven) < _MANY and self._unproven_bytes < _MANY_BYTES and self._layers is None
            if not self._unproven or (may_wait and are_few):
                return
            with unseen():
                self._prove_all()

    def _prove_all(self) -> None:
        watch = self._watch
        unproven, self._unproven, self._unproven_bytes = self._unproven, [], 0
        with suppress(Exception):  # then each is weighed by itself, and says what failed
            Evidence.weigh([one for _, _, several in unproven for one in several])
        for entry, kernel, evidence in unproven:
            is_kept = False
            try:
                is_kept = not self._is_doubted(entry.path, kernel, evidence)
            except Exception as error:
                if watch is not None:
                    watch.refuse(entry.path, error)
            except BaseException:  # the user interrupts
                self._unproven = [*unproven, *self._unproven]
                raise
            if not is_kept:
                self._drop(entry)

    def _describe(self, value: AttentionMap, watch: Watch, shares: bool = False) -> bool:
        """Give a map its layouts, and say whether they are those of the map before that is like it.

        Args:
            shares: whether they are known to be.
        """
        key, told = (value.kind, value.shape), watch.told
        known: Any = told.get(key)
        shares = known is not None and (
            shares or (value.kind in ("self", "cross") and are_given_the_same(watch.calls, known[0]))
        )
        if not shares:
            told[key] = known = tuple(watch.calls), self._layouts.of(value, watch.calls)
        value.tell_layouts(*known[1])
        return shares

    def follow(self, path: str, call: PlainCall, said: Said, kernel: str) -> None:
        """Keep the map of a call of which all is known but its tensors: it is like one of an earlier pass."""
        watch = self._watch
        with self._lock:
            if watch is None or not self._wants(path):
                return
            queries, keys = call.query.shape[2], call.key.shape[2]
            if queries < keys:  # its keys may be those of the map before, and more
                self._make_all()
            taken, known = self._copies.of_plain(path, call), None
            if said.shares_layouts and queries >= keys:
                known = watch.told.get((said.kind, (*call.query.shape[:3], keys)))
            entry = _Entry(path, None, get_ident(), taken.sizes)
            self._unmade.append(_Unmade(entry, taken, said, None if known is None else known[1], kernel))
            self._unproven_bytes += taken.nbytes
            self._keep_entry(entry)
            if known is None or len(self._unmade) > _MOST_UNMADE:
                self._make_all()
            if self._unproven_bytes > _MOST_UNPROVEN:
                self.prove()

    def _make_all(self) -> None:
        """Make the maps that wait for it."""
        if not self._unmade:
            return
        watch = self._watch
        with self._lock, unseen():
            unmade, self._unmade = self._unmade, []
            for number, one in enumerate(unmade):
                try:
                    self._make(one, watch)
                except Exception as error:
                    self._drop(one.entry)
                    if watch is not None:
                        watch.refuse(one.entry.path, error)
                except BaseException:  # the user interrupts
                    self._unmade = [*unmade[number:], *self._unmade]
                    raise

    def _make(self, one: _Unmade, watch: Watch | None) -> None:
        source, evidence = one.taken.make()
        one.entry.value = value = AttentionMap.from_source(source, path=one.entry.path, kind=one.said.kind)
        value.axes_assumed = one.said.axes_assumed
        if one.layouts is not None:
            value.tell_layouts(*one.layouts)
        elif watch is not None:
            self._describe(value, watch, one.said.shares_layouts)
        if evidence:
            self._unproven.append(_Unproven(one.entry, one.kernel, evidence))

    def _keep_map(
        self, path: str, value: Any, sizes: dict[str, int], kernel: str = "", evidence: Sequence[Evidence] = ()
    ) -> None:
        """Keep a map, or what `keep` makes of it, as far as the budget allows."""
        with self._lock:
            if self._is_full:
                return
            if self._keep is not None:
                try:
                    value = keeper(self._keep)(value)
                except Exception as error:
                    error.add_note(f"while keeping the attention of {path!r} with keep={self._keep!r}")
                    raise
                sizes = bytes_by_device(value)
            entry = _Entry(path, value, get_ident(), sizes)
            self._keep_entry(entry)
            if evidence:
                self._unproven.append(_Unproven(entry, kernel, evidence))
                self._unproven_bytes += sum(one.nbytes for one in evidence)
                if self._unproven_bytes > _MOST_UNPROVEN:
                    self.prove()

    def _keep_entry(self, entry: _Entry) -> None:
        self._kept.append(entry)
        self._budget.add(entry.sizes)
        if self._layers is not None:
            self._drop_passed()
        exceeded = self._budget.exceeded(entry.sizes)
        if exceeded is None:
            return
        self._drop(entry)
        self._is_full = True
        self.warn_in_call(
            f"attention maps would take more than {self._budget.why_full(exceeded)}: that of {entry.path!r} and all "
            "that follow are not recorded, until clear(). Keep less (layers=, keep=), or allow more (max_bytes=).",
            "memory-limit",
        )

    def _drop(self, entry: _Entry) -> None:
        """Drop a map, if it is kept."""
        place = next((at for at, one in enumerate(self._kept) if one is entry), -1)
        if place >= 0:
            self._budget.discount(self._kept.pop(place).sizes)

    def _drop_passed(self) -> None:
        """Drop the maps of modules that were among the last when they ran, and no longer are."""
        for entry in [entry for entry in self._kept if not self._wants(entry.path)]:
            self._drop(entry)


_MAP, _KEPT = "attention map", "attention kept"


def _some(paths: Sequence[str]) -> str:
    """Paths in a message: the first twelve."""
    return ", ".join(map(repr, paths[:12])) + (f" and {len(paths) - 12} more" if len(paths) > 12 else "")

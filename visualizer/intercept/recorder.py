"""Records the attention calls of a model: which of them, what is kept of each, and whether that is right."""

from __future__ import annotations

import fnmatch
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ..errors import News, WarningsInCalls
from ..maps import AttentionMap
from ..store import Budget, bytes_by_device
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


@dataclass(slots=True, eq=False)
class Entry:
    """One recorded call: its map, or what was kept of it."""

    path: str
    value: Any
    thread: int
    sizes: dict[str, int]


class _Unproven(NamedTuple):
    """A map that is kept, and not yet proven: all of a pass are together, which is quicker."""

    entry: Entry
    kernel: str
    evidence: Sequence[Evidence]


class _Unmade(NamedTuple):
    """A map whose copies are taken, and which is made when the pass ends or somebody asks for it.

    In the midst of a model the code that makes it is in no cache, and what it allocates parts the model's memory.
    """

    entry: Entry
    taken: Taken
    said: Said
    layouts: Any
    kernel: str


_MOST_UNMADE = 256  # such as of many calls in one call of the outermost module
_MOST_UNPROVEN = 2**24  # bytes
_MANY, _MANY_BYTES = 64, 2**20  # maps that are proven at the end of a pass


class Recorder:
    """Fills a list with the maps of a model's calls, or with what `keep` makes of each, from `start` to `stop`.

    For the arguments see `attention`. Without a model there is nothing to record: its list is that of a file.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        layers: Sequence[int | str] | None = None,
        keep: Callable[[AttentionMap], Any] | None = None,
        gradients: bool = False,
        max_bytes: float | None = None,
        tokenizer: Any = None,
    ) -> None:
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self._name = type(model).__qualname__
        self._layers, self._keep, self._gradients = layers, keep, gradients
        self.kept: list[Entry] = []
        """All up to now, of which the last may have no value yet; see `entries`."""
        self.why_apart = dict[str, str]()
        """Of the paths of modules whose calls were put together, and are not one attention: why not."""
        self.watch: Watch | None = None
        """What sees the calls; None: nothing is recorded now."""
        self.is_asked_for: Callable[[AttentionCall], bool] | None = None
        """Whether a call is recorded at all, asked before anything of it is copied; None: all are."""
        self.selection: Any = None
        """What `is_asked_for` goes by: recordings that have the same follow each other's plans."""
        self.needs_layouts, self.needs_sums, self.lends_tensors = True, False, False
        """Whether maps are told what their tokens are; whether columns are wanted, and what makes these cheap; whether
        `keep` lets go of a map, so that one that is made at once needs no copies."""
        self._unmade: list[_Unmade] = []  # what is kept, without its value
        self._unproven: list[_Unproven] = []
        self._unproven_bytes = 0  # of both
        self._paths: dict[str, int] = {}
        self._budget = Budget(max_bytes)
        self._is_full = False
        self._lock = threading.RLock()  # a `keep` may run the model
        self._memory = Memory() if model is None else plans_of(model).memory
        self._copies = self._new_copies()
        self._layouts = Layouts(tokenizer)
        self._doubted = set[str]()
        self._in_calls = WarningsInCalls()

    def _new_copies(self) -> Copies:
        # What `keep` makes of a map is all that stays: keys that grow would outlive the map that they are of.
        return Copies(self._gradients, self._memory, share_keys=self._keep is None)

    def start(self) -> None:
        """Record from now on, until `stop`, or until nobody holds the maps any more."""
        model = self._model()
        if model is None:
            raise RuntimeError(
                "there is nothing to record: the model is gone, as one that no variable holds is, or the maps are "
                "from a file"
            )
        self._copies = self._new_copies()
        # What is not simply kept has to be looked at each time.
        is_simple = self._keep is None and self.is_asked_for is None and self.needs_layouts and not self._gradients
        self.watch = Watch(
            model,
            _weakly(self._record),
            _weakly(self._file),
            _weakly(self._end_pass),
            self._in_calls.warn,
            _weakly(self._recorded),
            _weakly(self._follow) if is_simple else None,
        )
        self.watch.needs_sums = self.needs_sums
        self._abandon = weakref.finalize(self, self.watch.end)
        self._abandon.atexit = False

    def stop(self) -> list[News]:
        """Record no more; returns what is to be warned about, such as attention that was not seen."""
        watch = self.watch
        if watch is None:
            return []
        self._abandon.detach()
        try:
            watch.end()  # which files what is pending
            self.prove()
        finally:
            self.watch = None
        return [*self._in_calls.take(), *(self._unseen(watch) if watch.has_run else ())]

    @property
    def entries(self) -> list[Entry]:
        """What is kept, made and proven. The model may go on meanwhile, in another thread: a list of its own."""
        with self._lock:
            self.prove()
            return [*self.kept]

    def __len__(self) -> int:
        with self._lock:
            self.prove()
            return len(self.kept)

    def __getitem__(self, number: int) -> Entry:
        with self._lock:
            self.prove()
            return self.kept[number]

    def clear(self) -> None:
        """Drop all maps; recording goes on."""
        with self._lock:
            self.prove()  # which warns of those that are wrong
            self.kept, self._unproven, self._unproven_bytes = [], [], 0
            self._paths, self._is_full = {}, False
            self._budget.clear()
            self._copies = self._new_copies()

    def _unseen(self, watch: Watch) -> Iterator[News]:
        """What ran without a map, and what was asked for and did not run."""
        paths = list(self._paths)
        if not paths and not watch.has_seen_attention:
            yield News(
                f"{self._name} ran without any attention that can be seen: neither a fused kernel of torch nor a "
                "softmax between two matrix products was called in it.",
                "no-attention-seen",
            )
        for layer in self._layers or () if paths else ():
            is_there = (
                any(fnmatch.fnmatchcase(path, layer) for path in paths)
                if isinstance(layer, str)
                else -len(paths) <= layer < len(paths)
            )
            if not is_there:
                what = (
                    f"no attention was seen in {layer!r}, one of the layers to record; it was in {some_paths(paths)}."
                )
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

    def _recorded(self) -> Any:
        """What says which calls are recorded."""
        layers = None if self._layers is None else tuple(self._layers)
        return layers, self._is_full, self.selection

    def _record(self, call: AttentionCall) -> Copy | None:
        """Copy what is kept of an attention call."""
        with self._lock:
            if self.watch is None or not (self.is_asked_for is None or self.is_asked_for(call)):
                return None
            if not self._wants(call.path):
                return None
            self._make_all()  # its keys may be those of the map before, and more
            return self._copies.of(call, self.lends_tensors and call.is_filed_at_once)

    def _file(self, path: str, copy: Copy, output: Output, kernel: str) -> Callable[[], None] | None:
        """Make the map of a call whose axes are known, and keep it; return what does, where the user's `keep` is to."""
        if output.why_apart:
            self.why_apart[path] = output.why_apart
        if self._keep is not None and self._is_doubted(path, kernel, copy.evidence):
            return None
        value, shares_layouts = copy.map_of(output.order), False
        if self.watch is not None and self.needs_layouts:
            shares_layouts = self._describe(value, self.watch)
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
            self._in_calls.warn(
                f"the map of {path!r} is not kept, for it is not the one that was used: times the values it is not "
                f"what {kernel} returned, {doubt}.",
                "map-not-kept",
            )
        return doubt is not None

    def _end_pass(self) -> None:
        self.prove(may_wait=True)

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
        watch = self.watch
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

    def _follow(self, path: str, call: PlainCall, said: Said, kernel: str) -> None:
        """Keep the map of a call of which all is known but its tensors: it is like one of an earlier pass."""
        watch = self.watch
        with self._lock:
            if watch is None or not self._wants(path):
                return
            queries, keys = call.query.shape[2], call.key.shape[2]
            if queries < keys:  # its keys may be those of the map before, and more
                self._make_all()
            taken, known = self._copies.of_plain(path, call), None
            if said.shares_layouts and queries >= keys:
                known = watch.told.get((said.kind, (*call.query.shape[:3], keys)))
            entry = Entry(path, None, get_ident(), taken.sizes)
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
        watch = self.watch
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
            entry = Entry(path, value, get_ident(), sizes)
            self._keep_entry(entry)
            if evidence:
                self._unproven.append(_Unproven(entry, kernel, evidence))
                self._unproven_bytes += sum(one.nbytes for one in evidence)
                if self._unproven_bytes > _MOST_UNPROVEN:
                    self.prove()

    def _keep_entry(self, entry: Entry) -> None:
        self.kept.append(entry)
        exceeded = self._budget.add(entry.sizes)
        if self._layers is not None:
            self._drop_passed()
            exceeded = self._budget.exceeded(entry.sizes)
        if exceeded is None:
            return
        self._drop(entry)
        self._is_full = True
        self._in_calls.warn(
            f"attention maps would take more than {self._budget.why_full(exceeded)}: that of {entry.path!r} and all "
            "that follow are not recorded, until clear(). Keep less (layers=, keep=), or allow more (max_bytes=).",
            "memory-limit",
        )

    def _drop(self, entry: Entry) -> None:
        """Drop a map, if it is kept."""
        place = next((at for at, one in enumerate(self.kept) if one is entry), -1)
        if place >= 0:
            self._budget.discount(self.kept.pop(place).sizes)

    def _drop_passed(self) -> None:
        """Drop the maps of modules that were among the last when they ran, and no longer are."""
        for entry in [entry for entry in self.kept if not self._wants(entry.path)]:
            self._drop(entry)


def _weakly(method: Any) -> Callable[..., Any]:
    """A method, as long as its object is there; then nothing: what sees the model's calls does not keep it alive."""
    known = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        own = known()
        return None if own is None else own(*args, **kwargs)

    return call


def some_paths(paths: Sequence[str]) -> str:
    """Paths in a message: the first twelve."""
    return ", ".join(map(repr, paths[:12])) + (f" and {len(paths) - 12} more" if len(paths) > 12 else "")

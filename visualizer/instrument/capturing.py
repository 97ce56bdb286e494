"""`capture`: the locals of code as it is, without a decorator in it, for as long as a `with` lasts."""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from .. import opcodes
from ..errors import News, warn
from ..rewrite import At, original_of
from ..store import Cache, Channel, Stack, Store, listener
from ..tensors import Keep, check_keep
from . import compiler, swapped_code
from .arguments import check_at, check_count, check_max_bytes, check_names
from .error_messages import never_reached
from .reruns import mark_reruns
from .sites import Site, beginning, sites_of
from .untraced import never_compiled

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class _How(TypedDict, total=False):
    at: At
    limit: int | None
    max_bytes: float | None


@overload
def capture(
    target: Any, *names: str, keep: Literal["numpy"] = ..., **how: Unpack[_How]
) -> Captured[np.ndarray[Any, Any]]: ...


@overload
def capture(
    target: Any, *names: str, keep: Literal["tensor"], **how: Unpack[_How]
) -> Captured[Tensor | np.ndarray[Any, Any]]: ...  # arrays stay arrays


@overload
def capture(target: Any, *names: str, keep: Keep, **how: Unpack[_How]) -> Captured[Any]: ...


@never_compiled
def capture(
    target: Any,
    *names: str,
    at: At = "return",
    keep: Keep = "numpy",
    limit: int | None = None,
    max_bytes: float | None = None,
) -> Captured[Any]:
    """The values that locals have while a model runs, by module path; its source needs no change.

    >>> import torch
    >>> from visualizer import capture
    >>> class Attention(torch.nn.Module):
    ...     def forward(self, x):
    ...         attn = (x @ x.mT).softmax(-1)
    ...         return attn @ x
    >>> model = torch.nn.Sequential(Attention(), Attention())
    >>> with capture(model, "attn") as found:
    ...     y = model(torch.ones(1, 5, 8))
    >>> list(found), found["1"][0].shape
    (['0', '1'], (1, 5, 5))
    >>> found.stack().shape                     # all layers in one array
    (2, 1, 5, 5)

    Args:
        target: what to capture from, or a list of these:

            - an `nn.Module`: every submodule of this model whose `forward` has the local, or another method where
              `forward` has not. The keys are the paths of `named_modules()`, without those of compiled and parallel
              wrappers; for modules in a list, the index comes before the path.
            - a function or method, or a class, which means its methods that have the local (`forward` first). The key
              is `__qualname__`. A method of an object, `model.forward`, means that object's calls alone.
            - a dotted name, `"package.module:Class.method"`, which is imported.
        names: locals: assigned names, parameters, names shared with inner or outer functions. With several names the
            keys are `path:name`; each is captured wherever it exists.
        at: "return": the value at every return of the function; a call that raises records nothing. "assign": every
            value assigned to the name, in order; `found.records` says on which line.
        keep: what to store of a value, see `get_local.activate`: "numpy" (arrays on the CPU), "tensor" (detached copies
            on their device), "graph" (the object itself, for losses and gradients), or a callable.
        limit: how many of the most recent calls to keep per key; None: all.
        max_bytes: how many bytes to keep on each device; None: a quarter of its memory; `math.inf`: no limit. When
            it is used up, nothing more is recorded, and one warning says so.

    Returns:
        A dict from key to the list of values, in call order. It records inside its `with` block, or from its
        `start()` to its `stop()`. It can be read at any time: `records`, `stack()`, `save(path)`.

    Raises:
        UnknownLocalError: nothing in the target has the local; the message lists, by class, the locals that exist.
        ValueError: with at="assign", nothing in the target assigns to the local, such as a parameter.
        TypeError, ValueError: the target or an argument is of the wrong kind; or a method does not tell whose call it
            is, because it has no `self` or binds it anew.
        ImportError, AttributeError: a dotted name leads nowhere.
        RewriteError: here or at the start: a function cannot be rewritten with proof. Then nothing has changed.
        UnsupportedPythonError: this interpreter's bytecode is not known.

    At the end of the `with`, a warning names the keys that nothing was recorded under: their functions did not run, or
    torch ran something native in their place.

    Any number of captures may overlap, on the same functions and with `get_local`, and end in any order: each records
    for itself. When the last one ends, the functions get their own code objects back. Calls in other threads are
    recorded too, each with its thread.
    """
    names = check_names("capture", names, 'capture(model, "attn")')
    check_at(at)
    check_keep(keep)
    check_count("limit", limit)
    check_max_bytes(max_bytes)
    opcodes.require_supported()
    sites, keys = sites_of(target, names, at)
    several = len(names) > 1
    captured: Captured[Any] = Captured(f"captured {', '.join(names)}", limit, max_bytes)
    for site in sites:
        captured._add(site, at, keep, several)
    for base, name in keys:
        captured.store.open(f"{base}:{name}" if several else base)
    return captured


class Captured(Cache[Stack]):
    """What `capture` returns: the values by key, recorded inside its `with` block.

    It holds neither the model nor, once dropped, anything that was captured.
    """

    def __init__(self, title: str, limit: int | None, max_bytes: float | None) -> None:
        store = Store(_OFF, clear="its clear()", off="its stop()")
        super().__init__(store, title)
        self._limits = limit, max_bytes
        self._pairs: list[tuple[weakref.ref[FunctionType], Channel]] = []
        self._sources: dict[str, tuple[str, Channel]] = {}
        """For each key, the variable and the channel that its values come from."""
        self._is_running = self._has_run = self._has_warned = False
        # For the finalizer. A channel's `keep` may refer to this very object, which would then never be dropped.
        self._weak_pairs: list[tuple[weakref.ref[FunctionType], weakref.ref[Channel]]] = []
        weakref.finalize(self, _abandon, self._weak_pairs, weakref.ref(store))

    @never_compiled
    def start(self) -> Captured[Stack]:
        """Record from now on, and return itself; for notebooks, where a `with` would have to hold all cells.

        >>> from visualizer import capture
        >>> def attend(x):
        ...     attn = 2 * x
        ...     return "done"
        >>> found = capture(attend, "attn").start()
        >>> attend(1)
        'done'
        >>> found.stop()
        >>> found["attend"]
        [2]
        """
        compiler.prepare()
        mark_reruns()
        with compiler.paused(), swapped_code.switching():
            if self._is_running:
                return self
            pairs = _alive(self._pairs)
            swapped_code.attach(pairs)
            for _, channel in pairs:
                self.store.add(channel)
            self.store.configure(*self._limits)
            for _, channel in pairs:
                channel.connect("numpy")
            self._is_running, self.store.state = True, "capture is running"
            self._has_run = True
            compiler.recompile()
        return self

    @never_compiled
    def stop(self) -> None:
        """Stop recording; the values stay. Functions that no other capture needs get their own code back."""
        with compiler.paused(), swapped_code.switching():
            if not self._is_running:
                return
            self._is_running, self.store.state = False, _OFF
            found = _withdraw(self._pairs, self.store)
            compiler.recompile()
        for news in found:
            warn(*news)
        self.store.report()

    def clear(self) -> None:
        """Start over: empty lists under the same keys, calls counted from 0. Lists that you hold keep their values."""
        self.store.clear([channel for _, channel in self._pairs])

    @property
    def is_running(self) -> bool:
        """Whether calls are recorded now."""
        return self._is_running

    def __enter__(self) -> Captured[Stack]:
        return self.start()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        was_running = self._is_running
        self.stop()
        if was_running and error is None and not self._has_warned:
            missing = {key: self._sources[key] for key in self._unreached()}
            if missing:
                self._has_warned = True
                warn(never_reached(missing, len(self)), "nothing-recorded")

    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line that sums everything up, and the rows of the table; the first row has the column names.

        Once it has run, the row of a key without values says so.
        """
        head, rows = super().table()
        if self._has_run and not self._is_running:
            unreached = {key or "''" for key in self._unreached()}
            rows = [(row[0], "0 (not reached)", *row[2:]) if row[0] in unreached else row for row in rows]
        return head, rows

    def _unreached(self) -> list[str]:
        """The keys without values of which no warning has told why."""
        found = [key for key in self.store.unheard() if key in self._sources]
        return [key for key in found if not self._sources[key][1].was_told(self._sources[key][0])]

    def _add(self, site: Site, at: At, keep: Keep, several: bool) -> None:
        base = site.base  # `key` must not refer to the site, which would keep the function alive

        def key(variable: str, path: str | None) -> str:
            return f"{beginning(base, path)}:{variable}" if several else beginning(base, path)

        path_of = None if site.owners is None else site.owners.path_of
        site_key = swapped_code.new_site(site.function)
        channel = Channel(self.store, site_key, site.names, at, keep, key, site.owner, path_of)
        channel.code = original_of(site.function.__code__)
        for path in ("",) if site.owners is None else site.owners.paths or ("",):
            self._sources.update({key(name, path): (name, channel) for name in site.names})
        self._pairs.append((weakref.ref(site.function), channel))
        self._weak_pairs.append((weakref.ref(site.function), weakref.ref(channel)))


_OFF = "capture is not running: make the calls inside `with capture(...) as found:`"


def _alive(pairs: list[tuple[weakref.ref[FunctionType], Channel]]) -> list[tuple[FunctionType, Channel]]:
    return [(function, channel) for reference, channel in pairs if (function := reference()) is not None]


def _withdraw(pairs: list[tuple[weakref.ref[FunctionType], Channel]], store: Store) -> list[News]:
    """Give the functions their code back, so that nothing refers to the store any more; returns what to warn of."""
    with swapped_code.switching():
        alive = _alive(pairs)
        found = swapped_code.detach(alive)
        for _, channel in pairs:
            channel.disconnect()
            store.remove(channel)
    return found


@never_compiled
def _abandon(
    weak_pairs: list[tuple[weakref.ref[FunctionType], weakref.ref[Channel]]], weak_store: weakref.ref[Store]
) -> None:
    """Stop a capture that was dropped."""

    def stop() -> None:
        store = weak_store()
        if store is None:
            return
        pairs = [(function, channel) for function, weak in weak_pairs if (channel := weak()) is not None]
        was_running = any(listener(channel.site) is channel for _, channel in pairs)
        _withdraw(pairs, store)
        store.abandon()
        if was_running:
            compiler.recompile(wait=False)  # the thread that is compiling may be waiting for this one

    swapped_code.when_idle(stop)

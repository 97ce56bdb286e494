"""`get_local`: a decorator that stays in the code, with a switch and a cache."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeVar

from .. import opcodes
from ..errors import News, RewriteError, shown, warn
from ..rewrite import At, local_names, original_of
from ..store import Cache, Channel, Record, Store
from ..tensors import Keep, check_keep
from . import compiler, swapped_code
from .arguments import check_at, check_count, check_max_bytes, check_names
from .definitions import Definition, Definitions
from .error_messages import why_shared
from .reruns import mark_reruns
from .sites import function_with
from .untraced import never_compiled
from .unwrapping import has_local

T = TypeVar("T")

_OFF = "capture is not active: get_local.activate() before the calls"


class _Decorated(NamedTuple):
    """What a decorated function has."""

    code: CodeType
    """Its own code when it was decorated."""
    channels: list[Channel]


class GetLocal:
    """The local variables of running functions, by name.

    >>> from visualizer import get_local
    >>> @get_local("attn")
    ... def attend(scores):
    ...     attn = [score / sum(scores) for score in scores]
    ...     return "the weights stay inside"
    >>> with get_local.activate():
    ...     attend([1, 3])
    'the weights stay inside'
    >>> get_local.cache["attend"]
    [[0.25, 0.75]]
    >>> get_local.clear()

    The decorator returns the very object that it gets. Nothing happens until `activate()`, and after `deactivate()` the
    function has its own code object again.
    """

    def __init__(self) -> None:
        self._store = Store(_OFF, clear="get_local.clear()", off="get_local.deactivate()")
        self._cache: Cache[Any] = Cache(self._store, "get_local.cache")
        self._active = False
        self._keep: Keep = "numpy"
        self._definitions = Definitions()
        self._decorated: weakref.WeakKeyDictionary[FunctionType, _Decorated] = weakref.WeakKeyDictionary()

    def __call__(self, *names: str, at: At = "return", keep: Keep | None = None) -> Callable[[T], T]:
        """A decorator that returns the same function, marked so that its locals `names` can be captured.

        >>> @get_local("q", "k")
        ... def forward(x):
        ...     q, k = x, 2 * x
        ...     return q + k
        >>> with get_local.activate():
        ...     forward(1)
        3
        >>> get_local.cache["forward:q"], get_local.cache["forward:k"]
        ([1], [2])
        >>> get_local.clear()

        Args:
            names: locals of the function: assigned names, parameters, names shared with inner or outer functions.
            at: "return" records the value at every return of the function; a call that raises records nothing.
                "assign" records every value assigned to the name, in order, with its line (`get_local.records`).
            keep: what to store of a value, as `activate` has it; None: what `activate` says.

        The decorated object may be a function or method, a staticmethod, classmethod or property, a function wrapped by
        functools.wraps (`@torch.no_grad()`), or an `nn.Module` class, which means its `forward`. The key in
        `get_local.cache` is the function's `__qualname__`; with several names, the qualname, a colon and the name.
        Where several functions have one `__qualname__`, their keys have the module before it, or the line behind it
        ("module.qualname", "qualname@line"). The short key still reads the one that has values; where several have, it
        is an error that names them.

        Raises:
            UnknownLocalError: the function has no such local; the message lists what it has.
            TypeError: there is no name, a name is no string, or the object has no Python code: a builtin, or an
                `nn.Module` class without a `forward`.
            ValueError: `at` or `keep` is not one of its choices; or at="assign", and the function never assigns to one
                of the names.
            RewriteError: capture is active and the function cannot be rewritten with proof.
        """
        names = check_names("get_local", names, '@get_local("attn")')
        check_at(at)
        if keep is not None:
            check_keep(keep)

        def decorate(target: T) -> T:
            self._decorate(function_with(target, names, at), names, at, keep)
            message = why_shared(target, names)
            if message is not None:
                warn(message, "inherited-forward")
            return target

        return decorate

    @never_compiled
    def activate(self, keep: Keep = "numpy", limit: int | None = None, max_bytes: float | None = None) -> Activation:
        """Capture from every decorated function, whether defined before or after, until `deactivate()`.

        >>> with get_local.activate(keep="tensor", limit=100):   # at the end of a `with` the state before comes back
        ...     pass

        Args:
            keep: what to store of a value, at the moment of capture. "numpy": tensors as arrays on the CPU, bfloat16
                and 8-bit floats as float32. "tensor": tensors detached and copied, on their device. "graph": the object
                itself, for losses and gradients. A callable, such as `lambda a: a.mean(1)`: a detached copy of what it
                returns, tensors on their device; what it calls is not recorded. In all but "graph", arrays are copied,
                tables of pandas, sparse matrices, and containers and dataclasses with what is in them. Other objects
                are kept by reference, so that later changes show in them; a warning says so once for each class.
            limit: how many of the most recent calls to keep per key; None: all.
            max_bytes: how many bytes of values to keep on each device; None: a quarter of its memory. When it is used
                up, nothing more is recorded, and one warning says so.

        Raises:
            UnsupportedPythonError: this interpreter's bytecode is not known.
            RewriteError: a decorated function cannot be rewritten with proof. Then nothing has changed. Where another
                tool has replaced the function's code since, a warning says so, and the others are captured.
            TypeError, ValueError: an argument is of the wrong kind. Then nothing has changed.
        """
        opcodes.require_supported()
        check_keep(keep)
        check_count("limit", limit)
        check_max_bytes(max_bytes)
        before = Activation(self, self._active, self._keep, self._store.limit, self._store.max_bytes)
        self._switch(True, keep, limit, max_bytes)
        return before

    def deactivate(self) -> None:
        """Give every decorated function its own code object back. What was captured stays in the cache.

        >>> get_local.deactivate()
        >>> get_local.is_active
        False
        """
        self._switch(False, self._keep, self._store.limit, self._store.max_bytes)

    def clear(self) -> None:
        """Empty the cache: the same keys with new, empty lists. Lists that you hold keep their values.

        If the byte budget was used up, recording goes on. Calls are counted from 0 again.
        """
        self._store.clear()

    @property
    def cache(self) -> Cache[Any]:
        """Captured values: a dict from key to the list of values, in call order.

        >>> @get_local("attn")
        ... def forward(x):
        ...     attn = x / 2
        ...     return attn
        >>> with get_local.activate():
        ...     _ = forward(1), forward(3)
        >>> get_local.cache["forward"]
        [0.5, 1.5]

        A value is what `keep` made of it: by default a tensor becomes a numpy array of its shape and type. If a `keep`
        function raised, reading raises its error again, because the captured function may have hidden it.
        """
        self._store.fetch()
        return self._cache

    @cache.setter
    def cache(self, lists: Mapping[str, list[Any]]) -> None:
        self._store.fetch()
        for key in list(self._cache):
            del self._cache[key]
        self._cache.update(lists)

    @property
    def records(self) -> list[Record]:
        """The values of the cache, each with where it comes from: key, variable, call, line, thread.

        >>> @get_local("attn", at="assign")
        ... def softmax(x):
        ...     attn = x
        ...     attn = attn / 4
        ...     return attn
        >>> with get_local.activate():
        ...     _ = softmax(1)
        >>> [(record.variable, record.value) for record in get_local.records if record.key == "softmax"]
        [('attn', 1), ('attn', 0.25)]
        """
        return self._store.records()

    @property
    def is_active(self) -> bool:
        """Whether decorated functions are captured now."""
        return self._active

    @property
    def is_activate(self) -> bool:
        """The name that `is_active` had in the original Visualizer."""
        return self._active

    def __repr__(self) -> str:
        return f"<get_local: {'active' if self._active else 'not active'}, {len(self._store.cache)} keys>"

    @never_compiled
    def _decorate(self, function: FunctionType, names: tuple[str, ...], at: At, keep: Keep | None) -> None:
        with compiler.paused() if self._active else nullcontext(), swapped_code.switching():
            before = self._decorated.get(function)
            channels = [] if before is None else before.channels
            same = [
                channel for channel in channels if (channel.at, _identity(channel.own_keep)) == (at, _identity(keep))
            ]
            if set(names) <= {name for channel in same for name in channel.names}:
                return
            replaced = [channel for channel in channels if set(channel.names) & set(names)]
            definition = self._definitions.of(function)
            new = [self._channel(definition, function, names, at, keep)]
            for other in replaced:  # its other names are captured as before
                rest = tuple(name for name in other.names if name not in names)
                if rest:
                    new.append(self._channel(definition, function, rest, other.at, other.own_keep))
            if self._active:
                swapped_code.attach([(function, channel) for channel in new])
            # A refusal must leave no trace, so all that can fail stands above.
            for channel in new:
                channel.code = original_of(function.__code__)
                self._register(definition, function, channel)
            news = swapped_code.detach((function, other) for other in replaced)
            for other in replaced:
                both = [name for name in other.names if name in names]
                what = (
                    f"{swapped_code.place_of(function)} was decorated for {', '.join(both)} before, with "
                    f"at={other.at!r} and keep={shown(repr, other.own_keep)}; the new get_local("
                    f"{', '.join(map(repr, names))}, at={at!r}, keep={shown(repr, keep)}) takes its place."
                )
                news.append(News(what, "decorated-twice"))
            channels = [*(c for c in channels if c not in replaced), *new]
            self._decorated[function] = _Decorated(original_of(function.__code__), channels)
            self._name_keys(definition, function, [name for channel in channels for name in channel.names])
            for channel in new:
                if self._active:
                    channel.connect(self._keep)
            if self._active:
                compiler.recompile()
        for one in news:
            warn(*one)

    def _channel(
        self, definition: Definition, function: FunctionType, names: tuple[str, ...], at: At, keep: Keep | None
    ) -> Channel:
        """The definition's channel for these arguments of the decorator; a new one is not registered yet."""
        channel = definition.channels.get((names, at, _identity(keep)))
        if channel is None:
            channel = Channel(self._store, swapped_code.new_site(function), names, at, keep, definition.key)
        return channel

    def _register(self, definition: Definition, function: FunctionType, channel: Channel) -> None:
        arguments = (channel.names, channel.at, _identity(channel.own_keep))
        if arguments not in definition.channels:
            self._store.add(channel)
            if _is_shared(channel.own_keep):
                definition.channels[arguments] = channel
            else:  # `keep` is a closure that is made anew with each function, so the channel goes with the function
                weakref.finalize(function, _disconnect_later, channel).atexit = False

    def _name_keys(self, definition: Definition, function: FunctionType, variables: list[str]) -> None:
        """Give each variable of the definition its key, and move lists that this definition names otherwise."""

        def rename() -> dict[str, str]:
            known = [(each, v) for each in self._definitions.named(definition.name) for v in each.captured]
            before = [each.key(variable) for each, variable in known]
            definition.variables = variables
            self._definitions.add(definition, function)
            after = [each.key(variable) for each, variable in known]
            return {old: new for old, new in zip(before, after, strict=True) if old != new}

        store = self._store
        renamed = store.rename(rename)
        for variable in definition.captured:
            if variable not in variables and definition.key(variable) in renamed.values():
                store.drop_if_empty(definition.key(variable))
        for variable in variables:
            store.open(definition.key(variable))
        self._cache.namesakes.update(self._definitions.namesakes(definition.name))

    @never_compiled
    def _switch(self, active: bool, keep: Keep, limit: int | None, max_bytes: float | None) -> None:
        if active:
            compiler.prepare()
            mark_reruns()
        with compiler.paused(), swapped_code.switching():
            decorated = list(self._decorated.items())
            pairs = [(function, channel) for function, (_, channels) in decorated for channel in channels]
            news: list[News] = []
            if active and not self._active:
                replaced = {function for function, (code, _) in decorated if original_of(function.__code__) is not code}
                swapped_code.attach((function, channel) for function, channel in pairs if function not in replaced)
                news = _attach_replaced([pair for pair in pairs if pair[0] in replaced])
            elif self._active and not active:
                news = swapped_code.detach(pairs)
            changes = bool(pairs) and (active, keep) != (self._active, self._keep)
            self._active, self._keep = active, keep
            self._store.state = "capture is active" if active else _OFF
            for _, channel in pairs:
                if active:
                    channel.connect(keep)
                else:
                    channel.disconnect()
            if active:
                self._store.configure(limit, max_bytes)
            if changes:
                compiler.recompile()
        for one in news:
            warn(*one)
        if not active:
            self._store.report()


class Activation:
    """What `get_local.activate()` returns; at the end of a `with` it brings back the state before."""

    def __init__(self, owner: GetLocal, active: bool, keep: Keep, limit: int | None, max_bytes: float | None) -> None:
        self._owner, self._before = owner, (active, keep, limit, max_bytes)

    def __enter__(self) -> GetLocal:
        return self._owner

    def __exit__(self, *_: object) -> None:
        self._owner._switch(*self._before)


def _attach_replaced(pairs: list[tuple[FunctionType, Channel]]) -> list[News]:
    """Attach functions whose code another tool has replaced, as far as that code allows; what to warn of."""
    news = []
    for function, channel in pairs:
        try:
            for name in channel.names:
                if not has_local(function, name, channel.at):
                    what = "assignment to" if name in local_names(function.__code__) else "local"
                    raise RewriteError(f"it has no {what} {name!r} now")
            swapped_code.attach([(function, channel)])
        except RewriteError as error:
            what = (
                f"the code of {swapped_code.place_of(function)} was replaced by another tool since it was decorated "
                f"for {', '.join(channel.names)}, and it is not captured: {error}."
            )
            news.append(News(what, "code-replaced"))
    return news


get_local = GetLocal()
atexit.register(get_local.deactivate)  # functions that run while the interpreter shuts down run their own code


def _is_shared(keep: Any) -> bool:
    """Whether all functions of a factory have the same `keep`; a closure is a new object each time."""
    return not callable(keep) or (
        isinstance(keep, FunctionType) and keep.__closure__ is None and keep.__defaults__ is None
    )


def _identity(keep: Any) -> Any:
    """What tells one `keep` from another; a lambda is the same one, however many times its line runs."""
    if not callable(keep):
        return keep
    return keep.__code__ if _is_shared(keep) else id(keep)


@never_compiled
def _disconnect_later(channel: Channel) -> None:
    def end() -> None:
        channel.disconnect()
        channel.store.remove(channel)

    swapped_code.when_idle(end)

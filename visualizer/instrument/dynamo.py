"""What a hook call means in code that torch's compiler traces. It is imported when torch._dynamo has been.

Left alone, the compiler would trace into the hook, which cannot be part of a graph. `Hook` makes it defer the
call: copies of the values become outputs of the graph, and the hook is called with them when the graph has run. It is
still one graph, and the hook is that of plain calls. A value that cannot be an output ends the graph before the
hook call; with fullgraph=True it is refused.

In the methods below `tx` traces one function, which may be inlined; `tx.output.root_tx` traces the one that is
compiled. There is no public way to do all this, so the compiler's inner names are used, here and in `compiler.py`.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch._C import _functorch as functorch
from torch._dynamo import config, exc, variables
from torch._dynamo.source import AttrSource
from torch._dynamo.variables.builder import VariableBuilder

from ..store import Channel, listener, receive
from .untraced import DISABLED

_is_exporting = getattr(sys.modules.get("torch.compiler"), "is_exporting", bool)

_latest_calls: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()
"""For each function that is being compiled: by site, the tracer of the call that began last."""


def register_hook() -> None:
    """Make the compiler take the hook for a `Hook`. With torch before 2.3 that ends a graph."""
    VariableBuilder._id_dispatch()[id(receive)] = lambda builder, hook: Hook(source=builder.source)


class _CannotDefer(Exception):
    """Why a hook call cannot wait until the graph has run."""


class Hook(variables.VariableTracker):
    """The hook, as the compiler sees it while it traces."""

    def reconstruct(self, codegen: Any) -> Any:
        """Have the compiled code load the hook."""
        source: Any = self.source
        return source.reconstruct(codegen)

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        """Defer the call; where that is impossible, end the graph or raise Unsupported."""
        site, event = args
        source: Any = self.source
        channel = listener(site.as_python_constant())
        if channel is not None and (tx.export or _is_exporting()):
            if _is_recorded(channel, event):
                channel.pass_over(channel.names[0], "was traced by torch.export, which computes nothing")
        elif channel is not None:
            hook = Hook(source=AttrSource(source, DISABLED)) if DISABLED in vars(receive) else self
            try:
                _defer(tx, channel, hook, site, event)
            except _CannotDefer as why:
                raise exc.Unsupported(f"{_title(channel)} cannot be captured within a graph: {why}") from None
        return variables.ConstantVariable(None)


def _title(channel: Channel) -> str:
    return f"{', '.join(channel.names)} of {'?' if channel.code is None else channel.code.co_qualname}"


def _is_recorded(channel: Channel, event: Any) -> bool:
    """Whether the call is recorded, as far as that is known before its object exists."""
    if channel.path_of is None or not isinstance(event, variables.TupleVariable):
        return channel.path_of is None
    return channel.path_of(getattr(event.items[0], "value", None)) is not None


def _defer(tx: Any, channel: Channel, hook: Hook, site: Any, event: Any) -> None:
    begins = channel.at == "assign" and (not isinstance(event, variables.TupleVariable) or len(event.items) == 1)
    if channel.at == "assign":
        _check_call(tx, channel.site, begins)
    _check_place(tx)
    if channel.owner is not None and (begins or channel.at == "return") and event.items[0].source is None:
        raise _CannotDefer("the object was made in the graph")
    # Each inlined function has such a list too, but nobody reads it.
    tx.output.root_tx.debug_locals.append((hook, [site, _snapshot(tx, channel, event)]))


def _check_call(tx: Any, site: str, begins: bool) -> None:
    """See that an assigned value belongs to the call that began last, under which the hook will file it."""
    frame = tx.output.root_tx
    calls = _latest_calls.setdefault(frame, {})
    if begins:
        if tx is frame and not frame.one_graph:
            raise exc.SkipFrame("a function is captured at assignments, and behind a graph it has another frame")
        calls[site] = id(tx)
    elif calls.get(site) != id(tx):
        raise _CannotDefer("its calls are nested or interleaved")


def _check_place(tx: Any) -> None:
    """See that the compiler calls the hook after the graph, wherever it is tracing now."""
    frame = tx.output.root_tx
    if not hasattr(frame, "debug_locals"):
        raise _CannotDefer("this release of torch cannot put calls off")
    if not tx.output.is_root_tracer():
        raise _CannotDefer("it runs inside an operation that takes functions, such as checkpoint or cond")
    if functorch.peek_interpreter_stack() is not None:
        if not frame.one_graph:  # a graph that ends there makes the compiler fail
            raise exc.SkipFrame("a function is captured inside a transform of torch.func")
        raise _CannotDefer("it runs inside a transform of torch.func, such as vmap or grad")
    if getattr(config, "nested_graph_breaks", False) and not frame.one_graph:
        raise _CannotDefer("with nested_graph_breaks the compiler loses calls that were put off")


def _snapshot(tx: Any, channel: Channel, event: Any) -> Any:
    """The event with copies of its values, which the graph may change later; what stands before them stays."""
    has_several = channel.at == "assign" or channel.owner is not None or len(channel.names) > 1
    if not has_several or not isinstance(event, variables.TupleVariable):
        return _copied(tx, channel, event)
    before = 2 if channel.at == "assign" else 0 if channel.owner is None else 1
    values = [_copied(tx, channel, item) for item in event.items[before:]]
    return variables.TupleVariable([*event.items[:before], *values])


def _copied(tx: Any, channel: Channel, value: Any) -> Any:
    value, is_itself = value.realize(), channel.keep == "graph"
    if isinstance(value, (Hook, variables.ConstantVariable, variables.tensor.SymNodeVariable)):
        return value
    if type(value) in (variables.TupleVariable, variables.ListVariable):
        items = [_copied(tx, channel, item) for item in value.items]
        return value if is_itself else type(value)(items)
    if not isinstance(value, variables.TensorVariable):
        raise _CannotDefer("only tensors, numbers, strings, and tuples and lists of these can be captured there")
    if is_itself or isinstance(value, variables.tensor.UnspecializedPythonVariable):
        return value
    if isinstance(value, variables.tensor.NumpyNdarrayVariable):
        return value.call_method(tx, "copy", [], {})
    if not callable(channel.keep):  # a detached copy takes no part in the backward graph
        value = value.call_method(tx, "detach", [], {})
    return value.call_method(tx, "clone", [], {})

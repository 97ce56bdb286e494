"""What torch's compiler has to be told: what a hook call within a graph means, and that code was swapped.

Left alone, the compiler would trace into the hook, whose work is none for a graph. So it is told to put copies of the
values among the outputs of the graph, and to call the hook with them when the graph has run: still one graph, and the
hook is the one that plain calls have. What cannot be an output ends the graph before the hook call, or is refused where
the user allows one graph only.

There is no public way to say this: the compiler's inner names are used here and nowhere else. The oldest releases,
which cannot put calls off, end the graph at every hook call.
"""

from __future__ import annotations

import atexit
import sys
import time
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from threading import RLock
from types import CodeType, FrameType, ModuleType
from typing import Any, ClassVar, TypeVar

from ..store import Channel, listener, receive
from .imports import after_import

T = TypeVar("T")

_COMPILER = "torch._dynamo"
_SPARED = "spared"
_spared: list[Any] = []
_has_taught = False


def no_graph(function: T) -> T:
    """The same function, marked so that torch's compiler neither traces it nor compiles what it runs."""
    vars(function)["_torchdynamo_disable"] = True
    _spared.append(function)
    return function


no_graph(receive)  # should the compiler not understand the rest


def prepare() -> None:
    """Have torch's compiler know the hook: now, or as soon as it is loaded. It is not loaded for that."""
    after_import(_COMPILER, _loaded)


def _loaded(_: ModuleType) -> None:
    _teach()
    Uncompiled.begin()


def _teach() -> None:
    """Tell the compiler about the hook, unless it knows."""
    global _has_taught
    if not _has_taught:
        with suppress(Exception):  # a release that is not known yet must not keep anybody from capturing plain calls
            _spare()
            kind, builder = _kind_of_hook(), import_module(f"{_COMPILER}.variables.builder").VariableBuilder
            builder._id_dispatch()[id(receive)] = lambda builder, hook: kind(source=builder.source)
            _has_taught = True


def _spare() -> None:
    """Have the compiler spare our own code: behind a graph it takes every call for the beginning of another one."""
    try:
        types = import_module(f"{_COMPILER}.types")
        skip = types.FrameExecStrategy(types.FrameAction.SKIP, types.FrameAction.SKIP)
        for function in _spared:
            import_module(f"{_COMPILER}.eval_frame").set_code_exec_strategy(function.__code__, skip)
    except (ImportError, AttributeError):  # an older release
        vars(receive)[_SPARED] = sys.modules[_COMPILER].disable(receive)
        for rules in ("trace_rules", "skipfiles"):
            with suppress(ImportError, AttributeError):
                for room in ("errors", "instrument", "store", "tensors"):
                    import_module(f"{_COMPILER}.{rules}").add(f"{__name__.partition('.')[0]}.{room}")


class Uncompiled:
    """Has compiled functions run as they are written, in all threads, from its creation to its `end`."""

    _active: ClassVar[set[Uncompiled]] = set()
    _stance: ClassVar[Any] = None

    def __init__(self) -> None:
        self._active.add(self)
        if _COMPILER in sys.modules:
            self.begin()
        else:  # it takes a second to load, and nothing is compiled without it
            prepare()

    @staticmethod
    def is_possible() -> bool:
        """Whether this release of torch has a way to do so."""
        return hasattr(sys.modules["torch"].compiler, "set_stance")

    @classmethod
    def begin(cls) -> None:
        """Switch compiled code off, where anybody wants that."""
        if cls._active and cls._stance is None and cls.is_possible():
            with suppress(RuntimeError):  # called from what is just being compiled
                cls._stance = sys.modules["torch"].compiler.set_stance("force_eager")

    def end(self) -> None:
        """Have compiled functions run as before, when nobody else wants them not to."""
        self._active.discard(self)
        if not self._active:
            stance, Uncompiled._stance = self._stance, None
            if stance is not None:
                stance.__exit__(None, None, None)


class _Unfit(Exception):
    """Why values cannot be among the outputs of a graph."""


def _kind_of_hook() -> type:
    """The class of what stands for the hook in code that the compiler traces.

    There `tx` traces a function, which may be inlined, and `tx.output.root_tx` the one that is compiled.
    """
    compiler: Any = import_module(_COMPILER)
    variables, errors, config = compiler.variables, compiler.exc, compiler.config
    functorch, source = import_module("torch._C._functorch"), import_module(f"{_COMPILER}.source").AttrSource
    is_exporting = getattr(sys.modules.get("torch.compiler"), "is_exporting", bool)
    begun: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()

    class Hook(variables.VariableTracker):  # type: ignore[misc, name-defined]
        """The hook. A call of it is put off until the graph has run."""

        def reconstruct(self, codegen: Any) -> Any:
            return self.source.reconstruct(codegen)

        def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
            site, event = args
            channel = listener(site.as_python_constant())
            if channel is not None and (tx.export or is_exporting()):
                if is_meant(channel, event):
                    channel.pass_over(channel.names[0], "was traced by torch.export, which computes nothing")
            elif channel is not None:
                hook = Hook(source=source(self.source, _SPARED)) if _SPARED in vars(receive) else self
                try:
                    put_off(tx, channel, hook, site, event)
                except _Unfit as why:
                    raise errors.Unsupported(f"{_title(channel)} cannot be captured within a graph: {why}") from None
            return variables.ConstantVariable(None)

    def is_meant(channel: Channel, event: Any) -> bool:
        """Whether it is a call of an object that is wanted, as far as can be told before there are objects."""
        if channel.path_of is None or not isinstance(event, variables.TupleVariable):
            return channel.path_of is None
        return channel.path_of(getattr(event.items[0], "value", None)) is not None

    def put_off(tx: Any, channel: Channel, hook: Any, site: Any, event: Any) -> None:
        begins = channel.at == "assign" and (not isinstance(event, variables.TupleVariable) or len(event.items) == 1)
        if channel.at == "assign":
            check_call(tx, channel.site, begins)
        check_place(tx)
        if channel.owner is not None and (begins or channel.at == "return") and event.items[0].source is None:
            raise _Unfit("the object was made in the graph")
        # Each inlined function has such a list too, but nobody reads it.
        tx.output.root_tx.debug_locals.append((hook, [site, as_it_is_now(tx, channel, event)]))

    def check_call(tx: Any, site: str, begins: bool) -> None:
        """An assigned value goes to the call that began last: see that it is the right one."""
        frame = tx.output.root_tx
        calls = begun.setdefault(frame, {})
        if begins:
            if tx is frame and not frame.one_graph:
                raise errors.SkipFrame("a function is captured at assignments, and behind a graph it has another frame")
            calls[site] = id(tx)
        elif calls.get(site) != id(tx):
            raise _Unfit("its calls are nested or interleaved")

    def check_place(tx: Any) -> None:
        frame = tx.output.root_tx
        if not hasattr(frame, "debug_locals"):
            raise _Unfit("this release of torch cannot put calls off")
        if not tx.output.is_root_tracer():
            raise _Unfit("it runs inside an operation that takes functions, such as checkpoint or cond")
        if functorch.peek_interpreter_stack() is not None:
            if not frame.one_graph:  # a graph that ends there makes the compiler fail
                raise errors.SkipFrame("a function is captured inside a transform of torch.func")
            raise _Unfit("it runs inside a transform of torch.func, such as vmap or grad")
        if getattr(config, "nested_graph_breaks", False) and not frame.one_graph:
            raise _Unfit("with nested_graph_breaks the compiler loses calls that were put off")

    def as_it_is_now(tx: Any, channel: Channel, event: Any) -> Any:
        """The event with copies of its values, for the graph may change them; what stands before them stays."""
        has_several = channel.at == "assign" or channel.owner is not None or len(channel.names) > 1
        if not has_several or not isinstance(event, variables.TupleVariable):
            return copied(tx, channel, event)
        before = 2 if channel.at == "assign" else 0 if channel.owner is None else 1
        values = [copied(tx, channel, item) for item in event.items[before:]]
        return variables.TupleVariable([*event.items[:before], *values])

    def copied(tx: Any, channel: Channel, value: Any) -> Any:
        value, is_itself = value.realize(), channel.mode == "graph"
        if isinstance(value, (Hook, variables.ConstantVariable, variables.SymNodeVariable)):
            return value
        if type(value) in (variables.TupleVariable, variables.ListVariable):
            items = [copied(tx, channel, item) for item in value.items]
            return value if is_itself else type(value)(items)
        if not isinstance(value, variables.TensorVariable):
            raise _Unfit("it is no tensor, number or string, nor a tuple or list of such")
        if is_itself or isinstance(value, variables.tensor.UnspecializedPythonVariable):
            return value
        if isinstance(value, variables.tensor.NumpyNdarrayVariable):
            return value.call_method(tx, "copy", [], {})
        if not callable(channel.mode):  # a detached copy takes no part in the backward graph
            value = value.call_method(tx, "detach", [], {})
        return value.call_method(tx, "clone", [], {})

    return Hook


def _title(channel: Channel) -> str:
    return f"{', '.join(channel.names)} of {'?' if channel.code is None else channel.code.co_qualname}"


def at_rest() -> AbstractContextManager[Any]:
    """Within it no other thread compiles: one that does is confused by code that is swapped meanwhile."""
    return getattr(sys.modules.get(f"{_COMPILER}.convert_frame"), "compile_lock", nullcontext())


def forget(wait: bool = True) -> None:
    """Have compiled functions compiled anew: the compiler does not notice that the code of a method was swapped.

    Args:
        wait: for a compilation that is under way in another thread. Otherwise nothing is done then.
    """
    compiler: Any = sys.modules.get(_COMPILER)
    if not hasattr(compiler, "reset"):  # not loaded, or not quite
        return
    frames = compiler.convert_frame
    lock = getattr(frames, "compile_lock", RLock())
    if not lock.acquire(blocking=wait):
        return
    try:
        codes = [code for codes in (frames.input_codes, frames.output_codes) for seen in codes.seen if (code := seen())]
        if not codes or (_is_running() and (_retire(codes) or not wait)):
            return
        # No reset of the whole: it also drops the user's callbacks, and what was learnt about changing shapes.
        for code in codes:
            compiler.reset_code(code)
        _retired.clear()
    except AttributeError:  # a release that is not known yet
        compiler.reset()
    finally:
        lock.release()


_retired: list[tuple[float, Any]] = []
"""What was compiled and is not to be entered any more, with the time when that was decided."""
atexit.register(_retired.clear)  # later, the compiler's own way to clear up behind it is gone


def _is_running() -> bool:
    """Whether a thread, this one included, is inside of compiled code, or just compiling."""
    inside = vars(sys.modules[f"{_COMPILER}.eval_frame"])
    step: FrameType | None = None
    frames = list(sys._current_frames().values())
    try:
        while frames:
            step = frames.pop()
            while step is not None:
                if step.f_globals is inside:
                    return True
                step = step.f_back
        return False
    finally:  # this function's own frame is among them: to hold it would hold all that its callers have
        del step, frames


def _retire(codes: Iterable[CodeType]) -> bool:
    """Let nobody enter what was compiled from the codes; False where this release of torch has no way to do so.

    To reset a code whose compiled forms another thread is just looking through, or adding to, crashes the process. To
    declare each of them void does not, as long as it is not freed under that thread's feet.
    """
    try:
        entries_of = import_module("torch._C._dynamo.eval_frame")._debug_get_cache_entry_list
        void = import_module(f"{_COMPILER}.guards").DeletedGuardManagerWrapper
        now = time.monotonic()
        _retired[:] = [(since, entry) for since, entry in _retired if now - since < 10]
        time.sleep(0.01)  # a thread that has just compiled adds its result
        for entry in [entry for code in codes for entry in entries_of(code)]:
            manager = entry.guard_manager
            state = manager.extra_state
            if state is not None:
                substitute = void("what is captured was switched")
                substitute.id_matched_objs = {"": weakref.ref(receive)}  # no case for the limit on recompilations
                _retired.append((now, (manager, manager.root, entry.code, getattr(entry, "backend", None))))
                state.invalidate(entry, substitute)
    except (ImportError, AttributeError, TypeError):
        return False
    return True

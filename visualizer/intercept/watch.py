"""Watches a model as it runs: which module is running, and which of the functions of torch that it calls attend.

Hooks on the modules say which one is running. A mode of torch sees the calls of torch's functions.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from ..errors import warn
from ..instrument import Uncompiled, mark_reruns, named_modules
from ..store import is_recorded
from ..tensors import why_unreal
from . import interface
from .axes import Order, Output
from .copies import AttentionCall
from .interface import attention_interface
from .kernels import KERNELS, FusedCall, as_computed, in_four_axes, multi_head_attention, name_of
from .modules import (
    ModuleCall,
    arguments_named,
    as_native,
    cannot_attend,
    heads_of,
    is_called_attention,
    is_compiled,
    is_within,
    kind_of,
    packed_groups,
)
from .softmax import Product, Tracing, may_begin

File = Callable[[Order | None, str], None]
"""Keeps the map of a call whose axes are known now; the text says which kernel ran."""


class _Thread(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.calls: list[ModuleCall] = []
        self.is_watched = False  # by a mode that ends with the outermost call
        self.is_in_block = False  # by a mode that ends with the recording
        self.heads: int | None = None  # of the nn.MultiheadAttention under way
        self.tracing = Tracing()
        self.pending = deque[_Pending]()
        self.filing: tuple[ModuleCall, ...] | None = None  # the calls that were under way when the map was made
        self.count = 0
        self.frame: FrameType | None = None  # that runs the outermost call

    def forget(self) -> None:
        """Forget the calls under way, which have ended."""
        self.calls.clear()
        self.pending.clear()
        self.tracing.lineage.clear()
        self.frame = None


@dataclass(frozen=True)
class _Pending:
    """An attention call that is seen, and whose axes the model has not told apart yet."""

    output: Output
    calls: tuple[ModuleCall, ...]
    kernel: str
    file: File


class Watch:
    """The hooks and the mode by which a model's attention is seen, until `end`.

    Args:
        model: whose modules are watched.
        record: called with each attention call that is seen, and copies what is to be kept. Returns what to call once
            it is known which axes are heads, in the order of the calls; or None.
    """

    def __init__(self, model: nn.Module, record: Callable[[AttentionCall], File | None]) -> None:
        modules = list(named_modules(model))
        compiled = [path for path, module in modules if is_compiled(module)]
        if compiled and not Uncompiled.is_possible():
            raise RuntimeError(
                f"{repr(compiled[0]) if compiled[0] else 'the model'} is compiled, and torch before 2.6 cannot run it "
                "uncompiled meanwhile: record the model as it was before torch.compile"
            )
        self.has_run = False
        """Whether a module of the model has been called."""
        self._record = record
        self._thread = _Thread()
        self._mode = _Mode(self)
        self._ran: dict[str, str] = {}  # the classes of modules called attention that ran, by their paths
        self._attended: set[str] = set()  # the paths of modules with maps
        self._refused: set[str] = set()  # the paths of modules whose calls cannot be recorded
        self._uncompiled = Uncompiled()
        mark_reruns()
        self._handles: list[Any] = []
        scripted = []
        for path, module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                scripted.append(path)
                continue
            if path and cannot_attend(module):
                continue
            known = weakref.ref(module)
            self._handles += [
                module.register_forward_pre_hook(_Hook(self._begin_call, path, known), prepend=True, with_kwargs=True),
                module.register_forward_hook(_Hook(self._end_call, path, known), always_call=True),
            ]
        interface.begin(self)
        if scripted:
            tops = [path for path in scripted if not any(path != top and is_within(path, top) for top in scripted)]
            warn(
                f"{', '.join(repr(path) if path else 'the model' for path in tops)} is scripted (torch.jit): it runs "
                "without Python, and its attention is not seen."
            )

    def enter(self) -> None:
        """Let the mode last until `end`, for a `with` block.

        A mode that lasts for a module's call is left behind by KeyboardInterrupt, for which torch calls no hooks; and a
        `with torch.device(...)` around it then ends this mode in place of its own.
        """
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._thread.is_in_block = True

    def end(self) -> None:
        """Remove the hooks and the mode, and file what is seen of calls under way."""
        for handle in self._handles:
            handle.remove()
        self._uncompiled.end()
        interface.end(self)
        thread = self._thread
        self._file_settled(1)
        thread.forget()
        if thread.is_watched or thread.is_in_block:
            thread.is_watched = thread.is_in_block = False
            _remove(self._mode)

    @property
    def has_seen_attention(self) -> bool:
        """Whether anything ran that attends, or is called attention."""
        return bool(self._ran or self._attended or self._refused)

    def without_maps(self) -> dict[str, list[str]]:
        """By their class, the paths of the modules that are called attention, and ran without a map."""
        found: dict[str, list[str]] = {}
        for path, name in self._ran.items():
            near = any(is_within(path, other) or is_within(other, path) for other in self._attended)
            has_inner = any(is_within(other, path) for other in self._ran if other != path)
            if not near and not has_inner:
                found.setdefault(name, []).append(path)
        return found

    def call_arguments(self, name: str) -> list[Any]:
        """What the calls under way in this thread were given by that keyword, the innermost call first."""
        thread = self._thread
        return arguments_named(thread.calls if thread.filing is None else thread.filing, name)

    def _begin_call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = self._thread
        self.has_run = True
        if thread.calls and _has_ended(thread.frame):
            self._leave(thread)
        if not thread.calls:
            if torch._C._current_graph_task_id() != -1:
                return  # in a backward pass checkpointing computes again what has been seen
            if not thread.is_in_block:
                self._mode.__enter__()  # type: ignore[no-untyped-call]
                thread.is_watched = True
            thread.frame = sys._getframe(2)  # behind the hook
        thread.calls.append(ModuleCall(path, module, args, kwargs))

    def _end_call(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        thread = self._thread
        if not thread.calls or thread.calls[-1].module is not module:
            return None  # the call began before recording did
        try:
            if thread.pending:
                self._file_settled(len(thread.calls))
        finally:
            call = thread.calls.pop()
            if is_called_attention(type(module).__qualname__):
                self._ran[path] = type(module).__qualname__
            if not thread.calls:
                self._leave(thread)
        return None if output is None else as_native(call, output)

    def _leave(self, thread: _Thread) -> None:
        """End what belongs to the outermost call."""
        thread.forget()
        if thread.is_watched:
            thread.is_watched = False
            _remove(self._mode)

    def looks_at(self, func: Any) -> bool:
        """Whether a function that is called now may have to do with attention."""
        thread = self._thread
        return bool(thread.calls) and (_begins_attention(func) or bool(thread.tracing.lineage))

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one of torch's functions for a module, and record it if it attends."""
        thread, name = self._thread, name_of(func)
        if name in KERNELS:
            output = func(*args, **kwargs)
            with self._unharmed():
                self._see_fused(name, output, args, kwargs)
        elif name == _MULTI_HEAD:
            before, thread.heads = thread.heads, args[4] if len(args) > 4 else kwargs.get("num_heads")
            try:
                with self._mode:
                    output = multi_head_attention(*args, **kwargs)
            finally:
                thread.heads = before
        else:
            after = None
            with self._unharmed():
                after = thread.tracing.before(func, args, kwargs)
            output = func(*args, **kwargs)
            with self._unharmed():
                product = None if after is None else after(output)
                if product is not None:
                    self._see_product(name, product)
        if thread.pending:
            self._file_settled()
        return output

    def seen_calls(self) -> int | None:
        """How many attention calls were seen in this thread; None outside of a module's call."""
        thread = self._thread
        return thread.count if thread.calls else None

    def see_interface(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """Record a call of a kernel that transformers knows by this name, in which nothing else was seen."""
        with self._unharmed(), _aside():
            fused = attention_interface(result, *args, **kwargs)
            self._see_call(name, fused, Order(tuple(fused.query.shape[:2]), (False, True)))
        self._file_settled()

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """The model does not see an error of ours: a warning says, once for each module, what is not recorded."""
        try:
            yield
        except Exception as error:
            path = self._thread.calls[-1].path
            if path not in self._refused:
                self._refused.add(path)
                warn(
                    f"an attention of {path!r} is not recorded, for an error that the model does not see: "
                    f"{type(error).__name__}: {error}"
                )

    def _see_fused(self, name: str, output: Any, args: Any, kwargs: Any) -> None:
        self._see_call(name, KERNELS[name](output, *args, **kwargs))

    def _see_call(self, name: str, seen: FusedCall, order: Order | None = None) -> None:
        """Record a fused call; `order` tells its axes apart where the kernel itself does."""
        fused, calls = seen, self._thread.calls
        path = calls[-1].path
        if self._is_refused(path, fused.query):
            return
        with _aside():
            groups = packed_groups(calls[-1], fused.query, fused.key)
            fused = in_four_axes(as_computed(fused), self._heads_of(fused.query), groups)
            kind = kind_of(calls, fused.query.shape[2], fused.key.shape[2])
            call = AttentionCall(path, kind, fused, None, self._thread.count)
            output = Output(seen.output.shape)
            output.order = order
            if groups > 1:  # the model's own way of calling tells them apart
                output.order = Order(tuple(fused.query.shape[:2]), (False, True))
            self._await(name, call, seen.output, output)

    def _see_product(self, name: str, product: Product) -> None:
        weights, calls = product.weights, self._thread.calls
        path = calls[-1].path
        if self._is_refused(path, weights):
            return
        with _aside():
            kind = kind_of(calls, weights.shape[-2], weights.shape[-1])
            call = AttentionCall(path, kind, product, self._heads_of(weights), self._thread.count)
            output = Output(product.output.shape)
            layout = [output.layout[place] for place in product.places]
            self._await(f"softmax and {name}", call, product.returned, output, layout)

    def _await(self, kernel: str, call: AttentionCall, returned: Tensor, output: Output, layout: Any = None) -> None:
        """Record a call, and file its map once the model has told its axes apart."""
        thread = self._thread
        thread.count += 1
        file = self._record(call)
        if file is not None:
            thread.pending.append(_Pending(output, tuple(thread.calls), kernel, file))
            thread.tracing.follow_output(returned, output, layout)

    def _file_settled(self, ending: int | None = None) -> None:
        """File the maps of calls whose axes are known, in order.

        Args:
            ending: how many calls are under way, when the last of them ends. What was returned to it by modules in it
                has had its chance then; at the end of the outermost call everything has.
        """
        thread = self._thread
        while thread.pending and thread.filing is None:
            first = thread.pending[0]
            if first.output.order is None and (ending is None or not (ending == 1 or len(first.calls) > ending)):
                return
            thread.pending.popleft()
            thread.filing = first.calls
            try:
                with _aside():
                    first.file(first.output.order, first.kernel)
            finally:
                thread.filing = None

    def _heads_of(self, tensor: Tensor) -> int | None:
        thread = self._thread
        return heads_of(thread.calls[-1], tensor) if thread.heads is None else thread.heads

    def _is_refused(self, path: str, example: Tensor) -> bool:
        """Whether a call's tensors cannot be recorded; a warning says why, once for each module."""
        if not is_recorded():  # torch.jit.trace compares
            return True
        reason = why_unreal(example)
        if reason is None and torch._C._functorch.is_functorch_wrapped_tensor(example):
            reason = "was inside a transform of torch.func, such as vmap"
        if reason is None and example.is_nested:
            reason = "was a nested tensor"
        if reason is None:
            self._attended.add(path)
        elif path not in self._refused:
            self._refused.add(path)
            warn(f"the attention of {path!r} {reason}: such calls are not recorded.")
        return reason is not None


@contextmanager
def _aside() -> Iterator[None]:
    """What is computed within is seen by no mode, such as that of another recording, and has no graph.

    Copies made in inference mode could not be worked on outside of it.
    """
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
        yield


_MULTI_HEAD = "multi_head_attention_forward"


@lru_cache(maxsize=4096)
def _begins_attention(func: Any) -> bool:
    """Whether a function attends, or may be the first to; all others mean something only after a product."""
    name = name_of(func)
    return name in KERNELS or name == _MULTI_HEAD or may_begin(name)


class _Hook:
    """A hook of a module that is recorded; on a copy of the module, in memory or in a file, it does nothing."""

    def __init__(self, function: Callable[..., Any], path: str, module: weakref.ref[nn.Module]) -> None:
        self._function, self._path, self._module = function, path, module

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        if self._module() is module or getattr(module, "_is_replica", False):
            return self._function(self._path, module, *args)
        return None

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle_hook, ()


def _idle_hook() -> _Hook:
    return _Hook(lambda *_: None, "", lambda: None)  # type: ignore[arg-type]


def _has_ended(frame: FrameType | None) -> bool:
    """Whether a frame has run to its end, by an error say."""
    if frame is not None:
        with suppress(RuntimeError):  # it is running
            frame.clear()
            return True
    return False


def _remove(mode: TorchFunctionMode) -> None:
    """End a mode of this thread, whichever have begun behind it and go on."""
    behind = []
    while _len_torch_function_stack() > 0:
        last = _pop_mode()  # type: ignore[no-untyped-call]
        if last is mode:
            break
        behind.append(last)
    for other in reversed(behind):
        _push_mode(other)  # type: ignore[no-untyped-call]


class _Mode(TorchFunctionMode):
    """Shows a watch what torch's functions are called with; several threads may be in it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = weakref.ref(watch)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch = self._watch()
        if watch is None or not watch.looks_at(func):  # nearly always
            return func(*args, **kwargs)
        return watch.see(func, args, kwargs)

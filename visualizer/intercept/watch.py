"""Watches a model as it runs: which module is running, and which of its calls of torch compute attention.

Hooks on the modules say which one is running. A mode of torch sees the calls of torch's functions. It costs more than
many a function does, so that a pass that is like earlier ones is followed without it, by a plan (see `plans`): then
nothing but the operators that attend is seen, and what else may attend ends the plan.
"""

from __future__ import annotations

import sys
import threading
import weakref
from _thread import get_ident
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.overrides import _pop_mode, _push_mode

from ..errors import Section
from ..instrument import Uncompiled, mark_reruns
from ..maps import may_be_autocast
from ..store import is_recorded
from ..tensors import is_plain_torch, why_unreal
from . import functions, operators
from .axes import Factor, Order, Output
from .calls import FusedCall, LogSums, as_computed, in_four_axes, multi_head_attention, name_of, with_sums
from .deformable import SAMPLING_KERNELS, SampledCall, Sampling
from .filing import File, Filing
from .foreign import Gap
from .hooks import Hook, Hooks, frame_of_call, has_ended, is_as_built
from .kernels import KERNELS
from .modes import (
    BEGINS,
    FOLLOWS,
    MULTI_HEAD,
    NO_TENSOR,
    TO_PYTHON,
    Mode,
    add_mode,
    interest_of,
    is_cut_by_numbers,
    remove_mode,
    see_scripted,
    unseen,
)
from .modules import (
    ModuleCall,
    arguments_named,
    as_native,
    has_global_hooks,
    heads_of,
    is_called_attention,
    is_within,
    packed_groups,
    shapes_of,
)
from .plans import UNKNOWN, Pass, Said, Step, plans_of
from .provenance import Origin, Provenance
from .snapshots import AttentionCall, Copy, PlainCall
from .softmax import Product, Tracing

Follow = Callable[[str, PlainCall, Said, str], None]
"""Records a plain call of a module by what was said of earlier ones; then comes the kernel."""
_PLAIN = "scaled_dot_product_attention"


class _Thread(threading.local):
    """What one thread is doing."""

    def __init__(self) -> None:
        self.calls: list[ModuleCall] = []
        self.gaps: list[Gap | None] = []  # of each call; None once it attended, or was looked through before
        self.is_watched = False  # by a mode that ends with the outermost call
        self.ours = 0  # how many pieces of our own code run, whose operators are none of the model's
        self.current: Pass | None = None  # where operators are seen too
        self.is_planned = False  # and there is no mode, for the pass follows a plan
        self.layer: nn.Module | None = None  # under way without the mode, for nothing in it attends
        self.heads: int | None = None  # of the nn.MultiheadAttention under way
        self.tracing = Tracing()
        self.sampling = Sampling()
        self.provenance = Provenance()
        self.filing = Filing()
        self.count = 0
        self.frame: FrameType | None = None  # that runs the outermost call
        self.told: dict[Any, Any] = {}  # what was found out for all of the pass
        self.shapes: dict[int, tuple[int, ...] | None] = {}  # of what the calls under way were given, by their ids

    def forget(self) -> None:
        """Forget the calls under way, which have ended."""
        self.calls.clear()
        self.gaps.clear()
        self.filing.clear()
        self.tracing.clear()
        self.sampling.lineage.clear()
        self.provenance.clear()
        self.told.clear()
        self.shapes.clear()
        self.frame = self.layer = self.current = None
        self.is_planned = False


class Watch:
    """The hooks and the mode by which a model's attention is seen, until `end`.

    Args:
        model: whose modules are watched.
        record: called with each attention call that is seen; returns a copy of what is to be kept, or None.
        file: called with the path of the module and that copy once it is known which axes are heads, in the order of
            the calls.
        end_pass: called behind each call of the outermost module.
        warn: called with what is not recorded and why; it raises no error, for the model would see it.
        recorded: returns what says which calls are recorded; a plan holds as long as it returns the same.
        follow: called in place of `record` and `file` for plain calls that are like those of earlier passes; None: they
            are not.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Callable[[AttentionCall], Copy | None],
        file: File,
        end_pass: Callable[[], None],
        warn: Callable[[str, Section], None],
        recorded: Callable[[], Any] = lambda: None,
        follow: Follow | None = None,
    ) -> None:
        self._plans, self._selection = plans_of(model), recorded
        parts = self._plans.parts(model)
        if parts.compiled and not Uncompiled.is_possible():
            raise RuntimeError(
                f"{repr(parts.compiled[0]) if parts.compiled[0] else 'the model'} is compiled, and torch before 2.6 "
                "cannot run it uncompiled meanwhile: record the model as it was before torch.compile"
            )
        self.has_run = False
        """Whether a module of the model has been called."""
        self.needs_sums = False
        """Whether `FusedCall.log_sums` is of use."""
        self._record, self._file, self._end_pass, self._warn, self._follow = record, file, end_pass, warn, follow
        self._thread = _Thread()
        self._mode = Mode(self)
        self._have_run = set[str]()  # the paths of modules that were called
        self._ran: dict[str, str] = {}  # the classes of modules called attention that ran, by their paths
        self._called_unseen: dict[str, str] = {}  # the classes of modules that called what may attend, by their paths
        self._without_keys: set[str] = set()  # the paths of modules that made weights of something else than scores
        # The classes of modules of which one called nothing unseen, and the paths of those that attended.
        self._looked_through: set[type | str] = set()
        self._attended: set[str] = set()  # the paths of modules with maps
        self._refused: set[str] = set()  # the paths of modules whose calls cannot be recorded
        self._unforeseen: set[str] = set()  # the paths of modules that may have attended where nobody looked
        self._attending = weakref.WeakSet[nn.Module]()  # layers that were taken for some in which nothing attends
        self._uncompiled = Uncompiled()
        self._has_ended = False
        self._has_looked = False  # for functions that are not torch's
        mark_reruns()
        self._outermost: dict[int, nn.Module] = {}  # whose calls are under way, by their threads
        self._hooks = Hooks()
        self._watched = [known for _, known, _ in parts.watched]
        self._sees_operators = not parts.are_recurrent
        for path, known, is_by_token in parts.watched:
            module = known()
            if module is None:
                continue
            begin, end = (self._begin_layer, self._end_layer) if is_by_token else (self._begin_call, self._end_call)
            self._hooks.add(path, module, begin, end)
        functions.begin(self)
        see_scripted(True)
        if parts.scripted:
            inner = {path for path in parts.scripted for top in parts.scripted if path != top and is_within(path, top)}
            tops = [path for path in parts.scripted if path not in inner]
            self._warn(
                f"{', '.join(repr(path) if path else 'the model' for path in tops)} is scripted (torch.jit): it runs "
                "without Python, and its attention is not seen.",
                "scripted-model",
            )

    def end(self) -> None:
        """Remove the hooks and the mode, and file what is seen of calls under way."""
        if not self._has_ended:
            self._has_ended = True  # first: without hooks calls of other threads seem to be of the modules around
            see_scripted(False)
        self._hooks.remove()
        self._uncompiled.end()
        functions.end(self)
        self._file_settled(1)
        here = get_ident(), self._outermost.get(get_ident())
        self._leave(self._thread)
        if self._thread.is_watched and here[1] is not None:
            self._outermost[here[0]] = here[1]
        for number, module in [*self._outermost.items()]:
            self._leave_later(number, module)
        self._outermost.clear()

    def _leave_later(self, number: int, module: nn.Module) -> None:
        """Have a thread whose call is under way end what belongs to it once the call ends.

        It is another one, or this one is within the mode, as where a `keep` stops recording.
        """

        def end(path: str, module: nn.Module, args: Any, output: Any) -> None:
            if get_ident() == number:
                self._leave(self._thread)
            elif number in sys._current_frames():
                return
            handle.remove()

        handle = module.register_forward_hook(Hook(end, "", weakref.ref(module)), always_call=True)
        if number not in self._outermost:  # it has ended meanwhile
            handle.remove()

    @property
    def has_seen_attention(self) -> bool:
        """Whether anything ran that attends, or is called attention."""
        return bool(self._ran or self._called_unseen or self._attended or self._refused)

    def without_maps(self) -> dict[tuple[str, str], list[str]]:
        """The paths of modules that ran without a map, and are called attention or called what may attend.

        They are grouped by their class, and by the reason: "unseen", they called a function that is not torch's;
        "without keys", they made weights of something else than scores; or "", there was nothing of the kind.
        """
        found: dict[tuple[str, str], list[str]] = {}
        ran, known = self._ran | self._called_unseen, self._attended | self._refused
        for path, name in ran.items():
            if path in known:
                continue
            near = any(is_within(path, other) or is_within(other, path) for other in known)
            has_inner = any(is_within(other, path) for other in ran if other != path)
            if not near and not has_inner:
                reason = "without keys" if path in self._without_keys else ""
                found.setdefault((name, "unseen" if path in self._called_unseen else reason), []).append(path)
        return found

    def call_arguments(self, name: str) -> list[Any]:
        """What the calls under way in this thread were given by that keyword, the innermost call first."""
        return arguments_named(self.calls, name)

    @property
    def calls(self) -> Sequence[ModuleCall]:
        """The calls under way in this thread, the outermost first; of a map that is being filed, those in which it was
        made."""
        thread = self._thread
        return thread.calls if thread.filing.calls is None else thread.filing.calls

    @property
    def told(self) -> dict[Any, Any]:
        """A place for what is found out in a pass of this thread; it is empty again in the next."""
        return self._thread.told

    def _begin_call(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = self._thread
        if thread.calls and has_ended(thread.frame):
            self._leave(thread)
        if not thread.calls and operators.are_hidden():
            return  # the `keep` of another recording runs the model: nothing of that is seen
        self.has_run = True
        if not thread.calls:
            if torch._C._current_graph_task_id() != -1:
                return  # in a backward pass checkpointing computes again what has been seen
            self._enter(thread, ModuleCall(path, module, args, kwargs))
            thread.frame = frame_of_call()
        thread.calls.append(ModuleCall(path, module, args, kwargs))
        if thread.is_planned:
            thread.gaps.append(None)
            return
        outer = thread.gaps[-1] if thread.gaps else None
        is_new = type(module) not in self._looked_through and path not in self._looked_through
        thread.gaps.append(None)
        if is_new or outer is not None:
            with self._unharmed(), torch._C.DisableTorchFunction():  # the mode would see what looks at the tensors
                if outer is not None:
                    outer.taken((args, kwargs))
                if is_new:
                    thread.gaps[-1] = Gap(args, kwargs)

    def _enter(self, thread: _Thread, call: ModuleCall) -> None:
        """Begin what belongs to the outermost call: a plan, or else the mode."""
        with self._unharmed([call]), torch._C.DisableTorchFunction():
            if self._sees_operators and operators.are_seen() and _len_torch_function_stack() == 0:
                thread.current = self._plans.begin(call, self._watched, self._selection())
                thread.is_planned = thread.current.is_planned
                operators.begin(self)
            if not (thread.is_planned or self._has_looked):
                functions.look()
                self._has_looked = True
        if not thread.is_planned:
            add_mode(self._mode)
            thread.is_watched = True
        layers = thread.current.layers if thread.current is not None and thread.is_planned else ()
        with self._hooks.lock:  # hooks are of all threads: one that takes the mode away before a layer needs both
            self._outermost[get_ident()] = call.module
            if len(self._outermost) > 1:
                self._hooks.show()
            elif layers:  # nothing in them attends, whoever calls them
                self._hooks.hide(layers)

    def _end_call(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        thread = self._thread
        if not thread.calls or thread.calls[-1].module is not module:
            return None  # the call began before recording did
        if thread.is_planned and len(thread.calls) > 1 and not thread.filing:
            call = thread.calls.pop()
            thread.gaps.pop()
            if thread.shapes:
                thread.shapes.pop(id(call), None)
            if path not in self._have_run:
                self._note_run(path, module)
            return None
        call = thread.calls[-1]
        try:
            self._end_gap(path, module, output)
            if thread.filing:
                self._file_settled(len(thread.calls))
            current = thread.current
            if len(thread.calls) == 1 and output is not None and current and current.recorded == self._selection():
                with self._unharmed(), torch._C.DisableTorchFunction():
                    current.end()
        finally:
            if thread.calls:  # else what is kept of a map ended the recording
                thread.calls.pop()
                thread.gaps.pop()
            thread.shapes.pop(id(call), None)
            if path not in self._have_run:
                self._note_run(path, module)
            if not thread.calls:
                self._leave(thread)
        return None if output is None else as_native(call, output)

    def _note_run(self, path: str, module: nn.Module) -> None:
        self._have_run.add(path)
        if is_called_attention(type(module).__qualname__):
            self._ran[path] = type(module).__qualname__

    def _begin_layer(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the mode away while a layer runs in which nothing attends, where nothing else needs it."""
        thread = self._thread
        if thread.layer is not None and not has_ended(thread.frame):
            return  # it is a part of that layer
        if thread.is_planned:
            if thread.current is None or path not in thread.current.layers:
                self._begin_call(path, module, args, kwargs)
            return
        is_plain = (
            thread.is_watched
            and len(thread.calls) > 0
            and _len_torch_function_stack() == 1
            and not has_global_hooks()
            and not kwargs
            and all(type(one) is Tensor for one in args)
            and is_as_built(module)
            and module not in self._attending
            and not thread.tracing.lineage.may_know(args)
            and not thread.sampling.lineage.may_know(args)
            and _get_function_stack_at(0) is self._mode
        )
        if is_plain:
            _pop_mode()  # type: ignore[no-untyped-call]
            thread.layer = module
            if thread.current is not None:
                thread.current.layers |= {path}
        else:
            self._begin_call(path, module, args, kwargs)

    def _end_layer(self, path: str, module: nn.Module, args: Any, output: Any) -> Any:
        thread = self._thread
        if thread.layer is None:
            return self._end_call(path, module, args, output)
        if thread.layer is module:
            thread.layer = None
            _push_mode(self._mode)  # type: ignore[no-untyped-call]
            gap = thread.gaps[-1]
            with self._unharmed(), torch._C.DisableTorchFunction():
                if gap is not None:
                    gap.taken(args)
                    gap.made(output)
                if isinstance(output, Tensor):
                    thread.provenance.note_layer(args, output, bool(module._modules))
        return None

    def _end_gap(self, path: str, module: nn.Module, output: Any) -> None:
        gaps = self._thread.gaps
        gap, outer = gaps[-1], gaps[-2] if len(gaps) > 1 else None
        if output is None or (gap is None and outer is None):
            return
        with self._unharmed(), torch._C.DisableTorchFunction():
            if gap is not None:
                self._note_unseen(gap.is_of_gap(output[0] if isinstance(output, tuple) else output))
                self._looked_through.add(path if path in self._called_unseen else type(module))
            if outer is not None:
                outer.made(output)

    def _leave(self, thread: _Thread) -> None:
        """End what belongs to the outermost call."""
        self._outermost.pop(get_ident(), None)
        self._hooks.show()
        if thread.current is not None:
            operators.end(self)
        thread.forget()
        if thread.is_watched and remove_mode(self._mode):
            thread.is_watched = False
        with self._unharmed():
            self._end_pass()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one of torch's functions, and take note of it if a module of the model calls it."""
        thread = self._thread
        calls = thread.calls
        if not calls or self._has_ended:
            return func(*args, **kwargs)
        gap = thread.gaps[-1]
        interest = interest_of(func)
        if interest is NO_TENSOR or interest is TO_PYTHON:
            if interest is TO_PYTHON:
                self._is_not_plain()
            return func(*args, **kwargs)
        if thread.current is not None and is_cut_by_numbers(func, args):
            thread.current.is_cut = True
        is_seen = interest is BEGINS or (interest is not FOLLOWS and interest(args, kwargs))
        for lineage in () if is_seen else (thread.tracing.lineage, thread.sampling.lineage):
            if lineage:
                is_seen |= lineage.may_know(args) or (bool(kwargs) and lineage.may_know(kwargs.values()))
        result = self.see(func, args, kwargs) if is_seen else func(*args, **kwargs)
        if not calls:
            return result  # what is kept of a map ended the recording
        try:
            thread.provenance.note(func, args, kwargs, result, calls)
        except Exception as error:
            self._refuse(calls, error)
        if gap is not None:
            self.look_for_gaps(func, args, kwargs, result)
        return result

    def look_for_gaps(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Look whether something that is not seen ran before a function, which has run now."""
        thread = self._thread
        gap = thread.gaps[-1] if thread.gaps else None
        if gap is not None:
            with self._unharmed():
                self._note_unseen(gap.saw(func, args, kwargs, result))

    def _note_unseen(self, has_gap: bool) -> None:
        if has_gap:
            self._is_not_plain()
            call = self._thread.calls[-1]
            self._called_unseen.setdefault(call.path, type(call.module).__qualname__)

    def see(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one of torch's functions for a module, and record it if it attends."""
        thread, name = self._thread, name_of(func)
        if name in KERNELS:
            sums = LogSums() if self.needs_sums and LogSums.may_see(func, *args[:1], **kwargs) else None
            with nullcontext() if sums is None else sums:
                output = func(*args, **kwargs)
            with self._unharmed():
                self._see_fused(name, lambda: with_sums(KERNELS[name](output, *args, **kwargs), sums))
        elif name in SAMPLING_KERNELS:
            output = func(*args, **kwargs)
            with self._unharmed():
                self._see_sampled(name, SAMPLING_KERNELS[name](output, *args, **kwargs))
        elif name == MULTI_HEAD:
            if any(isinstance(one, nn.MultiheadAttention) for one in thread.calls[-1].module.modules()):
                self._is_not_plain()  # without the mode it takes a path of its own
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
                elif thread.tracing.are_keyless:
                    thread.tracing.are_keyless = False
                    self._is_not_plain()
                    self._without_keys.add(thread.calls[-1].path)
                sampled = thread.sampling.after(func, args, kwargs, output)
                if sampled is not None:
                    self._see_sampled("the sum over its points", sampled)
        if thread.filing:
            self._file_settled()
        return output

    def see_scripted(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take note of what a scripted function returned."""
        if self._thread.calls:
            self._is_not_plain()
            with self._unharmed(), unseen():
                self._thread.tracing.after_scripted(function, args, kwargs, result)
                self._thread.provenance.note(function, args, kwargs, result, self._thread.calls)

    def see_operator(self, name: str, args: Any, kwargs: Any, output: Any, sums: LogSums | None = None) -> None:
        """Take note of an operator that has run; record it if it attends, and no mode sees it."""
        thread = self._thread
        current, calls = thread.current, thread.calls
        if current is None or not calls or thread.ours or thread.filing.calls is not None or self._has_ended:
            return
        if not current.is_planned:
            if has_ended(thread.frame):
                return
            if thread.layer is None:
                with self._unharmed():
                    current.note(name, args, output, calls[-1].path)
                return  # the mode sees it
            self._is_not_plain()
            self._attending.add(thread.layer)
            self._see_unwatched(name, args, kwargs, output, sums, self._step_of(current, name, args, output))
        elif not has_ended(thread.frame):
            step = self._step_of(current, name, args, output)
            is_followed = sums is None and step is not None and self._follow_call(step, args, kwargs, output)
            if not is_followed:
                self._see_unwatched(name, args, kwargs, output, sums, step)

    def _step_of(self, current: Pass, name: str, args: Any, output: Any) -> Step | None:
        try:
            return current.step(name, args, output, self._thread.calls)
        except Exception as error:
            self._refuse(self._thread.calls, error)
            return None

    def _follow_call(self, step: Step, args: Any, kwargs: Any, output: Tensor) -> bool:
        """Record a plain call by what was said of earlier ones; False: it is another one, and nothing was done."""
        thread, follow, mask = self._thread, self._follow, kwargs.get("attn_mask")
        if follow is None or step.said is None or thread.filing or may_be_autocast() or not is_recorded():
            return False
        query, key, value = args
        if (mask is not None and type(mask) is not Tensor) or key.shape[1] != value.shape[1]:
            return False
        if query.shape[2] == step.said.groups > 1 and query.shape[1] == key.shape[1]:
            return False
        try:
            with unseen():
                if self._is_unreal(query):
                    return True
                causal, scale, dropout = kwargs.get("is_causal"), kwargs.get("scale"), kwargs.get("dropout_p", 0.0)
                call = PlainCall(output, query, key, value, mask, 0 if causal else None, scale, dropout, thread.count)
                thread.count += 1
                follow(thread.calls[-1].path, call, step.said, _PLAIN)
        except Exception as error:  # which the model does not see
            self._refuse(thread.calls, error)
        return True

    def _see_unwatched(
        self, name: str, args: Any, kwargs: Any, output: Any, sums: LogSums | None, step: Step | None
    ) -> None:
        """Take note of an operator that no mode sees; record it if it attends."""
        thread, current = self._thread, self._thread.current
        if name in KERNELS:
            self._see_planned(name, lambda: with_sums(KERNELS[name](output, *args, **kwargs), sums), step or UNKNOWN)
            return
        may_attend = name in operators.PRODUCTS or (current is not None and current.is_planned)
        if step is None and name not in operators.READS and may_attend:
            with self._unharmed():
                call = thread.calls[-1]
                self._tell_unforeseen(call if thread.layer is None else call._replace(module=thread.layer))

    def _see_planned(self, name: str, describe: Callable[[], FusedCall], step: Step) -> None:
        """Record a fused call where the mode does not look; at once, where nothing has to be waited for."""
        thread = self._thread
        if step.order is None or thread.filing:
            with self._unharmed():
                self._see_fused(name, describe, step)
            self._file_settled()
            return
        copy = None
        with unseen():
            with self._unharmed():
                seen = describe()
                if is_recorded() and not self._is_unreal(seen.query):
                    copy = self._record_one(
                        self._call(step.origin, self._as_computed(seen), None, is_filed_at_once=True)
                    )
            if copy is not None:
                output = Output(())
                output.order = step.order
                thread.filing.file(self._file, self._unharmed, tuple(thread.calls), copy, output, name)

    def _tell_unforeseen(self, call: ModuleCall) -> None:
        if call.path not in self._unforeseen:
            self._unforeseen.add(call.path)
            self._warn(
                f"{type(call.module).__qualname__}, called in {call.path!r}, multiplied matrices or took a softmax, "
                "which neither its code nor earlier passes like this one let expect: if that was attention, it has no "
                "map in this pass. The next pass is watched in full.",
                "unforeseen-attention",
            )

    def _is_not_planned(self) -> None:
        if self._thread.current is not None:
            self._thread.current.is_as_planned = False

    def _is_not_plain(self) -> None:
        if self._thread.current is not None:
            self._thread.current.is_plain = False

    def seen_calls(self) -> int | None:
        """How many attention calls were seen in this thread; None outside of a module's call."""
        thread = self._thread
        return thread.count if thread.calls else None

    def see_function(self, name: str, describe: Callable[[], FusedCall | SampledCall]) -> None:
        """Record a call of a function in Python that attends, in which nothing else was seen."""
        self._is_not_plain()
        with self._unharmed():
            with unseen():
                seen = describe()
            if isinstance(seen, SampledCall):
                self._see_sampled(name, seen)
            else:
                seen = replace(seen, is_foreign=True)
                self._see_fused(name, lambda: seen, UNKNOWN if self._thread.is_planned else None)
        self._file_settled()

    def _unharmed(self, calls: Sequence[ModuleCall] = ()) -> _Unharmed:
        """The model does not see an error of ours: a warning says, once for each module, what is not recorded."""
        return _Unharmed(self._thread, self._refuse, calls or self._thread.calls)

    def _refuse(self, calls: Sequence[ModuleCall], error: Exception) -> None:
        self._is_not_plain()
        self.refuse(calls[-1].path if calls else "", error)

    def refuse(self, path: str, error: Exception) -> None:
        """Say once that an attention of a module is not recorded, for an error of ours."""
        if path not in self._refused:
            self._refused.add(path)
            self._warn(
                f"an attention of {path!r} is not recorded, for an error that the model does not see: "
                f"{type(error).__name__}: {error}",
                "error-while-recording",
            )

    def _see_fused(self, name: str, describe: Callable[[], FusedCall], step: Step | None = None) -> None:
        """Record a fused call; `step` has what is known of it where the mode does not look."""
        with unseen():
            seen = describe()
        calls = self._thread.calls
        if self._is_refused(seen.query):
            return
        with unseen():
            fused = self._as_computed(seen)
            provenance = self._thread.provenance
            origin = provenance.of_query_and_key(seen.query, seen.key, calls) if step is None else step.origin
            output = Output(seen.output.shape)
            if step is not None:
                output.order = step.order
            # The kernel, or the model's own way of calling it, may tell them apart.
            if seen.has_heads or self._groups_of(seen) > 1:
                output.order = Order(tuple(fused.query.shape[:2]), (False, True))
            is_first = not self._thread.filing and self._thread.filing.calls is None
            call = self._call(origin, fused, None, is_first and output.order is not None)
            is_recorded = self._await(name, call, seen.output, output, is_followed=step is None)
            current = self._thread.current
            if current is not None and step is None:
                groups = self._groups_of_plain(seen) if name == _PLAIN and fused is seen else 0
                current.found(name, calls, provenance.first_frame, origin, output if is_recorded else None, groups)
            elif is_recorded and step is not None and not step.is_known:
                self._is_not_planned()

    def _groups_of_plain(self, seen: FusedCall) -> int:
        """How many query heads share a key head in a plain call, see `Said`; 0 for another one."""
        if seen.returned is not None or seen.query.ndim != 4:
            return 0
        groups = getattr(self._thread.calls[-1].module, "num_key_value_groups", 1)
        return groups if type(groups) is int and seen.query.shape[1] == seen.key.shape[1] else 1

    def _as_computed(self, seen: FusedCall) -> FusedCall:
        return in_four_axes(as_computed(seen), self._heads_of(seen.query), self._groups_of(seen))

    def _groups_of(self, seen: FusedCall) -> int:
        return 1 if seen.has_heads else packed_groups(self._thread.calls[-1], seen.query, seen.key)

    def _see_product(self, name: str, product: Product) -> None:
        weights, calls = product.weights, self._thread.calls
        self._is_not_plain()
        if self._is_refused(weights):
            return
        with unseen():
            origin, sample = self._thread.provenance.of_weights(product.made_of, calls)
            call = replace(self._call(origin, product, self._heads_of(weights)), key_sample=sample)
            width = product.returned.shape[product.places.index(product.output.ndim - 1)]
            output = Output((*product.output.shape[:-1], width))
            layout = [
                [Factor(size)] if place is None else output.layout[place]
                for place, size in zip(product.places, product.returned.shape, strict=True)
            ]
            self._await(f"softmax and {name}", call, product.returned, output, layout)

    def _see_sampled(self, name: str, sampled: SampledCall) -> None:
        calls, weights = self._thread.calls, sampled.weights
        self._is_not_plain()
        if self._is_refused(weights):
            return
        with unseen():
            provenance = self._thread.provenance
            origin = UNKNOWN.origin
            if self._thread.is_planned:
                self._is_not_planned()
            else:
                origin = provenance.of_query_and_key(*sampled.made_of, calls)
            call = self._call(origin, sampled, self._heads_of(weights))
            output = Output(sampled.output.shape)
            output.order = sampled.order
            layout = [output.layout[place] for place in sampled.places]
            self._await(name, call, sampled.returned, output, layout)

    def _call(self, origin: Origin, computed: Any, heads: int | None, is_filed_at_once: bool = False) -> AttentionCall:
        calls, count = self._thread.calls, self._thread.count
        shapes = shapes_of(calls, self._thread.shapes)
        return AttentionCall(calls[-1].path, origin, shapes, computed, heads, count, None, is_filed_at_once)

    def _await(
        self,
        kernel: str,
        call: AttentionCall,
        returned: Tensor,
        output: Output,
        layout: Any = None,
        is_followed: bool = True,
    ) -> bool:
        """Record a call, and file its map once the model has told its axes apart; whether it is recorded."""
        thread = self._thread
        copy = self._record_one(call)
        if copy is None:
            return False
        if output.order is None and is_followed:
            output.attended = call.attended(thread.calls[-1])
        thread.filing.add(output, thread.calls, kernel, copy)
        if is_followed:
            thread.tracing.follow_output(returned, output, layout)
        return True

    def _record_one(self, call: AttentionCall) -> Copy | None:
        self._thread.count += 1
        return self._record(call)

    def _file_settled(self, ending: int | None = None) -> None:
        self._thread.filing.settle(self._file, self._unharmed, ending)

    def _heads_of(self, tensor: Tensor) -> int | None:
        thread = self._thread
        return heads_of(thread.calls[-1], tensor) if thread.heads is None else thread.heads

    def _is_refused(self, example: Tensor) -> bool:
        """Whether a call of the innermost module is not of the model, or its tensors cannot be recorded.

        Of the latter a warning says why, once for each module.
        """
        thread = self._thread
        # An interrupted call is no longer under way, whatever the hooks say; torch runs models again for its own ends.
        if has_ended(thread.frame) or not is_recorded():
            return True
        path = thread.calls[-1].path
        if thread.gaps[-1] is not None:
            thread.gaps[-1] = None
            self._looked_through.add(path)
        return self._is_unreal(example)

    def _is_unreal(self, example: Tensor) -> bool:
        path = self._thread.calls[-1].path
        if type(example) is Tensor and example.is_cpu and not example.is_nested and is_plain_torch(torch):
            self._attended.add(path)  # as nearly always
            return False
        reason = why_unreal(example)
        if reason is None and torch._C._functorch.is_functorch_wrapped_tensor(example):
            reason = "was inside a transform of torch.func, such as vmap"
        if reason is None and example.is_nested:
            reason = "was a nested tensor"
        if reason is None and example.is_meta:
            reason = "was on the meta device, which holds no numbers"
        if reason is None:
            self._attended.add(path)
        else:
            self._is_not_plain()
        if reason is not None and path not in self._refused:
            self._refused.add(path)
            self._warn(f"the attention of {path!r} {reason}: such calls are not recorded.", "values-without-numbers")
        return reason is not None


class _Unharmed:
    """Hands an error to a function in place of the caller. Not a generator: it is entered at each step."""

    __slots__ = ("_calls", "_refuse", "_thread")

    def __init__(
        self,
        thread: _Thread,
        refuse: Callable[[Sequence[ModuleCall], Exception], None],
        calls: Sequence[ModuleCall],
    ) -> None:
        self._thread, self._refuse, self._calls = thread, refuse, calls

    def __enter__(self) -> None:
        self._thread.ours += 1

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self._thread.ours -= 1
        if not isinstance(error, Exception):
            return False
        self._refuse(self._calls, error)
        return True

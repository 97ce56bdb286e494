"""What a model's passes have in common: after two that were watched in full, those like them need not be.

A full watch finds where queries and keys come from, and which axes are heads, for each attention call. A plan is what
two passes in a row had in common: the operators that each module called, in order, and what was found of those that
attend. A later pass follows it as long as nothing differs that could make it wrong:

- what the model is given: which arguments, their types, shapes (those that did not differ between the two passes),
  numbers of Python, and what objects hold of all this; for each module that attends also which of its arguments are one
  tensor, and where inputs were joined, the shapes of all that it and the modules around it are given;
- the watched modules: their classes, attributes and parts, the settings in their attributes, and all hooks;
- the globals that their code may read, by the names in it, and what its functions close over;
- the numbers that the code reads from tensors, unless they differed between the two passes;
- the operators, with the axes of query, key and value;
- what of the calls is recorded: of the others nobody looks for the axes.

Floating-point types may differ, and devices: the same code works with them.

Where a module that attends, or a part of it, reads numbers of tensors, its next step may depend on them: there is no
plan then. Where inputs were joined, there is none if any module does so, or cuts a tensor by a mask, for the numbers
may say how long a part is. Nor is there one where the code reads whole tensors, takes random numbers of Python or numpy
or has an iterator, where calls are joined to one attention, or where a map was made of anything else than a fused call.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..instrument import named_modules
from .axes import Order, Output
from .kernels import KERNELS
from .modules import Hook, ModuleCall, cannot_attend, has_global_hooks, is_compiled, is_within, works_by_token
from .operators import READS
from .provenance import Origin
from .surroundings import SIMPLE, Surroundings, chance, has_settings, held_in, is_unsteady, settings

_VALUES = (int, float, complex, str, bytes, np.generic, Enum, type)
"""Bases of classes whose objects are what they are equal to."""
_MOST_FORMS, _MOST_FAILURES, _MOST_OBJECTS, _MOST_NUMBERS = 32, 8, 200, 4096


class Step(NamedTuple):
    """One operator that a module called, and what is known of it if it attends."""

    name: str
    given: Any
    """Of one that attends: what the modules were given whose code tells where query and key come from, see `_Forms`.
    Of one that reads a number: that; `ANY` where it does not matter which one."""
    tensors: Any
    """And the class and shape of query, key and value; None for lengths that differ."""
    origin: Origin
    order: Order | None
    is_known: bool
    """Whether the axes were looked for: not of a call that was not to be recorded."""
    lengths: tuple[int, ...] = ()
    """Where inputs were joined, of all tensors that the modules under way were given."""


ANY = object()
UNKNOWN = Step("", None, None, Origin(None, {}), None, False)
"""An attention call that is not in the plan."""


@dataclass
class _Seen:
    """An operator of a pass that is watched in full."""

    name: str
    given: Any = None
    tensors: Any = None
    origin: Origin | None = None
    lengths: tuple[int, ...] = ()
    output: Output | None = None
    frames: frozenset[str] = frozenset()
    """The paths of the modules whose code tells where query and key come from."""

    def step(self) -> Step | None:
        """What is to be remembered; None where that is not all there is to know."""
        if self.name not in KERNELS:
            return Step(self.name, self.given, None, *UNKNOWN[3:])
        if self.origin is None:
            return None
        output = self.output
        if output is not None and (output.whole is not None or output.parts or output.why_apart):
            return None
        order = None if output is None else output.order
        return Step(self.name, self.given, self.tensors, self.origin, order, output is not None, self.lengths)


class _Known(NamedTuple):
    """What the last pass was, or all that are alike."""

    sizes: tuple[int | None, ...]
    steps: dict[str, tuple[Step, ...]] | None
    layers: frozenset[str]
    """The paths of layers in which nothing was looked at."""
    states: _States | None = None
    """The model as it was in the passes that made a plan; None: there is none."""


@dataclass
class _Memory:
    """What is known of the passes that are given arguments of one form."""

    known: _Known | None = None
    """Replaced as a whole: several threads may be in passes."""
    failures: int = 0


class Pass:
    """One call of the outermost module, and the operators that are seen in it.

    Args:
        memory: of passes like it.
        plan: the one to follow; None: there is none.
        sizes: of the tensors that it is given.
        states: of the model, if this pass and the one before may become a plan.
        recorded: what says which calls are recorded.
    """

    def __init__(
        self, memory: _Memory, plan: _Known | None, sizes: tuple[int, ...], states: _States | None, recorded: Any
    ) -> None:
        self._memory, self._sizes, self._states, self.recorded = memory, sizes, states, recorded
        self._plan = None if plan is None else plan.steps
        self.is_plain = True
        """Whether nothing was recorded but calls of fused operators."""
        self.layers: set[str] = set() if plan is None else {*plan.layers}
        """The paths of layers in which nothing is looked at."""
        self.readers = set[str]()
        """The paths of modules that read numbers of tensors."""
        self.is_cut = False
        """Whether numbers of a tensor may have said how long another is."""
        self._seen: dict[str, list[_Seen]] = {}
        self._counts: dict[str, int] = {}
        self.is_as_planned = True
        """Whether nothing differed from it up to now."""
        self.has_read_another = False
        """Whether the code read another number than before, so that nothing is known of what attends from here on."""

    @property
    def is_planned(self) -> bool:
        """Whether it follows a plan."""
        return self._plan is not None

    def note(self, name: str, args: Any, output: Any, path: str) -> None:
        """Note an operator of a pass that is watched in full."""
        seen = _Seen(name)
        if name in KERNELS:
            if any(type(one) is not Tensor or one.is_nested for one in args[:3]):
                self.is_plain = False
                return
            seen.tensors = _tensors(args)
        elif name in READS:
            seen.given = output
            self.readers.add(path)
        self._seen.setdefault(path, []).append(seen)

    def found(self, name: str, calls: Sequence[ModuleCall], first: int, origin: Origin, output: Output | None) -> None:
        """Note what was found of the operator that was noted last, which attends.

        Args:
            first: the outermost of the calls whose code tells where query and key come from.
            output: None if it is not recorded.
        """
        seen = self._seen.get(calls[-1].path)
        last = seen[-1] if seen else None
        if last is None or last.name != name or last.origin is not None:
            self.is_plain = False  # it did not get there as the operator that it is called like
        else:
            last.origin, last.output, last.frames = origin, output, frozenset(call.path for call in calls[first:])
            last.given = (*map(_given, calls[first:]),)
            last.lengths = _lengths(calls) if origin.joined else ()

    def step(self, name: str, args: Any, output: Any, calls: Sequence[ModuleCall]) -> Step | None:
        """What is remembered of an operator; None if it was not foreseen."""
        path = calls[-1].path
        number = self._counts.get(path, 0)
        self._counts[path] = number + 1
        steps = self._plan.get(path, ()) if self._plan is not None else ()
        step = steps[number] if number < len(steps) and steps[number].name == name else None
        if step is not None and name in KERNELS:
            step = step if not self.has_read_another and _fits(step, args, calls) else None
        elif step is not None and name in READS and step.given not in (ANY, output):
            self.has_read_another = True
        if step is None or self.has_read_another:
            self.is_as_planned = False
        return step

    def end(self) -> None:
        """Learn from what was seen."""
        memory = self._memory
        if self._plan is not None:
            counts = {path: len(steps) for path, steps in self._plan.items()}
            if not self.is_as_planned or counts != self._counts:
                memory.known = None
                memory.failures += 1
            return
        before, now = memory.known, _Known(self._sizes, self._steps(), frozenset(self.layers))
        memory.known = now
        states = self._states
        if before is None or before.steps is None or now.steps is None or states is None:
            return
        common = _common(before.steps, now.steps)
        if common is None:
            memory.failures += 1
        elif states.are_steady and states.are_same():
            sizes = tuple(one if one == other else None for one, other in zip(before.sizes, now.sizes, strict=True))
            memory.known = _Known(sizes, common, before.layers & now.layers, states)

    def _steps(self) -> dict[str, tuple[Step, ...]] | None:
        if not self.is_plain or (self._states is not None and self._states.took_chances()):
            return None
        attending = [seen for several in self._seen.values() for seen in several if seen.origin is not None]
        if any(seen.lengths for seen in attending) and (self.is_cut or self.readers):
            return None
        frames = {frame for seen in attending for frame in seen.frames}
        if any(is_within(reader, frame) for reader in self.readers for frame in frames):
            return None
        steps = {path: tuple(seen.step() for seen in several) for path, several in self._seen.items()}
        return steps if all(None not in several for several in steps.values()) else None  # type: ignore[return-value]


class Parts:
    """The modules of a model that are watched, and what is known of them before it runs."""

    def __init__(self, model: nn.Module) -> None:
        modules = [*named_modules(model)]
        self.compiled = [path for path, module in modules if is_compiled(module)]
        """The paths of compiled modules, and of scripted ones."""
        self.scripted = [path for path, module in modules if isinstance(module, torch.jit.ScriptModule)]
        # torch asks in these alone whether there is autocast for any device, such as that of the key of the operators.
        self.are_recurrent = any(isinstance(module, nn.RNNBase) for _, module in modules)
        scripted, by_token = {*self.scripted}, dict[nn.Module, bool]()
        watched = [one for one in modules if one[0] not in scripted and not (one[0] and cannot_attend(one[1]))]
        self.watched = [
            (path, weakref.ref(module), bool(path) and works_by_token(module, by_token)) for path, module in watched
        ]
        """The path of each, the module, and whether it is a layer in which nothing attends."""
        is_plain = not self.scripted and not self.compiled
        self._states = _States([module for _, module in watched], follows_code=False) if is_plain else None

    def are_same(self) -> bool:
        """Whether the model still has these, as they were."""
        return self._states is not None and self._states.have_same_parts()


class Plans:
    """The plans of a model, by the forms of what its outermost calls are given; and its modules."""

    def __init__(self) -> None:
        self._memories: dict[Any, _Memory] = {}
        self._parts: Parts | None = None

    def parts(self, model: nn.Module) -> Parts:
        """The modules of the model, looked for once as long as it does not change."""
        parts = self._parts
        if parts is None or not parts.are_same():
            parts = self._parts = Parts(model)
        return parts

    def begin(self, call: ModuleCall, modules: Sequence[nn.Module], recorded: Any) -> Pass:
        """Begin a pass, by a plan if there is one.

        Args:
            call: the outermost one.
            modules: those that are watched.
            recorded: what says which calls are recorded.
        """
        forms = _Forms()
        key = call.path, torch.is_grad_enabled(), recorded, forms.of((call.args, call.kwargs))
        sizes = tuple(forms.sizes)
        memory = self._memories.get(key)
        if memory is None:
            if len(self._memories) >= _MOST_FORMS:
                self._memories.clear()
            memory = self._memories[key] = _Memory()
        plan = memory.known
        if plan is not None and plan.states is not None and _agree(plan.sizes, sizes) and plan.states.are_same():
            return Pass(memory, plan, sizes, None, recorded)
        may_become_one = plan is not None and plan.steps is not None and memory.failures < _MOST_FAILURES
        return Pass(memory, None, sizes, _States(modules) if may_become_one else None, recorded)


_of_models: weakref.WeakKeyDictionary[nn.Module, Plans] = weakref.WeakKeyDictionary()


def plans_of(model: nn.Module) -> Plans:
    """The plans of a model, which later recordings of it go on with."""
    try:
        return _of_models.setdefault(model, Plans())
    except TypeError:  # it has no hash
        return Plans()


class _Forms:
    """What arguments are, but for the lengths and the numbers of tensors."""

    def __init__(self) -> None:
        self.sizes = list[int]()
        """The lengths of the tensors up to now."""
        self._known = dict[int, int]()  # the tensors and objects up to now, which tell whether two are the same
        self._objects = 0

    def of(self, value: Any) -> Any:
        """What an argument is. Two have the same form if the code may take them for the same."""
        kind = type(value)
        if kind in SIMPLE:
            return kind, value
        if isinstance(value, Tensor):
            dtype, is_nested = value.dtype, value.is_nested
            self.sizes.extend(() if is_nested else value.shape)
            number = self._known.setdefault(id(value), len(self._known))
            return kind, is_nested, dtype.is_floating_point or dtype, value.ndim, number
        if isinstance(value, _VALUES):
            return kind, value
        if isinstance(value, tuple):
            return kind, *map(self.of, value)
        if id(value) in self._known:
            return kind, self._known[id(value)]
        self._known[id(value)] = len(self._known)
        if isinstance(value, list):
            return kind, *map(self.of, value)
        if isinstance(value, dict):
            return kind, *((str(name), self.of(one)) for name, one in value.items())
        self._objects += 1
        if self._objects <= _MOST_OBJECTS:
            with suppress(Exception):  # of the code of its class
                return kind, self._of_object(value)
        return kind, object()  # it is like no other

    def _of_object(self, value: Any) -> Any:
        """What an object holds; a new object where that is too much, or another one each time."""
        if is_unsteady(value):
            return object()
        if isinstance(value, np.ndarray):
            return object() if value.nbytes > _MOST_NUMBERS else (value.dtype.str, value.shape, value.tobytes())
        if isinstance(value, (set, frozenset)):
            return frozenset(map(self.of, value))
        if isinstance(value, deque):
            return self.of(tuple(value))
        if isinstance(value, FunctionType):
            cells = [held_in(cell) for cell in value.__closure__ or ()]
            return value.__code__, *map(self.of, (value.__defaults__, value.__kwdefaults__, *cells))
        if isinstance(value, MethodType):
            return self.of(value.__func__), self.of(value.__self__)
        if isinstance(value, partial):
            return self.of((value.func, value.args, value.keywords))
        if hasattr(value, "get_seq_length"):  # a cache of keys, whose lengths are those of what attends
            return None
        return tuple((name, self.of(one)) for name, one in _attributes(value))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)


def _given(call: ModuleCall) -> Any:
    return _Forms().of((call.args, call.kwargs))


def _lengths(calls: Sequence[ModuleCall]) -> tuple[int, ...]:
    forms = _Forms()
    forms.of([(call.args, call.kwargs) for call in calls])
    return tuple(forms.sizes)


def _tensors(args: Any) -> Any:
    return tuple((type(one), tuple(one.shape)) for one in args[:3])


def _fits(step: Step, args: Any, calls: Sequence[ModuleCall]) -> bool:
    for (kind, shape), one in zip(step.tensors, args, strict=False):
        if type(one) is not kind or len(shape) != one.ndim:
            return False
        if not _agree(shape, one.shape):
            return False
    is_as_given = step.given == (*map(_given, calls[-len(step.given) :]),)
    return bool(is_as_given) and (not step.lengths or step.lengths == _lengths(calls))


def _agree(known: Sequence[int | None], sizes: Sequence[int]) -> bool:
    return not [one for one, size in zip(known, sizes, strict=True) if one != size and one is not None]


def _common(
    before: dict[str, tuple[Step, ...]], after: dict[str, tuple[Step, ...]]
) -> dict[str, tuple[Step, ...]] | None:
    """The steps that two passes have in common, as far as the number of tokens may differ; None if they are others."""
    if {path: len(steps) for path, steps in before.items()} != {path: len(steps) for path, steps in after.items()}:
        return None
    made = {}
    for path, steps in before.items():
        common = [_common_step(*pair) for pair in zip(steps, after[path], strict=True)]
        if None in common:
            return None
        made[path] = tuple(common)
    return made  # type: ignore[return-value]


def _common_step(one: Step, other: Step) -> Step | None:
    if one.name in READS and one.given != other.given:
        return one._replace(given=ANY) if one.name == other.name else None
    if one._replace(tensors=None) != other._replace(tensors=None):
        return None
    if one.tensors is None or one.tensors == other.tensors:
        return one
    tensors = []
    for (kind, shape), (other_kind, second) in zip(one.tensors, other.tensors, strict=True):
        lengths = tuple(size if size == own else None for size, own in zip(shape, second, strict=False))
        if kind is not other_kind or len(shape) != len(second) or None in (*lengths[:-2], *lengths[-1:]):
            return None
        tensors.append((kind, lengths))
    return one._replace(tensors=tuple(tensors))


class _States:
    """What modules are at one time, besides the numbers in their tensors.

    It holds no object of the user, which may hold the model.

    Args:
        follows_code: whether what the code of the modules reads besides them is part of it.
    """

    def __init__(self, modules: Sequence[nn.Module], follows_code: bool = True) -> None:
        self._watched = [weakref.ref(module) for module in modules]
        parts = {part for module in modules for part in module._modules.values() if part is not None}
        self._leaves = [weakref.ref(part) for part in parts.difference(modules)]
        classes = {cls: None for kind in {*map(type, modules)} for cls in kind.__mro__ if cls not in _BASES}
        self._classes = [*map(weakref.ref, classes)]
        attributes = [
            (known, name, value)
            for known, module in zip(self._watched, modules, strict=True)
            for name, value in vars(module).items()
            if name not in _OWN
        ]
        held = {id(value): (known, name) for known, name, value in attributes if has_settings(value)}
        self._with_settings = [*held.values()]
        hooks = [hook for one in modules for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())]
        own = [value for _, _, value in attributes]
        functions = [*own, *(hook for hook in hooks if type(hook) is not Hook)]
        self._around = Surroundings(classes, functions) if follows_code else Surroundings((), ())
        self.are_steady = not (self._around.is_unsteady or any(map(is_unsteady, own)))
        """Whether nothing was found that gives another answer each time."""
        self._chance = chance()
        # As long as they are there, no other has their number.
        read = self._around.values()
        owned = [*(vars(one).values() for one in (*modules, *classes)), read, *self._around.settings(read)]
        owned += [settings(vars(module)[name]) for known, name in held.values() if (module := known()) is not None]
        self._kept = [one for several in owned for one in several if type(one) in SIMPLE]
        self._hooks, self._next = self._keys_of_hooks(), RemovableHandle.next_id
        self._numbers = self._number()

    def are_same(self) -> bool:
        """Whether the modules are still that."""
        if RemovableHandle.next_id != self._next:
            if self._keys_of_hooks() != self._hooks:
                return False
            self._next = RemovableHandle.next_id
        return not has_global_hooks() and self.have_same_parts()

    def have_same_parts(self) -> bool:
        """Whether all but the hooks is."""
        return self._number() == self._numbers

    def took_chances(self) -> bool:
        """Whether somebody took a random number of Python or numpy since."""
        return bool(self._chance != chance())

    def _number(self) -> list[int]:
        modules = [module for known in self._watched if (module := known()) is not None]
        if len(modules) < len(self._watched):
            return []
        parts = [one for module in modules if (one := module._modules)]
        holders: list[Any] = [*map(vars, modules), *parts]
        holders += [vars(known() or object) for known in self._classes]
        numbers = [id(type(module)) for module in modules]
        numbers += map(hash, itertools.chain.from_iterable(parts))  # of their names
        numbers += map(id, itertools.chain.from_iterable([holder.values() for holder in holders]))
        for known in self._leaves:
            module = known()
            if module is not None:  # it may get a forward or parts of its own
                numbers += id(type(module)), len(module.__dict__), len(module._modules)
        for known, name in self._with_settings:
            module = known()
            numbers += () if module is None else map(id, settings(vars(module).get(name)))
        values = self._around.values()
        numbers += map(id, itertools.chain(values, *self._around.settings(values)))
        return numbers

    def _keys_of_hooks(self) -> list[int]:
        """The numbers of all hooks of the user, which no other gets."""
        modules = [module for known in (*self._watched, *self._leaves) if (module := known()) is not None]
        both = [several for module in modules for several in (module._forward_hooks, module._forward_pre_hooks)]
        return [key for several in both if several for key, hook in several.items() if type(hook) is not Hook]


_BASES = frozenset(nn.Module.__mro__)
_OWN = frozenset(vars(nn.Module()))

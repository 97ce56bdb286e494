"""What a model's passes have in common: after two that were watched in full, those like them need not be.

A full watch finds where queries and keys come from, and which axes are heads, for each attention call. A plan is what
two passes in a row had in common: the operators that each module called, in order, and what was found of those that
attend. A later pass follows it as long as nothing differs that could make it wrong:

- what the model is given: which arguments, their types, shapes (those that did not differ between the two passes),
  numbers of Python, and what objects hold of all this; for each module that attends also which of its arguments are one
  tensor, and where inputs were joined, the shapes of all that it and the modules around it are given;
- the watched modules: their classes, attributes and parts, the settings in their attributes, and all hooks;
- the globals that their code may read, by the names in it, what its functions close over, the values of context
  variables among all this, and the variables of the process;
- the numbers that the code reads from tensors, unless they differed between the two passes;
- the operators, with the axes of query, key and value;
- what of the calls is recorded: of the others nobody looks for the axes.

Floating-point types may differ, and devices: the same code works with them.

Where a module that attends, or a part of it, reads numbers of tensors, its next step may depend on them: there is no
plan then. Where inputs were joined, there is none if any module does so, or cuts a tensor by a mask, for the numbers
may say how long a part is. Nor is there one where the code reads whole tensors, takes random numbers of Python or of
numpy, reads a clock or has an iterator, where calls are joined to one attention, or where a map was made of anything
else than a fused call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .axes import Order, Output
from .kernels import KERNELS
from .memory import Memory
from .modules import ModuleCall, is_within
from .operators import READS
from .provenance import Origin
from .states import Forms, Given, Parts, States

_MOST_FORMS, _MOST_FAILURES = 32, 8


class Step(NamedTuple):
    """One operator that a module called, and what is known of it if it attends."""

    name: str
    given: Any
    """Of one that attends: the modules whose code tells where query and key come from, and what they are `Given`.
    Of one that reads a number: that; `ANY` where it does not matter which one."""
    tensors: Any
    """And the class and shape of query, key and value; None for lengths that differ."""
    origin: Origin
    order: Order | None
    is_known: bool
    """Whether the axes were looked for: not of a call that was not to be recorded."""
    lengths: tuple[int, ...] = ()
    """Where inputs were joined, of all tensors that the modules under way were given."""
    said: Said | None = None
    """Of a plain call, what was said of its map."""


class Said(NamedTuple):
    """What was said of the map of a plain call: of torch's own function, with four axes, the heads behind the batch.

    It holds for later passes too, and nobody has to ask again.
    """

    kind: str | None
    axes_assumed: bool
    shares_layouts: bool
    """Whether its tokens are those of the map before it of the same kind and shape."""
    groups: int
    """How many query heads share a key head: where there are as many queries, these may be heads."""


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
    groups: int = 0
    """Of a plain call, see `Said`; 0: it is another one."""

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
        said = None
        is_plain = self.groups and order is not None and order.is_sorted and order.shape == self.tensors[0][1][:2]
        if is_plain and output is not None and output.said is not None:
            said = Said(*output.said, self.groups)
        return Step(self.name, self.given, self.tensors, self.origin, order, output is not None, self.lengths, said)


class _Known(NamedTuple):
    """What the last pass was, or all that are alike."""

    sizes: tuple[int | None, ...]
    steps: dict[str, tuple[Step, ...]] | None
    layers: frozenset[str]
    """The paths of layers in which nothing was looked at."""
    states: States | None = None
    """The model as it was in the passes that made a plan; None: there is none."""


@dataclass
class _History:
    """What is known of the passes that are given arguments of one form."""

    known: _Known | None = None
    """Replaced as a whole: several threads may be in passes."""
    failures: int = 0


class Pass:
    """One call of the outermost module, and the operators that are seen in it.

    Args:
        history: of passes like it.
        plan: the one to follow; None: there is none.
        sizes: of the tensors that it is given.
        states: of the model, if this pass and the one before may become a plan.
        recorded: what says which calls are recorded.
    """

    def __init__(
        self, history: _History, plan: _Known | None, sizes: tuple[int, ...], states: States | None, recorded: Any
    ) -> None:
        self._history, self._sizes, self._states, self.recorded = history, sizes, states, recorded
        self._plan = None if plan is None else plan.steps
        self.is_plain = True
        """Whether nothing was recorded but calls of fused operators."""
        self.layers = frozenset[str]() if plan is None else plan.layers
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

    def found(
        self,
        name: str,
        calls: Sequence[ModuleCall],
        first: int,
        origin: Origin,
        output: Output | None,
        groups: int = 0,
    ) -> None:
        """Note what was found of the operator that was noted last, which attends.

        Args:
            first: the outermost of the calls whose code tells where query and key come from.
            output: None if it is not recorded.
            groups: of a plain call, see `Said`; 0: it is another one.
        """
        seen = self._seen.get(calls[-1].path)
        last = seen[-1] if seen else None
        if last is None or last.name != name or last.origin is not None:
            self.is_plain = False  # it did not get there as the operator that it is called like
        else:
            last.origin, last.output, last.frames = origin, output, frozenset(call.path for call in calls[first:])
            last.given = tuple((call.path, Given(call.args, call.kwargs)) for call in calls[first:])
            last.lengths = _lengths(calls) if origin.joined else ()
            last.groups = 0 if origin.joined else groups

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
        history = self._history
        if self._plan is not None:
            counts = {path: len(steps) for path, steps in self._plan.items()}
            if not self.is_as_planned or counts != self._counts:
                history.known = None
                history.failures += 1
            return
        before, now = history.known, _Known(self._sizes, self._steps(), self.layers)
        history.known = now
        states, common = self._states, None
        if states is None:
            return
        if before is not None and before.steps is not None and now.steps is not None:
            common = _common(before.steps, now.steps, before.sizes == now.sizes)
        if before is not None and common is not None and states.are_steady and states.are_same():
            sizes = tuple(one if one == other else None for one, other in zip(before.sizes, now.sizes, strict=True))
            history.known = _Known(sizes, common, before.layers & now.layers, states)
        else:  # to look at a model takes long: one that is another in each pass is not looked at for ever
            history.failures += 1

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


class Plans:
    """The plans of a model, by the forms of what its outermost calls are given; and its modules."""

    def __init__(self) -> None:
        self._histories: dict[Any, _History] = {}
        self._parts: Parts | None = None
        self.memory = Memory()
        """For what maps are made of."""

    def parts(self, model: nn.Module) -> Parts:
        """The modules of the model, looked for once as long as it does not change."""
        parts = self._parts
        if parts is None or not parts.are_same():
            parts = self._parts = Parts(model)
        return parts

    def begin(self, call: ModuleCall, watched: Sequence[weakref.ref[nn.Module]], recorded: Any) -> Pass:
        """Begin a pass, by a plan if there is one.

        Args:
            call: the outermost one.
            watched: the modules that are.
            recorded: what says which calls are recorded.
        """
        forms = Forms()
        key = call.path, torch.is_grad_enabled(), recorded, forms.of((call.args, call.kwargs))
        sizes = tuple(forms.sizes)
        history = self._histories.get(key)
        if history is None:
            if len(self._histories) >= _MOST_FORMS:
                self._histories.clear()
            history = self._histories[key] = _History()
        plan = history.known
        if plan is not None and plan.states is not None and _agree(plan.sizes, sizes) and plan.states.are_same():
            return Pass(history, plan, sizes, None, recorded)
        may_become_one = plan is not None and plan.steps is not None and history.failures < _MOST_FAILURES
        states = States([one for known in watched if (one := known()) is not None]) if may_become_one else None
        return Pass(history, None, sizes, states, recorded)


_of_models: weakref.WeakKeyDictionary[nn.Module, Plans] = weakref.WeakKeyDictionary()


def plans_of(model: nn.Module) -> Plans:
    """The plans of a model, which later recordings of it go on with."""
    try:
        return _of_models.setdefault(model, Plans())
    except TypeError:  # it has no hash
        return Plans()


def _lengths(calls: Sequence[ModuleCall]) -> tuple[int, ...]:
    forms = Forms()
    forms.of([(call.args, call.kwargs) for call in calls])
    return tuple(forms.sizes)


def _tensors(args: Any) -> Any:
    return tuple((type(one), tuple(one.shape)) for one in args[:3])


def _fits(step: Step, args: Any, calls: Sequence[ModuleCall]) -> bool:
    for (kind, shape), one in zip(step.tensors, args, strict=False):
        if type(one) is not kind:
            return False
        own = one.shape
        if own != shape and (len(own) != len(shape) or not _agree(shape, own)):
            return False
    if len(calls) < len(step.given):
        return False
    for call, (path, given) in zip(calls[-len(step.given) :], step.given, strict=True):
        if call.path != path or not given.fits(call.args, call.kwargs):
            return False
    return not step.lengths or step.lengths == _lengths(calls)


def _agree(known: Sequence[int | None], sizes: Sequence[int]) -> bool:
    return not [one for one, size in zip(known, sizes, strict=True) if one != size and one is not None]


def _common(
    before: dict[str, tuple[Step, ...]], after: dict[str, tuple[Step, ...]], have_same_sizes: bool
) -> dict[str, tuple[Step, ...]] | None:
    """The steps that two passes have in common, as far as the number of tokens may differ; None if they are others."""
    if {path: len(steps) for path, steps in before.items()} != {path: len(steps) for path, steps in after.items()}:
        return None
    made, has_one_way = {}, have_same_sizes and _reads(before) == _reads(after)
    for path, steps in before.items():
        common = [_common_step(*pair, has_one_way) for pair in zip(steps, after[path], strict=True)]
        if None in common:
            return None
        made[path] = tuple(common)
    return made  # type: ignore[return-value]


def _reads(steps: dict[str, tuple[Step, ...]]) -> list[Any]:
    """The numbers that the code read."""
    return [(path, step.given) for path, several in steps.items() for step in several if step.name in READS]


def _common_step(one: Step, other: Step, has_one_way: bool) -> Step | None:
    if one.name in READS and one.given != other.given:
        return one._replace(given=ANY) if one.name == other.name else None
    if one.said != other.said:
        one, other = one._replace(said=None), other._replace(said=None)
    if one.said is not None and not has_one_way:  # a longer text may be given another mask, or run other layers
        said = one.said._replace(shares_layouts=False)
        one, other = one._replace(said=said), other._replace(said=said)
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

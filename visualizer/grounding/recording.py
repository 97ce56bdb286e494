"""`Recording`: what words and patches attend to each other, asked of a model as it runs and added up."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction

from ..errors import few, warn
from ..intercept import AttentionCall, Maps, Recorder
from ..intercept.hooks import Hook
from ..intercept.modules import argument_names
from ..maps import AttentionMap, without_autograd
from .words_and_patches import FORMER, Look, Plan, Whose, source_of

_ROOM = 2**20  # numbers that are kept side by side


class Key(NamedTuple):
    """Of which text, picture and layer a sum is, and on which of the grids of the picture."""

    whose: Whose
    picture: int
    path: str
    view: int


@dataclass
class Sum:
    """What was seen of some tokens in one layer."""

    tokens: tuple[int, ...]
    weights: Tensor
    """(heads, tokens, *grid), the sum over the calls."""
    are_queries: bool
    calls: int = 1


@dataclass
class _New:
    """What was seen of the maps of one layer whose words and patches lie alike, not yet told apart by words."""

    path: str
    plan: Plan
    weights: Tensor
    calls: int = 1


class Recording:
    """Has the model asked for some weights while it runs, and adds them up; no map and no key is kept.

    Args:
        model, tokenizer, tokens: as `word_maps` is given them.
        layers: patterns of the paths that are wanted; None: all.
        keeps_heads, keeps_steps: whether heads and steps are kept apart.
        are_queries: whether the words' rows are wanted, where text and picture look at each other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: Sequence[str] | None,
        layers: list[str] | None,
        keeps_heads: bool,
        keeps_steps: bool,
        are_queries: bool,
    ) -> None:
        self._module, self.source, self._pipeline = source_of(model, tokenizer, tokens, are_queries)
        self._layers, self.keeps_heads, self.keeps_steps = layers, keeps_heads, keeps_steps
        self._sums: dict[Key, list[Sum]] = {}
        self._new: dict[Any, _New] = {}
        self.formed: dict[tuple[int, str], Tensor] = {}
        """Of each text's picture and layer of a query former what its tokens look at, (tokens, rows, columns)."""
        self._room: Tensor | None = None  # for rows that are kept
        self._paths_seen: dict[str, None] = {}  # of all layers with words and patches, those too that are not wanted
        self._maps: Maps[Any] | None = None
        self._hooks: list[Any] = []
        self._error: Exception | None = None
        self.title = type(model).__name__

    def start(self, is_block: bool) -> None:
        """Record from now on; `is_block`: to the end of a `with` block."""
        if self._maps is None:
            recorder = Recorder(self._module, keep=self._add, max_bytes=math.inf)
            maps: Maps[Any] = Maps(recorder)
            self._paths_seen.clear()
            recorder.is_asked_for, recorder.lends_tensors = self._asks_for, True
            recorder.selection = type(self.source), *(self._layers or ())
            recorder.needs_layouts, recorder.needs_sums = False, self.source.needs_columns
            self._hooks = [
                module.register_forward_pre_hook(Hook(self._noting(note), "", weakref.ref(module)), with_kwargs=True)
                for module, note in self.source.watched
            ]
            if self._pipeline is not None:
                self._pipeline.start()
            self._see_generate()
            self._maps = maps.__enter__() if is_block else maps.start()

    def stop(self, error: object) -> None:
        """Record no more, because of an error of the block or None. Warns where not all could be recorded, and why."""
        maps, self._maps = self._maps, None
        if maps is None:
            return
        try:
            maps.__exit__(error)
        finally:
            for hook in self._hooks:
                hook.remove()
            self._module.__dict__.pop("generate", None)
            if self._pipeline is not None:
                self._pipeline.stop()
        own, self._error = self._error, None
        if error is not None:
            return
        if own is not None:
            what = f"the words of {self.title} were not all recorded: {type(own).__name__}: {own}"
            warn(what, "error-while-recording")
        for layer in self._layers or ():
            if self._paths_seen and not any(fnmatchcase(path, layer) for path in self._paths_seen):
                warn(
                    f"layers: no words and patches attend to each other in {layer!r}; they do in "
                    f"{few([*self._paths_seen], 12)}",
                    "layer-without-attention",
                )

    def clear(self) -> None:
        """Drop what was recorded; recording goes on."""
        self._drop(0)

    @property
    def sums(self) -> dict[Key, list[Sum]]:
        """What was added up, by text, picture, layer and grid of the picture."""
        new, self._new = self._new, {}
        for one in new.values():
            for look in one.plan.looks:
                self._add_look(one.path, look, one.plan.of(look, one.weights), one.calls)
        return self._sums

    def _see_generate(self) -> None:
        """Have what `generate` is given noted."""
        original: Any = getattr(self._module, "generate", None)
        if original is None:
            return

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self._note(self.source.generates, original, args, kwargs)
            made = original(*args, **kwargs)
            self._note(lambda _: self.source.wrote(made), original, (), {})
            return made

        # By what `wraps` says of it, a plan would take all that `generate` calls for the code of the model's own pass.
        described: Any = generate
        described.__module__, described.__signature__ = __name__, inspect.signature(original)
        del described.__wrapped__
        self._module.__dict__["generate"] = generate

    def _asks_for(self, call: AttentionCall) -> bool:
        asked = None if self._error is not None else self.source.asks_for(call)
        if asked == "layer":
            self._paths_seen[call.path] = None
            return self._layers is None or any(fnmatchcase(call.path, layer) for layer in self._layers)
        return asked is not None

    def _noting(self, note: Callable[[dict[str, Any]], int | None]) -> Callable[..., None]:
        return lambda _, module, args, kwargs: self._note(note, module, args, kwargs)

    def _note(self, note: Callable[[dict[str, Any]], int | None], called: Any, args: Any, kwargs: Any) -> None:
        """Have the source take note of a call of a module, or of a function, by the names of its arguments."""
        if self._error is None:
            try:
                is_module = isinstance(called, nn.Module)
                names = argument_names(called) if is_module else [*inspect.signature(called).parameters]
                # What is looked at is no function of the model, and may be seen by a mode of the user's.
                with DisableTorchFunction():
                    void = note({**dict(zip(names, args, strict=False)), **kwargs})
                if void is not None:
                    self._drop(void)
                if self._maps is not None:
                    self._maps.clear()
            except Exception as error:  # the model must not see it
                self._error = error

    def _drop(self, first: int) -> None:
        """Drop what was seen of the tokens from that number on, which are others now; 0: all."""
        if first == 0:
            self._sums, self._new, self.formed = {}, {}, {}
        for key, several in self.sums.items():
            kept = [(one, [place for place, token in enumerate(one.tokens) if token < first]) for one in several]
            self.sums[key] = [
                replace(one, tokens=tuple(one.tokens[place] for place in places), weights=one.weights[:, places])
                for one, places in kept
                if places
            ]

    @without_autograd
    def _add(self, made: AttentionMap) -> None:
        """Add what a map says; nothing of the map itself stays."""
        if self._error is not None:
            return
        try:
            plan = self.source.plan(made)
            if plan.looks:
                weights = plan.weights(made, self._reduced)
                alike = len(self._new) if self.keeps_steps else (made.path, plan)
                known = self._new.get(alike)
                if known is None:
                    self._new[alike] = _New(made.path, plan, self._kept(weights))
                else:
                    known.weights += weights
                    known.calls += 1
        except Exception as error:  # the model must not see it
            self._error = error

    def _kept(self, weights: Tensor) -> Tensor:
        """A copy of the rows of one step, side by side with those of others.

        One by one they would lie between the keys of a growing cache, and keep the room that these leave from being
        used again: a long text would take twice the memory.
        """
        if weights.numel() > _ROOM // 8:
            return weights
        room = self._room
        if room is None or (room.dtype, room.device) != (weights.dtype, weights.device) or len(room) < weights.numel():
            room = torch.empty(_ROOM, dtype=weights.dtype, device=weights.device)
        kept, self._room = room[: weights.numel()].view(weights.shape), room[weights.numel() :]
        return kept.copy_(weights)

    def _add_look(self, path: str, look: Look, weights: Tensor, calls: int) -> None:
        if look.view == FORMER:
            self.formed[look.whose.sample, path] = weights.mean(0)
            return
        several = self._sums.setdefault(Key(look.whose, look.picture, path, look.view), [])
        same = (one for one in several if one.tokens == look.tokens and one.weights.shape == weights.shape)
        known = None if self.keeps_steps else next(same, None)
        if known is None:
            several.append(Sum(look.tokens, weights, look.are_queries, calls))
        else:
            known.weights += weights
            known.calls += calls

    def _reduced(self, weights: Tensor) -> Tensor:
        # What is kept is no view of the rows, which have the keys of all tokens.
        return weights.clone() if self.keeps_heads else weights.mean(1, keepdim=True)

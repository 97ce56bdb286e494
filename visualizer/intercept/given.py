"""What the calls around a map were given: ids of a text, a cache with room, pictures; and `generate` around them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from . import places
from .modules import ModuleCall, arguments_of, inputs_of, names_taken

_IDS = ("decoder_input_ids", "input_ids")
_NO_CACHES = frozenset((type(None), bool, int, float, str, tuple, list, dict, Tensor))


class Given:
    """A call under way, and what it was given by the names of the arguments. What follows from these is found once."""

    __slots__ = ("_filled", "_may_show", "_pixels", "arguments", "call", "has_ids", "takes_ids")

    def __init__(self, call: ModuleCall) -> None:
        self.call, self.arguments = call, arguments_of(call)
        are_ids = [is_ids(value) for value in call.args] if call.args else ()
        self.has_ids = bool(
            (are_ids and are_ids[0])
            or is_ids(self.arguments.get("input_ids"))
            or is_ids(self.arguments.get("decoder_input_ids"))
        )
        """Whether it was given a text under the usual names, or as the first argument."""
        self.takes_ids = True in are_ids or _takes_ids(type(call.module).forward)
        """Whether it is of a text, or of a text and a picture: the tokens within it need not be those of a picture."""
        self._filled: Any = ...
        self._may_show: bool | None = None
        self._pixels: list[tuple[str, Tensor]] | None = None

    @property
    def filled(self) -> int | None:
        """How many tokens are in the static cache that it was given, those of its own call too; None without one."""
        if self._filled is ...:
            self._filled = _filled(self.arguments)
        return self._filled  # type: ignore[no-any-return]

    @property
    def pixels(self) -> list[tuple[str, Tensor]]:
        """The tensors that may be pictures, by their axes, with the names of the arguments."""
        if self._pixels is None:
            self._pixels = inputs_of(self.call, 4)
        return self._pixels

    @property
    def may_show(self) -> bool:
        """Whether anything that it was given may tell of the patches of a picture."""
        if self._may_show is None:
            given, first = self.arguments, self.call.args[0] if self.call.args else None
            self._may_show = (
                bool(self.pixels)
                or "timestep" in given
                or "grid_thw" in given
                or "patch_coord" in given
                or "spatial_shapes" in given
                or (type(first) not in _NO_MAPPINGS and isinstance(first, Mapping))
            )
        return self._may_show

    def is_tower(self) -> bool:
        """Whether it is of the part of a model that sees a picture, and none of its texts."""
        if self.takes_ids or not self.may_show:
            return False
        return "grid_thw" in self.arguments or any(
            ("pixel" in name or one.shape[1] == 3) and not name.endswith(("mask", "bias")) for name, one in self.pixels
        )


_NO_MAPPINGS = (Tensor, type(None))


class Around:
    """The calls that a map was made in, from the innermost outwards, as far as they may tell of its tokens.

    The last is the `generate` that is under way. It is looked for once nothing else has told: to read what it was given
    takes longer than all the rest.
    """

    def __init__(self, calls: Sequence[ModuleCall]) -> None:
        self._known: list[Given] = []
        self._others = self._from(calls)
        self._generation: Any = ...

    @property
    def generation(self) -> Given | None:
        """The `generate` that is under way, and what it was given."""
        if self._generation is ...:
            call = _generation()
            self._generation = None if call is None else Given(call)
        return self._generation  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Given]:
        known, number = self._known, 0
        while True:
            if number == len(known):
                other = next(self._others, None)
                if other is None:
                    return
                known.append(other)
            yield known[number]
            number += 1

    def _from(self, calls: Sequence[ModuleCall]) -> Iterator[Given]:
        is_in_tower = False
        for call in reversed(calls):
            given = Given(call)
            if is_in_tower and given.takes_ids:
                continue  # what a tower is within has the ids of a text
            is_in_tower = is_in_tower or given.is_tower()
            yield given
        if not is_in_tower and self.generation is not None:
            yield self.generation

    def calls(self) -> list[ModuleCall]:
        """These calls, the outermost first."""
        return [one.call for one in self][::-1]


def is_ids(value: Any) -> TypeGuard[Tensor]:
    """Whether a value may be the ids of texts, (texts, tokens)."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def about_pictures(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What was said of the pictures in a text, by the names of the arguments."""
    return {name: arguments[name] for name in places.ABOUT_PICTURES if arguments.get(name) is not None}


@lru_cache(maxsize=4096)
def _takes_ids(forward: Any) -> bool:
    return not set(_IDS).isdisjoint(names_taken(forward))


def _filled(arguments: dict[str, Any]) -> int | None:
    for value in arguments.values():
        if type(value) not in _NO_CACHES and getattr(value, "is_compileable", False) is True:
            return int(value.get_seq_length())
    return None


def _generation() -> ModuleCall | None:
    """The outermost `generate` of transformers that is under way, as a call; `inputs` are the ids that it was given.

    It may look at the pictures before it calls the model, and then says nothing of them to it.
    """
    found = None
    frame: FrameType | None = sys._getframe()
    while frame is not None and (frame := frame.f_back) is not None:
        if frame.f_code.co_name == "generate":
            given = frame.f_locals
            given = {**given, **given.get("kwargs", {}), **given.get("model_kwargs", {}), "now": given.get("input_ids")}
            inputs = next((given[name] for name in ("input_ids", "inputs") if is_ids(given.get(name))), None)
            if inputs is not None and isinstance(given.get("self"), nn.Module):
                now = given["now"] if is_ids(given["now"]) else inputs
                kwargs = {"input_ids": now, "inputs": inputs, "attention_mask": given.get("attention_mask")}
                found = ModuleCall("generate", given["self"], (), kwargs | about_pictures(given))
    return found

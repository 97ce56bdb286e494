"""What the calls around a map were given: ids of a text, a cache with room, pictures; and `generate` around them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import FrameType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..maps import AttentionMap
from . import places
from .modules import ModuleCall, arguments_of, inputs_of, names_taken

_IDS = frozenset(("decoder_input_ids", "input_ids"))
_OF_PATCHES = frozenset(("grid_thw", "patch_coord", "spatial_shapes", "timestep"))
"""Arguments that tell of patches, beside the pictures themselves."""
_HOLD_NOTHING = frozenset((type(None), bool, int, float, str))
_NO_CACHES = _HOLD_NOTHING | {tuple, list, dict, Tensor}


class Given:
    """A call under way, and what it was given."""

    __slots__ = ("_arguments", "_filled", "call", "history", "ids", "may_show", "pixels", "takes_ids", "written")

    def __init__(self, call: ModuleCall) -> None:
        self.call = call
        self._arguments: dict[str, Any] | None = None
        self._filled: Any = ...
        self.history: Any = None
        """For whoever reads its ids to keep what these are."""
        args, kwargs = call.args, call.kwargs
        takes_ids, tells_of_patches = _taken_by(type(call.module).forward)
        has_axes = False
        for value in args:
            if type(value) is Tensor and value.ndim == 3:
                continue  # as most are
            takes_ids = takes_ids or is_ids(value)
            has_axes = has_axes or _has_axes(value)
        for value in kwargs.values():
            if type(value) not in _HOLD_NOTHING and not has_axes:
                has_axes = _has_axes(value)
        self.takes_ids = takes_ids
        """Whether it is of a text, or of a text and a picture: the tokens within it need not be those of a picture."""
        self.pixels = inputs_of(call, 4) if has_axes else []
        """The tensors that may be pictures, by their axes, with the names of the arguments."""
        self.may_show = bool(
            self.pixels
            or (tells_of_patches and not _OF_PATCHES.isdisjoint(self.arguments))
            or not _OF_PATCHES.isdisjoint(kwargs)
            or (args and type(args[0]) is not Tensor and isinstance(args[0], Mapping))
        )
        """Whether anything that it was given may tell of the patches of a picture."""
        self.written: Tensor | None = None
        """The ids that a decoder was given, of a model with an encoder."""
        self.ids: Tensor | None = None
        """The ids of a text, under one of the usual names or as the first argument."""
        if takes_ids or not _IDS.isdisjoint(kwargs):
            written, ids = self.arguments.get("decoder_input_ids"), self.arguments.get("input_ids")
            self.written = written if is_ids(written) else None
            self.ids = next((one for one in (written, ids, *args[:1]) if is_ids(one)), None)

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was given by the names of the arguments."""
        if self._arguments is None:
            self._arguments = arguments_of(self.call)
        return self._arguments

    @property
    def filled(self) -> int | None:
        """How many tokens are in the static cache that it was given, those of its own call too; None without one."""
        if self._filled is ...:
            self._filled = _filled(self.arguments)
        return self._filled  # type: ignore[no-any-return]

    def is_tower(self) -> bool:
        """Whether it is of the part of a model that sees a picture, and none of its texts."""
        if self.takes_ids or not self.may_show:
            return False
        return "grid_thw" in self.arguments or any(
            ("pixel" in name or one.shape[1] == 3) and not name.endswith(("mask", "bias")) for name, one in self.pixels
        )


class Around:
    """The calls that a map was made in, from the innermost outwards, as far as they may tell of its tokens.

    The last is the `generate` that is under way. It is looked for once nothing else has told: to read what it was given
    takes longer than all the rest.
    """

    def __init__(self, made: AttentionMap, calls: Sequence[ModuleCall]) -> None:
        self.made, self.shape, self.is_cross = made, made.shape, made.kind == "cross"
        self._given: list[Given] = []
        self._is_in_tower = False
        self._generation: Any = ...
        for call in reversed(calls):
            given = Given(call)
            if self._is_in_tower and given.takes_ids:
                continue  # what a tower is within has the ids of a text
            self._is_in_tower = self._is_in_tower or (given.may_show and given.is_tower())
            self._given.append(given)

    @property
    def generation(self) -> Given | None:
        """The `generate` that is under way, and what it was given."""
        if self._generation is ...:
            call = _generation()
            self._generation = None if call is None else Given(call)
        return self._generation  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Given]:
        yield from self._given
        if not self._is_in_tower and self.generation is not None:
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
def _taken_by(forward: Any) -> tuple[bool, bool]:
    """Whether a method takes ids, and arguments that tell of patches, by their names."""
    names = names_taken(forward)
    return not _IDS.isdisjoint(names), not _OF_PATCHES.isdisjoint(names)


def _has_axes(value: Any) -> bool:
    """Whether a value is or may hold a tensor of more than three axes."""
    if isinstance(value, Tensor):
        return value.ndim > 3
    if isinstance(value, (list, tuple)):
        return any(type(one) is not Tensor or one.ndim > 3 for one in value)
    return isinstance(value, dict)


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

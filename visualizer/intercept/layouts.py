"""Reads what the tokens of a map are off the model that runs: its own words for them, and what its call was given.

The calls under way are asked from the innermost outwards, and what fits the number of tokens is taken. Nothing is
guessed: where no call tells what the tokens are, the map has no layout.

- pictures, videos and windows: see `patches.py`;
- texts: the ids and the mask that transformers' modules are given, and the ids that came before with a cache; the
  tokens that stand for a picture; of cross attention the sequence that another module worked on before.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..layout import Layout, Part
from ..maps import AttentionMap, Factors, Keys
from ..words import readable
from . import places
from .modules import ModuleCall, argument_names, arguments_of, inputs_of
from .patches import Picture, Pictures, cut_in_windows, on_the_way, patches_given

_IDS = ("decoder_input_ids", "input_ids")


class _Prompt(NamedTuple):
    """A text that a model was given."""

    rows: list[list[int]]
    """The ids of each, once for all of its beams."""
    about_pictures: dict[str, Any]
    """What was said about its pictures, by the names of the arguments."""


@dataclass
class _History:
    """The ids that a module was given, with those of the calls before whose keys are in its cache."""

    current: weakref.ref[Tensor]
    rows: list[list[int]] | None
    """For each text; None where the ids of earlier tokens are not known."""
    keys: dict[str, tuple[int, weakref.ref[Keys] | None]]
    """By the path of a module that attended, how many keys its map had, and these: they grow in place as long as they
    are those of the same texts. None where weights were kept."""
    prompt: _Prompt
    """Of the first of these calls."""


class _Lists:
    """The numbers of tensors as lists: all layers of a model are given the same few tensors, and of a GPU each list
    waits for it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, list[list[int]]]] = {}

    def of(self, tensor: Tensor) -> list[list[int]]:
        """The numbers of a tensor of two axes."""
        known = self._known.get(id(tensor))
        # Changes in place are counted; in inference mode they are not.
        version = -1 if tensor.is_inference() else getattr(tensor, "_version", -1)
        if known is None or known[0]() is not tensor or known[1] != version or version < 0:
            if len(self._known) > 8:
                self._known.clear()
            known = self._known[id(tensor)] = weakref.ref(tensor), version, tensor.tolist()
        return known[2]


class _Texts:
    """The layout of texts, read once somebody asks: words are of no use to the model that runs.

    Args:
        read: makes the layout of each text.
        each: its arguments, for each of the texts.
        tokens: how many each of them has.
    """

    def __init__(self, read: Callable[..., Layout], each: Sequence[tuple[Any, ...]], tokens: int) -> None:
        self._read, self._each = read, each
        self.texts, self.count = len(each), tokens
        self._layout: Layout | None = None

    def __call__(self) -> Layout | None:
        if self._each:
            with suppress(Exception):  # of the tokenizer; or another thread has read them meanwhile
                self._layout = Layout.batch([self._read(*one, self.count) for one in self._each])
            self._each = ()
        return self._layout


_Told = Layout | _Texts | None


class Layouts(threading.local):
    """The layouts of a recording's maps, those of each thread one after the other.

    Args:
        tokenizer: one of transformers or of tokenizers; None: words stay unknown.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset[int](getattr(self._tokenizer, "all_special_ids", ()))
        self._pictures = Pictures()
        self._lists = _Lists()
        self._histories: dict[str, _History] = {}
        self._picture: Picture | None = None  # the last that was seen, for the tokens that stand for it in a text
        self._canvas: tuple[Callable[[], Tensor | None], places.Canvas | None] = (lambda: None), None
        self._generation: ModuleCall | None = None  # the call of `generate` that is under way, and what it was given
        # The last text, which all layers of a model have in common, and what was said about its pictures.
        self._last: tuple[Any, Any, _Told] = None, None, None
        # By the path of the module that tells them, in the order of their use.
        self._sequences: dict[str, Layout | _Texts] = {}

    def of(self, made: AttentionMap, calls: Sequence[ModuleCall]) -> tuple[_Told, _Told]:
        """The layouts of the keys and of the queries of a map, as far as the calls under way tell them."""
        try:
            layout = self._in_windows(made, calls)
            if layout is not None:
                return layout, layout
            self._generation = _generation()
            return self._read(made, calls)
        except Exception:  # modules have attributes and arguments of any kind under these names
            return None, None
        finally:
            self._generation = None  # which holds the model

    def _in_windows(self, made: AttentionMap, calls: Sequence[ModuleCall]) -> Layout | None:
        """The layout of a map of windows; None where it is none."""
        cut = cut_in_windows(made, calls)
        if cut is None:
            return None
        shape, windows = cut
        picture = next((one for call in reversed(calls) if (one := self._pictures.of(call)) is not None), None)
        picture = self._pictures.whole(calls[0]) if picture is None else picture
        size = patch = None
        if picture is not None:
            size, patch = picture.size, (picture.size[0] / shape[0], picture.size[1] / shape[1])
        patches = Part("patches", math.prod(shape), (), shape, patch, size)
        return Layout((patches,), windows, seen=() if picture is None else picture.seen)

    def _in_parts(self, made: AttentionMap, calls: Sequence[ModuleCall]) -> Layout | None:
        """The layout of a joint attention, the tokens of each input of its module; None where none is a picture."""
        batch, _, queries, keys = made.shape
        inputs = sorted((part.start, part.stop, name) for name, part in made.joined.items())
        if queries != keys or sum(stop - start for start, stop, _ in inputs) != keys:
            return None
        told: list[Layout] = []
        for start, stop, name in inputs:
            count, may_be = stop - start, () if places.is_text(name) else calls
            each = (self._patches_of(call, arguments_of(call), count, batch) for call in may_be)
            told.append(next(filter(None, each), Layout.text(count)))
        # Where a text without a name has as many tokens as the picture, which of the two is which is not known.
        return Layout.joined(told) if sum(one.patches is not None for one in told) == 1 else None

    def _patches_of(
        self,
        call: ModuleCall,
        arguments: dict[str, Any],
        tokens: int,
        batch: int,
        calls: Sequence[ModuleCall] = (),
    ) -> Layout | None:
        """The layout of that many tokens, where they are the patches of the picture that a call was given, or, by what
        these `calls` were given, those that were made of them on the way."""
        if "timestep" in arguments:  # it makes a picture of latents
            latents = next((one for _, one in inputs_of(call)), None)
            if latents is not None and self._canvas[0]() is not latents:  # a GPU would have to answer for each layer
                self._canvas = weakref.ref(latents), places.canvas_of(arguments)
            grid = None if latents is None or self._canvas[1] is None else self._canvas[1].grid(tokens)
            return None if grid is None else Layout.picture(grid)
        picture = self._pictures.of(call)
        if picture is None:
            return None
        told = picture.of(tokens, batch) or on_the_way(picture, calls, tokens)
        self._picture = picture if told is not None else self._picture
        return told

    def _read(self, made: AttentionMap, calls: Sequence[ModuleCall]) -> tuple[_Told, _Told]:
        batch, _, queries, keys = made.shape
        if made.kind == "joint":
            joint = self._in_parts(made, calls)
            return joint, joint
        is_self = made.kind != "cross"
        of_keys: _Told = None
        of_queries: _Told = None
        owner: str | None = None
        towers = [number for number, call in enumerate(calls) if _is_tower(call)]
        if towers:  # what it is within has the ids of a text
            calls = [call for number, call in enumerate(calls) if number >= towers[-1] or not _takes_ids(call)]
        elif self._generation is not None:
            calls = [self._generation, *calls]
        each = [(call, arguments_of(call)) for call in reversed(calls)]
        for needs_ids in (True, False):  # within a model for pictures and texts, only the outermost call has ids
            for call, arguments in each:
                if of_queries is None:
                    of_queries = self._told(call, arguments, calls, made, queries, needs_ids=needs_ids)
                    owner = owner if of_queries is None else call.path
                if of_keys is None and is_self:
                    of_keys = of_queries
                    if queries != keys:
                        of_keys = self._told(call, arguments, calls, made, keys, needs_ids=needs_ids)
                if of_queries is not None and (of_keys is not None or not is_self):
                    break
        if is_self:
            if of_keys is not None and owner is not None:
                self._sequences.pop(owner, None)
                self._sequences[owner] = of_keys
            return of_keys, of_queries
        others = [one for path, one in self._sequences.items() if path != owner]
        of_keys = next((one for one in reversed(others) if one.count == keys and _fits(one, batch)), None)
        for call, arguments in each:
            if of_keys is None:
                told = self._told(call, arguments, calls, made, keys, is_source=True)
                is_of_queries = call.path == owner and isinstance(told, Layout) and told.patches is not None
                of_keys = None if is_of_queries else told
        return of_keys, of_queries

    def _told(
        self,
        call: ModuleCall,
        arguments: dict[str, Any],
        calls: Sequence[ModuleCall],
        made: AttentionMap,
        tokens: int,
        *,
        is_source: bool = False,
        needs_ids: bool = False,
    ) -> _Told:
        """What one call tells about that many tokens; `is_source`: those that a decoder looks at."""
        told: _Told = None
        if any(_is_ids(arguments.get(name)) for name in _IDS) or (call.args and _is_ids(call.args[0])) or not needs_ids:
            told = self._text_of(call, arguments, made, tokens, is_source)
        if told is None and not _takes_ids(call):
            told = self._patches_of(call, arguments, tokens, made.shape[0], calls)
            told = told or patches_given(call, arguments, calls, self._pictures.prefix_of, tokens)
        return told if told is not None and _fits(told, made.shape[0]) else None

    def _text_of(
        self, call: ModuleCall, arguments: dict[str, Any], made: AttentionMap, tokens: int, is_source: bool
    ) -> _Told:
        """The words and the padding of a text that a call was given."""
        written = arguments.get("decoder_input_ids")
        mask = arguments.get("attention_mask") if is_source == _is_ids(written) else None
        if is_source:
            ids = arguments.get("input_ids") if _is_ids(written) else None
            mask = arguments.get("encoder_attention_mask", mask)
        else:
            given = (written, arguments.get("input_ids"), *call.args[:1])
            ids = next((one for one in given if _is_ids(one)), None)
            of_call = ids if ids is not None else next((one for _, one in inputs_of(call) if one.ndim == 3), mask)
            if isinstance(of_call, Tensor) and of_call.shape[1] not in (tokens, made.shape[2]):
                return None  # these are not the tokens of the call, but such as channels, or the queries of a former
        real = self._real(mask, made.shape[0], tokens)
        filled = None if made.kind == "cross" else _filled(arguments)
        if real is None and filled is not None:
            real = self._real_in_cache(arguments, filled, made, tokens)
        rows: Any = None
        prompt = None
        if ids is not None and _is_ids(ids):
            prompt = self._prompt(ids, arguments)
            if made.kind == "cross":
                rows = self._lists.of(ids)
            else:
                rows = self._ids(call.path, ids, made, tokens, filled, prompt)
                prompt = self._histories[call.path].prompt
            if rows is not None and len(rows[0]) < tokens and len(rows[0]) == filled:
                rows = [row + row[-1:] * (tokens - filled) for row in rows]  # room that is not filled, as `real` says
            rows = None if rows is None or len(rows[0]) < tokens else rows
        if made.kind == "cross":  # the tokens of a cache have no queries, and a head that pools has queries of its own
            rows = None if ids is not None and ids.shape[1] != tokens else rows
            real = None if ids is None and isinstance(mask, Tensor) and mask.shape[1] != tokens else real
        if rows is None and real is None:
            return None
        known = call.path, tokens, rows, real, self._picture
        if known != self._last[0] or prompt is not self._last[1]:  # two tensors cannot be compared as numbers are
            own: Any = itertools.repeat(None)
            shown: Any = itertools.repeat(None)
            has_pictures = False
            if rows is not None and prompt is not None:
                has_pictures = bool(prompt.about_pictures or places.image_ids(getattr(call.module, "config", None)))
                if has_pictures:
                    shown = (one[-tokens:] for one in self._pictures_in(call.module, rows, prompt))
            count = len(rows if rows is not None else real or ())
            if rows is not None and self._tokenizer is not None:
                own = (row[-tokens:] for row in rows)
            each = [*itertools.islice(zip(own, real or itertools.repeat(None), shown, strict=False), count)]
            texts = _Texts(self._text, each, tokens)
            self._last = known, prompt, texts() if has_pictures else texts
        return self._last[2]

    def _real(self, mask: Any, batch: int, tokens: int) -> list[list[int]] | None:
        """Of the last tokens of each text 1 where one is not padding, by a mask of 0 and 1; None where it is none."""
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            return None
        if mask.shape[0] == mask.shape[1] and not _is_ids(mask):  # it may say which token looks at which
            return None
        rows = self._lists.of(mask)
        if not all({*row} <= {0, 1} for row in rows):  # numbers that are added to scores
            return None
        return [row[-tokens:] for row in rows]

    def _real_in_cache(
        self, arguments: dict[str, Any], filled: int, made: AttentionMap, tokens: int
    ) -> list[list[int]] | None:
        """The same by a static cache and the position of each text's last token: the mask is then not one of tokens.

        Such a cache has room for more keys than there are, and padding before a text takes no position.
        """
        positions = arguments.get("position_ids")
        padding = [0] * made.shape[0]
        if arguments.get("attention_mask") is not None and _is_ids(positions) and len(positions) == made.shape[0]:
            padding = [max(0, filled - 1 - row[-1]) for row in self._lists.of(positions)]
        is_of_keys = tokens == made.shape[3]
        room = max(0, tokens - filled) if is_of_keys else 0
        if not room and not any(padding):
            return None
        rows = [[0] * count + [1] * (filled - count) + [0] * room for count in padding]
        return [row[-tokens:] for row in rows]

    def _prompt(self, ids: Tensor, arguments: dict[str, Any]) -> _Prompt:
        """The text that a call was given, and what goes with it, which `generate` may keep for itself."""
        rows, said = self._lists.of(ids), _about_pictures(arguments)
        if not said and self._generation is not None:
            whole = self._generation.kwargs["inputs"]
            if len(ids) % len(whole) == 0 and ids.shape[1] == whole.shape[1]:  # of which there are copies, for beams
                rows, said = self._lists.of(whole), _about_pictures(self._generation.kwargs)
        return _Prompt(rows, said)

    def _ids(
        self, path: str, ids: Tensor, made: AttentionMap, tokens: int, filled: int | None, prompt: _Prompt
    ) -> list[list[int]] | None:
        """The ids of the last `tokens` tokens of each text; None where those before this call are not known."""
        own, count, keys = self._lists.of(ids), ids.shape[1], made.shape[3]
        grown = made.source.keys if isinstance(made.source, Factors) else None
        history = self._histories.get(path)
        if history is None or history.current() is not ids:  # a new call, of which this is the first map
            rows = own if keys <= count or filled == count else None
            prompt = prompt if history is None or rows is not None else history.prompt
            if history is not None and history.rows is not None and rows is None:
                before, known = history.keys.get(made.path, (0, None))
                # The texts of a batch may change places, as the beams of a search do, and their keys with them.
                are_same = len(own) == len(history.rows) and (
                    len(own) == 1 or _go_on(known, grown, before if filled is None else min(before, filled - count))
                )
                if are_same and keys in (before + count, before):  # where only so many keys are kept, they stay so many
                    rows = [old + new for old, new in zip(history.rows, own, strict=True)]
            history = _History(weakref.ref(ids), rows, {} if history is None else history.keys, prompt)
            self._histories[path] = history
        history.keys[made.path] = keys, None if grown is None else weakref.ref(grown)
        return own if tokens == count else history.rows

    def _pictures_in(self, module: nn.Module, rows: list[list[int]], prompt: _Prompt) -> list[list[Any]]:
        """For each token of each text None for a word; else the picture that it stands for, by its number and the grid
        of its patches: () where these are not neighbouring tokens, None where the grid is not known."""
        config = getattr(module, "config", None)
        ids, copies = places.image_ids(config), max(1, len(rows) // len(prompt.rows))
        given = [row for row in prompt.rows for _ in range(copies)]
        shown: list[list[Any]] = [[(0, None) if one in ids else None for one in row] for row in given]
        pictures: list[list[places.Picture]] = []
        with suppress(ValueError, StopIteration):  # the tokens do not fit what was said about the pictures
            pictures = places.pictures_in(places.Prompt(prompt.rows, config, prompt.about_pictures, self._words))
        for row, own in zip(shown, (own for own in pictures for _ in range(copies)), strict=False):
            for number, picture in enumerate(own):
                for token in picture.tokens:
                    row[token] = number, () if picture.views else None
                for grid in filter(_is_in_line, picture.views[:1]):
                    for token in grid.flatten().tolist():
                        row[token] = number, tuple(grid.shape)
        return [before + [None] * (len(row) - len(before)) for row, before in zip(rows, shown, strict=True)]

    def _text(self, ids: list[int] | None, real: list[int] | None, shown: list[Any] | None, tokens: int) -> Layout:
        """The layout of one text; `shown`: the pictures that its tokens stand for, see `_pictures_in`."""
        words = [""] * tokens
        if ids is not None:
            words = readable([str(word) for word in self._words(ids)])

        def kind(place: int) -> Any:
            if real is not None and not real[place]:
                return "padding"
            if shown is not None and shown[place] is not None:
                return shown[place]
            return "special" if ids is not None and ids[place] in self._special else "text"

        parts: list[Part] = []
        for what, run in itertools.groupby(range(tokens), kind):
            places = list(run)
            names = tuple(words[place] for place in places)
            if isinstance(what, tuple):
                parts.append(self._stands_for_picture(len(places), what[1]))
            elif what == "padding" or not any(names):
                parts.append(Part("padding" if what == "padding" else "text", len(places)))
            else:
                parts.append(Part("special" if what == "special" else "text", len(places), names))
        return Layout(tuple(parts))

    def _words(self, ids: Sequence[int]) -> list[Any]:
        if self._tokenizer is None:
            return [""] * len(ids)
        if hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return list(self._tokenizer.convert_ids_to_tokens(ids))
        return [self._tokenizer.id_to_token(one) for one in ids]

    def _stands_for_picture(self, tokens: int, shape: tuple[int, ...] | None) -> Part:
        """The tokens of a text that stand for a picture: its patches, perhaps several of them in one token."""
        seen, size, patch = self._picture, None, None
        if shape is None and seen is not None:
            grids = (tuple(side // factor for side in seen.shape) for factor in range(1, 9))
            shape = next((grid for grid in grids if math.prod(grid) == tokens), ())
        if not shape or math.prod(shape) != tokens:  # of a layer with a window, a part of the picture
            return Part("special", tokens, ("<image>",) * tokens)
        if seen is not None and all(side % own == 0 for side, own in zip(seen.shape[-2:], shape[-2:], strict=True)):
            size, patch = seen.size, (seen.size[0] / shape[-2], seen.size[1] / shape[-1])
        return Part("patches", tokens, (), shape, patch, size)


def _is_in_line(grid: Tensor) -> bool:
    """Whether patches are neighbouring tokens, row by row."""
    flat = grid.flatten()
    return grid.ndim > 1 and torch.equal(flat, torch.arange(len(flat)) + flat[0])


def _go_on(known: weakref.ref[Keys] | None, grown: Keys | None, count: int) -> bool:
    """Whether the first keys of a call are all those of the call before; either may have one for several heads."""
    before = None if known is None else known()
    if before is None or grown is None or before is grown:
        return before is not None and grown is not None
    both = before.first(count), grown.first(count)
    heads = max(one.shape[1] for one in both)
    return torch.equal(*(one.repeat_interleave(heads // one.shape[1], 1) for one in both))


def _fits(told: Layout | _Texts, batch: int) -> bool:
    if isinstance(told, _Texts) and told.texts in (1, batch):
        return True
    layout = told() if isinstance(told, _Texts) else told
    return layout is not None and len(layout.samples) in (0, batch)


def _filled(arguments: dict[str, Any]) -> int | None:
    """How many tokens are in the static cache that a module was given, those of its own call too; None without one."""
    cache = next((one for one in arguments.values() if getattr(one, "is_compileable", False) is True), None)
    return None if cache is None else int(cache.get_seq_length())


def _is_ids(value: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.ndim == 2
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def _about_pictures(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in places.ABOUT_PICTURES if arguments.get(name) is not None}


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
            inputs = next((given[name] for name in ("input_ids", "inputs") if _is_ids(given.get(name))), None)
            if inputs is not None and isinstance(given.get("self"), nn.Module):
                now = given["now"] if _is_ids(given["now"]) else inputs
                kwargs = {"input_ids": now, "inputs": inputs, "attention_mask": given.get("attention_mask")}
                found = ModuleCall("generate", given["self"], (), kwargs | _about_pictures(given))
    return found


def _is_tower(call: ModuleCall) -> bool:
    """Whether a call is of the part of a model that sees a picture, and none of its texts."""
    has_pixels = "grid_thw" in arguments_of(call) or any(
        one.ndim > 3 and ("pixel" in name or one.shape[1] == 3) and not name.endswith(("mask", "bias"))
        for name, one in inputs_of(call)
    )
    return has_pixels and not _takes_ids(call)


def _takes_ids(call: ModuleCall) -> bool:
    """Whether a call is of a text, or of a text and a picture: the tokens within it need not be those of a picture."""
    return any(name in _IDS for name in argument_names(call.module)) or any(map(_is_ids, call.args))

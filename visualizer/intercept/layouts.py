"""Reads what the tokens of a map are off the model that runs: its own words for them, and what its call was given.

The calls under way are asked from the innermost outwards, and what fits the number of tokens is taken. Nothing is
guessed: where no call tells what the tokens are, the map has no layout.

- pictures and videos: the module that was given one, and its convolution whose stride is its kernel, as timm,
  transformers and torchvision cut patches. The names of its parameters tell the tokens before the patches;
- windows: the module that has `window_size` and was given a grid of patches;
- texts: the ids and the mask that transformers' modules are given, and the ids that came before with a cache; the
  tokens that stand for a picture; of cross attention the sequence that another module worked on before.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..images import THUMBNAIL, Thumbnail
from ..layout import Layout, Part, Windows, pair_of
from ..maps import AttentionMap, Factors, Keys
from ..words import readable
from . import places
from .modules import ModuleCall, argument_names, arguments_named, arguments_of, inputs_of, shapes_of

# The parameters that become tokens before the patches, in this order, as timm, transformers, torchvision and DINO's own
# code call them.
_PREFIXES = {
    "cls_token": "CLS",
    "class_token": "CLS",
    "class_embedding": "CLS",
    "dist_token": "DIST",
    "distillation_token": "DIST",
    "reg_token": "REG",
    "register_tokens": "REG",
    "storage_tokens": "REG",
}
_IDS = ("decoder_input_ids", "input_ids")


@dataclass(frozen=True)
class Picture:
    """A picture or video that a module was given, as its first convolution cuts it."""

    shape: tuple[int, ...]
    """(rows, columns) of patches, or (frames, rows, columns)."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    patch: tuple[float, float]
    """(height, width) of a patch in pixels."""
    prefix: tuple[str, ...]
    """What the tokens before the patches are called."""
    seen: tuple[Thumbnail, ...] = ()
    """A small copy of each picture of the batch."""

    def of(self, tokens: int, batch: int) -> Layout | None:
        """The layout of that many tokens; None where these are not the patches, with or without what precedes them."""
        prefix = _by_count(self.prefix)
        patches = Part("patches", math.prod(self.shape), (), self.shape, self.patch, self.size)
        names = prefix.get(tokens - patches.count)
        if names is None and len(self.shape) == 3:  # space and time apart, as TimeSformer has them
            frames, *sides = self.shape
            patches = replace(patches, count=math.prod(sides), shape=tuple(sides))
            if patches.count == tokens == frames:
                return None  # which of the two cannot be told
            names = prefix.get(tokens - patches.count) if batch % frames == 0 else None
            if names is None and tokens == frames and batch % patches.count == 0:
                return Layout((Part("text", frames, tuple(f"frame {number}" for number in range(frames))),))
        if names is None:
            return None
        return Layout((*([Part("special", len(names), names)] if names else []), patches), seen=self.seen)


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
        self._convolutions = weakref.WeakKeyDictionary[nn.Module, tuple[Any, tuple[str, ...]]]()
        self._lists = _Lists()
        self._histories: dict[str, _History] = {}
        # The pixels that were seen last, the convolution that cut them, and how.
        self._cut: tuple[Callable[[], Tensor | None], Any, Picture | None] = (lambda: None), None, None
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
        cut = _cut_in_windows(made, calls)
        if cut is None:
            return None
        shape, windows = cut
        picture = next((one for call in reversed(calls) if (one := self._picture_of(call)) is not None), None)
        picture = self._whole_picture(calls[0]) if picture is None else picture
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
        picture = self._picture_of(call)
        if picture is None:
            return None
        told = picture.of(tokens, batch) or _on_the_way(picture, calls, tokens)
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
            told = told or _patches_given(call, arguments, calls, lambda: self._known_of(call.module)[1], tokens)
        return told if told is not None and _fits(told, made.shape[0]) else None

    def _picture_of(self, call: ModuleCall) -> Picture | None:
        """The picture that a call was given; None where it was given none, or does not cut it into patches."""
        module = call.module
        known = self._convolutions.get(module)
        if known is not None and known[0] is None:
            return None
        for name, pixels in inputs_of(call):
            if pixels.ndim in (4, 5) and "mask" not in name:
                convolution, prefix = self._known_of(module)
                if convolution is None:
                    return None
                given, cutting, picture = self._cut
                if given() is pixels and cutting is convolution:  # as for all layers of a model
                    return picture
                sizes = _sides(pixels, convolution, name)
                if sizes is not None:
                    picture = replace(_cut(module, convolution, sizes, prefix), seen=_thumbnails(pixels))
                    self._cut = weakref.ref(pixels), convolution, picture
                    return picture
        return None

    def _whole_picture(self, call: ModuleCall) -> Picture | None:
        """The picture that a model was given whose first layers cut no patches; None where it was given none."""
        pixels = next((one for _, one in inputs_of(call) if one.ndim == 4 and one.shape[1] in (1, 3)), None)
        if pixels is not None and (self._cut[0]() is not pixels or self._cut[1] is not None):
            size = pixels.shape[2], pixels.shape[3]
            self._cut = weakref.ref(pixels), None, Picture((), size, (1.0, 1.0), (), _thumbnails(pixels))
        return None if pixels is None else self._cut[2]

    def _known_of(self, module: nn.Module) -> tuple[Any, tuple[str, ...]]:
        """The convolution of a module that cuts patches, and what the tokens before these are called."""
        known = self._convolutions.get(module)
        if known is None:
            known = self._convolutions[module] = _first_convolution(module), _prefix(module)
        return known

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


def _first_convolution(module: nn.Module) -> nn.Conv2d | nn.Conv3d | None:
    """The first convolution of a module, where it cuts its input into patches."""
    embeds: Any = getattr(module, "embeds", None)
    if getattr(embeds, "is_linear", False):  # of timm's NaFlex models: the same, as a product
        return nn.Conv2d(3, 1, embeds.patch_size, embeds.patch_size, device="meta")
    first = next((one for one in module.modules() if isinstance(one, (nn.Conv2d, nn.Conv3d))), None)
    if first is None or max(first.stride[-2:]) < 2 or tuple(first.kernel_size) != tuple(first.stride):
        return None
    return first


def _prefix(module: nn.Module) -> tuple[str, ...]:
    """What the tokens before the patches are called, by the names of the parameters that they are."""
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in _parameters_near(module):
        stem = _PREFIXES.get(name)
        if stem is not None:
            count = parameter.shape[-2] if parameter.ndim > 1 else 1
            found[name] = (stem,) if count == 1 else tuple(f"{stem}{number + 1}" for number in range(count))
    return tuple(itertools.chain(*(found[name] for name in _PREFIXES if name in found)))


def _parameters_near(module: nn.Module, depth: int = 2) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module and of those at most so many levels within it, but none of a row of layers."""
    yield from module.named_parameters(recurse=False)
    for name, inner in module.named_children():
        if depth and not name.isdigit():
            yield from _parameters_near(inner, depth - 1)


def _thumbnails(pixels: Tensor) -> tuple[Thumbnail, ...]:
    """A small copy of each picture, in shades of grey from 0 to 255; none of videos, or of pictures without shades."""
    if pixels.ndim != 4:
        return ()
    grey = nn.functional.adaptive_avg_pool2d(pixels.detach().float(), THUMBNAIL).mean(1).flatten(1).cpu()
    low, high = grey.amin(1, keepdim=True), grey.amax(1, keepdim=True)
    if not bool((high > low).all()):  # false for NaN
        return ()
    return tuple(map(tuple, ((grey - low) / (high - low) * 255).round().int().tolist()))


def _sides(pixels: Tensor, convolution: nn.Conv2d | nn.Conv3d, name: str) -> tuple[int, ...] | None:
    """(height, width) of what a convolution is given, or (frames, height, width); None where it is no picture."""
    channels, shape = convolution.in_channels, pixels.shape
    if pixels.ndim == 4:
        return tuple(shape[2:]) if shape[1] == channels and isinstance(convolution, nn.Conv2d) else None
    # transformers has the frames before the channels.
    is_frames_first = shape[2] == channels and (shape[1] != channels or name.startswith("pixel_values"))
    if is_frames_first:
        return shape[1], *shape[3:]
    return tuple(shape[2:]) if shape[1] == channels else None


def _cut(
    module: nn.Module, convolution: nn.Conv2d | nn.Conv3d, sides: tuple[int, ...], prefix: tuple[str, ...]
) -> Picture:
    """The picture of these sides as the module cuts it."""
    steps: list[int] = list(convolution.stride)
    if len(sides) > len(steps):
        steps = [1, *steps]  # each frame by itself
    grid_of = getattr(getattr(module, "patch_embed", None), "dynamic_feat_size", None)
    if grid_of is not None and len(sides) == 2:  # timm, which may pad
        shape = tuple(map(int, grid_of(sides)))
    else:
        shape = tuple(side // step for side, step in zip(sides, steps, strict=True))
    return Picture(shape, (sides[-2], sides[-1]), (float(steps[-2]), float(steps[-1])), prefix)


def _by_count(prefix: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """The names of the tokens before the patches, by how many there are: all, or the class token, or none."""
    return {len(names): names for names in (prefix[:1], prefix, ())}


def _patches_given(
    call: ModuleCall,
    arguments: dict[str, Any],
    calls: Sequence[ModuleCall],
    prefix_of: Callable[[], tuple[str, ...]],
    tokens: int,
) -> Layout | None:
    """The layout of patches that a module was given as a sequence, each picture with a grid and padding of its own.

    So do timm's NaFlex models and SigLIP 2. None where the module was given no such sequence.
    """
    grids, side = arguments.get("grid_thw"), getattr(call.module, "spatial_merge_size", None)
    if isinstance(grids, Tensor) and isinstance(side, int):
        ends = next(iter(arguments_named(calls, "cu_seqlens")), None)
        return _merging_next(call.module, grids.tolist(), side, ends, tokens)
    given = call.args[0] if call.args and isinstance(call.args[0], Mapping) else arguments
    coordinates, sizes = given.get("patch_coord"), given.get("spatial_shapes")
    patches = next((given[name] for name in ("patches", "pixel_values", "x") if name in given), None)
    if not isinstance(patches, Tensor) or patches.ndim != 3:
        return None
    prefix = prefix_of()
    if tokens - patches.shape[1] not in _by_count(prefix):
        return None
    if isinstance(coordinates, Tensor):
        sizes = coordinates.amax(1) + 1
    if not isinstance(sizes, Tensor) or sizes.shape != (len(patches), 2):
        return None
    names, side = _by_count(prefix)[tokens - patches.shape[1]], float(math.isqrt(patches.shape[2] // 3))
    samples = []
    for at, (rows, columns) in enumerate(sizes.tolist()):
        count = rows * columns
        if isinstance(coordinates, Tensor):
            places = coordinates[at, :count]
            if not torch.equal(places[:, 0] * columns + places[:, 1], torch.arange(count).to(places)):
                return None  # not row by row, as where patches were dropped
        size = int(rows * side), int(columns * side)
        parts = [Part("special", len(names), names)] if names else []
        parts.append(Part("patches", count, (), (rows, columns), (side, side), size))
        left = patches.shape[1] - count
        samples.append(Layout((*parts, Part("padding", left)) if left else tuple(parts)))
    return Layout.batch(samples)


def _merging_next(module: nn.Module, grids: list[list[int]], side: int, ends: Any, tokens: int) -> Layout | None:
    """The layout of patches that come in squares, which are merged later, as in the vision tower of Qwen2-VL.

    Where the module has windows besides, the squares of a window follow each other. A kernel is called for each picture
    or frame; or for all of them packed, whose tokens then have names only.

    Args:
        ends: where the tokens of each picture or frame end, as its layers are given it; of a layer that attends within
            windows those of each window, and which window a call has is not known.
    """
    each = [(rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    if not isinstance(ends, Tensor) or ends.diff().tolist() != [rows * columns for rows, columns in each]:
        return None
    window, pixels = (
        getattr(one, name, None) for one, name in ((module, "window_size"), (module.config, "patch_size"))
    )

    def order(shape: tuple[int, int]) -> list[int]:
        squares = Windows((side, side)).places(*shape)
        if isinstance(window, int) and isinstance(pixels, int):
            high = window // pixels // side
            windows = Windows((high, high)).places(*(size // side for size in shape))
            squares = squares[windows[windows >= 0]]
        return list(map(int, squares.ravel()))

    alike = {shape for shape in each if math.prod(shape) == tokens}
    if len(alike) == 1:
        [shape] = alike
        size = None if pixels is None else (shape[0] * pixels, shape[1] * pixels)
        windows = Windows(shape, order=tuple(order(shape)))
        return Layout.picture(shape, patch_size=pixels, image_size=size, windows=windows)
    if sum(map(math.prod, each)) != tokens:
        return None
    places = ((number, divmod(place, shape[1])) for number, shape in enumerate(each) for place in order(shape))
    names = tuple(f"picture {number}, patch {place}" for number, place in places)
    return Layout((Part("special", tokens, names),))


def _on_the_way(picture: Picture, calls: Sequence[ModuleCall], tokens: int) -> Layout | None:
    """The layout of tokens that are no longer the first patches, as where layers merge 2 x 2 of them.

    A module was given them, as a grid or as a sequence. A single token is no patch, but what pools them.
    """
    if tokens == 1:
        return None
    merged = [tuple(-(-side // 2**times) for side in picture.shape) for times in range(1, 6)]
    for shape in shapes_of(calls):
        grids: list[tuple[int, ...]] = []
        if len(shape) == 4:
            grids = [sides for sides in (shape[1:3], shape[2:4]) if math.prod(sides) == tokens]
        elif len(shape) == 3 and shape[1] == tokens:
            grids = [grid for grid in merged if math.prod(grid) == tokens]
        if len(set(grids)) == 1 and len(grids[0]) == 2:
            rows, columns = grids[0]
            patch = picture.size[0] / rows, picture.size[1] / columns
            return Layout((Part("patches", tokens, (), (rows, columns), patch, picture.size),), seen=picture.seen)
    return None


def _cut_in_windows(made: AttentionMap, calls: Sequence[ModuleCall]) -> tuple[tuple[int, int], Windows] | None:
    """(rows, columns) of the patches and the windows of a map, as Swin's layers and those like it cut them."""
    batch, _, queries, keys = made.shape
    if queries != keys:
        return None
    for call in reversed(calls):
        size = _window_size(call.module)
        if size is None:
            continue
        sides = pair_of("window_size", tuple(size) if isinstance(size, (list, tuple)) else size)
        if math.prod(sides) != keys:
            continue
        library = type(call.module).__module__.partition(".")[0]
        shift = getattr(call.module, "shift_size", 0)
        steps = [int(step) for step in (shift if isinstance(shift, (list, tuple)) else (shift, shift))]
        is_spread = getattr(call.module, "partition_type", None) == "grid" or not _is_block(call.module)
        for images, rows, columns in _grids_given(call):
            own = steps
            if library == "torchvision":
                own = [
                    0 if side >= size else step for step, side, size in zip(steps, sides, (rows, columns), strict=True)
                ]
            windows = Windows(sides, (own[0], own[1]), library != "timm", is_spread)
            is_filled = not is_spread or not (rows % sides[0] or columns % sides[1])
            if is_filled and batch == images * len(windows.places(rows, columns)):
                return (rows, columns), windows
    return None


def _window_size(module: nn.Module) -> Any:
    """The sides of the windows that a module cuts; None where it cuts none. MaxViT calls them partitions."""
    size = getattr(module, "window_size", getattr(module, "partition_size", None))
    if size is None and hasattr(module, "partition_type"):  # torchvision has the number of windows under either name
        size = module.g if module.partition_type == "grid" else module.p
    return size


def _is_block(module: nn.Module) -> bool:
    return bool(getattr(module, "partition_block", True))


def _grids_given(call: ModuleCall) -> list[tuple[int, int, int]]:
    """What may be (images, rows, columns) of the patches that a module was given, which has the width last, or second;
    or the sides beside it."""
    tensor = next((one for _, one in inputs_of(call)), None)
    if tensor is None:
        return []
    if tensor.ndim == 4:
        images, first, second, third = tensor.shape
        return [(images, first, second), (images, second, third)]
    sides = arguments_of(call).get("input_dimensions")
    return [(tensor.shape[0], int(sides[0]), int(sides[1]))] if sides is not None and tensor.ndim == 3 else []

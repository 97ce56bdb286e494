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
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Layout, Part
from ..maps import AttentionMap, Factors, Keys
from ..tensors import version_of
from ..words import readable
from . import places
from .given import Around, Given, about_pictures, is_ids
from .growing import Lists, Padding, Rows
from .modules import ModuleCall, inputs_of
from .patches import Picture, Pictures, cut_in_windows, on_the_way, patches_given


@dataclass(eq=False)
class _Prompt:
    """A text that a model was given."""

    rows: list[list[int]]
    """The ids of each, once for all of its beams."""
    about_pictures: dict[str, Any]
    """What was said about its pictures, by the names of the arguments."""
    has_pictures: bool
    shown: dict[int, list[list[Any]]] = field(default_factory=dict)
    """By the number of texts, beams among them, what `Layouts._pictures_in` found."""


@dataclass(eq=False)
class _History:
    """The ids that a module was given, with those of the calls before whose keys are in its cache."""

    current: weakref.ref[Tensor]
    version: int | None
    own: Rows
    """Of this call alone."""
    filled: int | None
    rows: Rows | None
    """None where the ids of earlier tokens are not known."""
    keys: dict[str, tuple[int, weakref.ref[Keys] | None]]
    """By the path of a module that attended, how many keys its map had, and these: they grow in place as long as they
    are those of the same texts. None where weights were kept."""
    prompt: _Prompt
    """Of the first of these calls."""

    def is_of(self, ids: Tensor, own: list[list[int]], filled: int | None, path: str, keys: int) -> bool:
        """Whether this is the history of a call with these ids, which may be written in place for the next one."""
        if self.current() is not ids or self.version != version_of(ids) or self.own.lists != own:
            return False
        if self.version is None:  # the next token may be the same
            return self.filled == filled and self.keys.get(path, (keys, None))[0] == keys
        return True


class _Texts:
    """The layout of texts, read once somebody asks: words are of no use to the model that runs.

    Args:
        read: makes the layout of each text.
        ids, real: of each text, see `Layouts._text_of`.
        shown: of each text the pictures that its first tokens stand for, see `Layouts._pictures_in`.
        picture: which the model was given.
        tokens: how many each of them has, the last of those.
    """

    __slots__ = ("_given", "_layout", "_read", "count", "has_pictures", "texts")

    def __init__(
        self,
        read: Callable[..., Layout],
        ids: Rows | None,
        real: Rows | None,
        shown: list[list[Any]] | None,
        picture: Picture | None,
        tokens: int,
    ) -> None:
        self._read, self.count, self.has_pictures = read, tokens, shown is not None
        self.texts = min([len(rows.lists) for rows in (ids, real) if rows is not None])
        self._given: tuple[Any, ...] | None = ids, real, shown, picture if shown is not None else None
        self._layout: Layout | None = None

    def __call__(self) -> Layout | None:
        given = self._given
        if given is not None:
            with suppress(Exception):  # of the tokenizer
                self._layout = Layout.batch([self._text(text, *given) for text in range(self.texts)])
            self._given = None
        return self._layout

    def _text(
        self, text: int, ids: Rows | None, real: Rows | None, shown: list[list[Any]] | None, picture: Picture | None
    ) -> Layout:
        own, is_token = (None if rows is None else rows.last(text, self.count) for rows in (ids, real))
        pictures = None
        if shown is not None and ids is not None:
            pictures = (shown[text] + [None] * (ids.end + ids.room - len(shown[text])))[-self.count :]
        return self._read(own, is_token, pictures, picture, self.count)


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
        self._lists, self._padding = Lists(), Padding()
        self._histories: dict[str, _History] = {}
        self._picture: Picture | None = None  # the last that was seen, for the tokens that stand for it in a text
        self._canvas: tuple[Callable[[], Tensor | None], places.Canvas | None] = (lambda: None), None
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
            if made.kind == "joint":
                joint = self._in_parts(made, calls)
                return joint, joint
            return self._read(Around(made, calls))
        except Exception:  # modules have attributes and arguments of any kind under these names
            return None, None

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
            each = (self._patches_of(Given(call), count, batch) for call in may_be)
            told.append(next(filter(None, each), Layout.text(count)))
        # Where a text without a name has as many tokens as the picture, which of the two is which is not known.
        return Layout.joined(told) if sum(one.patches is not None for one in told) == 1 else None

    def _patches_of(self, given: Given, tokens: int, batch: int, around: Around | None = None) -> Layout | None:
        """The layout of that many tokens, where they are the patches of the picture that a call was given, or, by what
        the calls `around` were given, those that were made of them on the way."""
        if "timestep" in given.arguments:  # it makes a picture of latents
            latents = next((one for _, one in inputs_of(given.call)), None)
            if latents is not None and self._canvas[0]() is not latents:  # a GPU would have to answer for each layer
                self._canvas = weakref.ref(latents), places.canvas_of(given.arguments)
            grid = None if latents is None or self._canvas[1] is None else self._canvas[1].grid(tokens)
            return None if grid is None else Layout.picture(grid)
        picture = self._pictures.of(given.call, given.pixels)
        if picture is None:
            return None
        told = picture.of(tokens, batch)
        if told is None:
            told = on_the_way(picture, () if around is None else around.calls(), tokens)
        self._picture = picture if told is not None else self._picture
        return told

    def _read(self, around: Around) -> tuple[_Told, _Told]:
        (batch, _, queries, keys), is_self = around.shape, not around.is_cross
        of_keys: _Told = None
        of_queries: _Told = None
        owner: str | None = None
        for needs_ids in (True, False):  # within a model for pictures and texts, only the outermost call has ids
            for given in around:
                if needs_ids and given.ids is None and not given.may_show:
                    continue  # like most
                if of_queries is None:
                    of_queries = self._told(given, around, queries, needs_ids=needs_ids)
                    owner = owner if of_queries is None else given.call.path
                if of_keys is None and is_self:
                    of_keys = of_queries
                    if queries != keys:
                        of_keys = self._told(given, around, keys, needs_ids=needs_ids)
                if of_queries is not None and (of_keys is not None or not is_self):
                    break
            else:
                continue
            break
        if is_self:
            if of_keys is not None and owner is not None:
                self._sequences.pop(owner, None)
                self._sequences[owner] = of_keys
            return of_keys, of_queries
        others = [one for path, one in self._sequences.items() if path != owner]
        of_keys = next((one for one in reversed(others) if one.count == keys and _fits(one, batch)), None)
        for given in around if of_keys is None else ():
            if of_keys is None:
                told = self._told(given, around, keys, is_source=True)
                of_keys = None if given.call.path == owner and _has_patches(told) else told
        return of_keys, of_queries

    def _told(
        self,
        given: Given,
        around: Around,
        tokens: int,
        *,
        is_source: bool = False,
        needs_ids: bool = False,
    ) -> _Told:
        """What one call tells about that many tokens; `is_source`: those that a decoder looks at."""
        told: _Told = None
        if given.ids is not None or not needs_ids:
            told = self._text_of(given, around, tokens, is_source)
        if told is None and not given.takes_ids and given.may_show:
            told = self._patches_of(given, tokens, around.shape[0], around)
            if told is None:
                prefix_of = self._pictures.prefix_of
                told = patches_given(given.call, given.arguments, around.calls, prefix_of, tokens)
        return told if told is not None and _fits(told, around.shape[0]) else None

    def _text_of(self, given: Given, around: Around, tokens: int, is_source: bool) -> _Told:
        """The words and the padding of a text that a call was given."""
        call, arguments, is_cross = given.call, given.arguments, around.is_cross
        mask = arguments.get("attention_mask") if is_source == (given.written is not None) else None
        ids = given.ids
        if is_source:
            ids = arguments.get("input_ids") if given.written is not None else None
            ids = ids if is_ids(ids) else None
            mask = arguments.get("encoder_attention_mask", mask)
        else:
            of_call = ids if ids is not None else next((one for _, one in inputs_of(call) if one.ndim == 3), mask)
            if isinstance(of_call, Tensor) and of_call.shape[1] not in (tokens, around.shape[2]):
                return None  # these are not the tokens of the call, but such as channels, or the queries of a former
        real = self._real(mask, around.shape[0], tokens, (call.path, is_source))
        filled = None if is_cross else given.filled
        if real is None and filled is not None:
            real = self._real_in_cache(arguments, filled, around.shape, tokens)
        rows: Rows | None = None
        prompt = None
        if ids is not None:
            if is_cross:
                rows, prompt = Rows(self._lists.of(ids), ids.shape[1]), self._prompt(ids, given, around)
            else:
                history = given.history = given.history or self._history(given, ids, around)
                rows, prompt = history.own if tokens == ids.shape[1] else history.rows, history.prompt
            if rows is not None and rows.end < tokens and rows.end == filled:
                rows = rows.with_room(tokens - filled)  # which is not filled, as `real` says
            rows = None if rows is None or rows.end + rows.room < tokens else rows
        if is_cross:  # the tokens of a cache have no queries, and a head that pools has queries of its own
            rows = None if ids is not None and ids.shape[1] != tokens else rows
            real = None if ids is None and isinstance(mask, Tensor) and mask.shape[1] != tokens else real
        if rows is None and real is None:
            return None
        known = tokens, call.path, rows, real, self._picture
        if known != self._last[0] or prompt is not self._last[1]:  # two tensors cannot be compared as numbers are
            shown = None
            if rows is not None and prompt is not None and prompt.has_pictures:
                shown = self._pictures_in(call.module, len(rows.lists), prompt)
            self._last = known, prompt, _Texts(self._text, rows, real, shown, self._picture, tokens)
        return self._last[2]

    def _real(self, mask: Any, batch: int, tokens: int, key: Any) -> Rows | None:
        """Of the last tokens of each text 1 where one is not padding, by a mask of 0 and 1; None where it is none."""
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            return None
        if mask.shape[0] == mask.shape[1] and not is_ids(mask):  # it may say which token looks at which
            return None
        return self._padding.of_mask(mask, key)

    def _real_in_cache(self, arguments: dict[str, Any], filled: int, shape: Sequence[int], tokens: int) -> Rows | None:
        """The same by a static cache and the position of each text's last token: the mask is then not one of tokens.

        Such a cache has room for more keys than there are, and padding before a text takes no position.
        """
        positions = arguments.get("position_ids")
        padding = [0] * shape[0]
        if arguments.get("attention_mask") is not None and is_ids(positions) and len(positions) == shape[0]:
            padding = [max(0, filled - 1 - row[-1]) for row in self._lists.of(positions)]
        is_of_keys = tokens == shape[3]
        room = max(0, tokens - filled) if is_of_keys else 0
        if not room and not any(padding):
            return None
        return self._padding.before(padding, filled).with_room(room)

    def _prompt(self, ids: Tensor, given: Given, around: Around) -> _Prompt:
        """The text that a call was given, and what goes with it, which `generate` may keep for itself."""
        rows, said = self._lists.of(ids), about_pictures(given.arguments)
        if not said and around.generation is not None:
            whole = around.generation.arguments["inputs"]
            if len(ids) % len(whole) == 0 and ids.shape[1] == whole.shape[1]:  # of which there are copies, for beams
                rows, said = self._lists.of(whole), about_pictures(around.generation.arguments)
        return _Prompt(rows, said, bool(said or places.image_ids(getattr(given.call.module, "config", None))))

    def _history(self, given: Given, ids: Tensor, around: Around) -> _History:
        """The ids that a call was given, and those before them, whose keys its map has too."""
        path, filled, made = given.call.path, given.filled, around.made
        own, count, keys = self._lists.of(ids), ids.shape[1], around.shape[3]
        grown = made.source.keys if isinstance(made.source, Factors) else None
        history = self._histories.get(path)
        if history is None or not history.is_of(ids, own, filled, made.path, keys):  # a new call: this is its first map
            new = Rows(own, count)
            rows = new if keys <= count or filled == count else None
            prompt = self._prompt(ids, given, around) if history is None or rows is not None else history.prompt
            if history is not None and history.rows is not None and rows is None:
                before, known = history.keys.get(made.path, (0, None))
                # The texts of a batch may change places, as the beams of a search do, and their keys with them.
                are_same = len(own) == len(history.rows.lists) and (
                    len(own) == 1 or _go_on(known, grown, before if filled is None else min(before, filled - count))
                )
                if are_same and keys in (before + count, before):  # where only so many keys are kept, they stay so many
                    rows = history.rows.and_then(own)
            counts = {} if history is None else history.keys
            history = _History(weakref.ref(ids), version_of(ids), new, filled, rows, counts, prompt)
            self._histories[path] = history
        history.keys[made.path] = keys, None if grown is None else weakref.ref(grown)
        return history

    def _pictures_in(self, module: nn.Module, texts: int, prompt: _Prompt) -> list[list[Any]]:
        """For each token of the prompt of so many texts None for a word; else the picture that it stands for, by its
        number and the grid of its patches: () where these are not neighbouring tokens, None where the grid is not
        known."""
        if texts in prompt.shown:
            return prompt.shown[texts]
        config = getattr(module, "config", None)
        ids, copies = places.image_ids(config), max(1, texts // len(prompt.rows))
        given = [row for row in prompt.rows for _ in range(copies)]
        if len(given) != texts:
            raise ValueError(f"{texts} texts are no copies of {len(prompt.rows)}")
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
        prompt.shown[texts] = shown
        return shown

    def _text(
        self,
        ids: list[int] | None,
        real: Sequence[int] | None,
        shown: list[Any] | None,
        seen: Picture | None,
        tokens: int,
    ) -> Layout:
        """The layout of one text, whose model has seen a picture; `shown`: see `_pictures_in`."""
        words = [""] * tokens
        if ids is not None and self._tokenizer is not None:
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
                parts.append(_stands_for_picture(seen, len(places), what[1]))
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


def _stands_for_picture(seen: Picture | None, tokens: int, shape: tuple[int, ...] | None) -> Part:
    """The tokens of a text that stand for a picture: its patches, perhaps several of them in one token."""
    size = patch = None
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


def _has_patches(told: _Told) -> bool:
    layout = told() if isinstance(told, _Texts) and told.has_pictures else told
    return isinstance(layout, Layout) and layout.patches is not None

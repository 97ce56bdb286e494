"""Which weights of a map lie between the words of a text and the patches of a picture, as a model runs.

`Denoiser` answers that for what makes pictures of words, `Reader` for what makes words of pictures. Both answer with
`Look`s, and nobody else asks which of the two it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..intercept import AttentionCall
from ..intercept.places import (
    Canvas,
    Picture,
    Prompt,
    canvas_of,
    ids_of_prompt,
    patches_of_former,
    pictures_in,
    queries_of_former,
    reads_pictures,
    words_start,
)
from ..maps import AttentionMap
from ..words import Text
from .pipelines import Pipeline, rows_of, tensors_of_text


class Whose(NamedTuple):
    """A text of a batch."""

    sample: int
    """Of which picture, or the row of the batch."""
    is_negative: bool = False
    """Whether it is the negative prompt of a guidance."""


FORMER = -1
"""The view of a query former: its queries stand in place of the words."""


class Look(NamedTuple):
    """Which weights of a map are those between the words of one text and the patches of one picture."""

    row: int
    """Of the batch of the map."""
    whose: Whose
    picture: int
    view: int
    """Which of several grids of the picture."""
    words: tuple[int, ...]
    """The words along their axis of the map."""
    tokens: tuple[int, ...]
    """The same as numbers of the text's tokens."""
    patches: Tensor
    """The grid of patches, as numbers along the other axis."""
    are_queries: bool
    """Whether the words are the queries; else the patches are."""


class Plan:
    """What is kept of maps whose words and patches lie alike, as those of all layers do, and of all steps of a picture.

    Args:
        looks: the weights that are wanted.
        device: that of the maps.
    """

    def __init__(self, looks: Sequence[Look], device: torch.device) -> None:
        self.looks = looks
        words = sorted({word for look in looks for word in look.words})
        patches = sorted({patch for look in looks for patch in look.patches.flatten().tolist()})
        self._words, self._patches = words, _as_slice(patches, device)
        self._parts: list[slice | Tensor] = []
        self._word_places, self._patch_places = ({one: n for n, one in enumerate(each)} for each in (words, patches))

    def weights(self, made: AttentionMap, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """The weights of all words and patches, (batch, heads, words, patches).

        `reduce` makes of (batch, heads, ...) what is kept of the heads. Rows are computed some at a time: no more than
        some rows of the map exist at once.
        """
        if not self.looks[0].are_queries:
            return reduce(made.columns(torch.tensor(self._words, device=made.device))).mT[..., self._patches]
        if not self._parts:
            size = max(1, _ROWS // max(1, made.shape[0] * made.shape[1] * made.shape[3]))
            groups = (self._words[start : start + size] for start in range(0, len(self._words), size))
            self._parts = [_as_slice(group, made.device) for group in groups]
        parts = [reduce(made.source.rows(part)[..., self._patches]) for part in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def of(self, look: Look, weights: Tensor) -> Tensor:
        """Of all weights those of a look, (heads, words, *grid)."""
        words = [self._word_places[word] for word in look.words]
        patches = [self._patch_places[patch] for patch in look.patches.flatten().tolist()]
        chosen = weights[look.row][:, words][..., patches]
        return chosen.reshape(len(chosen), len(words), *look.patches.shape)


_ROWS = 2**21  # numbers of rows that are computed at a time


def _as_slice(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """What chooses these ascending numbers, as a slice where that is one: nothing is copied then."""
    whole = slice(numbers[0], numbers[-1] + 1) if numbers else slice(0)
    return whole if len(numbers) == whole.stop - (whole.start or 0) else torch.tensor(numbers, device=device)


Watched = tuple[nn.Module, Callable[[dict[str, Any]], int | None]]


class Source(Protocol):
    """What knows the words and pictures of the call under way."""

    watched: list[Watched]
    """The modules of whose calls it takes note, and what takes note of their arguments. That returns from which token
    on what was seen of the texts is void: 0 for new texts; None: nothing is."""
    needs_columns: bool
    """Whether patches look at words, so that the columns of words are wanted."""
    missing: str
    """Why there may be nothing of a token, in words."""
    unread: str
    """Of which words nothing is known, and the way out, in words; "": of none."""

    def generates(self, arguments: dict[str, Any]) -> int | None:
        """Take note of what `generate` is given; returns the same."""

    def wrote(self, made: Any) -> int | None:
        """Take note of what `generate` returns; returns the same."""

    def asks_for(self, call: AttentionCall) -> Literal["layer", "former"] | None:
        """Whether an attention call may be between words and patches, or is of the query former of a picture."""

    def plan(self, made: AttentionMap) -> Plan:
        """What is kept of a map: its weights between words and patches."""

    def texts(self, whose: Whose) -> list[Text]:
        """A text, once for each tokenizer; none where its words are not known."""

    def pictures(self, whose: Whose) -> list[Picture] | None:
        """The pictures that a text has; None where it has the one that is made."""


class Denoiser:
    """A model that makes a picture of a text, step by step.

    Args:
        denoiser: the transformer or UNet.
        pipeline: what it belongs to; None: it is called on its own.
        tokens: the words of its text; None: those that the pipeline's text encoders are given.
        are_queries: whether the words' rows are wanted, where text and picture look at each other; else those of the
            patches.
    """

    def __init__(
        self, denoiser: nn.Module, pipeline: Pipeline | None, tokens: Sequence[str] | None, are_queries: bool
    ) -> None:
        self._pipeline, self._tokens, self._are_queries = pipeline, tokens, are_queries
        self._prompts: list[Any] = []
        self._canvas: Canvas | None = None
        self._counts: list[int] = []  # of the text tokens of each tensor, and of all together
        self._lengths: list[list[int]] = []  # of each text without its padding, by each mask
        self._rows: list[Whose] = []
        self._is_text_first = True
        self._texts: dict[Whose, list[Text]] = {}
        self._plans: dict[Any, Plan] = {}
        self.watched: list[Watched] = [(denoiser, self._begin)]
        self.needs_columns = True
        self.missing, self.unread = "the layers see no such tokens", ""

    def generates(self, arguments: dict[str, Any]) -> None:
        """Nothing: it writes no text."""

    def wrote(self, made: Any) -> None:
        """Nothing."""

    def _begin(self, arguments: dict[str, Any]) -> int | None:
        """Take note of a step."""
        self._canvas = canvas_of(arguments)
        given = [tensor for _, tensor in tensors_of_text(arguments)]
        counts = [tensor.shape[1] for tensor in given]
        self._counts = list(dict.fromkeys([*counts, sum(counts)]))
        masks = [one for name, one in arguments.items() if "mask" in name and isinstance(one, Tensor) and one.ndim == 2]
        self._lengths = [(mask > 0).sum(1).tolist() for mask in masks if mask.shape[1] in counts]
        batch = len(given[0]) if given else 0
        self._rows = [Whose(row) for row in range(batch)]
        if self._pipeline is None:
            return None
        prompts = self._pipeline.take_prompts()
        is_new, self._prompts = prompts is not self._prompts, prompts
        if is_new:
            self._texts, self._plans = {}, {}
        known = next((rows for tensor in given if (rows := rows_of(tensor, prompts)) is not None), None)
        if known is not None:
            self._rows = [Whose(sample, is_negative) for is_negative, sample in known]
        return 0 if is_new else None

    def asks_for(self, call: AttentionCall) -> Literal["layer"] | None:
        """Whether an attention call may be between words and patches, by its numbers of tokens."""
        queries, keys = call.sizes
        place = self._place(queries, keys, call.origin.kind, call.origin.joined)
        return None if place is None else "layer"

    def plan(self, made: AttentionMap) -> Plan:
        """What is kept of a map: its weights between words and patches."""
        batch, _, queries, keys = made.shape
        place = self._place(queries, keys, made.kind, made.joined)
        alike = batch, queries, keys, made.kind, place, *self._rows, *map(tuple, self._lengths)
        if alike not in self._plans:
            self._plans[alike] = Plan(self._looks(made, place), made.device)
        return self._plans[alike]

    def _looks(self, made: AttentionMap, place: tuple[int, int, int, tuple[int, ...]] | None) -> list[Look]:
        batch, _, queries, keys = made.shape
        if place is None or batch != len(self._rows):
            return []
        text, start, pixels, grid = place
        count = queries if made.kind == "cross" or queries != keys else keys - text
        found = []
        for row, whose in enumerate(self._rows):
            lengths = next((one for one in self._lengths if max(one) == text), None) if start == 0 < pixels else None
            own = text if lengths is None else lengths[row]  # the picture stands right behind the words of each row
            first = own if lengths is not None else pixels
            numbers = self._numbers(whose, text, own)
            patches = torch.arange(first, first + count).view(grid)
            words = tuple(start + number for number in numbers)
            if words:
                found.append(Look(row, whose, 0, 0, words, numbers, patches, self._are_queries and queries == keys))
        return found

    def texts(self, whose: Whose) -> list[Text]:
        """The prompt, or the negative one, for each text encoder that the layers see."""
        return self._texts.get(whose, [])

    def pictures(self, whose: Whose) -> None:
        """None: it has the one that is made."""

    def _place(
        self, queries: int, keys: int, kind: str | None, joined: dict[str, slice]
    ) -> tuple[int, int, int, tuple[int, ...]] | None:
        """How many text tokens a map has, where they begin, where the picture does, and its grid."""
        if self._canvas is None or kind == "window":
            return None
        if queries != keys or kind == "cross":
            grid = self._canvas.grid(queries)
            return None if grid is None or keys not in self._counts else (keys, 0, 0, grid)
        if not joined and self._canvas.grid(keys) is not None:  # the picture looks at itself
            return None
        for text in [*self._counts, *(max(lengths) for lengths in self._lengths)]:
            grid = self._canvas.grid(keys - text) if 0 < text < keys else None
            start = None if grid is None else words_start(joined, keys, keys - text, text, self._is_text_first)
            if grid is not None and start is not None:
                self._is_text_first = start == 0
                return text, start, text if start == 0 else 0, grid
        return None

    def _numbers(self, whose: Whose, text: int, own: int) -> tuple[int, ...]:
        """The numbers of the tokens that are words, of that many text tokens."""
        if self._tokens is not None:
            self._texts[whose] = [Text(tuple(self._tokens))]
            return tuple(range(min(text, len(self._tokens))))
        if self._pipeline is None:
            return tuple(range(own))
        if whose not in self._texts:
            counts = [text] if text in self._counts else [count for count in self._counts if count > text]
            tried = (self._pipeline.texts(self._prompts, whose.is_negative, whose.sample, count) for count in counts)
            found = next((one for one in tried if one is not None), None)
            if found is None:
                return tuple(range(own))
            self._texts[whose] = found
        places = [text.start + number for text in self._texts[whose] for number in range(len(text.tokens))]
        return tuple(place for place in places if place < own)


_MISSING = (
    "the model is never given the last word that it writes, layers with a window no longer see a picture behind it, "
    "and patches are no words"
)
_APART = "; layers of the encoder have the words of the prompt, those of the decoder what is written"
_BEAMS = (
    "what a beam search writes is not recorded, for its beams change places: to have it, call the model itself once "
    "with the ids that generate returned and the pictures"
)


class Reader:
    """A model that reads a text with pictures in it, and goes on writing.

    Its tokens are numbered from the first of the prompt to the last that was written, whether one stack of layers has
    all of them or an encoder has the prompt and a decoder what is written. A part of it may write in its place, and be
    given the prompt without ids: then the model's own call has them.

    Args:
        model: of transformers, with a decoder of text.
        tokenizer: makes words of its ids; None: words are their ids.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._config, self._tokenizer = getattr(model, "config", None), tokenizer
        inner = (one for one in model.modules() if one is not model and hasattr(one, "generate"))
        writer = next(inner, model)
        self._has_encoder = bool(getattr(getattr(writer, "config", None), "is_encoder_decoder", False))
        paths = {module: path for path, module in model.named_modules()}
        self._decoder, self._encoder = (paths.get(_part(writer, name), "") for name in ("decoder", "encoder"))
        self._former = queries_of_former(self._config)
        self._rows: list[list[int]] = []  # of the prompt, and of what was written behind it
        self._is_real: list[list[bool]] = []
        self._pictures: list[list[Picture]] = []
        self._given: dict[str, Any] = {}  # the texts' arguments
        self._prompt = self._seen = self._new = 0  # how many tokens
        self._is_noted = self._is_beam_search = False
        self._plans: dict[Any, Plan] = {}  # of the tokens that are given now
        self.needs_columns, self.unread = False, ""
        self.missing = _MISSING + _APART * self._has_encoder
        self.watched: list[Watched] = [(writer, self._begin), *([] if writer is model else [(model, self._note)])]

    def generates(self, arguments: dict[str, Any]) -> int:
        """Take note of what `generate` is given: it may look at the pictures before it calls the model."""
        config = arguments.get("generation_config", getattr(self.watched[0][0], "generation_config", None))
        beams, several = (
            arguments.get(name, getattr(config, name, None)) or 1 for name in ("num_beams", "num_return_sequences")
        )
        self._note(arguments, max(beams, several))
        self._is_beam_search = beams > 1
        self.unread = _BEAMS * self._is_beam_search
        self.missing = self.unread or _MISSING + _APART * self._has_encoder
        return 0

    def _note(self, arguments: dict[str, Any], copies: int = 1) -> int:
        """Take note of a prompt, before the part that writes is given it."""
        self._start(arguments, ids_of_prompt(self._config, arguments), copies)
        self._is_noted = True
        return 0

    def _start(self, arguments: dict[str, Any], rows: list[list[int]] | None, copies: int = 1) -> None:
        """Begin with new texts, each of them some times."""
        self._given, self._is_beam_search, self._plans = arguments, False, {}
        rows, mask = rows or [], arguments.get("attention_mask")
        self._is_real = [[True] * len(row) for row in rows]
        if isinstance(mask, Tensor) and rows and mask.shape == (len(rows), len(rows[0])):
            self._is_real = (mask > 0).tolist()
        pictures = pictures_in(Prompt(rows, self._config, arguments, self._words))
        self._pictures = [one for one in pictures for _ in range(copies)]
        self._rows, self._is_real = ([[*one] for one in each for _ in range(copies)] for each in (rows, self._is_real))
        self._prompt = len(rows[0]) if rows else 0

    def _begin(self, arguments: dict[str, Any]) -> int | None:
        """Take note of a call of the part that writes: the prompt, or tokens that were written since."""
        given = arguments.get("decoder_input_ids" if self._has_encoder else "input_ids")
        ids = given.tolist() if isinstance(given, Tensor) else None
        tokens = given if ids is not None or self._has_encoder else arguments.get("inputs_embeds")
        batch, self._new = tokens.shape[:2] if isinstance(tokens, Tensor) else (0, 0)
        seen, void, self._plans = _length_of(arguments), None, {}
        is_first, self._is_noted = self._is_noted and batch == len(self._rows), False
        if not is_first and not self._goes_on(arguments, ids, seen):
            is_first, void = True, 0
            arguments = {**self._given, "attention_mask": None, **arguments}
            own = ids_of_prompt(self._config, arguments)
            self._start(arguments, own, max(1, batch // len(own)) if own else 1)
        if not self._rows or (self._is_beam_search and not is_first):
            self._new = 0
            return void
        length = len(self._rows[0])
        if seen is None:
            self._seen = length - self._new if is_first and not self._has_encoder else length
        else:
            self._seen = seen + (self._prompt if self._has_encoder else 0)
        is_known = 0 <= self._seen <= length
        behind = self._seen + self._new
        if not is_known or (ids is None and behind > length):
            return self._forget()
        if ids is None or (is_first and not self._has_encoder and behind <= length):  # the prompt, or a part of it
            return void
        if self._seen < length and void is None and not is_first:  # tokens were taken back
            void = self._seen
        for row, is_real, more in zip(self._rows, self._is_real, ids, strict=True):
            row[self._seen :] = more
            is_real[length if is_first else self._seen :] = [True] * (behind - (length if is_first else self._seen))
        return void

    def wrote(self, made: Any) -> int | None:
        """Take note of what `generate` returns: words that were only proposed are no words of the text."""
        ids = getattr(made, "sequences", made)
        if not isinstance(ids, Tensor) or len(ids) != len(self._rows) or self._is_beam_search:
            return None
        common = len(self._rows[0])
        for row, own in zip(self._rows, ids.tolist(), strict=True):
            whole = own if own[: self._prompt] == row[: self._prompt] else row[: self._prompt] + own
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(row, whole, strict=False))
            common = min(common, sum(1 for _ in same))
        if not self._prompt <= common < len(self._rows[0]):
            return None
        for row, is_real in zip(self._rows, self._is_real, strict=True):
            del row[common:], is_real[common:]
        return common

    def _goes_on(self, arguments: dict[str, Any], ids: list[list[int]] | None, seen: int | None) -> bool:
        """Whether a call goes on with the texts that are known."""
        if ids is None or not ids or len(ids) != len(self._rows):
            return False
        if self._has_encoder:
            return arguments.get("encoder_outputs") is not None
        has_pixels = any(name.startswith("pixel_values") and one is not None for name, one in arguments.items())
        return not has_pixels and (len(ids[0]) < len(self._rows[0]) if seen is None else seen > 0)

    def _forget(self) -> int:
        """Know nothing of the texts, which are not those that were noted."""
        self._start({}, None)
        self._new = 0
        return 0

    def _places(self, path: str, kind: str | None, queries: int, keys: int) -> tuple[int, int] | None:
        """The numbers of the first query and the first key of a map; None where it has no words and patches."""
        if not any(self._pictures):
            return None
        if self._has_encoder and _is_in(path, self._encoder):
            return (0, 0) if queries == keys == self._prompt else None
        if not _is_in(path, self._decoder) or queries != self._new:
            return None
        if self._has_encoder:
            return (self._seen, 0) if kind == "cross" and keys == self._prompt else None
        # A layer with a window keeps the last keys only; a static cache has more than there are yet.
        return None if kind == "cross" else (self._seen, max(0, self._seen + self._new - keys))

    def asks_for(self, call: AttentionCall) -> Literal["layer", "former"] | None:
        """Whether an attention call is between words and patches, or of the query former of a picture."""
        queries, keys = call.sizes
        if self._places(call.path, call.origin.kind, queries, keys) is not None:
            return "layer"
        is_former = queries == self._former > 0 and keys > queries and not _is_in(call.path, self._decoder)
        return "former" if is_former and self._patches_of_former(keys) is not None else None

    def _patches_of_former(self, keys: int) -> Tensor | None:
        return patches_of_former(self._config, self._given, keys)

    def plan(self, made: AttentionMap) -> Plan:
        """What is kept of a map: its weights between the words that are given now and the patches before them."""
        batch, _, queries, keys = made.shape
        place = self._places(made.path, made.kind, queries, keys)
        if (alike := (place, batch, queries, keys)) not in self._plans:
            self._plans[alike] = Plan(self._looks(place, batch, queries, keys), made.device)
        return self._plans[alike]

    def _looks(self, place: tuple[int, int] | None, batch: int, queries: int, keys: int) -> list[Look]:
        if len(self._rows) % batch:
            return []
        times = len(self._rows) // batch  # the text of a row stands in so many rows behind the encoder
        if place is None:
            grid, numbers = self._patches_of_former(keys), tuple(range(queries))
            if grid is None:
                return []
            rows = range(len(self._rows))
            return [Look(row // times, Whose(row), 0, FORMER, numbers, numbers, grid, True) for row in rows]
        found, (seen, gone) = [], place
        for row, (is_real, pictures) in enumerate(zip(self._is_real, self._pictures, strict=True)):
            of_pictures = {token for picture in pictures for token in picture.tokens}
            words = tuple(token for token in range(seen, seen + queries) if is_real[token] and token not in of_pictures)
            local = tuple(word - seen for word in words)
            for number, picture in enumerate(pictures):
                for view, patches in enumerate(picture.views):
                    if words and int(patches.min()) >= gone:
                        patches = patches - gone if gone else patches
                        found.append(Look(row // times, Whose(row), number, view, local, words, patches, True))
        return found

    def texts(self, whose: Whose) -> list[Text]:
        """The prompt and what was written, without the tokens that stand for pictures."""
        if whose.is_negative or not 0 <= whose.sample < len(self._rows):
            return []
        text = Text.of(self._rows[whose.sample], self._tokenizer)
        of_pictures = {token for picture in self._pictures[whose.sample] for token in picture.tokens}
        tokens = ("<image>" if place in of_pictures else token for place, token in enumerate(text.tokens))
        return [replace(text, tokens=tuple(tokens))]

    def pictures(self, whose: Whose) -> list[Picture]:
        """The pictures of the prompt."""
        is_there = not whose.is_negative and 0 <= whose.sample < len(self._pictures)
        return self._pictures[whose.sample] if is_there else []

    def _words(self, ids: Sequence[int]) -> Sequence[str]:
        return Text.of(ids, self._tokenizer).tokens


def _part(model: nn.Module, name: str) -> nn.Module:
    """The encoder or decoder of a model of transformers; itself where it has none."""
    part: nn.Module = getattr(model, f"get_{name}", lambda: model)()
    return part


def _is_in(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")


def _length_of(arguments: dict[str, Any]) -> int | None:
    """How many tokens the cache of a call has; 0 where there is none; None where that is not known."""
    cache = arguments.get("cache", arguments.get("past_key_values"))
    length = 0 if cache is None else getattr(cache, "get_seq_length", lambda: None)()
    return length if isinstance(length, int) else None


def source_of(
    model: Any, tokenizer: Any, tokens: Sequence[str] | None, are_queries: bool
) -> tuple[nn.Module, Source, Pipeline | None]:
    """The module to watch, what knows its words and pictures, and the pipeline around it.

    Raises TypeError or ValueError for a model that has no words, or no pictures.
    """
    if not isinstance(model, nn.Module):
        pipeline = Pipeline(model)
        return pipeline.denoiser, Denoiser(pipeline.denoiser, pipeline, tokens, are_queries), pipeline
    if reads_pictures(getattr(model, "config", None)):
        return model, Reader(model, tokenizer), None
    return model, Denoiser(model, None, tokens, are_queries), None

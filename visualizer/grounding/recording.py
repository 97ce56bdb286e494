"""Which weights of a map lie between the words of a text and the patches of a picture, as a model runs.

`Denoiser` answers that for what makes pictures of words, `Reader` for what makes words of pictures. Both answer with
`Look`s, and nobody else asks which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..intercept import AttentionCall
from ..maps import AttentionMap
from .pipelines import Pipeline, rows_of, tensors_of_text
from .places import Canvas, Picture, Prompt, canvas_of, image_ids, pictures_in, words_start
from .text import Text


class Whose(NamedTuple):
    """A text of a batch."""

    sample: int
    """Of which picture, or the row of the batch."""
    is_negative: bool = False
    """Whether it is the negative prompt of a guidance."""


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


class Source(Protocol):
    """What knows the words and pictures of the call under way."""

    def begin(self, arguments: dict[str, Any]) -> bool:
        """Take note of a call of the model; returns whether it begins anew, with another text."""

    def asks_for(self, call: AttentionCall) -> bool:
        """Whether an attention call may be between words and patches."""

    def looks(self, made: AttentionMap) -> list[Look]:
        """The weights of a map between words and patches."""

    def texts(self, whose: Whose) -> list[Text]:
        """A text, once for each tokenizer; none where its words are not known."""

    def pictures(self, whose: Whose) -> list[Picture] | None:
        """The pictures that a text has; None where it has the one that is made."""


class Denoiser:
    """A model that makes a picture of a text, step by step.

    Args:
        pipeline: what it belongs to; None: it is called on its own.
        tokens: the words of its text; None: those that the pipeline's text encoders are given.
        are_queries: whether the words' rows are wanted, where text and picture look at each other; else those of the
            patches.
    """

    def __init__(self, pipeline: Pipeline | None, tokens: Sequence[str] | None, are_queries: bool) -> None:
        self._pipeline, self._tokens, self._are_queries = pipeline, tokens, are_queries
        self._prompts: list[Any] = []
        self._canvas: Canvas | None = None
        self._counts: list[int] = []  # of the text tokens of each tensor, and of all together
        self._lengths: list[list[int]] = []  # of each text without its padding, by each mask
        self._rows: list[Whose] = []
        self._is_text_first = True
        self._texts: dict[Whose, list[Text]] = {}

    def begin(self, arguments: dict[str, Any]) -> bool:
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
            return False
        prompts = self._pipeline.take_prompts()
        is_new, self._prompts = prompts is not self._prompts, prompts
        if is_new:
            self._texts = {}
        known = next((rows for tensor in given if (rows := rows_of(tensor, prompts)) is not None), None)
        if known is not None:
            self._rows = [Whose(sample, is_negative) for is_negative, sample in known]
        return is_new

    def asks_for(self, call: AttentionCall) -> bool:
        """Whether an attention call may be between words and patches, by its numbers of tokens."""
        queries, keys = call.sizes
        return self._place(queries, keys, call.origin.kind, call.origin.joined) is not None

    def looks(self, made: AttentionMap) -> list[Look]:
        """The weights of a map between words and patches."""
        batch, _, queries, keys = made.shape
        place = self._place(queries, keys, made.kind, made.joined)
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


class Reader:
    """A model that reads a text with pictures in it, and goes on writing.

    Args:
        model: of transformers, with a decoder of text.
        tokenizer: makes words of its ids; None: words are their ids.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self._config, self._tokenizer = getattr(model, "config", None), tokenizer
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        self._decoder = next((path for path, module in model.named_modules() if module is decoder), "")
        self._rows: list[list[int]] = []
        self._is_real: list[list[bool]] = []
        self._pictures: list[list[Picture]] = []
        self._seen = self._new = 0
        self._prompt: dict[str, Any] | None = None
        self._beside: dict[str, Any] = {}

    def generates(self, arguments: dict[str, Any]) -> None:
        """Take note of what `generate` is given: it may look at the pictures before it calls the model."""
        self._prompt = arguments

    def begin(self, arguments: dict[str, Any]) -> bool:
        """Take note of the prompt, or of the tokens that were written since."""
        ids = arguments.get("input_ids")
        if not isinstance(ids, Tensor):
            self._new = 0
            return False
        rows, self._new = ids.tolist(), ids.shape[1]
        has_pixels = any(name.startswith("pixel_values") and one is not None for name, one in arguments.items())
        prompt, self._prompt = self._prompt, None
        if prompt is None and not has_pixels and len(rows) == len(self._rows) and self._new < len(self._rows[0]):
            self._seen = len(self._rows[0])
            for own, is_real, more in zip(self._rows, self._is_real, rows, strict=True):
                own += more
                is_real += [True] * len(more)
            return False
        self._seen, self._rows = 0, rows
        arguments = {**self._beside, **arguments} if prompt is None else {**prompt, **arguments}
        self._beside = arguments
        mask = arguments.get("attention_mask")
        self._is_real = [[True] * self._new for _ in rows]
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            self._is_real = (mask > 0).tolist()
        self._pictures = pictures_in(Prompt(rows, self._config, arguments, self._words))
        return True

    def asks_for(self, call: AttentionCall) -> bool:
        """Whether an attention call is one of the decoder's, of the tokens that it is given now."""
        is_own = not self._decoder or call.path == self._decoder or call.path.startswith(f"{self._decoder}.")
        return is_own and call.origin.kind != "cross" and call.sizes[0] == self._new > 0

    def looks(self, made: AttentionMap) -> list[Look]:
        """The weights of a map between the words that are given now and the patches before them."""
        batch, _, _, keys = made.shape
        if batch != len(self._rows):
            return []
        gone = max(0, self._seen + self._new - keys)  # a layer with a window keeps the last keys only
        found = []
        for row, (ids, is_real, pictures) in enumerate(zip(self._rows, self._is_real, self._pictures, strict=True)):
            of_pictures = {token for picture in pictures for token in picture.tokens}
            tokens = range(self._seen, self._seen + self._new)
            words = tuple(token for token in tokens if is_real[token] and token not in of_pictures)
            local = tuple(word - self._seen for word in words)
            for number, picture in enumerate(pictures):
                for view, patches in enumerate(picture.views):
                    if words and int(patches.min()) >= gone and len(ids):
                        found.append(Look(row, Whose(row), number, view, local, words, patches - gone, True))
        return found

    def texts(self, whose: Whose) -> list[Text]:
        """The prompt and what was written."""
        return [Text.of(self._rows[whose.sample], self._tokenizer)] if whose.sample < len(self._rows) else []

    def pictures(self, whose: Whose) -> list[Picture]:
        """The pictures of the prompt."""
        return self._pictures[whose.sample] if whose.sample < len(self._pictures) else []

    def _words(self, ids: Sequence[int]) -> Sequence[str]:
        return Text.of(ids, self._tokenizer).tokens


def source_of(
    model: Any, tokenizer: Any, tokens: Sequence[str] | None, are_queries: bool
) -> tuple[nn.Module, Source, Pipeline | None]:
    """The module to watch, what knows its words and pictures, and the pipeline around it.

    Raises TypeError or ValueError for a model that has no words, or no pictures.
    """
    if not isinstance(model, nn.Module):
        pipeline = Pipeline(model)
        return pipeline.denoiser, Denoiser(pipeline, tokens, are_queries), pipeline
    config = getattr(model, "config", None)
    if any(getattr(config, name, None) is not None for name in ("qformer_config", "latent_query_num")):
        raise ValueError(
            f"the tokens of a picture in {type(model).__name__} are those of a query former, which have no place on "
            "it: record attention(model), whose cross attention has what each of them looks at"
        )
    if image_ids(config):
        return model, Reader(model, tokenizer), None
    return model, Denoiser(None, tokens, are_queries), None


Reduce = Callable[[Tensor], Tensor]


def weights_between(made: AttentionMap, looks: Sequence[Look], reduce: Reduce) -> list[Tensor]:
    """For each look the weights between its words and its patches, (heads, words, *grid).

    `reduce` makes of (batch, heads, ...) what is kept of the heads. Rows are computed some at a time: no more than some
    rows of the map exist at once.
    """
    if not looks:
        return []
    words = sorted({word for look in looks for word in look.words})
    place = {word: number for number, word in enumerate(words)}
    index = torch.tensor(words, device=made.device)
    if looks[0].are_queries:
        keys = torch.zeros(made.shape[3], dtype=torch.bool)
        for look in looks:
            keys[look.patches.flatten()] = True
        kept = keys.nonzero().flatten()
        position = torch.zeros(len(keys), dtype=torch.long)
        position[kept] = torch.arange(len(kept))
        columns, size = kept.to(made.device), max(1, _ROWS // max(1, made.shape[0] * made.shape[1] * made.shape[3]))
        parts = [reduce(made.rows(part)[..., columns]) for part in torch.split(index, size)]
        whole = torch.cat(parts, 2)  # (batch, heads, words, kept patches)
        patches = [position[look.patches.flatten()].to(made.device) for look in looks]
    else:
        whole = reduce(made.columns(index)).mT  # (batch, heads, words, queries)
        patches = [look.patches.flatten().to(made.device) for look in looks]
    found = []
    for look, own in zip(looks, patches, strict=True):
        chosen = torch.tensor([place[word] for word in look.words], device=made.device)
        weights = whole[look.row][:, chosen][..., own]
        found.append(weights.reshape(len(weights), len(look.words), *look.patches.shape))
    return found


_ROWS = 2**21  # numbers of rows that are computed at a time

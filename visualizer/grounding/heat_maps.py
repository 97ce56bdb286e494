"""`word_maps(model)` and `WordMaps`: how much each word and each patch of a picture attend to each other."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..analysis.sinks import Sinks, check_sinks, sink_limit
from ..errors import few
from ..words import no_such_word
from .recording import Key, Recording, Sum
from .words_and_patches import Whose


def word_maps(
    model: Any,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    tokens: Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    heads: Literal["mean", "all"] = "mean",
    steps: Literal["sum", "all"] = "sum",
    queries: Literal["patches", "words"] = "patches",
) -> WordMaps:
    """How much each word and each patch of a picture attend to each other, added up as a model runs.

    >>> import torch
    >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    >>> from visualizer import word_maps
    >>> vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...                           image_size=12, patch_size=4)
    >>> text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    ...                    vocab_size=20)
    >>> config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=5, image_seq_length=9)
    >>> model = LlavaForConditionalGeneration(config).eval()
    >>> prompt = {"input_ids": torch.tensor([[1] + [5] * 9 + [7, 8]]), "pixel_values": torch.randn(1, 3, 12, 12)}
    >>> with torch.no_grad(), word_maps(model) as maps:
    ...     logits = model(**prompt)
    >>> maps["7"].shape                       # without a tokenizer words are ids
    torch.Size([3, 3])

    Of a model that reads pictures, such as LLaVA or Qwen2-VL, it has for each word, given or generated, the weights of
    its row on the patches of a picture. Of a pipeline of diffusers, or of its transformer or UNet, it has for each word
    of the prompt what the patches of the picture attend to it, the mean over all steps. Only these numbers are kept:
    no map, and of a `generate` no keys. The model's output does not change.

    Args:
        model: of transformers, with pictures in its prompt; a pipeline of diffusers; or the transformer or UNet of one.
        processor, tokenizer: the model's own, one of them, from which words are read. A pipeline has its own.
        tokens: the words of the text, where a transformer or UNet is called on its own.
        layers: which modules: a path, a pattern such as "*attn2", or several; None: all.
        heads: "all" keeps each head, so that `of` can choose one; "mean" keeps the mean, in so many times less memory.
        steps: "all" keeps each step of a pipeline; "sum" only their sum.
        queries: where text and picture look at each other, as in SD3 and FLUX: whether the rows of the patches or those
            of the words are wanted.

    Returns:
        The maps, recorded inside its `with` block, or from its `start()` to its `stop()`.

    Raises:
        TypeError: `model` is neither a module nor a pipeline, or a tokenizer is none.
        ValueError: a pipeline without words.
    """
    words = getattr(processor if tokenizer is None else tokenizer, "tokenizer", tokenizer)
    if words is None and processor is not None:
        words = processor
    if words is not None and not hasattr(words, "convert_ids_to_tokens"):
        raise TypeError(f"tokenizer is a {type(words).__name__}: pass one of transformers, or a processor that has one")
    for name, value, known in (
        ("heads", heads, ("mean", "all")),
        ("steps", steps, ("sum", "all")),
        ("queries", queries, ("patches", "words")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: pass one of {', '.join(map(repr, known))}")
    chosen = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    if any(not isinstance(layer, str) for layer in chosen or ()):
        raise TypeError(f"layers={layers!r}: pass paths or patterns of paths, such as '*attn2'")
    return WordMaps(Recording(model, words, tokens, chosen, heads == "all", steps == "all", queries == "words"))


class WordTable(NamedTuple):
    """All words of one text and their weights on each of its pictures; made by `WordMaps.table`."""

    layers: tuple[str, ...]
    """The paths of the layers."""
    words: tuple[str, ...]
    """The words' tokens, as texts; ids where the words are not known."""
    weights: tuple[Tensor, ...]
    """Of each picture (layers, heads, words, *grid), on the grid of the layer that sees it finest, the mean of all
    calls."""
    are_queries: bool
    """Whether words look at patches; else patches look at words."""


class WordMaps:
    """What words and patches attend to each other, by word; made by `word_maps`."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._source, self._title = recording, recording.source, recording.title

    def start(self) -> WordMaps:
        """Record from now on; for notebooks, where a `with` cannot span cells. Returns the maps themselves."""
        self._recording.start(is_block=False)
        return self

    def stop(self) -> None:
        """Record no more; what was recorded stays. Warns where not all could be recorded, and why."""
        self._recording.stop(None)

    def __enter__(self) -> WordMaps:
        self._recording.start(is_block=True)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self._recording.stop(error)

    def clear(self) -> None:
        """Drop what was recorded; recording goes on."""
        self._recording.clear()

    @property
    def sums(self) -> dict[Key, list[Sum]]:
        """What was added up, by text, picture, layer and grid of the picture."""
        return self._recording.sums

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the modules in which words and patches attend to each other, in the order of their calls."""
        return tuple(dict.fromkeys(key.path for key in self.sums))

    @property
    def words(self) -> list[str]:
        """The words of the first text, in order."""
        return self._words(Whose(0))

    def _words(self, whose: Whose) -> list[str]:
        texts = self._source.texts(whose)
        return list(dict.fromkeys(word for text in texts for word in text.words()))

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        weights = [one.weights for several in self.sums.values() for one in several]
        weights += self._recording.formed.values()
        return sum(one.numel() * one.element_size() for one in weights)

    def __getitem__(self, word: str) -> Tensor:
        """`of(word)`."""
        return self.of(word)

    def of(
        self,
        word: str | int | Sequence[int],
        *,
        picture: int = 0,
        layer: int | str | None = None,
        head: int | Literal["pointing"] | None = None,
        step: int | None = None,
        sample: int = 0,
        negative: bool = False,
        occurrence: int | None = None,
        encoder: int | None = None,
        sinks: Sinks = "keep",
    ) -> Tensor:
        """How much a word and each patch attend to each other: (rows, columns), or (frames, rows, columns) of a video.

        Where the word looks, it is the mean of the rows of its pieces; where patches look at it, each patch's number is
        the share of its attention that goes to all pieces of the word. Layers that see the picture at another
        resolution are brought to that of the finest one.

        Args:
            word: a word, or a phrase; or the number of a token, or several.
            picture: which picture of the prompt, counted from 0.
            layer: a number or path of `layers`; None: the mean of all.
            head: the number of a head; "pointing": the mean of the heads that `pointing` names; both are recorded with
                `heads="all"`. None: the mean of all.
            step: the number of a step, recorded with `steps="all"`; None: the mean.
            sample: which text of the batch, or which of several pictures made at once.
            negative: the negative prompt of a guidance.
            occurrence: which of several places where the word stands, counted from 0; None: the mean of all.
            encoder: which text encoder's tokens, where the layers see several; None: all.
            sinks: "remove": without the sinks of the mean of all words, see `analysis.sinks`: patches that draw far
                more than their share, or, where patches look at words, tokens, such as the one that starts the text.
                The others are rescaled to the same sum; removed patches are NaN.

        Raises:
            ValueError: there is no such word, or nothing was kept of it; the message names close ones.
            IndexError: there is no such picture, layer, head, step, text or occurrence.
            TypeError: one of these is no number.
        """
        check_sinks(sinks)
        whose = Whose(sample, negative)
        heats, _, are_queries = self._of_heads(word, whose, picture, layer, head, step, occurrence, encoder, sinks)
        heat = heats[_that_point(heats)].mean(0) if head == "pointing" else heats.mean(0)
        if sinks == "remove" and are_queries:
            is_sink = self._sink_patches(whose, picture, layer, tuple(heat.shape))
            total = heat.sum()
            heat = heat.masked_fill(is_sink, 0)
            heat = (heat * (total / heat.sum().clamp_min(1e-12))).masked_fill(is_sink, math.nan)
        return heat

    def pointing(
        self,
        word: str | int | Sequence[int],
        *,
        picture: int = 0,
        layer: int | str | None = None,
        step: int | None = None,
        sample: int = 0,
        negative: bool = False,
        occurrence: int | None = None,
        encoder: int | None = None,
        count: int = 3,
    ) -> list[tuple[str, int]]:
        """The heads in which a word points at a place of the picture: (layer, number), the sharpest first.

        Most heads look at the picture little, or everywhere alike. Of those in which word and patches attend to each
        other no less than in the mean head, these are the heads whose weights lie on the fewest patches: those of the
        lowest entropy, as in "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual Grounding"
        (Kang et al., 2025). Recorded with `heads="all"`. Arguments and errors are those of `of`.
        """
        whose = Whose(sample, negative)
        heats, names, _ = self._of_heads(word, whose, picture, layer, "pointing", step, occurrence, encoder, "keep")
        return [names[number] for number in _that_point(heats, count)]

    def _of_heads(
        self,
        word: Any,
        whose: Whose,
        picture: int,
        layer: int | str | None,
        head: int | str | None,
        step: int | None,
        occurrence: int | None,
        encoder: int | None,
        sinks: Sinks,
    ) -> tuple[Tensor, list[tuple[str, int]], bool]:
        """The weights of a word in each head that is asked for, (heads, *grid), with layer and number of each, and
        whether they are rows of the word; with head=None the mean of each layer stands in place of its heads."""
        numbers = {"picture": picture, "sample": whose.sample, "layer": layer, "head": head, "step": step}
        for name, value in (numbers | {"occurrence": occurrence, "encoder": encoder}).items():
            may_be: Any = (str, type(None)) if name in ("layer", "head") else type(None)
            if not hasattr(value, "__index__") and (name in ("picture", "sample") or not isinstance(value, may_be)):
                raise TypeError(f"{name}={value!r}: pass a number, counted from 0")
        self._check(whose, picture)
        places = self._places(word, whose, encoder)
        if occurrence is not None:
            if not -len(places) <= occurrence < len(places):
                raise IndexError(
                    f"occurrence={occurrence}: the word {word!r} stands {len(places)} times in the text; count from 0"
                )
            places = [places[occurrence]]
        by_layer: list[Tensor] = []
        names: list[tuple[str, int]] = []
        are_queries = False
        for path in self._paths(layer):
            views = {key.view: several for key, several in self.sums.items() if key[:3] == (whose, picture, path)}
            grids = [
                made
                for _, several in sorted(views.items())
                if (made := self._weights(several, places, head, step, sinks, whose)) is not None
            ]
            if grids:
                are_queries = next(iter(views.values()))[0].are_queries
                by_layer.append(torch.stack(_alike(grids, are_queries)).sum(0))
                names += [(path, number) for number in range(len(grids[0]))]
        if not by_layer:
            wanted = few([str(token) for several in places for token in several])
            raise ValueError(f"nothing was kept of {word!r}, the tokens {wanted}: {self._source.missing}")
        return torch.cat(_alike(by_layer, are_queries)), names, are_queries

    def table(self, *, sample: int = 0, negative: bool = False) -> WordTable:
        """The weights of every token of a text that is no patch, in each layer and head; for the page of `explore`.

        Layers with different numbers of heads have the mean of these. Raises as `of` does.
        """
        whose = Whose(sample, negative)
        pictures = sorted({key.picture for key in self.sums if key.whose == whose}) or [0]
        for picture in pictures:
            self._check(whose, picture)
        found = {key: several for key, several in self.sums.items() if key.whose == whose}
        sums = [one for several in found.values() for one in several]
        tokens = sorted({token for one in sums for token in one.tokens})
        heads = len(sums[0].weights) if len({len(one.weights) for one in sums}) == 1 else 1
        layers = tuple(dict.fromkeys(key.path for key in found))
        tables = []
        for picture in pictures:
            own = {key: several for key, several in found.items() if key.picture == picture}
            shown = [one for several in own.values() for one in several]
            finest = _finest(self._on_patches(one.weights, whose).shape[2:] for one in shown)
            table = torch.zeros(len(layers), heads, len(tokens), *finest)
            for key, several in own.items():
                whole = self._of_all_tokens(several, tokens, heads, whose)
                table[layers.index(key.path)] += resized(whole, (*whole.shape[:2], *finest), sums[0].are_queries)
            tables.append(table)
        texts = {text.start + at: one for text in self._source.texts(whose) for at, one in enumerate(text.tokens)}
        words = tuple(texts.get(token, str(token)).removesuffix("</w>") for token in tokens)
        return WordTable(layers, words, tuple(tables), sums[0].are_queries)

    def _of_all_tokens(self, several: list[Sum], tokens: list[int], heads: int, whose: Whose) -> Tensor:
        """The weights of these tokens in one layer, (heads, tokens, *grid); zeros where nothing was kept."""
        place = {token: number for number, token in enumerate(tokens)}
        total, counts = torch.tensor(0.0), torch.zeros(len(tokens))
        for one in several:
            weights = self._on_patches(one.weights, whose).cpu().float() / one.calls
            weights = weights if len(weights) == heads else weights.mean(0, keepdim=True)
            places = torch.tensor([place[token] for token in one.tokens])
            total = total + weights.new_zeros(heads, len(tokens), *weights.shape[2:]).index_add_(1, places, weights)
            counts[places] += 1
        return total / counts.clamp_min(1).view(-1, *[1] * (total.ndim - 2))

    @property
    def samples(self) -> list[int]:
        """The numbers of the texts with a picture, without negative prompts."""
        return sorted({key.whose.sample for key in self.sums if not key.whose.is_negative})

    def _check(self, whose: Whose, picture: int) -> None:
        """Raise an error where there is no such text or picture."""
        pictures, known = self._source.pictures(whose), dict.fromkeys(key.whose for key in self.sums)
        if known and whose not in known and not pictures:
            texts = [f"sample={one.sample}" + ", negative=True" * one.is_negative for one in known]
            raise IndexError(
                f"there is no text with a picture of sample={whose.sample}, negative={whose.is_negative}: there are "
                f"{'; '.join(texts[:8])}"
            )
        count = 1 if pictures is None else len(pictures)
        if not known and not self._source.texts(whose):
            raise ValueError(
                f"no attention between words and patches was recorded of {self._title}: run it inside the `with`; what "
                "it is given must have a text and a picture, and a text must come as ids"
            )
        if not 0 <= picture < count:
            wanted = (
                "pass picture=0" + f" to {count - 1}" * (count > 1)
                if count
                else "give the model the picture too, with the ids that its processor makes of both"
            )
            raise IndexError(f"there is no picture {picture} in the prompt: it has {count}; {wanted}")
        if pictures is not None and not pictures[picture].views:
            tokens = len(pictures[picture].tokens)
            raise ValueError(
                f"the {tokens} tokens of picture {picture} have no place on it: no grid of patches fits them, or it is "
                "not known how this family of models arranges them. attention(model) records their rows"
            )
        is_formed = pictures is not None and pictures[picture].views[0].ndim == 1
        if is_formed and not any(sample == whose.sample for sample, _ in self._recording.formed):
            raise ValueError(
                f"the query former of {self._title} did not run inside the `with`, so that the places of its tokens on "
                f"picture {picture} are not known: give the model the picture itself, not embeddings of it"
            )
        if not known:
            raise ValueError(
                f"no attention between words and patches was recorded of {self._title}, though it was given both: "
                "layers= may leave them out, or warnings of the recording say why"
            )

    def _places(self, word: Any, whose: Whose, encoder: int | None) -> list[list[int]]:
        """The tokens of each place of a word; of several encoders' those that are the same place."""
        if not isinstance(word, str):
            return [self._numbers(word, whose)]
        texts = self._source.texts(whose)
        if not texts:
            raise ValueError(
                f"the words are not known, so that {word!r} cannot be found: the text came as embeddings, or the model "
                "was called without its pipeline. Pass tokens= to word_maps, or the number of a token"
            )
        if encoder is not None:
            if not 0 <= encoder < len(texts):
                raise IndexError(f"encoder={encoder}: the layers see the tokens of {len(texts)}")
            texts = [texts[encoder]]
        found = [places for text in texts if (places := text.find(word))]
        if not found:
            raise no_such_word(word, texts, self._source.unread)
        # The encoders have the same text, but one may see less of it.
        count = max(map(len, found))
        return [[place for each in found if number < len(each) for place in each[number]] for number in range(count)]

    def _numbers(self, word: Any, whose: Whose) -> list[int]:
        """The numbers of tokens; an error where they are none, or nothing was kept of one."""
        try:
            numbers = [operator.index(one) for one in (word if isinstance(word, Iterable) else [word])]
        except TypeError as error:
            wanted = "pass a word or a phrase, the number of a token, or several numbers"
            raise TypeError(f"there is no word {word!r}: {wanted}") from error
        kept = {
            token for key, several in self.sums.items() if key.whose == whose for one in several for token in one.tokens
        }
        if unknown := [number for number in numbers if number not in kept]:
            raise ValueError(f"nothing was kept of token {few(list(map(str, unknown)))}: {self._source.missing}")
        if not numbers:
            raise ValueError("there is no word of no tokens: pass the number of one, or several numbers")
        return numbers

    def _paths(self, layer: int | str | None) -> Sequence[str]:
        layers = self.layers
        if layer is None:
            return layers
        if isinstance(layer, str):
            if layer not in layers:
                raise IndexError(f"there is no layer {layer!r} with words and patches: {few(layers, 12)}")
            return [layer]
        if not -len(layers) <= layer < len(layers):
            raise IndexError(f"layer={layer}: {len(layers)} layers have words and patches")
        return [layers[layer]]

    def _weights(
        self,
        several: list[Sum],
        places: list[list[int]],
        head: int | str | None,
        step: int | None,
        sinks: Sinks,
        whose: Whose,
    ) -> Tensor | None:
        """The weights of a word in one layer, (heads, *grid) on its own grid; None where nothing was kept of it."""
        wanted = {token for place in places for token in place}
        rows: dict[int, list[Tensor]] = {}
        for one in self._of_step(several, step):
            weights = self._on_patches(self._of_head(one.weights, head), whose) / one.calls
            if sinks == "remove" and not one.are_queries:
                weights = _without_sink_tokens(weights)
            for number, token in enumerate(one.tokens):
                if token in wanted:
                    rows.setdefault(token, []).append(weights[:, number])
        if not rows:
            return None
        means = {token: torch.stack(each).mean(0) for token, each in rows.items()}
        made = []
        for place in places:
            pieces = [means[token] for token in place if token in means]
            if pieces:
                stacked = torch.stack(pieces)
                made.append(stacked.mean(0) if several[0].are_queries else stacked.sum(0))
        return torch.stack(made).mean(0)

    def _on_patches(self, weights: Tensor, whose: Whose) -> Tensor:
        """The weights (..., *grid); those on the tokens of a query former go where these look, by the mean of its
        layers and heads."""
        formed = [one for (sample, _), one in self._recording.formed.items() if sample == whose.sample]
        return torch.tensordot(weights, torch.stack(formed).mean(0), 1) if formed else weights

    def _of_step(self, several: list[Sum], step: int | None) -> list[Sum]:
        if step is None:
            return several
        if not self._recording.keeps_steps:
            raise ValueError(
                f"step={step}: only the sum of the steps was kept; record with word_maps(..., steps='all')"
            )
        if not -len(several) <= step < len(several):
            raise IndexError(f"step={step}: {len(several)} steps were recorded")
        return [several[step]]

    def _of_head(self, weights: Tensor, head: int | str | None) -> Tensor:
        """Of (heads, ...) those that are asked for, or their mean, (1, ...)."""
        if head is None:
            return weights.mean(0, keepdim=True)
        if isinstance(head, str) and head != "pointing":
            raise ValueError(f"head={head!r}: pass a number, 'pointing' or None")
        if not self._recording.keeps_heads:
            raise ValueError(
                f"head={head!r}: only the mean of the heads was kept; record with word_maps(..., heads='all')"
            )
        if isinstance(head, str):
            return weights
        if not -len(weights) <= head < len(weights):
            raise IndexError(f"head={head}: a layer has {len(weights)} heads; layer= chooses one that has more")
        return weights[head][None]

    def _sink_patches(self, whose: Whose, picture: int, layer: int | str | None, shape: tuple[int, ...]) -> Tensor:
        """Which patches draw far more than their share from all words alike, (rows, columns)."""
        paths, total = self._paths(layer), torch.zeros(shape)
        for key, several in self.sums.items():
            if key[:2] == (whose, picture) and key.path in paths:
                for one in several:
                    weights = self._on_patches(one.weights.mean((0, 1)), whose).cpu().float()
                    total += resized(weights / one.calls, shape, True)
        return total > sink_limit(total.numel()) * total.mean()

    def __repr__(self) -> str:
        texts = dict.fromkeys(key.whose for key in self.sums)
        words = self.words
        return (
            f"<word maps of {self._title}: {len(texts)} text{'s' * (len(texts) != 1)}, {len(self.layers)} layers, "
            f"{len(words)} words: {few(words, 8)}>"
        )


def resized(weights: Tensor, shape: tuple[int, ...], are_shares: bool) -> Tensor:
    """Weights on another grid of the same picture: each cell is the mean of the area that it covers.

    >>> resized(torch.tensor([[1.0, 3.0]]), (1, 4), are_shares=False)
    tensor([[1., 1., 3., 3.]])

    `are_shares`: the weights are shares of one row, whose sum stays.
    """
    for axis, (count, size) in enumerate(zip(weights.shape, shape, strict=True)):
        if count != size:
            edges = torch.arange(size + 1, dtype=torch.float64) * count / size
            places = torch.arange(count)
            covered = (torch.minimum(edges[1:, None], places + 1) - torch.maximum(edges[:-1, None], places)).clamp_min(
                0
            )
            part = covered if are_shares else covered * size / count
            weights = torch.tensordot(part.to(weights), weights, ([1], [axis])).movedim(0, axis)
    return weights


def _alike(grids: Sequence[Tensor], are_shares: bool) -> list[Tensor]:
    """Weights (heads, *grid), brought to the finest of their grids."""
    finest = _finest(grid.shape[1:] for grid in grids)
    return [resized(grid, (len(grid), *finest), are_shares) for grid in grids]


def _finest(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The finest grid: tiles of a wide picture may have more columns than the whole picture, and fewer rows."""
    return tuple(map(max, zip(*shapes, strict=True)))


def _that_point(heats: Tensor, count: int = 3) -> list[int]:
    """Which of (heads, *grid) point at a place, the sharpest first; see `WordMaps.pointing`."""
    flat = heats.flatten(1)
    mass = flat.sum(1)
    shares = flat / mass[:, None].clamp_min(1e-12)
    entropy = torch.special.entr(shares).sum(1)
    order: list[int] = entropy.masked_fill(mass < mass.mean(), math.inf).argsort().tolist()
    return order[: min(count, int((mass >= mass.mean()).sum()))]


def _without_sink_tokens(weights: Tensor) -> Tensor:
    """What patches look at, (heads, tokens, *grid), without tokens that draw far more than their share, rescaled."""
    total = weights.mean(0).flatten(1).mean(1)
    is_sink = total > sink_limit(total.numel()).to(total) * total.mean()
    if not bool(is_sink.any()):
        return weights
    rest = weights.masked_fill(is_sink.view(-1, *[1] * (weights.ndim - 2)), 0)
    left = rest.sum(1, keepdim=True)
    return torch.where(left > 1e-12, rest * (weights.sum(1, keepdim=True) / left), weights)

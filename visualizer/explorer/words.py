"""Words and the patches of pictures that they look at: an example for each text, with all of its pictures.

Queries are the words and keys the patches of the pictures, so each row is a part of what a word looks at. Where a
picture is made, its patches look at the words, and queries and keys change places. Behind the layers stands their mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..analysis import without_sinks
from ..analysis.sinks import Sinks, check_sinks
from ..errors import few
from ..grounding import WordMaps
from ..images import Thumbnail, picture_of
from ..layout import Layout, Part, Patches, layout_of
from ..maps import AttentionMap
from ..reading import Array
from ..words import is_special
from .coding import Example, code_maps
from .sides import Side, beside, chosen_images, for_each, side_of_patches, side_of_words

BY_WORD_MAPS = (
    "Where tiles and merged patches lie, word_maps(model, processor=processor) knows, and explore takes its maps"
)
_FEWEST = 4  # one token that is repeated so often stands for the patches of a picture


class _Picture(NamedTuple):
    """Where a picture lies in a text."""

    start: int
    """Its first token."""
    part: Part
    """Its patches; of a token that stands for them, which are in a grid that is not known."""


def examples_of_word_maps(
    maps: WordMaps, image: Any, batch: int | Sequence[int] | None, title: str, sinks: Sinks
) -> list[Example]:
    """An example for each chosen text that `word_maps` has seen.

    Raises what `WordMaps.table` raises, and ValueError where there are more or fewer pictures than `image`.
    """
    size = 1 + max(maps.samples, default=0)  # where nothing was recorded, the table says so
    samples = chosen_images(batch, size)
    examples = []
    for sample, own in zip(samples, for_each("image", image, samples, size), strict=True):
        layers, words, weights, are_queries = maps.table(sample=sample)
        side = beside(
            [
                side_of_patches(Layout.picture(one.shape[3:]), picture_of(picture))
                for one, picture in zip(weights, _pictures(own, len(weights)), strict=True)
            ]
        )
        whole = torch.cat([one.flatten(3) for one in weights], 3)
        name = f"{title} {sample}".strip() if len(samples) > 1 else title
        examples.append(_example(whole, layers, words, side, name, check_sinks(sinks), are_queries))
    return examples


def examples_of_texts(
    layers: Sequence[AttentionMap],
    images: Sequence[int],
    texts: Sequence[TextAndPictures],
    pictures: Sequence[Any],
    where: Patches,
    titles: Sequence[str],
    are_without_sinks: bool,
) -> list[Example]:
    """An example for each chosen text of maps in which words and patches are tokens alike.

    Raises ValueError where there are more or fewer pictures than the texts have, or a grid does not fit.
    """
    examples = []
    for image, text, own, title in zip(images, texts, pictures, titles, strict=True):
        words = torch.from_numpy(text.words)
        rows = torch.stack([layer.rows(words.to(layer.device))[image].cpu() for layer in layers])
        places = text.split(1 if own is None or not isinstance(own, (list, tuple)) else len(own))
        sides, weights = [], []
        for place, picture in zip(places, _pictures(own, len(places)), strict=True):
            read = picture_of(picture)
            layout = _layout_of_picture(place.part, where, read, text.layout.seen if len(places) == 1 else ())
            first = place.start + layout.first_patch
            sides.append(side_of_patches(replace(layout, parts=layout.parts[-1:]), read))
            weights.append(rows[..., first : first + sides[-1].size])
        paths, names = [layer.path for layer in layers], [text.names[word] for word in text.words]
        made = _example(torch.cat(weights, 3), paths, names, beside(sides), title, False, True)
        examples.append(replace(made, has_sinks=not are_without_sinks))
    return examples


class TextAndPictures(NamedTuple):
    """A text whose tokens are words and the patches of pictures."""

    layout: Layout
    names: Sequence[str]
    """What each token is called."""
    pictures: list[_Picture]
    """Its pictures, or the runs of tokens that stand for these."""

    @classmethod
    def of(cls, layout: Layout | None, words: Sequence[str] | None) -> TextAndPictures | None:
        """The pictures among the tokens that are known, or among words; None where there is none."""
        told = None
        if words is not None:
            special = [place for place, word in enumerate(words) if is_special(word)]
            told = Layout.text(list(words), special)
        for one in (layout, told):
            if one is not None and (found := _pictures_in(one)) and (told or one).are("text").any():
                return cls(one, (told or one).names if words is None else list(words), found)
        return None

    @property
    def words(self) -> Any:
        """The numbers of the tokens that are neither patches nor padding."""
        is_other = self.layout.are("padding")
        for start, part in self.pictures:
            is_other[start : start + part.count] = True
        return np.flatnonzero(~is_other)

    def split(self, count: int) -> list[_Picture]:
        """The pictures, where it is known how many there are: one run of tokens may stand for several of one size."""
        each, rest = divmod(sum(part.count for _, part in self.pictures), count)
        if not rest and all(part.count % each == 0 for _, part in self.pictures):
            return [
                _Picture(first, part if part.shape else Part("special", each))
                for start, part in self.pictures
                for first in range(start, start + part.count, each)
            ]
        return self.pictures


def _pictures_in(layout: Layout) -> list[_Picture]:
    found, start = [], 0
    for part in layout.parts:
        if part.kind == "patches":
            found.append(_Picture(start, part))
        elif part.kind == "special":
            at = start
            for name, run in itertools.groupby(part.names):
                count = len([*run])
                if count >= _FEWEST and is_special(name):
                    found.append(_Picture(at, Part("special", count, (name,) * count)))
                at += count
        start += part.count
    return found


def _layout_of_picture(part: Part, where: Patches, picture: Array | None, seen: tuple[Thumbnail, ...]) -> Layout:
    if part.shape:
        return Layout((part,), seen=seen)
    try:
        return layout_of(part.count, where, picture)
    except ValueError as error:
        raise ValueError(f"{error}. {BY_WORD_MAPS}") from error


def _pictures(value: Any, count: int) -> list[Any]:
    """The user's picture for each of that many in a text."""
    several = isinstance(value, (list, tuple))
    if value is None or (count == 1 and not (several and len(value) == 1)):
        return [value] * count  # of one picture, a list is the frames of a video
    if not several or len(value) != count:
        raise ValueError(
            f"image= has {len(value) if several else 1} pictures, and {count} lie in the text: pass one for each, in "
            f"order. {BY_WORD_MAPS}"
        )
    return list(value)


def _example(
    weights: Tensor,
    paths: Sequence[str],
    words: Sequence[str],
    picture: Side,
    title: str,
    removes_sinks: bool,
    are_queries: bool,
) -> Example:
    """The example of weights (layers, heads, words, patches), and of their mean over the layers that have a word.

    Of an encoder and a decoder one has the words of the prompt, the other those that are written.
    """
    layers_of_word = weights.ne(0).any(3).any(1).sum(0).clamp_min(1)
    rows, counts = (weights, layers_of_word[:, None]) if are_queries else (weights.mT, layers_of_word)
    layers = [AttentionMap(one[None], path=path, kind="cross") for one, path in zip(rows, paths, strict=True)]
    if removes_sinks:
        layers = without_sinks(layers)
        rows = torch.stack([layer.dense()[0] for layer in layers])
    layers.append(AttentionMap((rows.sum(0) / counts)[None], kind="cross"))
    side = side_of_words("tokens", words, len(words), None)
    sides = (side, picture) if are_queries else (picture, side)
    where = "on these words" if not are_queries else "on these pictures" if picture.pictures else "on this picture"
    [made] = code_maps(layers, [0], [sides], [title], part=where)
    return replace(made, has_mean=True, opens=0 if are_queries else 1, has_sinks=not removes_sinks)


def no_pictures(tokens: Sequence[Any] | None) -> ValueError:
    """The error for a picture beside a text in which nothing stands for it."""
    among = "" if tokens is None else f" among {few([str(one) for one in tokens], 8)}"
    return ValueError(
        "tokens= names both queries and keys, so image= is a picture in this text, and no token stands for its patches"
        f"{among}: a placeholder such as <image> does, once for each patch (ids need processor=, which names them). In "
        "cross-attention name one side by query_tokens= or key_tokens="
    )

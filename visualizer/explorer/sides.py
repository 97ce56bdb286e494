"""What the queries and the keys on a page are: words, or the patches of a picture."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..places import grid_of, read_image

_PICTURE_SIDE = 768  # pixels, more than the page gives to a picture
# Tokens that are not words, as tokenizers write them: [CLS], <s>, <|endoftext|>.
_SPECIAL = r"\[[A-Z]+\d*\]|<[^<>\s]{1,40}>|<\|.{1,40}\|>"


@dataclass(frozen=True)
class Side:
    """What the queries or the keys are: words; or named tokens followed by the patches of a picture, row by row."""

    labels: list[str]
    """The words; or the names of the tokens before the patches."""
    special: list[int]
    """Tokens that are neither a word nor a patch."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of patches."""
    picture: bytes | None = None
    """A JPEG file."""
    pooled: int = 1
    """How many words are pooled into one; of patches, how many along each side."""

    @property
    def size(self) -> int:
        """How many tokens."""
        return len(self.labels) + (math.prod(self.grid) if self.grid else 0)

    def pool(self, factor: int) -> tuple[Side, npt.NDArray[np.intp]]:
        """The side with that many words (or patches along each side) in one; and for each token its group."""
        if factor == 1:
            return self, np.arange(self.size)
        if self.grid is None:
            groups = np.arange(self.size) // factor
            parts = [self.labels[start : start + factor] for start in range(0, self.size, factor)]
            labels = [part[0] if len(part) == 1 else f"{part[0]} … {part[-1]}" for part in parts]
            return Side(labels, [], pooled=factor), groups
        rows, columns = self.grid
        coarse = -(-rows // factor), -(-columns // factor)
        row, column = np.divmod(np.arange(rows * columns), columns)
        prefix = len(self.labels)
        groups = np.concatenate([np.arange(prefix), prefix + row // factor * coarse[1] + column // factor])
        return Side(self.labels, self.special, coarse, self.picture, factor), groups


def read_sides(
    queries: int,
    keys: int,
    *,
    tokens: Sequence[Any] | None,
    query_tokens: Sequence[Any] | None,
    key_tokens: Sequence[Any] | None,
    image: Any,
    grid: tuple[int, int] | None,
    prefix_tokens: int | Sequence[str] | None,
) -> tuple[Side, Side]:
    """What the queries and the keys of one example are; the same object if both are the same tokens.

    Raises ValueError if the words or the grid do not fit.
    """
    has_picture = image is not None or grid is not None or prefix_tokens is not None

    def patches(size: int) -> Side:
        places = grid_of(size, {"grid": grid, "prefix_tokens": prefix_tokens})
        prefix = [printable(name) for name in places.prefix]
        picture = None if image is None else _jpeg(image)
        return Side(prefix, list(range(len(prefix))), (places.rows, places.columns), picture)

    if query_tokens is not None or key_tokens is not None:
        if query_tokens is not None and key_tokens is not None and has_picture:
            raise ValueError("query_tokens= and key_tokens= name both sides: no side is left for the picture")
        query_is_picture = query_tokens is None and has_picture
        key_is_picture = key_tokens is None and has_picture
        return (
            patches(queries) if query_is_picture else _words("query_tokens", query_tokens, queries),
            patches(keys) if key_is_picture else _words("key_tokens", key_tokens, keys),
        )
    if tokens is not None and queries != keys:
        raise ValueError(
            f"tokens= names both queries and keys, but these are {queries} queries over {keys} keys: pass "
            "query_tokens= and key_tokens="
        )
    side = patches(keys) if has_picture else _words("tokens", tokens, keys)
    return (side if queries == keys else _words("query_tokens", None, queries)), side


def _words(name: str, words: Sequence[Any] | None, size: int) -> Side:
    """A side of words, passed as the argument of that name; without words, of numbers."""
    if words is None:
        return Side([str(number) for number in range(size)], [])
    if len(words) != size:
        raise ValueError(
            f"{name} has {len(words)} words, and there are {size} {'keys' if name == 'key_tokens' else 'queries'}: "
            "special tokens and padding count"
        )
    labels = [printable(word) for word in words]
    return Side(labels, [at for at, word in enumerate(words) if re.fullmatch(_SPECIAL, str(word))])


def _jpeg(image: Any) -> bytes:
    pixels = Image.fromarray(np.rint(255 * read_image(image)).astype(np.uint8))
    pixels.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=90)
    return file.getvalue()


def printable(token: Any, longest: int = 200) -> str:
    """A token as visible text of at most `longest` characters: no control characters, no line breaks.

    >>> printable("a\\u202eb"), printable("\\0"), printable("  "), printable("x" * 10_000, longest=3)
    ('a‹202E›b', '␀', '␣␣', 'xxx… (10000 characters)')
    """
    text = str(token)
    more = f"… ({len(text)} characters)" if len(text) > longest else ""
    text = text[:longest]
    if not text.strip(" "):
        return "␣" * len(text) + more if text else "‹empty›"
    return "".join(map(_visible, text)) + more


def _visible(character: str) -> str:
    """The character, or a sign for one without ink: bidi controls, zero widths, lone surrogates, private use."""
    number = ord(character)
    if character.isprintable():
        return character
    return chr(0x2400 + number) if number < 32 else "␡" if number == 127 else f"‹{number:04X}›"

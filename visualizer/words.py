"""Words as a reader reads them: the pieces of a tokenizer as text, with what has no ink made visible; and which tokens
of a text are the word "cat", however many pieces its tokenizer makes of it.

Plots, the explorer and tables of numbers write tokens by these functions, so that all show the same.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import did_you_mean, few

# What tokenizers put before a word, or before its continuation, and what readers see in its place.
_MARKERS = "Ġ▁#␣ "
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥", "▁": "␣"})
_SUBSCRIPTS = "₁₂₃₄₅₆₇₈₉"
# How tokenizers mark pieces: before a word (byte-level, SentencePiece), behind one (CLIP), before what continues one.
_BEFORE, _BEHIND, _WITHIN = ("Ġ", "▁", "Ċ"), "</w>", "##"
_MOST = 24  # pieces of a word or phrase


def word_index(word: str, tokens: Sequence[str]) -> int:
    """The index of a word among the tokens, with or without the marker that its tokenizer puts before it.

    >>> word_index("cat", ["Ġthe", "Ġcat"])
    1
    """
    places = [place for place, token in enumerate(tokens) if token == word]
    places = places or [place for place, token in enumerate(tokens) if token.strip(_MARKERS) == word.strip(_MARKERS)]
    if len(places) == 1:
        return places[0]
    if places:
        raise ValueError(f"there are {len(places)} tokens {word!r}, at {places}: pass one of these numbers")
    raise ValueError(f"there is no token {word!r} among {few(tokens, 30)}")


def word_list(tokens: Any, name: str = "tokens") -> list[Any]:
    """The words or ids that a user passes, in a list, a tensor or an array, one by one.

    >>> word_list(["the", "cat"]), word_list(np.array([7, 8]))
    (['the', 'cat'], [7, 8])

    Raises TypeError for one text, whose letters would be taken for words, and for what is no list.
    """
    tokens = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise TypeError(
            f"{name}={tokens!r}: pass a list of words, such as tokenizer.convert_ids_to_tokens(ids) or text.split()"
        )
    return [token.tolist() if hasattr(token, "tolist") else token for token in tokens]


@functools.cache
def _bytes_of_pieces() -> dict[str, int]:
    """The byte that each character stands for in the pieces of GPT-2's tokenizer and of all that are built like it.

    Bytes that are printable in Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def readable(tokens: Sequence[Any]) -> list[str]:
    """The pieces of a tokenizer as a reader reads them, one for one.

    >>> readable(["The", "Ġcat", "ĠâĤ", "¬", "Ċ"])
    ['The', '␣cat', '␣€₁', '€₂', '⏎']
    >>> readable(["▁A", "<0x0A>", " b", "naïve"])
    ['␣A', '⏎', '␣b', 'naïve']

    Bytes become characters; one that several pieces make stands in each, with the number of the piece below. Spaces at
    the ends and line breaks are made visible.
    """
    pieces = [str(token) for token in tokens]
    alphabet, is_of_bytes = _bytes_of_pieces(), _are_of_bytes(pieces)
    shown = list(pieces)
    run: list[int] = []
    for place, piece in enumerate([*pieces, ""]):
        is_bytes = re.fullmatch("<0x[0-9A-F]{2}>", piece) or (is_of_bytes and piece and set(piece) <= alphabet.keys())
        if is_bytes and place < len(pieces):
            run.append(place)
        elif run:
            raw = [
                bytes([int(pieces[at][3:5], 16)])
                if pieces[at].startswith("<0x")
                else bytes(alphabet[character] for character in pieces[at])
                for at in run
            ]
            for at, text in zip(run, _characters(raw), strict=True):
                shown[at] = pieces[at] if text is None else text
            run = []
    return [_with_spaces(text) for text in shown]


def _are_of_bytes(pieces: Sequence[str]) -> bool:
    """Whether pieces are made of the signs for bytes: a space's or a line break's, or others that make UTF-8.

    A text without spaces, such as a Chinese one, has the others alone. It may end within a character.
    """
    if any(piece[:1] in ("Ġ", "Ċ") for piece in pieces):  # no other tokenizer writes these
        return True
    alphabet, whole = _bytes_of_pieces(), "".join(pieces)
    if whole.isascii() or not set(whole) <= alphabet.keys():
        return False
    raw = bytes(alphabet[character] for character in whole)
    text = raw.decode(errors="ignore")
    return not text.isascii() and len(raw) - len(text.encode()) < 4


def _characters(pieces: Sequence[bytes]) -> list[str | None]:
    """The text of each piece of UTF-8; None for a piece with bytes that belong to no character."""
    whole = b"".join(pieces)
    # For each byte the character that it belongs to, and where that begins; None for a byte of no character.
    owner: list[tuple[str, int] | None] = []
    for character in whole.decode(errors="surrogateescape"):
        length = len(character.encode(errors="surrogateescape"))
        owner += [None if "\udc80" <= character <= "\udcff" else (character, len(owner))] * length
    texts: list[str | None] = []
    start = 0
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    for end in ends:
        own = owner[start:end]
        if None in own or not own:
            texts.append(None)
        else:
            text = ""
            for character, first in dict.fromkeys(one for one in own if one is not None):
                last = first + len(character.encode())
                if start <= first and last <= end:
                    text += character
                else:  # the number of this piece among those that make the character
                    number = sum(first < other <= start for other in ends)
                    text += character + _SUBSCRIPTS[number]
            texts.append(text)
        start = end
    return texts


def _with_spaces(text: str) -> str:
    """A text whose line breaks and spaces at its ends, and what else has no ink, are made visible."""
    inner = text.strip(" Ġ")
    left = text.index(inner) if inner else len(text)
    text = "␣" * left + inner + "␣" * (len(text) - left - len(inner))
    return text.replace("Ċ", "⏎").translate(_VISIBLE)


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


def join_plainly(tokens: Sequence[str], has_marks: bool = True) -> str:
    """The text that tokens make, by their marks.

    >>> join_plainly(["a</w>", "cat", "er", "pillar</w>"]), join_plainly(["cat", "##s", "sat"], has_marks=False)
    ('a caterpillar', 'cats sat')

    `has_marks`: whether marks tell words apart; else each token that does not continue one is a word.
    """
    text = ""
    for token in tokens:
        if not has_marks and text and not token.startswith(_WITHIN):
            text += " "
        text += token.removeprefix(_WITHIN).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace(_BEHIND, " ")
    return text.strip()


@dataclass(frozen=True)
class Text:
    """Tokens, as one tokenizer made them of one text, and where they begin on their axis."""

    tokens: tuple[str, ...]
    join: Callable[[Sequence[str]], str] | None = field(default=None, compare=False)
    """Makes text of tokens; None: their marks do."""
    start: int = 0

    @classmethod
    def of(cls, ids: Sequence[int], tokenizer: Any, start: int = 0) -> Text:
        """The tokens of some ids."""
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            return cls(tuple(map(str, ids)), start=start)
        tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
        # Of byte-level pieces only the tokenizer knows the letters; its decoder may fail for pieces of others.
        join = tokenizer.convert_tokens_to_string if _are_of_bytes(tokens) else None
        return cls(tuple(tokens), join, start)

    def words(self) -> list[str]:
        """The words, in order, without special tokens and parts of a character."""
        begins = [*self._begins(), len(self.tokens)]
        spans = itertools.pairwise(begins)
        found = [self._joined(first, last) for first, last in spans if not is_special(self.tokens[first])]
        return [word for word in found if word and "\ufffd" not in word]

    def find(self, word: str) -> list[list[int]]:
        """The tokens of each place where a word or phrase stands; those in other letters' case only if none fits.

        >>> Text(("a</w>", "cat", "er", "pillar</w>", "cat</w>")).find("Cat")
        [[4]]
        """
        wanted = word.strip()
        found: dict[bool, list[list[int]]] = {True: [], False: []}
        begins = self._begins()
        ends = {first - 1 for first in begins if first} | {len(self.tokens) - 1}
        # Scripts without spaces have no marks of words: there a word may begin and end anywhere.
        firsts = begins if wanted.isascii() else range(len(self.tokens))
        for first in firsts:
            for last in range(first, min(first + _MOST, len(self.tokens))):
                text = self._joined(first, last + 1)
                if len(text) > len(wanted) + 4:
                    break
                if (last in ends or not wanted.isascii()) and text.casefold() == wanted.casefold():
                    found[text == wanted].append([self.start + place for place in range(first, last + 1)])
                    break
        return found[True] or found[False]

    def _joined(self, first: int, last: int) -> str:
        """The text of some neighbouring tokens, `last` not one of them."""
        tokens = self.tokens[first:last]
        return join_plainly(tokens, any(self._marks)) if self.join is None else self.join(tokens).strip()

    @functools.cached_property
    def _marks(self) -> tuple[bool, bool]:
        """Whether there are marks before words, and behind them."""
        return any(token[:1] in ("Ġ", "▁") for token in self.tokens), any(
            token.endswith(_BEHIND) for token in self.tokens
        )

    def _begins(self) -> list[int]:
        """The numbers of the tokens that begin a word."""
        tokens = self.tokens
        is_before, is_behind = self._marks

        def begins(place: int) -> bool:
            token, last = tokens[place], tokens[place - 1]
            if place == 0 or not _has_letters(token) or not _has_letters(last):
                return True
            if is_before:
                return token[:1] in _BEFORE or is_special(token) or is_special(last)
            return last.endswith(_BEHIND) or is_special(last) if is_behind else not token.startswith(_WITHIN)

        return [place for place in range(len(tokens)) if begins(place)]


def _has_letters(token: str) -> bool:
    bare = token.replace(_BEHIND, "").strip("Ġ▁Ċ")
    return any(letter.isalnum() for letter in bare)


_SPECIAL = re.compile(r"\[[A-Z]+\d*\]|<(?!0x|/w>)[^<>\s]{1,40}>|<\|.{1,40}\|>")


def is_special(token: str) -> bool:
    """Whether a token is named as tokenizers name those that are no words; a byte is part of a word.

    >>> [is_special(token) for token in ("[CLS]", "<s>", "<|im_start|>", "<image>", "<0x0A>", "[a]", "<")]
    [True, True, True, True, False, False, False]
    """
    return _SPECIAL.fullmatch(token) is not None


def no_such_word(word: str, texts: Sequence[Text], unread: str = "") -> ValueError:
    """The error for a word that is in none of the texts; `unread` says of which of their words nothing is known."""
    words = list(dict.fromkeys(one for text in texts for one in text.words()))
    hint = did_you_mean(words, word) or "."
    more = f"; {unread}" if unread else ""
    return ValueError(f"the word {word!r} is not in the text{hint} Its words are {few(words, 24)}{more}")

"""The words of a text: which of its tokens are "cat", however many pieces its tokenizer makes of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import did_you_mean, few

# How tokenizers mark pieces: before a word (byte-level, SentencePiece), behind one (CLIP), before what continues one.
_BEFORE, _BEHIND, _WITHIN = ("Ġ", "▁", "Ċ"), "</w>", "##"
_MOST = 24  # pieces of a word or phrase


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
        join = tokenizer.convert_tokens_to_string if any(token[:1] in ("Ġ", "Ċ") for token in tokens) else None
        return cls(tuple(tokens), join, start)

    def words(self) -> list[str]:
        """The words, in order, without special tokens."""
        begins = [*self._begins(), len(self.tokens)]
        spans = itertools.pairwise(begins)
        found = [self._joined(first, last) for first, last in spans if not _is_special(self.tokens[first])]
        return [word for word in found if word]

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
        return join_plainly(tokens, self._has_marks) if self.join is None else self.join(tokens).strip()

    @functools.cached_property
    def _has_marks(self) -> bool:
        """Whether marks tell its words apart."""
        return any(token[:1] in ("Ġ", "▁") or token.endswith(_BEHIND) for token in self.tokens)

    def _begins(self) -> list[int]:
        """The numbers of the tokens that begin a word."""
        tokens = self.tokens
        is_before = any(token[:1] in ("Ġ", "▁") for token in tokens)
        is_behind = any(token.endswith(_BEHIND) for token in tokens)

        def begins(place: int) -> bool:
            token, last = tokens[place], tokens[place - 1]
            if place == 0 or not _has_letters(token) or not _has_letters(last):
                return True
            if is_before:
                return token[:1] in _BEFORE or _is_special(token) or _is_special(last)
            return last.endswith(_BEHIND) or _is_special(last) if is_behind else not token.startswith(_WITHIN)

        return [place for place in range(len(tokens)) if begins(place)]


def _has_letters(token: str) -> bool:
    bare = token.replace(_BEHIND, "").strip("Ġ▁Ċ")
    return any(letter.isalnum() for letter in bare)


def _is_special(token: str) -> bool:
    return token[:1] in "<[" and token[-1:] in ">]" and not token.endswith(_BEHIND)


def no_such_word(word: str, texts: Sequence[Text]) -> ValueError:
    """The error for a word that is in none of the texts."""
    words = list(dict.fromkeys(one for text in texts for one in text.words()))
    hint = did_you_mean(words, word) or "."
    return ValueError(f"the word {word!r} is not in the text{hint} Its words are {few(words, 24)}")

"""Words as a reader reads them: the pieces of a tokenizer as text, with what has no ink made visible.

Plots, the explorer and tables of numbers write tokens by these functions, so that all show the same.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import few

# What tokenizers put before a word, or before its continuation, and what readers see in its place.
_MARKERS = "Ġ▁#␣ "
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "⏎", "\t": "⇥", "▁": "␣"})
_SUBSCRIPTS = "₁₂₃₄₅₆₇₈₉"


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
    alphabet = _bytes_of_pieces()
    # The markers of a space and of a line break: no other tokenizer writes them.
    is_of_bytes = any(piece[:1] in ("Ġ", "Ċ") for piece in pieces)
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


def _characters(pieces: Sequence[bytes]) -> list[str | None]:
    """The text of each piece of UTF-8; None for one that is no text, such as a byte of no character."""
    whole = b"".join(pieces)
    # For each character that can be read its text and its first byte's place.
    owner: list[tuple[str, int] | None] = [None] * len(whole)
    place = 0
    while place < len(whole):
        for length in (1, 2, 3, 4):
            try:
                character = whole[place : place + length].decode()
            except UnicodeDecodeError:
                continue
            owner[place : place + length] = [(character, place)] * len(whole[place : place + length])
            place += length - 1
            break
        place += 1
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

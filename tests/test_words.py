"""Words as readers read them."""

import numpy as np
import pytest

from visualizer.words import Text, printable, readable, word_index, word_list


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["The", "Ġcat", "Ċ", "ĠĠ"], ["The", "␣cat", "⏎", "␣␣"]),
        (["Ġna", "ÃŃ", "ve"], ["␣na", "í", "ve"]),
        (["Ġ", "ç", "Į", "«", "!"], ["␣", "猫₁", "猫₂", "猫₃", "!"]),  # one character of three pieces
        (["ĠðŁĺ", "Ģ"], ["␣😀₁", "😀₂"]),
        (["çĮ«çļ", "Ħ", "Ġ"], ["猫的₁", "的₂", "␣"]),  # a whole character, and the first part of another
        (["Ġa", "ç"], ["␣a", "ç"]),  # half a character at the end of the text
        (["▁The", "▁", "<0x0A>", "<0xE7>", "<0x8C>", "<0xAB>"], ["␣The", "␣", "⏎", "猫₁", "猫₂", "猫₃"]),
        (["çĮ«", "åĿ", "Ĳ", "<|im_end|>", "å"], ["猫", "坐₁", "坐₂", "<|im_end|>", "å"]),  # a text without spaces
        (["naïve", "déjà", "¿Qué"], ["naïve", "déjà", "¿Qué"]),  # of letters that could be bytes, but are no UTF-8
        (["[CLS]", "naïve", "##ly", "猫"], ["[CLS]", "naïve", "##ly", "猫"]),
        ([" the", "cat ", "a\nb", "\t", 7], ["␣the", "cat␣", "a⏎b", "⇥", "7"]),
        (["Ġx", "naïve", "<|im_end|>"], ["␣x", "naïve", "<|im_end|>"]),  # not all pieces are bytes
    ],
)
def test_pieces_become_text(pieces, text):
    assert text == readable(pieces)


def test_words_and_ids_in_whatever_holds_them():
    ids = np.array([7, 8])
    assert [7, 8] == word_list(ids) == word_list([*ids]) == word_list(iter((7, 8)))
    assert [[7, 8], [7, 8]] == word_list(np.stack([ids, ids])) == word_list([ids, ids])


@pytest.mark.parametrize("tokens", ["a cat", b"a cat", 3, None])
def test_what_is_no_list_of_words(tokens):
    with pytest.raises(TypeError, match=f"key_tokens={tokens!r}: pass a list of words"):
        word_list(tokens, "key_tokens")


def test_what_is_readable_stays_so():
    words = readable(["The", "Ġcat", "Ċ", "ç", "Į", "«"])
    assert words == readable(words)


@pytest.mark.parametrize(
    "text", ["The cat's naïve — 猫が好き 😀!\n\tdéjà vu", "한국어 텍스트", "مرحبا", "\u0000\u007f"]
)
def test_the_text_of_gpt2s_bytes_is_the_text(text):
    """Each byte alone, as GPT-2's tokenizer would write it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    alphabet = {byte: chr(byte) if byte in plain else chr(next(others)) for byte in range(256)}
    pieces = ["Ġ", *(alphabet[byte] for byte in text.encode())]
    characters = [word for word in readable(pieces)[1:] if word[-1:] in "₁" or len(word.strip("₂₃₄")) == len(word)]
    assert text.translate({32: "␣", 10: "⏎", 9: "⇥"}) == "".join(word.strip("₁") for word in characters)


def test_a_word_is_found_with_or_without_its_marker():
    assert [1, 1, 1] == [word_index(word, ["the", "␣cat"]) for word in ("cat", "␣cat", "Ġcat")]
    with pytest.raises(ValueError, match=r"2 tokens 'a', at \[0, 2\]"):
        word_index("a", ["␣a", "b", "␣a"])
    with pytest.raises(ValueError, match="no token 'dog' among 'a'"):
        word_index("dog", ["a"])


def test_bidi_and_control_characters_have_signs():
    assert "a‹202E›b␀" == printable("a\u202eb\0")


@pytest.mark.parametrize(
    ("tokens", "word", "places"),
    [
        (["a</w>", "cat</w>"], "cat", [[1]]),
        (["cat", "er", "pillar</w>", "cat</w>"], "cat", [[3]]),
        (["cat", "er", "pillar</w>"], "Caterpillar", [[0, 1, 2]]),
        (["▁a", "▁black", "▁ca", "t", "▁a"], "black cat", [[1, 2, 3]]),
        (["▁a", "▁ca", "t", "▁a"], "a", [[0], [3]]),
        (["Ġa", "Ġcat", "."], "cat", [[1]]),
        (["[CLS]", "cat", "##s", "cat"], "cat", [[3]]),
        (["[CLS]", "cat", "##s"], "cats", [[1, 2]]),
        (["<s>", "▁The", "▁the"], "the", [[2]]),
        (["<s>", "▁The"], "the", [[1]]),
        (["▁猫", "在", "垫", "子", "上"], "垫子", [[2, 3]]),
        (["a", "red", "cat"], "dog", []),
    ],
)
def test_words_of_several_pieces(tokens: list[str], word: str, places: list[list[int]]) -> None:
    assert Text(tuple(tokens)).find(word) == places

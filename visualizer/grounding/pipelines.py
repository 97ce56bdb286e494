"""What a diffusers pipeline tells: the words that its text encoders were given, and which rows of a batch have them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ..words import Text

_DENOISERS = ("transformer", "unet", "prior", "transformer_2")


@dataclass
class _Encoding:
    """The ids that a text encoder was given in one call."""

    name: str
    """"" for the first encoder, "_2" for the second ..."""
    ids: list[list[int]]
    is_real: list[list[bool]]
    """Which of them are not padding."""


@dataclass
class _Prompt:
    """What `encode_prompt` made of the prompts, or of the negative ones."""

    is_negative: bool
    embeddings: list[Tensor] = field(default_factory=list)
    """(pictures, tokens, width), of each call."""
    encodings: list[_Encoding] = field(default_factory=list)


class Pipeline:
    """Watches the texts of a pipeline, from `start` to `stop`.

    Raises TypeError for what is no pipeline, ValueError for one that has no words.
    """

    def __init__(self, pipeline: Any) -> None:
        name = type(pipeline).__name__
        parts: dict[str, Any] = getattr(pipeline, "components", {})
        found = [parts[part] for part in _DENOISERS if isinstance(parts.get(part), nn.Module)]
        if not found:
            raise TypeError(
                f"{name} is neither an nn.Module nor a pipeline with one that makes pictures: pass a model, or a "
                f"pipeline of diffusers with one of the parts {', '.join(_DENOISERS)}"
            )
        self.denoiser: nn.Module = found[0]
        part = next(part for part in _DENOISERS if parts.get(part) is self.denoiser)
        self._pipeline = pipeline
        self._tokenizers = {
            part.removeprefix("tokenizer"): one
            for part, one in parts.items()
            if part.startswith("tokenizer") and one is not None
        }
        self._encoders = {
            part.removeprefix("text_encoder"): one
            for part, one in parts.items()
            if part.startswith("text_encoder") and isinstance(one, nn.Module)
        }
        if not self._tokenizers or not hasattr(pipeline, "encode_prompt"):
            what = "has no tokenizer" if not self._tokenizers else "does not tell how it encodes a prompt"
            raise ValueError(
                f"{name} has no words for a picture: it {what}, as one that is not given a prompt, or makes no picture "
                f"of it. attention(pipeline.{part}) records its maps; word_maps(pipeline.{part}, tokens=...) has the "
                "tokens that it is given called by these names"
            )
        self._prompts: list[_Prompt] = []
        self._under_way: list[_Encoding] | None = None
        self._first: Any = None
        self._handles: list[Any] = []

    def start(self) -> None:
        """Watch from now on."""
        for name, encoder in self._encoders.items():
            hook = self._noting(name)
            self._handles.append(encoder.register_forward_pre_hook(hook, with_kwargs=True))
        original = self._pipeline.encode_prompt

        @wraps(original)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self._under_way = []
            try:
                made = original(*args, **kwargs)
                self._note(inspect.signature(original).bind_partial(*args, **kwargs).arguments.get("prompt"), made)
            finally:
                self._under_way = None
            return made

        self._pipeline.__dict__["encode_prompt"] = encode_prompt

    def stop(self) -> None:
        """Watch no more."""
        self._pipeline.__dict__.pop("encode_prompt", None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take_prompts(self) -> list[_Prompt]:
        """What was encoded before this denoising; the next prompts are those of a new picture."""
        self._first = None
        return self._prompts

    def _noting(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *(kwargs[key] for key in ("input_ids", "attention_mask") if key in kwargs)]
            matrices = [one for one in given if isinstance(one, Tensor) and one.ndim == 2]
            if self._under_way is None or not matrices or matrices[0].is_floating_point():
                return
            ids = matrices[0].tolist()
            mask = matrices[1] if len(matrices) > 1 and matrices[1].shape == matrices[0].shape else None
            own = self._tokenizers.get(name)
            is_real = [_without_padding(row, own) for row in ids] if mask is None else (mask > 0).tolist()
            self._under_way.append(_Encoding(name, ids, is_real))

        return note

    def _note(self, prompt: Any, made: Any) -> None:
        """Note what one call of `encode_prompt` returned."""
        if self._first is None:  # a new picture
            self._prompts, self._first = [], (prompt,)
        several = made if isinstance(made, (tuple, list)) else [made]
        embeddings = [one for one in several if isinstance(one, Tensor) and one.ndim == 3 and one.is_floating_point()]
        calls = {name: [one for one in self._under_way or () if one.name == name] for name in self._encoders}
        is_other = (prompt,) != self._first  # pipelines with a true guidance call it again for the negative prompt
        for number, tensor in enumerate(embeddings[:2]):
            encodings = [each[number] for each in calls.values() if len(each) > number]
            self._prompts.append(_Prompt(is_other or number == 1, [tensor], encodings))

    def texts(self, prompts: Sequence[_Prompt], is_negative: bool, picture: int, tokens: int) -> list[Text] | None:
        """The words behind that many text tokens of a picture, of each encoder; None where they are not known.

        Encoders of which one's tokens stand behind the other's make several; those whose features stand side by side
        have the same words, and the first counts.
        """
        own = [one for one in prompts if one.is_negative == is_negative]
        encodings = [encoding for one in own for encoding in one.encodings]
        counts = [len(encoding.ids[0]) for encoding in encodings]
        chosen = next(
            (
                [encodings[place] for place in places]
                for several in range(1, len(counts) + 1)
                for places in combinations(range(len(counts)), several)
                if sum(counts[place] for place in places) == tokens
            ),
            [encodings[-1]] if encodings and len(set(counts)) == 1 and counts[0] > tokens else None,
        )
        if chosen is None:
            return None
        pictures = next((len(tensor) for one in own for tensor in one.embeddings), 1)
        texts, start = [], 0
        for encoding in chosen:
            number = picture * len(encoding.ids) // max(1, pictures)
            ids, is_real = encoding.ids[number], encoding.is_real[number]
            # Of more tokens than the layers see, the padding at the end is cut off, or what a template puts before.
            part = slice(-tokens, None) if any(is_real[tokens:]) else slice(tokens)
            ids, is_real = ids[part], is_real[part]
            real = [one for one, is_one in zip(ids, is_real, strict=True) if is_one]
            first = is_real.index(True) if True in is_real else 0
            texts.append(Text.of(real, self._tokenizers.get(encoding.name), start + first))
            start += len(ids)
        return texts


def rows_of(given: Tensor, prompts: Sequence[_Prompt]) -> list[tuple[bool, int]] | None:
    """Of each row of text that a denoiser is given, whether it is the negative prompt, and of which picture.

    None where the rows are no prompt's.
    """
    known = [
        (prompt.is_negative, number, row)
        for prompt in prompts
        for tensor in prompt.embeddings
        if tensor.shape[1:] == given.shape[1:]
        for number, row in enumerate(tensor.detach().to(given.device, given.dtype))
    ]
    found = []
    for row in given.detach():
        place = next((place for place, (_, _, one) in enumerate(known) if torch.equal(one, row)), None)
        if place is None:
            return None
        found.append(known.pop(place)[:2])
    return found


def _without_padding(ids: Sequence[int], tokenizer: Any) -> list[bool]:
    """Which ids are not padding; where the end of a text has the same id, its first one stays."""
    pad, last = getattr(tokenizer, "pad_token_id", None), len(ids)
    while last > 1 and ids[last - 1] == pad:
        last -= 1
    is_end = last < len(ids) and getattr(tokenizer, "eos_token_id", None) == pad
    return [place < last + is_end for place in range(len(ids))]


def tensors_of_text(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What a denoiser was given of its texts: (rows, tokens, width) each."""
    for name, value in arguments.items():
        is_text = "encoder" in name or "context" in name or "prompt" in name or "caption" in name
        if is_text and isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            yield name, value

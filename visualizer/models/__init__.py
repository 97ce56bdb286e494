"""Trained weights, photographs and speech from installed packages, the same everywhere; text models of the hub by name.

Here is a plain vision transformer with its attention decorated, as a user would write it::

    from visualizer import get_local
    from visualizer.models import dinov2_small, photo, prepare

    model = dinov2_small()
    images, pixels = prepare(photo("chelsea"))
    with get_local.activate(), torch.no_grad():
        model(images)
    get_local.cache["PlainAttention.forward"][-1]     # last layer, (1, 6, 1025, 1025)

``dinov2_small`` and ``vit_from_npz`` fill it with trained weights. ``minilm`` loads a small BERT, ``smollm2`` a small
language model, ``rxnmapper`` a model of chemical reactions, ``whisper_tiny`` one of speech. ``load`` loads each of them
by its name in ``MODELS``, or a text model of the hub. ``photo`` and ``speak`` give pictures and sound. If a function
needs more than torch and numpy, it imports that itself, and its error says what to install.
"""

from typing import TYPE_CHECKING, Any

from .names import MODELS, Weights, load
from .pictures import PHOTOS, photo, prepare
from .speech import speak, whisper_tiny
from .texts import minilm, rxnmapper, smollm2
from .weights import dinov2_small, vit_from_npz

if TYPE_CHECKING:
    from .vit import Block, PlainAttention, VisionTransformer

__all__ = [
    "MODELS",
    "PHOTOS",
    "Block",
    "PlainAttention",
    "VisionTransformer",
    "Weights",
    "dinov2_small",
    "load",
    "minilm",
    "photo",
    "prepare",
    "rxnmapper",
    "smollm2",
    "speak",
    "vit_from_npz",
    "whisper_tiny",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: its decorated attention has a key in everybody's `get_local.cache` from then on.
    if name in ("Block", "PlainAttention", "VisionTransformer"):
        from . import vit

        return getattr(vit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

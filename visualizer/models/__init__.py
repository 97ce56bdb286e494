"""Real weights and real pictures out of installed packages: no model hub, the same pictures everywhere.

A plain vision transformer stands here with its attention decorated, as a user would write one::

    from visualizer import get_local
    from visualizer.models import dinov2_small, photo, prepare

    model = dinov2_small()
    images, pixels = prepare(photo("chelsea"))
    with get_local.activate(), torch.no_grad():
        model(images)
    get_local.cache["PlainAttention.forward"][-1]     # last layer, (1, 6, 1025, 1025)

``dinov2_small`` and ``vit_from_npz`` fill it with trained weights, ``minilm`` loads a small BERT, ``smollm2`` a
small language model, and ``load`` any of these by its name in ``MODELS``, or a text model of the hub. Whatever
a function needs beyond torch and numpy it imports itself, and says what to install.
"""

from .names import MODELS, Weights, load
from .pictures import PHOTOS, photo, prepare
from .texts import minilm, smollm2
from .vit import Block, PlainAttention, VisionTransformer
from .weights import dinov2_small, vit_from_npz

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
    "smollm2",
    "vit_from_npz",
]

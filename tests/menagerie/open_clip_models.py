"""Of open_clip: every configuration, with few and narrow layers; those that differ in nothing else are one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from .making import BATCH, NotBuilt, accepted, integers, is_small, normal, prepared, runner

PIXELS = 128
_TOWERS: tuple[dict[str, Any], ...] = (
    {"embed_dim": 64, "num_heads": 4, "depth": 2, "img_size": PIXELS},
    {"depth": 2, "img_size": PIXELS},
    {"img_size": PIXELS},
    {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1)},
    {"embed_dims": (32, 64, 96, 128), "layers": (1, 1, 1, 1)},
    {"embed_dims": (32, 64, 96, 128, 160), "layers": (1, 1, 1, 1, 1)},
    {},
)
_TEXT = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
_TYPES = {"xlm-roberta": "xlm-roberta", "roberta": "roberta", "mt5": "mt5", "nllb": "m2m_100"}


def _shrunk(name: str) -> dict[str, Any]:
    import open_clip

    config: dict[str, Any] = json.loads(json.dumps(open_clip.get_model_config(name)))
    vision, text, both = config["vision_cfg"], config["text_cfg"], config.get("multimodal_cfg", {})
    config["embed_dim"] = 64 if both else 32  # one after the other, and so of one width
    vision["image_size"] = PIXELS
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif isinstance(vision.get("layers"), list):
        vision.update(layers=[1, 1, 1, 1], width=16, **({"heads": 4} if "heads" in vision else {}))
    else:
        vision.update(layers=2, width=64, head_width=16, patch_size=32)
    if "hf_model_name" in text:
        text.update(hf_model_pretrained=False, width=64, context_length=12)
    for part in (text, both):
        if "hf_model_name" not in part and part:
            sizes = {"layers": 2, "width": 64, "heads": 4, "vocab_size": 100, "context_length": 12, "n_queries": 6}
            part.update({key: value for key, value in sizes.items() if key in part or part is text})
    text.pop("n_queries", None)
    return config


def names() -> list[str]:
    """The first name of each configuration."""
    import open_clip

    first: dict[str, str] = {}
    for name in open_clip.list_models():
        first.setdefault(json.dumps(_shrunk(name), sort_keys=True), name)
    return sorted(first.values())


@contextmanager
def _small_towers() -> Iterator[None]:
    """Towers of timm's and transformers' are made with as many of the small sizes as they take; none is loaded."""
    import timm
    from transformers import AutoConfig

    create, load = timm.create_model, AutoConfig.from_pretrained

    def smaller(name: str, **given: Any) -> torch.nn.Module:
        for sizes in _TOWERS:
            with suppress(TypeError, ValueError, RuntimeError, AssertionError, IndexError):
                return create(name, **sizes, **given)
        raise NotBuilt(f"timm does not make {name}")

    def described(name: str, **_: Any) -> Any:
        kind = next(kind for part, kind in _TYPES.items() if part in name)
        return AutoConfig.for_model(kind, **_TEXT, intermediate_size=96, max_position_embeddings=32)

    timm.create_model, AutoConfig.from_pretrained = smaller, described
    try:
        yield
    finally:
        timm.create_model, AutoConfig.from_pretrained = create, load


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on pictures and their texts."""
    import open_clip

    config = _shrunk(name)
    is_custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    made = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
    with _small_towers():
        config = accepted(made, config)
        is_small(lambda: made(**config))
        torch.manual_seed(0)
        model = prepared(made(**config))
    text = integers(95, BATCH, 12, low=5)
    text[:, -1] = 99  # the end of the text has the largest number
    yield made.__name__, model, runner(model, normal(BATCH, 3, PIXELS, PIXELS), text), None

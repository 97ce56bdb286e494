"""Of open_clip: every configuration, with few and narrow layers; those that differ in nothing else are one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from .making import BATCH, integers, is_small, normal, prepared, runner


def _shrunk(name: str) -> dict[str, Any]:
    import open_clip

    config: dict[str, Any] = json.loads(json.dumps(open_clip.get_model_config(name)))
    config["embed_dim"] = 32
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    elif isinstance(vision.get("layers"), list):
        vision.update(layers=[1, 1, 1, 1], width=16, image_size=64, **({"heads": 4} if "heads" in vision else {}))
    else:
        vision.update(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
    for part in (text, config.get("multimodal_cfg", {})):
        if "hf_model_name" not in part and part:
            sizes = {"layers": 2, "width": 64, "heads": 4, "vocab_size": 100, "context_length": 12}
            part.update({key: value for key, value in sizes.items() if key in part or part is text})
    return config


def names() -> list[str]:
    """The first name of each configuration."""
    import open_clip

    first: dict[str, str] = {}
    for name in open_clip.list_models():
        first.setdefault(json.dumps(_shrunk(name), sort_keys=True), name)
    return sorted(first.values())


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on pictures and their texts."""
    import open_clip

    config = _shrunk(name)
    config.pop("custom_text", None)
    classes = {"multimodal_cfg": open_clip.CoCa}
    made = classes.get(next(iter(set(config) & set(classes)), ""), open_clip.CustomTextCLIP)
    if (
        made is open_clip.CustomTextCLIP
        and not {"timm_model_name"} & set(config["vision_cfg"])
        and "hf_model_name" not in config["text_cfg"]
    ):
        made = open_clip.CLIP if not _shrunk(name).get("custom_text") else open_clip.CustomTextCLIP
    config = {
        key: value
        for key, value in config.items()
        if key
        in (
            "embed_dim",
            "vision_cfg",
            "text_cfg",
            "multimodal_cfg",
            "quick_gelu",
            "init_logit_bias",
            "init_logit_scale",
            "nonscalar_logit_scale",
        )
    }
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    is_small(lambda: made(**config))
    torch.manual_seed(0)
    model = prepared(made(**config))
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    length = config["text_cfg"].get("context_length", 77)
    text = integers(95, BATCH, length, low=5)
    text[:, -1] = 99  # the end of the text has the largest number
    yield made.__name__, model, runner(model, normal(BATCH, 3, size, size), text), None

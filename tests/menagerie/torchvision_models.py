"""Of torchvision: its transformers, with few and narrow layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .making import BATCH, normal, prepared, runner


def _swin(block: str, norm_3d: bool = False) -> Any:
    from torchvision.models import swin_transformer as swin
    from torchvision.models.video import swin_transformer as swin3d

    sizes: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 7}
    if norm_3d:
        return swin3d.SwinTransformer3d([2, 4, 4], window_size=[4, 4, 4], **sizes)
    if block == "v2":
        more = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        return swin.SwinTransformer([4, 4], window_size=[4, 4], **sizes, **more)
    return swin.SwinTransformer([4, 4], window_size=[4, 4], **sizes)


def _vit() -> Any:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7)


def _maxvit() -> Any:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=7)


def _mvit(name: str) -> Any:
    from torchvision.models.video import mvit

    blocks = [
        mvit.MSBlockConfig(heads, given, made, [3, 3, 3], [3, 3, 3], [1, stride, stride], [1, 2, 2])
        for heads, given, made, stride in ((2, 16, 16, 1), (2, 16, 32, 2), (4, 32, 32, 1))
    ]
    more = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    sizes: dict[str, Any] = {"spatial_size": (32, 32), "temporal_size": 4, "num_classes": 7}
    if name == "v1":
        more = dict.fromkeys(more, False)
    return mvit.MViT(**sizes, block_setting=blocks, **more)


_MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "vit": (_vit, (3, 32, 32)),
    "swin": (partial(_swin, "v1"), (3, 64, 64)),
    "swin_v2": (partial(_swin, "v2"), (3, 64, 64)),
    "swin3d": (partial(_swin, "v1", True), (3, 8, 64, 64)),
    "maxvit": (_maxvit, (3, 64, 64)),
    "mvit_v1": (partial(_mvit, "v1"), (3, 4, 32, 32)),
    "mvit_v2": (partial(_mvit, "v2"), (3, 4, 32, 32)),
}


def names() -> list[str]:
    """Every kind of transformer in it."""
    return sorted(_MODELS)


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on a picture or a film."""
    make, shape = _MODELS[name]
    torch.manual_seed(0)
    model = prepared(make())
    yield " x ".join(map(str, shape)), model, runner(model, normal(BATCH, *shape)), None

"""Of x-transformers: a small model for each switch that its attention and its layers have."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from .making import BATCH, integers, normal, prepared, runner

_VALUES = {
    "attn_sparse_topk": 3,
    "attn_num_mem_kv": 4,
    "attn_kv_heads": 2,
    "attn_value_dim_head": 8,
    "attn_max_attend_past": 3,
    "shift_tokens": 1,
    "sandwich_coef": 1,
    "par_ratio": 2,
    "num_residual_streams": 2,
}
_BASES = (
    "encoder",
    "decoder",
    "cross",
    "flash encoder",
    "flash decoder",
    "flash cross",
    "vit",
    "continuous",
    "xl",
    "prefix_lm",
)


def names() -> list[str]:
    """The kinds of models, and a decoder for each switch."""
    from x_transformers.x_transformers import Attention, AttentionLayers

    switches = []
    for function, prefix in ((Attention.__init__, "attn_"), (AttentionLayers.__init__, "")):
        for key, one in inspect.signature(function).parameters.items():
            if one.default is False and key not in (
                "causal",
                "flash",
                "cross_attend",
                "only_cross",
                "verbose",
                "onnxable",
            ):
                switches.append(prefix + key)
    return [one.replace(" ", "-") for one in _BASES] + sorted({*switches, *_VALUES})


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on tokens, or on a picture."""
    import x_transformers as library

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
    words: dict[str, Any] = {"num_tokens": 100, "max_seq_len": 16}
    tokens = integers(100, BATCH, 12)
    base = name.removeprefix("flash-")
    if base != name:
        sizes["attn_flash"] = True
    if base == "encoder":
        model, inputs = library.TransformerWrapper(**words, attn_layers=library.Encoder(**sizes)), (tokens,)
    elif base == "cross":
        layers = library.Decoder(**sizes, cross_attend=True)
        model = library.TransformerWrapper(**words, attn_layers=layers)
        yield name, prepared(model), runner(model, tokens, context=normal(BATCH, 7, 32)), None
        return
    elif base == "vit":
        model = library.ViTransformerWrapper(
            image_size=32, patch_size=8, num_classes=7, attn_layers=library.Encoder(**sizes)
        )
        inputs = (normal(BATCH, 3, 32, 32),)
    elif base == "continuous":
        layers = library.Encoder(**sizes)
        model = library.ContinuousTransformerWrapper(dim_in=5, dim_out=6, max_seq_len=16, attn_layers=layers)
        inputs = (normal(BATCH, 12, 5),)
    elif base == "xl":
        layers = library.Decoder(**sizes, rel_pos_bias=True)
        model, inputs = library.TransformerWrapper(**words, max_mem_len=8, attn_layers=layers), (tokens,)
    elif base == "prefix_lm":
        model = library.TransformerWrapper(**words, attn_layers=library.PrefixDecoder(**sizes))
        inputs = (tokens,)
    else:
        switch = {} if base == "decoder" else {name: _VALUES.get(name, True)}
        model, inputs = library.TransformerWrapper(**words, attn_layers=library.Decoder(**sizes, **switch)), (tokens,)
    model = prepared(model)
    run = runner(model, *inputs)
    with torch.no_grad():
        run()
    yield name, model, run, None

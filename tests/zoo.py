"""Small models of timm and transformers, with random weights."""

import pytest
import torch

IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
PADDING = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
VIT = SIZE | {"image_size": 32, "patch_size": 16}
SMALL = {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 4}
GPT2 = TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4}


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def timm_model(name, fused=False, **options):
    import timm
    from timm.layers import set_fused_attn, use_fused_attn

    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(fused)
    try:
        return timm.create_model(name, **options).eval()
    finally:
        set_fused_attn(*before)


def transformers_model(name, head="Model", since=(5, 0), attention="eager", **options):
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < since:
        pytest.skip(f"before transformers {since}, {name} has or returns its maps otherwise")
    config = getattr(transformers, f"{name}Config")(attn_implementation=attention, **options)
    return getattr(transformers, name + head)(config).eval()

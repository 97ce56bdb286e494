"""Small random pipelines of diffusers, made as its own tests make them, and their weights by a plain loop."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

WORDS = ("a", "cat", "on", "the", "mat", "red", "dog", "pillar", "er")
PROMPT = "a red cat on the caterpillar"
"""In CLIP's small vocabulary here "caterpillar" has three pieces."""


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges, merged = [], set(pieces)

    def learn(word: str, end: str) -> None:
        symbols = [*word[:-1], word[-1] + end]
        while len(symbols) > 1:
            merge = symbols[0], symbols[1]
            symbols[:2] = ["".join(merge)]
            if symbols[0] not in merged:
                merged.add(symbols[0])
                pieces.append(symbols[0])
                merges.append(merge)

    for word in ("cat", "on", "the", "mat", "red", "dog", "pillar"):
        learn(word, "</w>")
    learn("cat", "")
    learn("er", "")
    vocab = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in WORDS), "er", "pillar", "▁cater", "s", "▁"]
    return T5Tokenizer(vocab=[(piece, -float(number)) for number, piece in enumerate(pieces)], extra_ids=0)


def clip(width: int = 32, projected: bool = False) -> dict[str, Any]:
    """A text encoder and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": width, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPTextConfig(vocab_size=200, projection_dim=width, **sizes, **ends)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return {"text_encoder": kind(config), "tokenizer": tokenizer}


def t5() -> dict[str, Any]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return {"text_encoder": T5EncoderModel(config), "tokenizer": t5_tokenizer()}


def gemma() -> dict[str, Any]:
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(vocab_size=64, num_key_value_heads=2, head_dim=4, **sizes)
    return {"text_encoder": Gemma2Model(config), "tokenizer": t5_tokenizer()}


def vae(kind: str = "AutoencoderKL", channels: int = 4, blocks: int = 2, **more: Any) -> Any:
    return of_diffusers(kind)(
        block_out_channels=[4, 8, 8, 8][:blocks],
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        latent_channels=channels,
        **more,
    )


FLOW_VAE = {"shift_factor": 0.0609, "scaling_factor": 1.5035, "use_quant_conv": False, "use_post_quant_conv": False}


def unet(**more: Any) -> Any:
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "sample_size": 32, "norm_num_groups": 2}
    return of_diffusers("UNet2DConditionModel")(**sizes, **more)


def of_diffusers(name: str) -> Any:
    return getattr(pytest.importorskip("diffusers"), name)


def pipeline(kind: str, *encoders: dict[str, Any], scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline of these parts and text encoders, the second of which is its text_encoder_2 and so on."""
    for number, encoder in enumerate(encoders):
        parts |= {name + (f"_{number + 1}" if number else ""): part for name, part in encoder.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    scheduler = of_diffusers("FlowMatchEulerDiscreteScheduler")() if scheduler is None else scheduler
    return of_diffusers(kind)(scheduler=scheduler, **parts)


def denoiser_of(name: str) -> Any:
    """The transformer or UNet of one of these pipelines."""
    made = globals()[name]()
    return getattr(made, "transformer", None) or made.unet


UNSAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def stable_diffusion() -> Any:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    return pipeline(
        "StableDiffusionPipeline",
        clip(),
        unet=unet(cross_attention_dim=32, attention_head_dim=4, **blocks),
        scheduler=of_diffusers("DDIMScheduler")(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        vae=vae(),
        **UNSAFE,
    )


def stable_diffusion_xl() -> Any:
    return pipeline(
        "StableDiffusionXLPipeline",
        clip(),
        clip(projected=True),
        unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
        ),
        scheduler=of_diffusers("EulerDiscreteScheduler")(steps_offset=1, timestep_spacing="leading"),
        vae=vae(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
    text = {"caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 64}
    return pipeline(
        "StableDiffusion3Pipeline",
        clip(projected=True),
        clip(projected=True),
        t5(),
        transformer=of_diffusers("SD3Transformer2DModel")(
            sample_size=32, patch_size=1, in_channels=4, out_channels=4, **heads, **text
        ),
        vae=vae(**FLOW_VAE),
    )


def flux() -> Any:
    heads = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return pipeline(
        "FluxPipeline",
        clip(),
        t5(),
        transformer=of_diffusers("FluxTransformer2DModel")(patch_size=1, in_channels=4, **heads, **text),
        vae=vae(channels=1, **FLOW_VAE),
    )


def pixart() -> Any:
    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3, "cross_attention_dim": 24}
    return pipeline(
        "PixArtAlphaPipeline",
        t5(),
        transformer=of_diffusers("PixArtTransformer2DModel")(
            sample_size=8, patch_size=2, out_channels=8, caption_channels=32, use_additional_conditions=False, **heads
        ),
        scheduler=of_diffusers("DDIMScheduler")(),
        vae=vae(),
    )


def hunyuan_dit() -> Any:
    heads = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3, "hidden_size": 24}
    text = {"cross_attention_dim": 32, "cross_attention_dim_t5": 32, "pooled_projection_dim": 16}
    return pipeline(
        "HunyuanDiTPipeline",
        clip(),
        t5(),
        transformer=of_diffusers("HunyuanDiT2DModel")(sample_size=8, patch_size=2, in_channels=4, **heads, **text),
        scheduler=of_diffusers("DDPMScheduler")(),
        vae=vae(blocks=4),
        **UNSAFE,
    )


def kandinsky_3() -> Any:
    return pipeline(
        "Kandinsky3Pipeline",
        t5(),
        unet=of_diffusers("Kandinsky3UNet")(
            block_out_channels=(8, 16),
            groups=2,
            layers_per_block=2,
            attention_head_dim=4,
            time_embedding_dim=16,
            cross_attention_dim=16,
            encoder_hid_dim=32,
        ),
        scheduler=of_diffusers("DDPMScheduler")(),
        movq=vae("VQModel"),
    )


def lumina() -> Any:
    heads = {"hidden_size": 8, "num_layers": 2, "num_attention_heads": 1, "num_kv_heads": 1}
    places = {"axes_dim_rope": [4, 2, 2], "axes_lens": [300, 64, 64]}
    return pipeline(
        "Lumina2Pipeline",
        gemma(),
        transformer=of_diffusers("Lumina2Transformer2DModel")(
            sample_size=4, patch_size=2, in_channels=4, multiple_of=16, cap_feat_dim=8, **heads, **places
        ),
        vae=vae(shift_factor=0.0),
    )


def wan() -> Any:
    heads = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32}
    blocks = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    return pipeline(
        "WanPipeline",
        t5(),
        transformer=of_diffusers("WanTransformer3DModel")(text_dim=32, freq_dim=256, rope_max_seq_len=32, **heads),
        scheduler=of_diffusers("FlowMatchEulerDiscreteScheduler")(shift=7.0),
        vae=of_diffusers("AutoencoderKLWan")(base_dim=3, z_dim=16, **blocks),
    )


def ltx() -> Any:
    heads = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32}
    blocks = {f"{part}block_out_channels": (8,) * 4 for part in ("", "decoder_")}
    blocks |= {f"{part}layers_per_block": (1,) * 5 for part in ("", "decoder_")}
    blocks |= {f"{part}spatio_temporal_scaling": (True, True, False, False) for part in ("", "decoder_")}
    return pipeline(
        "LTXPipeline",
        t5(),
        transformer=of_diffusers("LTXVideoTransformer3DModel")(
            in_channels=8, out_channels=8, caption_channels=32, **heads
        ),
        vae=of_diffusers("AutoencoderKLLTXVideo")(latent_channels=8, patch_size=1, **blocks),
    )


def weights_by_hand(pipeline: Any, **arguments: Any) -> tuple[list[torch.Tensor], Any]:
    """The weights of each attention call of the denoiser, (batch, heads, queries, keys), and the pipeline's output.

    Each fused kernel is replaced by its formula, as in an eager attention processor.
    """
    found: list[torch.Tensor] = []
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    is_inside = [False]
    original = F.scaled_dot_product_attention

    def eager(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **more: Any) -> Any:
        if not is_inside[0]:
            return original(query, key, value, attn_mask, *rest, **more)
        if more.get("enable_gqa"):
            key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        scale = more.get("scale") or query.shape[-1] ** -0.5
        scores = query @ key.transpose(-2, -1) * scale
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        found.append(weights)
        return weights @ value

    def enter(*_: Any) -> None:
        is_inside[0] = True

    def leave(*_: Any) -> None:
        is_inside[0] = False

    handles = [denoiser.register_forward_pre_hook(enter), denoiser.register_forward_hook(leave)]
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", eager), torch.no_grad():
            made = pipeline(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found, made

"""Small random vision-language models of transformers, with a prompt for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 64}
VISION = {**SMALL, "patch_size": 4}
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<vision>",
    "</vision>",
    "<image>",
    "<video>",
    "▁a",
    "▁cat",
    "▁dog",
    "▁ca",
    "terpillar",
]
WORDS += ["<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>", "<global-img>"]
IMAGE, VIDEO, CAT = 5, 6, 8


def prompt(*ids: Any, **more: Any) -> dict[str, Any]:
    """`ids` are numbers, and pairs (id, how often)."""
    row = [one for item in ids for one in ([item[0]] * item[1] if isinstance(item, tuple) else [item])]
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long), **more}


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def grid(first: int, rows: int, columns: int, step: int | None = None) -> torch.Tensor:
    """Token numbers row by row, `step` from row to row."""
    return first + torch.arange(rows)[:, None] * (columns if step is None else step) + torch.arange(columns)


def llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=12),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=9,
    )
    given = prompt(1, (IMAGE, 18), 7, CAT, (IMAGE, 9), 9, pixel_values=pixels(3, 3, 12, 12))
    return transformers.LlavaForConditionalGeneration(config), given, [[grid(first, 3, 3)] for first in (1, 10, 21)]


def llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=12),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[12, 24], [24, 12], [24, 24]],
    )
    # 24 x 16 pixels fill 6 x 4 patches of four tiles; each row has a token at its end.
    given = prompt(
        1, (IMAGE, 9 + 6 * 5), 7, CAT, pixel_values=pixels(1, 5, 3, 12, 12), image_sizes=torch.tensor([[24, 16]])
    )
    views = [grid(1, 3, 3), grid(10, 6, 4, step=5)]
    return transformers.LlavaNextForConditionalGeneration(config), given, [views]


def _qwen(name: str, vision: dict[str, Any], has_video: bool = False, **text: Any) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3, **vision}
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, **text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    given = prompt(
        *(1, 3, (IMAGE, 6), 4, 7, 3, (IMAGE, 4), 4, 3, (VIDEO, 8 * has_video), 4, CAT),
        pixel_values=pixels(24 + 16, 3 * 2 * 16),
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 4]]),
    )
    pictures = [[grid(2, 2, 3)], [grid(11, 2, 2)]]
    if has_video:  # of two frames
        given |= {"pixel_values_videos": pixels(32, 3 * 2 * 16), "video_grid_thw": torch.tensor([[2, 4, 4]])}
        pictures.append([torch.stack([grid(17, 2, 2), grid(21, 2, 2)])])
    given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).long() + 2 * (given["input_ids"] == VIDEO)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), given, pictures


def qwen2_vl() -> Any:
    return _qwen("Qwen2VL", {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2}, has_video=True)


def qwen2_5_vl() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "window_size": 16}
    return _qwen("Qwen2_5_VL", {**vision, "fullatt_block_indexes": [1]})


def qwen3_vl() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "num_position_embeddings": 16}
    return _qwen("Qwen3VL", {**vision, "deepstack_visual_indexes": [0]}, head_dim=8)


def gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **TEXT, head_dim=8, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=3,
        eoi_token_index=4,
    )
    given = prompt(1, 3, (IMAGE, 4), 4, 7, CAT, pixel_values=pixels(1, 3, 16, 16))
    given["token_type_ids"] = (given["input_ids"] == IMAGE).long()
    return transformers.Gemma3ForConditionalGeneration(config), given, [[grid(2, 2, 2)]]


def paligemma() -> Any:
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16, projection_dim=16),
        projection_dim=16,
        hidden_size=16,
        image_token_index=IMAGE,
    )
    given = prompt((IMAGE, 16), 1, 7, CAT, pixel_values=pixels(1, 3, 16, 16))
    given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    return transformers.PaliGemmaForConditionalGeneration(config), given, [[grid(0, 4, 4)]]


def _idefics(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vision_config={**VISION, "image_size": 16},
        text_config={"model_type": "llama", **TEXT, "pad_token_id": 0},
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    # Four tiles of 2 x 2 tokens, and the whole picture.
    tiles = [one for number in (12, 13, 14, 15) for one in (3, number, (IMAGE, 4))]
    given = prompt(1, *tiles, 3, 16, (IMAGE, 4), 3, 7, CAT, pixel_values=pixels(1, 5, 3, 16, 16))
    firsts = [3, 9, 15, 21]
    lines = [torch.cat([grid(one, 2, 2) for one in pair], 1) for pair in (firsts[:2], firsts[2:])]
    return getattr(transformers, f"{name}ForConditionalGeneration")(config), given, [[grid(27, 2, 2), torch.cat(lines)]]


def idefics3() -> Any:
    return _idefics("Idefics3")


def smolvlm() -> Any:
    return _idefics("SmolVLM")


def internvl() -> Any:
    config = transformers.InternVLConfig(
        vision_config={**VISION, "image_size": (16, 16), "patch_size": (4, 4)},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    given = prompt(1, 3, (IMAGE, 12), 4, 7, CAT, pixel_values=pixels(3, 3, 16, 16))  # two tiles, and the whole of it
    return transformers.InternVLForConditionalGeneration(config), given, [[grid(10, 2, 2)]]


def florence2() -> Any:
    four = {"embed_dim": (8, 8, 8, 16), "num_heads": (2,) * 4, "num_groups": (2,) * 4, "depths": (1,) * 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.Florence2Config(
        vision_config={**four, "patch_stride": (4, 2, 1, 1), "window_size": 4, "projection_dim": 16},
        text_config=transformers.BartConfig(
            **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 64, **ids},
            **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in HEADS.items()},
        ),
        image_token_id=IMAGE,
    )
    # The mean of all patches stands before them.
    given = prompt((IMAGE, 10), 1, 7, CAT, pixel_values=pixels(1, 3, 24, 24))
    return transformers.Florence2ForConditionalGeneration(config), given, [[grid(1, 3, 3)]]


HEADS = {"attention_heads": 2, "ffn_dim": 16}


def _blip2(**text: Any) -> Any:
    config = transformers.Blip2Config(
        vision_config={**VISION, "image_size": 16, "initializer_range": 0.02},
        qformer_config={**SMALL, "num_hidden_layers": 3, "vocab_size": 64, "encoder_hidden_size": 16},
        text_config={**text, "vocab_size": 64},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    former = Formed([0, 1, 2, 3], grid(1, 4, 4), "crossattention.attention")
    return model, prompt((IMAGE, 4), 1, 7, CAT, pixel_values=pixels(1, 3, 16, 16)), [former]


def blip2() -> Any:
    return _blip2(model_type="opt", **SMALL, ffn_dim=16, word_embed_proj_dim=16)


def blip2_t5() -> Any:
    return _blip2(model_type="t5", d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)


def kosmos2() -> Any:
    config = transformers.Kosmos2Config(
        text_config={"embed_dim": 16, "layers": 2, "vocab_size": 64, **HEADS},
        vision_config={**VISION, "image_size": 16},
        latent_query_num=4,
    )
    given = prompt(0, 3, (20, 4), 4, 7, CAT, pixel_values=pixels(1, 3, 16, 16))
    given["image_embeds_position_mask"] = (given["input_ids"] == 20).long()
    return transformers.Kosmos2ForConditionalGeneration(config), given, [Formed([2, 3, 4, 5], grid(1, 4, 4), "x_attn")]


class Formed(NamedTuple):
    """A picture behind a query former."""

    tokens: list[int]
    """Of the text."""
    patches: torch.Tensor
    """The grid of them among the keys of the former."""
    module: str
    """The end of the paths of its modules that attend to them."""


FAMILIES = (
    *(llava, llava_next, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3, paligemma, idefics3, smolvlm, internvl),
    *(florence2, blip2, blip2_t5, kosmos2),
)


class Tokenizer:
    """What is asked of a tokenizer of transformers."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [WORDS[one] if one < len(WORDS) else f"▁w{one}" for one in ids]

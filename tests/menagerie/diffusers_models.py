"""Of diffusers: every model class, its arguments and inputs made from their names."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .making import BATCH, NotBuilt, fitted, in_words, integers, is_small, normal, prepared, runner

HEAD, HEADS, CHANNELS, WORDS, TEXT = 16, 2, 8, 7, 32
_UNKNOWN = 10**6

_LAYERS = (
    "num_layers",
    "num_single_layers",
    "n_layers",
    "depth",
    "num_hidden_layers",
    "nlayers",
    "n_layer",
    "num_refiner_layers",
)
_LAYERS += (
    "n_refiner_layers",
    "num_visual_blocks",
    "num_text_blocks",
    "num_layers_refiner",
    "num_mmdit_layers",
    "num_single_dit_layers",
)
_LAYERS += (
    "vace_num_layers",
    "decoder_num_hidden_layers",
    "encoder_num_hidden_layers",
    "num_text_layers",
    "perceiver_num_layers",
)
_TEXT = ("joint_attention_dim", "text_dim", "text_embed_dim", "cross_attention_dim", "caption_channels", "cap_feat_dim")
_TEXT += (
    "context_in_dim",
    "encoder_hidden_dim",
    "caption_dim",
    "cross_attention_input_dim",
    "text_hidden_dim",
    "in_text_dim",
)
_TEXT += (
    "pooled_projection_dim",
    "in_visual_dim2",
    "text_encoder_dim",
    "encoder_hidden_size",
    "cond_embed_dim",
    "pooled_embed_dim",
)
_TEXT += (
    "cross_attention_dim_t5",
    "text_states_dim",
    "condition_embed_dim",
    "context_dim",
    "global_cond_dim",
    "cond_token_dim",
    "embedding_dim",
)
_WIDTH = (
    "hidden_size",
    "dim",
    "inner_dim",
    "embed_dim",
    "token_dim",
    "model_dim",
    "caption_projection_dim",
    "d_model",
    "hidden_dim",
)
_HEADS = ("num_attention_heads", "n_heads", "num_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads", "nheads")
_HEADS += ("num_cross_attention_heads", "n_head", "num_key_value_attention_heads", "decoder_num_attention_heads")

_ROTARY = ("axes_dims_rope", "axes_dims", "rope_axes_dim", "axes_dim", "axes_dim_rope", "rope_dim_list")


def names() -> list[str]:
    """Every model class; those that join several of the others, or only project, are not models of their own."""
    import diffusers

    found = []
    for name in dir(diffusers):
        one = getattr(diffusers, name, None)
        if inspect.isclass(one) and issubclass(one, torch.nn.Module) and hasattr(one, "config_name"):
            if "Multi" not in name and name not in ("ModelMixin", "AutoModel", "EMAModel"):
                found.append(name)
    return sorted(found)


def _argument(key: str, value: Any, narrow: bool) -> Any:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if key in _LAYERS and is_number:
        return min(value, 2)
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, int) for one in value):
        if key.endswith(("block_out_channels", "channels")):
            return type(value)([32, *[64 if len({*value}) > 1 else 32] * (len(value) - 1)])
        if key.endswith("layers_per_block"):
            return type(value)([1] * len(value))
    if key.endswith("layers_per_block") and is_number:
        return 1
    if not narrow:
        return value
    if key in _HEADS and is_number:
        return HEADS
    if key in ("attention_head_dim", "head_dim", "cross_attention_head_dim", "linear_head_dim") and is_number:
        return HEAD
    if key in _ROTARY and isinstance(value, (tuple, list)):
        return type(value)({2: [8, 8], 3: [4, 6, 6], 4: [4, 4, 4, 4]}.get(len(value), value))
    if key in ("axes_lens",) and isinstance(value, (tuple, list)):
        return type(value)([64] * len(value))
    if key in _WIDTH and is_number:
        return HEAD * HEADS
    if (key in _TEXT or key.endswith(("_text_dim", "text_in_dim"))) and is_number:
        return TEXT
    if (
        key
        in ("in_channels", "out_channels", "latent_channels", "in_visual_dim", "out_visual_dim", "in_dim", "out_dim")
        and is_number
    ):
        return min(value, CHANNELS)
    if (
        key in ("sample_size", "sample_height", "sample_width", "pos_embed_max_size", "base_height", "base_width")
        and is_number
    ):
        return 8
    if key == "sample_frames" and is_number:
        return 17  # five of latents
    if key in ("max_text_seq_length", "num_embeddings") and is_number:
        return WORDS
    if key == "patch_size" and value == _UNKNOWN:
        return 2
    if key == "norm_num_groups" and is_number:
        return min(value, 8)
    if key in ("ffn_dim", "intermediate_size", "ff_dim", "ffn_hidden_size") and is_number:
        return 48
    if (
        key
        in ("freq_dim", "time_embed_dim", "time_step_dim", "time_proj_dim", "condition_dim", "approximator_hidden_dim")
        and is_number
    ):
        return 32
    if key in ("vocab_size", "codebook_size", "num_vq_embeddings", "num_embeds_ada_norm") and is_number:
        return min(value, 100)
    if key in ("num_experts", "num_routed_experts") and is_number:
        return min(value, 4)
    if isinstance(value, list) and key.endswith("_layers") and value and all(isinstance(one, int) for one in value):
        return [0]
    return value


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """The model on pictures, films or sequences of latents, whichever it takes."""
    import diffusers

    made = getattr(diffusers, name)
    errors: list[str] = []
    until = time.process_time() + 6
    for narrow, fills in ((True, False), (True, True), (False, True)):
        arguments = _arguments(made, narrow, fills)
        arguments.update(_OWN.get(name, {}) if narrow else {})

        def make() -> torch.nn.Module:
            return made(**arguments)

        try:
            is_small(make)
            torch.manual_seed(0)
            model = prepared(make())
            with torch.no_grad():  # many begin as the identity: gates of zeros
                for parameter in model.parameters():
                    if not parameter.any():
                        parameter.normal_(std=0.1)
        except Exception as error:
            errors.append(in_words(error))
            continue
        ways = [*_inputs(model)]
        mended = {"picture", "sequence", "film", "frames", "channels first"}  # those that errors can change
        again = [one for one in ways if one[0] in mended]
        for number, (label, inputs) in enumerate([*ways, *again]):
            if time.process_time() > until:
                break
            try:
                inputs = inputs if number < len(ways) else fitted(model, inputs, partial(_further, model))
                run = runner(model, **inputs)
                with torch.no_grad():
                    run()
            except Exception as error:
                errors.append(f"{label}: {in_words(error)}")
                continue
            yield label, model, run, None
            return
    raise NotBuilt("; ".join(dict.fromkeys(errors)))


def _arguments(made: Any, narrow: bool, fills: bool) -> dict[str, Any]:
    """What a class is made with: small, and with numbers where it has None or no default."""
    arguments = {}
    for key, one in list(inspect.signature(made.__init__).parameters.items())[1:]:
        if one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            continue
        if one.default is one.empty or (fills and one.default is None and "int" in str(one.annotation)):
            kind = str(one.annotation)
            value = _argument(key, _UNKNOWN, True)
            if value == _UNKNOWN:
                value = {"bool": False, "float": 1.0, "str": None}.get(kind, 32) if one.default is one.empty else None
            if value is not None and ("tuple" in kind.lower() or "list" in kind.lower()) and "int" not in kind[:4]:
                value = (32, 64) if "channels" in key else (1, 1)
        else:
            value = _argument(key, one.default, narrow)
        if value is not one.default and value is not None:
            arguments[key] = value
    return arguments


def _further(model: Any, key: str, given: dict[str, Any]) -> Any:
    """An input that a model says it misses, by its name and annotation."""
    first = next(value for value in given.values() if isinstance(value, torch.Tensor))
    config, kind = dict(model.config), str(inspect.signature(model.forward).parameters[key].annotation)
    known = _input(key, first, CHANNELS, TEXT, torch.tensor([3] * BATCH), config)
    if known is not None or kind.startswith("bool"):
        return known
    if "mask" in key:
        return torch.ones(BATCH, WORDS, dtype=torch.bool)
    if "time" in key or key.endswith("_r") or "seconds" in key:
        return torch.tensor([0.3] * BATCH)
    if key.endswith(("ids", "id", "tokens", "indices", "indicator", "index")):
        return integers(4, BATCH, WORDS)
    if "text" in key or "pooled" in key or "condition" in key or "embed" in key or "encoder" in key:
        return normal(BATCH, WORDS, TEXT)
    if kind.startswith(("int", "int |", "typing.Optional[int]")):
        return 4
    return first.clone() if "Tensor" in kind else None


_OWN: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"mid_block_add_attention": True, "block_out_channels": (32,)},
    "UNet2DConditionModel": {"attention_head_dim": 4, "sample_size": 16},
    "UNet2DModel": {"attention_head_dim": 8, "block_out_channels": (32, 32, 64, 64)},
    "ControlNetModel": {"attention_head_dim": 4},
}


def _inputs(model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    parameters = inspect.signature(model.forward).parameters
    config = dict(model.config)
    channels = config.get("in_channels") or config.get("in_visual_dim") or config.get("input_channels") or CHANNELS
    text = next((config[key] for key in _TEXT if isinstance(config.get(key), int)), TEXT)
    grid = (8, 8)
    shapes: dict[str, Any] = {
        "picture": normal(BATCH, channels, *grid),
        "sequence": normal(BATCH, 16, channels),
        "film": normal(BATCH, channels, 5, *grid),
        "frames": normal(BATCH, 5, channels, *grid),
        "vector": normal(BATCH, text),
        "film of channels last": normal(BATCH, 5, *grid, channels),
        "channels first": normal(BATCH, channels, 16),
        "32 pixels": normal(BATCH, channels, 32, 32),
        "film of 32 pixels": normal(BATCH, channels, 9, 32, 32),
        "list": [normal(channels, 1, *grid)] * BATCH,
    }
    first = next((key for key in ("hidden_states", "sample", "x", "input_ids") if key in parameters), None)
    for label, states in shapes.items():
        for moment in (torch.tensor([3] * BATCH), torch.tensor([0.3] * BATCH)):
            made: dict[str, Any] = {}
            for key, one in parameters.items():
                value = _input(key, states, channels, text, moment, config)
                is_optional = one.default is not one.empty
                if key == first:
                    value = (
                        integers(50, BATCH, *((8, 8) if label == "picture" else (16,)))
                        if key == "input_ids"
                        else states
                    )
                if value is not None and (not is_optional or key in _WANTED):
                    made[key] = value
            yield label, made


_WANTED = {
    "control_hidden_states",
    "timestep",
    "encoder_hidden_states",
    "pooled_projections",
    "img_ids",
    "txt_ids",
    "guidance",
    "encoder_attention_mask",
}
_WANTED |= {
    "controlnet_cond",
    "num_frames",
    "height",
    "width",
    "rope_interpolation_scale",
    "added_cond_kwargs",
    "class_labels",
}
_WANTED |= {"attention_mask", "img_shapes", "txt_seq_lens", "encoder_hidden_states_mask", "fps", "global_hidden_states"}


def _input(key: str, states: Any, channels: int, text: int, time: Any, config: dict[str, Any]) -> Any:
    tokens = 16
    pooled = config.get("pooled_projection_dim") or config.get("pooled_embed_dim") or text
    known: dict[str, Any] = {
        "timestep": time,
        "t": time,
        "timesteps": time,
        "encoder_hidden_states": normal(BATCH, WORDS, text),
        "cap_feats": [normal(WORDS, text)] * BATCH,
        "pooled_projections": normal(BATCH, pooled),
        "guidance": torch.tensor([3.0] * BATCH) if config.get("guidance_embeds") else None,
        "img_ids": torch.zeros(tokens, len(config.get("axes_dims_rope") or (1, 1, 1))),
        "txt_ids": torch.zeros(WORDS, len(config.get("axes_dims_rope") or (1, 1, 1))),
        "encoder_attention_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
        "attention_mask": None,
        "encoder_hidden_states_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
        "controlnet_cond": states,
        "num_frames": 4 if "num_frames" not in config else None,
        "height": 2,
        "width": 2,
        "img_shapes": [[(1, 4, 4)]] * BATCH,
        "txt_seq_lens": [WORDS] * BATCH,
        "original_size": torch.tensor([[64.0, 64.0]] * BATCH),
        "target_size": torch.tensor([[64.0, 64.0]] * BATCH),
        "crop_coords": torch.tensor([[0.0, 0.0]] * BATCH),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None} if config.get("sample_size") else None,
        "class_labels": torch.tensor([1] * BATCH) if config.get("norm_type") == "ada_norm_zero" else None,
        "pooled_text_emb": normal(BATCH, text),
        "micro_conds": torch.ones(BATCH, 5),
        "proj_embedding": normal(BATCH, config.get("embedding_dim") or text),
        "global_hidden_states": normal(BATCH, 1, text),
        "added_time_ids": torch.ones(BATCH, 3),
        "text_rope_pos": torch.arange(WORDS),
        "control_hidden_states": normal(BATCH, config.get("vace_in_channels") or channels, 5, 8, 8),
        "visual_rope_pos": [torch.arange(5), torch.arange(4), torch.arange(4)],
        "encoder_mask": torch.ones(BATCH, WORDS, dtype=torch.bool),
    }
    return known.get(key)

"""Of transformers: every type of model, its configuration shrunk, its inputs made from what it asks for."""

from __future__ import annotations

import importlib
import inspect
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .making import BATCH, NotBuilt, fitted, in_words, is_small, prepared, runner

TOKENS = 12
WIDTH, HEADS = 64, 4

_LAYERS = re.compile(
    r"^(n_layers?|num_layers|depth|n_blocks|num_blocks|(num_)?(\w+_)?layers|(\w+_)?num_(hidden_)?layers|\w*num_\w*layers|(\w+_)?depth)$"
)
_NOT_LAYERS = re.compile(
    r"feature_layer|conv|adapter|feat_extract|skip|fpn|first|dense|prediction|mtp|nextn|hash|upsample"
)
_HEADS = re.compile(r"^(n_heads?|(num_)?(\w+_)?attention_heads|(\w+_)?num_(attention_)?heads|num_\w*heads|\w+_heads)$")
_WIDTH = re.compile(
    r"^((\w+_)?hidden_size|d_model|n_embd|embed_dim|(\w+_)?embed_dim|hidden_dim|dim|(\w+_)?hidden_dim|model_dim|embedding_size"
    r"|(\w+_)?embedding_size|d_embed|width|emb_dim|decoder_hidden_size|hidden_channels|out_hidden_size|(text|vision)_?\w*_dim)$"
)
_INNER = re.compile(
    r"^((\w+_)?intermediate_size|(\w+_)?ffn_dim|d_ff|d_inner|n_inner|(\w+_)?intermediate_dim|feed_forward_\w+|(\w+_)?feedforward_dim|"
    r"ffn_hidden_size|dim_feedforward|mlp_dim|(\w+_)?mlp_hidden\w*|(\w+_)?filter_size|ffn_intermediate_size)$"
)
_VOCAB = re.compile(r"^(\w+_)?vocab_size$|^n_vocab$|^vocab_size_\w+$|^codebook_size$|^num_embeddings$")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len\w*|context_length_)$"
)
_TOKEN = re.compile(r"_token_(id|index)$|_token_ids?$|^\w+_token$|_id$|_index$")
_ALIKE = re.compile(r"dim|size|width|channels|features")
_KEPT = ("image_size", "img_size", "hidden_sizes", "embed_dims", "conv_dim", "head_dim")
_UNSET = {
    "vocab_size": 100,
    "head_dim": WIDTH // HEADS,
    "num_key_value_heads": HEADS,
    "clip_qkv": 8.0,
    "sliding_window": 6,
}
_UNSET |= {"num_experts": 4, "n_routed_experts": 4, "top_k_experts": 2, "num_experts_per_tok": 2, "n_shared_experts": 1}
_UNSET |= {
    "image_token_id": 90,
    "image_token_index": 90,
    "video_token_index": 91,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
    "position_embedding_type": "rope",
}
_USUAL = {"dropout_rate": 0.0, "dropout": 0.0, "initializer_range": 0.02, "rope_theta": 1e4, "pad_token_id": 0}
_EXPERTS = re.compile(r"^((n|num)_(\w+_)?experts|moe_num_experts|num_local_experts|n_routed_experts|num_moe_experts)$")


def names() -> list[str]:
    """Every model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(name: str) -> Iterator[tuple[str, torch.nn.Module, Any, Any]]:
    """What can be tried for a type: how it is called, the model, what runs it, and what returns its own answers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    errors: list[str] = []
    until = time.process_time() + 6
    default = config_class()
    for narrow, keeps, fills in ((True, (), False), (True, (), True), (True, _KEPT, True), (False, (), True)):
        try:
            config = _config(_Shrink(narrow, keeps, fills, default), name)
        except Exception as error:
            errors.append(f"configuration: {in_words(error)}")
            continue
        for model_class in _classes(config_class, name):
            if time.process_time() > until:
                break
            try:
                model = _model(model_class, config)
            except Exception as error:
                errors.append(f"{model_class.__name__}: {in_words(error)}")
                continue
            for made, more in _inputs(model, config, name):
                try:
                    inputs = fitted(model, made, more)
                except Exception as error:
                    errors.append(f"{model_class.__name__} of {', '.join(made)}: {in_words(error)}")
                    continue
                label = "own inputs" if name in INPUTS else ", ".join(inputs)
                yield f"{model_class.__name__}({label})", model, runner(model, **inputs), _answers(model, inputs)
                return
    if errors:
        raise NotBuilt("; ".join(dict.fromkeys(errors)))
    for whole in _wholes(config_class):
        for how, model, run, answers in build(whole):
            if _runs(model, run, config_class):
                yield f"as a part of {how}", model, run, answers
                return
            raise NotBuilt(f"a part of {how}, which does not run it; it has no forward pass of its own")
    raise NotBuilt("no model class of its own with a forward pass: its parts have rows of their own")


def _wholes(config_class: Any) -> list[str]:
    """The types of which a configuration without a model class is a part."""
    every = vars(importlib.import_module(config_class.__module__)).values()
    configs = [one for one in every if inspect.isclass(one) and getattr(one, "sub_configs", None)]
    return [one.model_type for one in configs if config_class in one.sub_configs.values()]


def _runs(model: torch.nn.Module, run: Any, config_class: Any) -> bool:
    """Whether modules that have such a configuration take part in a call."""
    ran: list[Any] = []
    own = [one for one in model.modules() if type(getattr(one, "config", None)) is config_class]
    hooks = [each.register_forward_hook(lambda *_: ran.append(_)) for one in own for each in one.modules()]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return bool(ran)


def _config(shrink: _Shrink, name: str) -> Any:
    default, config_class = shrink.whole, type(shrink.whole)
    values = {}
    accepted = set(inspect.signature(config_class.__init__).parameters)
    for key, value in shrink.settings(_plain(default), default).items():
        if key in accepted and key not in ("transformers_version", "architectures", "id2label", "label2id", "dtype"):
            values[key] = value
    if "backbone_config" in accepted and getattr(default, "backbone_config", None) is None:
        values["backbone_config"] = _backbone(None)
    values.update(FIXED.get(name, {}))
    try:
        return config_class(**values)
    except Exception:
        if not shrink.narrow:
            raise
        values = {key: value for key, value in values.items() if not isinstance(value, dict) or "model_type" in value}
        return config_class(**values)


def _backbone(indices: Any) -> Any:
    """A small ResNet."""
    from transformers import ResNetConfig

    stages = [f"stage{number}" for number in (indices or [2, 3, 4]) if number]
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return ResNetConfig(**sizes, out_features=stages)


def _usual(config_class: Any) -> dict[str, Any]:
    """The settings of a class that is given none."""
    try:
        return _plain(config_class())
    except Exception:
        return {}


def _equal(one: Any, other: Any) -> bool:
    if _is_config(one) or _is_config(other):
        return False
    return bool(one == other)


def _plain(config: Any) -> dict[str, Any]:
    made = {}
    for key, value in config.to_dict().items():
        if key not in ("model_type", "_name_or_path", "transformers_version"):
            try:
                made[key] = getattr(config, key, value)  # a part as a configuration, not as a dict
            except Exception:  # one that differs from layer to layer
                made[key] = value
    return made


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


@dataclass(frozen=True)
class _Shrink:
    """Makes a configuration small, and those in it."""

    narrow: bool
    """Whether layers are also narrow; else there are only fewer of them."""
    keeps: tuple[str, ...]
    """Settings that stay as they are."""
    fills: bool
    """Whether settings that are None get a value, where their name tells one."""
    whole: Any
    """The outermost configuration."""

    @cached_property
    def widths(self) -> set[int]:
        """The widths in all parts of the whole: where another setting is the same number, it is the same width."""
        return {
            value
            for part in _parts(self.whole)
            for key, value in _plain(part).items()
            if _is_int(value) and value > WIDTH and _WIDTH.search(key)
        }

    def smaller(self, config: Any) -> Any:
        """A configuration within another one, shrunk."""
        if config.model_type == "timm_backbone":
            return _backbone(config.out_indices)
        if config.model_type == "timm_wrapper":
            return config  # timm knows only the sizes that it has
        usual = _usual(type(config))
        values = {key: value for key, value in _plain(config).items() if key in usual and not _equal(value, usual[key])}
        changed = self.settings(_plain(config), config)
        if "out_indices" in changed:
            values.pop("out_features", None)
        values.update(changed)
        accepted = set(inspect.signature(type(config).__init__).parameters)
        values = {
            key: value
            for key, value in values.items()
            if key in accepted and key not in ("transformers_version", "architectures", "id2label", "label2id", "dtype")
        }
        outs = changed.get("out_indices") or _plain(config).get("out_indices")
        if outs and list(outs) != list(usual.get("out_indices") or []):
            values["out_indices"] = list(outs)  # taken, though the signature does not say so
        values.update(FIXED.get(config.model_type, {}))
        return type(config)(**values)

    def settings(self, values: dict[str, Any], config: Any) -> dict[str, Any]:
        """The settings that are smaller."""
        made: dict[str, Any] = {}
        by_stage = ("hidden_size", "num_attention_heads") if "embed_dim_per_stage" in values else ()
        values = {key: value for key, value in values.items() if key not in (*self.keeps, *by_stage)}
        patch = values.get("patch_size")
        stages = any(
            isinstance(values.get(key), (list, tuple)) for key in ("depths", "hidden_sizes", "embed_dims", "dims")
        )
        picture = 4 * patch if _is_int(patch) and not stages else 64 if patch is None or stages else 0
        heads = next(
            (v for k, v in values.items() if k in ("num_attention_heads", "n_head", "num_heads") and _is_int(v)), 0
        )
        layers = next(
            (v for k, v in values.items() if k in ("num_hidden_layers", "n_layer", "num_layers") and _is_int(v)), 0
        )
        depths = values.get("depths")
        if isinstance(depths, (list, tuple)):
            layers = 0  # its number of layers is that of its stages
        kept, shared = _kept(values, config, layers)
        outs = values.get("out_indices")
        if layers > 2 and isinstance(outs, (list, tuple)) and len(outs) > 1:
            kept = [*range(len(outs))]
            made["out_indices"] = [number + 1 for number in kept]
            values = {
                key: value for key, value in values.items() if key not in ("out_indices", "out_features", "stage_names")
            }
        tokens = 0
        head_list = values.get("num_heads") or values.get("num_attention_heads")
        for key, value in values.items():
            if _is_config(value):
                made[key] = self.smaller(value)
            elif value is None and self.fills and key in _UNSET:
                made[key] = _UNSET[key]
            elif isinstance(value, bool) or value is None:
                continue
            elif isinstance(value, int):
                number = _int(key, value, heads, layers, kept, self.narrow)
                if isinstance(depths, (list, tuple)) and key == "num_hidden_layers" and value == len(depths):
                    number = value
                if key in shared:
                    number = len(kept) // 2
                if key in ("image_size", "img_size") and picture and self.narrow:
                    number = min(value, picture)
                if _TOKEN.search(key) and value > 40 and not number != value:
                    tokens += 1
                    number = 99 - tokens
                if isinstance(head_list, (list, tuple)) and _WIDTH.search(key) and self.narrow:
                    number = min(value, 16 * head_list[0])
                elif number == value and self.narrow and value in self.widths and _ALIKE.search(key):
                    number = WIDTH
                if number != value:
                    made[key] = number
            elif isinstance(value, float):
                if key in ("depth_coefficient", "width_coefficient") and self.narrow:
                    made[key] = 0.2
            elif isinstance(value, (list, tuple)) and value:
                changed = _list(key, list(value), layers, kept, head_list, self.narrow)
                if self.narrow and key in ("image_size", "img_size", "input_size") and all(map(_is_int, value)):
                    changed = [min(one, picture or 64) for one in value]
                if self.narrow and key.endswith("feature_sizes"):  # those of pictures that are all as small
                    changed = [[max(1, one * 4 // value[-1][0]) for one in size] for size in value]
                if changed != list(value):
                    made[key] = changed
            elif key == "rope_parameters" and value == {} and self.fills:
                made[key] = {
                    kind: {"rope_type": "default", "rope_theta": 1e4} for kind in values.get("layer_types", ())
                }
            elif key == "rope_parameters" and self.narrow and isinstance(value, dict) and _has_sections(value, config):
                factor = value.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1
                turned = int(WIDTH // HEADS * factor) // 2
                rest = turned - turned // 4
                made[key] = {**value, "mrope_section": [turned // 4, rest // 2, rest - rest // 2]}
        return made


def _parts(config: Any) -> list[Any]:
    """A configuration and those in it."""
    return [config, *(part for value in _plain(config).values() if _is_config(value) for part in _parts(value))]


def _kept(values: dict[str, Any], config: Any, layers: int) -> tuple[list[int], list[str]]:
    """Which layers stay, one of each kind; and the settings of how many layers use the keys of earlier ones."""
    shared = [key for key, value in values.items() if "shared_layers" in key and _is_int(value) and value]
    names = ("layer_types", "layers_block_type", "mlp_layer_types")
    given = next((values[key] for key in names if isinstance(values.get(key), (list, tuple))), None)
    types = given or next(
        (value for key in names if isinstance(value := getattr(config, key, None), (list, tuple))), ()
    )
    if not types or len(types) != layers:
        return [*range(min(2, layers))], []
    kept = _diverse(types, layers)
    if given is None:  # by a rule, which begins with the first layer
        return [*range(max(kept) + 1)], []
    return (kept * 2, shared) if shared else (kept, [])


def _has_sections(rope: dict[str, Any], config: Any) -> bool:
    """Whether a rotary embedding is split into time, height and width."""
    if "mrope_section" in rope or "rope_type" not in rope:
        return "mrope_section" in rope
    try:
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return False
    return "mrope_section" in inspect.getsource(module)


def _diverse(types: Any, layers: int) -> list[int]:
    """The first layer of each type, and the one after it where there is but one type."""
    first = dict[Any, int]()
    for number, one in enumerate(types):
        first.setdefault(str(one), number)
    places = list(first.values())
    return places if len(places) > 1 else [*range(min(2, layers))]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int(key: str, value: int, heads: int, layers: int, kept: list[int], narrow: bool) -> int:
    if "codebook_size" in key:
        return min(value, 64)
    if _VOCAB.search(key):
        return min(value, 100)
    if key in ("num_hidden_layers", "n_layer", "num_layers") and value == layers:
        return min(value, len(kept)) if kept else value
    if _LAYERS.search(key) and not _NOT_LAYERS.search(key):
        return min(value, 2)
    if _EXPERTS.search(key):
        return min(value, 4)
    if key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "moe_top_k", "num_experts_per_token"):
        return min(value, 2)
    if key in ("n_group", "topk_group", "num_expert_group", "n_expert_group"):
        return 1
    if not narrow:
        return value
    if key in ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num") or key.endswith(
        "num_key_value_heads"
    ):
        return value if value == 1 else HEADS if value >= heads else 2
    if _HEADS.search(key):
        return min(value, HEADS)
    if key in (
        "head_dim",
        "d_kv",
        "attention_head_dim",
        "kv_channels",
        "attention_head_size",
        "d_head",
        "swa_head_dim",
    ):
        return min(value, WIDTH // HEADS)
    if key in ("qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "rotary_dim", "global_head_dim"):
        return min(value, WIDTH // HEADS)
    if key in ("q_lora_rank", "kv_lora_rank", "qk_head_dim"):
        return 32
    if _WIDTH.search(key):
        return min(value, WIDTH)
    if _INNER.search(key):
        return min(value, 96)
    if "moe" in key and "size" in key:
        return min(value, 32)
    if _POSITIONS.search(key):
        return min(value, 128)
    if key in ("max_source_positions",):
        return min(value, 64)
    if key in ("projection_dim", "proj_dim", "projection_size"):
        return min(value, 32)
    if key in ("block_size", "encoder_hash_byte_group_vocab") and value > 1000:
        return 1000
    if key in ("n_groups", "mamba_n_groups"):
        return min(value, 2)
    if key == "num_pos_feats":
        return min(value, WIDTH // 2)
    if key in ("num_queries", "num_object_queries", "num_query_tokens"):
        return min(value, 6)
    return value


def _list(key: str, value: list[Any], layers: int, kept: list[int], heads: Any, narrow: bool) -> list[Any]:
    if key in (
        "depths",
        "layers",
        "num_layers_per_stage",
        "encoder_depths",
        "stage_depths",
        "blocks_per_stage",
    ) and all(map(_is_int, value)):
        return [min(1, one) if number else min(2, one) for number, one in enumerate(value)]
    if layers > 2 and len(value) == layers:
        return [value[place] for place in kept]
    if all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < layers for one in value) and (
        key.endswith(("indices", "indexes", "_layers", "_idx", "_ids", "_layer"))
    ):
        return sorted({min(one, len(kept) - 1) for one in value}) if len(kept) else value
    if key.startswith("vision_feature_") and layers == 0:  # of the layers of another part, which now has two
        return [1, 0][: len(value)]
    if not narrow:
        return value
    if key in ("hidden_sizes", "embed_dims", "dims", "encoder_hidden_sizes", "embed_dim", "hidden_dims") and all(
        map(_is_int, value)
    ):
        if isinstance(heads, (list, tuple)) and len(heads) == len(value):
            return [min(one, max(16 * head, 32)) for one, head in zip(value, heads)]
        return [min(one, 32 * (number + 1)) for number, one in enumerate(value)]
    if key == "decoder_in_channels":
        return [min(one, WIDTH) for one in value]
    if key in ("conv_dim", "tdnn_dim") and all(map(_is_int, value)):
        return [min(one, 32) for one in value]
    return value


def _classes(config_class: Any, name: str) -> list[Any]:
    from transformers.models.auto import modeling_auto

    mappings = [modeling_auto.MODEL_MAPPING_NAMES]
    first = (
        *("MODEL_FOR_PRETRAINING", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"),
        *("MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_OBJECT_DETECTION"),
    )
    mappings += [getattr(modeling_auto, f"{one}_MAPPING_NAMES") for one in first]
    mappings += [value for key, value in sorted(vars(modeling_auto).items()) if key.endswith("_MAPPING_NAMES")]
    found: dict[str, Any] = {}
    for mapping in mappings:
        named = mapping.get(name, ())
        for one in (named,) if isinstance(named, str) else named:
            made = _class_named(one, config_class)
            if made is not None:
                found.setdefault(one, made)
    if not found:
        package = importlib.import_module(config_class.__module__.rpartition(".")[0])
        for path in sorted(getattr(package, "__all__", None) or dir(package)):
            with suppress(ImportError):  # such as a tokenizer that needs another library
                one = getattr(package, path, None)
                is_of = inspect.isclass(one) and getattr(one, "config_class", None) is config_class
                if is_of and not path.endswith("PreTrainedModel"):
                    found.setdefault(path, one)
        for key in ("modeling_" + config_class.__module__.rpartition("configuration_")[2],):
            try:
                module = importlib.import_module(f"{config_class.__module__.rpartition('.')[0]}.{key}")
            except ImportError:
                continue
            for path, one in vars(module).items():
                if (
                    inspect.isclass(one)
                    and getattr(one, "config_class", None) is config_class
                    and hasattr(one, "forward")
                    and not path.endswith("PreTrainedModel")
                    and one.__module__ == module.__name__
                ):
                    found.setdefault(path, one)
    return [one for one in found.values() if one.forward is not torch.nn.Module.forward][:3]


def _class_named(name: str, config_class: Any) -> Any:
    import transformers

    try:
        one = getattr(transformers, name)
    except (AttributeError, ImportError):
        return None
    return one if inspect.isclass(one) and hasattr(one, "config_class") else None


def _model(model_class: Any, config: Any) -> torch.nn.Module:
    make = getattr(model_class, "_from_config", model_class)
    for _ in range(4):
        try:
            is_small(lambda: make(config))
        except NotBuilt:
            raise
        except AttributeError as error:
            if not _complete(config, error):
                break
        except Exception:  # some cannot be made without numbers
            break
    torch.manual_seed(0)
    return prepared(make(config))


def _complete(config: Any, error: AttributeError) -> bool:
    """Give a part of a configuration what another part has and a model looks for in it."""
    for part in _parts(config):
        if error.obj is part:
            values = (getattr(one, error.name, None) for one in _parts(config) if one is not part)
            value = next((value for value in values if value is not None), _USUAL.get(error.name))
            if value is not None:
                setattr(part, error.name, value)
                return True
    return False


def _answers(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    from .judging import Answer

    def answers() -> list[Answer]:
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation("eager")
            output = runner(model, **inputs)(output_attentions=True)
        except Exception:
            return []
        finally:
            try:
                model.set_attn_implementation(before)
            except Exception:
                pass
        found = []
        for field, value in output.items() if hasattr(output, "items") else ():
            if "attention" not in field:
                continue
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, torch.Tensor):
                    found.append(Answer(field, one.detach()))
        return found

    return answers


# Inputs


def _inputs(model: torch.nn.Module, config: Any, name: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Ways to call a model, the fullest first, and what makes further inputs by their names."""
    parameters = inspect.signature(model.forward).parameters
    makers = _Makers(model, config, parameters)
    if name in INPUTS:
        yield INPUTS[name](makers), makers.more
        return
    required = [
        key
        for key, one in parameters.items()
        if (one.default is one.empty and one.kind in (1,)) or (one.kind == 3 and one.default is one.empty)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    base = dict.fromkeys([key for key in [main, *required] if key in parameters])
    sets = []
    if "input_ids" in parameters and "pixel_values" in parameters:
        sets.append([*base, "input_ids", "pixel_values"])
    if "input_ids" in parameters and "input_values" in parameters:
        sets.append([*base, "input_ids", "input_values"])
    if "input_ids" in parameters and "input_features" in parameters:
        sets.append([*base, "input_ids", "input_features"])
    sets.append([*base])
    if "input_ids" in parameters:
        sets.append(["input_ids", *required])
    if "pixel_values" in parameters:
        sets.append(["pixel_values", *required])
    if "inputs_embeds" in parameters:
        sets.append(["inputs_embeds"])
    if "hidden_states" in parameters:
        sets.append(["hidden_states", *required])
    done = set()
    for keys in sets:
        keys = list(dict.fromkeys(keys))
        keys += [key for key in ("bbox",) if key in parameters and "input_ids" in keys]
        if "decoder_input_ids" in parameters and "decoder_input_ids" not in keys:
            keys.append("decoder_input_ids")
        if tuple(keys) in done:
            continue
        done.add(tuple(keys))
        try:
            made = makers.all(keys)
        except Exception as error:
            yield {f"({in_words(error)})": None}, makers.more
            continue
        yield made, makers.more
        if "input_features" in made:
            yield {**made, "input_features": made["input_features"].mT}, makers.more


class _Makers:
    """Makes inputs by their names."""

    def __init__(self, model: torch.nn.Module, config: Any, parameters: Any) -> None:
        self.model, self.config, self.parameters = model, config, parameters
        self.random = torch.Generator().manual_seed(2)

    def find(self, *keys: str, default: Any = None) -> Any:
        """The first of some settings that the configuration or a part of it has."""
        configs = [self.config]
        for one in configs:
            for key in keys:
                value = getattr(one, key, None)
                if value is not None:
                    return value
            configs += [value for value in vars(one).values() if _is_config(value)]
        return default

    def vision(self) -> Any:
        for key in (
            "vision_config",
            "vision_encoder_config",
            "image_encoder_config",
            "backbone_config",
            "vit_config",
            "vision_tower_config",
        ):
            one = getattr(self.config, key, None)
            if one is not None and _is_config(one):
                return one
        return self.config

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random)

    def integers(self, high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.random)

    def size(self) -> tuple[int, int]:
        vision = self.vision()
        found = (
            getattr(vision, "image_size", None)
            or getattr(vision, "img_size", None)
            or self.find("image_size", "input_size")
        )
        patch = self.find("patch_size", "patch_sizes", default=16)
        patch = (
            patch
            if isinstance(patch, int)
            else max(patch)
            if isinstance(patch, (list, tuple)) and all(map(_is_int, patch))
            else 16
        )
        if isinstance(found, int):
            return found, found
        if isinstance(found, (list, tuple)) and len(found) >= 2:
            return found[-2], found[-1]
        if isinstance(found, dict):
            return found.get("height", 64), found.get("width", 64)
        return (max(64, 4 * patch),) * 2

    def all(self, keys: list[str]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key in keys:
            made[key] = self.one(key)
        if "pixel_values" in made and "input_ids" in made:
            self.place_images(made)
        return {key: value for key, value in made.items() if value is not None}

    def place_images(self, made: dict[str, Any]) -> None:
        token = next(
            (
                getattr(self.config, key)
                for key in ("image_token_id", "image_token_index", "media_token_id")
                if _is_int(getattr(self.config, key, None))
            ),
            None,
        )
        extra = {}
        for key in (
            "image_grid_thw",
            "image_sizes",
            "pixel_attention_mask",
            "spatial_shapes",
            "image_position_ids",
            "pixel_position_ids",
            "image_grid_hw",
        ):
            if key in self.parameters:
                extra[key] = self.one(key)
        if "image_grid_thw" in extra:
            made["pixel_values"] = self.flat_patches()
        made.update({key: value for key, value in extra.items() if value is not None})
        if token is None or not hasattr(self.model, "get_image_features"):
            return
        accepted = inspect.signature(self.model.get_image_features).parameters
        given = {key: value for key, value in made.items() if key in accepted}
        with torch.no_grad():
            features = self.model.get_image_features(**given)
        features = getattr(features, "pooler_output", features)
        if isinstance(features, (list, tuple)):
            count = sum(one.flatten(0, -2).shape[0] for one in features)
        else:
            count = features.flatten(0, -2).shape[0]
        ids = made["input_ids"]
        ids[ids == token] = token - 1 if token > 3 else token + 1
        each = count // len(ids)
        made["input_ids"] = torch.cat([ids[:, :2], torch.full((len(ids), each), token), ids[:, 2:8]], 1)
        if "mm_token_type_ids" in self.parameters:
            made["mm_token_type_ids"] = (made["input_ids"] == token).long()
        if "token_type_ids" in self.parameters and self.parameters["token_type_ids"].default is not None:
            made["token_type_ids"] = (made["input_ids"] == token).long()

    def flat_patches(self) -> torch.Tensor:
        vision = self.vision()
        patch, steps = getattr(vision, "patch_size", 14), getattr(vision, "temporal_patch_size", 1)
        channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
        return self.normal(BATCH * 16, channels * steps * patch * patch)

    def one(self, key: str) -> Any:
        find = self.find
        if key in ("input_ids", "decoder_input_ids", "text_input_ids", "tokens"):
            vocab = find("vocab_size", "text_vocab_size", "n_vocab", default=100)
            vocab = vocab if _is_int(vocab) else 100
            return self.integers(
                min(vocab, 80), BATCH, TOKENS if key != "decoder_input_ids" else 7, low=5 if vocab > 10 else 0
            )
        if key in ("pixel_values", "hidden_states", "flattened_patches") and "grid_thw" in self.parameters:
            return self.flat_patches()
        if key == "pixel_values" and "spatial_shapes" in self.parameters:
            return self.flat_patches().unflatten(0, (BATCH, 16))
        if key in ("pixel_values", "pixel_values_videos", "images", "pixel_values_images"):
            height, width = self.size()
            channels = getattr(self.vision(), "num_channels", None) or find(
                "num_channels", "in_channels", "in_chans", default=3
            )
            frames = find("num_frames")
            if frames and key != "images":
                return self.normal(BATCH, min(frames, 16), channels, height, width)
            return self.normal(BATCH, channels, height, width)
        if key in ("spatial_shapes", "target_sizes", "image_grid_hw", "grid_hw"):
            return torch.tensor([[4, 4]] * BATCH)
        if key == "pixel_attention_mask" and "spatial_shapes" in self.parameters:
            return torch.ones(BATCH, 16, dtype=torch.long)
        if key in ("image_grid_thw", "grid_thw"):
            return torch.tensor([[1, 4, 4]] * BATCH)
        if key in ("image_sizes",):
            return torch.tensor([self.size()] * BATCH)
        if key in ("input_features", "audio_values", "input_audio_features"):
            mels = find("num_mel_bins", "input_feat_per_channel", "feature_size", "num_mels", default=80)
            positions = find("max_source_positions")
            if positions and positions <= 3000:
                return self.normal(BATCH, mels, 2 * positions)
            return self.normal(BATCH, 64, mels)
        if key in ("input_values", "audio", "waveform"):
            if find("num_mel_bins") and find("max_length"):
                return self.normal(BATCH, find("max_length"), find("num_mel_bins"))
            if find("audio_channels"):
                return self.normal(BATCH, find("audio_channels"), 4000)
            return self.normal(BATCH, 4000)
        if key in ("inputs_embeds", "hidden_states", "encoder_hidden_states"):
            width = find("hidden_size", "d_model", "n_embd", "embed_dim", default=WIDTH)
            return self.normal(BATCH, TOKENS, width if _is_int(width) else width[0])
        if key == "bbox":
            low = self.integers(400, BATCH, TOKENS, 2)
            return torch.cat([low, low + self.integers(400, BATCH, TOKENS, 2)], -1)
        if key == "query_embeds":
            return self.normal(BATCH, 6, find("hidden_size"))
        if key == "image":
            return self.normal(BATCH, 3, 64, 64)
        if key in ("past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features"):
            length = find("context_length", default=24)
            inputs = find("num_input_channels", "input_size", default=1)
            return self.normal(BATCH, length, inputs)
        if key in ("timestep", "timesteps"):
            return torch.tensor([3] * BATCH)
        if key == "cache_position":
            return torch.arange(TOKENS)
        if key in ("attention_mask",):
            return torch.ones(BATCH, TOKENS, dtype=torch.long)
        if key in ("position_ids",):
            return torch.arange(TOKENS).expand(BATCH, TOKENS)
        if key == "cu_seqlens":
            return torch.tensor([0, 16, 32])
        return None

    def more(self, key: str, given: dict[str, Any]) -> Any:
        """An input that is known by what it is annotated with, or by the end of its name."""
        made = self.one(key)
        masked = given.get(re.sub(r"_?(padding|attention)?_?mask$", "", key))
        if made is None and "mask" in key and isinstance(masked, torch.Tensor):
            return torch.ones(BATCH, masked.shape[1 if "features" not in key else -1], dtype=torch.bool)
        kind = str(self.parameters[key].annotation)
        if made is not None or key.endswith(("past_key_values", "labels", "kwargs")) or kind.startswith("bool"):
            return made
        if "mask" in key or "Bool" in kind:
            return torch.ones(BATCH, TOKENS, dtype=torch.bool if "Bool" in kind else torch.long)
        if "pos" in key and "embed" not in key and "Float" not in kind:
            return torch.arange(TOKENS).expand(BATCH, TOKENS)
        if key.endswith(("lengths", "lens")):
            return torch.tensor([TOKENS] * BATCH)
        if "Long" in kind or "Int" in kind or key.endswith(("ids", "id", "tokens", "codes", "code", "index", "idx")):
            return self.integers(4, BATCH, TOKENS)
        if "int" in kind and "Tensor" not in kind:
            return 4
        return self.normal(BATCH, TOKENS, WIDTH) if "Tensor" in kind else None


FIXED: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "blip-2": {"image_token_index": 90},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3}
    | {"layer_types": ["sliding_attention", "mlp", "full_attention"]},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "align": {"projection_dim": WIDTH},
    "mamba2": {"num_heads": 2 * HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    **{
        key: {"prediction_length": 8, "context_length": 24, "lags_sequence": [1, 2], "num_time_features": 1}
        for key in ("autoformer", "informer", "time_series_transformer")
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 64,
        "d_model": 64,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
}
"""Settings that a type needs beside the shrunk ones."""


def _series(makers: Any) -> dict[str, Any]:
    past, future = 24 + 2, 8
    return {
        "past_values": makers.normal(BATCH, past),
        "past_time_features": makers.normal(BATCH, past, 1),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": makers.normal(BATCH, future),
        "future_time_features": makers.normal(BATCH, future, 1),
    }


INPUTS: dict[str, Any] = {
    "lxmert": lambda m: {
        "input_ids": m.one("input_ids"),
        "visual_feats": m.normal(BATCH, 6, m.config.visual_feat_dim),
        "visual_pos": m.normal(BATCH, 6, m.config.visual_pos_dim),
    },
    "kosmos-2": lambda m: {
        "pixel_values": m.one("pixel_values"),
        "input_ids": m.integers(50, BATCH, m.config.latent_query_num + 5, low=5),
        "image_embeds_position_mask": torch.arange(m.config.latent_query_num + 5).expand(BATCH, -1)
        < m.config.latent_query_num,
    },
    "idefics": lambda m: {
        "input_ids": m.one("input_ids"),
        "pixel_values": m.one("pixel_values")[:, None],
        "image_attention_mask": torch.ones(BATCH, TOKENS, 1, dtype=torch.long),
    },
    "mllama_vision_model": lambda m: {
        "pixel_values": m.one("pixel_values")[:, None, None].expand(-1, 1, m.config.max_num_tiles, -1, -1, -1),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, m.config.max_num_tiles, dtype=torch.long),
    },
    "gemma4_vision": lambda m: {
        "pixel_values": m.normal(BATCH, 16, 3 * m.config.patch_size**2),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, -1, -1),
    },
    "blip_2_qformer": lambda m: {
        "query_embeds": m.normal(BATCH, 6, m.config.hidden_size),
        "encoder_hidden_states": m.normal(BATCH, 9, m.config.encoder_hidden_size),
    },
    "dia": lambda m: {
        "input_ids": m.one("input_ids"),
        "decoder_input_ids": m.integers(50, BATCH, 7, m.config.decoder_config.num_channels),
    },
    "decision_transformer": lambda m: {
        "states": m.normal(BATCH, 5, m.config.state_dim),
        "actions": m.normal(BATCH, 5, m.config.act_dim),
        "rewards": m.normal(BATCH, 5, 1),
        "returns_to_go": m.normal(BATCH, 5, 1),
        "timesteps": torch.arange(5).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, 5),
    },
    "audioflamingo3_encoder": lambda m: {
        "input_features": m.normal(BATCH, m.config.num_mel_bins, 2 * m.config.max_source_positions),
        "input_features_mask": torch.ones(BATCH, 2 * m.config.max_source_positions, dtype=torch.long),
    },
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _series),
    "perceiver": lambda m: {"inputs": m.normal(BATCH, TOKENS, 64)},
    **dict.fromkeys(
        ("clap", "clap_audio_model"),
        lambda m: (
            ({"input_ids": m.one("input_ids")} if hasattr(m.config, "text_config") else {})
            | {"input_features": m.normal(BATCH, 1, 1001, 64), "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}
        ),
    ),
}
"""What a type is called with, where its signature does not say."""

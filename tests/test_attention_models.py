"""attention() on the models of timm, transformers, torchvision and torch as they are built by default.

Each map is compared with what the same model makes when it computes its weights openly: transformers' eager attention
with output_attentions=True, timm's unfused attention by its local variable, torch's own returned weights.
"""

import functools
import itertools
import re

import pytest
import torch
from zoo import GPT2, IDS, PADDING, SIZE, SMALL, TEXT, VIT, images, timm_model, transformers_model

from visualizer import attention, capture

MASKED = {"input_ids": IDS, "attention_mask": PADDING}
KEYS_AND_VALUES = {"num_key_value_heads": 2}
SEQ2SEQ = {"input_ids": IDS, "attention_mask": PADDING, "decoder_input_ids": IDS[:, :3]}
BART = TEXT | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
               "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip

# Name, inputs, options; and, from the output, the maps in the order of the calls.
TRANSFORMERS = {
    "BERT": ("Bert", MASKED, TEXT | SIZE),
    "RoBERTa": ("Roberta", MASKED, TEXT | SIZE),
    "ViT": ("ViT", {"pixel_values": images(32)}, VIT),
    "DINOv2 with registers": ("Dinov2WithRegisters", {"pixel_values": images(32)}, VIT),
    "CLIP": ("CLIP", MASKED | {"pixel_values": images(32)}, {
        "text_config": TEXT | SIZE | {"max_position_embeddings": 8}, "vision_config": VIT}),
    "SigLIP": ("Siglip", MASKED | {"pixel_values": images(32)}, {
        "text_config": TEXT | SIZE | {"max_position_embeddings": 5}, "vision_config": VIT}),
    "Swin": ("Swin", {"pixel_values": images(32)}, {
        "image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "GPT-2": ("GPT2", MASKED, GPT2),
    "Llama": ("Llama", MASKED, TEXT | SIZE | KEYS_AND_VALUES),
    "Llama, no padding": ("Llama", {"input_ids": IDS}, TEXT | SIZE | KEYS_AND_VALUES),
    "Mistral": ("Mistral", MASKED, TEXT | SIZE | KEYS_AND_VALUES | {"sliding_window": 3}),
    "Qwen": ("Qwen3", MASKED, TEXT | SIZE | KEYS_AND_VALUES | {"head_dim": 8}),
    "T5": ("T5", SEQ2SEQ, TEXT | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "BART": ("Bart", SEQ2SEQ, BART),
}  # fmt: skip


def openly(model, inputs):
    """The maps that a model makes of itself, in the order of its calls."""
    if model.config.model_type in ("siglip", "swin"):  # which do not return all of theirs
        with capture(model, "attn_weights", keep="tensor") as found:
            model(**inputs)
        paths = [path for path in found if re.search("attn$|attention$", path)]
        return [found[path][0] for path in sorted(paths, key=lambda path: "text" in path)]
    output = model(**inputs, output_attentions=True)
    if hasattr(output, "text_model_output"):
        return output.vision_model_output.attentions + output.text_model_output.attentions
    if hasattr(output, "encoder_attentions"):
        decoder = zip(output.decoder_attentions, output.cross_attentions, strict=True)
        return output.encoder_attentions + tuple(itertools.chain.from_iterable(decoder))
    return output.attentions


@functools.cache
def eager_and(name, implementation):
    """The same weights twice: computed openly, and by an implementation of transformers."""
    kind, inputs, options = TRANSFORMERS[name]
    eager = transformers_model(kind, **options)
    other = transformers_model(kind, attention=implementation, **options)
    other.load_state_dict(eager.state_dict())
    return eager, other, inputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about what transformers calls for flex_attention
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, implementation):
    try:
        eager, model, inputs = eager_and(name, implementation)
    except ValueError as error:
        assert "does not support" in str(error)
        pytest.skip(f"transformers has no {implementation} for it")
    if name == "T5" and implementation == "flex_attention":  # transformers' own call fails with two texts
        inputs = {name: values[:1] for name, values in inputs.items()}
    with torch.no_grad():
        expected = openly(eager, inputs)
        with torch.compiler.set_stance("force_eager"):  # transformers compiles flex_attention
            before = model(**inputs)
        with attention(model) as maps:
            after = model(**inputs)
    assert torch.equal(before[0], after[0])
    if name == "SigLIP":
        pooled = maps["vision_model.head.attention"]
        maps = [found for found in maps if found is not pooled]
        assert (pooled.kind, pooled.shape) == ("cross", (2, 4, 1, 4))
    assert len(maps) == len(expected)
    assert len({found.path for found in maps}) == len(expected)
    for found, eagerly in zip(maps, expected, strict=True):
        assert found.shape == eagerly.shape
        assert found.is_dense == (implementation == "eager")
        assert (found.dense() - eagerly).abs().max() < 1e-6
    cross = [found.kind == "cross" for found in maps]
    assert cross == [re.search("EncDec|encoder_attn", found.path) is not None for found in maps]
    images = len(next(iter(inputs.values())))
    assert [found.kind == "window" for found in maps] == [found.shape[0] > images for found in maps]
    assert any(found.kind == "window" for found in maps) == (name == "Swin")


def timm_pair(name, **options):
    torch.manual_seed(0)
    fused = timm_model(name, fused=True, **options)
    explicit = timm_model(name, **options)
    explicit.load_state_dict(fused.state_dict())
    return fused, explicit


SWIN = {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
# Name, size of the images, options, whether the class does it fused.
TIMM = {
    "ViT": ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2}, True),
    "ViT with registers": ("vit_base_patch16_reg4_gap_256", 64, SMALL, True),
    "DeiT3": ("deit3_small_patch16_224", 64, SMALL, True),
    "BEiT": ("beit_base_patch16_224", 64, SMALL, True),
    "EVA02": ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 4}, True),
    "CaiT": ("cait_xxs24_224", 64, SMALL, None),
    "XCiT": ("xcit_nano_12_p16_224", 64, SMALL, None),
    "Swin": ("swin_tiny_patch4_window7_224", 56, SWIN, False),
    "SwinV2": ("swinv2_tiny_window8_256", 64, SWIN | {"img_size": 64, "window_size": 4}, False),
    "MViTv2": ("mvitv2_tiny", 64, {"img_size": 64}, False),
    "MaxViT": ("maxvit_tiny_tf_224", 64, {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1)}, True),
    "PVTv2": ("pvt_v2_b0", 64, {"depths": (1, 1, 1, 1)}, True),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    kind, size, options, is_fused = TIMM[name]
    model, explicit = timm_pair(kind, **options)
    x = images(size)
    with torch.no_grad(), capture(explicit, "attn", at="assign") as found:
        explicit(x)
    with torch.no_grad():
        before = model(x)
        with attention(model) as maps:
            after = model(x)
    assert torch.equal(before, after)
    assert len(maps) == len(maps.paths) > 1
    if is_fused is not None:
        assert {entry.is_dense for entry in maps} == {not is_fused}
    for path in maps.paths:
        assigned = [torch.from_numpy(value) for value in found[path]]
        sums_to_one = [value for value in assigned if torch.allclose(value.sum(-1), torch.ones(()), atol=1e-5)]
        if name == "CaiT" and "token_only" not in path and maps[path].softmaxes:  # talking heads mix the softmax
            assert (maps[path].softmaxes[0].dense() - sums_to_one[0]).abs().max() < 1e-6
            assert (maps[path].dense() - assigned[-1]).abs().max() < 1e-6
            continue
        assert (maps[path].dense() - sums_to_one[0]).abs().max() < 1e-6
        assert maps[path].softmaxes == ()
        # BEiT has a window_size too; the last stages of others are one window.
        assert maps[path].kind == ("window" if maps[path].shape[0] > len(x) else "self")


def test_torchvision():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64).eval()
    x = images(32)
    with torch.no_grad():
        before = model(x)  # by torch's native path, which makes no Python call
        with attention(model) as maps:
            after = model(x)
    assert (before - after).abs().max() < 1e-6
    assert maps.paths == tuple(f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2))
    block = model.encoder.layers[0]
    with torch.no_grad():
        tokens = model._process_input(x)
        tokens = torch.cat([model.class_token.expand(2, -1, -1), tokens], 1) + model.encoder.pos_embedding
        normed = block.ln_1(tokens)
        expected = block.self_attention(normed, normed, normed, need_weights=True, average_attn_weights=False)[1]
    assert (maps[0].dense() - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("name", "options"), [("GPT2", GPT2), ("Llama", TEXT | SIZE | KEYS_AND_VALUES)])
@pytest.mark.parametrize("padded", [False, True])
def test_generation(name, options, padded):
    """Grouped heads with padding included, whose single queries transformers puts on the axis of heads."""
    prompt = {"input_ids": IDS, "attention_mask": PADDING.flip(1) if padded else torch.ones_like(IDS)}
    torch.manual_seed(0)
    eager = transformers_model(name, head="LMHeadModel" if name == "GPT2" else "ForCausalLM", **options)
    model = transformers_model(
        name, head="LMHeadModel" if name == "GPT2" else "ForCausalLM", attention="sdpa", **options
    )
    model.load_state_dict(eager.state_dict())
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    steps = eager.generate(**prompt, **settings, output_attentions=True).attentions
    with attention(model) as maps:
        generated = model.generate(**prompt, **settings)
    assert torch.equal(generated.sequences, model.generate(**prompt, **settings).sequences)
    assert len(maps) == 4 * 2
    for step, expected in enumerate(steps):
        for path, eagerly in zip(maps.paths, expected, strict=True):
            found = maps.calls(path)[step]
            assert found.shape == eagerly.shape
            # A query that may see nothing has zeros in a fused kernel's map, and equal weights in the open one.
            real = prompt["attention_mask"].bool() if step == 0 else torch.ones(2, 1, dtype=torch.bool)
            assert (found.dense() - eagerly)[real[:, None].expand(found.shape[:3])].abs().max() < 1e-6
    buffers = {found.source.keys for found in maps.calls(maps.paths[0])}
    # With padding transformers repeats the heads of keys for the prompt, and not for the single queries after it.
    assert len(buffers) <= 2, "the cache was copied at each step"

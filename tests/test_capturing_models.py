"""capture on the model code of timm, transformers and torchvision as it is: which local, under which keys, what shape.

A shape is (batch, heads, queries, keys) unless a comment says what else it is. Paths and names are those of the
libraries: where a release of theirs renames one, its line in `CASES` is what changes.
"""

import copy
import functools
import itertools
import re
from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from zoo import GPT2, IDS, PADDING, SIZE, SMALL, TEXT, VIT, images, timm_model, transformers_model

from visualizer import VisualizerWarning, capture


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    inputs: dict[str, torch.Tensor]
    local: str
    shapes: dict[str, tuple[int, ...]]  # by key, in the order of named_modules
    others: str  # matches the keys whose values are no weights: their rows do not sum to one
    returned: Callable | None = None  # from the output, the maps for each key; None where the model leaves one out


def expand(text):
    """Braces as in a shell: a{b,c} is ab and ac."""
    parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{(.*?)\}", text))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def from_timm(name, size, shapes, others="(?!)", **options):
    shapes = {key: shape for keys, shape in shapes.items() for key in expand(keys)}
    return Case(functools.partial(timm_model, name, **options), {"x": images(size)}, "attn", shapes, others)


def from_transformers(name, inputs, shapes, returned=lambda output: output.attentions, **options):
    shapes = {key: shape for keys, shape in shapes.items() for key in expand(keys)}
    build = functools.partial(transformers_model, name, **options)
    return Case(build, inputs, "attn_weights", shapes, "(?!)", returned)


def twice(*maps):
    """For models whose layers name what they get back from their attention `attn_weights` too."""
    return [one for one in maps for _ in range(2)]


CASES = {
    "timm ViT": from_timm("vit_tiny_patch16_224", 64, {"blocks.{0,1}.attn": (2, 3, 17, 17)}, img_size=64, depth=2),
    "timm Swin": from_timm(  # (batch * windows, heads, N, N)
        "swin_tiny_patch4_window7_224", 56,
        {"layers.0.blocks.{0,1}.attn": (8, 2, 49, 49), "layers.1.blocks.{0,1}.attn": (2, 4, 49, 49)},
        img_size=56, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
    "timm CaiT": from_timm(  # its talking heads mix the maps after the softmax; the class token attends to all
        "cait_xxs24_224", 64,
        {"blocks.{0,1}.attn": (2, 4, 16, 16), "blocks_token_only.{0,1}.attn": (2, 4, 1, 17)}, r"blocks\.", **SMALL),
    "timm XCiT": from_timm(  # (batch, heads, C / heads, C / heads): channels attend to channels; the class token to all
        "xcit_nano_12_p16_224", 64,
        {"blocks.{0,1}.attn": (2, 4, 8, 8), "cls_attn_blocks.{0,1}.attn": (2, 4, 1, 17)}, **SMALL),
    "timm MaxViT": from_timm(  # (batch * windows or grids, heads, N, N); rel_pos takes the scores as `attn`
        "maxvit_tiny_tf_224", 64,
        {"stages.0.blocks.0.attn_{block,grid}.attn{,.rel_pos}": (128, 1, 4, 4),
         "stages.1.blocks.0.attn_{block,grid}.attn{,.rel_pos}": (32, 1, 4, 4)},
        ".*rel_pos", img_size=64, embed_dim=(32, 32), depths=(1, 1)),
    "BERT": from_transformers(
        "Bert", {"input_ids": IDS, "attention_mask": PADDING},
        {"encoder.layer.{0,1}.attention{,.self}": (2, 4, 5, 5)},
        lambda output: twice(*output.attentions), **TEXT, **SIZE),
    "ViT": from_transformers(
        "ViT", {"pixel_values": images(32)}, {"layers.{0,1}.attention": (2, 4, 5, 5)}, since=(5, 19), **VIT),
    "DINOv2": from_transformers(
        "Dinov2", {"pixel_values": images(32)}, {"encoder.layer.{0,1}.attention": (2, 4, 5, 5)}, since=(5, 19), **VIT),
    "Swin": from_transformers(  # (batch * windows, heads, N, N); the model returns the last map of each stage
        "Swin", {"pixel_values": images(32)},
        {"encoder.layers.0.blocks.{0,1}{,.attention}": (8, 2, 16, 16),
         "encoder.layers.1.blocks.{0,1}{,.attention}": (2, 4, 16, 16)},
        lambda output: [one for last in output.attentions for one in twice(None, last)],
        since=(5, 19), image_size=32, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "GPT-2": from_transformers("GPT2", {"input_ids": IDS}, {"h.{0,1}.attn": (2, 4, 5, 5)}, **GPT2),
    "Llama": from_transformers(  # a map for each of the four heads of queries, of two heads of keys
        "Llama", {"input_ids": IDS}, {"layers.{0,1}.self_attn": (2, 4, 5, 5)}, **TEXT, **SIZE, num_key_value_heads=2),
    "T5": from_transformers(
        "T5", {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]},
        {"encoder.block.{0,1}.layer.0{,.SelfAttention}": (2, 4, 5, 5),
         "decoder.block.0.layer.0{,.SelfAttention}": (2, 4, 3, 3),
         "decoder.block.0.layer.1{,.EncDecAttention}": (2, 4, 3, 5),
         "decoder.block.1.layer.0{,.SelfAttention}": (2, 4, 3, 3),
         "decoder.block.1.layer.1{,.EncDecAttention}": (2, 4, 3, 5)},
        lambda output: twice(*output.encoder_attentions, *itertools.chain.from_iterable(
            zip(output.decoder_attentions, output.cross_attentions, strict=True))),
        since=(5, 19), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **TEXT),
    "CLIP": from_transformers(
        "CLIP", {"input_ids": IDS, "pixel_values": images(32)},
        {"{text,vision}_model.encoder.layers.{0,1}.self_attn": (2, 4, 5, 5)},
        lambda output: output.text_model_output.attentions + output.vision_model_output.attentions,
        since=(5, 6), text_config=TEXT | SIZE | {"max_position_embeddings": 8}, vision_config=VIT),
}  # fmt: skip


@functools.cache
def built(name):
    torch.manual_seed(0)
    return CASES[name].build()


@torch.no_grad()
def run(model, inputs, **options):
    return model(**inputs, **options)


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def same(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def shapes_of(found):
    return {key: [value.shape for value in values] for key, values in found.items()}


def code_objects(model):
    """Every Python function of the classes of the model's modules, wrapped ones too, with its code object."""
    codes = {}
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        for member in vars(cls).values():
            member = getattr(member, "__func__", member)
            while member is not None:
                if isinstance(member, FunctionType):
                    codes[member] = member.__code__
                member = getattr(member, "__wrapped__", None)
    return codes


def changed(codes):
    return {function.__qualname__ for function, code in codes.items() if function.__code__ is not code}


def is_weights(value):
    return value.min() >= 0 and np.allclose(1, value.sum(-1), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_its_map_under_its_path_and_the_output_stays_the_same(name):
    model, case = built(name), CASES[name]
    expected = run(model, case.inputs)
    with capture(model, case.local) as found:
        assert same(expected, run(model, case.inputs))
    assert [(key, [shape]) for key, shape in case.shapes.items()] == list(shapes_of(found).items())
    assert [re.match(case.others, key) is None for key in found] == [is_weights(value) for [value] in found.values()]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.returned])
def test_the_maps_are_exactly_those_that_transformers_returns(name):
    model, case = built(name), CASES[name]
    with capture(model, case.local) as found:
        returned = case.returned(run(model, case.inputs, output_attentions=True))
    for theirs, (key, [ours]) in zip(returned, found.items(), strict=True):
        if theirs is not None:
            np.testing.assert_array_equal(theirs.numpy(), ours, key)


@pytest.mark.parametrize("name", CASES)
def test_every_function_has_its_very_code_back_also_when_the_model_raises(name):
    model, case = built(name), CASES[name]
    expected, codes = run(model, case.inputs), code_objects(model)
    with capture(model, case.local):
        run(model, case.inputs)
        assert {f"{type(model.get_submodule(key)).__qualname__}.forward" for key in case.shapes} == changed(codes)
    assert set() == changed(codes)

    def fail(module, args):
        raise ZeroDivisionError

    *_, last = case.shapes
    inside = next(model.get_submodule(last).children(), model.get_submodule(last))
    hook = inside.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError), capture(model, case.local) as found:
            run(model, case.inputs)
    finally:
        hook.remove()
    assert set() == changed(codes)
    assert [] == found[last], "its call raised"
    assert {0, 1} == set(map(len, found.values()))
    assert same(expected, run(model, case.inputs))


def test_talking_heads_have_their_softmax_among_the_assignments():
    with capture(built("timm CaiT"), "attn", at="assign") as found:
        run(built("timm CaiT"), CASES["timm CaiT"].inputs)
    steps = found["blocks.0.attn"]  # product, mixed, softmax, mixed again, dropout
    assert [False, False, True, False, False] == list(map(is_weights, steps))


@pytest.mark.parametrize(
    ("build", "case", "recorded"),
    [
        (lambda: timm_model("vit_tiny_patch16_224", fused=True, img_size=64, depth=2), CASES["timm ViT"], []),
        (lambda: transformers_model("Llama", attention="sdpa", **TEXT, **SIZE), CASES["Llama"], [None]),
    ],
    ids=["timm", "transformers"],
)
def test_a_fused_kernel_leaves_no_map_and_one_warning_says_what_to_do(build, case, recorded):
    model = build()
    with pytest.warns(VisualizerWarning) as caught, capture(model, case.local) as found:
        run(model, case.inputs)
    [message] = [str(warning.message) for warning in caught]
    assert re.search(r"set_fused_attn\(False\).*\"eager\"", message)
    assert dict.fromkeys(case.shapes, recorded) == found


def test_generated_tokens_are_one_call_each_with_one_query():
    model = transformers_model("GPT2", "LMHeadModel", **GPT2)
    options = {"attention_mask": PADDING * 0 + 1, "min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(IDS, **options)
    with capture(model, "attn_weights") as found:
        assert torch.equal(expected, model.generate(IDS, **options))
    calls = [(2, 4, 5, 5), (2, 4, 1, 6), (2, 4, 1, 7)]
    assert {"transformer.h.0.attn": calls, "transformer.h.1.attn": calls} == shapes_of(found)


def test_layers_that_share_one_module_have_one_key_with_a_call_for_each():
    model = transformers_model("Albert", embedding_size=16, **TEXT, **SIZE)
    with capture(model, "attn_weights") as found:
        returned = run(model, {"input_ids": IDS}, output_attentions=True).attentions
    assert {"encoder.albert_layer_groups.0.albert_layers.0.attention": [(2, 4, 5, 5)] * 2} == shapes_of(found)
    for theirs, ours in zip(returned, *found.values(), strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours)


@pytest.mark.parametrize("name", ["timm ViT", "Llama"])
def test_only_the_model_is_captured_not_its_copies_nor_others_of_its_class(name):
    model, case = built(name), CASES[name]
    others = [case.build(), copy.deepcopy(model)]
    with capture(model, case.local) as alone:
        run(model, case.inputs)
    with capture(model, case.local) as found:
        for one in [*others, model, copy.deepcopy(model)]:
            run(one, case.inputs)
    assert list(case.shapes) == list(alone) == list(found)
    np.testing.assert_array_equal(alone.stack(), found.stack())


@functools.cache
def torchvision_vit():
    """And the keys of its attention."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 16, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64).eval()
    return model, expand("encoder.layers.encoder_layer_{0,1}.self_attention")


def test_torchvision_hands_over_what_attention_puts_out_but_not_on_the_fast_path():
    """(batch, tokens, C), or (tokens, batch, C) in a torch that turns it only as it returns it."""
    (model, keys), x, outputs = torchvision_vit(), images(32), []
    expected, codes = model(x), code_objects(model)
    hooks = [model.get_submodule(key).register_forward_hook(lambda *call: outputs.append(call[-1][0])) for key in keys]
    with capture(model, "attn_output", keep="tensor") as found:
        assert torch.equal(expected, model(x))
        assert {"MultiheadAttention.forward"} == changed(codes)
    assert set() == changed(codes)
    for hook in hooks:
        hook.remove()
    assert keys == list(found)
    for theirs, [ours] in zip(outputs, found.values(), strict=True):
        assert torch.equal(theirs, ours if ours.shape == theirs.shape else ours.transpose(0, 1))
    fast = run(model, {"x": x})
    with pytest.warns(VisualizerWarning, match="'attn_output' was not bound") as caught:
        with capture(model, "attn_output") as found:
            assert torch.equal(fast, run(model, {"x": x}))
    assert 1 == len(caught)
    assert {key: [] for key in keys} == found


def test_torchvision_makes_no_map_but_the_queries_and_keys_to_make_it_of():
    model, keys = torchvision_vit()
    with pytest.warns(VisualizerWarning, match="'attn_output_weights' was None"):
        with capture(model, "attn_output_weights") as found:
            model(images(32))
    assert {key: [None] for key in keys} == found
    attention, x = model.get_submodule(keys[0]), torch.randn(2, 5, 32)
    # They are deleted before the function returns; as last assigned they are (batch, heads, tokens, C / heads).
    function = "torch.nn.functional:multi_head_attention_forward"
    with capture(function, "q", "k", at="assign", keep="tensor") as found:
        attention(x, x, x, need_weights=False)
    q, k = (values[-1] for values in found.values())
    maps = attention(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(maps, (q @ k.mT / 8**0.5).softmax(-1))


@pytest.mark.parametrize(("average", "shape"), [(True, (2, 5, 5)), (False, (2, 4, 5, 5))])
def test_multihead_attention_that_is_asked_for_weights_has_them_as_a_local(average, shape):
    """(batch, queries, keys) where it averages over the heads."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    expected = attention(x, x, x, average_attn_weights=average)
    with capture(attention, "attn_output_weights") as found:
        assert same(expected, attention(x, x, x, average_attn_weights=average))
    assert {"": [shape]} == shapes_of(found)
    np.testing.assert_array_equal(expected[1].detach().numpy(), found[""][0])
    assert is_weights(found[""][0])

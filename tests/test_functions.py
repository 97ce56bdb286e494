"""Kernels that are registered in transformers' AttentionInterface: stand-ins with the documented signature."""

import pytest
import torch
from zoo import IDS, PADDING, SIZE, TEXT, transformers_model

from visualizer import VisualizerWarning, attention

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.modeling_utils")


@torch.compiler.disable
def exact(query, key, value, mask, scale, softcap=None):
    """Attention that no mode can see: the arithmetic of a compiled kernel, in numpy."""
    query, key, value = (tensor.detach().double().numpy() for tensor in (query, key, value))
    key, value = (array.repeat(query.shape[1] // key.shape[1], 1) for array in (key, value))
    scores = query @ key.swapaxes(-1, -2) * scale
    if softcap:
        import numpy as np

        scores = softcap * np.tanh(scores / softcap)
    scores[~mask.expand(scores.shape).numpy()] = -1e300
    scores -= scores.max(-1, keepdims=True)
    weights = 2.718281828459045**scores
    weights /= weights.sum(-1, keepdims=True)
    return torch.from_numpy(weights @ value).float()


def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **_):
    """As flash attention is called: the last query sees the last key; the mask, if any, is (batch, keys)."""
    queries, keys = query.shape[2], key.shape[2]
    place = torch.arange(queries)[:, None] + keys - queries
    mask = (torch.arange(keys) <= place)[None, None]
    if sliding_window is not None:
        mask = mask & (torch.arange(keys) > place - sliding_window)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, -keys:].bool()
    return exact(query, key, value, mask, scaling, softcap).transpose(1, 2).contiguous(), None


@pytest.fixture
def kernel(request):
    modeling.AttentionInterface.register("stand_in", getattr(request, "param", flash))
    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    masks.register("stand_in", masks["flash_attention_2"])
    yield
    del modeling.AttentionInterface._global_mapping["stand_in"]
    del type(masks)._global_mapping["stand_in"]


def pair(name, head="Model", **options):
    options = TEXT | SIZE | {"num_key_value_heads": 2, "head_dim": 8} | options
    eager = transformers_model(name, head=head, **options)
    other = transformers_model(name, head=head, attention="stand_in", **options)
    other.load_state_dict(eager.state_dict())
    return eager, other


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 3}),
        ("Gemma2", {"sliding_window": 3, "attn_logit_softcapping": 2.0}),
    ],
)
def test_a_map_as_the_eager_model_has_it(kernel, name, options, is_padded):
    eager, model = pair(name, **options)
    inputs = {"input_ids": IDS} | ({"attention_mask": PADDING} if is_padded else {})
    with torch.no_grad():
        before = model(**inputs)[0]
        expected = eager(**inputs, output_attentions=True).attentions
        with attention(model) as maps:
            after = model(**inputs)[0]
    assert torch.equal(before, after)
    assert len(maps) == len(expected) == 2
    real = PADDING.bool() if is_padded else torch.ones(2, 5, dtype=torch.bool)
    for found, eagerly in zip(maps, expected, strict=True):
        assert found.shape == eagerly.shape
        assert not found.axes_assumed
        assert (found.dense() - eagerly)[real[:, None].expand(found.shape[:3])].abs().max() < 1e-5


def test_generation(kernel):
    eager, model = pair("Llama", head="ForCausalLM")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = IDS[:1]
    steps = eager.generate(prompt, **settings, output_attentions=True, return_dict_in_generate=True).attentions
    with attention(model) as maps:
        model.generate(prompt, **settings)
    for step, expected in enumerate(steps):
        for path, eagerly in zip(maps.paths, expected, strict=True):
            assert (maps.calls(path)[step].dense() - eagerly).abs().max() < 1e-5


def wrong(module, query, key, value, attention_mask, **options):
    output, _ = flash(module, query, key, value, attention_mask, **options)
    return output + torch.linspace(0, 1, output.shape[-1]), None


@pytest.mark.parametrize("kernel", [wrong], indirect=True)
def test_a_kernel_that_does_something_else_has_no_map(kernel):
    _, model = pair("Llama")
    with pytest.warns(VisualizerWarning, match="stand_in returned, by") as warned, attention(model) as maps:
        model(IDS)
    assert len(maps) == 0
    assert len(warned) == 2


def through(module, query, key, value, attention_mask, **options):
    return modeling.ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **options)


@pytest.mark.parametrize("kernel", [through], indirect=True)
def test_a_kernel_that_calls_a_known_one_is_recorded_once(kernel):
    _, model = pair("Llama")
    with attention(model) as maps:
        model(IDS)
    assert len(maps) == 2


def test_functions_are_again_what_they_were(kernel):
    functions = modeling.ALL_ATTENTION_FUNCTIONS
    before = {name: functions[name] for name in functions}
    functions["stand_in"] = local = lambda *args, **kwargs: flash(*args, **kwargs)
    try:
        _, model = pair("Llama")
        with attention(model), attention(model) as maps:
            model(IDS)
            assert functions["sdpa"] is not before["sdpa"]
        assert len(maps) == 2
        assert functions["stand_in"] is local
    finally:
        del functions["stand_in"]
    assert {name: functions[name] for name in functions} == before
    assert not functions._local_mapping

"""get_local on PyTorch modules: the decorators that people stack, real models, and what they were surprised by."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visualizer import UnknownLocalError, VisualizerWarning


def attention_class(gl, decorate):
    class Attention(nn.Module):
        def __init__(self, dim=8, heads=2):
            super().__init__()
            self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

        @decorate
        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            attn = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
            attn = attn.softmax(dim=-1)
            return self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))

    return Attention


@pytest.mark.parametrize(
    "decorate",
    [
        pytest.param(lambda gl: lambda f: gl("attn")(f), id="plain"),
        pytest.param(lambda gl: lambda f: gl("attn")(torch.no_grad()(f)), id="outside no_grad"),
        pytest.param(lambda gl: lambda f: torch.no_grad()(gl("attn")(f)), id="inside no_grad"),
        pytest.param(lambda gl: lambda f: gl("attn")(torch.inference_mode()(f)), id="outside inference_mode"),
    ],
)
@pytest.mark.parametrize("when", ["before it is defined", "before it is built", "before it is called"])
def test_twelve_layers_hand_over_their_maps(gl, decorate, when):
    if when == "before it is defined":
        gl.activate()
    attention = attention_class(gl, decorate(gl))
    if when == "before it is built":
        gl.activate()
    model = nn.Sequential(*[attention() for _ in range(12)])
    images = torch.randn(3, 5, 8)
    if when == "before it is called":
        expected = model(images)
        gl.activate()
        assert torch.equal(expected, model(images))
    else:
        model(images)
    [key] = gl.cache
    maps = gl.cache[key]
    assert [(np.ndarray, (3, 2, 5, 5))] * 12 == [(type(m), m.shape) for m in maps]
    np.testing.assert_allclose(np.ones((12, 3, 2, 5)), np.stack(maps).sum(-1), rtol=1e-6)


def test_a_module_class_stands_for_its_forward(gl):
    attention = attention_class(gl, lambda f: f)
    assert gl("attn")(attention) is attention
    gl.activate()
    attention()(torch.randn(1, 5, 8))
    assert [(1, 2, 5, 5)] == [m.shape for m in gl.cache[next(iter(gl.cache))]]


def test_a_module_class_whose_local_is_in_another_method(gl):
    class Attention(nn.Module):
        def attend(self, x):
            attn = x.softmax(-1)
            return attn

        def forward(self, x):
            return self.attend(x)

    with pytest.raises(UnknownLocalError, match=r"Decorate .*Attention\.attend, which has it"):
        gl("attn")(Attention)


def test_a_module_class_that_inherits_its_forward(gl):
    """It is the base's, for all objects that run it."""

    class Base(nn.Module):
        def forward(self, x):
            attn = x
            return attn

    class Derived(Base):
        pass

    with pytest.warns(VisualizerWarning) as caught:
        assert gl("attn")(Derived) is Derived
    base, derived = Base.__qualname__, Derived.__qualname__
    for part in (f"{base}.forward, which all {base} objects run", f"capture({derived}, 'attn')"):
        assert part in str(caught[0].message)
    gl.activate()
    Base()(torch.ones(1)), Derived()(torch.ones(1))
    assert {f"{base}.forward": 2} == {key: len(values) for key, values in gl.cache.items()}


def test_a_module_class_without_a_forward(gl):
    class Encoder(nn.Module):
        def encode(self, x):
            attn = x
            return attn

    for name in ("attn", "input"):  # torch's own stand-in for a forward has an `input`
        with pytest.raises(TypeError, match=r"Encoder defines none\."):
            gl(name)(Encoder)
    with pytest.raises(TypeError, match=r"Decorate .*Encoder\.encode, which has it\."):
        gl("attn")(Encoder)


def test_training_with_the_decorator_in_place(gl):
    """The gradients of a step are the same bits, captured or not, and `graph` can be back-propagated through."""
    attention = attention_class(gl, gl("attn", keep="graph"))
    model = attention()
    x = torch.randn(2, 5, 8)

    def gradients():
        model.zero_grad()
        model(x).square().sum().backward(retain_graph=True)
        return [p.grad.clone() for p in model.parameters()]

    off = gradients()
    gl.activate()
    on = gradients()
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))
    model.zero_grad()
    [attn] = gl.cache[next(iter(gl.cache))]
    (attn * torch.arange(5.0)).sum().backward()
    assert model.qkv.weight.grad.abs().sum() > 0


def test_none_in_an_attention_forward_warns_and_points_to_the_flag(gl):
    """As in ViT-pytorch, whose `weights` is None unless the model is built with vis=True."""

    class Attention(nn.Module):
        def __init__(self, vis):
            super().__init__()
            self.vis = vis

        @gl("weights")
        def forward(self, x):
            attention_probs = x.softmax(-1)
            weights = attention_probs if self.vis else None
            return attention_probs, weights

    gl.activate()
    with pytest.warns(VisualizerWarning, match="flag of the model"):
        Attention(vis=False)(torch.ones(2, 2))
    Attention(vis=True)(torch.ones(2, 2))
    first, second = gl.cache[next(iter(gl.cache))]
    assert first is None
    assert second.shape == (2, 2)


def test_a_local_that_is_deleted_before_the_return_points_to_assign(gl):
    @gl("q")
    def forward(x):
        q = x * 2
        result = q + 1
        del q
        return result

    gl.activate()
    with pytest.warns(VisualizerWarning, match="deletes it before it returns: capture it with at='assign'"):
        forward(torch.ones(2))


def test_none_after_tensors_warns(gl):
    @gl("state")
    def step(state):
        return state

    gl.activate()
    step(torch.ones(1))
    with pytest.warns(VisualizerWarning, match="'state' was None"):
        step(None)
    assert 2 == len(gl.cache[next(iter(gl.cache))])


def test_timm_with_fused_attention_warns_once_and_unfused_hands_over_the_maps(gl):
    import timm
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import Attention

    gl("attn")(Attention)
    code = Attention.forward.__code__
    images = torch.randn(1, 3, 64, 64)

    def build():
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()

    with torch.no_grad():
        expected = build()(images)
        with gl.activate(), pytest.warns(VisualizerWarning) as caught:
            assert torch.equal(expected, build()(images))
        assert 1 == len(caught)
        assert "set_fused_attn(False)" in str(caught[0].message)
        assert {"Attention.forward": []} == gl.cache
        set_fused_attn(False)
        try:
            model = build()
            plain = model(images)
            with gl.activate():
                assert torch.equal(plain, model(images))
        finally:
            set_fused_attn(True)
    assert [(1, 3, 17, 17)] * 3 == [m.shape for m in gl.cache["Attention.forward"]]
    assert Attention.forward.__code__ is code


def test_transformers_eager_attention_equals_what_the_model_returns(gl):
    from transformers import BertConfig, BertModel
    from transformers.models.bert import modeling_bert

    gl("attn_weights")(modeling_bert.eager_attention_forward)
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=50)
    config._attn_implementation = "eager"
    model = BertModel(config).eval()
    with torch.no_grad(), gl.activate():
        output = model(torch.tensor([[1, 2, 3, 4]]), output_attentions=True)
    captured = gl.cache["eager_attention_forward"]
    assert 3 == len(captured) == len(output.attentions)
    for theirs, ours in zip(output.attentions, captured, strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours)


def test_in_place_operations_after_the_call_do_not_reach_the_record(gl):
    @gl("attn", at="assign")
    def forward(x):
        attn = x * 1
        attn += 1
        attn.mul_(10)
        return attn

    gl.activate()
    forward(torch.zeros(2)).fill_(99)
    assert [[0, 0], [1, 1]] == [value.tolist() for value in gl.cache[next(iter(gl.cache))]]


def test_the_limit_bounds_the_memory_of_a_long_run(gl):
    attention = attention_class(gl, gl("attn"))
    gl.activate(limit=4)
    model = attention()
    with torch.no_grad():
        for _ in range(50):
            model(torch.randn(1, 5, 8))
    assert 4 == len(gl.cache[next(iter(gl.cache))])


def test_a_budget_in_bytes_is_exact_for_tensors(gl):
    @gl("attn")
    def forward(attn):
        return attn

    gl.activate(max_bytes=2 * 700)  # 400 for the elements, and the rest for the array and where it comes from
    with pytest.warns(VisualizerWarning, match="1,400 bytes on cpu"):
        for _ in range(5):
            forward(torch.ones(100))
    assert 2 == len(gl.cache[next(iter(gl.cache))])


def test_a_name_that_only_looks_like_attention_is_no_cause_to_warn(gl):
    @gl("pattern")
    def search(pattern):
        return pattern

    gl.activate()
    search(None)
    assert [None] == gl.cache[next(iter(gl.cache))]


@pytest.mark.parametrize("keep", ["numpy", "tensor", "graph"])
def test_small_tensors_first_do_not_let_large_ones_past_the_budget(gl, keep):
    @gl("attn", keep=keep)
    def forward(attn):
        return attn

    gl.activate(max_bytes=10 * 2**20)
    with pytest.warns(VisualizerWarning, match="cpu"):
        forward(torch.ones(1))
        for _ in range(100):
            forward(torch.ones(2**18))  # a mebibyte
        assert len(gl._store.arrived) < 12, "what is not filed yet counts too"
        assert 10 == len(gl.cache[next(iter(gl.cache))])


def test_a_parameter_that_is_none_is_no_cause_to_warn(gl):
    @gl("mask")
    def forward(x, mask=None):
        return x

    gl.activate()
    forward(torch.ones(1))
    assert [None] == gl.cache[next(iter(gl.cache))]


def test_the_packages_own_model_leaves_the_plain_key_to_the_user():
    code = "from visualizer import get_local, models; models.VisionTransformer; print(*get_local.cache)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert "PlainAttention.forward" == done.stdout.strip(), done.stderr


def test_scripting_and_tracing_a_decorated_module_that_is_not_active(gl):
    attention = attention_class(gl, gl("attn"))
    assert "attn" in inspect.getsource(attention.forward)
    model, x = attention().eval(), torch.randn(1, 5, 8)
    with pytest.warns(match=".*"):  # torch 2.13 says of both that they are deprecated
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(model(x), traced(x))

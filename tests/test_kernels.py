"""Each fused kernel's function, alone: the map that its answer describes, times the values, is the kernel's output."""

import pytest
import torch
import torch.nn.attention.bias
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visualizer.intercept import kernels
from visualizer.intercept.kernels import KERNELS, as_computed, four_axes, in_four_axes, name_of
from visualizer.maps import AttentionMap, Factors, Keys

B, H, Q, K, D = 2, 4, 5, 7, 8


def inputs(lead=(B, H), key_lead=None, queries=Q, keys=K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(*lead, queries, D, generator=generator)
    key, value = (torch.randn(*(key_lead or lead), keys, D, generator=generator) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def weights_of(call):
    functions = call.score_mod, call.mask_mod
    factors = Factors(call.query, Keys(call.key), call.key.shape[2], call.scale, call.mask, call.causal, *functions)
    return AttentionMap.from_source(factors).dense()


def assert_is_output(call, tolerance=1e-6):
    values = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
    output = weights_of(call) @ values.float()
    assert (output.reshape(call.output.shape) - call.output).abs().max() < tolerance


class TestScaledDotProductAttention:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"is_causal": True},
            {"scale": 0.3},
            {"attn_mask": torch.arange(K).expand(Q, K) < 4},
            {"attn_mask": torch.linspace(-2, 2, Q * K).view(Q, K)},
            {"attn_mask": torch.nn.attention.bias.causal_lower_right(Q, K)},
            {"attn_mask": torch.nn.attention.bias.causal_upper_left(Q, K)},
        ],
        ids=["plain", "causal", "scale", "bool mask", "numbers", "lower right", "upper left"],
    )
    def test_options(self, options):
        query, key, value = inputs()
        output = F.scaled_dot_product_attention(query, key, value, **options)
        assert_is_output(kernels.scaled_dot_product_attention(output, query, key, value, **options))

    def test_by_position(self):
        query, key, value = inputs()
        rest = None, 0.0, True
        output = F.scaled_dot_product_attention(query, key, value, *rest)
        assert_is_output(kernels.scaled_dot_product_attention(output, query, key, value, *rest))

    def test_grouped_heads(self):
        query, key, value = inputs(key_lead=(B, 2))
        output = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        assert_is_output(kernels.scaled_dot_product_attention(output, query, key, value, enable_gqa=True))

    def test_dropout_is_told(self):
        query, key, value = inputs()
        call = kernels.scaled_dot_product_attention(query, query, key, value, dropout_p=0.25)
        assert call.dropout == 0.25


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
class TestFlexAttention:
    @pytest.mark.parametrize("score_mod", [None, lambda score, b, h, q, k: score * 0.5 + h - (q - k).abs()])
    @pytest.mark.parametrize("mask_mod", [None, lambda b, h, q, k: (k <= q) | (h == b)])
    def test_as_the_operator_is_called(self, score_mod, mask_mod):
        flex = pytest.importorskip("torch.nn.attention.flex_attention")  # since torch 2.5
        query, key, value = inputs()
        block = None if mask_mod is None else flex.create_block_mask(mask_mod, B, H, Q, K, device="cpu")
        seen = []

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                output = func(*args, **(kwargs or {}))
                if getattr(func, "__name__", "") == "flex_attention":
                    seen.append(KERNELS["flex_attention"](output, *args, **(kwargs or {})))
                return output

        with Mode():
            output = flex.flex_attention(query, key, value, score_mod, block, scale=0.4)
        [call] = seen
        assert torch.equal(call.output, output)
        assert (call.score_mod is None, call.mask_mod is None) == (score_mod is None, mask_mod is None)
        assert_is_output(call)

    def test_tensors_that_a_function_is_given_apart(self):
        query, key, value = inputs()
        bias = torch.randn(H)

        def score_mod(score, batch, head, query, key, bias):
            return score + bias[head]

        output = torch.zeros(1)
        call = kernels.flex_attention((output,), query, key, value, score_mod, (), None, {}, (bias,))
        index = torch.tensor(1)
        assert call.score_mod(torch.tensor(2.0), index, index, index, index) == 2 + bias[1]


class TestMultiHeadAttention:
    def test_a_mode_sees_the_calls_in_it(self):
        names = []

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                names.append(name_of(func))
                if name_of(func) == "multi_head_attention_forward":
                    with self:
                        return kernels.multi_head_attention(*args, **(kwargs or {}))
                return func(*args, **(kwargs or {}))

        layer, x = nn.MultiheadAttention(8, 2), torch.randn(5, 1, 8)
        expected = layer(x, x, x, need_weights=False)[0]
        with Mode():
            output = layer(x, x, x, need_weights=False)[0]
        assert torch.equal(expected, output)
        assert "scaled_dot_product_attention" in names


class TestAxes:
    @pytest.mark.parametrize(
        ("shape", "heads", "expected"),
        [
            ((5, 4), None, (1, 1, 5, 4)),
            ((6, 5, 4), None, (6, 1, 5, 4)),
            ((6, 5, 4), 3, (2, 3, 5, 4)),
            ((2, 3, 5, 4), 3, (2, 3, 5, 4)),
            ((2, 7, 3, 5, 4), None, (14, 3, 5, 4)),
        ],
    )
    def test_four_axes(self, shape, heads, expected):
        assert four_axes(torch.zeros(shape), heads).shape == expected

    def test_heads_on_the_axis_of_queries(self):
        """As transformers calls the kernel with grouped heads, a single query, and a mask."""
        query, key, value = inputs((B, 2), queries=3, keys=K)  # 2 key heads of 3 query heads, one query each
        mask = torch.rand(B, 2, 3, K, generator=torch.Generator().manual_seed(1)) < 0.7
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        call = kernels.scaled_dot_product_attention(output, query, key, value, attn_mask=mask)
        call = in_four_axes(call, None, groups=3)
        assert call.query.shape == (B, 6, 1, D)
        assert weights_of(call).shape == (B, 6, 1, K)
        assert_is_output(call)

    @pytest.mark.parametrize("lead", [(), (6,), (2, 3, 4)])
    def test_a_mask_gets_them_too(self, lead):
        query, key, value = inputs(lead)
        mask = torch.rand(Q, K, generator=torch.Generator().manual_seed(1)) < 0.7
        mask[:, 0] = True
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        call = kernels.scaled_dot_product_attention(output, query, key, value, attn_mask=mask)
        assert_is_output(in_four_axes(call, None, groups=1))


def test_autocast_rounds_query_and_key():
    query, key, value = inputs()
    call = kernels.scaled_dot_product_attention(query, query, key, value)
    assert as_computed(call) is call
    with torch.autocast("cpu", torch.bfloat16):
        assert as_computed(call).query.dtype == as_computed(call).key.dtype == torch.bfloat16
        double = kernels.scaled_dot_product_attention(*(tensor.double() for tensor in (query, query, key, value)))
        assert as_computed(double) is double


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.softmax, "softmax"),
        (torch.Tensor.softmax, "softmax"),
        (torch.ops.aten.softmax.int, "softmax"),
        (torch.ops.aten.scaled_dot_product_attention.default, "scaled_dot_product_attention"),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
    ],
)
def test_names(function, name):
    assert name_of(function) == name

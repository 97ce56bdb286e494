"""Each fused kernel's function, alone: the map that its answer describes, times the values, is the kernel's output."""

import math
from dataclasses import dataclass

import kernels_by_hand
import pytest
import torch
import torch.nn.attention.bias
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visualizer import attention
from visualizer.intercept import kernels
from visualizer.intercept.calls import as_computed, four_axes, in_four_axes, multi_head_attention, name_of
from visualizer.intercept.kernels import KERNELS
from visualizer.maps import AttentionMap, Factors, Keys

B, H, Q, K, D = 2, 4, 5, 7, 8


def inputs(lead=(B, H), key_lead=None, queries=Q, keys=K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(*lead, queries, D, generator=generator)
    key, value = (torch.randn(*(key_lead or lead), keys, D, generator=generator) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def weights_of(call):
    functions = call.score_mod, call.mask_mod
    settings = call.scale, call.mask, call.causal, *functions, call.modifiers
    factors = Factors(call.query, Keys(call.key), call.key.shape[2], *settings)
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


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def maps_of(function, *args, **kwargs):
    """The maps of a module that calls a function."""
    model = Calls(function)
    with attention(model) as maps:
        model(*args, **kwargs)
    return maps


is_recent = pytest.mark.skipif(
    not hasattr(torch.library, "custom_op"), reason="torch before 2.4 does not have all of it"
)


@is_recent
class TestOperators:
    BIAS = torch.linspace(-2, 2, Q * K).view(Q, K)

    @pytest.mark.parametrize(
        ("name", "args", "options", "bias"),
        [
            ("scaled_dot_product_attention", (), {"is_causal": True}, None),
            ("scaled_dot_product_attention.default", (BIAS,), {"scale": 0.3}, BIAS),
            ("_scaled_dot_product_flash_attention_for_cpu", (0.0, True), {}, None),
            ("_scaled_dot_product_flash_attention_for_cpu", (), {"attn_mask": BIAS, "scale": 0.3}, BIAS),
            ("_scaled_dot_product_attention_math", (BIAS,), {"scale": 0.3}, BIAS),
            ("_scaled_dot_product_attention_math.default", (None, 0.0, True), {}, None),
        ],
    )
    def test_operators_that_a_cpu_has(self, name, args, options, bias):
        operator = torch.ops.aten
        for part in name.split("."):
            operator = getattr(operator, part)
        query, key, value = inputs()
        scores = query @ key.mT * options.get("scale", D**-0.5)
        scores = scores + (torch.ones(Q, K).tril().log() if bias is None else bias)
        [found] = maps_of(operator, query, key, value, *args, **options)
        torch.testing.assert_close(found.dense(), scores.softmax(-1))

    @pytest.mark.parametrize("name", ["_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"])
    def test_operators_that_a_gpu_has(self, name):
        query, key, value = inputs()
        output = F.scaled_dot_product_attention(query, key, value, self.BIAS, scale=0.3)
        assert_is_output(KERNELS[name]((output,), query, key, value, self.BIAS, False, scale=0.3))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert_is_output(KERNELS[name]((output,), query, key, value, None, True, 0.0, True))

    def test_dropout_is_told(self):
        query, key, value = inputs()
        call = KERNELS["_scaled_dot_product_attention_math"]((query, query), query, key, value, dropout_mask=query > 0)
        assert call.dropout


@is_recent
class TestNestedTensors:
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
    def test_they_are_packed_sequences(self, layout):
        generator = torch.Generator().manual_seed(0)
        queries, keys = ([torch.randn(H, size, D, generator=generator) for size in sizes] for sizes in ((3, 5), (4, 2)))
        if layout == torch.jagged:  # only one axis is ragged, and it is the second at first
            parts = [
                torch.nested.nested_tensor([t.transpose(0, 1) for t in ts], layout=layout) for ts in (queries, keys)
            ]
            query, key = (part.transpose(1, 2) for part in parts)
        else:
            query, key = (torch.nested.nested_tensor(tensors, layout=layout) for tensors in (queries, keys))
        [found] = maps_of(F.scaled_dot_product_attention, query, key, key, scale=0.5)
        expected = [(0.5 * q @ k.mT).softmax(-1) for q, k in zip(queries, keys, strict=True)]
        assert found.shape == (1, H, 8, 6)
        assert not found.axes_assumed
        torch.testing.assert_close(found.dense()[0], kernels_by_hand.block_diagonal(expected))
        for sequence, weights in zip(found.sequences, expected, strict=True):
            torch.testing.assert_close(sequence.dense()[0], weights)


STARTS, KEY_STARTS = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 2, 5], [0, 3, 7]))


@pytest.fixture(scope="module")
def varlen():
    """torch's function over exact arithmetic, which it does not have on a CPU."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not {"scale", "window_size", "seqused_k"} <= set(varlen.varlen_attn.__annotations__):
        pytest.skip("this release of torch has fewer arguments")

    @varlen._varlen_attn.register_kernel("cpu")
    def attend(query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale, window, gqa, used=None, *_):
        ends = kernels_by_hand.pairs(cu_k)
        if used is not None:
            ends = [(first, first + int(count)) for (first, _), count in zip(ends, used, strict=True)]
        options = {"scale": scale, "causal": is_causal, "window": tuple(window)}
        output = kernels_by_hand.attend_packed(query, key, value, kernels_by_hand.pairs(cu_q), ends, **options)
        return output, query.new_zeros(1), torch.zeros(2, dtype=torch.uint64)

    return varlen


class TestVarlenAttention:
    @pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1)])
    def test_windows(self, varlen, window):
        q, k, v = packed_inputs()
        args = STARTS, KEY_STARTS, 3, 4
        [found] = maps_of(varlen.varlen_attn, q, k, v, *args, window_size=window, scale=0.3, enable_gqa=True)
        assert_is_packed(found, q, k, scale=0.3, window=window)

    def test_keys_in_use(self, varlen):
        q, k, v = packed_inputs()
        used = torch.tensor([2, 3])
        [found] = maps_of(varlen.varlen_attn, q, k, v, STARTS, KEY_STARTS, 3, 4, seqused_k=used, enable_gqa=True)
        expected = kernels_by_hand.weights_of(q[2:], k[3:6]).float()
        torch.testing.assert_close(found.dense()[0, :, 2:, 3:6], expected)
        assert found.dense()[0, :, 2:, 6:].sum() == found.dense()[0, :, :2, 2].sum() == 0
        assert found.sequences[1].shape == (1, H, 3, 3)


def packed_inputs():
    """Two sequences of 2 and 3 queries, and of 3 and 4 keys."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, heads, D, generator=generator) for size, heads in ((5, H), (7, 2), (7, 2))]


def assert_is_packed(found, q, k, slopes=None, **options):
    parts = [
        kernels_by_hand.weights_of(
            q[slice(*ends)], k[slice(*key_ends)], slopes=slopes if slopes is None else slopes[number], **options
        )
        for number, (ends, key_ends) in enumerate(
            zip(kernels_by_hand.pairs(STARTS), kernels_by_hand.pairs(KEY_STARTS), strict=True)
        )
    ]
    torch.testing.assert_close(found.dense()[0].double(), kernels_by_hand.block_diagonal(parts), atol=1e-6, rtol=0)
    for sequence, part in zip(found.sequences, parts, strict=True):
        torch.testing.assert_close(sequence.dense()[0].double(), part, atol=1e-6, rtol=0)


SLOPES = torch.tensor([[0.5, 0.25, 1, 2], [1, 0, 0.1, 0.3]])
FLASH_OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (2, -1)},
    "open window": {"window_size": (-1, 1)},
    "chunks": {"attention_chunk": 2},
    "causal chunks": {"attention_chunk": 3, "causal": True},
    "chunks and a window": {"attention_chunk": 3, "window_size": (1, 1)},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "alibi both ways": {"alibi_slopes": SLOPES},
    "sinks": {"s_aux": SLOPES[0], "causal": True},
    "learnable sinks": {"learnable_sink": SLOPES[0]},
}


def by_hand(options):
    """The same options by the names that `kernels_by_hand` has."""
    names = {"softmax_scale": "scale", "window_size": "window", "alibi_slopes": "slopes"}
    names |= {"s_aux": "sinks", "learnable_sink": "sinks", "attention_chunk": "chunk"}
    return {names.get(name, name): value for name, value in options.items()}


class TestFlashAttention:
    """Each function's own layout, and what all have in common."""

    @pytest.fixture(params=FLASH_OPTIONS)
    def options(self, request):
        return FLASH_OPTIONS[request.param]

    def batch(self, heads=2):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(B, *size, D, generator=generator) for size in ((Q, H), (K, heads), (K, heads))]

    def test_a_batch(self, options):
        q, k, v = self.batch()
        output = kernels_by_hand.attend_batch(q, k, v, **by_hand(options))
        for call in (
            kernels.flash_attn_func(output, q, k, v, **options),
            kernels.flash_attn_kvpacked_func((output, None), q, torch.stack([k, v], 2), **options),
            kernels.flash_attn_varlen_func(output, q, k, v, **options),
            kernels.flash_attn_with_kvcache(output, q, k, v, **options),
        ):
            assert call.has_heads
            assert_is_output(call)
            assert call.as_output(call.returned).shape == call.output.shape

    def test_three_in_one(self, options):
        q, k, v = (torch.randn(B, Q, H, D, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
        output = kernels_by_hand.attend_batch(q, k, v, **by_hand(options))
        assert_is_output(kernels.flash_attn_qkvpacked_func(output, torch.stack([q, k, v], 2), **options))
        k, v = k[:, :, :2], v[:, :, :2]
        output = kernels_by_hand.attend_batch(q, k, v, **by_hand(options))
        assert_is_output(kernels.flash_attn_qkvpacked_func(output, torch.cat([q, k, v], 2), num_heads_q=H, **options))

    def test_packed_sequences(self, options):
        q, k, v = packed_inputs()
        ends = kernels_by_hand.pairs(STARTS), kernels_by_hand.pairs(KEY_STARTS)
        output = kernels_by_hand.attend_packed(q, k, v, *ends, **by_hand(options))
        for call in (
            kernels.flash_attn_varlen_func(output, q, k, v, STARTS, KEY_STARTS, **options),
            kernels.flash_attn_varlen_kvpacked_func(
                output, q, torch.stack([k, v], 1), cu_seqlens_q=STARTS, cu_seqlens_k=KEY_STARTS, **options
            ),
        ):
            assert_is_output(call)
            functions = None, call.causal, None, None, call.modifiers
            factors = Factors(call.query, Keys(call.key), 7, call.scale, *functions)
            assert_is_packed(AttentionMap.from_source(factors), q, k, **by_hand(options))

    def test_three_in_one_packed(self, options):
        qkv = torch.randn(5, 3, H, D, generator=torch.Generator().manual_seed(0))
        ends = kernels_by_hand.pairs(STARTS)
        output = kernels_by_hand.attend_packed(*qkv.unbind(1), ends, ends, **by_hand(options))
        assert_is_output(kernels.flash_attn_varlen_qkvpacked_func(output, qkv, STARTS, **options))

    def test_a_cache(self, options):
        q, k, v = self.batch()
        lengths, lefts = torch.tensor([5, 7]), torch.tensor([1, 0])
        hand = by_hand(options)
        output = kernels_by_hand.attend_batch(q, k, v, lengths=lengths, **hand)
        assert_is_output(kernels.flash_attn_with_kvcache(output, q, k, v, cache_seqlens=lengths, **options))
        new = k[:, :2]
        before = {"k": new, "v": new, "cache_seqlens": lengths - 2}
        assert_is_output(kernels.flash_attn_with_kvcache(output, q, k, v, **before, **options))
        output = kernels_by_hand.attend_batch(q, k, v, lengths=torch.tensor([6, 6]), lefts=lefts, **hand)
        own = {"cache_seqlens": 6, "cache_leftpad": lefts}
        assert_is_output(kernels.flash_attn_with_kvcache(output, q, k, v, **own, **options))
        rows = torch.tensor([1, 0])
        output = kernels_by_hand.attend_batch(q, k[rows], v[rows], **hand)
        assert_is_output(kernels.flash_attn_with_kvcache(output, q, k, v, cache_batch_idx=rows, **options))

    def test_packed_queries_and_a_cache(self, options):
        """As flash attention 3 has it."""
        q, (k, v) = packed_inputs()[0], self.batch()[1:]
        lengths = torch.tensor([5, 7])
        ends = kernels_by_hand.pairs(STARTS), [(0, 5), (K, K + 7)]
        output = kernels_by_hand.attend_packed(q, k.flatten(0, 1), v.flatten(0, 1), *ends, **by_hand(options))
        new = {"k": q[:, :2], "cu_seqlens_k_new": STARTS, "cache_seqlens": lengths - STARTS.diff()}
        for own in ({"cache_seqlens": lengths}, new):
            call = kernels.flash_attn_with_kvcache(output, q, k, v, cu_seqlens_q=STARTS, **own, **options)
            assert_is_output(call)

    @pytest.mark.parametrize("name", ["block_table", "page_table"])
    def test_a_cache_in_pages(self, options, name):
        generator = torch.Generator().manual_seed(0)
        pool, values = (torch.randn(6, 4, 2, D, generator=generator) for _ in range(2))
        table, lengths = torch.tensor([[3, 1], [0, 5]], dtype=torch.int32), torch.tensor([6, 8])
        q = self.batch()[0]
        k, v = (pages[table.long()].reshape(B, 8, 2, D) for pages in (pool, values))
        output = kernels_by_hand.attend_batch(q, k, v, lengths=lengths, **by_hand(options))
        own = {"cache_seqlens": lengths, name: table}
        assert_is_output(kernels.flash_attn_with_kvcache(output, q, pool, values, **own, **options))
        flat = q.flatten(0, 1)
        starts = torch.tensor([0, Q, 2 * Q])
        for own in ({"seqused_k": lengths}, {"cu_seqlens_k": torch.tensor([0, 6, 14])}):
            own = {name: table, **own, **options}
            assert_is_output(kernels.flash_attn_varlen_func(output.flatten(0, 1), flat, pool, values, starts, **own))

    def test_a_query_that_sees_nothing(self):
        q, k, v = self.batch()
        output = kernels_by_hand.attend_batch(q, k[:, :2], v[:, :2], causal=True)
        call = kernels.flash_attn_func(output, q, k[:, :2], v[:, :2], causal=True)
        assert_is_output(call)
        assert weights_of(call)[:, :, : Q - 2].abs().max() == 0

    def test_bounds_may_be_missing(self):
        """Flash attention 4 has None where there is no bound."""
        q, k, v = self.batch()
        output = kernels_by_hand.attend_batch(q, k, v, window=(2, -1))
        assert_is_output(kernels.flash_attn_func(output, q, k, v, window_size=(2, None)))
        output = kernels_by_hand.attend_batch(q, k, v)
        assert_is_output(kernels.flash_attn_func(output, q, k, v, window_size=(None, None), softcap=None))

    def test_dropout_is_told(self):
        q, k, v = self.batch(H)
        assert kernels.flash_attn_func(q, q, k, v, dropout_p=0.25).dropout == 0.25

    def test_nothing_of_the_size_of_a_map_is_made(self):
        """Of sequences with 20,000 tokens in all, a row is read."""
        q = torch.randn(20_000, 1, D, generator=torch.Generator().manual_seed(0))
        starts = torch.tensor([0, 5_000, 20_000])
        call = kernels.flash_attn_varlen_func(q, q, q, q, starts, starts, causal=True, window_size=(10, 0))
        held = sum(tensor.numel() for tensor in call.modifiers.tensors())
        assert held < 3 * 20_000
        factors = Factors(call.query, Keys(call.key), 20_000, modifiers=call.modifiers)
        row = AttentionMap.from_source(factors).rows([6_000])[0, 0, 0]
        assert row.nonzero().flatten().tolist() == [*range(5_990, 6_001)]


# As xformers documents them: what each adds to the scores, and where it says so.


@dataclass
class Ends:
    starts: list
    lengths: list

    def intervals(self):
        return [(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]


def bias_class(name, allowed, **fields):
    """A class of attn_bias: `allowed(i, j, queries, keys)` is about one sequence."""

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        mask = torch.full(shape[-2:], -math.inf, dtype=dtype)
        blocks = [((0, shape[-2]), (0, shape[-1]))]
        if hasattr(self, "q_seqinfo"):
            blocks = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for (start, end), (first, behind) in blocks:
            for i in range(end - start):
                for j in range(behind - first):
                    if allowed(i, j, end - start, behind - first):
                        mask[start + i, first + j] = 0
        return mask.expand(shape) + getattr(self, "_bias", 0)

    return type(name, (), {"materialize": materialize, **fields})()


PACKED = {"q_seqinfo": Ends([0, 2, 6], [2, 4, 3]), "k_seqinfo": Ends([0, 3, 8], [3, 5, 4])}
PADDED = {"q_seqinfo": Ends([0, 2, 6], [2, 4, 3]), "k_seqinfo": Ends([0, 4, 8], [3, 4, 3])}
TOP_LEFT = {"allowed": lambda i, j, *_: j <= i}
BOTTOM_RIGHT = {"allowed": lambda i, j, q, k: j - k <= i - q}
LOCAL = {"allowed": lambda i, j, q, k: 0 <= (i - q) - (j - k) < 2, "_window_size": 2}
BIASES = [
    ("LowerTriangularMask", TOP_LEFT),
    ("LowerTriangularFromBottomRightMask", BOTTOM_RIGHT),
    ("LowerTriangularFromBottomRightLocalAttentionMask", LOCAL),
    ("LowerTriangularMaskWithTensorBias", TOP_LEFT | {"_bias": torch.linspace(-1, 1, 9 * 12).view(9, 12)}),
    (
        "LocalAttentionFromBottomRightMask",
        {"allowed": lambda i, j, q, k: -1 <= (i - q) - (j - k) <= 2, "window_left": 2, "window_right": 1},
    ),
    ("BlockDiagonalMask", PACKED | {"allowed": lambda *_: True}),
    ("BlockDiagonalCausalMask", PACKED | TOP_LEFT),
    ("BlockDiagonalCausalFromBottomRightMask", PACKED | BOTTOM_RIGHT),
    (
        "BlockDiagonalCausalLocalAttentionMask",
        PACKED | {"allowed": lambda i, j, *_: 0 <= i - j < 2, "_window_size": 2},
    ),
    ("BlockDiagonalCausalLocalAttentionFromBottomRightMask", PACKED | LOCAL),
    ("BlockDiagonalPaddedKeysMask", PADDED | {"allowed": lambda *_: True}),
    ("BlockDiagonalCausalWithOffsetPaddedKeysMask", PADDED | BOTTOM_RIGHT),
    ("BlockDiagonalCausalLocalAttentionPaddedKeysMask", PADDED | LOCAL),
    (
        "BlockDiagonalLocalAttentionPaddedKeysMask",
        PADDED | {"allowed": lambda i, j, q, k: -1 <= (i - q) - (j - k) <= 2, "window_left": 2, "window_right": 1},
    ),
    ("PagedBlockDiagonalPaddedKeysMask", PADDED | {"allowed": lambda *_: True, "block_tables": torch.zeros(3, 1)}),
    ("MyOwnBias", {"allowed": lambda i, j, *_: (i + j) % 3 == 0}),
]


class TestMemoryEfficientAttention:
    """Layouts and classes of bias."""

    def inputs(self, *lead):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(lead[0], tokens, *lead[1:], D, generator=generator) for tokens in (9, 12, 12)]

    def expected(self, q, k, bias=0.0):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * D**-0.5 + bias
        return scores.softmax(-1).nan_to_num(0)

    @pytest.mark.parametrize(("name", "fields"), BIASES, ids=[name for name, _ in BIASES])
    def test_biases(self, name, fields):
        bias = bias_class(name, **fields)
        q, k, v = self.inputs(1, H)
        weights = self.expected(q, k, bias.materialize((1, H, 9, 12)))
        output = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        call = kernels.memory_efficient_attention(output, q, k, v, bias)
        torch.testing.assert_close(weights_of(call), weights)
        assert_is_output(call)
        assert call.has_heads
        assert (call.mask is None) == (not name.startswith(("My", "Paged")) and "_bias" not in fields)

    def test_layouts(self):
        bias = torch.linspace(-1, 1, 2 * 6 * 9 * 12).view(2, 6, 9, 12)
        q, k, v = self.inputs(2, 6)
        weights = self.expected(q, k, bias)
        output = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        assert_is_output(kernels.memory_efficient_attention(output, q, k, v, bias))
        grouped = [tensor.unflatten(2, (2, 3)) for tensor in (output, q, k, v)]
        call = kernels.memory_efficient_attention(*grouped, bias.unflatten(1, (2, 3)))
        assert call.query.shape == (2, 6, 9, D)
        assert call.key.shape == (2, 6, 12, D)
        assert_is_output(call)

    def test_heads_that_share_a_key(self):
        q, k, v = self.inputs(2, 6)
        k, v = (tensor[:, :, :2, None].expand(2, 12, 2, 3, D) for tensor in (k, v))
        weights = self.expected(q, k.flatten(2, 3))
        output = torch.einsum("bhqk,bkhd->bqhd", weights, v.flatten(2, 3)).unflatten(2, (2, 3))
        call = kernels.memory_efficient_attention(output, q.unflatten(2, (2, 3)), k, v)
        assert call.key.shape == call.value.shape == (2, 2, 12, D)
        torch.testing.assert_close(weights_of(call), weights)
        assert_is_output(call)

    def test_without_heads(self):
        q, k, v = self.inputs(6)
        bias = torch.linspace(-1, 1, 6 * 9 * 12).view(6, 9, 12)
        weights = (q @ k.mT * 0.3 + bias).softmax(-1)
        call = kernels.memory_efficient_attention(weights @ v, q, k, v, bias, scale=0.3)
        assert not call.has_heads
        call = in_four_axes(call, 3, groups=1)
        assert call.query.shape == (2, 3, 9, D)
        torch.testing.assert_close(weights_of(call), weights.view(2, 3, 9, 12))

    def test_dropout_is_told(self):
        q, k, v = self.inputs(1, H)
        assert kernels.memory_efficient_attention(q, q, k, v, p=0.25).dropout == 0.25


class TestMultiHeadAttention:
    def test_a_mode_sees_the_calls_in_it(self):
        names = []

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                names.append(name_of(func))
                if name_of(func) == "multi_head_attention_forward":
                    with self:
                        return multi_head_attention(*args, **(kwargs or {}))
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

"""The proof: what is not the map that was used is not handed over as one, and what is is never doubted."""

import gc
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import VisualizerWarning, attention
from visualizer.intercept import kernels
from visualizer.intercept.evidence import Evidence, of_fused, of_weights
from visualizer.maps import Factors, Keys


class Fused(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.options)


def factors(queries=7, keys=9, dtype=torch.float32, factor=1.0):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, keys, keys)
    return [torch.randn(2, 4, size, 8, generator=generator).mul(factor).to(dtype) for size in sizes]


def forgetting(name):
    """The kernel's function, if it forgot one of the arguments."""

    def function(output, *args, **kwargs):
        kwargs.pop(name, None)
        return kernels.scaled_dot_product_attention(output, *args, **kwargs)

    return function


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_mask", torch.arange(9).expand(7, 9) < 4),
        ("attn_mask", torch.linspace(-20, 20, 63).view(7, 9)),
        ("is_causal", True),
        ("scale", 1.0),
    ],
    ids=["a mask", "numbers", "causal", "scale"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_wrong_map_is_not_handed_over(name, value, dtype, monkeypatch):
    if name == "attn_mask" and value.dtype != torch.bool:
        value = value.to(dtype)
    model, inputs = Fused(**{name: value}), factors(dtype=dtype)
    with attention(model) as maps:
        model(*inputs)
    assert len(maps) == 1
    monkeypatch.setitem(kernels.KERNELS, "scaled_dot_product_attention", forgetting(name))
    said = r"the map of '' is not kept.*scaled_dot_product_attention returned, by [\d.e-]+, where \w+ allows"
    with pytest.warns(VisualizerWarning, match=said) as warned, attention(model) as maps:
        model(*inputs)
        model(*inputs)
    assert len(warned) == 1
    assert len(maps) == 0


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 4), (4, 2), (2, 4), (2, 1)])
def test_keys_and_values_with_other_numbers_of_heads(key_heads, value_heads, monkeypatch):
    q, k, v = factors()
    q, k, v = torch.cat([q, q + 1], 1), k[:, :key_heads], v[:, :value_heads]  # eight heads
    model = Fused(enable_gqa=True)
    for _ in range(4):  # the last follow a plan
        with attention(model) as maps:
            model(q, k, v)
    expected = (q @ k.repeat_interleave(8 // key_heads, 1).mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(maps[0].dense(), expected)
    monkeypatch.setitem(
        kernels.KERNELS, "scaled_dot_product_attention", lambda y, q, *_, **__: kernels.FusedCall(y, -q, k, v)
    )
    with pytest.warns(VisualizerWarning, match="is not kept"), attention(model) as maps:
        model(q[:, :, :6], k, v)
    assert len(maps) == 0


@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": "padding"}, {"attn_mask": "smallest"}, {"attn_mask": "nothing"}],
    ids=str,
)
def test_a_right_map_is_not_doubted(options, dtype, factor):
    masks = {
        "padding": torch.arange(9).expand(7, 9) < 4,
        "smallest": (torch.arange(9).expand(7, 9) > 4).to(dtype) * torch.finfo(dtype).min,
        "nothing": (torch.arange(7) > 2)[:, None].expand(7, 9),
    }
    options = {name: masks.get(value, value) for name, value in options.items()}
    model = Fused(**options)
    with attention(model) as maps:
        for _ in range(6):
            model(*factors(dtype=dtype, factor=factor))
    assert len(maps) == 6


def test_where_the_kernel_returns_no_number():
    query, key, value = factors()
    value[0, 0, 3] = torch.nan
    model = Fused()
    with attention(model) as maps:
        model(query, key, value)
    assert len(maps) == 1


def test_dropout_is_not_compared():
    model = Fused(dropout_p=0.5)
    with attention(model) as maps:
        model(*factors())
    assert len(maps) == 1


@pytest.mark.parametrize("shape", [(0, 4, 7, 9), (2, 4, 0, 9), (2, 4, 7, 0)])
def test_nothing_to_compare(shape):
    batch, heads, queries, keys = shape
    source = Factors(torch.zeros(batch, heads, queries, 8), Keys(torch.zeros(batch, heads, keys, 8)), keys)
    assert of_fused(source, torch.zeros(batch, heads, keys, 8), torch.zeros(batch, heads, queries, 8), 0) is None
    assert of_weights(torch.zeros(shape), torch.zeros(keys, 8), torch.zeros(*shape[:3], 8), 0) is None


def test_all_rows_have_their_turn():
    """A wrong row is found within some calls, whichever it is."""
    weights, values = torch.rand(1, 1, 10, 4), torch.randn(1, 1, 4, 3)
    for row in range(10):
        output = weights @ values
        output[..., row, :] += 1
        assert any(of_weights(weights, values, output, number).doubt() for number in range(10))


@pytest.mark.parametrize("causal", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_at_once_are_as_one_by_one(causal, dtype):
    """Those of a model's layers, with shared key heads and other rows each; one of them is wrong."""

    def each():
        made = []
        for number in range(6):
            query, key, value = (one.roll(number, -1) for one in factors(dtype=dtype))
            key, value = key[:, :2], value[:, :2]
            source = Factors(query, Keys(key), 9, causal=causal)
            output = (source.rows(slice(None)) @ value.float().repeat_interleave(2, 1)).to(dtype)
            made.append(of_fused(source, value, output * (1 + (number == 4)), number))
        return made

    together = each()
    Evidence.weigh(together)
    assert all(one.nbytes == 0 for one in together)
    doubts = [one.doubt() for one in together]
    assert doubts == [one.doubt() for one in each()]
    assert [doubt is None for doubt in doubts] == [True] * 4 + [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_those_of_other_numbers_of_keys_are_as_one_by_one(dtype):
    """Those of a prompt and of the steps behind it, whose keys are one more each; one is wrong, and one has no numbers.

    What one of them is padded with changes nothing in another.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 24, 8, generator=generator).to(dtype) for _ in range(3))
    key, value = key[:, :2], value[:, :2]
    value[:, :, 23] = torch.inf

    def each():
        made = []
        for number, (queries, keys) in enumerate([(16, 16), *((1, keys) for keys in range(17, 25))]):
            causal = 0 if queries > 1 else None
            source = Factors(query[:, :, keys - queries : keys], Keys(key[:, :, :keys].clone()), keys, causal=causal)
            rows = source.rows(slice(None))
            output = (rows @ value[:, :, :keys].to(rows.dtype).repeat_interleave(2, 1)).to(dtype)
            made.append(of_fused(source, value[:, :, :keys], output * (1 + (number == 4)), number))
        return made

    together = each()
    Evidence.weigh(together)
    doubts = [one.doubt() for one in together]
    assert doubts == [one.doubt() for one in each()]
    assert [doubt is None for doubt in doubts] == [number != 4 for number in range(9)]


def wrong(output, *args, **kwargs):
    """The kernel's function, for another scale than the one that was used."""
    return kernels.scaled_dot_product_attention(output, *args, **(kwargs | {"scale": 1.0}))


def test_maps_that_wait_for_the_proof_are_not_handed_over(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "scaled_dot_product_attention", wrong)
    model = Fused()
    with attention(model) as maps:
        for reading in (len, list, lambda maps: maps.paths):
            model(*factors())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VisualizerWarning)
                assert not reading(maps)


def test_maps_do_not_wait_for_long(monkeypatch):
    """The warning comes while the model runs, within some passes; at once where the values take much memory."""
    monkeypatch.setitem(kernels.KERNELS, "scaled_dot_product_attention", wrong)
    model = Fused()
    for keys, passes in ((9, 64), (2**16, 1)):
        with attention(model) as maps:
            with pytest.warns(VisualizerWarning, match="the map of '' is not kept"):
                for _ in range(passes):
                    model(*factors(queries=1, keys=keys))
            assert len(maps) == 0


class Large(nn.Module):
    """Nothing but its own code may hold its outputs."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.places = options, []

    def forward(self, q):
        values = q + torch.linspace(0, 4, q.shape[2], dtype=q.dtype)[:, None]
        output = F.scaled_dot_product_attention(q, q + 1, values, **self.options)
        self.places.append(output.data_ptr())
        return output.sum()


LARGE = 1, 2, 2048, 64
MASK = torch.arange(2048).expand(2048, 2048) < 1000


@pytest.mark.parametrize("options", [{}, {"attn_mask": MASK}, {"is_causal": True}], ids=["plain", "masked", "causal"])
def test_large_calls_hold_nothing_of_the_model(options):
    model = Large(**options)
    with attention(model) as maps:
        for seed in range(3):
            model(torch.randn(LARGE, generator=torch.Generator().manual_seed(seed)))
            held = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.untyped_storage().nbytes()]
            assert model.places[-1] not in {one.untyped_storage().data_ptr() for one in held}
        assert len(maps) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_wrong_map_of_a_large_call_is_not_handed_over(dtype, monkeypatch):
    q = torch.randn(LARGE, generator=torch.Generator().manual_seed(0)).to(dtype)
    for options, name in (
        ({"scale": 1.0}, "scale"),
        ({"attn_mask": MASK}, "attn_mask"),
        ({"is_causal": True}, "is_causal"),
    ):
        model = Large(**options)
        with attention(model) as maps:
            model(q)
        assert len(maps) == 1
        with monkeypatch.context() as patch:
            patch.setitem(kernels.KERNELS, "scaled_dot_product_attention", forgetting(name))
            with pytest.warns(VisualizerWarning, match="the map of '' is not kept.* by "), attention(model) as maps:
                model(q)
            assert len(maps) == 0


def test_by_how_much():
    weights, values = torch.eye(4)[None, None], torch.ones(1, 1, 4, 2)
    assert of_weights(weights, values, values, 0).doubt() is None
    assert of_weights(weights, values, values + 0.5, 0).doubt() == "by 0.5, where float32 allows 1.9e-06"

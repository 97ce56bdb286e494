"""Deformable attention: its points, its weights, and the map that they make, however the values are read."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visualizer import attention, load
from visualizer.maps import Samples

B, Q, H, D = 2, 5, 4, 3
SIZES = ((4, 6), (2, 3))
KEYS = 4 * 6 + 2 * 3


def by_grid(value, locations, weights, sizes=SIZES):
    """As in Deformable DETR's repository, without its kernel."""
    batch, _, heads, width = value.shape
    samples = []
    for level, (one, (height, across)) in enumerate(zip(value.split([h * w for h, w in sizes], 1), sizes, strict=True)):
        feature_map = one.flatten(2).transpose(1, 2).reshape(batch * heads, width, height, across)
        grid = (2 * locations - 1)[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(feature_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, weights.shape[1], -1)
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(batch, heads * width, -1).transpose(1, 2).contiguous()


def by_concatenation(value, locations, weights, counts=(3, 1), discrete=False):
    """As in D-FINE: each level has as many points as it likes; discrete: each is rounded to a cell."""
    batch, _, heads, width = value.shape
    features = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in SIZES], dim=-1)
    grids = locations.permute(0, 2, 1, 3, 4).flatten(0, 1).split(counts, dim=-2)
    samples = []
    for one, grid, (height, across) in zip(features, grids, SIZES, strict=True):
        feature_map = one.reshape(batch * heads, width, height, across)
        if discrete:
            cells = (grid * torch.tensor([[across, height]]) + 0.5).long().flatten(1, 2)
            x, y = cells[..., 0].clamp(0, across - 1), cells[..., 1].clamp(0, height - 1)
            images = torch.arange(len(x)).unsqueeze(-1).repeat(1, x.shape[1])
            read = feature_map[images, :, y, x].transpose(1, 2).reshape(*feature_map.shape[:2], -1, grid.shape[2])
        else:
            read = F.grid_sample(feature_map, 2 * grid - 1, align_corners=False)
        samples.append(read)
    weights = weights.permute(0, 2, 1, 3).reshape(batch * heads, 1, -1, sum(counts))
    output = (torch.concat(samples, dim=-1) * weights).sum(-1)
    return output.view(batch, heads * width, -1).transpose(1, 2)


def by_discrete_cells(value, locations, weights):
    return by_concatenation(value, locations, weights, discrete=True)


def by_axes_of_their_own(value, locations, weights):
    """(batch, queries, heads, width, levels, points), written out."""
    samples = []
    for level, (one, (height, across)) in enumerate(zip(value.split([h * w for h, w in SIZES], 1), SIZES, strict=True)):
        feature_map = one.permute(0, 2, 3, 1).reshape(B * H, D if one.shape[-1] == D else KEYS, height, across)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).reshape(B * H, Q, -1, 2) - 1
        samples.append(F.grid_sample(feature_map, grid, align_corners=False).unflatten(0, (B, H)))
    read = torch.stack(samples, 4).permute(0, 3, 1, 2, 4, 5)
    return torch.mul(weights[:, :, :, None], read).sum((-2, -1)).flatten(2)


class MSDeformAttnFunction(torch.autograd.Function):
    """As in Deformable DETR's repository: the kernel is compiled, and nothing is seen of what it does."""

    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, step):
        with torch._C.DisableTorchFunction():
            return by_grid(value, sampling_locations, attention_weights)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError


def by_function(value, locations, weights):
    shapes = torch.tensor(SIZES)
    return MSDeformAttnFunction.apply(value, shapes, torch.tensor([0, 24]), locations, weights, 64)


@torch.library.custom_op("visualizer_tests::ms_deform_attn_forward", mutates_args=())
def kernel(
    value: torch.Tensor,
    spatial_shapes: torch.Tensor,
    level_start_index: torch.Tensor,
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    im2col_step: int,
) -> torch.Tensor:
    return by_grid(value, sampling_locations, attention_weights)


def by_operator(value, locations, weights):
    """As a kernel of the Hugging Face hub is called."""
    operator = torch.ops.visualizer_tests.ms_deform_attn_forward
    return operator(value, torch.tensor(SIZES), torch.tensor([0, 24]), locations, weights, 64)


class Deformable(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.is_uneven = function, function in (by_concatenation, by_discrete_cells)
        points = 4 if self.is_uneven else 2 * 2
        self.points, self.weights = nn.Linear(8, H * points * 2), nn.Linear(8, H * points)
        self.value, self.proj = nn.Linear(8, H * D), nn.Linear(H * D, 8)

    def parts(self, x, memory):
        split = (4,) if self.is_uneven else (2, 2)
        weights = self.weights(x).view(B, Q, H, 4).softmax(-1).view(B, Q, H, *split)
        return self.value(memory).view(B, KEYS, H, D), 0.5 + self.points(x).view(B, Q, H, *split, 2), weights

    def forward(self, x, memory):
        return self.proj(self.function(*self.parts(x, memory)))


FUNCTIONS = [by_grid, by_concatenation, by_discrete_cells, by_axes_of_their_own, by_function, by_operator]


def run(function, dtype=torch.float32):
    torch.manual_seed(0)
    model = Deformable(function).to(dtype).eval()
    x, memory = torch.randn(B, Q, 8, dtype=dtype), torch.randn(B, KEYS, 8, dtype=dtype)
    with torch.no_grad():
        before = model(x, memory)
        with attention(model) as maps:
            after = model(x, memory)
        value, locations, weights = model.parts(x, memory)
        cells = torch.eye(KEYS, dtype=dtype)[None, :, None].expand(B, KEYS, H, KEYS)
        expected = function(cells, locations, weights).view(B, Q, H, KEYS).transpose(1, 2)
    assert torch.equal(before, after)
    return maps, expected, value, locations, weights


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_map(function):
    """What the same function makes of values that are 1 in one cell and 0 in all others."""
    maps, expected, value, locations, weights = run(function)
    [one] = maps
    assert one.shape == (B, H, Q, KEYS)
    assert (one.dense() - expected).abs().max() < 1e-6
    assert not one.axes_assumed
    by_hand = one.dense() @ value.transpose(1, 2)
    assert (by_hand - function(value, locations, weights).view(B, Q, H, D).transpose(1, 2)).abs().max() < 1e-5
    assert torch.equal(one.source.weights, weights.transpose(1, 2).flatten(3))
    if function is not by_discrete_cells:
        assert (one.source.points - locations.transpose(1, 2).flatten(3, -2)).abs().max() < 1e-6
    is_uneven = function in (by_concatenation, by_discrete_cells)
    assert one.source.levels.tolist() == ([0, 0, 0, 1] if is_uneven else [0, 0, 1, 1])


def test_functions_are_again_what_they_were():
    model = Deformable(by_function)
    with attention(model):
        assert "apply" in vars(MSDeformAttnFunction)
    assert "apply" not in vars(MSDeformAttnFunction)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    maps, expected, *_ = run(by_grid, dtype)
    assert maps[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (maps[0].dense() - expected).abs().max() < (1e-12 if dtype == torch.float64 else 0.1)


def test_one_query_one_level_one_image():
    class Smallest(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.proj = nn.Linear(8, 4), nn.Linear(6, 8)

        def forward(self, x, memory):
            weights = self.weights(x).view(1, 1, 2, 1, 2).softmax(-1)
            return self.proj(by_grid(memory, torch.full((1, 1, 2, 1, 2, 2), 0.5), weights, [(1, 3)]))

    model = Smallest()
    with attention(model) as maps:
        model(torch.randn(1, 1, 8), torch.randn(1, 3, 2, 3))
    assert torch.allclose(maps[0].dense(), torch.tensor([0.0, 1.0, 0.0]).expand(1, 2, 1, 3))


@pytest.mark.parametrize("scale", [1.5, 0.5])
def test_weights_that_do_not_sum_to_one_are_no_attention(scale):
    """As the modulated samples of a deformable convolution."""
    torch.manual_seed(0)
    model = Deformable(lambda value, locations, weights: by_grid(value, locations, weights * scale))
    with pytest.warns(UserWarning, match="ran without any attention"), attention(model) as maps:
        model(torch.randn(B, Q, 8), torch.randn(B, KEYS, 8))
    assert not len(maps)


def test_a_wrong_kernel_has_no_map(monkeypatch):
    model = Deformable(by_function)

    def forward(ctx, value, spatial_shapes, level_start_index, sampling_locations, attention_weights, step):
        with torch._C.DisableTorchFunction():
            return by_grid(value, sampling_locations.flip(1), attention_weights)

    monkeypatch.setattr(MSDeformAttnFunction, "forward", staticmethod(forward))
    with pytest.warns(UserWarning, match="not the one that was used: .* what MSDeformAttnFunction returned, by"):
        with attention(model) as maps:
            model(torch.randn(B, Q, 8), torch.randn(B, KEYS, 8))
    assert not len(maps)


def test_files_tables_and_devices(tmp_path):
    maps, expected, *_ = run(by_concatenation)
    assert "points and weights, float32" in repr(maps)
    assert "from points and weights" in repr(maps[0])
    maps.save(tmp_path / "maps.safetensors")
    for one in (load(tmp_path / "maps.safetensors")[0], maps[0].to("cpu")):
        assert torch.equal(one.dense(), maps[0].dense())
        assert one.source.counts == (3, 1)
    assert (maps[0].row_product(torch.full((B, Q), 1 / Q)) - expected.mean(2)).abs().max() < 1e-6


def test_the_gradient_is_not_known():
    model = Deformable(by_grid)
    with attention(model, gradients=True) as maps:
        model(torch.randn(B, Q, 8), torch.randn(B, KEYS, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="deformable attention is not recorded"):
        maps[0].grad_dense()


class TestSamples:
    @pytest.mark.parametrize("options", [{}, {"mode": "nearest"}, {"padding_mode": "border"}, {"align_corners": True}])
    def test_reading_the_values_is_multiplying_them(self, options):
        """Points inside, at the border and far outside, in all the ways of F.grid_sample."""

        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj = nn.Linear(7, 7)

            def forward(self, values, grid, weights):
                read = F.grid_sample(values, grid, **{"align_corners": False, **options})
                return self.proj((read * weights[:, None]).sum(-1).transpose(1, 2))

        torch.manual_seed(0)
        model, values = Reads(), torch.randn(3, 7, 4, 5)
        grid = torch.cat([torch.randn(3, 6, 8, 2), torch.full((3, 6, 1, 2), 1e30), torch.ones(3, 6, 1, 2)], 2)
        weights = torch.randn(3, 6, 10).softmax(-1)
        with attention(model) as maps:
            model(values, grid, weights)
        cells = torch.eye(20).view(1, 20, 4, 5).expand(3, 20, 4, 5)
        read = F.grid_sample(cells, grid, **{"align_corners": False, **options})
        assert (maps[0].dense()[:, 0] - (read * weights[:, None]).sum(-1).mT).abs().max() < 1e-6

    def test_a_place_that_is_no_number_is_no_cell(self):
        samples = Samples(
            torch.tensor([[[[[torch.nan, 0.0], [1.0, 0.0]]]]]), torch.full((1, 1, 1, 2), 0.5), [(1, 2)], [2]
        )
        assert samples.rows(slice(None)).flatten().tolist() == [0.0, 0.5]


@pytest.mark.slow
def test_deformable_detr():
    """Of transformers: each map times the values is what the module returns, and the kinds are those of the paper."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage1", "stage2"]}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.DeformableDetrConfig(
        backbone_config=transformers.ResNetConfig(**sizes), use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=9, num_feature_levels=2, **heads,
    )  # fmt: skip
    model, called = transformers.DeformableDetrModel(config).eval(), {}
    for path, module in model.named_modules():
        if path.endswith("attn.attn"):
            module.register_forward_hook(
                lambda module, args, kwargs, output, path=path: called.update({path: (args, kwargs, output)}),
                with_kwargs=True,
            )
    with torch.no_grad(), attention(model) as maps:
        model(pixel_values=torch.randn(2, 3, 64, 96))
    assert {one.path: one.kind for one in maps} == {
        "encoder.layers.0.self_attn.attn": "self",
        "decoder.layers.0.self_attn": "self",
        "decoder.layers.0.encoder_attn.attn": "cross",
    }
    assert len(called) == 2
    for path, (args, kwargs, output) in called.items():
        value = [*args, *kwargs.values()][0].transpose(1, 2)  # (batch, heads, keys, width)
        product = maps[path].dense() @ value
        assert (product.transpose(1, 2).flatten(2) - output).abs().max() < 1e-5

"""Weights over the picture: windows, words, rollout, `overlay` and `highlight`."""

import warnings

import numpy as np
import pytest
import timm
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import PathPatch
from plots import frames, hot, maps_of, marked, no_figure_left, pixel  # noqa: F401
from timm.layers import set_fused_attn
from timm.models.swin_transformer import window_partition

from visualizer import AttentionMap, Layout, VisualizerWarning, analysis, attention, capture, plot


def drawn(ax):
    """The weights of an axes without a picture, NaN where there are none."""
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


@pytest.fixture(scope="module")
def swin():
    """A Swin's maps of two images, by module."""
    set_fused_attn(False)
    try:
        torch.manual_seed(0)
        model = timm.create_model(
            "swin_tiny_patch4_window7_224", pretrained=False, embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 2)
        ).eval()
    finally:
        set_fused_attn(True)
    with capture(model, "attn") as found, torch.inference_mode():
        model(torch.randn(2, 3, 224, 224))
    return model, found


class TestWindows:
    @pytest.mark.parametrize("query", [(0, 0), (3, 4), (-1, -1), (14, 2), (27, 0), (24, 25)])
    @pytest.mark.parametrize(
        ("path", "side", "shift"),
        [("layers.0.blocks.0", 56, 0), ("layers.1.blocks.1", 28, 3), ("layers.3.blocks.1", 7, 3)],
    )
    def test_weights_lie_where_the_model_took_them_from(self, swin, path, side, shift, query):
        model, found = swin
        query = tuple(place % side for place in query)
        block, maps = model.get_submodule(path), found[f"{path}.attn"]
        # timm's own cutting of a picture whose every patch holds its number
        numbers = torch.arange(side * side).reshape(1, side, side, 1)
        shifted = torch.roll(numbers, [-step for step in block.shift_size], dims=(1, 2))
        windows = window_partition(shifted, block.window_size).reshape(-1, 49).numpy()
        [[window, token]] = np.argwhere(windows == query[0] * side + query[1])
        expected = np.full(side * side, np.nan)
        expected[windows[window]] = maps[0][len(windows) + window, :, token].mean(0)

        ax = plot.query(maps, query=query, batch=1, window=7, shift=shift, grid=(side, side))
        np.testing.assert_allclose(expected.reshape(side, side), drawn(ax), rtol=1e-6)
        assert {(query[1], query[0], 1, 1)} == {(*f.get_xy(), f.get_width(), f.get_height()) for f in frames(ax)}

    def test_a_query_reaches_just_the_pixels_that_change_its_output(self, swin):
        model, found = swin
        block = model.layers[1].blocks[1]
        picture = torch.zeros(1, 28, 28, 24, requires_grad=True)
        noise = torch.randn(28, 28, 24, generator=torch.Generator().manual_seed(0))
        out = block._attn(picture + noise)[0, 2, 13]
        out.sum().backward()
        reached = picture.grad[0].abs().sum(-1) > 1e-12
        ax = plot.query(found["layers.1.blocks.1.attn"], query=(2, 13), window=7, shift=3, grid=(28, 28))
        seen = np.nan_to_num(drawn(ax)) > 1e-12
        np.testing.assert_array_equal(reached.numpy(), seen)

    @pytest.mark.parametrize("draw", [lambda *given: plot.query(*given, query=0), plot.class_token, plot.heads])
    def test_maps_of_several_over_one_picture_are_told(self, draw):
        """They may be windows of it."""
        image, options = np.ones((40, 40, 3)), {"query": 0} if draw is plot.heads else {}
        with pytest.warns(VisualizerWarning, match=r"4 pictures, .* windows of this one, pass window= and grid="):
            draw([maps_of(4, 1, 17, 17)], image, **options)
        draw([maps_of(1, 1, 17, 17)], image, **options)
        plot.query([maps_of(4, 1, 17, 17)], image, query=0, batch=0)

    def test_keys_outside_the_window_are_hatched_and_those_inside_are_not(self):
        maps = maps_of(4, 1, 4, 4)
        for image in (None, np.ones((40, 40, 3))):
            ax = plot.query(maps, image, query=(1, 2), window=2, grid=(4, 4))
            [hatched] = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
            assert hatched.get_hatch()
            size = 1 if image is None else 10
            for row, column in np.ndindex(4, 4):
                inside = row < 2 <= column
                assert inside is not hatched.get_path().contains_point((size * (column + 0.5), size * (row + 0.5)))

    def test_without_a_window_nothing_is_hatched(self):
        assert not [one for one in plot.query(maps_of(16, 16), query=0).patches if isinstance(one, PathPatch)]

    def test_a_shift_round_the_edges(self):
        maps = np.zeros((4, 1, 4, 4))
        maps[3, 0, 3] = [0.1, 0.2, 0.3, 0.4]  # the last window is the four corners: (3, 3), (3, 0), (0, 3), (0, 0)
        weights = drawn(plot.query(maps, query=(0, 0), window=2, shift=1, grid=(4, 4)))
        np.testing.assert_allclose([0.1, 0.2, 0.3, 0.4], weights[[3, 3, 0, 0], [3, 0, 3, 0]], rtol=1e-6)
        assert 12 == np.isnan(weights).sum()

    def test_padding_is_no_patch(self):
        maps = np.full((4, 1, 4, 4), 0.25)
        weights = drawn(plot.query(maps, query=(2, 2), window=2, grid=(3, 3)))
        assert [(2, 2)] == [tuple(place) for place in np.argwhere(~np.isnan(weights))]

    def test_oblong_windows_and_an_attention_map(self):
        maps = maps_of(4, 2, 6, 6)
        ax = plot.query(AttentionMap(torch.tensor(maps)), query=(3, 1), window=(2, 3), grid=(4, 6))
        np.testing.assert_allclose(maps[2, :, 4].mean(0).reshape(2, 3), drawn(ax)[2:, :3], rtol=1e-6)

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"window": 3}, ["3 x 3 = 9", "this layer has 4"]),
            ({"window": 2, "shift": 2}, ["shift=2", "0 to 1"]),
            ({"window": 2, "grid": None}, ["grid=(rows, columns)"]),
            ({"window": 2, "grid": (8, 4)}, ["(4, 1, 4, 4)", "8 windows", "grid="]),
            ({"window": 2, "grid": (3, 3), "shift": 1}, ["3 x 3", "padded grid="]),
            ({"window": 2, "batch": 1}, ["batch=1", "1 images"]),
            ({"window": 2, "query": 5}, ["query=5", "(row, column)"]),
            ({"window": 2, "prefix_tokens": 1}, ["prefix_tokens=1"]),
            ({"window": 2, "batch": "mean"}, ["batch='mean'"]),
        ],
    )
    def test_what_does_not_fit_is_refused(self, options, parts):
        with pytest.raises(ValueError) as caught:
            plot.query(maps_of(4, 1, 4, 4), **{"query": (0, 0), "grid": (4, 4), **options})
        for part in parts:
            assert part in str(caught.value)


class TestWords:
    """Cross-attention from a text to a picture."""

    words = ("[CLS]", "▁a", "▁cat", "▁and", "▁a", "dog")

    @pytest.mark.parametrize("query", ["▁cat", "cat", 2, -4])
    def test_a_word_or_its_index(self, query):
        maps = maps_of(1, 3, 6, 16)
        ax = plot.query(maps, query=query, query_tokens=self.words)
        np.testing.assert_allclose(maps[0, :, 2].mean(0).reshape(4, 4), ax.images[0].get_array(), rtol=1e-6)
        assert "query: '␣cat', mean of 3 heads" == ax.get_title()
        assert not frames(ax), "a word is no patch"

    def test_as_many_words_as_patches_do_not_make_it_a_patch(self):
        words = [f"w{number}" for number in range(16)]
        ax = plot.query(maps_of(16, 16), query="w5", query_tokens=words)
        assert not frames(ax)
        assert "query: 'w5'" == ax.get_title()

    def test_mathematics_in_a_word_is_no_mathematics(self):
        ax = plot.query(maps_of(2, 16), query="$x^", query_tokens=["$x^", "b"])
        ax.figure.canvas.draw()
        assert "query: '$x^'" == ax.get_title()

    @pytest.mark.parametrize(
        ("query", "tokens", "error", "parts"),
        [
            ("a", words, ValueError, ["2 tokens 'a'", "[1, 4]"]),
            ("bird", words, ValueError, ["'bird'", "'␣cat'"]),
            ("cat", None, TypeError, ["'cat'", "query_tokens="]),
            ("cat", words[:3], ValueError, ["6 queries", "▁cat"]),
            ("cat", "a cat", ValueError, ["6 queries", "a list"]),
            (6, words, IndexError, ["0 to 5"]),
        ],
    )
    def test_what_is_not_clear_is_refused(self, query, tokens, error, parts):
        with pytest.raises(error) as caught:
            plot.query(maps_of(6, 16), query=query, query_tokens=tokens)
        for part in parts:
            assert part in str(caught.value)


def rolled(maps, residual=0.5):
    """The rollout of (layers, heads, N, N), multiplied out."""
    flow = np.eye(maps.shape[-1])
    for layer in maps.mean(1):
        flow = ((1 - residual) * layer + residual * np.eye(len(layer))) @ flow
    return flow


class TestRollout:
    def test_picture_last_layer_and_rollout_side_by_side(self):
        maps = maps_of(5, 1, 3, 17, 17)
        figure = plot.rollout(maps, np.full((56, 56, 3), 0.5))
        panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
        assert ["picture", "layer 4, mean of 3 heads", "rollout of 5 layers"] == [ax.get_title() for ax in panels]
        assert "query: CLS" == figure._suptitle.get_text()
        bars = [ax.get_xlabel() for ax in figure.axes if ax not in panels]
        assert ["attention weight", "rollout"] == bars, "one each: their scales differ"
        figure.canvas.draw()
        tops = [ax.get_window_extent().y1 for ax in panels]
        np.testing.assert_allclose(tops[0], tops, err_msg="the photograph stands beside the others")

    @pytest.mark.parametrize("wrap", [list, torch.tensor, lambda maps: [AttentionMap(one) for one in maps]])
    def test_the_very_weights(self, wrap):
        maps = maps_of(5, 2, 3, 17, 17)
        last, whole = plot.rollout(wrap(maps), batch=1, residual=0.3, cbar=False).axes
        np.testing.assert_allclose(maps[4, 1, :, 0, 1:].mean(0).reshape(4, 4), last.images[0].get_array(), rtol=1e-5)
        expected = rolled(maps[:, 1], 0.3)[0, 1:].reshape(4, 4)
        np.testing.assert_allclose(expected, whole.images[0].get_array(), rtol=1e-5)

    def test_layers_without_an_axis_for_the_batch(self):
        maps = maps_of(2, 3, 16, 16)
        whole = plot.rollout([one for one in maps], query=(1, 1), prefix_tokens=0, cbar=False).axes[1]
        np.testing.assert_allclose(rolled(maps)[5].reshape(4, 4), whole.images[0].get_array(), rtol=1e-5)
        assert frames(whole)

    @pytest.mark.parametrize(("size", "grid"), [((56, 56), (4, 4)), ((20, 80), (2, 8)), ((80, 20), (8, 2))])
    @pytest.mark.parametrize("prefix", [1, 5])
    def test_everything_stays_on_the_figure(self, size, grid, prefix):
        maps = maps_of(5, 1, 3, prefix + 16, prefix + 16)
        figure = plot.rollout(maps, np.full((*size, 3), 0.5), grid=grid)
        figure.canvas.draw()
        box, (wide, high) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
        assert max(box.x0, box.y0, wide - box.x1, high - box.y1) < 0.8, "nor is it half empty"
        swatches = [child for ax in figure.axes for child in ax.child_axes]
        texts = [label for one in swatches for label in one.get_xticklabels()] + [ax.title for ax in figure.axes]
        assert 2 == len(swatches)
        for text in texts:
            box = text.get_window_extent()
            assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1
        below = figure._suptitle.get_window_extent().y0
        assert all(ax.title.get_window_extent().y1 <= below for ax in figure.axes)

    def test_options_go_on_to_the_rollout(self):
        maps = maps_of(3, 1, 2, 17, 17)
        plain, fewer = (plot.rollout(maps, discard=share, cbar=False).axes[1].images[0] for share in (0, 0.9))
        assert not np.allclose(plain.get_array(), fewer.get_array())
        with pytest.raises(ValueError, match="residual=2"):
            plot.rollout(maps, residual=2)
        with pytest.raises(ValueError, match="square"):
            plot.rollout(maps_of(3, 1, 2, 17, 16), query=0)
        with pytest.raises(TypeError, match="one image"):
            plot.rollout(maps, batch="mean")


class TestOverlay:
    def test_a_grid_of_weights_and_what_they_are(self):
        weights = maps_of(3, 5)
        ax = plot.overlay(weights, label="relevance $x^", title="a $title")
        np.testing.assert_allclose(weights, ax.images[0].get_array())
        [bar] = [one for one in ax.figure.axes if one is not ax]
        assert ("relevance $x^", "a $title") == (bar.get_ylabel(), ax.get_title())
        ax.figure.canvas.draw()
        assert (0, weights.max()) == pytest.approx(ax.images[0].get_clim())

    def test_a_row_of_tokens_is_read_as_query_reads_it(self):
        weights = torch.rand(17)
        ax = plot.overlay(weights)
        np.testing.assert_allclose(weights[1:].reshape(4, 4), ax.images[0].get_array())
        assert [f"CLS\n{weights[0]:.2g}"] == [label.get_text() for label in ax.child_axes[0].get_xticklabels()]
        np.testing.assert_allclose(weights[2:].reshape(3, 5), plot.overlay(weights, grid=(3, 5)).images[0].get_array())

    def test_the_hot_patch_lies_on_its_own_pixels(self):
        weights = np.zeros((4, 6))
        weights[2, 1] = 7.0
        for smooth, style in ((False, "overlay"), (True, "overlay"), (False, "mask"), (True, "mask")):
            ax = plot.overlay(weights, np.full((56, 84, 3), 0.8), smooth=smooth, style=style)
            assert [(2, 1)] == marked(ax, 4, 6)
        for small in ((2, 3), (4, 6), (6, 9)):  # fewer pixels than patches, or hardly more
            assert [(2, 1)] == marked(plot.overlay(weights, np.full((*small, 3), 0.8)), 4, 6)

    def test_what_is_not_known_is_hatched_and_no_weight_draws_a_scale(self):
        weights = np.array([[np.nan, 0.0], [0.0, 0.0]])
        ax = plot.overlay(weights)
        [hatched] = [patch for patch in ax.patches if isinstance(patch, PathPatch)]
        assert hatched.get_path().contains_point((0.5, 0.5))
        assert ax.images[0].get_clim() == (0, 1)

    @pytest.mark.parametrize(
        ("weights", "options", "error", "parts"),
        [
            (np.ones((1, 197)), {}, ValueError, ["(1, 197)", "weights[0]"]),
            (np.ones((2, 3, 3)), {}, ValueError, ["(2, 3, 3)", "weights[0]"]),
            (np.ones((3, 3)), {"grid": (3, 4)}, ValueError, ["(3, 3)", "(3, 4)"]),
            (np.ones((3, 3)), {"prefix_tokens": 1}, ValueError, ["patches only"]),
            (np.ones(12), {}, ValueError, ["12", "grid=(rows, columns)"]),
            (np.full((2, 2), np.nan), {}, ValueError, ["NaN"]),
            (np.full((2, 2), np.inf), {}, ValueError, ["infinite"]),
            (np.ones((2, 2), bool), {}, TypeError, ["plot.highlight"]),
            ([["a"]], {}, TypeError, ["weights", "numbers"]),
            (np.ones((2, 2)), {"style": "jet"}, ValueError, ["'jet'"]),
        ],
    )
    def test_what_is_no_picture_is_refused(self, weights, options, error, parts):
        with pytest.raises(error) as caught:
            plot.overlay(weights, **options)
        for part in parts:
            assert part in str(caught.value)


class TestHighlight:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)

    @pytest.mark.parametrize("wrap", [np.asarray, torch.tensor, np.ndarray.tolist])
    def test_inside_is_as_it_was_and_outside_is_faded(self, wrap):
        image = np.random.default_rng(0).random((20, 30, 3))
        ax = plot.highlight(wrap(self.mask), image)
        shown = np.asarray(ax.images[0].get_array())
        inside = self.mask.repeat(10, 0).repeat(10, 1)
        np.testing.assert_allclose(image[inside], shown[inside], rtol=1e-5)
        assert (shown[~inside] > 0.5 * image[~inside] + 0.5 - 1e-9).all()

    def test_the_outline_is_the_border_of_the_mask_in_black_and_white(self):
        for image, size in ((None, 1), (np.ones((20, 30, 3)), 10)):
            ax = plot.highlight(self.mask, image)
            outlines = [one for one in ax.collections if isinstance(one, LineCollection)]
            assert [to_rgb("black"), to_rgb("white")] == [tuple(one.get_colors()[0][:3]) for one in outlines]
            expected = set()
            for row, column in np.argwhere(self.mask):
                for edge in (
                    ((column, row), (column + 1, row)),
                    ((column, row + 1), (column + 1, row + 1)),
                    ((column, row), (column, row + 1)),
                    ((column + 1, row), (column + 1, row + 1)),
                ):
                    expected ^= {edge}  # an edge of two chosen patches is none
            for outline in outlines:
                segments = outline.get_segments()
                edges = {tuple(tuple(int(v) for v in point / size) for point in one) for one in segments}
                assert expected == edges
                assert len(edges) == len(segments)

    def test_a_row_of_patches(self):
        drawn = [plot.highlight(mask, grid=(2, 3)).images[0].get_array() for mask in (self.mask, self.mask.ravel())]
        np.testing.assert_array_equal(*drawn)

    @pytest.mark.parametrize("mask", [np.zeros((3, 3), bool), np.ones((3, 3), bool)])
    def test_nothing_and_everything(self, mask):
        ax = plot.highlight(mask, np.ones((9, 9, 3)))
        assert 1 == len(np.unique(ax.images[0].get_array()))

    @pytest.mark.parametrize(
        ("mask", "error", "parts"),
        [
            (np.ones((2, 2)), TypeError, ["float64", "analysis.mass_mask", "threshold"]),
            (torch.ones(4, dtype=torch.uint8), TypeError, ["uint8"]),
            ([[0, 1]], TypeError, ["list"]),
            (np.ones(5, bool), ValueError, ["5 tokens", "grid="]),
            (np.ones((1, 16), bool), ValueError, ["mask[0]"]),
        ],
    )
    def test_what_is_no_mask_is_refused(self, mask, error, parts):
        with pytest.raises(error) as caught:
            plot.highlight(mask)
        for part in parts:
            assert part in str(caught.value)


def test_a_fused_model_needs_no_map_for_a_picture():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, embed_dim=24, num_heads=2).eval()
    with attention(model) as maps, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    row = maps[1].rows(0)[0].mean(0)[0]
    ax = plot.class_token(maps)
    np.testing.assert_allclose(row[1:].reshape(14, 14), ax.images[0].get_array(), rtol=1e-6)
    last, _ = plot.rollout(maps, cbar=False).axes
    np.testing.assert_allclose(row[1:].reshape(14, 14), last.images[0].get_array(), rtol=1e-6)


def small_swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224", pretrained=False, embed_dim=8, depths=(2, 2), num_heads=(1, 2), img_size=56
    ).eval()


@pytest.fixture(scope="module")
def photograph():
    """640 x 427 pixels in which every place looks different."""
    rows, columns = np.mgrid[0:427, 0:640]
    return np.stack([rows / 427, columns / 640, (np.sin(rows / 40) * np.cos(columns / 50) + 1) / 2], -1)


def pixels_of(photograph, top, left, high, wide, size):
    """What a model sees of a part of the photograph, resampled and normalised."""
    part = torch.tensor(photograph[top : top + high, left : left + wide]).permute(2, 0, 1)[None].float()
    part = torch.nn.functional.interpolate(part, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(one)[:, None, None] for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (part - mean) / std


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 56, "dynamic_img_size": True}
    return timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, **sizes).eval()


class TestRecordedMaps:
    """Nothing is said but the maps and the photograph."""

    def record(self, model, images):
        with attention(model) as maps, torch.no_grad():
            model(images)
        return maps

    @pytest.mark.parametrize(
        ("part", "size", "grid"),
        [
            ((0, 0, 427, 640), (84, 126), (6, 9)),  # all of it
            ((0, 106, 427, 427), (84, 84), (6, 6)),  # the middle square
            ((26, 133, 374, 374), (84, 84), (6, 6)),  # 0.875 of it
            ((0, 0, 427, 640), (84, 84), (6, 6)),  # all of it, squeezed into a square
        ],
    )
    def test_patches_lie_on_what_the_model_saw(self, vit, photograph, part, size, grid):
        maps = self.record(vit, pixels_of(photograph, *part, size))
        ax = plot.class_token(maps, photograph)
        assert "query: CLS, layer 1, mean of 2 heads" == ax.get_title()
        weights = maps[1].rows(0)[0].mean(0)[0, 5:].reshape(grid)
        top, left, high, wide = part
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the squeezed patches are not square
            expected = plot.overlay(
                weights, photograph[top : top + high, left : left + wide], vmax=ax.images[0].norm.vmax
            )
        behind, expected = (np.asarray(one.images[0].get_array()) for one in (ax, expected))
        np.testing.assert_allclose(expected, behind, atol=1e-5)
        assert ["CLS", "REG1", "REG2", "REG3", "REG4"] == [
            label.get_text().split("\n")[0] for label in ax.child_axes[0].get_xticklabels()
        ]

    def test_a_rollout_lies_there_too(self, vit, photograph):
        maps = self.record(vit, pixels_of(photograph, 0, 106, 427, 427, (84, 84)))
        shown, last, rolled = plot.rollout(maps, photograph, cbar=False).axes
        assert (427, 427, 3) == np.asarray(shown.images[0].get_array()).shape
        assert 2 * [(427, 427, 3)] == [np.asarray(ax.images[0].get_array()).shape for ax in (last, rolled)]

    def test_another_photograph_of_other_proportions_is_told(self, vit, photograph):
        maps = self.record(vit, torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0)))
        with pytest.warns(VisualizerWarning, match="427 x 640 .*the model saw 84 x 84"):
            plot.class_token(maps, photograph)

    def test_the_second_picture_of_a_batch(self, vit, photograph):
        images = torch.cat([pixels_of(photograph, *part, (84, 84)) for part in ((0, 0, 427, 640), (0, 106, 427, 427))])
        maps = self.record(vit, images)
        for batch, wide in ((0, 640), (1, 427), (-1, 427)):
            shown = np.asarray(plot.query(maps, photograph, query=(1, 1), batch=batch).images[0].get_array())
            assert wide == pytest.approx(shown.shape[1], abs=2)

    def test_each_head_over_the_picture(self, vit, photograph):
        maps = self.record(vit, pixels_of(photograph, 0, 0, 427, 640, (84, 126)))
        figure = plot.heads(maps, photograph, query=0)
        panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
        assert ["head 0", "head 1"] == [ax.get_title() for ax in panels]
        assert "query: CLS, layer 1" == figure._suptitle.get_text()
        bare = plot.heads(maps, query=(2, 3), layer=0, share=False)
        for head, ax in enumerate(ax for ax in bare.axes if ax.get_label() != "<colorbar>"):
            expected = maps[0].rows(5 + 2 * 9 + 3)[0, head, 0, 5:].reshape(6, 9)
            np.testing.assert_allclose(expected, ax.images[0].get_array(), rtol=1e-6)
            assert {(3, 2, 1, 1)} == {(*f.get_xy(), f.get_width(), f.get_height()) for f in frames(ax)}

    def test_a_swin_needs_no_keyword(self, photograph):
        torch.manual_seed(0)
        model = small_swin()
        maps = self.record(model, torch.randn(2, 3, 56, 56))
        for layer, shift in ((0, 0), (1, 3)):
            by_hand = plot.query(maps, query=(3, 9), layer=layer, batch=1, window=7, shift=shift, grid=(14, 14))
            np.testing.assert_array_equal(drawn(by_hand), drawn(plot.query(maps, query=(3, 9), layer=layer, batch=1)))
        ax = plot.class_token(maps, layer=1, batch=1)
        assert "query: mean of 196 patches, layer 1" == ax.get_title()
        places, weights = maps[1].layout.windows.places(14, 14), maps[1].numpy()[4:, 0]  # of the second picture
        expected = np.zeros(196)
        for place, window in zip(places, weights, strict=True):
            expected[place] = window.sum(0) / 196
        np.testing.assert_allclose(expected.reshape(14, 14), drawn(ax), rtol=1e-4)
        assert (
            "query: mean of 49 patches, layer 3, mean of 2 heads" == plot.class_token(maps, np.ones((9, 9))).get_title()
        )
        _, rolled = plot.rollout(maps, query=(2, 3), batch=1, cbar=False).axes
        flow = analysis.rollout(maps, query=2 * 7 + 3)[1]
        np.testing.assert_allclose(flow.reshape(14, 14), drawn(rolled), rtol=1e-5)
        assert "query: patch (2, 3)" == rolled.figure._suptitle.get_text()

    def test_without_a_class_token_all_patches_count(self):
        model = timm.create_model(
            "vit_medium_patch16_reg4_gap_256", pretrained=False, depth=2, embed_dim=24, num_heads=2, img_size=64
        ).eval()
        maps = self.record(model, torch.randn(1, 3, 64, 64))
        mean = maps[1].dense()[0, :, 4:].mean((0, 1))
        ax = plot.class_token(maps)
        assert "query: mean of 16 patches, layer 1, mean of 2 heads" == ax.get_title()
        np.testing.assert_allclose(mean[4:].reshape(4, 4), drawn(ax), rtol=1e-5)


class TestColourBarsOfOnesOwn:
    @pytest.mark.parametrize("style", ["overlay", "mask"])
    def test_they_have_the_weights_own_scale(self, style):
        maps = maps_of(1, 1, 17, 17)
        with_bar = plot.class_token(maps, np.ones((56, 56, 3)), style=style)
        ax = plot.class_token(maps, np.ones((56, 56, 3)), style=style, cbar=False)
        own = ax.figure.colorbar(ax.images[-1])
        theirs = next(one for one in with_bar.figure.axes if one.get_label() == "<colorbar>")._colorbar
        assert (theirs.vmin, theirs.vmax, theirs.cmap.name) == (own.vmin, own.vmax, own.cmap.name)


class TestVideos:
    maps = maps_of(1, 2, 25, 25)  # a class token and 6 frames of 2 x 2

    def test_frames_lie_side_by_side(self):
        video = np.ones((6, 8, 8, 3)) * np.linspace(0, 1, 6)[:, None, None, None]
        ax = plot.query(self.maps, video, query=(4, 1, 0), layout=Layout.picture((6, 2, 2), ["CLS"]))
        assert "query: patch (4, 1, 0), mean of 2 heads" == ax.get_title()
        assert (16.0, 24.0) == (ax.get_ylim()[0], ax.get_xlim()[1])
        assert {(8.0, 12.0, 4.0, 4.0)} == {(*f.get_xy(), f.get_width(), f.get_height()) for f in frames(ax)}
        bare = drawn(plot.query(self.maps, query=(4, 1, 0), layout=Layout.picture((6, 2, 2), ["CLS"])))
        row = self.maps[0, :, 1 + 4 * 4 + 2].mean(0)[1:].reshape(6, 2, 2)
        np.testing.assert_allclose(np.block([[*row[:3]], [*row[3:]]]), bare, rtol=1e-6)


def test_an_array_of_several_images_may_be_of_layers():
    """The mean maps of twelve layers were once drawn as twelve images, the first of them in place of the last."""
    means = maps_of(3, 2, 16, 16)
    for draw in (
        lambda: plot.heads(means),
        lambda: plot.query(means, query=3),
        lambda: plot.rollout(means, query=3),
        lambda: plot.head(means, head=0),
    ):
        with pytest.warns(VisualizerWarning, match=r"\(3, 2, 16, 16\).*batch=0.*list\(maps\)"):
            draw()
    plot.heads(means, batch=0)
    np.testing.assert_allclose(means[2, 1], plot.heads(list(means)).axes[1].images[0].get_array())


def test_a_picture_chooses_its_map_of_the_batch():
    """Where `batch` does not: the maps of another picture were once drawn over it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, img_size=(32, 64)).eval()
    pictures = torch.rand(3, 3, 4, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with attention(model) as maps, torch.inference_mode():
        model(pictures * 2 - 1)
    for plotted in (
        lambda image, **which: plot.class_token(maps, image, cbar=False, **which).figure,
        lambda image, **which: plot.heads(maps, image, query=(1, 2), cbar=False, **which),
        lambda image, **which: plot.layers(maps, image, query=0, head=0, cbar=False, **which),
        lambda image, **which: plot.rollout(maps, image, cbar=False, **which),
    ):
        shown, right, first = (
            [image.get_array() for ax in plotted(pictures[2], **which).axes for image in ax.images]
            for which in ({}, {"batch": 2}, {"batch": 0})
        )
        assert all(map(np.array_equal, right, shown))
        assert not all(map(np.array_equal, first, shown))

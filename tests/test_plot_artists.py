"""What is drawn for print: images in files of vectors, words at axes of any size, colours that can be read."""

import base64
import io
import itertools
import re
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.text import Text
from PIL import Image
from plots import maps_of, no_figure_left, pixel, places_of_text  # noqa: F401

from visualizer import Layout, plot
from visualizer.plot.look import Look, without_future


def causal(count, sink=0.8):
    """A causal map whose first token draws most attention."""
    weights = np.tril(np.random.default_rng(0).random((count, count)))
    weights *= (1 - sink) / weights.sum(-1, keepdims=True)
    weights[:, 0] += sink
    return weights


def svg_of(figure):
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    return file.getvalue()


def images_in(svg):
    """The images that a file holds, the largest first."""
    found = [base64.b64decode(one) for one in re.findall(r"data:image/png;base64,\s*([^\"]+)", svg)]
    images = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in found]
    return sorted(images, key=lambda image: -image.size)


class TestFilesOfVectors:
    def test_a_photograph_keeps_its_own_pixels_and_text_stays_text(self):
        photograph = np.random.default_rng(0).random((100, 150, 3))
        svg = svg_of(plot.class_token(maps_of(25, 25), photograph, grid=(4, 6)).figure)
        expected = plot.class_token(maps_of(25, 25), photograph, grid=(4, 6)).images[0].get_array()
        # Each pixel is repeated, as they are larger than those of print.
        [image] = [one for one in images_in(svg) if one.shape == (200, 300, 3)]
        np.testing.assert_allclose(expected, image[::2, ::2] / 255, atol=1 / 255)
        assert "query: CLS" in svg and "attention weight" in svg

    def test_cells_have_sharp_edges(self):
        weights = maps_of(3, 3)
        image = images_in(svg_of(plot.head(weights, cbar=False).figure))[0]
        assert (300, 300, 3) == image.shape
        assert (image == image[50::100, 50::100].repeat(100, 0).repeat(100, 1)).all()

    def test_what_is_finer_than_print_is_drawn_as_means_of_weights(self):
        _, ax = plt.subplots(figsize=(2, 2))
        weights = np.full((1200, 1200), 0.5 / 1199)
        weights[:, 600] = 0.5
        plot.head(weights, ax=ax, cbar=False)
        image = images_in(svg_of(ax.figure))[0]
        assert 300 <= image.shape[0] <= 600
        block = 1200 // image.shape[0]
        mean = (0.5 + (block - 1) * 0.5 / 1199) / block
        drawn = ax.images[0]
        np.testing.assert_array_equal(drawn.to_rgba([mean], bytes=True)[0, :3], image[50, 600 // block])
        dark = drawn.to_rgba([0.5 / 1199], bytes=True)[0, :3]
        np.testing.assert_array_equal(dark, image[50, 10])


class TestOverPictures:
    @pytest.mark.parametrize("cmap", ["YlOrRd", "inferno", "viridis", "Blues"])
    @pytest.mark.parametrize("style", ["overlay", "mask"])
    def test_the_picture_is_seen_everywhere_and_is_not_dark(self, cmap, style):
        look = Look(cmap=cmap, style=style)
        black, white = np.zeros(3), np.ones(3)
        for strength in (0.0, 0.3, 1.0):
            dark, light = (look.blend(np.array(strength), one) for one in (black, white))
            assert (light - dark >= 0.05).all(), "dark and light parts of the picture still differ"
        unattended = look.blend(np.array(0.0), np.full(3, 0.4))
        assert unattended.mean() > (0.5 if cmap in ("YlOrRd", "Blues") or style == "mask" else 0.3)

    def test_the_colour_bar_has_the_colours_that_are_drawn(self):
        weights = np.linspace(0, 1, 16).reshape(4, 4)
        for cbar in (True, False):
            ax = plot.overlay(weights, np.ones((40, 40, 3)), cbar=cbar)
            bar = next(ax for ax in ax.figure.axes if ax.get_label() == "<colorbar>")._colorbar if cbar else None
            bar = bar or ax.figure.colorbar(ax.images[-1])
            for row, column in np.ndindex(4, 4):
                expected = bar.cmap(bar.norm(weights[row, column]))[:3]
                np.testing.assert_allclose(expected, pixel(ax, 10 * column + 5, 10 * row + 5), atol=0.02)

    def test_more_weight_is_darker_on_paper_step_by_step(self):
        colours = Look(cmap="YlOrRd").scale(1, over_picture=True).to_rgba(np.linspace(0, 1, 33))[:, :3]
        assert (np.diff(colours @ [0.299, 0.587, 0.114]) < 0).all()

    def test_swatches_are_labelled_in_the_size_of_the_users_text(self):
        sizes = []
        for size in (6, 12):
            with mpl.rc_context({"font.size": size}):
                ax = plot.class_token(maps_of(14, 14), grid=(3, 3), prefix_tokens=["CLS", "R1", "R2", "R3", "R4"])
                ax.figure.canvas.draw()
            labels = ax.child_axes[0].get_xticklabels()
            boxes = [label.get_window_extent() for label in labels]
            assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
            sizes.append(labels[0].get_fontsize())
        assert sizes[0] < 6 < sizes[1]


class TestCausalMaps:
    def test_the_future_has_no_value_and_a_sink_leaves_the_rest_to_be_seen(self):
        weights = causal(20)
        ax = plot.tokens(weights, [*"abcdefghijklmnopqrst"])
        shown = ax.images[0].get_array()
        np.testing.assert_array_equal(np.triu(np.ones((20, 20), bool), 1), np.ma.getmaskarray(shown))
        np.testing.assert_allclose(weights[np.tril_indices(20)], shown.compressed())
        colours = ax.images[0].to_rgba(shown)
        assert (1, 1, 1) == tuple(colours[0, 1, :3])
        even = colours[19, 1:, :3] - ax.images[0].to_rgba(0.0)[:3]  # a hundredth of the weight each
        assert np.abs(even).max(-1).min() > 0.05
        [bar] = [one for one in ax.figure.axes if one is not ax]
        assert "attention weight (√ scale)" == bar.get_ylabel()
        assert isinstance(ax.images[0].norm, PowerNorm)

    def test_where_the_user_says_where_it_ends_the_scale_is_even(self):
        ax = plot.tokens(causal(4), [*"abcd"], vmax=0.5)
        assert "Normalize" == type(ax.images[0].norm).__name__
        assert (0, 0.5) == ax.images[0].get_clim()

    @pytest.mark.parametrize("weights", [maps_of(4, 4), np.eye(4), np.eye(4)[:1], np.full((4, 3), 1 / 3)])
    def test_other_maps_have_all_their_values(self, weights):
        np.testing.assert_array_equal(weights, without_future(weights))

    def test_the_last_queries_of_a_text_have_a_future_too(self):
        seen = without_future(causal(6)[4:])
        assert [(0, 5)] == [tuple(place) for place in np.argwhere(np.isnan(seen))]

    def test_a_canvas_of_layers_leaves_it_white_too(self):
        maps = np.broadcast_to(causal(40), (2, 1, 3, 40, 40))
        shown = np.ma.masked_invalid(plot.layers(list(maps)).axes[0].images[0].get_array())
        assert 0.4 < np.ma.getmaskarray(shown).mean() < 0.6

    def test_a_long_text_is_drawn_in_blocks_and_the_colour_bar_says_so(self):
        weights = causal(1203)
        ax = plot.tokens(weights, [f"w{number}" for number in range(1203)])
        shown = ax.images[0].get_array()
        assert (401, 401) == shown.shape
        np.testing.assert_allclose(weights[900:903, 600:603].max(), shown[300, 200])
        assert (1202.5, -0.5) == ax.get_ylim()
        [bar] = [one for one in ax.figure.axes if one is not ax]
        assert "largest attention weight of 3 x 3 tokens (√ scale)" == bar.get_ylabel()


class TestWidths:
    @pytest.mark.parametrize("width", [3.3, 6.9])
    @pytest.mark.parametrize(
        "draw",
        [
            pytest.param(lambda: plot.tokens(maps_of(30, 30), [f"word{n}" for n in range(30)]), id="tokens"),
            pytest.param(lambda: plot.layers(maps_of(12, 1, 12, 9, 9)).axes[0], id="canvas"),
        ],
    )
    def test_words_are_thinned_when_a_figure_gets_the_width_of_a_column(self, draw, width):
        with mpl.rc_context({"font.size": 7}):
            ax = draw()
            wide, high = ax.figure.get_size_inches()
            ax.figure.set_size_inches(width, high * width / wide)
            (across, down), figure = places_of_text(ax)
        assert len(across) > 3 < len(down)
        assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(across))
        assert all(below.y0 >= above.y1 - 1 for below, above in itertools.pairwise(down))
        assert all(figure.x0 <= box.x0 and box.x1 <= figure.x1 and figure.y0 <= box.y0 for box in (*across, *down))

    def test_titles_stay_over_their_own_panels(self):
        figure, axes = plt.subplots(1, 3, figsize=(7, 2.5))
        for ax in axes:
            plot.class_token(list(maps_of(3, 1, 6, 17, 17)), ax=ax)
        figure.canvas.draw()
        boxes = [ax.title.get_window_extent() for ax in axes]
        bars = [text.get_window_extent() for text in figure.findobj(Text) if text.get_text() == "attention weight"]
        assert 3 == len(bars)
        assert not any(one.overlaps(other) for one, other in itertools.combinations([*boxes, *bars], 2))
        assert "query: CLS, layer 2, mean of 6 heads" == axes[0].get_title().replace("\n", " ")

    @pytest.mark.parametrize("count", [1, 6])
    def test_no_side_of_a_figure_of_heads_is_empty(self, count):
        figure = plot.heads(maps_of(1, count, 20, 20))
        figure.canvas.draw()
        box, (wide, high) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
        assert max(box.x0, box.y0, wide - box.x1, high - box.y1) < 0.5


def test_registers_of_one_layout_are_read_from_it():
    layout = Layout.picture((2, 3), ["CLS", "REG1"])
    ax = plot.overlay(np.arange(8.0), np.ones((20, 30, 3)), layout=layout)
    assert ["CLS\n0", "REG1\n1"] == [label.get_text() for label in ax.child_axes[0].get_xticklabels()]


@pytest.mark.parametrize(
    "style", ["classic", {"axes.grid": True, "image.interpolation": "bicubic", "image.origin": "lower"}]
)
def test_a_style_sheet_neither_blurs_a_matrix_nor_draws_lines_across_it(style):
    with plt.style.context(style):
        ax = plot.head(np.eye(5))
        ax.figure.canvas.draw()
    assert "antialiased" == ax.images[0].get_interpolation()
    lines = [line for axis in (ax.xaxis, ax.yaxis) for line in axis.get_gridlines()]
    assert lines
    assert not any(line.get_visible() for line in lines)


def test_tokens_are_counted_in_whole_numbers():
    for ax in plot.heads(np.full((4, 17, 17), 1 / 17)).axes[:4]:
        ax.figure.canvas.draw()
        assert all(float(place).is_integer() for axis in (ax.xaxis, ax.yaxis) for place in axis.get_ticklocs())


@pytest.mark.parametrize("ax", [3, "ax", np.array([None])], ids=repr)
def test_what_is_no_axes_is_refused(ax):
    with pytest.raises(TypeError, match=r"ax is a \w+: pass one Axes"):
        plot.head(np.eye(3), ax=ax)


LAYERS = maps_of(12, 1, 12, 10, 10)
KINDS = [["previous", "special", "induction", "broad"] * 3] * 4


class TestOneColumnOfAPaper:
    @pytest.mark.parametrize(
        "draw",
        [
            lambda: plot.heads(LAYERS, share=False, layer=3),
            lambda: plot.layers(LAYERS, np.full((30, 30, 3), 0.5), query=0, head="mean", share=False),
            lambda: plot.layers(LAYERS),
            lambda: plot.rollout(LAYERS, np.full((30, 30, 3), 0.5)),
            lambda: plot.query(LAYERS, np.full((30, 30, 3), 0.5), query=(2, 2)).figure,
            lambda: plot.patterns(KINDS).figure,
            lambda: plot.spikes({"before": np.full((8, 16), 0.5), "after": np.full((8, 16), 0.1)}),
            lambda: plot.distance(np.ones((12, 12)), title="a title of the user's own, longer than the figure").figure,
        ],
        ids=["heads", "strip", "layers", "rollout", "query", "patterns", "spikes", "distance"],
    )
    def test_the_styles_width_is_kept_and_no_text_is_cut_or_covered(self, draw):
        with mpl.rc_context({"figure.figsize": (3.3, 2.5), "font.size": 7}):
            figure = draw()
            figure.canvas.draw()
        assert 2.5 < figure.get_size_inches()[0] < 3.301
        texts = [ax.title for ax in figure.axes] + [
            figure._suptitle,
            *(text for ax in figure.axes for text in ax.texts),
        ]
        texts += [axis.label for ax in figure.axes if ax.axison for axis in (ax.xaxis, ax.yaxis)]
        for axis in (ax.xaxis for ax in figure.axes if ax.get_label() == "<colorbar>"):  # numbers below bars
            ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            texts += [text for place, text in ticks if place <= axis.get_view_interval()[1]]
        seen = [text for text in texts if text is not None and text.get_text() and text.get_visible()]
        boxes = [text.get_window_extent() for text in seen]
        assert all(box.x0 > -1 and box.y0 > -1 for box in boxes)
        assert all(box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1 for box in boxes)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))

    def test_without_a_width_in_the_style_figures_have_their_own(self):
        assert plot.layers(LAYERS).get_size_inches()[0] > 8

    def test_texts_follow_a_figure_that_is_made_smaller_and_what_the_user_writes_stays(self):
        ax = plot.query(LAYERS, np.full((30, 30, 3), 0.5), query=(2, 2))
        figure = ax.figure
        assert "\n" not in ax.get_title()
        figure.set_size_inches(2.2, 2.2)
        figure.canvas.draw()
        assert ["query: patch (2, 2),", "layer 11,", "mean of 12 heads"] == ax.get_title().split("\n")
        ax.set_title("my own, and long")
        figure.canvas.draw()
        assert "my own, and long" == ax.get_title()

    def test_small_cells_have_first_letters_that_tell_the_patterns_apart(self):
        _, ax = plt.subplots(figsize=(4.4, 3))
        labels = np.array([["self", "special", "mixed"] * 4] * 3)
        plot.patterns(SimpleNamespace(labels=labels, nearest=lambda layer, head: ["previous", None][layer > 0]), ax=ax)
        assert {"se", "sp", "≈p", "≈n"} == {text.get_text() for text in ax.texts}
        assert "mixed, ≈ nearest (12)" == ax.get_legend().get_texts()[-1].get_text()
        assert all(text.get_visible() for text in ax.texts)

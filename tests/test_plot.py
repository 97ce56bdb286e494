"""What is drawn, read from the artists: values, places, labels, scales; and what is refused, by its words."""

import inspect
import itertools

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from plots import frames, hot, maps_of, marked, no_figure_left, pixel  # noqa: F401

from visualizer import AttentionMap, Layout, VisualizerWarning, analysis, plot
from visualizer.layout import Part


class TestHead:
    def test_the_very_weights_queries_down_keys_across(self):
        maps = [maps_of(2, 3, 5, 7, seed=layer) for layer in range(4)]
        ax = plot.head(maps, layer=2, head=1, batch=1)
        [image] = ax.images
        np.testing.assert_allclose(maps[2][1, 1], image.get_array(), rtol=1e-6)
        assert ("key", "query", "layer 2, head 1") == (ax.get_xlabel(), ax.get_ylabel(), ax.get_title())
        assert ax.yaxis_inverted(), "row 0 is on top"
        assert "viridis" == image.get_cmap().name
        assert 0 == image.get_clim()[0]

    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda m: m, id="array"),
            pytest.param(lambda m: torch.tensor(m), id="tensor"),
            pytest.param(lambda m: torch.tensor(m, requires_grad=True), id="requires grad"),
            pytest.param(lambda m: torch.tensor(m, dtype=torch.bfloat16), id="bfloat16"),
            pytest.param(lambda m: m.astype(np.float16), id="float16"),
            pytest.param(lambda m: list(m), id="list of layers"),
            pytest.param(lambda m: tuple(torch.tensor(one) for one in m), id="tuple of tensors"),
            pytest.param(lambda m: {"Attention.forward": list(m)}, id="a cache"),
        ],
    )
    def test_all_kinds_of_input_draw_the_same(self, wrap):
        maps = maps_of(3, 1, 2, 4, 4)
        drawn = plot.head(wrap(maps), layer=1, head=0).images[0].get_array()
        np.testing.assert_allclose(maps[1, 0, 0], drawn, atol=4e-3)

    @pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (1, 1, 5, 5), (1, 1, 1, 5, 5)])
    def test_axes_of_length_one_need_no_choice(self, shape):
        np.testing.assert_allclose(maps_of(*shape).reshape(5, 5), plot.head(maps_of(*shape)).images[0].get_array())

    @pytest.mark.parametrize(("head", "reduce"), [("mean", np.mean), ("max", np.max), ("min", np.min)])
    @pytest.mark.filterwarnings("ignore::visualizer.VisualizerWarning")
    def test_reductions_over_heads(self, head, reduce):
        maps = maps_of(4, 5, 5)
        ax = plot.head(maps, head=head)
        np.testing.assert_allclose(reduce(maps, axis=0), ax.images[0].get_array())
        assert f"{head} of 4 heads" == ax.get_title()

    def test_a_title_is_written_whatever_it_is(self):
        assert "7" == plot.head(maps_of(5, 5), title=7).get_title()

    def test_labels_of_ones_own(self):
        ax = plot.head(maps_of(2, 3), xticklabels=["a", "$b", "c"], yticklabels=["p", "q"])
        assert ["a", "$b", "c"] == [label.get_text() for label in ax.get_xticklabels()]
        assert ["p", "q"] == [label.get_text() for label in ax.get_yticklabels()]
        with pytest.raises(ValueError, match="xticklabels has 1 entries for 3"):
            plot.head(maps_of(2, 3), xticklabels=["a"])

    def test_it_draws_where_it_is_told_and_nowhere_else(self):
        figure, (left, right) = plt.subplots(1, 2)
        before = plt.get_fignums()
        assert plot.head(maps_of(5, 5), ax=right, cbar=False) is right
        assert before == plt.get_fignums()
        assert not left.images
        assert [left, right] == figure.axes, "no colour bar was asked for"

    def test_a_few_large_weights_do_not_leave_the_rest_dark_and_the_bar_says_so(self):
        maps = np.full((100, 100), 0.5 / 99)
        np.fill_diagonal(maps, 0.5)
        maps[50] = np.eye(100)[0]
        ax = plot.head(maps)
        top = ax.images[0].get_clim()[1]
        assert 4 / 100 <= top < 1
        assert "max" == ax.images[0].colorbar.extend
        assert 0.9 == plot.head(maps, vmax=0.9).images[0].get_clim()[1]

    @pytest.mark.parametrize("column", range(500, 510))
    def test_a_column_of_a_large_map_is_seen_wherever_it_is(self, column):
        maps = np.full((1025, 1025), 0.4 / 1024)
        maps[:, column] = 0.6
        ax = plot.head(maps, cbar=False)
        ax.figure.set_dpi(40)
        ax.figure.canvas.draw()
        drawn = np.asarray(ax.figure.canvas.buffer_rgba()).astype(int)
        high, wide = drawn.shape[:2]
        brightest = drawn[high // 2, :, 1][wide // 5 : -wide // 5].max()
        assert brightest > 60, "green of viridis is 1 at zero, 231 at the top"

    def test_queries_run_down_whatever_the_users_defaults_are(self):
        with mpl.rc_context({"image.origin": "lower"}):
            assert plot.head(maps_of(5, 5)).yaxis_inverted()
            ax = plot.class_token(hot(0, 3), np.full((56, 56, 3), 200, np.uint8))
            assert [(0, 3)] == marked(ax, 4, 4)

    def test_styles_are_as_they_were(self):
        before = dict(mpl.rcParams)
        plot.head(maps_of(5, 5))
        plot.tokens(maps_of(2, 2), ["a", "b"])
        assert before == dict(mpl.rcParams)


class TestHeads:
    @pytest.mark.parametrize("count", [1, 3, 6, 12])
    def test_a_panel_a_head_on_one_scale_with_one_bar(self, count):
        maps = maps_of(2, 1, count, 5, 5)
        figure = plot.heads(maps, layer=1)
        assert isinstance(figure, Figure)
        panels = [ax for ax in figure.axes if ax.images]
        for number, ax in enumerate(panels):
            np.testing.assert_allclose(maps[1, 0, number], ax.images[0].get_array())
            assert f"head {number}" == ax.get_title()
        assert count == len(panels)
        assert 1 == len({ax.images[0].get_clim() for ax in panels})
        assert 1 == sum(ax.get_label() == "<colorbar>" for ax in figure.axes)
        assert "layer 1" == figure._suptitle.get_text()

    def test_a_single_row_of_panels(self):
        figure = plot.heads(maps_of(1, 3, 5, 5), columns=3)
        assert 3 == sum(bool(ax.images) for ax in figure.axes)

    def test_the_last_layer_unless_told_otherwise(self):
        maps = maps_of(4, 1, 2, 5, 5)
        np.testing.assert_allclose(maps[3, 0, 0], plot.heads(maps).axes[0].images[0].get_array())

    def test_one_row_without_a_number_leaves_the_others(self):
        maps = maps_of(2, 10, 10)
        maps[0, 3] = np.nan
        with pytest.warns(VisualizerWarning, match="hold NaN"):
            figure = plot.heads(maps)
        assert 0 < figure.axes[0].images[0].get_clim()[1] < 1

    def test_a_cache_with_an_empty_key(self):
        maps = maps_of(2, 5, 5)
        figure = plot.heads({"Attention.forward": [maps[None]], "Other.forward": []})
        np.testing.assert_allclose(maps[1], figure.axes[1].images[0].get_array())

    def test_a_scale_of_its_own_for_each(self):
        maps = np.stack([np.full((10, 10), 0.1), np.eye(10)])
        figure = plot.heads(maps, share=False)
        panels = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
        tops = [ax.images[0].get_clim()[1] for ax in panels]
        assert tops[0] < tops[1]
        assert ["head 0\nto 0.1", "head 1\nto 1"] == [ax.get_title() for ax in panels]
        [bar] = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
        assert (0, 1) == bar.get_ylim()
        assert "share of each panel's scale (√ scale)" == bar.get_ylabel()


class TestOverThePicture:
    @pytest.mark.parametrize("place", [(0, 0), (0, 3), (2, 1), (3, 3)])
    @pytest.mark.parametrize("style", ["overlay", "mask"])
    def test_the_hot_patch_lies_on_its_own_pixels(self, place, style):
        image = np.full((56, 84, 3), 200, np.uint8)
        ax = plot.class_token(hot(*place, grid=(4, 6)), image, style=style)
        assert [place] == marked(ax, 4, 6)

    def test_the_frame_is_round_the_query_in_black_and_white(self):
        ax = plot.query(hot(0, 0, grid=(4, 6)), np.zeros((56, 84, 3)), query=(2, 1))
        assert {(14.0, 28.0, 14.0, 14.0)} == {(*f.get_xy(), f.get_width(), f.get_height()) for f in frames(ax)}
        assert {to_rgb("black"), to_rgb("white")} == {f.get_edgecolor()[:3] for f in frames(ax)}

    def test_a_token_index_and_a_patch_are_the_same_query(self):
        maps = maps_of(1, 2, 17, 17)
        by_patch, by_index = plot.query(maps, query=(2, 1)), plot.query(maps, query=10)
        np.testing.assert_array_equal(by_patch.images[0].get_array(), by_index.images[0].get_array())
        np.testing.assert_allclose(maps[0, :, 10, 1:].mean(0).reshape(4, 4), by_patch.images[0].get_array())
        assert by_patch.get_title() == by_index.get_title() == "query: patch (2, 1), mean of 2 heads"

    def test_a_grid_that_is_not_square(self):
        maps = maps_of(1, 1, 1 + 3 * 5, 1 + 3 * 5)
        for options in ({"grid": (3, 5)}, {"image_size": (42, 70), "patch_size": 14}):
            drawn = plot.class_token(maps, **options).images[0].get_array()
            np.testing.assert_allclose(maps[0, 0, 0, 1:].reshape(3, 5), drawn)
        picture = np.zeros((42, 70, 3))
        assert "query: CLS" == plot.class_token(maps, picture, patch_size=14).get_title()

    @pytest.mark.parametrize(
        ("given", "names"), [(None, ["CLS"]), (1, ["CLS"]), (["[CLS]"], ["[CLS]"])], ids=["none", "count", "names"]
    )
    def test_prefix_tokens_have_swatches_with_their_weights_on_the_patches_scale(self, given, names):
        maps = maps_of(17, 17)
        ax = plot.query(maps, query=(0, 0), prefix_tokens=given)
        [strip] = ax.child_axes
        np.testing.assert_allclose(maps[1, :1], strip.images[0].get_array()[0])
        assert ax.images[0].get_clim() == strip.images[0].get_clim()
        assert [f"{names[0]}\n{maps[1, 0]:.2g}"] == [label.get_text() for label in strip.get_xticklabels()]

    def test_registers(self):
        maps = maps_of(1 + 4 + 9, 1 + 4 + 9)
        ax = plot.class_token(maps, grid=(3, 3), prefix_tokens=["CLS", "REG1", "REG2", "REG3", "$R$"])
        assert 5 == len(ax.child_axes[0].get_xticklabels())
        np.testing.assert_allclose(maps[0, 5:].reshape(3, 3), ax.images[0].get_array())
        assert frames(ax.child_axes[0]), "the class token's own swatch is framed"
        assert not frames(ax)

    def test_an_even_row_is_not_painted_solid(self):
        ax = plot.class_token(np.full((17, 17), 1 / 17))
        assert 4 / 17 == pytest.approx(ax.images[0].get_clim()[1])

    @pytest.mark.parametrize("grid", [(1, 196), (196, 1)])
    def test_a_strip_gets_a_figure_of_ordinary_size(self, grid):
        figure = plot.query(maps_of(196, 196), query=3, grid=grid).figure
        assert all(1 < side < 12 for side in figure.get_size_inches())

    def test_a_lowest_value_above_all_weights(self):
        ax = plot.query(maps_of(16, 16), query=3, vmin=0.5, vmax=None, cbar=False)
        assert (0.5, 0.5) == ax.images[0].get_clim()
        ax.figure.canvas.draw()
        panels = plot.heads(maps_of(2, 16, 16), vmin=0.95)
        assert (0.95, 0.95) == panels.axes[0].images[0].get_clim()
        panels.canvas.draw()

    def test_smooth_goes_through_the_patches_centres(self):
        maps = maps_of(16, 16)
        image = np.zeros((64, 64, 3))
        sharp = plot.query(maps, image, query=0, style="mask").images[0].get_array()[..., 0]
        smooth = plot.query(maps, image, query=0, style="mask", smooth=True).images[0].get_array()[..., 0]
        centres = np.ix_(range(8, 64, 16), range(8, 64, 16))
        order = maps[0].reshape(4, 4).argsort(None)
        assert not np.allclose(sharp, smooth)
        assert (np.diff(sharp[centres].ravel()[order]) < 0).all(), "the more weight, the less black fades to white"
        np.testing.assert_allclose(sharp[centres], smooth[centres], atol=0.05)

    def test_without_a_picture_the_weights_alone(self):
        maps = maps_of(16, 16)
        ax = plot.query(maps, query=3)
        np.testing.assert_allclose(maps[3].reshape(4, 4), ax.images[0].get_array())


class TestTokens:
    def test_labels_on_both_sides(self):
        maps, words = maps_of(3, 3), ["[CLS]", "cat", "sat"]
        ax = plot.tokens(maps, words)
        np.testing.assert_allclose(maps, ax.images[0].get_array())
        for axis in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert words == [label.get_text() for label in axis]
        assert [0, 1, 2] == list(ax.get_xticks()) == list(ax.get_yticks())

    def test_dollars_white_space_and_what_cannot_be_seen(self):
        words = ["$x^", "$5", " the", "Ġcat", "\n", "\u202eevil", "", "\\frac"]
        ax = plot.tokens(maps_of(8, 8), words)
        ax.figure.canvas.draw()
        shown = [label.get_text() for label in ax.get_yticklabels()]
        assert ["$x^", "$5", "␣the", "␣cat", "⏎", "‹202E›evil", "‹empty›", "\\frac"] == shown

    def test_other_words_for_the_keys(self):
        ax = plot.tokens(maps_of(2, 3), ["le", "chat"], key_tokens=["the", "black", "cat"])
        assert ["le", "chat"] == [label.get_text() for label in ax.get_yticklabels()]
        assert ["the", "black", "cat"] == [label.get_text() for label in ax.get_xticklabels()]

    def test_long_texts_are_thinned_and_do_not_overlap(self):
        words = [f"word{number}" for number in range(300)]
        ax = plot.tokens(maps_of(300, 300), words)
        ax.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert 20 < len(boxes) < 300
        heights = sorted((box.y0, box.y1) for box in boxes)
        assert all(above[0] >= below[1] - 1 for below, above in itertools.pairwise(heights))
        assert all(
            words[int(tick)] == label.get_text()
            for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
        )

    def test_the_number_of_words_must_fit(self):
        with pytest.raises(ValueError) as caught:
            plot.tokens(maps_of(3, 3), ["a", "b"])
        for part in ("tokens has 2 entries", "3 rows or columns", "special tokens", "cross-attention"):
            assert part in str(caught.value)
        for way_out in ("convert_ids_to_tokens", "weights[..., :2, :2]"):
            assert way_out in str(caught.value)
        plot.tokens(np.eye(3)[:2, :2], ["a", "b"])
        with pytest.raises(ValueError, match="key_tokens has 2 entries for 4"):
            plot.tokens(maps_of(3, 4), ["a", "b", "c"], key_tokens=["a", "b"])


class TestRefusals:
    """The message says what was given, what would fit, and what to do."""

    @pytest.mark.parametrize(
        ("call", "error", "parts"),
        [
            (lambda: plot.head(np.ones(3) / 3), ValueError, ["(3,)", "(queries, keys)"]),
            (lambda: plot.head(maps_of(2, 1, 3, 5, 5), head=0), ValueError, ["2 layers", "layer=0 to 1", '"mean"']),
            (lambda: plot.head(maps_of(3, 5, 5)), ValueError, ["3 heads", "head=0 to 2"]),
            (lambda: plot.head(maps_of(3, 5, 5), head=7), IndexError, ["head=7", "out of range", "3 along head"]),
            (lambda: plot.head(maps_of(3, 5, 5), head="median"), ValueError, ["'median'", '"mean", "max" or "min"']),
            (lambda: plot.head(maps_of(3, 5, 5), head=0.5), TypeError, ["0.5", "float"]),
            (lambda: plot.head([]), ValueError, ["without entries", 'attn_implementation="eager"']),
            (lambda: plot.head((None, None)), ValueError, ["of None", 'attn_implementation="eager"']),
            (lambda: plot.head(np.zeros((0, 5, 5))), ValueError, ["(1, 0, 5, 5)", "empty"]),
            (lambda: plot.head(np.full((5, 5), -np.inf)), ValueError, ["infinite", "softmax"]),
            (lambda: plot.head(np.full((5, 5), np.nan)), ValueError, ["NaN"]),
            (lambda: plot.class_token(maps_of(16, 16)), ValueError, ["no class token", "plot.query"]),
            (lambda: plot.tokens(maps_of(3, 3), "abc"), TypeError, ["list of words", "text.split()"]),
            (lambda: plot.query(np.vstack([np.full(16, np.nan), maps_of(15, 16)]), query=0), ValueError, ["NaN"]),
            (lambda: plot.tokens(maps_of(3, 3), 3), TypeError, ["tokens=3", "list of words"]),
            (lambda: plot.heads(maps_of(2, 5, 5), columns=0), ValueError, ["columns=0"]),
            (lambda: plot.heads(maps_of(2, 5, 5), columns="2"), ValueError, ["columns='2'"]),
            (lambda: plot.rollout(maps_of(2, 1, 1, 17, 17), heads="some"), ValueError, ["heads='some'", '"mean"']),
            (lambda: plot.query(maps_of(17, 17), query=0, layout=(4, 4)), TypeError, ["(4, 4)", "Layout.picture"]),
            (lambda: plot.query(maps_of(17, 17), query=0, shift=1), ValueError, ["shift=1", "pass window="]),
            (lambda: plot.query(maps_of(17, 17), query=0, prefix_tokens=0.5), TypeError, ["prefix_tokens=0.5"]),
            (lambda: plot.class_token(maps_of(12, 12)), ValueError, ["12", "11", "grid=(rows, columns)"]),
            (lambda: plot.class_token(maps_of(17, 17), grid=(5, 5)), ValueError, ["5 x 5 = 25", "17 tokens"]),
            (lambda: plot.query(maps_of(17, 17), query=(4, 0)), IndexError, ["(4, 0)", "4 rows and 4 columns"]),
            (lambda: plot.query(maps_of(17, 17), query=17), IndexError, ["17", "0 to 16"]),
            (lambda: plot.query(maps_of(17, 17), query=0, style="jet"), ValueError, ["'jet'", "'overlay', 'mask'"]),
            (
                lambda: plot.class_token(maps_of(17, 17), np.ones((1, 3, 8, 8))),
                ValueError,
                ["(1, 3, 8, 8)", "image[0]"],
            ),
            (lambda: plot.class_token(maps_of(17, 17), np.full((8, 8, 3), 9.0)), ValueError, ["9", "normalisation"]),
            (lambda: plot.class_token(maps_of(17, 17), "cat.jpg"), FileNotFoundError, ["cat.jpg"]),
            (lambda: plot.head(maps_of(5, 5), vmax="1"), TypeError, ["vmax='1'", "a number"]),
            (lambda: plot.head(maps_of(5, 5), vmax=-1), ValueError, ["vmax=-1", "vmin=0"]),
            (lambda: plot.query(maps_of(17, 17), query=0, vmin=1, vmax=0.5), ValueError, ["vmax=0.5", "vmin=1"]),
            (lambda: plot.class_token(maps_of(17, 17), b"cat"), TypeError, ["bytes", "PIL", "path"]),
        ],
    )
    @pytest.mark.filterwarnings("ignore:1 of 16 rows hold NaN:visualizer.VisualizerWarning")
    def test_each_says_what_would_do(self, call, error, parts):
        with pytest.raises(error) as caught:
            call()
        for part in parts:
            assert part in str(caught.value)

    def test_rows_that_do_not_sum_to_one_are_drawn_with_a_warning(self):
        with pytest.warns(VisualizerWarning, match="do not sum to 1") as caught:
            plot.head(np.random.default_rng(0).normal(size=(16, 16)))
            plot.query(np.random.default_rng(0).normal(size=(16, 16)), query=0)
        assert [__file__, __file__] == [one.filename for one in caught]


class TestKeywords:
    """What plots share: groups of keywords that signatures show and calls obey."""

    @pytest.mark.parametrize("name", plot.__all__)
    def test_a_signature_shows_every_keyword_and_no_stars(self, name):
        function = getattr(plot, name)
        kinds = {one.kind for one in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds

    @pytest.mark.parametrize("name", plot.__all__)
    def test_a_docstring_has_an_example(self, name):
        lines = inspect.getdoc(getattr(plot, name)).splitlines()
        assert any(line.startswith((">>> ", "    ")) and f"{name}(" in line for line in lines[1:])

    def test_defaults_are_those_of_the_plot(self):
        parameters = {name: inspect.signature(getattr(plot, name)).parameters for name in plot.__all__}
        assert ("viridis", "YlOrRd", None) == tuple(
            parameters[name]["cmap"].default for name in ("head", "query", "layers")
        )
        assert (-1, 1) == tuple(parameters["positions"][end].default for end in ("vmin", "vmax"))
        assert "vmin" not in parameters["rollout"]
        assert "image_size" not in parameters["overlay"]

    @pytest.mark.parametrize(
        ("call", "parts"),
        [
            (lambda: plot.head(np.eye(4), cmpa="jet"), ["'cmpa'", "did you mean 'cmap'"]),
            (lambda: plot.head(np.eye(4), style="mask"), ["'style'"]),
            (lambda: plot.class_token(maps_of(17, 17), nonsense=1), ["'nonsense'"]),
            (lambda: plot.class_token(maps_of(17, 17), query=1), ["'query'"]),
            (lambda: plot.rollout(maps_of(2, 1, 1, 17, 17), vmin=0), ["'vmin'"]),
            (lambda: plot.overlay(np.eye(4), image_size=4), ["'image_size'"]),
            (lambda: plot.spikes(np.ones((2, 4)), vmin=0), ["'vmin'"]),
        ],
    )
    def test_a_keyword_that_a_plot_does_not_have_is_refused(self, call, parts):
        with pytest.raises(TypeError, match="unexpected keyword argument") as caught:
            call()
        for part in parts:
            assert part in str(caught.value)


class TestSinks:
    """`sinks="remove"` in every plot of maps: the weights of `analysis.without_sinks`, and a title that says so."""

    WITH = 0.4 * maps_of(2, 1, 2, 17, 17) + 0.6 * np.eye(17)[5]  # all look at one patch
    CALLS = pytest.mark.parametrize(
        ("name", "options"),
        [
            ("head", {"layer": 1, "head": 0}),
            ("heads", {}),
            ("heads", {"query": 0}),
            ("tokens", {"layer": 0, "head": 1, "tokens": list("abcdefghijklmnopq")}),
            ("layers", {}),
            ("layers", {"query": (1, 2), "head": "mean"}),
            ("query", {"query": 3}),
            ("class_token", {}),
            ("rollout", {}),
        ],
    )

    @staticmethod
    def drawn(figure):
        return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.images]

    @CALLS
    def test_plots_draw_what_is_left(self, name, options):
        raw, clean, expected = (
            getattr(plot, name)(maps, **options, **more)
            for maps, more in (
                (self.WITH, {}),
                (self.WITH, {"sinks": "remove"}),
                (analysis.without_sinks(self.WITH), {}),
            )
        )
        figures = [getattr(one, "figure", one) for one in (raw, clean, expected)]
        one, two, three = map(self.drawn, figures)
        for left, right in zip(two, three, strict=True):
            np.testing.assert_array_equal(left, right)
        assert any(not np.array_equal(left, right) for left, right in zip(one, two, strict=True))
        titles = [one.get_suptitle() if isinstance(one, Figure) else one.get_title() for one in (raw, clean)]
        assert " ".join(titles[1].split()) == ", ".join(filter(None, (" ".join(titles[0].split()), "sinks removed")))

    def test_windows_and_arrays_of_several_images_are_read_as_without(self):
        windows = np.concatenate([self.WITH[0][:, :, 1:, 1:]] * 4)
        windows /= windows.sum(-1, keepdims=True)
        ax = plot.query(windows, query=(2, 5), grid=(8, 8), window=4, sinks="remove")
        assert "sinks removed" in " ".join(ax.get_title().split())
        with pytest.warns(VisualizerWarning, match="pass batch=0 if that is right"):
            plot.heads(np.concatenate([self.WITH[0]] * 2), sinks="remove")

    @CALLS
    def test_other_words_are_refused(self, name, options):
        with pytest.raises(ValueError, match="sinks='hide': pass 'keep' or 'remove'"):
            getattr(plot, name)(self.WITH, **options, sinks="hide")

    def test_plots_of_other_things_have_no_sinks(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'sinks'"):
            plot.overlay(np.eye(4), sinks="remove")


class TestPadding:
    """What is known to be padding is not drawn, on either side."""

    @pytest.mark.parametrize("parts", [("padding", "text"), ("text", "padding")])
    def test_rows_and_columns_are_left_out(self, parts):
        maps = maps_of(1, 2, 5, 5)
        made = AttentionMap(torch.tensor(maps))
        known = {"padding": Part("padding", 2), "text": Part("text", 3, ("a", "b", "c"))}
        made.layout = made.query_layout = Layout(tuple(known[kind] for kind in parts))
        real = slice(2, 5) if parts[0] == "padding" else slice(0, 3)
        expected = maps[0, 1, real, real]
        ax = plot.tokens(made, head=1)
        np.testing.assert_allclose(expected, ax.images[0].get_array(), rtol=1e-6)
        assert ["a", "b", "c"] == [label.get_text() for label in ax.get_yticklabels()]
        np.testing.assert_allclose(expected, plot.heads(made).axes[1].images[0].get_array(), rtol=1e-6)
        np.testing.assert_allclose(expected, plot.layers([made], head=1).axes[0].images[0].get_array(), rtol=1e-6)
        words = [*"vwxyz"]
        ax = plot.tokens(made, words, head=1)
        assert words[real] == [label.get_text() for label in ax.get_yticklabels()]

    def test_words_that_are_not_known(self):
        with pytest.raises(ValueError, match="tokenizer="):
            plot.tokens(maps_of(3, 3))


def test_a_largest_value_of_zero_is_a_scale_too():
    """As where a script passes the largest of its values, and nothing fires."""
    picture = np.linspace(0, 1, 16 * 16 * 3).reshape(16, 16, 3)
    none, least = (plot.overlay(np.zeros((4, 4)), picture, vmax=top).images[0].get_array() for top in (0.0, 1.0))
    np.testing.assert_array_equal(none, least)

"""Pictures of what was measured: `distance`, `filters`, `positions`, `spikes`, `patterns`; and labels that fit."""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from plots import cell, maps_of, no_figure_left, places_of_text, resampled  # noqa: F401

from visualizer import VisualizerWarning, plot
from visualizer.plot import canvas


def panels_of(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


class TestDistance:
    def test_a_dot_for_each_head_at_its_layer(self):
        distances = np.random.default_rng(0).uniform(10, 90, (12, 6))
        ax = plot.distance(distances)
        dots = ax.collections[0].get_offsets()
        expected = {(layer, float(distances[layer, head])) for layer, head in np.ndindex(12, 6)}
        assert expected == {(int(x), float(np.float64(y))) for x, y in dots}
        assert ("network depth (layer)", "mean attention distance (pixels)") == (ax.get_xlabel(), ax.get_ylabel())
        assert 0 == ax.get_ylim()[0]
        assert all(tick == int(tick) for tick in ax.get_xticks())

    @pytest.mark.parametrize("wrap", [np.asarray, torch.tensor, list])
    def test_several_images_give_their_mean(self, wrap):
        distances = np.random.default_rng(0).uniform(10, 90, (4, 5, 3))
        dots = plot.distance(wrap(distances), unit="patches").collections[0].get_offsets()
        np.testing.assert_allclose(distances.mean(1).ravel(), dots[:, 1], rtol=1e-6)

    def test_heads_without_a_distance_have_no_dot(self):
        distances = np.array([[[1.0, np.nan], [3.0, np.nan]], [[5.0, np.nan], [np.nan, 7.0]]])
        dots = plot.distance(distances).collections[0].get_offsets()
        assert [[0, 2], [1, 5], [1, 7]] == dots.tolist()

    def test_layers_of_different_numbers_of_heads(self):
        dots = plot.distance([np.ones(3), np.ones((2, 6))]).collections[0].get_offsets()
        assert [0] * 3 + [1] * 6 == dots[:, 0].tolist()

    @pytest.mark.parametrize(
        ("distances", "parts"),
        [
            (np.ones(6), ["(6,)", "(layers, heads)"]),
            (np.ones((2, 2, 2, 2)), ["(2, 2, 2, 2)"]),
            (-np.ones((2, 2)), ["from 0", "below"]),
            (np.full((2, 2), np.nan), ["all NaN"]),
            ([], ["none"]),
        ],
    )
    def test_what_is_no_distance_is_refused(self, distances, parts):
        with pytest.raises(ValueError) as caught:
            plot.distance(distances)
        for part in parts:
            assert part in str(caught.value)


class TestFilters:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_each_tile_runs_from_its_own_lowest_value_to_its_highest(self, channels):
        components = (
            np.random.default_rng(0).normal(size=(28, channels, 16, 14)) * np.arange(1, 29)[:, None, None, None]
        )
        ax = plot.filters(components)
        for number in range(28):
            tile = resampled(cell(ax, *divmod(number, 7), 4, 7), 16, 14, margin=1 / 34)
            own = components[number]
            expected = (own - own.min()) / (own.max() - own.min())
            np.testing.assert_allclose(np.moveaxis(np.broadcast_to(expected, (3, 16, 14)), 0, -1), tile, rtol=1e-5)
        assert ax.get_title().startswith("28 filters")

    def test_what_is_left_of_the_last_row_is_empty(self):
        ax = plot.filters(np.random.default_rng(0).normal(size=(5, 3, 4, 4)), columns=3)
        assert (cell(ax, 1, 2, 2, 3) == 1).all()
        assert not list(ax.get_xticks())

    def test_a_flat_filter_is_grey(self):
        assert (np.asarray(plot.filters(np.ones((1, 1, 4, 4))).images[0].get_array()) == 0.5).all()

    @pytest.mark.parametrize(
        ("components", "part"),
        [
            (np.ones((28, 768)), "(28, 768)"),
            (np.ones((28, 4, 2, 2)), "1 or 3 channels"),
            (np.full((1, 3, 2, 2), np.nan), "NaN"),
        ],
    )
    def test_what_is_no_filter_is_refused(self, components, part):
        with pytest.raises(ValueError) as caught:
            plot.filters(components)
        assert part in str(caught.value)


class TestPositions:
    def test_each_tile_has_one_patchs_similarities(self):
        similarity = np.random.default_rng(0).uniform(-1, 1, (3, 5, 3, 5))
        ax = plot.positions(similarity)
        for row, column in np.ndindex(3, 5):
            tile = resampled(cell(ax, row, column, 3, 5), 3, 5)
            np.testing.assert_allclose(similarity[row, column], tile, rtol=1e-6)
        assert ("input patch column", "input patch row") == (ax.get_xlabel(), ax.get_ylabel())
        assert (-1, 1) == ax.images[0].get_clim()
        assert ["0", "1", "2", "3", "4"] == [label.get_text() for label in ax.get_xticklabels()]

    def test_every_third_patch_keeps_its_number(self):
        similarity = np.random.default_rng(0).uniform(-1, 1, (6, 9, 6, 9))
        ax = plot.positions(similarity, every=3)
        assert ["1", "4", "7"] == [label.get_text() for label in ax.get_xticklabels()]
        assert ["1", "4"] == [label.get_text() for label in ax.get_yticklabels()]
        np.testing.assert_allclose(similarity[4, 7], resampled(cell(ax, 1, 2, 2, 3), 6, 9), rtol=1e-6)
        with pytest.raises(ValueError, match="every=7: pass 1 to 6"):
            plot.positions(similarity, every=7)

    def test_a_part_of_the_tiles_has_no_numbers_since_nobody_knows_them(self):
        similarity = np.random.default_rng(0).uniform(-1, 1, (6, 6, 6, 6))
        ax = plot.positions(similarity[2::3, 2::3])
        assert not list(ax.get_xticks()) and not list(ax.get_yticks())
        np.testing.assert_allclose(similarity[5, 2], resampled(cell(ax, 1, 0, 2, 2), 6, 6), rtol=1e-6)

    def test_the_datas_own_scale(self):
        similarity = np.random.default_rng(0).uniform(0.2, 0.9, (3, 3, 3, 3))
        assert (similarity.min(), 1) == plot.positions(similarity, vmin=None).images[0].get_clim()

    def test_rounding_past_one_does_not_point_the_colour_bar(self):
        ax = plot.positions(np.full((2, 2, 2, 2), 1.0000001))
        assert "neither" == next(one for one in ax.figure.axes if one is not ax)._colorbar.extend

    def test_it_draws_where_it_is_told(self):
        figure, (left, right) = plt.subplots(1, 2)
        assert right is plot.positions(np.ones((2, 2, 2, 2)), ax=right, cbar=False)
        assert [left, right] == figure.axes
        assert not left.images

    @pytest.mark.parametrize("shape", [(196, 196), (14, 14, 196), (3, 4, 4, 3)])
    def test_what_is_no_grid_of_grids_is_refused(self, shape):
        with pytest.raises(ValueError, match="position_similarity"):
            plot.positions(np.ones(shape))


class TestSpikes:
    def test_a_map_for_each_block_on_one_scale_with_its_mean(self):
        rates = np.random.default_rng(0).uniform(0, 0.6, (8, 4, 6))
        for given, grid in ((rates, None), (rates.reshape(8, 24), (4, 6)), (list(torch.tensor(rates)), None)):
            figure = plot.spikes(given, grid=grid)
            panels = panels_of(figure)
            assert [f"block {n}\nmean {rates[n].mean():.2f}" for n in range(8)] == [ax.get_title() for ax in panels]
            for ax, block in zip(panels, rates, strict=True):
                np.testing.assert_allclose(block, ax.images[0].get_array(), rtol=1e-6)
            assert 1 == len({ax.images[0].get_clim() for ax in panels})
            assert (0, rates.max()) == pytest.approx(panels[0].images[0].get_clim())
            assert "firing rate" == figure.axes[-1].get_ylabel()

    def test_before_and_after_are_two_rows_on_one_scale(self):
        before = np.random.default_rng(0).uniform(0, 0.6, (10, 16))
        figure = plot.spikes({"V before": before, "V after": before / 4}, title="SDSA")
        panels = panels_of(figure)
        assert ["V before", "V after"] == [panels[0].get_ylabel(), panels[10].get_ylabel()]
        np.testing.assert_allclose(before[3].reshape(4, 4) / 4, panels[13].images[0].get_array(), rtol=1e-6)
        assert 1 == len({ax.images[0].get_clim() for ax in panels})
        tops = [round(ax.get_position().y0, 3) for ax in panels]
        assert [1, 1] == [len(set(tops[:10])), len(set(tops[10:]))]
        assert "SDSA" == figure._suptitle.get_text()
        narrow = panels_of(plot.spikes({"V before": before, "V after": before / 4}, columns=6))
        assert [f"mean {before[9].mean() / 4:.2f}", ""] == [ax.get_title() for ax in narrow[21:23]]
        np.testing.assert_allclose(before[6].reshape(4, 4) / 4, narrow[18].images[0].get_array(), rtol=1e-6)

    def test_blocks_of_different_grids(self):
        panels = panels_of(plot.spikes([np.full((8, 8), 0.5), np.full(16, 0.25)]))
        assert [(8, 8), (4, 4)] == [ax.images[0].get_array().shape for ax in panels]

    def test_silence_has_a_scale_too(self):
        assert (0, 1) == panels_of(plot.spikes(np.zeros((2, 4))))[0].images[0].get_clim()

    @pytest.mark.parametrize(
        ("rates", "options", "parts"),
        [
            (np.full((2, 4), 1.5), {}, ["1.5", "0 to 1", "analysis.spike_rate"]),
            (np.full((2, 4), -0.5), {}, ["-0.5"]),
            (np.full((2, 4), np.nan), {}, ["nan"]),
            (np.ones(4), {}, ["shape ()", "block 0"]),
            (np.ones((2, 1, 4, 4)), {}, ["(1, 4, 4)", "(rows, columns)"]),
            (np.ones((2, 12)), {}, ["12", "grid="]),
            (np.ones((2, 3, 4)), {"grid": (4, 3)}, ["(3, 4)", "(4, 3)"]),
            ({"a": np.ones((2, 4)), "b": np.ones((3, 4))}, {}, ["'a': 2", "'b': 3"]),
            (np.ones((2, 4)), {"columns": 1.5}, ["columns=1.5", "a whole number"]),
            ([], {}, ["no blocks"]),
        ],
    )
    def test_what_is_no_rate_is_refused(self, rates, options, parts):
        with pytest.raises(ValueError) as caught:
            plot.spikes(rates, **options)
        for part in parts:
            assert part in str(caught.value)


class TestPatterns:
    labels = np.array([["previous", "broad", "mixed"], ["special", "previous", "induction"]])

    def test_a_colour_for_each_label_which_the_legend_names(self):
        ax = plot.patterns(SimpleNamespace(labels=self.labels, scores={}))
        handles = dict(
            zip([t.get_text() for t in ax.get_legend().get_texts()], ax.get_legend().get_patches(), strict=True)
        )
        assert ["previous (2)", "special (1)", "induction (1)", "broad (1)", "mixed (1)"] == list(handles)
        colours = {name.split()[0]: to_hex(patch.get_facecolor()) for name, patch in handles.items()}
        assert 5 == len(set(colours.values()))
        shown = np.asarray(ax.images[0].get_array())
        for place in np.ndindex(2, 3):
            assert colours[self.labels[place]] == to_hex(shown[place])

    def test_a_label_has_one_colour_in_every_picture(self):
        both = [plot.patterns(labels).images[0].get_array()[0][0] for labels in ([["next"]], [["next", "broad"]])]
        np.testing.assert_array_equal(*both)

    def test_labels_are_written_in_their_cells_and_can_be_read(self):
        ax = plot.patterns(self.labels)
        ax.figure.canvas.draw()
        assert {(0, 0): "previous", (1, 0): "broad", (2, 0): "mixed"} == {
            text.get_position(): text.get_text() for text in ax.texts if text.get_position()[1] == 0
        }
        for text in ax.texts:
            box = text.get_window_extent()
            column, row = text.get_position()
            corners = [(column - 0.5, row - 0.5), (column + 0.5, row + 0.5)]
            (left, top), (right, bottom) = ax.transData.transform(corners)
            assert left < box.x0 and box.x1 < right and bottom < box.y0 and box.y1 < top
            ground = np.asarray(ax.images[0].get_array())[row, column]
            assert abs(np.dot(np.subtract(to_rgb(text.get_color()), ground), [0.299, 0.587, 0.114])) > 0.35

    def test_where_there_is_no_room_the_legend_alone_says_it(self):
        _, ax = plt.subplots(figsize=(3, 2))
        plot.patterns(np.tile(self.labels, (8, 8)), ax=ax)
        assert not any(text.get_visible() for text in ax.texts)
        assert 5 == len(ax.get_legend().get_texts())

    def test_the_heads_of_a_model(self):
        from visualizer.analysis import head_patterns

        before = np.eye(8, k=-1)
        before[0, 0] = 1
        found = head_patterns(np.stack([before, np.full((8, 8), 1 / 8)])[None, None])
        assert ["previous (1)", "broad (1)"] == [
            text.get_text() for text in plot.patterns(found).get_legend().get_texts()
        ]

    @pytest.mark.parametrize(
        ("labels", "part"),
        [
            (["previous"], "(1,)"),
            (np.ones((2, 2)), "float64"),
            ([[f"label {number}" for number in range(9)]], "more than can be told apart"),
        ],
    )
    def test_what_is_no_table_of_labels_is_refused(self, labels, part):
        with pytest.raises(ValueError) as caught:
            plot.patterns(labels)
        assert part in str(caught.value)


class TestLabels:
    """However long a text and however small the axes, labels do not overlap."""

    @pytest.mark.parametrize("count", [12, 60, 200])
    @pytest.mark.parametrize("layout", ["constrained", None])
    def test_in_a_small_panel_among_others(self, count, layout):
        _, axes = plt.subplots(1, 3, figsize=(12, 4), layout=layout)
        words = [f"word{number}" for number in range(count)]
        for ax in axes:
            plot.tokens(maps_of(count, count), words, ax=ax)
        (across, down), _ = places_of_text(axes[1])
        assert len(across) > 3 < len(down)
        assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(across))
        assert all(below.y0 >= above.y1 - 1 for below, above in itertools.pairwise(down))

    @pytest.mark.parametrize("layout", ["constrained", "compressed"])
    def test_long_words_at_the_bottom_take_room_from_those_at_the_side(self, layout):
        _, ax = plt.subplots(figsize=(5, 4), layout=layout)
        plot.tokens(maps_of(60, 60), [f"a_word_of_thirty_characters_{number:02}" for number in range(60)], ax=ax)
        (across, down), _ = places_of_text(ax)
        assert len(across) > 3 < len(down)
        assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(across))
        assert all(below.y0 >= above.y1 - 1 for below, above in itertools.pairwise(down))

    def test_many_keys_for_few_queries(self):
        words = [f"w{number}" for number in range(150)]
        ax = plot.tokens(maps_of(3, 150), ["a", "b", "c"], key_tokens=words)
        (across, down), _ = places_of_text(ax)
        assert all(left.x1 <= right.x0 + 1 for left, right in itertools.pairwise(across))
        assert all(below.y0 >= above.y1 - 1 for below, above in itertools.pairwise(down))

    @pytest.mark.filterwarnings("ignore:no installed font has")
    @pytest.mark.filterwarnings("ignore:Matplotlib currently does not support:UserWarning")
    def test_words_of_any_script(self):
        words = ["猫", "坐在", "שלום", "مرحبا", "नमस्ते", "🐈", "$x^"]
        ax = plot.tokens(maps_of(7, 7), words)
        ax.figure.canvas.draw()
        shown = [label.get_text() for label in ax.get_yticklabels()]
        assert ["שלום", "مرحبا", "$x^"] == [shown[2], shown[3], shown[6]], (
            "DejaVu Sans, which matplotlib brings, has these"
        )
        assert all(set(one) <= {*word, "□"} and len(one) == len(word) for one, word in zip(shown, words, strict=True))

    def test_any_installed_font_that_has_the_letters_is_taken(self, monkeypatch):
        monkeypatch.setattr(canvas, "_more_fonts", [])
        monkeypatch.setattr(canvas, "_letters", lambda: frozenset(range(0x80)))
        ax = plot.tokens(maps_of(2, 2), ["é", "a"])
        ax.figure.canvas.draw()
        [family] = canvas._more_fonts
        for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
            assert family in label.get_fontfamily()
        assert ["é", "a"] == [label.get_text() for label in ax.get_yticklabels()]

    @pytest.mark.filterwarnings("ignore:no installed font has")
    def test_chinese_and_japanese_stand_upright_below_the_matrix(self):
        ax = plot.tokens(maps_of(6, 6), ["[CLS]", "垫子", "トマト", "GPT模型", "。", "猫₁"])
        ax.figure.canvas.draw()
        labels = ax.get_xticklabels()
        assert [90, 0, 0, 90, 0, 0] == [label.get_rotation() for label in labels]
        assert [1, 2, 3, 1, 1, 1] == [len(label.get_text().split("\n")) for label in labels]
        assert {0} == {label.get_rotation() for label in ax.get_yticklabels()}

    def test_a_long_word_leaves_room_for_the_matrix(self):
        ax = plot.tokens(maps_of(3, 3), ["a" * 60, "b", "c"])
        ax.figure.canvas.draw()
        assert ax.get_yticklabels()[0].get_text() == "a" * 23 + "…"
        assert ax.get_window_extent().width > 0.3 * ax.figure.bbox.width

    def test_a_missing_font_is_one_warning_that_names_one(self, tmp_path, monkeypatch):
        from matplotlib import get_data_path
        from matplotlib.font_manager import fontManager

        # Those that matplotlib brings: one of them, Last Resort, has boxes in place of letters.
        brought = [font for font in fontManager.ttflist if font.fname.startswith(get_data_path())]
        monkeypatch.setattr(fontManager, "ttflist", brought)
        monkeypatch.setattr(canvas, "_fonts_by_letter", functools.cache(canvas._fonts_by_letter.__wrapped__))
        monkeypatch.setattr(canvas, "_letters", lambda: frozenset(range(0x250)))
        monkeypatch.setattr(canvas, "_warned_of", set())
        with pytest.warns(VisualizerWarning, match="has 猫, .*Noto Sans CJK") as caught:
            ax = plot.tokens(maps_of(3, 3), ["猫", "a", "好"], title="猫")
            ax.figure.savefig(tmp_path / "cat.png")
        assert 1 == len(caught)
        assert ["□", "a", "□"] == [label.get_text() for label in ax.get_yticklabels()]


class TestEverythingStaysOnTheFigure:
    """Nothing that is drawn is cut off at the figure's edge, however often it is drawn."""

    @pytest.mark.parametrize(
        "draw",
        [
            pytest.param(lambda: plot.tokens(maps_of(40, 40), [f"word{n}" for n in range(40)]).figure, id="tokens"),
            pytest.param(lambda: plot.head(maps_of(50, 50)).figure, id="head"),
            pytest.param(lambda: plot.heads(maps_of(12, 50, 50), layer=0), id="heads"),
            pytest.param(lambda: plot.layers(maps_of(12, 1, 12, 9, 9), title="title"), id="canvas"),
            pytest.param(lambda: plot.layers(maps_of(12, 1, 2, 9, 9), head=0), id="strip of matrices"),
            pytest.param(lambda: plot.layers(maps_of(5, 1, 2, 10, 10), head=0, query=0, share=False), id="strip"),
            pytest.param(
                lambda: plot.rollout(maps_of(3, 1, 2, 65, 65), np.zeros((20, 80, 3)), grid=(4, 16)), id="rollout"
            ),
            pytest.param(lambda: plot.positions(np.ones((4, 9, 4, 9))).figure, id="positions"),
            pytest.param(lambda: plot.spikes({"before": np.ones((8, 16)), "after": np.ones((8, 16))}), id="spikes"),
            pytest.param(lambda: plot.patterns([["previous"] * 12] * 12).figure, id="patterns"),
            pytest.param(lambda: plot.distance(np.ones((12, 12))).figure, id="distance"),
            pytest.param(lambda: plot.filters(np.random.default_rng(0).random((28, 3, 8, 8))).figure, id="filters"),
        ],
    )
    @pytest.mark.slow
    def test_labels_titles_and_legends(self, draw):
        figure = draw()
        for _ in range(3):
            figure.canvas.draw()
            box, (wide, high) = figure.get_tightbbox(figure.canvas.get_renderer()), figure.get_size_inches()
            assert min(box.x0, box.y0, wide - box.x1, high - box.y1) > 0
            assert max(box.x0, box.y0, wide - box.x1, high - box.y1) < 0.8, "nor is it half empty"

"""`plot.layers`, and what of the maps is computed for a picture: as little as it shows."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from plots import cell, frames, hot, maps_of, marked, no_figure_left, places_of_text, resampled  # noqa: F401

from visualizer import AttentionMap, VisualizerWarning, attention, capture, plot


def panels_of(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def bars_of(figure):
    return [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]


class TestCanvas:
    def test_one_image_holds_every_map_at_its_layer_and_head(self):
        maps = maps_of(4, 2, 3, 40, 40)
        figure = plot.layers(maps, batch=1)
        assert isinstance(figure, Figure)
        [ax] = panels_of(figure)
        assert 1 == len(ax.images)
        for layer, head in itertools.product(range(4), range(3)):
            drawn = resampled(cell(ax, layer, head, 4, 3), 40, 40, margin=1 / 42)
            np.testing.assert_allclose(maps[layer, 1, head], drawn, rtol=1e-6)
        assert ("head", "layer") == (ax.get_xlabel(), ax.get_ylabel())
        assert ["0", "1", "2"] == [label.get_text() for label in ax.get_xticklabels()]
        assert ["0", "1", "2", "3"] == [label.get_text() for label in ax.get_yticklabels()]
        assert ax.yaxis_inverted(), "layer 0 is on top"

    def test_ticks_stand_at_the_middles_of_their_cells(self):
        [ax] = panels_of(plot.layers(maps_of(4, 1, 3, 8, 8)))
        assert [0, 1, 2] == list(ax.get_xticks())
        assert [0, 1, 2, 3] == list(ax.get_yticks())
        assert (-0.5, 2.5, 3.5, -0.5) == tuple(ax.images[0].get_extent())

    def test_gaps_are_thin_and_white(self):
        [ax] = panels_of(plot.layers(maps_of(2, 1, 3, 5, 5)))
        [gaps] = [one for one in ax.collections if isinstance(one, PolyCollection)]
        assert (1, 1, 1, 1) == tuple(gaps.get_facecolor()[0])
        widths = [min(np.ptp(path.vertices, axis=0)) for path in gaps.get_paths()]
        assert 4 + 3 == len(widths), "round and between 3 columns and 2 rows"
        assert all(0 < width < 0.08 for width in widths)

    def test_a_sink_at_the_edge_of_a_cell_is_seen_however_small_the_canvas(self):
        maps = np.full((6, 1, 12, 197, 197), 0.4 / 196)
        maps[..., 0] = 0.6
        figure = plot.layers(maps, cbar=False)
        figure.set_dpi(40)
        figure.canvas.draw()
        [ax] = panels_of(figure)
        drawn = np.asarray(figure.canvas.buffer_rgba()).astype(int)[..., :3]
        middle = figure.canvas.get_width_height()[1] - int(ax.transData.transform((0, 2))[1])
        for head in range(12):
            left, right = (int(ax.transData.transform((head + side, 2))[0]) for side in (-0.5, 0.0))
            row = drawn[middle, left:right]
            # of viridis' upper half; neither white, nor the purple of zero, nor what lies between these two
            is_bright = (row[:, 1] > 120) & (row[:, 1] - row[:, ::2].min(-1) > 60)
            assert is_bright.any(), f"the first column of head {head}"

    def test_a_large_map_is_shrunk_to_the_means_of_what_each_pixel_covers(self):
        maps = maps_of(1, 2, 600, 600)
        [ax] = panels_of(plot.layers(maps))
        first = cell(ax, 0, 0, 1, 2)
        assert first.shape[0] < 300
        margin = (first.shape[0] - 256) // 2
        inner = first[margin : margin + 256, margin : margin + 256]
        np.testing.assert_allclose(maps[0, 0].mean(), inner.mean(), rtol=1e-5)
        # 600 / 256 = 75 / 32: 32 pixels cover 75 tokens exactly
        np.testing.assert_allclose(maps[0, 0, :75, 75:150].mean(), inner[:32, 32:64].mean(), rtol=1e-5)

    def test_a_query_shows_its_row_over_the_grid(self):
        maps = maps_of(3, 1, 2, 17, 17)
        for query, row in ((0, 0), (7, 7), ((1, 2), 7)):
            [ax] = panels_of(plot.layers(maps, query=query))
            for layer, head in itertools.product(range(3), range(2)):
                drawn = resampled(cell(ax, layer, head, 3, 2), 4, 4)
                np.testing.assert_allclose(maps[layer, 0, head, row, 1:].reshape(4, 4), drawn, rtol=1e-6)

    def test_a_scale_of_its_own_for_each(self):
        maps = maps_of(2, 1, 2, 64, 64)
        maps[1] = np.eye(64)
        figure = plot.layers(maps, share=False, query=5, prefix_tokens=0)
        [ax] = panels_of(figure)
        tops = [cell(ax, layer, head, 2, 2).max() for layer, head in itertools.product(range(2), range(2))]
        np.testing.assert_allclose([1, 1, 1, 1], tops, rtol=1e-6)
        assert (0, 1) == ax.images[0].get_clim()
        assert "own scale" in bars_of(figure)[0].get_ylabel()

    def test_one_patch_does_not_leave_all_others_dark(self):
        maps = np.full((4, 1, 4, 65, 65), 1 / 65)
        maps[0, 0, 0] = np.eye(65)[1]
        figure = plot.layers(maps, query=0)
        [ax] = panels_of(figure)
        assert ax.images[0].get_clim()[1] == pytest.approx(4 / 65)
        assert "max" == bars_of(figure)[0]._colorbar.extend

    def test_over_the_picture(self):
        maps = np.concatenate([hot(0, 3), hot(2, 1)])[:, None]
        image = np.full((56, 56, 3), 200, np.uint8)
        [ax] = panels_of(plot.layers(maps, image, query=0))
        for layer, place in enumerate([(0, 3), (2, 1)]):
            brightness = resampled(cell(ax, layer, 0, 2, 1), 4, 4).sum(-1)
            assert place == np.unravel_index(brightness.argmin(), (4, 4))

    def test_an_oblong_picture_stays_oblong(self):
        [ax] = panels_of(plot.layers(maps_of(2, 1, 2, 25, 25), np.ones((200, 300, 3)), query=0, grid=(4, 6)))
        ax.figure.canvas.draw()
        box = ax.get_window_extent()
        assert 1.5 == pytest.approx(box.width / box.height, rel=0.05)

    @pytest.mark.parametrize(("layers", "heads"), [(1, 1), (32, 32), (48, 4)])
    def test_labels_do_not_overlap_and_stay_on_the_figure(self, layers, heads):
        [ax] = panels_of(plot.layers(maps_of(layers, 1, heads, 4, 4), title="a title"))
        (across, down), figure = places_of_text(ax)
        assert across and down
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(across))
        assert all(below.y0 > above.y1 for below, above in itertools.pairwise(down))
        name = ax.yaxis.label.get_window_extent()
        assert all(figure.x0 <= box.x0 and figure.y0 <= box.y0 for box in (*across, *down, name))


class TestStrip:
    def test_a_panel_for_each_layer_with_the_class_tokens_weights(self):
        maps = maps_of(12, 1, 3, 17, 17)
        figure = plot.layers(maps, query=0, head="mean")
        panels = panels_of(figure)
        assert [f"layer {number}" for number in range(12)] == [ax.get_title() for ax in panels]
        for layer, ax in enumerate(panels):
            np.testing.assert_allclose(maps[layer, 0, :, 0, 1:].mean(0).reshape(4, 4), ax.images[0].get_array())
        assert 1 == len({ax.images[0].get_clim() for ax in panels})
        assert 1 == len(bars_of(figure))
        assert "query: CLS, mean of 3 heads" == figure._suptitle.get_text()

    @pytest.mark.parametrize(
        ("count", "columns", "expected"),
        [(12, None, 6), (6, None, 6), (24, None, 6), (7, None, 7), (11, None, 6), (12, 12, 12)],
    )
    def test_rows_of_equal_length(self, count, columns, expected):
        figure = plot.layers(maps_of(count, 1, 1, 16, 16), query=0, head=0, columns=columns)
        assert expected == len({round(ax.get_position().x0, 3) for ax in panels_of(figure) if ax.images})

    def test_whole_matrices_where_no_query_is_given(self):
        maps = maps_of(3, 1, 2, 6, 6)
        panels = panels_of(plot.layers(maps, head=1))
        for layer, ax in enumerate(panels):
            np.testing.assert_allclose(maps[layer, 0, 1], ax.images[0].get_array())
        assert ["query", "", ""] == [ax.get_ylabel() for ax in panels]

    def test_over_the_picture_with_the_query_in_a_frame(self):
        maps = np.concatenate([hot(0, 3, grid=(4, 6))] * 2)[:, None]
        figure = plot.layers(maps, np.full((56, 84, 3), 0.8), query=(2, 1), head=0)
        for ax in panels_of(figure):
            assert {(14.0, 28.0, 14.0, 14.0)} == {(*f.get_xy(), f.get_width(), f.get_height()) for f in frames(ax)}
            assert [(0, 3)] == marked(ax, 4, 6)

    def test_a_scale_of_its_own_for_each(self):
        maps = maps_of(3, 1, 1, 17, 17)
        figure = plot.layers(maps, query=0, head=0, share=False)
        tops = [ax.images[0].get_clim()[1] for ax in panels_of(figure)]
        np.testing.assert_allclose([max(maps[layer, 0, 0, 0, 1:].max(), 4 / 17) for layer in range(3)], tops)
        assert [f"layer {number}\nto {top:.2g}" for number, top in enumerate(tops)] == [
            ax.get_title() for ax in panels_of(figure)
        ]
        [bar] = bars_of(figure)
        assert (0, 1) == bar.get_ylim()

    def test_titles_do_not_touch_one_another(self):
        figure = plot.layers(maps_of(12, 1, 1, 16, 16), query=3, head=0)
        figure.canvas.draw()
        lowest = figure._suptitle.get_window_extent().y0
        assert all(ax.title.get_window_extent().y1 <= lowest for ax in panels_of(figure))


class TestWhatIsComputed:
    """Of an AttentionMap only the layer, or the row, that a picture shows."""

    @pytest.fixture
    def layers(self, monkeypatch):
        torch.manual_seed(0)
        maps = [AttentionMap.from_query_key(*torch.randn(2, 1, 3, 17, 8), path=f"layer {n}") for n in range(4)]
        self.asked = []
        for name in ("dense", "rows"):
            plain = getattr(AttentionMap, name)

            def counted(one, *arguments, plain=plain, name=name):
                self.asked.append((name, one.path))
                return plain(one, *arguments)

            monkeypatch.setattr(AttentionMap, name, counted)
        return maps

    def test_a_head_takes_one_layer(self, layers):
        ax = plot.head(layers, layer=2, head=1)
        assert {"layer 2"} == {path for _, path in self.asked}
        np.testing.assert_allclose(layers[2].numpy()[0, 1], ax.images[0].get_array(), rtol=1e-6)

    def test_a_query_takes_one_row_of_one_layer(self, layers):
        drawn = plot.query(layers, query=(1, 1)).images[0].get_array()
        assert [("rows", "layer 3")] == self.asked
        np.testing.assert_allclose(layers[3].numpy()[0, :, 6, 1:].mean(0).reshape(4, 4), drawn, rtol=1e-5)

    def test_a_strip_takes_one_row_of_each(self, layers):
        plot.layers(layers, query=0, head="mean")
        assert [("rows", f"layer {number}") for number in range(4)] == self.asked

    def test_a_rollout_makes_no_map(self, layers):
        plot.rollout(layers)
        assert "dense" not in {name for name, _ in self.asked}

    def test_what_attention_found_is_taken_one_by_one_too(self, layers):
        model = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True), num_layers=3
        ).eval()
        with attention(model) as maps, torch.no_grad():
            model(torch.randn(1, 5, 16))
        plot.head(maps, layer=1, head=0)
        assert {"layers.1.self_attn"} == {path for _, path in self.asked}

    def test_what_attention_and_capture_found_and_one_map_alone(self):
        model = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True), num_layers=2
        ).eval()
        with attention(model) as maps, torch.no_grad():
            model(torch.randn(1, 5, 16))
        expected = maps[1].numpy()[0, 1]
        for given in (maps, list(maps), {"a": [maps[0]], "b": [maps[1]]}):
            np.testing.assert_allclose(expected, plot.head(given, layer=1, head=1).images[0].get_array())
        np.testing.assert_allclose(expected, plot.head(maps[1], head=1).images[0].get_array())

        class Attention(torch.nn.Module):
            def forward(self, x):
                attn = (x @ x.mT).softmax(-1)
                return attn @ x

        model = torch.nn.Sequential(Attention(), Attention())
        with capture(model, "attn") as found:
            model(torch.randn(1, 2, 5, 4))
        np.testing.assert_allclose(found["1"][0][0, 1], plot.head(found, layer=1, head=1).images[0].get_array())

    def test_an_empty_find_says_so(self):
        with pytest.raises(ValueError, match="a Maps without entries"):
            plot.layers(attention(torch.nn.Linear(2, 2)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "error", "parts"),
        [
            (lambda: plot.layers(maps_of(2, 1, 2, 17, 17), np.ones((56, 56, 3))), ValueError, ["query=0", "class"]),
            (
                lambda: plot.layers([maps_of(1, 2, 9, 9), maps_of(1, 2, 4, 4)]),
                ValueError,
                ["one shape", "(2, 9, 9), (2, 4, 4)"],
            ),
            (lambda: plot.layers(maps_of(2, 1, 2, 17, 17), query=17), IndexError, ["17", "0 to 16"]),
            (lambda: plot.layers(maps_of(2, 1, 2, 17, 17), head=2), IndexError, ["head=2", "0 to 1"]),
            (lambda: plot.layers(maps_of(2, 1, 2, 17, 17), head=0, columns=0), ValueError, ["columns=0"]),
            (lambda: plot.layers(maps_of(2, 1, 2, 17, 17), style="jet"), ValueError, ["'jet'"]),
            (lambda: plot.layers(()), ValueError, ["tuple without entries", 'attn_implementation="eager"']),
        ],
    )
    def test_each_says_what_would_do(self, call, error, parts):
        with pytest.raises(error) as caught:
            call()
        for part in parts:
            assert part in str(caught.value)

    def test_doubts_about_many_layers_are_one_warning(self):
        with pytest.warns(VisualizerWarning) as caught:
            plot.layers(0.5 * maps_of(3, 1, 2, 4, 4))
        assert 1 == len(caught)
        assert "24 of 24 rows do not sum to 1" in str(caught[0].message)
        assert __file__ == caught[0].filename

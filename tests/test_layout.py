"""`Layout`: what tokens are and where they lie."""

import numpy as np
import pytest

from visualizer import VisualizerWarning
from visualizer.layout import Layout, Part, Windows, layout_of


class TestLayout:
    def test_names_and_places(self):
        layout = Layout.picture((2, 3), ["CLS", "REG1", "REG2", "REG3"], patch_size=14)
        assert "<Layout: CLS, 3 registers, 2 x 3 patches of 14 pixels>" == repr(layout)
        assert ("CLS", "REG1", "REG2", "REG3", "patch (0, 0)", "patch (0, 1)") == layout.names[:6]
        assert [None, (0, 0), (1, 2), None] == [layout.place(token) for token in (3, 4, 9, 10)]
        assert [4, 9, 0, 9] == [layout.token(query) for query in ((0, 0), (-1, -1), "CLS", -1)]

    def test_a_text_with_padding(self):
        text = Layout((Part("padding", 2), *Layout.text(["[CLS]", "Ġcat", "[SEP]"], special=[0, 2]).parts))
        assert ("[PAD]", "[PAD]", "[CLS]", "␣cat", "[SEP]") == text.names
        assert [False, False, False, True, False] == text.are("text").tolist()
        assert 3 == text.token("cat")

    @pytest.mark.parametrize(
        ("query", "error", "parts"),
        [
            ((2, 0), IndexError, ["(2, 0)", "2 rows", "3 columns"]),
            ((1, 1, 1), ValueError, ["3 numbers", "(row, column)"]),
            (7, IndexError, ["7", "0 to 6"]),
            ("dog", ValueError, ["'dog'", "'CLS'"]),
            (1.5, TypeError, ["1.5"]),
        ],
    )
    def test_there_is_no_such_token(self, query, error, parts):
        with pytest.raises(error) as caught:
            Layout.picture((2, 3), ["CLS"]).token(query)
        for part in parts:
            assert part in str(caught.value)

    def test_frames_stand_side_by_side(self):
        layout = Layout.picture((5, 2, 3))
        assert (1, 1, 2) == layout.place(11)
        assert 11 == layout.token((1, 1, 2))
        assert (4, 9) == layout.sheet.shape
        [[row, column]] = np.argwhere(layout.sheet == 11)
        assert (1, 5) == (row, column)
        assert 6 == (layout.sheet == -1).sum(), "the sixth place is empty"
        spread = layout.spread(np.arange(30.0))
        assert 11 == spread[1, 5] and np.isnan(spread[2:, 6:]).all()

    def test_a_video_has_the_frame_of_each_patch_behind_it(self):
        video = np.arange(8.0)[:, None, None, None] / 8 * np.ones((8, 20, 30, 3))
        behind = Layout.picture((4, 2, 3)).on(video)
        assert (20, 120, 3) == behind.shape
        assert [1, 3, 5, 7] == [8 * behind[0, 30 * frame, 0] for frame in range(4)]
        with pytest.raises(ValueError, match="8 frames"):
            Layout.picture((2, 3)).on(video)

    def test_patches_cover_what_the_convolution_reaches(self):
        part = Part("patches", 900, (), (30, 30), (14.0, 14.0), (427, 427))
        assert (420, 420, 3) == Layout((part,)).on(np.zeros((427, 427, 3))).shape
        padded = Part("patches", 961, (), (31, 31), (14.0, 14.0), (427, 427))
        assert (434, 434, 3) == Layout((padded,)).on(np.zeros((427, 427, 3))).shape

    @pytest.mark.parametrize(
        "layout",
        [
            Layout.picture((2, 3), ["CLS"], patch_size=16, image_size=(32, 48)),
            Layout(Layout.picture((4, 4)).parts, Windows((2, 2), (1, 1), pads_first=False)),
            Layout.batch([Layout.text(["a", "Ġ猫"]), Layout((Part("padding", 1), Part("text", 1)))]),
        ],
    )
    def test_plain_data_and_back(self, layout):
        assert layout == Layout.unpacked(layout.packed())

    def test_patches_in_another_order(self):
        layout = Layout.picture((2, 4), windows=Windows((2, 4), order=(0, 1, 4, 5, 2, 3, 6, 7)))
        assert ("patch (1, 0)", (1, 0), 2) == (layout.name(2), layout.place(2), layout.token((1, 0)))
        assert [[0, 1, 4, 5], [2, 3, 6, 7]] == layout.sheet.tolist()
        assert [*layout.windows.order] == [*layout.windows.places(2, 4)[0]]

    def test_windows_of_a_grid_that_they_do_not_fill(self):
        """Models differ in what comes first: here the patches of the corner window, as a picture of numbers shows."""
        first, last = (Windows((2, 2), (1, 1), pads_first=pads).places(3, 3) for pads in (True, False))
        np.testing.assert_array_equal([[4, 5, 7, 8], [-1, 3, -1, 6], [-1, -1, 1, 2], [-1, -1, -1, 0]], first)
        np.testing.assert_array_equal([[4, 5, 7, 8], [3, -1, 6, -1], [1, 2, -1, -1], [0, -1, -1, -1]], last)


class TestWhichLayout:
    def test_a_wide_picture_has_wide_patches(self):
        """144 patches of a 16:9 picture were once drawn as 12 x 12."""
        for prefix in (0, 1):
            layout = layout_of(144 + prefix, {}, np.zeros((720, 1280, 3)))
            assert (9, 16) == layout.patches.shape
            assert prefix == layout.first_patch
        assert (12, 12) == layout_of(145, {}).patches.shape

    @pytest.mark.parametrize(
        ("count", "options", "picture", "parts"),
        [
            (197, {"grid": (8, 17)}, None, ["leaves 61 of 197", "prefix_tokens=61", "(14, 14) with prefix_tokens=1"]),
            (261, {}, None, ["261", "grid=(rows, columns)", "(16, 16) with prefix_tokens=5"]),
            (197, {}, (427, 640), ["427 x 640", "as the model saw it", "(14, 14) with prefix_tokens=1"]),
            (12, {"grid": (4, 4)}, None, ["4 x 4 = 16", "12 tokens", "(3, 4) with prefix_tokens=0"]),
            (12, {"layout": Layout.picture((4, 4))}, None, ["16 tokens", "12"]),
            (16, {"layout": Layout.picture((4, 4)), "grid": (4, 4)}, None, ["layout=", "grid="]),
        ],
    )
    def test_what_does_not_fit_lists_what_would(self, count, options, picture, parts):
        with pytest.raises(ValueError) as caught:
            layout_of(count, options, None if picture is None else np.zeros((*picture, 3)))
        for part in parts:
            assert part in str(caught.value)

    def test_what_is_known_wins_over_a_square(self):
        known = Layout.picture((2, 8), ["CLS"])
        assert known is layout_of(17, {}, None, known)
        assert (4, 4) == layout_of(16, {}, None, known).patches.shape, "a layout of other tokens is none"
        assert "A" == layout_of(17, {"prefix_tokens": ["A"]}, None, known).name(0)
        with pytest.raises(ValueError, match="the model made 2 x 8"):
            layout_of(17, {"grid": (8, 2)}, None, known)
        assert (8, 2) == layout_of(17, {"layout": Layout.picture((8, 2), 1)}, None, known).patches.shape

    def test_words_and_several_pictures_are_no_picture(self):
        with pytest.raises(ValueError, match="no patches of a picture: 16 tokens"):
            layout_of(16, {}, None, Layout.text(16))
        assert (4, 4) == layout_of(16, {"grid": (4, 4)}, None, Layout.text(16)).patches.shape
        two = Layout((*Layout.picture((2, 2)).parts, Part("text", 1), *Layout.picture((3, 3)).parts))
        with pytest.raises(ValueError, match=r"2 pictures.*only\(0\)"):
            layout_of(14, {}, None, two)
        second = layout_of(14, {"layout": two.only(1)})
        np.testing.assert_array_equal(5 + np.arange(9).reshape(3, 3), second.sheet)

    def test_a_turned_grid_is_refused(self):
        layout = layout_of(150, {"grid": (15, 10)}, np.zeros((100, 150, 3)))
        with pytest.raises(ValueError, match=r"turned.*grid=\(10, 15\)"):
            layout.on(np.zeros((100, 150, 3)))

    def test_a_picture_of_other_proportions_is_told(self):
        known = Layout.picture((14, 14), ["CLS"], patch_size=16, image_size=224)
        with pytest.warns(VisualizerWarning, match=r"427 x 640.*the model saw 224 x 224"):
            known.on(np.zeros((427, 640, 3)))
        known.on(np.zeros((500, 510, 3)))  # near enough


@pytest.mark.parametrize("parts", ["CLS", ("CLS",), (3, 4)])
def test_a_layout_is_made_of_parts(parts):
    with pytest.raises(TypeError, match=r"pass Parts, or use Layout\.picture"):
        Layout(parts)


FOUR = Layout.picture((4, 4)).parts


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Windows((0, 0)), ["size=(0, 0)", "at least 1"]),
        (lambda: Windows((-1, 2)), ["size=(-1, 2)", "at least 1"]),
        (lambda: Windows((2, 2), (1,)), ["shift=(1,)", "(rows, columns)"]),
        (lambda: Windows((2, 2), (0.5, 0)), ["shift=(0.5, 0)", "whole numbers"]),
        (lambda: Windows((2, 2), order=(0, 1, 2)), ["3 numbers", "0 to 3", "2 x 2"]),
        (lambda: Windows((2, 2), order=(0, 1, 2, 2)), ["0 to 3", "once"]),
        (lambda: Layout(FOUR, Windows((2, 2), order=(0, 2, 1, 3))), ["covers the whole grid", "4 x 4"]),
        (lambda: Layout(FOUR, Windows((3, 3), is_spread=True)), ["spread windows divide it", "4 x 4"]),
        (lambda: Layout.picture((2, 4, 4), windows=Windows((2, 2))), ["(rows, columns)", "2 x 4 x 4"]),
        (lambda: Part("patches", 5, (), (2, 2)), ["count=5", "(2, 2) is 4 of them"]),
        (lambda: Part("word", 5), ["kind='word'", "'text', 'patches', 'special', 'padding'"]),
        (lambda: Part("text", 3, ("a", "b")), ["count=3 with 2 names"]),
        (lambda: Layout.text(-1), ["count=-1"]),
    ],
)
def test_what_cannot_lie_so_is_refused_at_once(make, parts):
    with pytest.raises(ValueError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_words_are_a_list_and_special_places_are_among_them():
    with pytest.raises(TypeError, match="words='the cat': pass a list of words"):
        Layout.text("the cat")
    with pytest.raises(IndexError, match=r"special=\[2\] is out of range: 2 words"):
        Layout.text(["the", "cat"], special=[2])

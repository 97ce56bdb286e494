"""What the queries and keys on a page are: what the maps know of them, or what is passed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from visualizer import AttentionMap, Layout, VisualizerWarning, explore
from visualizer.explorer.sides import beside, read_sides
from visualizer.layout import Part


def sides_of(queries, keys, known=(None, None), **options):
    given = {"tokens": None, "query_tokens": None, "key_tokens": None, "image": None, "where": {}}
    return read_sides(queries, keys, **{**given, **options}, known=known)


def test_patches_that_the_maps_know():
    known = Layout.picture((2, 3), ["CLS", "REG1"])
    for image in (None, np.ones((20, 30, 3))):
        side, keys = sides_of(8, 8, (known, known), image=image)
        assert side is keys
        assert (["CLS", "REG1"], [0, 1], (2, 3)) == (side.labels, side.special, side.grid)
    assert (30, 20) == Image.open(io.BytesIO(side.picture)).size


def test_a_photograph_of_other_proportions_is_told():
    known = Layout.picture((2, 2), image_size=28, patch_size=14)
    with pytest.warns(VisualizerWarning, match="the model saw 28 x 28"):
        sides_of(4, 4, (known, known), image=np.ones((20, 30, 3)))


def test_the_picture_alone_tells_the_grid():
    assert (9, 16) == sides_of(145, 145, image=np.ones((90, 160, 3)))[0].grid


def test_frames_lie_one_below_the_other():
    known = Layout.picture((3, 2, 4))
    side, _ = sides_of(24, 24, (known, known), image=np.ones((3, 20, 40, 3)))
    assert (6, 4) == side.grid
    assert (40, 60) == Image.open(io.BytesIO(side.picture)).size


def test_words_that_the_maps_know_and_padding_beside_the_special_tokens():
    known = Layout((Part("padding", 1), *Layout.text(["[CLS]", "Ġcat", "Ċ"], special=[0]).parts))
    side, _ = sides_of(4, 4, (known, known))
    assert (["[PAD]", "[CLS]", "␣cat", "⏎"], [0, 1]) == (side.labels, side.special)


def test_words_that_are_passed_are_written_as_in_plots():
    side, _ = sides_of(4, 4, tokens=["[CLS]", "Ġç", "Į", "«"])
    assert ["[CLS]", "␣猫₁", "猫₂", "猫₃"] == side.labels
    assert [0] == side.special


def test_words_look_at_patches():
    words, patches = Layout.text(["a", "cat"]), Layout.picture((1, 3))
    queries, keys = sides_of(2, 3, (words, patches), image=np.ones((10, 30, 3)), query_tokens=["x", "y"])
    assert (["x", "y"], (1, 3)) == (queries.labels, keys.grid)
    queries, keys = sides_of(2, 3, (words, patches))
    assert (["a", "cat"], (1, 3)) == (queries.labels, keys.grid)


def test_a_page_of_recorded_maps_needs_the_picture_alone():
    made = AttentionMap(torch.eye(7).expand(2, 1, 7, 7))
    made.layout = made.query_layout = Layout.picture((2, 3), ["CLS"])
    page = explore([made, made], image=[np.zeros((20, 30, 3))] * 2)
    assert "<Explorer: 2 examples, the first of 2 layers x 1 heads, 7 queries x 7 keys>" == repr(page)
    assert '"grid":[2,3]' in page.html


def test_pictures_lie_side_by_side_and_are_pooled_apart():
    """Three pictures of other sizes, two of them in a row; between them a row and a column of cells stay empty."""
    grids, colours = ((2, 3), (1, 1), (3, 2)), (0.0, 1.0, 0.5)
    pixels = [np.full((10 * high, 10 * wide, 3), grey) for (high, wide), grey in zip(grids, colours, strict=True)]
    sides = [sides_of(high * wide, high * wide, image=one)[0] for (high, wide), one in zip(grids, pixels, strict=True)]
    sheet = beside(sides)
    assert ((6, 5), 13) == (sheet.grid, sheet.size)
    assert ((0, 0, 2, 3), (0, 4, 1, 1), (3, 0, 3, 2)) == sheet.parts
    assert sides[0] is beside(sides[:1])
    drawn = sheet.on_sheet(np.arange(13.0)[None])
    assert [[[0, 1, 2, 0, 6], [3, 4, 5, 0, 0]]] == drawn[:, :2].tolist()
    with Image.open(io.BytesIO(sheet.picture)) as picture:
        grey = np.asarray(picture.resize((5, 6), Image.Resampling.BOX).convert("L"))
    assert np.abs(grey[[0, 0, 0, 3], [0, 3, 4, 1]].astype(int) - [0, 255, 255, 128]).max() <= 3
    coarse, groups = sheet.pool(2)
    assert ((0, 0, 1, 2), (0, 3, 1, 1), (2, 0, 2, 1)) == coarse.parts
    assert [0, 0, 1, 0, 0, 1, 2, 3, 3, 3, 3, 4, 4] == groups.tolist()
    assert coarse.size == 5

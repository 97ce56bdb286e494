"""Pictures as arrays: what a model saw of one, frames of videos, greys of more bits."""

import numpy as np
import pytest

from visualizer.images import part_seen, picture_of, read_image, side_by_side
from visualizer.layout import Layout
from visualizer.models import prepare

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def photo(high, wide, seed=0):
    rough = np.random.default_rng(seed).random((6, 8, 3))
    return np.kron(rough, np.ones((high // 6, wide // 8, 1)))


def small(picture):
    high, wide = (side // 24 for side in picture.shape[:2])
    return tuple(picture.mean(-1).reshape(24, high, 24, wide).mean((1, 3)).ravel())


class TestPartSeen:
    """A model that cuts out a square sees a part of the photograph, and the patches lie on that part."""

    picture = photo(240, 384)

    @pytest.mark.parametrize("side", [240, 216])
    def test_the_middle(self, side):
        top, left = (240 - side) // 2, (384 - side) // 2
        part = self.picture[top : top + side, left : left + side]
        np.testing.assert_array_equal(part, part_seen(self.picture, small(part), (224, 224)))

    def test_all_of_it_squeezed(self):
        np.testing.assert_array_equal(self.picture, part_seen(self.picture, small(self.picture), (224, 224)))

    def test_another_picture(self):
        assert part_seen(photo(240, 384, seed=1), small(self.picture), (224, 224)) is None
        assert part_seen(np.ones((240, 384, 3)), small(self.picture), (224, 224)) is None

    def test_a_layout_that_knows_what_was_seen_draws_it_there(self):
        part = self.picture[:, 72:312]
        layout = Layout(Layout.picture((14, 14), image_size=224, patch_size=16).parts, seen=(small(part),))
        np.testing.assert_array_equal(part, layout.on(self.picture))


def test_frames_of_a_video_are_read_one_by_one():
    frames = [np.zeros((4, 6), np.uint8), np.full((4, 6, 3), 255, np.uint8)]
    assert (2, 4, 6, 3) == picture_of(frames).shape
    assert (2, 4, 6, 3) == picture_of(np.zeros((2, 3, 4, 6))).shape
    assert side_by_side(np.zeros((3, 2, 2)), -1).shape == (2, 6)


@pytest.mark.parametrize(("mode", "top"), [("I;16", 65535), ("I", 65535), ("I", 255), ("F", 1), ("F", 255)])
def test_grey_pictures_of_more_bits_keep_their_greys(mode, top):
    grey = np.linspace(0, top, 12).reshape(3, 4)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    picture = Image.fromarray(grey.astype(kind))
    assert mode == picture.mode
    np.testing.assert_allclose(read_image(picture), np.stack([grey.astype(kind) / top] * 3, -1), atol=1e-6)


def test_a_black_picture_of_more_bits_is_black():
    assert not read_image(Image.fromarray(np.zeros((2, 3), np.uint16))).any()


@pytest.mark.parametrize("mode", ["LAB", "HSV", "CMYK", "YCbCr", "P"])
def test_no_colour_is_taken_for_opacity(mode):
    """PIL leaves the opacity of what it makes of LAB, whose third band is called A, to chance."""
    original = Image.fromarray((255 * photo(24, 32)).astype(np.uint8))
    picture = original.convert(mode)
    expected = np.asarray(picture.convert("RGB")) / 255
    np.testing.assert_allclose(expected, read_image(picture), atol=1e-6)
    np.testing.assert_allclose(expected, prepare(picture, size=(24, 32), patch=8)[1] / 255, atol=1e-6)


def test_the_picture_of_a_file_is_upright(tmp_path):
    picture = Image.fromarray((255 * photo(24, 32)).astype(np.uint8))
    turned = picture.getexif()
    turned[0x112] = 6  # lies on its side
    picture.save(tmp_path / "photo.png", exif=turned)
    for path in (tmp_path / "photo.png", str(tmp_path / "photo.png")):
        np.testing.assert_array_equal(np.rot90(read_image(picture), -1), read_image(path))
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")

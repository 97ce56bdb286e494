"""Where files are written: names of other formats, and what a file must not replace, are refused before a byte is."""

import os
import socket
import threading

import pytest

from visualizer import FileFormatError, capture, load
from visualizer.store import check_destination


def attend(x):
    attn = 2 * x
    return None


@pytest.fixture
def captured():
    with capture(attend, "attn") as found:
        attend(1)
    return found


@pytest.mark.parametrize("name", ["x.safetensors", "x", "x.maps", "run.1", ".safetensors", ".pt", "x.SAFETENSORS"])
def test_any_name_that_says_no_other_format(tmp_path, captured, name):
    captured.save(tmp_path / name)
    assert {"attend": [2]} == load(tmp_path / name)


@pytest.mark.parametrize("name", ["x.pt", "x.csv", "x.npz", "x.PT", "x.y.html", "x.png", "x.pkl"])
def test_a_suffix_of_another_format(tmp_path, captured, name):
    with pytest.raises(ValueError, match=rf"{name[:-4]}.*has the suffix of .*name it .*\.safetensors'"):
        captured.save(tmp_path / name)
    assert [] == os.listdir(tmp_path)


def test_a_folder(tmp_path, captured):
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        captured.save(tmp_path)
    assert [] == os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
class TestSpecialFiles:
    def test_a_device(self, captured):
        with pytest.raises(OSError, match=f"'{os.devnull}' is a device"):
            captured.save(os.devnull)
        assert os.path.exists(os.devnull)

    def test_a_link_to_a_device(self, tmp_path, captured):
        (tmp_path / "x").symlink_to(os.devnull)
        with pytest.raises(OSError, match="is a device"):
            captured.save(tmp_path / "x")
        assert os.path.islink(tmp_path / "x")

    def test_a_named_pipe(self, tmp_path, captured):
        os.mkfifo(tmp_path / "x")
        with pytest.raises(OSError, match="is a named pipe"):
            captured.save(tmp_path / "x")
        assert ["x"] == os.listdir(tmp_path)

    def test_reading_a_named_pipe_does_not_wait(self, tmp_path):
        os.mkfifo(tmp_path / "x")
        said = []

        def read():
            try:
                load(tmp_path / "x")
            except FileFormatError as error:
                said.append(str(error))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(60)
        assert ["is a named pipe, not a file"] == [text.partition("' ")[2].partition(";")[0] for text in said]

    def test_a_socket(self, tmp_path, captured, monkeypatch):
        monkeypatch.chdir(tmp_path)  # the path of a socket may be short alone
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
            with pytest.raises(OSError, match="is a socket"):
                captured.save("x")
            with pytest.raises(FileFormatError, match="is a socket"):
                load("x")


def test_pages_have_a_format_too(tmp_path):
    check_destination(tmp_path / "x.htm", "html")
    with pytest.raises(ValueError, match="has the suffix of safetensors, and this writes HTML"):
        check_destination(tmp_path / "x.safetensors", "html")

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
def test_a_path_without_a_name_or_with_one_too_long(tmp_path, captured, monkeypatch):
    """Errors name the file that was asked for, and nothing is written anywhere."""
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    with pytest.raises(FileNotFoundError, match="the path is empty: name a file"):
        captured.save("")
    long = "a" * 300
    with pytest.raises(OSError, match=long) as error:
        captured.save(long)
    assert str(error.value).endswith(f"{long}'")
    assert [*tmp_path.iterdir()] == [inner]
    assert not [*inner.iterdir()]


def test_a_path_of_bytes(tmp_path, captured):
    captured.save(bytes(tmp_path / "x.safetensors"))
    assert list(load(tmp_path / "x.safetensors")) == list(captured)


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


@pytest.fixture(scope="module")
def savers():
    """By name, something of each kind that a user may save, and the suffix of its format."""
    torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")
    statistics = pytest.importorskip("visualizer.statistics", reason="statistics need torchmetrics")
    from visualizer import attention, explore
    from visualizer.instrument import GetLocal

    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.ones(1, 4, 8)
    with attention(layer) as maps:
        layer(x, x, x)
    collected = statistics.collect(layer, [x], statistics.Entropy(), call=lambda layer, x: layer(x, x, x))
    with capture(attend, "attn") as found:
        attend(1)
    results = {"captured": found, "get_local.cache": GetLocal().cache, "maps": maps, "statistics": collected}
    return {**{name: (each, "safetensors") for name, each in results.items()}, "page": (explore(maps), "html")}


@pytest.mark.parametrize("name", ["captured", "get_local.cache", "maps", "statistics", "page"])
class TestEverySave:
    def test_its_own_format(self, tmp_path, savers, name):
        saver, suffix = savers[name]
        for file in (f"x.{suffix}", "x"):
            saver.save(tmp_path / file)
        assert sorted(["x", f"x.{suffix}"]) == sorted(os.listdir(tmp_path))

    def test_another_format_a_folder_or_a_device(self, tmp_path, savers, name):
        saver, suffix = savers[name]
        for other in ("pt", "csv", "json", "png", "safetensors" if suffix == "html" else "html"):
            with pytest.raises(ValueError, match=rf"has the suffix of .*: name it .*x\.{suffix}'"):
                saver.save(tmp_path / f"x.{other}")
        with pytest.raises(IsADirectoryError, match="name a file in it"):
            saver.save(tmp_path)
        if os.name == "posix":
            with pytest.raises(OSError, match="is a device, which a file must not replace"):
                saver.save(os.devnull)
            os.mkfifo(tmp_path / "pipe")
            with pytest.raises(OSError, match="is a named pipe"):
                saver.save(tmp_path / "pipe")
            os.remove(tmp_path / "pipe")
        assert [] == os.listdir(tmp_path)


@pytest.mark.parametrize("out", ["x.pt", "x.csv", "folder", "pipe", os.devnull])
@pytest.mark.parametrize("command", ["run", "plot", "explore", "stats"])
def test_every_command_that_writes(tmp_path, monkeypatch, capsys, captured, command, out):
    from visualizer import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "script.py").write_text("open('ran', 'w')")
    (tmp_path / "words.txt").write_text("a text")
    captured.save("maps.safetensors")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
    elif out == "pipe":
        pytest.skip("this system has no named pipes")
    before = sorted(os.listdir())
    arguments = {
        "run": ["run", "-o", out, "script.py"],
        "stats": ["stats", "--model", "minilm", "--texts", "words.txt", "-o", out],
    }
    assert 2 == cli.main(arguments.get(command, [command, "maps.safetensors", "-o", out]))
    printed = capsys.readouterr()
    assert ("", 1) == (printed.out, printed.err.count("\n"))
    assert f"cannot write {out}: " in printed.err
    assert before == sorted(os.listdir()), "nothing ran, and nothing was written"


def test_a_checkpoint_takes_a_folder(tmp_path):
    torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")
    statistics = pytest.importorskip("visualizer.statistics", reason="statistics need torchmetrics")
    (tmp_path / "x.pt").write_text("")
    layer = torch.nn.MultiheadAttention(8, 2)
    with pytest.raises(NotADirectoryError, match="is no folder: checkpoint= takes a folder"):
        statistics.collect(layer, [], statistics.Entropy(), checkpoint=tmp_path / "x.pt")


def test_suffixes_of_one_format_stand_for_each_other(tmp_path):
    check_destination(tmp_path / "x.htm", "html")
    for picture in ("svg", "pdf", "PNG", "eps", "unknown"):
        check_destination(tmp_path / f"x.{picture}", "png")
    with pytest.raises(ValueError, match="has the suffix of safetensors, and this writes pictures: name it"):
        check_destination(tmp_path / "x.safetensors", "png")

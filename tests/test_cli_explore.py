"""`visualizer explore`: the page of a saved file."""

import subprocess
import sys
import webbrowser

import numpy as np
import pytest
from PIL import Image

from visualizer import capture, cli, load
from visualizer.explorer import explore

TOKENS = ["[CLS]", "zebra", "<b>cat", "sat", "[SEP]"]


def attend(x):
    attn = x
    return attn.sum()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of a text of two layers, with its tokens, and of 4 x 4 patches; a picture."""
    random = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    for name, count, about in (("text", 5, {"tokens": TOKENS}), ("picture", 17, {})):
        with capture(attend, "attn") as found:
            [attend(random.dirichlet(np.ones(count), (1, 2, count)).astype("float32")) for _ in range(2)]
        found.save(name, about=about)
    Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save("photo.png")
    return tmp_path


def test_the_page_is_the_one_that_explore_makes(folder, capsys):
    assert 0 == cli.main(["explore", "text"])
    assert 0 == cli.main(["explore", "picture", "--image", "photo.png", "--title", "noise", "-o", "p.html"])
    assert "explorer.html\np.html\n" == capsys.readouterr().out
    text, picture = load("text")["attend"], load("picture")["attend"]
    with Image.open("photo.png") as pixels:
        wanted = explore(text, TOKENS).html, explore(picture, image=pixels.convert("RGB"), title="noise").html
    assert wanted == tuple((folder / name).read_text(encoding="utf-8") for name in ("explorer.html", "p.html"))
    assert "zebra" in wanted[0]
    assert "<b>cat" not in wanted[0]


def test_the_users_words_go_before_the_files(folder):
    assert 0 == cli.main(["explore", "text", "--tokens", *"vwxyz", "--call", "1"])
    page = (folder / "explorer.html").read_text(encoding="utf-8")
    assert "zebra" not in page
    assert explore([load("text")["attend"][1]], list("vwxyz")).html == page
    assert 0 == cli.main(["explore", "text", "--sinks", "remove"])
    page = (folder / "explorer.html").read_text(encoding="utf-8")
    assert explore(load("text")["attend"], TOKENS, sinks="remove").html == page


def test_it_is_shown_only_when_asked_for(folder, monkeypatch):
    shown = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    assert 0 == cli.main(["explore", "text"])
    assert [] == shown
    assert 0 == cli.main(["explore", "text", "--open"])
    assert [(folder / "explorer.html").as_uri()] == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "cannot read missing"),
        (["photo.png"], "is not a safetensors file"),
        (["text", "--tokens", "one", "two"], "5"),
        (["picture", "--image", "text"], "as a picture"),
        (["picture", "--grid", "5x5"], "--grid"),
        (["text", "--key", "x"], "no key matches 'x'"),
        (["text", "--batch", "3"], "--batch 3"),
        (["text", "-o", "none/x.html"], "cannot write none/x.html"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, said, folder, capsys):
    assert 2 == cli.main(["explore", *arguments])
    printed = capsys.readouterr()
    assert "" == printed.out
    assert said in printed.err
    assert 1 == printed.err.count("\n")
    assert not list(folder.glob("*.html"))


@pytest.mark.slow
def test_a_file_of_a_script_is_explored_from_the_shell(folder):
    done = subprocess.run(
        [sys.executable, "-m", "visualizer", "explore", "text", "-o", "t.html"], capture_output=True, text=True
    )
    assert (0, "t.html\n", "") == (done.returncode, done.stdout, done.stderr)

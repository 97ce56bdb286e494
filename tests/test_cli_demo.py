"""`visualizer demo`: the pictures and the index that it writes, and how it refuses."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visualizer import cli

PICTURES = ("head.png", "heads.png", "query.png", "class_token.png", "tokens.png")


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as a user runs it, in a pipe: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    # The environment of the tests may have a torchvision that does not fit its torch: see torchvision_schemas.
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}];"
        "import torchvision_schemas as s; s.declare();"
        "from visualizer.cli import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return folder / "visualizer-demo", done


@pytest.mark.slow
def test_the_demo_writes_five_pictures_and_an_index(demo):
    folder, done = demo
    assert (0, "visualizer-demo/index.md\n") == (done.returncode, done.stdout.replace(os.sep, "/")), done.stderr
    assert {*PICTURES, "index.md"} == {path.name for path in folder.iterdir()}
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 500
        assert pixels.std() > 10, f"{name} is blank"


@pytest.mark.slow
def test_it_is_quiet_in_a_pipe(demo):
    assert "" == demo[1].stderr


@pytest.mark.slow
def test_the_index_says_for_each_picture_what_made_it(demo):
    text = (demo[0] / "index.md").read_text(encoding="utf-8")
    for name in PICTURES:
        section = text.split(f"]({name})")[1].split("##")[0]
        assert "layer" in section
        assert "head" in section
        assert "`plot." in section
    assert "DINOv2-type ViT-S/14" in text
    assert "all-MiniLM-L6-v2" in text
    assert "coffee.png" in text


@pytest.mark.slow
def test_the_python_of_the_index_runs(demo, tmp_path):
    """The maps, and then each picture's own call, as the index has them."""
    text = (demo[0] / "index.md").read_text(encoding="utf-8")
    vision, words = text.split("```python\n")[1].split("```")[0].split("\n# the text model")
    calls = [part.split("`")[0] for part in text.split("`plot.")[1:]]
    code = [vision, *(f"plot.{call}" for call in calls[:4]), "\n# the text model" + words, f"plot.{calls[4]}"]
    space: dict = {}
    exec("\n".join(code), space)
    assert 6 == len(space["maps"])


@pytest.mark.slow
def test_on_a_users_own_input(tmp_path, capsys):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    picture.save(tmp_path / "my photo_[1].jpg")
    text = "Costs $5 *and* `more`"
    arguments = [
        "--image",
        str(tmp_path / "my photo_[1].jpg"),
        "--text",
        text,
        "--layer",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    assert 0 == cli.main(["demo", *arguments])
    index = (tmp_path / "o" / "index.md").read_text(encoding="utf-8")
    assert r"my photo\_\[1\].jpg" in index
    assert r"Costs $5 \*and\* \`more\`" in index
    assert "layer=2" in index
    assert f"{tmp_path / 'o' / 'index.md'}\n" == capsys.readouterr().out


@pytest.mark.parametrize(
    ("terminal", "options", "is_shown"), [(True, [], True), (True, ["--quiet"], False), (False, [], False)]
)
def test_progress_is_for_terminals(terminal, options, is_shown, monkeypatch, tmp_path, capsys):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    made = {"batch": {"input_ids": np.zeros((1, 13))}, "model": model}
    monkeypatch.setattr(cli.demo, "_run", lambda _, names: names.update(made))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(cli.demo, "PICTURES", "")
    monkeypatch.chdir(tmp_path)
    assert 0 == cli.main(["demo", *options])
    printed = capsys.readouterr()
    assert str(Path("visualizer-demo/index.md")) == printed.out.strip()
    assert is_shown == ("running the text model" in printed.err)
    assert is_shown == bool(printed.err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layer", "12"], "no layer 12: the vision model has layers 0 to 11"),
        (["--layer", "-1"], "no layer -1"),
        (["--layer", "last"], "invalid int value: 'last'"),
        (["--text", "  "], "the text is empty"),
        (["--text", "word " * 600], "602 tokens; the text model takes 512 at most"),
        (["--image", "missing.jpg"], "there is no picture missing.jpg"),
        (["--image", "broken.png"], "cannot read broken.png as a picture"),
        (["--image", "cut.jpg"], "cannot read cut.jpg as a picture"),
        (["--image", "huge.png"], "huge.png is too large"),
        (["--image", ""], "the picture has no name"),
        (["--text", "\udcff"], "the text is not valid Unicode"),
        (["--image", "folder"], "cannot read folder as a picture"),
        (["--out", "a file"], "cannot write to a file"),
        (["--out", "a file/below"], "cannot write to a file/below"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    Image.new("1", (1000, 1000)).save(tmp_path / "huge.png")
    (tmp_path / "a file").write_text("in the way")
    refuses(["demo", *arguments], said)

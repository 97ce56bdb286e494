"""`visualizer stats`: what it collects of pictures and texts, and what `info` and `plot` make of its files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from plots import no_figure_left  # noqa: F401

from visualizer import analysis, attention, cli, load, models
from visualizer.statistics.measures import MEASURES

ROOT = Path(__file__).parent.parent
BUILDER = """
import torch
from visualizer import models

def build():
    torch.manual_seed(0)
    model = models.VisionTransformer(patch=4, width=24, depth=2, heads=3, hidden=40, grid=4, classes=5).eval()
    return model, lambda path: models.prepare(path, size=16, patch=4)[0]

def alone():
    return build()[0]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five pictures, one of them a folder deeper, and a module that builds a model for them."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "c.png", "more/d.png", "more/e.webp"):
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "builder_of_tests.py").write_text(BUILDER)
    yield tmp_path
    sys.modules.pop("builder_of_tests", None)


def by_hand(folder, names):
    """The moments of distance and entropy over pictures, from their maps."""
    space = {}
    exec(BUILDER, space)
    model, prepare = space["build"]()
    with attention(model) as maps, torch.no_grad():
        model(torch.cat([prepare(folder / "photos" / name) for name in names]))
    return analysis.attention_distance(maps).numpy(), analysis.entropy(maps).mean(-1).numpy()


IMAGES = ["stats", "--model", "builder_of_tests:build", "--images", "photos", "--batch-size", "2"]


def test_of_pictures(folder, capsys):
    assert 0 == cli.main([*IMAGES, "-o", "out.safetensors"])
    printed = capsys.readouterr()
    assert ("out.safetensors\n", "") == (printed.out, printed.err)
    found = load("out.safetensors")
    assert ["distance", "entropy", "confidence", "prefix_mass", "received"] == list(found)
    assert (5, 3, []) == (found.samples, found.batches, found.failed)
    assert {"model": "builder_of_tests:build", "data": "photos"} == found.about
    distances, entropies = by_hand(folder, ("a.png", "b.jpg", "c.png", "more/d.png", "more/e.webp"))
    for name, numbers in (("distance", distances), ("entropy", entropies)):
        np.testing.assert_allclose(numbers.mean(1), found[name].mean, atol=1e-6)
        np.testing.assert_allclose(numbers.std(1, ddof=1), found[name].std, atol=1e-5)
        np.testing.assert_allclose(numbers.max(1), found[name].maximum, atol=1e-6)


def test_pictures_that_cannot_be_read_are_named_and_left_out(folder, capsys):
    (folder / "photos" / "b.jpg").write_bytes(b"no jpeg")
    assert 0 == cli.main([*IMAGES, "--measure", "distance"])
    assert f"visualizer: {Path('photos/b.jpg')} does not count" in capsys.readouterr().err
    found = load("stats.safetensors")
    assert ["distance"] == list(found)
    distances, _ = by_hand(folder, ("a.png", "c.png", "more/d.png", "more/e.webp"))
    np.testing.assert_allclose(distances.mean(1), found["distance"].mean, atol=1e-6)


def test_limit_and_checkpoint(folder, capsys):
    assert 0 == cli.main([*IMAGES, "--limit", "3", "--checkpoint", "run"])
    assert 3 == load("stats.safetensors").samples == load("run/rank-*.safetensors").samples


def test_a_checkpoint_of_other_pictures(folder, capsys):
    assert 0 == cli.main([*IMAGES, "--limit", "3", "--checkpoint", "run"])
    for other in (["--limit", "4"], ["--limit", "3", "--batch-size", "1"], ["--limit", "3", "--size", "64"]):
        assert 1 == cli.main([*IMAGES, *other, "--checkpoint", "run"])
        assert "is of another run, with data" in capsys.readouterr().err


def test_a_checkpoint_of_pictures_that_were_made_anew(folder, capsys):
    assert 0 == cli.main([*IMAGES, "--checkpoint", "run"])
    Image.new("RGB", (50, 40)).save(folder / "photos" / "a.png")
    assert 1 == cli.main([*IMAGES, "--checkpoint", "run"])
    assert "is of another run, with data" in capsys.readouterr().err


def test_quiet(folder, capsys):
    (folder / "photos" / "b.jpg").write_bytes(b"no jpeg")
    assert 0 == cli.main([*IMAGES, "--measure", "distance", "-q"])
    assert "" == capsys.readouterr().err


def test_a_world_without_a_rank_is_one_process(folder, capsys, monkeypatch):
    """As some schedulers leave it to programs that they start alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert 0 == cli.main([*IMAGES, "--measure", "distance"])


def test_of_texts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = ["The cat sat on the mat because it was tired.", "", "  A shorter text.  ", "One more, of several words."]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    assert 0 == cli.main(["stats", "--model", "minilm", "--texts", "texts.txt", "--batch-size", "2"])
    found = load("stats.safetensors")
    assert ["entropy", "confidence", "sink", "received", "patterns"] == list(found)
    model, tokenizer = models.minilm()
    means = []
    for text in ("The cat sat on the mat because it was tired.", "A shorter text.", "One more, of several words."):
        with attention(model) as maps, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        means.append(analysis.entropy(maps).mean(-1).numpy()[:, 0])
    np.testing.assert_allclose(np.mean(means, 0), found["entropy"].mean, atol=1e-5)
    assert 3 == found.samples
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts if text]
    reached = [sum(length > place for length in lengths) for place in range(max(lengths))]
    assert reached == found["received"].count[0, 0].tolist()
    short = ["stats", "--model", "minilm", "--texts", "texts.txt", "--length", "4", "--measure", "entropy"]
    assert 0 == cli.main(short)
    assert load("stats.safetensors")["entropy"].maximum.max() <= np.log(4) + 1e-6


@pytest.mark.slow
def test_two_processes_are_one(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)])}
    assert 0 == cli.main([*IMAGES, "-o", "one.safetensors"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, "-m", "visualizer", *IMAGES, "-o", "two.safetensors", "--checkpoint", "run"],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (0, "two.safetensors\n") == (done.returncode, done.stdout), done.stderr
    one, two, ranks = load("one.safetensors"), load("two.safetensors"), load("run/rank-*.safetensors")
    assert 5 == one.samples == two.samples == ranks.samples
    for name in one:
        for part in ("count", "mean", "variance", "minimum", "maximum"):
            np.testing.assert_allclose(getattr(one[name], part), getattr(two[name], part), atol=1e-6)
            np.testing.assert_allclose(getattr(ranks[name], part), getattr(two[name], part), atol=1e-12)


def test_info(folder, capsys):
    cli.main([*IMAGES, "--measure", "distance", "received"])
    capsys.readouterr()
    assert 0 == cli.main(["info", "stats.safetensors"])
    told = capsys.readouterr().out
    assert "stats.safetensors: statistics of 5 images or texts in 3 batches" in told
    assert "layers: blocks.0.attn, blocks.1.attn" in told
    assert 0 == cli.main(["info", "stats.safetensors", "--json"])
    content, found = json.loads(capsys.readouterr().out), load("stats.safetensors")
    assert ("statistics", 5) == (content["kind"], content["samples"])
    np.testing.assert_array_equal(found["received"].mean, content["statistics"]["received"]["mean"])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, while they are open."""
    figures = []
    monkeypatch.setattr(cli.plot, "save", lambda figure, path, dpi: (figures.append(figure), figure.savefig(path)))
    yield figures
    from matplotlib import pyplot as plt

    plt.close("all")


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("distance", "mean attention distance (patches)"),
        ("entropy", "mean entropy (nats)"),
        ("confidence", "mean of the largest weight"),
        ("prefix-mass", "attention to prefix tokens"),
        ("sink", "attention to token 0"),
    ],
)
def test_one_number_a_head_is_a_dot(kind, label, folder, drawn, capsys):
    cli.main([*IMAGES, "--measure", kind])
    assert 0 == cli.main(["plot", "stats.safetensors", "--kind", kind])
    assert f"{kind}.png" in capsys.readouterr().out
    [ax] = drawn[0].axes
    assert (label, "mean of 5 samples") == (ax.get_ylabel(), ax.get_title())
    means = load("stats.safetensors")[kind.replace("-", "_")].mean
    np.testing.assert_allclose(means.reshape(-1), ax.collections[0].get_offsets()[:, 1])


def test_numbers_of_positions_patterns_and_maps(folder, drawn, capsys):
    cli.main([*IMAGES, "--measure", "received", "patterns", "mean_map"])
    found = load("stats.safetensors")
    for kind in ("received", "patterns", "mean-map"):
        assert 0 == cli.main(["plot", "stats.safetensors", "--kind", kind, "--title", "five"]), capsys.readouterr().err
    received, scores, maps = drawn
    np.testing.assert_allclose(found["received"].mean.mean(1), received.axes[0].images[0].get_array())
    np.testing.assert_allclose(found["patterns"].mean[..., 2], scores.axes[2].images[0].get_array())
    assert "self" == scores.axes[2].get_title()
    np.testing.assert_allclose(found["mean_map"].mean[-1, 1], maps.axes[1].images[0].get_array())
    assert 2 == cli.main(["plot", "stats.safetensors", "--kind", "entropy"])
    assert "there are --kind received, --kind patterns, --kind mean-map" in capsys.readouterr().err
    assert 2 == cli.main(["plot", "stats.safetensors", "--kind", "received", "--layer", "1"])
    assert "has no use for --layer" in capsys.readouterr().err
    assert 2 == cli.main(["explore", "stats.safetensors"])
    assert "has statistics and no maps" in capsys.readouterr().err


def test_help_lists_the_statistics(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["stats", "--help"])
    assert 0 == ended.value.code
    told = capsys.readouterr().out
    for name, measure in MEASURES.items():
        assert f"  {name:12} {measure.about} (" in told
    assert "how broadly it attends (default for images and texts)" in told
    assert "its mean map (only if named)" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "builder_of_tests:build"], "one of the arguments --images --texts is required"),
        (["--model", "builder_of_tests:build", "--images", "nowhere"], "there is no folder nowhere"),
        (["--model", "builder_of_tests:build", "--images", "empty"], "there is no picture in empty"),
        (["--model", "builder_of_tests:nothing", "--images", "photos"], "'builder_of_tests:nothing' leads nowhere"),
        (["--model", "builder_of_tests:alone", "--images", "photos"], "must return a model and what makes its input"),
        (["--model", "vit_of_nobody", "--images", "photos"], "there is no model 'vit_of_nobody' in timm"),
        (["--model", "minilm", "--images", "photos"], "minilm reads texts: pass --texts"),
        (["--model", "minilm", "--texts", "missing.txt"], "cannot read missing.txt: No such file"),
        (["--model", "minilm", "--texts", "blank.txt"], "there is no text in blank.txt"),
        (["--model", "builder_of_tests:build", "--images", "photos", "--limit", "0"], "'0' is not a number from 1 on"),
        (["--model", "builder_of_tests:build", "--images", "photos", "-o", "no/x"], "cannot write no/x: No such file"),
        (["--model", "builder_of_tests:build", "--images", "photos", "--measure", "love"], "invalid choice: 'love'"),
        (["--model", "builder_of_tests:build", "--images", "photos", "--device", "abacus"], "--device abacus: "),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, said, folder, capsys):
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text("\n \n")
    assert 2 == cli.main(["stats", *arguments])
    printed = capsys.readouterr()
    assert ("", 1) == (printed.out, printed.err.count("\n"))
    assert said in printed.err


def test_a_model_of_speech_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(models, "load", lambda name: (torch.nn.Linear(1, 1), SimpleNamespace(feature_extractor=None)))
    (folder / "texts.txt").write_text("A cat.")
    assert cli.main(["stats", "--model", "whisper-tiny", "--texts", "texts.txt"]) == 2
    assert "whisper-tiny hears speech" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "said"),
    [("torch.nn.Flatten()", "no attention was seen in"), ("torch.nn.Linear(2, 2)", "mat1 and mat2 shapes")],
)
def test_a_model_that_does_not_work_is_status_1(model, said, folder, capsys):
    builder = f"import torch\nfrom visualizer import models\ndef build(): return {model}, lambda path: "
    (folder / "builder_of_tests.py").write_text(f"{builder}models.prepare(path, size=16, patch=4)[0]")
    assert 1 == cli.main(IMAGES)
    assert said in capsys.readouterr().err
    assert not (folder / "stats.safetensors").exists()

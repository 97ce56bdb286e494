"""`visualizer plot`: what it draws of a saved file, and how it refuses."""

import numpy as np
import pytest
from PIL import Image
from plots import no_figure_left  # noqa: F401
from saved_files import TOKENS, attend, figures_drawn, folder_of_files, matrix  # noqa: F401

from visualizer import analysis, capture, cli, load


def test_a_heads_matrix_is_that_of_the_layer_and_head(folder, drawn, capsys):
    assert 0 == cli.main(["plot", "text.safetensors", "--kind", "head", "--layer", "1", "--head", "-1", "-o", "x.png"])
    assert "x.png\n" == capsys.readouterr().out
    assert np.allclose(load("text.safetensors")["attend"][1][0, 1], matrix(drawn[0]))
    with Image.open("x.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_sinks_are_removed(folder, drawn, capsys):
    assert 0 == cli.main(
        ["plot", "text.safetensors", "--kind", "head", "--layer", "1", "--head", "0", "--sinks", "remove"]
    )
    maps = load("text.safetensors")["attend"]
    assert np.allclose(analysis.without_sinks(maps)[1].numpy()[0, 0], matrix(drawn[0]))
    assert drawn[0].axes[0].get_title().endswith("sinks removed")
    assert 2 == cli.main(["plot", "text.safetensors", "--kind", "entropy", "--sinks", "remove"])
    assert "--kind entropy has no use for --sinks" in capsys.readouterr().err


def test_text_stays_text_in_files_of_vectors(folder, drawn):
    head = ["plot", "text.safetensors", "--kind", "head", "--layer", "1", "--head", "0"]
    assert 0 == cli.main([*head, "-o", "x.svg"]) == cli.main([*head, "-o", "x.pdf"])
    assert "layer 1, head 0</text>" in (folder / "x.svg").read_text(encoding="utf-8")
    assert b"/Type3" not in (folder / "x.pdf").read_bytes(), "many journals take no fonts of that kind"


def test_all_heads_are_drawn_unless_told_otherwise(folder, drawn, capsys):
    assert 0 == cli.main(["plot", "maps.safetensors"])
    assert "heads.png\n" == capsys.readouterr().out
    maps = load("maps.safetensors")
    for head in range(2):
        assert np.allclose(maps[1].numpy()[0, head], matrix(drawn[0], head))


def test_a_folder_of_the_pictures_name_is_not_in_its_way(folder):
    (folder / "heads").mkdir()
    assert 0 == cli.main(["plot", "text.safetensors"])
    assert (folder / "heads.png").is_file()


@pytest.mark.parametrize("kind", ["query", "class-token", "rollout"])
def test_weights_lie_over_the_picture(kind, folder, drawn):
    options = ["--query", "2,1"] if kind == "query" else []
    arguments = ["plot", "picture.safetensors", "--kind", kind, *options]
    assert 0 == cli.main([*arguments])
    assert 0 == cli.main([*arguments, "--image", "photo.png"])
    maps = load("picture.safetensors")["attend"]
    means = [layer[0].mean(0) for layer in maps]
    if kind == "rollout":
        flow = np.eye(17)
        for mean in means:
            mixed = mean / 2 + np.eye(17) / 2
            flow = mixed / mixed.sum(-1, keepdims=True) @ flow
        wanted = flow[0, 1:]
    else:
        wanted = means[-1][0 if kind == "class-token" else 1 + 2 * 4 + 1, 1:]
    alone, above = ([np.asarray(image.get_array()) for ax in figure.axes for image in ax.images] for figure in drawn)
    assert any(array.shape == (4, 4) and np.allclose(wanted.reshape(4, 4), array, atol=1e-6) for array in alone)
    [*_, colours] = (array for array in above if array.shape == (48, 48, 3))
    with Image.open("photo.png") as picture:
        grey = 0.6 / 255 * (np.asarray(picture) @ [0.299, 0.587, 0.114])
    least = np.argmin(wanted)  # the picture is seen best where the weight is lowest, and there as it is, upright
    patch = np.s_[12 * (least // 4) : 12 * (least // 4 + 1), 12 * (least % 4) : 12 * (least % 4 + 1)]
    assert 0.99 < np.corrcoef(grey[patch].ravel(), colours[patch].sum(-1).ravel())[0, 1]


def test_all_layers_of_a_head(folder, drawn):
    assert 0 == cli.main(["plot", "text.safetensors", "--kind", "layers", "--head", "1", "--title", "all of them"])
    for number, layer in enumerate(load("text.safetensors")["attend"]):
        assert np.allclose(layer[0, 1], matrix(drawn[0], number))


def test_distance_and_entropy_have_a_dot_for_each_head(folder, drawn):
    assert 0 == cli.main(["plot", "picture.safetensors", "--kind", "distance", "--grid", "4x4"])
    assert 0 == cli.main(["plot", "picture.safetensors", "--kind", "entropy"])
    weights = np.stack(load("picture.safetensors")["attend"])[:, 0]  # (layers, heads, 17, 17)
    inner = weights[:, :, 1:, 1:] / weights[:, :, 1:, 1:].sum(-1, keepdims=True)
    places = np.array([divmod(patch, 4) for patch in range(16)])
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    wanted = [(inner * apart).sum(-1).mean(-1), -(weights * np.log(weights)).sum(-1).mean(-1)]
    for figure, values, unit in zip(drawn, wanted, ("distance (patches)", "entropy (nats)"), strict=True):
        assert np.allclose(values.ravel(), figure.axes[0].collections[0].get_offsets()[:, 1])
        assert figure.axes[0].get_ylabel().endswith(unit)


def test_colours_style_and_dots_per_inch_are_the_users(folder, drawn):
    head = ["plot", "text.safetensors", "--kind", "head", "--layer", "0", "--head", "0"]
    assert 0 == cli.main([*head, "--cmap", "gray_r", "--dpi", "50", "-o", "a.png"])
    assert 0 == cli.main([*head, "--dpi", "100", "-o", "b.png"])
    assert ["gray_r", "viridis"] == [figure.axes[0].images[0].get_cmap().name for figure in drawn]
    with Image.open("a.png") as small, Image.open("b.png") as large:
        assert (2 * small.width, 2 * small.height) == large.size
    query = ["plot", "picture.safetensors", "--kind", "query", "--query", "2,1", "--image", "photo.png"]
    assert 0 == cli.main([*query, "--style", "mask"])
    assert 0 == cli.main(query)
    masked, overlaid = (figure.axes[0].images[-1].get_array() for figure in drawn[2:])
    assert not np.array_equal(masked, overlaid)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_grey_pictures_of_more_bits_are_not_white(mode, folder, drawn):
    with Image.open("photo.png") as picture:
        grey = np.asarray(picture.convert("L"))
    wider = {"I;16": np.uint16(grey) * 257, "I": np.int32(grey) * 257, "F": np.float32(grey) / 255}[mode]
    Image.fromarray(wider).save("wide.tiff")
    Image.fromarray(grey).save("grey.png")
    for name in ("wide.tiff", "grey.png"):
        assert 0 == cli.main(["plot", "picture.safetensors", "--kind", "class-token", "--image", name])
    wide, narrow = (figure.axes[0].images[-1].get_array() for figure in drawn)
    np.testing.assert_allclose(wide, narrow, atol=1)


def test_patterns_are_those_of_the_analysis(folder, drawn):
    assert 0 == cli.main(["plot", "text.safetensors", "--kind", "patterns"])
    labels = analysis.head_patterns(load("text.safetensors")["attend"], TOKENS).labels.ravel().tolist()
    said = " ".join(text.get_text() for text in drawn[0].axes[0].get_legend().get_texts())
    for label in set(labels):
        assert f"{label}{', ≈ nearest' * (label == 'mixed')} ({labels.count(label)})" in said


def test_what_is_odd_about_the_maps_is_one_plain_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with capture(attend, "attn") as found:
        attend(np.full((1, 1, 3, 3), 0.2))
    found.save("x")
    assert 0 == cli.main(["plot", "x"])
    said = capsys.readouterr().err
    assert said.startswith("visualizer: 3 of 3 rows do not sum to 1")
    assert 1 == said.count("\n")


WRONG = [
    (["plot", "text.safetensors", "--kind", "headz"], "invalid choice: 'headz'"),
    (["plot", "text.safetensors", "--kind", "headz"], "did you mean 'head'?"),
    (["plot", "text.safetensors", "--layer", "meen"], "did you mean 'mean'?"),
    (["plot", "text.safetensors", "--cmap", "viridiz"], "no colour map 'viridiz'; did you mean 'viridis'?"),
    (["plot", "text.safetensors", "--dpi", "many"], "'many' is not a number from 10 to 2400"),
    (["plot", "text.safetensors", "--kind", "entropy", "--cmap", "gray"], "has no use for --cmap"),
    (["plot", "text.safetensors", "--key", "atend"], "did you mean 'attend'?"),
    (
        ["plot", "text.safetensors", "--kind", "head", "--layer", "0"],
        "there are 2 heads and none is chosen: pass --head",
    ),
    (["plot", "text.safetensors", "--layer", "3"], "--layer 3 is out of range"),
    (["plot", "text.safetensors", "--layer", "first"], "'first' is not a number, mean, max or min"),
    (["plot", "text.safetensors", "--head", "0"], "--kind heads has no use for --head; it takes --layer, --batch"),
    (["plot", "text.safetensors", "--kind", "entropy", "--image", "photo.png"], "it takes --title"),
    (["plot", "picture.safetensors", "--kind", "tokens"], "needs the words: --tokens"),
    (["plot", "text.safetensors", "--kind", "query"], "needs --query"),
    (["plot", "text.safetensors", "--kind", "tokens", "--layer", "0", "--head", "0", "--tokens", "a"], "1 entries"),
    (["plot", "picture.safetensors", "--kind", "query", "--query", "9,9"], "9"),
    (["plot", "text.safetensors", "-o", "missing/x.png"], "cannot write missing/x.png"),
    (["plot", "text.safetensors", "-o", "x.xyz"], "xyz"),
    (["plot", "text.safetensors", "-o", "-"], "-o - would be the standard output: name a file, such as out.png"),
    (["plot", "text.safetensors", "--tokens", "a", "b"], "--kind heads has no use for --tokens"),
    (["plot", "text.safetensors", "--kind", "entropy", "--tokens", "a", "b"], "has no use for --tokens; it takes --t"),
    (["plot", "text.safetensors", "-o", "."], "cannot write ."),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_wrong_use_is_one_line_and_status_2(arguments, said, folder, refuses):
    before = sorted(path.name for path in folder.iterdir())
    refuses(arguments, said)
    assert before == sorted(path.name for path in folder.iterdir())

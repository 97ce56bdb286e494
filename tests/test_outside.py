"""Figures that others published come out of our maps, and docs/outside.md has each of them."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="attention maps are of torch's models")

from outside import __main__ as command  # noqa: E402
from outside import hub  # noqa: E402
from outside.figures import FIGURES, Figure, below  # noqa: E402
from outside.page import page as whole  # noqa: E402
from outside.page import row  # noqa: E402

from visualizer import models  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "outside.md"
FAST = [name for name, one in FIGURES.items() if not one.is_slow]
SLOW = [name for name, one in FIGURES.items() if one.is_slow]


def holds(name):
    """The figure is computed within its tolerance, and the page says what came out."""
    if FIGURES[name].missing:
        pytest.skip(f"needs {', '.join(FIGURES[name].missing)}: pip install get-local[outside]; see docs/outside.md")
    assert row(name, FIGURES[name].check()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAST)
@pytest.mark.filterwarnings("default")
def test_a_figure_from_outside_holds(name):
    holds(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.filterwarnings("default")
def test_a_figure_from_outside_that_takes_long_holds(name):
    holds(name)


def test_the_page_has_each_figure_and_no_other():
    rows = [line.split(" | ")[0] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.count(" | ") == 4]
    assert ["| name", *(f"| {name}" for name in sorted(FIGURES))] == rows


def test_the_command_says_what_does_not_hold_and_what_is_missing(monkeypatch, capsys):
    """Its status is the number of figures that were not computed; the page is written when all were."""

    def off():
        return below(0.2, 0.1)

    made = {
        name: Figure(name, "", "", "", needs, False, check)
        for name, needs, check in (("right", (), lambda: "3 of 3"), ("off", (), off), ("absent", ("nowhere",), off))
    }
    monkeypatch.setattr(command, "FIGURES", made)
    monkeypatch.setattr(command, "PAGE", None)  # to write it would be an error
    monkeypatch.setattr("sys.argv", ["outside"])
    assert command.main() == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("right: 3 of 3 (")
    assert printed[1:] == ["off: DOES NOT HOLD: 0.2 is above 1e-01", "absent: not computed, nowhere not installed"]


# What the commands for users with a hub call, on models that are here


PDB = """\
ATOM      1  N   MET A   1      38.198  19.582  28.098  1.00  0.00           N
ATOM      2  CA  MET A   1      38.000  19.000  27.000  1.00  0.00           C
ATOM      3  CB  MET A   1      37.500  18.000  26.500  1.00  0.00           C
ATOM      4  CA  GLY A   2      36.000  17.000  25.000  1.00  0.00           C
ATOM      5  CB  TRP A   3      35.000  16.000  24.000  1.00  0.00           C
ATOM      6  CB  TRP B   3       0.000   0.000   0.000  1.00  0.00           C
HETATM    7  CB  MSE A   4      34.000  15.000  23.000  1.00  0.00           C
"""


def test_a_pdb_file_gives_residues_and_their_places(tmp_path):
    (tmp_path / "one.pdb").write_text(PDB)
    sequence, places = hub.read_pdb(tmp_path / "one.pdb")
    assert sequence == "MGW"
    assert places.tolist() == [[37.5, 18, 26.5], [36, 17, 25], [35, 16, 24]]


def test_contact_precision_takes_the_pairs_that_the_model_holds_likeliest():
    transformers = pytest.importorskip("transformers", reason="comes with get-local[demo]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, token_dropout=False, **sizes)
    model = transformers.EsmModel(config, add_pooling_layer=False).eval()
    torch.nn.init.normal_(model.contact_head.regression.weight, std=50)
    sequence = "ACDEFGHIKLMNPQRSTVWY" * 2
    ids = torch.tensor([[0, *(4 + "LAGVSERTIDPKQNFYMHWC".index(letter) for letter in sequence), 2]])

    def tokenizer(text, return_tensors):
        assert text == sequence
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    model.set_attn_implementation("eager")
    with torch.no_grad():  # transformers' own head, which needs eager weights
        likely = model.predict_contacts(ids, torch.ones_like(ids))[0].numpy()
    model.set_attn_implementation("sdpa")
    pairs = sorted(((likely[i, j], i, j) for i in range(40) for j in range(i + 24, 40)), reverse=True)[:40]
    places = np.zeros((40, 3))
    _, first, second = pairs[0]
    places[[first, second], 0] = 100, 104  # these two alone, and all others, are near each other
    near = sum({i, j}.isdisjoint({first, second}) or {i, j} == {first, second} for _, i, j in pairs)
    assert hub.contact_precision(model, tokenizer, [(sequence, places)]) == pytest.approx(near / 40)
    assert 0 < near < 40


def test_jaccard_is_that_of_the_head_that_fits_best():
    transformers = pytest.importorskip("transformers", reason="comes with get-local[demo]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=64, patch_size=16, **sizes)).eval()
    torch.nn.init.normal_(model.layers[-1].attention.q_proj.weight, std=3)
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    objects = np.zeros((64, 96), bool)
    objects[:32, 16:48] = True  # of the middle square the upper left quarter
    model.set_attn_implementation("eager")
    images, _ = models.prepare(picture, size=64, patch=16)
    with torch.no_grad():
        rows = model(images, output_attentions=True).attentions[-1][0, :, 0, 1:]
    best = 0.0
    for weights in rows:
        kept, mass = set(), 0.0
        while mass < 0.6 * weights.sum():
            kept.add(max(set(range(16)) - kept, key=weights.__getitem__))
            mass = weights[list(kept)].sum()
        best = max(best, len(kept & {0, 1, 4, 5}) / len(kept | {0, 1, 4, 5}))
    model.set_attn_implementation("sdpa")
    assert hub.jaccard(model, [(picture, objects)], size=64) == pytest.approx(best)


@pytest.mark.slow
def test_smollm2_copies_by_the_heads_that_the_page_names(smollm2):
    """(18, 6) is the best at both: what it does with random tokens it does with a sentence hidden in a real text."""
    model, tokenizer = smollm2
    found = {
        "induction": hub.induction(model),
        "real": hub.induction_of_text(model, tokenizer),
        "retrieval": torch.stack([hub.retrieval(model, tokenizer, depth=depth) for depth in (0.1, 0.5, 0.9)]).mean(0),
    }
    for name, heads in hub.SMOLLM2.items():
        best = [divmod(place, 9) for place in found[name].flatten().topk(3).indices.tolist()]
        assert list(heads) == best, name
        assert [found[name][head].item() for head in best] == pytest.approx(list(heads.values()), abs=0.01)


def test_the_page_ends_in_what_the_commands_and_scores_are():
    page = PAGE.read_text(encoding="utf-8")
    assert page.endswith(whole({}).partition("\n## With")[2])

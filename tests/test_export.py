"""Maps as a table: `to_frame` and `to_csv` of what `attention` and `capture` recorded."""

import builtins
import csv
import math
import os

import numpy as np
import pytest
import torch

from visualizer import AttentionMap, VisualizerWarning, attention, capture, load
from visualizer.layout import Layout

pandas = pytest.importorskip("pandas", reason="pandas is not installed")

WEIGHTS = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3, 4)).astype(np.float32)  # 2 texts, 3 heads, 4 queries
COLUMNS = ["layer", "module", "head", "query", "key", "weight"]


def captured(*values, keep="numpy"):
    """What is captured of a function that has these values, one after the other, under one key."""

    def attend(value):
        attn = value
        return "done" if attn is None else None

    with capture(attend, "attn", keep=keep) as found:
        for value in values:
            attend(value)
    return found


@pytest.fixture(scope="module")
def maps():
    """Of two layers with two heads and four tokens, computed from query and key."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, num_layers=2).eval()
    with torch.no_grad(), attention(model) as found:
        model(torch.randn(1, 4, 16))
    return found


def read(path, delimiter=","):
    with open(path, encoding="utf-8", newline="") as file:
        return [*csv.reader(file, delimiter=delimiter)]


class TestFrame:
    def test_every_weight_has_its_row(self, maps):
        found = maps.to_frame()
        assert [*found.columns] == COLUMNS
        assert len(found) == 2 * 2 * 4 * 4
        dense = [one.dense() for one in maps]
        for row in found.itertuples():
            assert row.module == maps.paths[row.layer]
            assert row.weight == dense[row.layer][0, row.head, row.query, row.key]

    def test_captured_maps_of_two_texts(self):
        found = captured(WEIGHTS).to_frame()
        assert [*found.columns] == ["layer", "module", "batch", *COLUMNS[2:]]
        assert set(found.module) == {"captured.<locals>.attend"}
        for row in found.itertuples():
            assert row.weight == WEIGHTS[row.batch, row.head, row.query, row.key]
        assert found.weight.dtype == np.float32

    @pytest.mark.parametrize("value", [WEIGHTS[0], WEIGHTS[0, 0]], ids=["heads", "one head"])
    def test_axes_that_are_left_out_have_length_one(self, value):
        found = captured(value).to_frame()
        assert [*found.columns] == COLUMNS
        assert np.array_equal(found.weight, value.ravel())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64])
    def test_tensors_of_any_type(self, dtype):
        weights = torch.tensor([[0.75, 0.25], [0.0, 1.0]]).to(dtype)
        found = captured(weights.requires_grad_(dtype.is_floating_point), keep="graph").to_frame(top=2)
        assert found[found["query"] == 1].weight.tolist() == [1, 0]

    def test_several_calls_of_a_module(self):
        found = captured(WEIGHTS[0], WEIGHTS[1]).to_frame()
        assert [*found.columns] == ["layer", "module", "call", *COLUMNS[2:]]
        assert np.array_equal(found[found.call == 1].weight, WEIGHTS[1].ravel())

    def test_the_best_keys_of_each_query(self):
        found = captured(WEIGHTS).to_frame(top=2)
        weights, keys = torch.from_numpy(WEIGHTS).topk(2)
        assert np.array_equal(found.weight, weights.flatten())
        assert np.array_equal(found.key, keys.flatten())
        assert len(captured(WEIGHTS).to_frame(top=100)) == WEIGHTS.size

    def test_a_choice(self, maps):
        found = maps.to_frame(layers=-1, heads=[1], queries=[-1, 0], top=1)
        assert found[["layer", "head", "query"]].to_numpy().tolist() == [[1, 1, 3], [1, 1, 0]]
        assert found.equals(maps.to_frame(layers="layers.1.*", heads=1, queries=(3, 0), top=1))
        assert maps.to_frame(layers=[0, maps.paths[1]]).equals(maps.to_frame())
        assert len(maps.to_frame(queries=[])) == 0

    def test_words(self, maps):
        found = maps.to_frame(tokens=["the", "cat", "它", ""], layers=0, heads=0)
        assert [*found.columns] == [*COLUMNS, "query_token", "key_token"]
        assert found.query_token.tolist()[4:8] == ["cat"] * 4
        assert found.key_token.tolist()[:4] == ["the", "cat", "它", ""]

    def test_words_that_the_maps_know(self):
        """Each text has its own."""
        one = AttentionMap(WEIGHTS)
        one.layout = Layout.batch([Layout.text(list("abcde")), Layout.text(list("vwxyz"))])
        found = captured(one, keep="graph").to_frame(top=1)
        assert found.key_token.tolist() == [("abcde", "vwxyz")[row.batch][row.key] for row in found.itertuples()]
        assert set(found.query_token) == {""}
        assert [*captured(one, keep="graph").to_frame(key_tokens=range(5)).key_token[:5]] == list("01234")

    def test_words_of_each_side(self):
        found = captured(WEIGHTS[0]).to_frame(query_tokens=list("abcd"), key_tokens=range(5), top=1, heads=0)
        assert found.query_token.tolist() == list("abcd")
        assert found.key_token.tolist() == [str(key) for key in found.key]
        only = captured(WEIGHTS[0]).to_frame(key_tokens=list("vwxyz"), heads=0, queries=0)
        assert only.query_token.tolist() == [""] * 5

    def test_after_a_file(self, maps, tmp_path):
        maps.save(tmp_path / "x.safetensors")
        assert load(tmp_path / "x.safetensors").to_frame().equals(maps.to_frame())

    def test_without_pandas(self, maps, monkeypatch, tmp_path):
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name.partition(".")[0] == "pandas":
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(ImportError, match=r"pandas is not installed: pip install pandas.*to_csv"):
            maps.to_frame()
        maps.to_csv(tmp_path / "x.csv")


class TestFile:
    def test_it_is_the_table(self, maps, tmp_path):
        maps.to_csv(tmp_path / "x.csv")
        found = pandas.read_csv(tmp_path / "x.csv")
        expected = maps.to_frame()
        assert found.weight.astype(np.float32).tolist() == expected.weight.tolist()  # to the last bit
        assert found.drop(columns="weight").astype(str).equals(expected.drop(columns="weight").astype(str))

    def test_double_precision(self, tmp_path):
        weights = WEIGHTS[0].astype(np.float64) / 3
        captured(weights).to_csv(tmp_path / "x.csv")
        assert [float(row[-1]) for row in read(tmp_path / "x.csv")[1:]] == weights.ravel().tolist()

    @pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.tsv", "\t"), ("x", ","), ("x.maps", ",")])
    def test_words_of_any_kind(self, tmp_path, name, delimiter):
        words = ["a,b", 'c"d', "e\tf", "g\nh", "它"]
        weights = np.eye(5, dtype=np.float32)
        captured(weights).to_csv(tmp_path / name, tokens=words)
        rows = read(tmp_path / name, delimiter)
        assert rows[0] == [*COLUMNS, "query_token", "key_token"]
        assert [row[-2:] for row in rows[1:6]] == [["a,b", word] for word in words]

    def test_a_name_of_another_format(self, maps, tmp_path):
        with pytest.raises(ValueError, match=r"the suffix of safetensors, and this writes tables.*x\.csv"):
            maps.to_csv(tmp_path / "x.safetensors")
        with pytest.raises(IsADirectoryError):
            maps.to_csv(tmp_path)
        assert os.listdir(tmp_path) == []

    def test_an_error_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "x.csv"
        captured(WEIGHTS).to_csv(path)
        before = path.read_bytes()
        with pytest.raises(TypeError):
            captured(WEIGHTS, "no map").to_csv(path)
        assert path.read_bytes() == before
        with pytest.raises(FileNotFoundError, match=r"y\.csv'"):
            captured(WEIGHTS).to_csv(tmp_path / "missing" / "y.csv")
        assert os.listdir(tmp_path) == ["x.csv"]

    def test_large_maps_are_not_made_at_once(self, tmp_path):
        tokens = torch.randn(1, 8, 512, 8)
        found = captured(AttentionMap.from_query_key(tokens, tokens), keep="graph")
        chunks, rows = [], AttentionMap.rows
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AttentionMap, "rows", lambda *given: chunks.append(rows(*given)) or chunks[-1])
            found.to_csv(tmp_path / "x.csv", top=1)
        assert sum(chunk.shape[2] for chunk in chunks) == 512
        assert max(chunk.nbytes for chunk in chunks) <= 2**18


class TestRefusals:
    def test_a_table_that_is_too_large(self, maps, tmp_path):
        complaint = r"a table of 64 rows, as text about 3\.\d+ kB: choose fewer by layers=.*max_rows="
        with pytest.raises(ValueError, match=complaint):
            maps.to_frame(max_rows=63)
        with pytest.raises(ValueError, match=complaint):
            maps.to_csv(tmp_path / "x.csv", max_rows=63)
        assert os.listdir(tmp_path) == []
        assert len(maps.to_frame(max_rows=64)) == len(maps.to_frame(max_rows=math.inf)) == 64

    def test_a_large_table_is_refused_before_it_is_computed(self):
        """A map of 100,000 tokens: ten billion weights a head."""
        tokens = torch.zeros(1, 1, 100_000, 1)
        found = captured(AttentionMap.from_query_key(tokens, tokens), keep="graph")
        with pytest.raises(ValueError, match=r"10,000,000,000 rows, as text about 6\d\d GB"):
            found.to_frame()

    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            ("text", r"attend' is a str, and a map has the axes"),
            (np.zeros(3), r"attend' is an array of float64, 1 axes"),
            (np.zeros((1, 2, 3, 4, 5)), r"attend' is an array of float64, 5 axes"),
            (np.array([["a"]]), r"attend' is an array of <U1"),
        ],
    )
    def test_what_is_no_map(self, value, complaint):
        with pytest.raises(TypeError, match=complaint):
            captured(value).to_frame()

    def test_nothing(self):
        with pytest.warns(VisualizerWarning, match="nothing was recorded"):
            found = captured()
        with pytest.raises(ValueError, match="no maps for a table: nothing was recorded"):
            found.to_frame()

    @pytest.mark.parametrize(
        ("choice", "error", "complaint"),
        [
            ({"layers": "nothing.*"}, ValueError, r"layers='nothing\.\*' are none of 'layers\.0\.self_attn'"),
            ({"layers": 2}, ValueError, "layers=2 are none of"),
            ({"heads": 2}, IndexError, "has 2 heads, and heads=2 are not among them"),
            ({"queries": [0, -5]}, IndexError, r"has 4 queries, and queries=\[0, -5\] are not"),
            ({"queries": 0.5}, TypeError, "queries=0.5 are no integers"),
            ({"top": 0}, ValueError, "top=0 is how many keys"),
            ({"tokens": ["a"]}, ValueError, "tokens has 1 words, and 'layers.0.self_attn' has 4 queries"),
            ({"key_tokens": ["a"]}, ValueError, "key_tokens has 1 words, and 'layers.0.self_attn' has 4 keys"),
        ],
    )
    def test_what_is_not_there(self, maps, choice, error, complaint):
        with pytest.raises(error, match=complaint):
            maps.to_frame(**choice)

    def test_words_for_two_different_sides(self):
        with pytest.raises(ValueError, match=r"has 4 queries over 5 keys: pass query_tokens= and key_tokens="):
            captured(WEIGHTS).to_frame(tokens=list("abcde"))

"""Files of several processes, which `visualizer.load` reads as one by a pattern of their names."""

import math

import numpy as np
import pytest
import torch
from attention import Attention

import visualizer
from visualizer import AttentionMap, attention, capture
from visualizer.statistics import Entropy, Received, collect


def model():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
    return torch.nn.TransformerEncoder(layer, num_layers=2).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, length, 16, generator=generator) for size, length in ((2, 5), (1, 7), (3, 4), (2, 6))]


def statistics(some, *which):
    return collect(model(), some, *which or (Entropy(), Received()), progress=False)


class TestStatistics:
    def test_parts_are_the_whole(self, tmp_path):
        """What processes found with a share each is what one finds with all."""
        whole = statistics(batches())
        for rank in range(3):
            statistics(batches()[rank::3]).save(tmp_path / f"rank-{rank}.safetensors", {"data": "noise", "rank": rank})
        found = visualizer.load(tmp_path / "rank-*.safetensors")
        assert (8, 4, whole.paths) == (found.samples, found.batches, found.paths)
        assert ["entropy", "received"] == list(found)
        assert {"data": "noise"} == found.about
        for name in whole:
            np.testing.assert_array_equal(whole[name].count, found[name].count)
            for field in ("mean", "variance", "minimum", "maximum"):
                np.testing.assert_allclose(getattr(whole[name], field), getattr(found[name], field), atol=1e-6)
        found.save(tmp_path / "all.safetensors")
        again = visualizer.load(tmp_path / "all.safetensors")
        np.testing.assert_array_equal(found["received"].mean, again["received"].mean)

    def test_of_other_statistics(self, tmp_path):
        statistics(batches()[:1], Entropy()).save(tmp_path / "rank-0.safetensors")
        statistics(batches()[1:], Received()).save(tmp_path / "rank-1.safetensors")
        with pytest.raises(ValueError, match="different statistics"):
            visualizer.load(tmp_path / "rank-*.safetensors")


NUMBERS = (10, 0, 2)  # in the order they are written


class TestValues:
    def write(self, folder, number, about):
        module = Attention()
        with capture(Attention.forward, "attn") as cache:
            for call in range(2):
                module(torch.full((1, 3 + call, 8), float(number)))
        [values] = cache.values()
        cache.save(folder / f"rank-{number}.safetensors", about)
        return values

    def test_they_come_file_by_file_with_numbers_by_their_size(self, tmp_path):
        written = {number: self.write(tmp_path, number, {"run": "a", "rank": number}) for number in NUMBERS}
        found = visualizer.load(str(tmp_path / "rank-*.safetensors"))
        [values] = found.values()
        expected = [value for number in sorted(NUMBERS) for value in written[number]]
        assert 6 == len(values)
        for one, other in zip(expected, values, strict=True):
            np.testing.assert_array_equal(one, other)
        assert [0, 1, 2, 3, 4, 5] == [record.call for record in found.records]

    def test_about_is_what_all_agree_on(self, tmp_path):
        for number in NUMBERS:
            about = {
                "run": "a",
                "rank": number,
                "grid": np.arange(3),
                "sizes": [np.arange(number)],
                "tokens": ["a", "b"],
                "none": None,
            }
            self.write(tmp_path, number, about | ({"own": 1} if number == 0 else {}))
        found = visualizer.load(tmp_path / "rank-*.safetensors")
        assert {"run": "a", "tokens": ["a", "b"], "none": None} == {
            key: value for key, value in found.about.items() if key != "grid"
        }
        np.testing.assert_array_equal(np.arange(3), found.about["grid"])

    def test_keys_are_those_of_all(self, tmp_path):
        """A function that was captured in one process only is there."""

        def other(x):
            y = x + 1
            return y

        first = self.write(tmp_path, 0, {})
        with capture(other, "y") as cache:
            other(torch.ones(2))
        cache.save(tmp_path / "rank-1.safetensors")
        found = visualizer.load(tmp_path / "rank-*.safetensors")
        (_, values), (key, [value]) = found.items()
        assert len(first) == len(values)
        assert "other" in key
        np.testing.assert_array_equal([2, 2], value)


class TestMaps:
    def test_they_come_file_by_file(self, tmp_path):
        layers, written = model(), {}
        for number in NUMBERS:
            with attention(layers) as maps, torch.no_grad():
                layers(torch.randn(1, 3, 16))
            written[number] = [layer.numpy() for layer in maps]
            maps.save(tmp_path / f"rank-{number}.safetensors", {"rank": number, "run": "a"})
        found = visualizer.load(tmp_path / "rank-*.safetensors")
        expected = [layer for number in sorted(NUMBERS) for layer in written[number]]
        assert (6, {"run": "a"}) == (len(found), found.about)
        assert all(isinstance(layer, AttentionMap) for layer in found)
        for one, layer in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, layer.numpy(), atol=1e-7)
        calls = found.calls("layers.1.self_attn")
        assert 3 == len(calls)
        np.testing.assert_allclose(written[2][1], calls[1].numpy(), atol=1e-7)


def test_files_of_several_kinds_are_refused(tmp_path):
    statistics(batches()).save(tmp_path / "rank-0.safetensors")
    TestValues().write(tmp_path, 1, {})
    with pytest.raises(ValueError, match=r"of one kind, but .*rank-0\.safetensors has statistics, .*1\.\w+ has values"):
        visualizer.load(tmp_path / "rank-*.safetensors")


def test_no_file_is_like_the_pattern(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches .*rank-"):
        visualizer.load(tmp_path / "rank-*.safetensors")
    with pytest.raises(FileNotFoundError):
        visualizer.load(tmp_path / "rank-0.safetensors")


def test_a_pattern_of_one_file_is_that_file(tmp_path):
    [*written] = TestValues().write(tmp_path, 7, {"rank": 7})
    found = visualizer.load(tmp_path / "rank-?.safetensors")
    assert {"rank": 7} == found.about
    assert len(written) == len(next(iter(found.values())))


@pytest.mark.filterwarnings("ignore:nothing was recorded")
def test_a_file_whose_name_has_brackets_opens(tmp_path):
    """Though as a pattern it would be another's."""
    for name, value in (("run[1].safetensors", 1.0), ("run1.safetensors", math.e)):
        with capture(Attention.forward, "attn") as cache:
            pass
        cache.save(tmp_path / name, {"value": value})
    assert {"value": 1.0} == visualizer.load(tmp_path / "run[1].safetensors").about
    assert {"value": math.e} == visualizer.load(tmp_path / "run1.safetensors").about


@pytest.mark.filterwarnings("ignore:nothing was recorded")
@pytest.mark.parametrize("kind", ["values", "maps"])
def test_files_without_anything_have_no_say(tmp_path, kind):
    """A process that had no batch writes an empty file."""
    if kind == "values":
        TestValues().write(tmp_path, 1, {"run": "a"})
        with capture(Attention.forward, "attn") as empty:
            pass
    else:
        layers = model()
        with attention(layers) as maps, torch.no_grad():
            layers(torch.ones(1, 3, 16))
        maps.save(tmp_path / "rank-1.safetensors", {"run": "a"})
        empty = attention(layers)
    empty.save(tmp_path / "rank-0.safetensors", {"run": "a"})
    found = visualizer.load(tmp_path / "rank-*.safetensors")
    assert ({"run": "a"}, 2) == (found.about, len(next(iter(found.values())) if kind == "values" else found))

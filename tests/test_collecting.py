"""`collect`: whatever holds batches, batches that fail, models that need care."""

import itertools
import sys
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from collected_by_hand import ALIKE, Failing, Stream, check_entropy, entropies, pictures, quietly, stopping
from ranks import WIDTH, Looking, difference, texts
from torch import nn
from torch.utils.data import DataLoader, Dataset

from visualizer import VisualizerWarning, load
from visualizer.statistics import Entropy, MeanMap, Received, Sink, Statistic, collect, collected


class TestBatches:
    DATA = pictures(4)

    def check(self, found):
        check_entropy(found, self.DATA)
        assert (4, []) == (found.batches, found.failed)

    def test_of_any_iterable(self):
        named = namedtuple("Batch", "image label")
        for batches in (
            self.DATA,
            list(self.DATA),
            (batch for batch in self.DATA),
            map(torch.clone, self.DATA),
            [(batch, 0) for batch in self.DATA],
            [[batch] for batch in self.DATA],
            [named(batch, 0) for batch in self.DATA],
            [{"x": batch} for batch in self.DATA],
            DataLoader(self.DATA.flatten(0, 1), batch_size=3),
            DataLoader(Stream(self.DATA), batch_size=None),
        ):
            self.check(collect(Looking(), batches, Entropy()))

    def test_with_a_call_of_ones_own(self):
        """It gets a batch of the type that it has."""
        named = namedtuple("Batch", "label image")
        batches = [named(0, {"raw": batch}) for batch in self.DATA]
        self.check(collect(Looking(), batches, Entropy(), call=lambda model, batch: model(batch.image["raw"])))

    def test_of_what_moves_itself(self):
        """As the batches of transformers' tokenizers do, which have their type still when the model is called."""

        class Batch(dict):
            def to(self, device):
                places.append(device)
                return Batch(self, is_moved=True)

        def call(model, batch):
            assert isinstance(batch, Batch) and batch["is_moved"]
            model(batch["x"])

        places = []
        self.check(collect(Looking(), [Batch(x=batch) for batch in self.DATA], Entropy(), call=call))
        assert 4 * [torch.device("cpu")] == places

    def test_on_the_models_device(self):
        """Of parameters on the meta device nothing is known: accelerate keeps those elsewhere."""
        model = Looking()
        model.place = nn.Parameter(torch.zeros(1, device="meta"))
        self.check(collect(model, self.DATA, Entropy()))
        assert "place" == next(iter(model._parameters))

    def test_in_mixed_precision(self):
        with torch.autocast("cpu", torch.bfloat16):
            found = collect(Looking(), self.DATA, Entropy(), MeanMap())
        exact = collect(Looking(), self.DATA, Entropy(), MeanMap())
        for name, moments in found.items():
            np.testing.assert_allclose(moments.mean, exact[name].mean, atol=0.03)
            assert not np.array_equal(moments.mean, exact[name].mean)

    def test_of_a_compiled_model(self):
        compiled = torch.compile(Looking(), backend="eager")
        found = collect(compiled, self.DATA, Entropy())
        self.check(found)
        assert ("layers.0", "layers.1") == found.paths

    def test_no_map_outlives_its_call(self):
        class Watching(Entropy):
            def of(self, layer, tokens):
                assert not any(known() for known in seen)
                seen.append(weakref.ref(layer))
                return super().of(layer, tokens)

        seen = []
        collect(Looking(), self.DATA, Watching())
        assert 8 == len(seen)

    def test_the_model_and_the_statistics_stay_as_they_are(self):
        model, statistic = Looking(), Entropy()
        model.layers[0].eval()
        collect(model, self.DATA, statistic)
        assert [True, False, True] == [model.training, model.layers[0].training, model.layers[1].training]
        assert 0 == statistic.moments.numel()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_layers_are_calls_in_order(self):
        """As in ALBERT, where one module runs in every layer."""

        class Shared(Looking):
            def forward(self, x):
                for _ in range(3):
                    self.layers[0](x)
                self.layers[1](x)

        found = collect(Shared(), self.DATA, Entropy())
        assert (*3 * ["layers.0"], "layers.1") == found.paths
        first, second = entropies(self.DATA).mean(0)
        np.testing.assert_allclose(found["entropy"].mean, [first, first, first, second], atol=1e-6)

    def test_what_was_asked_for_wrongly(self):
        for what, wrong in (("the class Entropy", Entropy), ("'entropy'", "entropy")):
            with pytest.raises(TypeError, match=rf"such as Entropy\(\).*, not {what}"):
                collect(Looking(), self.DATA, wrong)
        with pytest.raises(TypeError, match=r"those of an nn\.Module, not of a builtin"):
            collect(abs, self.DATA, Entropy())
        with pytest.raises(ValueError, match="pass the statistics"):
            collect(Looking(), self.DATA)
        with pytest.raises(ValueError, match=r"two statistics have one name.*name="):
            collect(Looking(), self.DATA, Sink(), Sink(1))
        with pytest.raises(ValueError, match="every=0: pass how many batches, 1 or more"):
            collect(Looking(), self.DATA, Sink(), every=0)
        with pytest.raises(ValueError, match="no batch gave statistics: there were none"):
            collect(Looking(), [], Sink())
        with pytest.raises(KeyError, match="no statistic 'sink'; there are 'entropy'"):
            collect(Looking(), self.DATA, Entropy())["sink"]


class Folder(Dataset):
    """Single pictures, of which some fail."""

    def __init__(self, data, bad=()):
        self.data, self.bad = data.flatten(0, 1), bad

    def __len__(self):
        return len(self.data)

    def __getitem__(self, number):
        if number in self.bad:
            raise OSError(f"{number} is damaged")
        return self.data[number]


class TestProgress:
    def shown(self, capsys, monkeypatch, is_terminal, **kwargs):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
        collect(Looking(), pictures(4), Entropy(), **kwargs)
        out, err = capsys.readouterr()
        assert "" == out
        return err

    def test_on_terminals(self, capsys, monkeypatch):
        assert "4/4" in self.shown(capsys, monkeypatch, True)

    def test_nowhere_else(self, capsys, monkeypatch):
        assert "" == self.shown(capsys, monkeypatch, False)

    def test_not_where_it_is_not_wanted(self, capsys, monkeypatch):
        assert "" == self.shown(capsys, monkeypatch, True, progress=False)

    def test_what_is_done_is_no_progress(self, capsys, monkeypatch, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            collect(Looking(), stopping(pictures(4), 2), Entropy(), checkpoint=tmp_path, every=2)
        told = self.shown(capsys, monkeypatch, True, checkpoint=tmp_path)
        assert "2/4" in told and "4/4" in told and "0/4" not in told


class Picky(Statistic):
    """It fails where a picture has a NaN, in the second layer."""

    def of(self, layer, tokens):
        if layer.path == "layers.1" and layer.dense().isnan().any():
            raise ArithmeticError("no number")
        return layer.dense().amax((-1, -2))


class TestBatchesThatFail:
    DATA = pictures(6)

    def check(self, found, bad, why):
        """It is as if the data had never had those."""
        good = [number for number in range(6) if number not in bad]
        assert [(number, why.format(number=number)) for number in bad] == found.failed
        assert len(good) == found.batches
        check_entropy(found, self.DATA[good])
        return found

    def test_in_the_model(self):
        """Half-way through its layers, which leaves no trace."""
        found = self.check(quietly(Failing(0, 3), self.DATA, Entropy()), [0, 3], "ArithmeticError: too hot")
        assert "12 images or texts in 4 batches, 2 failed" in repr(found)

    def test_each_is_warned_about_once(self):
        with pytest.warns(VisualizerWarning) as told:
            collect(Failing(1, 3), self.DATA, Entropy())
        numbers = 1, 3
        way = "(docs/errors.md#failed-batch)"
        assert [f"batch {number} failed and does not count: ArithmeticError: too hot {way}" for number in numbers] == [
            str(warning.message) for warning in told
        ]
        assert {__file__} == {warning.filename for warning in told}

    def test_in_a_statistic(self):
        data = self.DATA.clone()
        data[2, 1] = torch.nan
        found = quietly(Looking(), data, Entropy(), Picky())
        [(number, why)] = found.failed
        assert (2, "ArithmeticError: no number") == (number, why.partition("\n")[0])
        check_entropy(found, self.DATA[[0, 1, 3, 4, 5]])
        assert {15} == {*found["picky"].count.flat}

    def test_as_it_is_added(self, monkeypatch):
        """One statistic had it already, and for the next there is no memory."""
        add, times = collected.with_layers, itertools.count()

        def add_or_fail(state, layers):
            if next(times) == 3 * 2 + 1:  # of three statistics, the second of the third batch
                raise MemoryError("no more")
            return add(state, layers)

        monkeypatch.setattr(collected, "with_layers", add_or_fail)
        found = quietly(Looking(), self.DATA, Entropy(), Entropy(name="again"), MeanMap())
        self.check(found, [2], "MemoryError: no more")
        assert {15} == {*found["again"].count.flat} == {*found["mean_map"].count.flat}

    @pytest.mark.parametrize("workers", [0, 1])
    def test_in_a_loader(self, workers):
        loader = DataLoader(Folder(self.DATA, [4, 16]), batch_size=3, num_workers=workers)
        found = quietly(Looking(), loader, Entropy())
        assert [1, 5] == [number for number, _ in found.failed]
        assert all("is damaged" in why for _, why in found.failed)
        check_entropy(found, self.DATA[[0, 2, 3, 4]])

    @pytest.mark.parametrize("bad", [1, 5])
    def test_in_what_ends_with_it(self, bad, tmp_path):
        """A generator has no more behind its error: that what came before be all is not said."""
        for batches in (iter(Stream(self.DATA, [bad])), DataLoader(Stream(self.DATA, [bad]), batch_size=None)):
            with pytest.warns(VisualizerWarning), pytest.raises(OSError, match=f"{bad} is damaged"):
                collect(Looking(), batches, Entropy(), checkpoint=tmp_path, every=1)
            assert bad == load(tmp_path / "rank-0.safetensors").batches
        assert "unfinished" in repr(load(tmp_path / "rank-0.safetensors"))
        self.check(collect(Looking(), iter(Stream(self.DATA)), Entropy(), checkpoint=tmp_path), [], "")

    def test_the_first_three_raise(self):
        with pytest.warns(VisualizerWarning) as told, pytest.raises(ArithmeticError, match="too hot"):
            collect(Failing(*range(99)), self.DATA, Entropy())
        assert 2 == len(told)
        self.check(quietly(Failing(0, 1, 3, 4, 5), self.DATA, Entropy()), [0, 1, 3, 4, 5], "ArithmeticError: too hot")

    def test_all_of_fewer(self):
        with (
            pytest.warns(VisualizerWarning),
            pytest.raises(ValueError, match="1 failed, with ArithmeticError: too hot"),
        ):
            collect(Failing(0), self.DATA[:1], Entropy())

    @pytest.mark.filterwarnings("ignore:batch .* failed")
    def test_a_hundred_in_a_row_raise(self, tmp_path):
        """As of a GPU that hangs; the run goes on behind what was good."""
        data = pictures(120, size=1)
        with pytest.raises(ArithmeticError, match="too hot"):
            collect(Failing(*range(15, 999)), data, Entropy(), checkpoint=tmp_path, every=10)
        found = collect(Failing(), data, Entropy(), checkpoint=tmp_path, every=10)
        assert (120, []) == (found.batches, found.failed)
        check_entropy(found, data)

    def test_with_other_calls(self):
        class Changing(Looking):
            def forward(self, x):
                for layer in self.layers[: 1 if x[0, 0, 0, 0] > 99 else 2]:
                    layer(x)

        data = self.DATA.clone()
        data[3, 0, 0, 0, 0] = 100
        found = quietly(Changing(), data, Entropy())
        self.check(found, [3], found.failed[0][1])
        assert "attention in 1 calls, 'layers.0', and those before in 2, 'layers.0', 'layers.1'" in found.failed[0][1]

    def test_a_model_without_attention(self):
        """Not only at the end of the data."""
        seen = []
        with pytest.warns(VisualizerWarning, match="failed"), pytest.raises(ValueError, match="no attention was seen"):
            collect(nn.Linear(WIDTH, 2), (seen.append(batch) or batch for batch in self.DATA), Entropy())
        assert 3 == len(seen)

    def test_the_model_has_its_mode_back(self):
        model = Failing(*range(99))
        with pytest.warns(VisualizerWarning), pytest.raises(ArithmeticError):
            collect(model, self.DATA, Entropy())
        assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("one", [texts(1)[0], "a text"])
def test_one_batch_is_no_iterable_of_batches(one):
    with pytest.raises(TypeError, match=r"one batch: pass an iterable of such, as \[batch\]"):
        collect(Looking(), one, Entropy())


class TestEncoderAndDecoder:
    def test_each_has_padding_of_its_own(self):
        """The decoder has as many tokens as the encoder, and none of them is padding."""
        from transformers import T5Config, T5Model

        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        model = T5Model(T5Config(**sizes, vocab_size=50, decoder_start_token_id=0)).eval()
        entropies = []
        for length in (7, 8, 9):
            ids = torch.arange(2 * length).reshape(2, length) % 50
            mask = (torch.arange(length) < 4).long().expand(2, length)
            batch = {"input_ids": ids % 4 + 1, "attention_mask": mask, "decoder_input_ids": torch.arange(16).view(2, 8)}
            batch["input_ids"][:, 4:] = 0
            found = collect(model, [batch], Entropy())
            entropies.append(found["entropy"].mean[found.paths.index("decoder.block.0.layer.0.SelfAttention")])
            batch["decoder_attention_mask"] = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
            padded = collect(model, [batch], Entropy())
            assert (padded["entropy"].mean[1] != entropies[-1]).all()
        assert (2, 2) == tuple(padded["entropy"].count[1])
        np.testing.assert_allclose(entropies[0], entropies[1], atol=1e-6)
        np.testing.assert_allclose(entropies[0], entropies[2], atol=1e-6)

    def test_what_a_decoder_attends_to_is_padded_as_in_the_encoder(self):
        from transformers import BartConfig, BartModel

        torch.manual_seed(0)
        sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
        model = BartModel(BartConfig(**sizes, d_model=8, encoder_layers=1, decoder_layers=1, vocab_size=30)).eval()
        found = []
        for length in (6, 7):  # of the decoder: as many as the encoder has, and one more
            mask, own = torch.ones(2, 6, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
            mask[1, 4:], own[0, 2:], own[1, 6:] = 0, 0, 0
            ids, decoder_ids = torch.arange(12).view(2, 6) + 3, torch.arange(2 * length).view(2, length) + 3
            decoder_ids[:, 6:] = 1
            batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
            received = collect(model, [{**batch, "decoder_attention_mask": own}], Received())
            found.append(received["received"].count[received.paths.index("decoder.layers.0.encoder_attn"), 0])
        assert [2, 2, 2, 2, 1, 1] == found[0][:6].tolist() == found[1][:6].tolist()

    def test_a_mask_that_is_added_says_nothing_of_padding(self):
        """What a module of the model's own makes of the mask of the texts, and passes on by that name."""

        class Adding(Looking):
            def forward(self, x, attention_mask=None, **kwargs):
                return self.inner(x, attention_mask=(1.0 - attention_mask) * -1e9)

        model = Adding()
        model.inner = Looking()
        [batch] = texts(1)
        expected, found = (collect(one, [batch], Entropy())["entropy"].mean for one in (Looking(), model))
        np.testing.assert_allclose(expected, found, atol=1e-9)


class TestModelsOfAccelerate:
    """What lies elsewhere is fetched for each call, and the batch goes where the model begins."""

    def check(self, model):
        expected = collect(blocks(), inputs(), Entropy(), Sink())
        assert 2 == len(expected.paths)
        assert difference(expected, collect(model, inputs(), Entropy(), Sink())) < ALIKE

    def test_device_map(self):
        from accelerate import dispatch_model

        self.check(dispatch_model(blocks(), {"": "cpu"}, force_hooks=True))

    def test_offloaded_to_memory(self):
        from accelerate import cpu_offload

        model = cpu_offload(blocks(), torch.device("cpu"))
        assert all(tensor.is_meta for tensor in model.parameters())
        self.check(model)

    def test_offloaded_to_disk(self, tmp_path):
        from accelerate import disk_offload

        model = disk_offload(blocks(), str(tmp_path), torch.device("cpu"))
        assert all(tensor.is_meta for tensor in model.parameters())
        self.check(model)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def inputs():
    return torch.from_numpy(np.random.default_rng(1).normal(size=(3, 2, 5, 8)).astype(np.float32))

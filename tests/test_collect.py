"""Statistics over a data set: what goes wrong is told, and a run that was killed goes on as if it had not been."""

import itertools
import os
import shutil
import signal
import sys
import warnings
import weakref
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import TOKENS, WIDTH, Looking, all_statistics, difference, facts, run, texts, weights_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from visualizer import FileFormatError, VisualizerWarning, attention, load
from visualizer.statistics import Confidence, Entropy, MeanMap, Received, Sink, Statistic, collect, collected

ALIKE = 1e-12
SCALES = 0.5, 2.0  # of the layers of Looking()


def pictures(batches, size=3, seed=0):
    made = np.random.default_rng(seed).normal(size=(batches, size, 2, TOKENS, WIDTH))
    return torch.from_numpy(made.astype(np.float32))


def entropies(data):
    """(samples, layers, heads), of (batches, size, heads, tokens, width)."""
    data = np.asarray(data).reshape(-1, *data.shape[2:])
    layers = [weights_of(data, scale) for scale in SCALES]
    return np.stack([-(weights * np.log(weights)).sum(-1).mean(-1) for weights in layers], 1)


def check_entropy(found, data):
    expected = entropies(data)
    moments = found["entropy"]
    np.testing.assert_array_equal(np.full((2, 2), len(expected)), moments.count)
    np.testing.assert_allclose(moments.mean, expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(moments.variance, expected.var(0, ddof=1), atol=1e-6)
    np.testing.assert_allclose(moments.minimum, expected.min(0), atol=1e-6)
    np.testing.assert_allclose(moments.maximum, expected.max(0), atol=1e-6)
    assert len(expected) == found.samples


def quietly(model, batches, *statistics, **kwargs):
    with pytest.warns(VisualizerWarning, match="failed and does not count"):
        return collect(model, batches, *statistics, **kwargs)


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


class Stream(IterableDataset):
    """Batches without a length, of which some fail."""

    def __init__(self, data, bad=()):
        self.data, self.bad = data, bad

    def __iter__(self):
        for number, batch in enumerate(self.data):
            if number in self.bad:
                raise OSError(f"{number} is damaged")
            yield batch


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


class Failing(Looking):
    """It fails in some calls, between its layers."""

    def __init__(self, *bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def forward(self, x, attention_mask=None, input_ids=None):
        self.layers[0](x)
        self.calls += 1
        if self.calls - 1 in self.bad:
            raise ArithmeticError("too hot")
        self.layers[1](x)


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
        assert [f"batch {number} failed and does not count: ArithmeticError: too hot" for number in numbers] == [
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


def stopping(data, after):
    yield from data[:after]
    raise KeyboardInterrupt


def in_turn(rank, folder):
    return facts(collect(Looking(), pictures(4), Entropy(), checkpoint=folder))


def killed(rank, folder, how, when):
    """A run of ten batches, that ends in the middle of it."""
    if how == "in writing":
        os.fsync = kill_at(when)
    data = texts(10) if how == "in writing" else ending(texts(10), getattr(signal, how), when)
    return facts(collect(Looking(), data, *all_statistics(), checkpoint=folder, every=2))


def kill_at(times):
    def fsync(file):
        nonlocal times
        times -= 1
        if times == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return fsync


def ending(batches, by, when):
    for number, batch in enumerate(batches):
        if number == when:
            os.kill(os.getpid(), by)
        yield batch


class TestCheckpoints:
    def straight(self, **kwargs):
        return collect(Looking(), texts(10), *all_statistics(), **kwargs)

    @pytest.mark.parametrize("how, when, done", [("SIGKILL", 7, 6), ("SIGINT", 5, 5), ("in writing", 4, 4)])
    def test_a_run_that_is_killed_goes_on(self, how, when, done, tmp_path):
        """Killed for real, once in the middle of a writing; the numbers are those of a run that was not."""
        [ended] = run(1, killed, tmp_path, how, when)
        if how == "SIGINT":
            assert isinstance(ended.error, KeyboardInterrupt)
        else:
            assert -signal.SIGKILL == ended.code
        assert done == load(tmp_path / "rank-0.safetensors").batches
        loaded = []
        found = collect(Looking(), counting(texts(10), loaded), *all_statistics(), checkpoint=tmp_path)
        assert difference(self.straight(), found) < ALIKE
        assert difference(found, load(tmp_path / "rank-0.safetensors")) == 0

    def test_only_what_is_left_runs(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            collect(Looking(), stopping(texts(10), 7), *all_statistics(), checkpoint=tmp_path, every=3)
        model = Failing()
        found = collect(model, texts(10), *all_statistics(), checkpoint=tmp_path)
        assert 3 == model.calls  # an interrupted run is written with all that it has done
        assert difference(self.straight(), found) < ALIKE

    def test_failures_are_not_forgotten(self, tmp_path):
        with pytest.warns(VisualizerWarning), pytest.raises(KeyboardInterrupt):
            collect(Failing(1), stopping(pictures(6), 5), Entropy(), checkpoint=tmp_path, every=2)
        model = Failing(0)
        found = quietly(model, pictures(6), Entropy(), checkpoint=tmp_path)
        assert ([1, 5], 1) == ([number for number, _ in found.failed], model.calls)
        check_entropy(found, pictures(6)[[0, 2, 3, 4]])

    def test_is_written_where_the_batch_whose_turn_it_is_fails(self, tmp_path):
        with pytest.warns(VisualizerWarning), pytest.raises(KeyboardInterrupt):
            collect(Failing(1, 3, 5, 7), stopping(pictures(9), 8), Entropy(), checkpoint=tmp_path, every=2)
        assert 4 == load(tmp_path / "rank-0.safetensors").batches

    @pytest.mark.parametrize("data", [[], pictures(2)])
    def test_nothing_that_worked_is_tried_again(self, data, tmp_path):
        with pytest.raises(ValueError, match="no batch gave statistics"), warnings.catch_warnings():
            warnings.simplefilter("ignore", VisualizerWarning)
            collect(Failing(0, 1), data, Entropy(), checkpoint=tmp_path)
        found = collect(Looking(), pictures(4), Entropy(), checkpoint=tmp_path)
        assert 4 == found.batches

    def test_is_of_the_same_data(self, tmp_path):
        collect(Looking(), pictures(3), Entropy(), checkpoint=tmp_path)
        with pytest.raises(ValueError, match=r"with data, by their number .* 3, where this one has 9: choose a new"):
            collect(Looking(), pictures(9), Entropy(), checkpoint=tmp_path)
        assert 3 == collect(Looking(), iter(pictures(9)), Entropy(), checkpoint=tmp_path).batches  # who knows how many

    def test_is_found_again_after_a_change_of_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        def call(model, batch):
            os.chdir("/")
            model(batch)

        collect(Looking(), pictures(3), Entropy(), call=call, checkpoint="run", every=1)
        assert 3 == load(tmp_path / "run" / "rank-0.safetensors").batches

    def test_every_so_many_batches(self, tmp_path):
        seen = []

        def call(model, batch):
            file = tmp_path / "rank-0.safetensors"
            assert [file] == [*tmp_path.iterdir()]
            seen.append(load(file).batches)
            model(batch)

        collect(Looking(), pictures(7), Entropy(), checkpoint=tmp_path, every=3, call=call)
        assert [0, 0, 0, 3, 3, 3, 6] == seen
        assert 7 == load(tmp_path / "rank-0.safetensors").batches

    def test_what_is_finished_is_not_made_again(self, tmp_path):
        def untouched():
            raise AssertionError("it is finished")
            yield

        found = self.straight(checkpoint=tmp_path / "new" / "run")
        again = collect(Looking(), untouched(), *all_statistics(), checkpoint=tmp_path / "new" / "run")
        assert difference(found, again) == 0
        assert repr(found) == repr(again)

    def test_of_other_statistics(self, tmp_path):
        collect(Looking(), pictures(1), Sink(), Entropy(), checkpoint=tmp_path)
        for others in ([Sink()], [Sink(1), Entropy()], [Sink(name="other"), Entropy()], [Sink(), Confidence()]):
            with pytest.raises(
                ValueError, match=r"with statistics .*'sink'.*, where this one has .*: choose a new folder"
            ):
                collect(Looking(), pictures(1), *others, checkpoint=tmp_path)
        assert 3 == collect(Looking(), pictures(1), Entropy(), Sink(), checkpoint=tmp_path).samples

    def test_of_another_model(self, tmp_path):
        """Before anything runs, be it finished or not."""

        def other():
            model = Looking()
            model.layers[0].scale.data += 0.1
            return model

        for number in range(2):
            for model in (Looking(0.5, 2.0, 1.0), other(), nn.Sequential(Looking())):
                seen = []
                with pytest.raises(ValueError, match=r"with a model .*, where this one has .*: choose a new folder"):
                    if not number:
                        with pytest.raises(KeyboardInterrupt):
                            collect(Looking(), stopping(pictures(4), 3), Entropy(), checkpoint=tmp_path, every=1)
                    collect(model, counting(pictures(4), seen), Entropy(), checkpoint=tmp_path)
                assert [] == seen
            collect(Looking(), pictures(4), Entropy(), checkpoint=tmp_path)

    def test_models_of_any_type_are_told_apart(self):
        """Their numbers may not even be there."""
        from visualizer.statistics.collecting import _fingerprint

        def linear(**kwargs):
            torch.manual_seed(0)
            return nn.Linear(8, 8, **kwargs)

        told = {
            _fingerprint(linear()),
            _fingerprint(linear(bias=False)),
            _fingerprint(linear().bfloat16()),
            _fingerprint(linear(device="meta")),
            _fingerprint(nn.LazyLinear(8)),
        }
        assert 5 == len(told)
        assert _fingerprint(linear()) == _fingerprint(nn.parallel.DataParallel(linear()))

    def test_that_is_damaged(self, tmp_path):
        collect(Looking(), pictures(2), Entropy(), checkpoint=tmp_path)
        file = tmp_path / "rank-0.safetensors"
        whole = file.read_bytes()
        for damaged in (b"", whole[:-40], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:50] + b"?" + whole[51:]):
            file.write_bytes(damaged)
            with pytest.raises(FileFormatError, match=r"rank-0\.safetensors.*or remove it"):
                collect(Looking(), pictures(2), Entropy(), checkpoint=tmp_path)
            assert damaged == file.read_bytes()

    def test_that_is_another_file(self, tmp_path):
        model = Looking()
        with attention(model) as maps:
            model(pictures(1)[0])
        maps.save(tmp_path / "rank-0.safetensors")
        with pytest.raises(ValueError, match="no checkpoint of statistics: choose another folder"):
            collect(Looking(), pictures(2), Entropy(), checkpoint=tmp_path)

    def test_in_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        """It is known before the first batch."""
        (tmp_path / "file").touch()
        seen = []
        with pytest.raises(OSError, match="file"):
            collect(Looking(), counting(pictures(2), seen), Entropy(), checkpoint=tmp_path / "file")
        (tmp_path / "taken" / "rank-0.safetensors").mkdir(parents=True)
        with pytest.raises(OSError, match=r"rank-0\.safetensors"):
            collect(Looking(), counting(pictures(2), seen), Entropy(), checkpoint=tmp_path / "taken")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            collect(Looking(), counting(pictures(2), seen), Entropy(), checkpoint=tmp_path / "full")
        assert [] == seen
        assert [] == [*(tmp_path / "full").iterdir()]


def counting(batches, seen):
    for batch in batches:
        seen.append(batch)
        yield batch


class TestMergingFiles:
    def test_files_of_statistics_that_are_not_the_same(self, tmp_path):
        collect(Looking(), pictures(1), Sink()).save(tmp_path / "0.safetensors")
        for number, (model, statistic) in enumerate(
            [(Looking(), Sink(1)), (Looking(), Sink(name="other")), (nn.Sequential(Looking()), Sink())], 1
        ):
            collect(model, pictures(1), statistic).save(tmp_path / f"{number}.safetensors")
            with pytest.raises(ValueError, match="different statistics or models, which cannot be merged"):
                load(tmp_path / f"[0{number}].safetensors")

    def test_files_of_other_weights(self, tmp_path):
        for number, scale in enumerate((0.5, 0.6)):
            collect(Looking(scale, 2.0), pictures(1), Sink()).save(tmp_path / f"{number}.safetensors")
        with pytest.raises(ValueError, match="models with different weights"):
            load(tmp_path / "*.safetensors")

    def of_run(self, folder, count=2):
        """What so many processes leave, and what they found together."""
        parts = run(count, in_turn, folder)
        assert [None] * count == [one.error for one in parts]

    def test_a_run_of_several_that_lacks_one(self, tmp_path):
        for number in range(2):
            self.of_run(tmp_path / f"run-{number}")
        assert 24 == load(tmp_path / "run-*" / "rank-*.safetensors").samples
        (tmp_path / "run-1" / "rank-1.safetensors").unlink()
        with pytest.warns(VisualizerWarning, match="of a run of 2 processes the files of these are missing: 1"):
            load(tmp_path / "run-*" / "rank-*.safetensors")

    def test_parts_beside_the_whole(self, tmp_path):
        self.of_run(tmp_path)
        load(tmp_path / "rank-*.safetensors").save(tmp_path / "whole.safetensors")
        with pytest.raises(ValueError, match="the same run is in several of these"):
            load(tmp_path / "*.safetensors")

    def test_a_copy_of_one(self, tmp_path):
        collect(Looking(), pictures(2), Sink(), checkpoint=tmp_path / "one")
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        with pytest.raises(ValueError, match="the same run is in several of these"):
            load(tmp_path / "*" / "rank-*.safetensors")

    def test_the_whole_of_one_run_and_parts_of_another(self, tmp_path):
        self.of_run(tmp_path)
        collect(Looking(), pictures(3), Entropy()).save(tmp_path / "whole.safetensors")
        assert 21 == load(tmp_path / "*.safetensors").samples

    def test_of_another_rank(self, tmp_path):
        self.of_run(tmp_path)
        (tmp_path / "rank-1.safetensors").write_bytes((tmp_path / "rank-0.safetensors").read_bytes())
        ended = run(2, in_turn, tmp_path)
        assert "with a rank 0, where this one has 1" in str(ended[1].error)

    def test_parts_are_the_whole(self, tmp_path):
        data = pictures(5)
        for number, part in enumerate((data[:1], data[1:], data[:0])):
            if len(part):
                collect(Looking(), part, Entropy(), MeanMap()).save(tmp_path / f"{number}.safetensors")
        merged = load(tmp_path / "*.safetensors")
        assert difference(collect(Looking(), data, Entropy(), MeanMap()), merged) < ALIKE
        check_entropy(merged, data)


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

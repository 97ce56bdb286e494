"""A run that was killed goes on as if it had not been, and only with what it began with."""

import os
import signal
import warnings

import pytest
import torch
from collected_by_hand import ALIKE, Failing, check_entropy, counting, pictures, quietly, stopping
from ranks import Looking, all_statistics, difference, facts, run, texts
from torch import nn

from visualizer import FileFormatError, VisualizerWarning, attention, load
from visualizer.statistics import Confidence, Entropy, Sink, collect


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
    @pytest.mark.slow
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

"""Many processes collect what one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Failing, Looking, all_statistics, difference, facts, fresh, run, texts, values
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from visualizer import VisualizerWarning, load
from visualizer.statistics import Entropy, Received, Sink, collect

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

ALIKE = 1e-6


def alone(batches, **kwargs):
    return collect(Looking(), batches, *all_statistics(), **kwargs)


class Texts(Dataset):
    """Single texts, of as many batches."""

    def __init__(self, batches):
        self.parts = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(3)]

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, number):
        return self.parts[number]


def in_turn(rank, count):
    return facts(alone(texts(count)))


class TestProcessesEqualOne:
    @pytest.mark.parametrize("ranks, batches", [(2, 7), (4, 9), (4, 2)])
    def test_each_takes_its_batches_in_turn(self, ranks, batches):
        """Shares are uneven, and of two batches for four processes two are empty."""
        expected = alone(texts(batches))
        for found in values(ranks, in_turn, batches):
            assert difference(expected, found) < ALIKE

    @pytest.mark.slow
    def test_loaders_that_are_split_are_not_split_again(self):
        expected = alone(texts(8))
        for found in values(2, of_loaders):
            assert {"in turn", "sampler", "batch sampler", "accelerate", "own", "all"} == found.keys()
            again = found.pop("all")
            for name, one in found.items():
                assert difference(expected, one) < ALIKE, name
            assert (48, 16) == (again.samples, again.batches)
            np.testing.assert_allclose(again.moments["entropy"].mean, expected["entropy"].mean, atol=ALIKE)

    def test_failed_batches_have_the_numbers_that_they_have_in_one(self):
        with pytest.warns(VisualizerWarning, match="batch"):
            expected = alone(with_bad(7))
        assert [4, 5] == [number for number, _ in expected.failed]
        for found in values(2, with_failures):
            assert expected.failed == found.failed
            assert difference(expected, found) < ALIKE

    def test_by_torchmetrics_own_merging(self):
        """A statistic alone, updated in each process, the last of which has nothing."""
        expected = [Entropy(), Received()]
        for weights in shares():
            for statistic in expected:
                statistic.update(weights)
        for found in values(3, by_metrics):
            for one, moments in zip(expected, found, strict=True):
                whole = one.compute()
                np.testing.assert_array_equal(whole.count, moments.count)
                for name in ("mean", "variance", "minimum", "maximum"):
                    np.testing.assert_allclose(getattr(moments, name), getattr(whole, name), atol=ALIKE)


def of_loaders(rank):
    from accelerate import Accelerator

    data = Texts(texts(8))
    sampler = DistributedSampler(data, shuffle=False)
    plain = DataLoader(data, batch_size=3)
    loaders = {
        "in turn": plain,
        "sampler": DataLoader(data, batch_size=3, sampler=sampler),
        "batch sampler": DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 3, False)),
    }
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    loaders["accelerate"] = accelerator.prepare(plain)
    found = {name: facts(alone(loader)) for name, loader in loaders.items()}
    found["own"] = facts(alone(texts(8)[rank * 5 : rank * 3 + 5], is_share=True))
    found["all"] = facts(alone(texts(8), is_share=True))
    return found


def with_bad(count):
    batches = texts(count)
    for number in (4, 5):
        batches[number]["x"] = batches[number]["x"][0, 0, 0]
    return batches


def with_failures(rank):
    with pytest.warns(VisualizerWarning, match="batch"):
        return facts(alone(with_bad(7)))


def shares():
    made = np.random.default_rng(3).random((2, 2, 3, 2, 5, 5))
    return list(torch.from_numpy(made / made.sum(-1, keepdims=True)))


def by_metrics(rank):
    statistics = [Entropy(), Received()]
    for statistic in statistics:
        if rank < 2:
            statistic.update(shares()[rank])
    if rank < 2:
        return [statistic.compute() for statistic in statistics]
    with pytest.warns(UserWarning, match="before the ``update``"):
        return [statistic.compute() for statistic in statistics]


def resumed(rank, folder, good):
    model = Looking() if good is None or rank == 0 else Failing(good, "dies")
    return facts(collect(model, texts(9), *all_statistics(), timeout=5, checkpoint=folder, every=2))


def untouched(rank, folder):
    class Data:
        def __iter__(self):
            raise AssertionError("it is finished")

    return facts(collect(Looking(), Data(), *all_statistics(), checkpoint=folder))


class TestCheckpoints:
    @pytest.mark.slow
    def test_a_run_of_two_goes_on(self, tmp_path):
        """One died behind its first writing; the other had finished its share."""
        expected = alone(texts(9))
        ended = run(2, resumed, tmp_path, 3)
        assert [7] == [one.code for one in ended if one.error is None]
        again = values(2, resumed, tmp_path, None)
        for found in again:
            assert difference(expected, found) < ALIKE
        straight = values(2, fresh, tmp_path / "straight")
        assert difference(straight[0], again[0]) < 1e-12
        for found in values(2, untouched, tmp_path):
            assert difference(again[0], found) == 0
        assert difference(again[0], load(tmp_path / "rank-*.safetensors")) < 1e-12

    def test_are_of_as_many_processes(self, tmp_path):
        values(2, fresh, tmp_path)
        with pytest.raises(ValueError, match=r"with a number of processes.* 2, where this one has 1: choose a new"):
            alone(texts(9), checkpoint=tmp_path)

    def test_one_that_is_missing_is_told(self, tmp_path):
        values(2, fresh, tmp_path)
        (tmp_path / "rank-0.safetensors").unlink()
        with pytest.warns(VisualizerWarning, match="of a run of 2 processes the files of these are missing: 0"):
            assert 4 == load(tmp_path / "rank-*.safetensors").batches

    @pytest.mark.slow
    def test_under_torchrun(self, tmp_path):
        script = Path(__file__).with_name("ranks.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*command, str(script), str(tmp_path)], check=True, capture_output=True, timeout=300)
        expected = alone(texts(7))
        assert ["rank-0.safetensors", "rank-1.safetensors"] == sorted(os.listdir(tmp_path / "run"))
        for name in ("merged-0.safetensors", "merged-1.safetensors", "run/rank-*.safetensors"):
            assert difference(expected, load(tmp_path / name)) < ALIKE

    def test_processes_of_torchrun_that_do_not_know_each_other(self, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RuntimeError, match=r"started 2 processes.*init_process_group"):
            alone(texts(1))


class Trained(Looking):
    """With more buffers, which DistributedDataParallel sends around before each forward pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(9)

    def forward(self, x, **kwargs):
        self.norm(x[:, 0])
        return super().forward(x, **kwargs)


def wrapped(rank, count):
    model = nn.parallel.DistributedDataParallel(Trained())
    share = texts(count) if rank else []
    found = facts(collect(model, share, *all_statistics(), is_share=True, timeout=20))
    assert model.require_forward_param_sync and model.training
    return found


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def pictures(count):
    return torch.from_numpy(np.random.default_rng(1).normal(size=(count, 2, 5, 8)).astype(np.float32))


def sharded(version):
    if version == 1:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(encoder(), device_id=torch.device("cpu"))
    from torch.distributed.fsdp import fully_shard

    model = encoder()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def of_sharded(rank, version, folder):
    """Shares of 3 and 2 batches; then none for the last; and what a killed run leaves."""
    found = [facts(collect(sharded(version), pictures(5), Entropy(), Sink(), timeout=20))]
    for _ in range(2):
        found.append(
            facts(collect(sharded(version), pictures(5), Entropy(), Sink(), timeout=20, checkpoint=folder, every=1))
        )
        if rank == 1:  # as if it had been killed before it wrote anything, and the other not
            before = Path(folder) / "rank-1.safetensors"
            before.unlink(missing_ok=True)
    model, trouble = sharded(version), ""
    try:
        collect(model, pictures(1), Entropy(), timeout=20)
    except ValueError as error:
        trouble = str(error)
    return found, trouble


class Brittle(nn.Module):
    def __init__(self, module, is_bad):
        super().__init__()
        self.module, self.is_bad = module, is_bad

    def forward(self, x):
        if self.is_bad:
            raise ArithmeticError("no more of it")
        return self.module(x)


def one_shard_fails(rank, version):
    return facts(collect(Brittle(sharded(version), rank == 1), pictures(9), Entropy(), timeout=20))


class TestModels:
    def test_distributed_data_parallel(self):
        """The first process, from which the second would wait for the buffers, has no forward pass at all."""
        expected = collect(Trained(), texts(5), *all_statistics())
        assert ("layers.0", "layers.1") == expected.paths
        for found in values(2, wrapped, 5):
            assert difference(expected, found) < ALIKE

    @pytest.mark.parametrize("version", [1, 2])
    def test_fully_sharded(self, version, tmp_path):
        expected = collect(encoder(), pictures(5), Entropy(), Sink())
        for all_found, trouble in values(2, of_sharded, version, tmp_path, seconds=120):
            for found in all_found:
                assert difference(expected, found) < ALIKE
            assert "1 of 2 processes have no batch, and a sharded model runs on all at once" in trouble

    @pytest.mark.parametrize("version", [1, 2])
    def test_fully_sharded_and_one_fails(self, version):
        """It cannot go on without the others, which are in the middle of the model, nor they without it."""
        ended = run(2, one_shard_fails, version)
        assert isinstance(ended[1].error, ArithmeticError)
        assert isinstance(ended[0].error, RuntimeError)

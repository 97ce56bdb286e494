"""Files of statistics: those of one run or of several make one, and no sample counts twice."""

import shutil

import pytest
from collected_by_hand import ALIKE, check_entropy, pictures
from ranks import Looking, difference, facts, run
from torch import nn

from visualizer import FileFormatError, VisualizerWarning, load
from visualizer.statistics import Entropy, MeanMap, Sink, collect
from visualizer.store.files import write


def in_turn(rank, folder):
    return facts(collect(Looking(), pictures(4), Entropy(), checkpoint=folder))


def test_a_file_from_before_labels_were_kept_says_so(tmp_path):
    saved = collect(Looking(), pictures(1), Sink()).saved()
    del saved.about["statistics"]["labels"]
    write(tmp_path / "old.safetensors", saved)
    with pytest.raises(FileFormatError, match=r"lack 'labels'.*Collect them again"):
        load(tmp_path / "old.safetensors")


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

    @pytest.mark.slow
    def test_a_run_of_several_that_lacks_one(self, tmp_path):
        for number in range(2):
            self.of_run(tmp_path / f"run-{number}")
        assert 24 == load(tmp_path / "run-*" / "rank-*.safetensors").samples
        (tmp_path / "run-1" / "rank-1.safetensors").unlink()
        with pytest.warns(VisualizerWarning, match="of a run of 2 processes the files of these are missing: 1"):
            load(tmp_path / "run-*" / "rank-*.safetensors")

    @pytest.mark.slow
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

    @pytest.mark.slow
    def test_the_whole_of_one_run_and_parts_of_another(self, tmp_path):
        self.of_run(tmp_path)
        collect(Looking(), pictures(3), Entropy()).save(tmp_path / "whole.safetensors")
        assert 21 == load(tmp_path / "*.safetensors").samples

    @pytest.mark.slow
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

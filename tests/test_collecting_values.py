"""`collect`: its numbers are those of the maps that `attention` keeps, counted by hand."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from statistics_by_hand import (
    Batch,
    close,
    confidence_by_hand,
    entropy_by_hand,
    mean_map_by_hand,
    moments_by_hand,
    received_by_hand,
    sink_by_hand,
)
from zoo import PADDING, SIZE, SMALL, TEXT, timm_model, transformers_model

import visualizer
from visualizer import AttentionMap, attention
from visualizer.statistics import (
    Confidence,
    Distance,
    Entropy,
    MeanMap,
    Received,
    Sink,
    collect,
)


def vit(fused=True):
    torch.manual_seed(0)
    model = timm_model("vit_small_patch16_224", fused=fused, **SMALL)
    for block in model.blocks:
        block.attn.qkv.weight.data *= 40  # with which it attends to some patches more than to others
    return model


def pictures(count, seed=0):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def kept_maps(model, *calls):
    """The weights of each call in float64: a list of (layers, batch, heads, queries, keys)."""
    found = []
    for call in calls:
        with attention(model) as maps, torch.no_grad():
            call(model)
        found.append(np.array([layer.dense().double().numpy() for layer in maps]))
    return found


def by_hand(weights, function, real=None):
    """(layers, batch, heads, ...)."""
    real = np.ones((weights.shape[1], weights.shape[-1]), bool) if real is None else real.numpy().astype(bool)
    return np.array(
        [[[function(head, own, None) for head in text] for text, own in zip(layer, real)] for layer in weights]
    )


class TestCollect:
    """The values; failures, checkpoints and processes are tested beside this."""

    SIZES = (3, 1, 4)

    def batches(self):
        return [pictures(size, seed=size) for size in self.SIZES]

    def expected(self, model, function):
        maps = kept_maps(model, *(lambda model, batch=batch: model(batch) for batch in self.batches()))
        return moments_by_hand([by_hand(weights, function) for weights in maps])

    @pytest.mark.parametrize("fused", [False, True], ids=["open", "fused"])
    def test_of_pictures(self, fused):
        model = vit(fused)
        found = collect(model, self.batches(), Entropy(), Received(), MeanMap(), progress=False)
        assert ["entropy", "received", "mean_map"] == list(found)
        assert (8, 3, []) == (found.samples, found.batches, found.failed)
        assert ("blocks.0.attn", "blocks.1.attn") == found.paths
        close(self.expected(model, entropy_by_hand), found["entropy"], 1e-5)
        close(self.expected(model, received_by_hand), found["received"], 1e-6)
        close(self.expected(model, mean_map_by_hand), found["mean_map"], 1e-6)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_of_texts_with_padding(self, implementation):
        torch.manual_seed(0)
        model = transformers_model("Bert", attention=implementation, **SIZE, **TEXT)
        ids = [torch.randint(0, 50, (2, length)) for length in (5, 7)]
        masks = [PADDING, torch.ones(2, 7, dtype=torch.long)]
        batches = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids, masks, strict=True)]
        found = collect(model, batches, Entropy(), Sink(), Received(), progress=False)
        maps = kept_maps(model, *(lambda model, batch=batch: model(**batch) for batch in batches))
        for name, function in (("entropy", entropy_by_hand), ("sink", sink_by_hand(0)), ("received", received_by_hand)):
            samples = [by_hand(weights, function, mask) for weights, mask in zip(maps, masks, strict=True)]
            close(moments_by_hand(samples), found[name], 1e-5)
        np.testing.assert_array_equal([4, 4, 4, 3, 3, 2, 2], found["received"].count[0, 0])

    @pytest.mark.parametrize("kind", ["tensor", "tuples", "lists", "mappings", "generator", "loader", "call"])
    def test_whatever_holds_batches(self, kind):
        model, whole = vit(), pictures(6)
        pairs = [(part, torch.zeros(2)) for part in whole.split(2)]

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(whole)

        batches, call = {
            "tensor": (torch.stack(whole.split(2)), None),
            "tuples": (pairs, None),
            "lists": ([list(pair) for pair in pairs], None),
            "mappings": ([{"x": part} for part, _ in pairs], None),
            "generator": ((part for part, _ in pairs), None),
            "loader": (torch.utils.data.DataLoader(Stream(), batch_size=2), None),
            "call": ([{"image": part} for part, _ in pairs], lambda model, batch: model(batch["image"])),
        }[kind]
        found = collect(model, batches, Confidence(), call=call, progress=False)
        assert (6, 3) == (found.samples, found.batches)
        [weights] = kept_maps(model, lambda model: model(whole))
        close(moments_by_hand([by_hand(weights, confidence_by_hand)]), found["confidence"], 1e-5)

    def test_under_autocast(self):
        """The maps are those of the query and key in half precision, and are themselves of full."""
        model, whole = vit(), pictures(4)
        with torch.autocast("cpu", torch.bfloat16):
            found = collect(model, whole.split(2), Entropy(), progress=False)
            [weights] = kept_maps(model, lambda model: model(whole))
        close(moments_by_hand([by_hand(weights, entropy_by_hand)]), found["entropy"], 1e-5)
        plain = collect(model, whole.split(2), Entropy(), progress=False)["entropy"].mean
        assert 1e-4 < abs(plain - found["entropy"].mean).max() < 1e-1

    def test_of_a_compiled_model(self):
        model, whole = vit(), pictures(4)
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        compiled(whole)
        found = collect(compiled, whole.split(2), Entropy(), progress=False)
        [weights] = kept_maps(model, lambda model: model(whole))
        close(moments_by_hand([by_hand(weights, entropy_by_hand)]), found["entropy"], 1e-5)

    def test_it_leaves_the_model_and_the_statistics_as_they_were(self):
        model = vit()
        model.train()
        model.blocks[0].eval()
        modes = [module.training for module in model.modules()]
        statistic = Entropy()
        statistic.update(Batch(2, 9, 0).maps(True))
        before = statistic.compute()
        found = collect(model, self.batches(), statistic, progress=False)
        assert modes == [module.training for module in model.modules()]
        assert before is statistic.compute()
        assert all(parameter.grad is None for parameter in model.parameters())
        np.testing.assert_array_equal(8, found["entropy"].count)  # without what it had before

    def test_no_map_outlives_its_call(self, monkeypatch):
        alive, most = weakref.WeakSet(), []
        make = AttentionMap.from_source.__func__

        def noted(cls, *args, **kwargs):
            most.append(len(alive))
            made = make(cls, *args, **kwargs)
            alive.add(made)
            return made

        monkeypatch.setattr(AttentionMap, "from_source", classmethod(noted))
        gc.disable()  # by counting references alone
        try:
            found = collect(vit(), self.batches(), Entropy(), Distance(), progress=False)
        finally:
            gc.enable()
        assert 3 * 2 == len(most)
        assert 0 == max(most)
        assert not alive
        assert 8 == found.samples

    def test_it_prints_a_table(self):
        found = collect(vit(), self.batches(), Entropy(), Received(name="by position"), MeanMap(), progress=False)
        assert [
            "<statistics of 8 images or texts in 3 batches",
            "  statistic    numbers                        samples",
            "  entropy      2 layers, 4 heads              8",
            "  by position  2 layers, 4 heads, 17 of each  8",
            "  mean_map     2 layers, 4 heads, 17 x 17     8>",
        ] == repr(found).splitlines()
        assert "by position" in found._repr_html_()

    def test_a_name_that_is_not_there(self):
        found = collect(vit(), self.batches(), Entropy(), Sink(), progress=False)
        with pytest.raises(KeyError, match="there is no statistic 'distance'; there are 'entropy', 'sink'"):
            found["distance"]
        assert "distance" not in found
        assert 2 == len(found)

    def test_a_file_gives_it_again(self, tmp_path):
        found = collect(vit(), self.batches(), Entropy(), Received(), progress=False)
        found.save(tmp_path / "found.safetensors", about={"data": "noise"})
        again = visualizer.load(tmp_path / "found.safetensors")
        assert repr(found) == repr(again)
        assert ({"data": "noise"}, found.paths) == (again.about, again.paths)
        for name in found:
            for field in ("count", "mean", "variance", "minimum", "maximum"):
                np.testing.assert_array_equal(getattr(found[name], field), getattr(again[name], field))

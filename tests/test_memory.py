"""Copies in large pages are tensors like any, and nothing of them stays when they are gone."""

import copy
import gc
import mmap
import pickle

import pytest
import torch

from visualizer.intercept import memory
from visualizer.intercept.memory import copied, copied_to_stay

SIZES = [(3, 5), (2**19 - 1,), (2**19,), (700, 1000), (2**21 + 1,), (0, 4)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_each_copy_has_its_own_numbers(dtype):
    given = [torch.randn(size).mul(9).to(dtype) for size in SIZES]
    given += [torch.randn(8, 300, 900).to(dtype).permute(2, 0, 1), torch.randn(1, 1, 400).to(dtype).expand(9, 999, 400)]
    before = [one.clone() for one in given]
    made = [copied_to_stay(one) for one in given]
    for one in given:
        if 0 not in one.stride():
            one.zero_()
    for one, expected in zip(made, before, strict=True):
        assert torch.equal(one, expected)
        assert one.is_contiguous()
    for one, expected in zip(made, before, strict=True):  # writing to one leaves the others as they are
        one.zero_()
        expected.zero_()
        assert all(torch.equal(*pair) for pair in zip(made, before, strict=True))


def test_a_copy_can_go_anywhere():
    given = torch.arange(2.0**20)
    made = copied_to_stay(given)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.clone().share_memory_()):
        assert torch.equal(other, given)
    array = made.numpy()
    del made, other
    gc.collect()
    assert array[-1] == 2**20 - 1


def test_the_memory_goes_with_the_copy(monkeypatch):
    class Memory(mmap.mmap):
        alive = 0

        def __init__(self, *_, **__):
            Memory.alive += 1

        def __del__(self):
            Memory.alive -= 1

    monkeypatch.setattr(memory.mmap, "mmap", Memory)
    made = [copied_to_stay(torch.zeros(2**19)) for _ in range(3)]
    view = made[0][5:]
    assert Memory.alive == 3
    del made
    gc.collect()
    assert Memory.alive == 1
    del view
    gc.collect()
    assert Memory.alive == 0


@pytest.mark.parametrize("lacks", ["memory", "pages"])
def test_without_large_pages_it_is_a_copy_like_any(lacks, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no")

    if lacks == "memory":
        monkeypatch.setattr(memory.mmap, "mmap", refuse)
    else:
        monkeypatch.setattr(memory, "_ADVICE", None)
    given = torch.randn(4, 800, 400).permute(2, 0, 1)
    made = copied_to_stay(given)
    assert torch.equal(made, given)
    assert made.is_contiguous()


def test_what_is_not_a_plain_tensor_of_the_cpu_is_copied_by_torch():
    class Own(torch.Tensor):
        pass

    given = torch.randn(800, 900).as_subclass(Own)
    assert type(copied_to_stay(given)) is Own
    assert copied_to_stay(torch.empty(800, 900, device="meta")).is_meta
    weight = torch.randn(800, 900, requires_grad=True)
    assert not copied_to_stay(weight).requires_grad
    assert not copied(weight).requires_grad

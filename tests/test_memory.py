"""Copies in large pages are tensors like any, and nothing of them stays when they are gone."""

import copy
import gc
import mmap
import pickle

import pytest
import torch

from visualizer.intercept import memory
from visualizer.intercept.memory import LargePages, copied

SIZES = [(3, 5), (1, 6, 197, 64), (2**14,), (2**19 - 1,), (2**19,), (700, 1000), (2**16 - 8,), (0, 4)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_each_copy_has_its_own_numbers(dtype):
    pages, given = LargePages(), [torch.randn(size).mul(9).to(dtype) for size in SIZES * 3]
    given += [torch.randn(4, 300, 200).to(dtype).permute(2, 0, 1), torch.randn(1, 1, 400).to(dtype).expand(5, 99, 400)]
    before = [one.clone() for one in given]
    made = [pages.copied(one) for one in given]
    for one in given:
        if one.shape != (5, 99, 400):
            one.zero_()
    for one, expected in zip(made, before, strict=True):
        assert torch.equal(one, expected)
        assert one.is_contiguous()
        assert one.data_ptr() % 64 == 0
    for one, expected in zip(made, before, strict=True):  # writing to one leaves the others as they are
        one.zero_()
        expected.zero_()
        assert all(torch.equal(*pair) for pair in zip(made, before, strict=True))


def test_a_copy_can_go_anywhere():
    pages = LargePages()
    first, second = pages.copied(torch.arange(2.0**15)), pages.copied(torch.arange(2.0**15))
    for made in (copy.deepcopy(second), pickle.loads(pickle.dumps(second)), second.clone().share_memory_()):
        assert torch.equal(made, first)
    assert len(pickle.dumps(second)) < 2 * second.nbytes  # and nothing of the page around it
    array = second.numpy()
    del pages, first, second
    gc.collect()
    assert array[-1] == 2**15 - 1


def test_a_page_goes_with_the_last_copy_in_it(monkeypatch):
    class Memory(mmap.mmap):
        alive = 0

        def __init__(self, *_, **__):
            Memory.alive += 1

        def __del__(self):
            Memory.alive -= 1

    monkeypatch.setattr(memory.mmap, "mmap", Memory)
    pages = LargePages()
    made = [pages.copied(torch.zeros(2**16)) for _ in range(24)]  # eight in a page
    assert Memory.alive == 3
    del made[1:]
    gc.collect()
    assert Memory.alive == 2  # that of the first, and the one that is being filled
    del made, pages
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
    given = torch.randn(4, 300, 200).permute(2, 0, 1)
    made = LargePages().copied(given)
    assert torch.equal(made, given)
    assert made.is_contiguous()


def test_what_is_not_a_plain_tensor_of_the_cpu_is_copied_by_torch():
    class Own(torch.Tensor):
        pass

    given = torch.randn(400, 300).as_subclass(Own)
    assert type(LargePages().copied(given)) is Own
    assert LargePages().copied(torch.empty(400, 300, device="meta")).is_meta
    weight = torch.randn(400, 300, requires_grad=True)
    assert not LargePages().copied(weight).requires_grad
    assert not copied(weight).requires_grad

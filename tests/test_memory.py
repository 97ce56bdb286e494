"""Copies in memory of our own are tensors like any, and nothing of them stays when they are gone."""

import copy
import gc
import mmap
import pickle

import pytest
import torch

from visualizer.intercept import memory
from visualizer.intercept.memory import LargePages, Room, copied

SIZES = [(3, 5), (2**19 - 1,), (2**19,), (700, 1000), (2**21 + 1,), (0, 4)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_each_copy_has_its_own_numbers(dtype):
    given = [torch.randn(size).mul(9).to(dtype) for size in SIZES]
    given += [torch.randn(8, 300, 900).to(dtype).permute(2, 0, 1), torch.randn(1, 1, 400).to(dtype).expand(9, 999, 400)]
    before = [one.clone() for one in given]
    made = [*map(LargePages().copied, given)]
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
    pages = LargePages()
    first, made = pages.copied(given), pages.copied(given)
    assert len(pickle.dumps(made)) < 1.1 * made.nbytes  # and nothing of the block around it
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.clone().share_memory_()):
        assert torch.equal(other, given)
    array = made.numpy()
    del pages, first, made, other
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
    pages = LargePages()
    made = [pages.copied(torch.zeros(2**20)) for _ in range(6)]  # four in a block
    large = pages.copied(torch.zeros(2**22))
    assert Memory.alive == 3
    del made[1:], large
    gc.collect()
    assert Memory.alive == 2  # that of the first, and the one that is being filled
    del made, pages
    gc.collect()
    assert Memory.alive == 0


class TestRoom:
    def test_copies_keep_their_numbers_until_all_are_gone(self):
        room, given = Room(), [torch.randn(30, 40) for _ in range(500)]  # more than there is room for
        made = [*map(room.copied, given)]
        kept = made[7].view(-1)
        for one, expected in zip(made, given, strict=True):
            assert torch.equal(one, expected)
        del made, one
        more = [*map(room.copied, given)]
        assert torch.equal(kept, given[7].view(-1))
        assert all(map(torch.equal, more, given))

    def test_it_is_used_again(self):
        room = Room()
        first = room.copied(torch.zeros(1000))
        place = first.data_ptr()
        assert room.copied(torch.ones(1000)).data_ptr() != place
        del first
        assert room.copied(torch.ones(1000)).data_ptr() == place

    def test_what_is_no_small_plain_tensor_is_cloned(self):
        class Own(torch.Tensor):
            pass

        room = Room()
        assert type(room.copied(torch.randn(4).as_subclass(Own))) is Own
        assert room.copied(torch.empty(4, device="meta")).is_meta
        assert room.copied(torch.empty(0, 4)).shape == (0, 4)
        large = torch.randn(600, 700)
        assert torch.equal(room.copied(large), large)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_of_other_types_and_views(self, dtype):
        given = torch.randn(5, 6, 7).to(dtype)
        for view in (given, given[:, 2], given.permute(2, 0, 1), given[:1].expand(4, 6, 7)):
            assert torch.equal(Room().copied(view), view)


@pytest.mark.parametrize("lacks", ["memory", "pages"])
def test_without_large_pages_it_is_a_copy_like_any(lacks, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no")

    if lacks == "memory":
        monkeypatch.setattr(memory.mmap, "mmap", refuse)
    else:
        monkeypatch.setattr(memory, "_ADVICE", None)
    given = torch.randn(4, 800, 400).permute(2, 0, 1)
    made = LargePages().copied(given)
    assert torch.equal(made, given)
    assert made.is_contiguous()


def test_what_is_not_a_plain_tensor_of_the_cpu_is_copied_by_torch():
    class Own(torch.Tensor):
        pass

    given = torch.randn(800, 900).as_subclass(Own)
    assert type(LargePages().copied(given)) is Own
    assert LargePages().copied(torch.empty(800, 900, device="meta")).is_meta
    weight = torch.randn(800, 900, requires_grad=True)
    assert not LargePages().copied(weight).requires_grad
    assert not copied(weight).requires_grad

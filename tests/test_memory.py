"""Copies in memory of our own are tensors like any, as long as anybody holds one."""

import pytest
import torch

from visualizer.intercept.memory import Room, copied


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


def test_a_copy_has_no_graph_and_no_gaps():
    weight = torch.randn(4, 5, requires_grad=True)
    made = copied(weight.mT)
    assert not made.requires_grad
    assert made.is_contiguous()
    assert torch.equal(made, weight.mT)

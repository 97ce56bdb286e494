"""What earlier maps took is used again, and nothing is ever written into what somebody still holds."""

import gc
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from visualizer import attention
from visualizer.intercept import memory
from visualizer.intercept.memory import Memory
from visualizer.intercept.plans import plans_of

LARGE = 1, 2, 512, 64  # of 256 KiB


class Attends(nn.Module):
    def forward(self, x):
        return scaled_dot_product_attention(x, x + 1, x)


def numbers(seed=0, shape=LARGE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def recorded(model, x):
    with attention(model) as maps:
        model(x)
    return maps[0]


def places(made):
    return {made.source._query.data_ptr(), made.source.keys.buffer.data_ptr()}


class TestMaps:
    def test_the_next_ones_lie_where_earlier_ones_did(self):
        model = Attends()
        first = recorded(model, numbers())
        before = places(first)
        assert plans_of(model).memory.nbytes == 0
        del first
        assert plans_of(model).memory.nbytes == 2 * 2**18
        assert places(recorded(model, numbers(1))) == before

    def test_those_that_are_held_stay_as_they_are(self):
        model, x = Attends(), numbers()
        kept = [recorded(model, numbers(seed)) for seed in range(3)]
        [made] = [kept.pop(1)]
        kept.clear()
        for seed in range(3, 8):
            recorded(model, numbers(seed))
        x = numbers(1)
        expected = (x.double() @ (x + 1).double().mT / 8).softmax(-1)
        torch.testing.assert_close(made.dense().double(), expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize(
        "hold",
        [
            lambda query: query[0, 1, 3:5],
            lambda query: query.numpy()[0, 1],
            lambda query: memoryview(query.numpy()),
            lambda query: query.untyped_storage(),
            lambda query: torch.from_dlpack(query),
        ],
        ids=["a view", "an array", "a memoryview", "the storage", "by DLPack"],
    )
    def test_so_does_what_is_held_in_another_form(self, hold):
        def bytes_of(held):
            return (
                bytes(held) if isinstance(held, (torch.UntypedStorage, memoryview)) else torch.as_tensor(held).clone()
            )

        model = Attends()
        held = hold(recorded(model, numbers()).source._query)
        before = bytes_of(held)
        for seed in range(1, 4):
            recorded(model, numbers(seed))
        after = bytes_of(held)
        assert before == after if isinstance(before, bytes) else torch.equal(before, after)

    def test_copies_of_a_map_have_their_own(self):
        model = Attends()
        made = recorded(model, numbers())
        copied = pickle.loads(pickle.dumps(made))
        expected = made.dense()
        del made
        recorded(model, numbers(1))
        assert torch.equal(copied.dense(), expected)

    def test_a_map_that_shares_its_memory_with_processes(self):
        model = Attends()
        made = recorded(model, numbers())
        expected = made.dense()
        made.source._query.share_memory_()
        recorded(model, numbers(1))
        assert torch.equal(made.dense(), expected)

    def test_the_model_takes_it_along(self):
        model = Attends()
        made, other = recorded(model, numbers()), recorded(model, numbers(1))
        del other
        known = weakref.ref(plans_of(model).memory)
        expected = made.dense()
        del model
        gc.collect()
        assert known() is None
        assert torch.equal(made.dense(), expected)

    def test_maps_that_are_there_when_python_ends(self):
        code = (
            "import torch, test_memory as t\n"
            "model = t.Attends()\n"
            "kept = [t.recorded(model, t.numbers(seed)) for seed in range(3)]\n"
            "kept[0].cycle = kept[0]\n"
            "query = kept[1].source._query\n"
            "print('done')\n"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


class TestMemory:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.complex64]
    )
    def test_a_copy_has_the_same_numbers(self, dtype):
        x = numbers(dtype=dtype).mT
        copied = Memory().copied(x)
        assert torch.equal(copied, x)
        assert copied.dtype == dtype
        assert copied.is_contiguous()
        assert copied.data_ptr() != x.data_ptr()
        assert not copied.requires_grad

    def test_a_copy_is_no_part_of_a_graph(self):
        x = numbers().requires_grad_()
        copied = Memory().copied(x * 2)
        assert not copied.requires_grad
        assert torch.equal(copied, x.detach() * 2)

    def test_blocks_are_used_again_by_any_type_and_shape(self):
        kept = Memory()
        first = kept.copied(numbers())
        place = first.data_ptr()
        del first
        second = kept.copied(numbers(shape=(2, 2**15), dtype=torch.float32).to(torch.int32))
        assert second.data_ptr() == place
        assert kept.nbytes == 0

    def test_small_copies_wait_for_nothing(self):
        kept = Memory()
        kept.copied(numbers(shape=(1, 2, 8, 8)))
        assert kept.nbytes == 0

    def test_no_more_waits_than_is_allowed(self, monkeypatch):
        monkeypatch.setattr(memory, "MOST", 5 * 2**18)
        kept = Memory()
        for shape in (LARGE, (1, 2, 1024, 64)):
            copies = [kept.copied(numbers(shape=shape)) for _ in range(4)]
            del copies
            assert 0 < kept.nbytes <= memory.MOST
        again = kept.copied(numbers(shape=(1, 2, 1024, 64)))  # what was used last is what waits
        assert kept.nbytes == 2**19
        del again

    def test_one_that_is_larger_than_all_that_may_wait(self, monkeypatch):
        monkeypatch.setattr(memory, "MOST", 2**18)
        kept = Memory()
        copied = kept.copied(numbers())
        large = kept.copied(numbers(shape=(1, 2, 1024, 64)))
        del copied, large
        assert kept.nbytes == 0

    @pytest.mark.filterwarnings("ignore:.*quantized tensor:UserWarning", "ignore:.*nested tensors:UserWarning")
    def test_other_kinds_of_tensors_are_copied_as_torch_does(self):
        kept, x = Memory(), numbers().flatten(0, 2)
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
        assert torch.equal(kept.copied(quantized).dequantize(), quantized.dequantize())
        nested = torch.nested.nested_tensor([x, x[:7]])
        assert [torch.equal(*pair) for pair in zip(kept.copied(nested).unbind(), nested.unbind(), strict=True)] == [
            True
        ] * 2
        assert not kept._lent

    def test_threads_at_once(self):
        kept, wrong = Memory(), []

        def run(thread):
            held = []
            for number in range(200):
                x = torch.full(LARGE, float(1000 * thread + number))
                held.append((x, kept.copied(x)))
                if number % 3:
                    x, copied = held.pop(number % len(held))
                    if not torch.equal(x, copied):
                        wrong.append((thread, number))

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert not kept._lent
        assert kept.nbytes <= memory.MOST

    def test_tensors_with_no_memory_here(self):
        copied = Memory().copied(torch.empty(LARGE, device="meta"))
        assert copied.is_meta

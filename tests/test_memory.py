"""What earlier maps took is used again, and nothing is ever written into what somebody still holds."""

import gc
import importlib
import mmap
import os
import pickle
import platform
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from visualizer import AttentionMap, VisualizerWarning, attention
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


meanwhile = {}
happens_in = meanwhile.get  # a dict that the code of a model reads is looked at, what is behind a method of one is not


@pytest.fixture(autouse=True)
def nothing_happens():
    yield
    meanwhile.clear()


class Layer(nn.Module):
    """Attends to what it is given; then happens what is to in the midst of a pass."""

    def __init__(self, number):
        super().__init__()
        self.qk, self.out, self.number = nn.Linear(8, 16), nn.Linear(8, 8), number

    def forward(self, x):
        q, k = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in self.qk(x).chunk(2, -1))
        y = self.out(scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2))
        happens_in(self.number, len)((q, k))
        return y


def layers(count=4):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(number) for number in range(count)))


def expected_maps(model, x):
    made = []
    for layer in model:
        q, k = (one.unflatten(-1, (2, 4)).transpose(1, 2) for one in layer.qk(x).chunk(2, -1))
        made.append((q @ k.mT / 2).softmax(-1))
        x = layer(x)
    return made


def assert_are_maps(maps, expected):
    assert len(maps) == len(expected)
    for found, one in zip(maps, expected, strict=True):
        torch.testing.assert_close(found.dense(), one)


@pytest.fixture
def known():
    """A model, what it is given, and its maps."""
    model, x = layers(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    return model, x, expected_maps(model, x)


def waiting(maps):
    return len(maps.recorder._unmade)


class TestMapsThatWaitForTheEndOfThePass:
    @pytest.fixture
    def counts(self, known):
        """How many maps waited behind the calls of three layers."""
        found = []
        meanwhile.update(dict.fromkeys((0, 1, 3), lambda _: found.append(waiting(self.maps))))
        return found

    def passes(self, model, x, count=3, **options):
        """Records each of some passes, of which the third follows a plan, and returns the maps of the last."""
        self.maps = attention(model, **options)
        for _ in range(count):
            with self.maps as maps:
                maps.clear()
                model(x)
                assert waiting(maps) == 0
        return maps

    def test_they_do(self, known, counts):
        model, x, expected = known
        maps = self.passes(model, x)
        assert counts[-3:] == [0, 1, 3]
        assert_are_maps(maps, expected)

    @torch.no_grad()
    def test_they_are_those_of_the_numbers_then(self, known, counts):
        model, x, expected = known
        meanwhile[2] = lambda given: [one.zero_() for one in given]
        maps = self.passes(model, x)
        assert counts[-3:] == [0, 1, 3]
        assert_are_maps(maps, expected)

    def test_somebody_reads_them_meanwhile(self, known, counts):
        model, x, expected = known
        read = []
        meanwhile[2] = lambda _: read.append([*self.maps])
        maps = self.passes(model, x)
        assert counts[-3:] == [0, 1, 1]
        assert_are_maps(maps, expected)
        assert_are_maps(read[-1], expected[:3])

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_the_pass_ends_before(self, known, counts, error):
        model, x, expected = known

        def interrupt(_):
            raise error

        self.passes(model, x)
        with self.maps as maps:
            maps.clear()
            meanwhile[2] = interrupt
            with pytest.raises(error):
                model(x)
            del meanwhile[2]
            assert_are_maps(maps, expected[:3])
            maps.clear()
            model(x)
        assert_are_maps(maps, expected)

    def test_the_recording_ends_before(self, known, counts):
        model, x, expected = known
        meanwhile[2] = lambda _: self.maps.stop()
        assert_are_maps(self.passes(model, x), expected[:3])

    def test_there_is_no_room_for_all(self, known, counts):
        model, x, expected = known
        self.passes(model, x)
        with pytest.warns(VisualizerWarning, match="'2' and all that follow"):
            maps = self.passes(model, x, 1, max_bytes=5 * x.nbytes)  # of two
        assert counts[-2] == 1
        assert_are_maps(maps, expected[:2])

    def test_only_some_layers(self, known):
        model, x, expected = known
        with attention(model, layers=[0, -1]) as maps:
            for _ in range(4):
                maps.clear()
                model(x)
        assert_are_maps(maps, [expected[0], expected[3]])

    def test_many_calls_in_one(self, monkeypatch):
        monkeypatch.setattr(importlib.import_module("visualizer.intercept.recorder"), "_MOST_UNMADE", 2)
        model, x = layers(7), torch.randn(2, 5, 8)
        most = []
        with attention(model) as maps:
            meanwhile.update(dict.fromkeys((4, 6), lambda _: most.append(waiting(maps))))
            for _ in range(5):
                maps.clear()
                model(x)
        assert 0 < max(most) <= 2
        assert_are_maps(maps, expected_maps(model, x))

    def test_one_that_cannot_be_made_is_told_and_no_other_is_lost(self, known, monkeypatch):
        model, x, expected = known
        tell, count = AttentionMap.tell_layouts, [0]

        def fail_once(self, *args):
            count[0] += 1
            if count[0] == 2:
                raise ValueError("no layout")
            return tell(self, *args)

        self.passes(model, x)
        with self.maps as maps:
            maps.clear()
            with monkeypatch.context() as patch, pytest.warns(VisualizerWarning, match="ValueError: no layout"):
                patch.setattr(AttentionMap, "tell_layouts", fail_once)
                model(x)
        assert_are_maps(maps, [expected[0], *expected[2:]])

    def test_threads(self, known):
        model = known[0]
        inputs = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        with attention(model) as maps:
            threads = [threading.Thread(target=lambda x=x: [model(x) for _ in range(10)]) for x in inputs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        by_thread = {}
        for record in maps.records:
            by_thread.setdefault(record.thread, []).append(record.value)
        expected = [expected_maps(model, x) for x in inputs]
        for found in by_thread.values():
            own = next(one for one in expected if torch.allclose(one[0], found[0].dense(), atol=1e-6))
            assert_are_maps(found, own * (len(found) // 4))
        assert sum(map(len, by_thread.values())) == 160

    def test_another_thread_reads_them_as_the_model_runs(self, known):
        model, x, expected = known
        maps, wrong, ends = attention(model), [], threading.Event()

        def read():
            while not ends.is_set():
                found = [*maps, *([maps[-1]] if len(maps) else [])]
                if not all(isinstance(one, AttentionMap) for one in [*found, *maps[:2]]):
                    wrong.append(found)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        reader = threading.Thread(target=read)
        try:
            with maps:
                reader.start()
                for _ in range(100):
                    model(x)
        finally:
            ends.set()
            reader.join()
            sys.setswitchinterval(before)
        assert wrong == []
        assert_are_maps(maps, expected * 100)

    def test_the_first_of_a_pass_that_cannot_be_made(self, known, monkeypatch):
        model, x, expected = known
        self.passes(model, x)
        make, count = AttentionMap.from_source, [0]

        def fail_once(*args, **kwargs):
            count[0] += 1
            if count[0] == 1:
                raise ValueError("no memory")
            return make(*args, **kwargs)

        with self.maps as maps:
            maps.clear()
            with monkeypatch.context() as patch, pytest.warns(VisualizerWarning, match="ValueError: no memory"):
                patch.setattr(AttentionMap, "from_source", fail_once)
                model(x)
        assert_are_maps(maps, expected[1:])

    def test_keys_that_grow_within_a_pass(self):
        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Steps(), Steps()

            def forward(self, x):
                return self.second(self.first(x))

        class Steps(nn.Module):
            """The text at once, and then three tokens one by one, whose keys it has too."""

            def __init__(self):
                super().__init__()
                self.attend = Attend()

            def forward(self, x):
                made = [self.attend(x[:, :, :2], x[:, :, :2])]
                made += [self.attend(x[:, :, step : step + 1], x[:, :, : step + 1]) for step in range(2, 5)]
                return torch.cat(made, 2)

        class Attend(nn.Module):
            def forward(self, q, k):
                return scaled_dot_product_attention(q, k, k)

        model, x = Writes(), torch.randn(1, 2, 5, 4)
        for _ in range(4):
            with attention(model) as maps:
                model(x)
        for half, given in ((maps[:4], x), (maps[4:], model.first(x))):
            for found, (first, last) in zip(half, [(0, 2), (2, 3), (3, 4), (4, 5)], strict=True):
                weights = (given[:, :, first:last] @ given[:, :, :last].mT / 2).softmax(-1)
                torch.testing.assert_close(found.dense(), weights)
            owners = {found.source.keys.owner for found in half}
            assert len(owners) == 1  # one buffer for all of them


FAULTS = """
import gc, resource, torch
from visualizer.intercept.memory import Memory
gc.disable()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**21) for _ in range(3)]  # 8 MB each
    blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
Memory()
print(max([faults() for _ in range(6)][3:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that hands freed memory back")
def test_what_is_freed_is_kept():
    """A model's activations: else the system clears them anew, in most processes 4,000 pages of these in each round."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = [sys.executable, "-c", FAULTS]
    assert int(subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout) < 100


class TestMemory:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.complex64]
    )
    def test_a_copy_has_the_same_numbers(self, dtype):
        x = numbers(dtype=dtype).mT
        copied = Memory().copied(x)
        assert torch.equal(copied, x)
        assert copied.dtype == dtype
        assert copied.stride() == x.clone().stride()  # without gaps, in the same order
        assert copied.data_ptr() != x.data_ptr()
        assert not copied.requires_grad

    @pytest.mark.parametrize("shape", [LARGE, (2, 3)])
    def test_a_copy_is_taken_before_its_tensor_is_made(self, shape):
        x = numbers(shape=shape)
        before, make = x.clone(), Memory().held(x, x[1:])
        x.zero_()
        for one, expected in zip(make(), (before, before[1:]), strict=True):
            assert torch.equal(one, expected)

    def test_several_in_one_block(self):
        kept = Memory()
        tensors = [numbers(shape=(2, 3)), numbers(shape=(5,), dtype=torch.float64), numbers(shape=(3, 2, 1)).mT]
        make = kept.held(*tensors, least=1)
        made = make()
        assert all(map(torch.equal, made, tensors))
        assert all(one.is_contiguous() and one.data_ptr() % 64 == 0 for one in made)
        del make, made[1:]
        assert kept.nbytes == 0  # as long as one is left
        del made
        assert kept.nbytes == mmap.PAGESIZE  # what a block takes
        assert torch.equal(kept.held(numbers(shape=(0, 3)), least=0)()[0], torch.empty(0, 3))

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

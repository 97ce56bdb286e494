"""Copies from a GPU: queued behind the model's own work, waited for when the cache is read.

Without a GPU a device is played: its copies are done only when somebody waits for them, so what is read too early is
seen to be wrong. With one, the same is shown on it.
"""

import numpy as np
import pytest
import torch

from visualizer import VisualizerWarning, capture, get_local, tensors
from visualizer.store.budget import resident_bytes

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


class Device:
    """A device whose copies are carried out when an event behind them is waited for."""

    def __init__(self):
        self.queue, self.done, self.synchronized = [], 0, 0

    def run(self, until):
        while self.done < until:
            target, numbers = self.queue[self.done]
            target.copy_(numbers)
            self.done += 1


class Event:
    def __init__(self, device):
        self.device, self.place = device, None

    def record(self):
        self.place = len(self.device.queue)

    def query(self):
        return self.device.done >= self.place

    def synchronize(self):
        self.device.synchronized += 1
        self.device.run(self.place)


@pytest.fixture
def device(monkeypatch):
    """Tensors that are `OnDevice` count as CUDA's; see `Device`."""
    played = Device()

    def queue_copy(tensor, dtype, copies):
        target = torch.zeros(tensor.shape, dtype=dtype)  # what is not there yet reads as zero
        played.queue.append((target, tensor.as_subclass(torch.Tensor).to(dtype).clone()))
        event = Event(played)
        event.record()
        copies.append(event)
        return target.numpy()

    monkeypatch.setattr(tensors, "_queue_copy", queue_copy)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return played


class OnDevice(torch.Tensor):
    is_cuda = property(lambda self: True)


def on_device(*shape, fill=1.0, dtype=torch.float32):
    return torch.full(shape, fill, dtype=dtype).as_subclass(OnDevice)


def forward(x):
    attn = x
    return None


class TestPlayed:
    def test_nothing_waits_until_the_cache_is_read(self, device):
        with capture(forward, "attn") as found:
            for number in range(5):
                forward(on_device(3, fill=number + 1))
            assert 5 == len(device.queue)
        assert 0 == device.synchronized
        assert [1, 2, 3, 4, 5] == [value[0] for value in found["forward"]]
        assert 5 == device.synchronized

    def test_a_list_that_is_held_never_shows_what_has_not_arrived(self, device):
        with capture(forward, "attn") as found:
            held = found["forward"]
            forward(on_device(3))
            assert [] == held
            device.run(1)
            forward(on_device(3, fill=2))  # files what has arrived meanwhile, and no more
            assert [1] == [value[0] for value in held]
            found.records
            assert [1, 2] == [value[0] for value in held]

    def test_the_order_is_that_of_the_calls(self, device):
        with capture(forward, "attn") as found:
            forward(on_device(1, fill=1))
            forward(torch.full((1,), 2.0))  # arrives at once, is filed after what came before
            forward(on_device(1, fill=3))
        assert [1, 2, 3] == found.stack()[:, 0].tolist()
        assert [0, 1, 2] == [record.call for record in found.records]

    def test_in_place_changes_after_the_call_do_not_reach_it(self, device):
        with capture(forward, "attn") as found:
            value = on_device(3)
            forward(value)
            value.as_subclass(torch.Tensor).zero_()
        assert [1, 1, 1] == found["forward"][0].tolist()

    def test_containers_and_types_that_numpy_lacks(self, device):
        with capture(forward, "attn") as found:
            forward({"a": [on_device(2, fill=0.5, dtype=torch.bfloat16)], "b": np.ones(1)})
        [kept] = found["forward"]
        assert (np.float32, [0.5, 0.5]) == (kept["a"][0].dtype, kept["a"][0].tolist())

    def test_what_is_under_way_counts_against_the_budget(self, device):
        with capture(forward, "attn", max_bytes=4 * resident_bytes(np.ones(25, np.float32))["cpu"]) as found:
            for _ in range(4):
                forward(on_device(25))
            assert 0 == device.synchronized
            with pytest.warns(VisualizerWarning, match="bytes on cpu"):
                forward(on_device(25))  # a hundred bytes too many under way: now they are waited for
        assert 4 == len(found["forward"])

    def test_the_limit_holds(self, device):
        with capture(forward, "attn", limit=2) as found:
            for number in range(5):
                forward(on_device(1, fill=number))
        assert [3, 4] == [value[0] for value in found["forward"]]

    def test_get_local_waits_as_well(self, device):
        get_local("attn")(forward)
        get_local.clear()
        try:
            with get_local.activate():
                forward(on_device(2, fill=7))
            assert 0 == device.synchronized
            assert [7, 7] == get_local.cache["forward"][0].tolist()
        finally:
            get_local.clear()

    def test_other_ways_of_keeping_need_no_copy(self, device):
        with capture(forward, "attn", keep="tensor") as found, capture(forward, "attn", keep="graph") as same:
            value = on_device(2)
            forward(value)
        assert [] == device.queue
        assert same["forward"][0] is value
        assert torch.equal(value, found["forward"][0])

    def test_a_copy_that_fails_says_so_when_read_and_loses_nothing_after_it(self, device, monkeypatch):
        with capture(forward, "attn") as found:
            forward(on_device(1))
        with monkeypatch.context() as patch:
            patch.setattr(Event, "synchronize", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error")))
            with pytest.raises(RuntimeError, match="CUDA error"):
                found["forward"]
        assert [1] == [value[0] for value in found["forward"]]


@ON_A_GPU
class TestReal:
    def test_values_are_those_of_the_return(self):
        x = torch.randn(64, 512, 512, device="cuda")
        expected = x.cpu().numpy()
        with capture(forward, "attn") as found:
            forward(x)
            x.zero_()
        np.testing.assert_array_equal(expected, found["forward"][0])

    def test_capturing_does_not_wait_for_the_device(self):
        torch.cuda.synchronize()
        with capture(forward, "attn") as found:
            torch.cuda._sleep(2_000_000_000)  # about a second of the device's time
            before = torch.cuda.Event()
            forward(torch.ones(1000, device="cuda"))
            before.record()
            assert not before.query()
        assert [1000.0] == [value.sum() for value in found["forward"]]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
    def test_types(self, dtype):
        x = torch.ones(3, 4, device="cuda").to(dtype).t()
        with capture(forward, "attn") as found:
            forward(x)
        np.testing.assert_array_equal(np.ones((4, 3)), found["forward"][0])

    def test_on_a_stream_of_its_own(self):
        stream = torch.cuda.Stream()
        with capture(forward, "attn") as found, torch.cuda.stream(stream):
            x = torch.ones(10**6, device="cuda")
            torch.cuda._sleep(100_000_000)
            x.mul_(3)
            forward(x)
            x.zero_()
        assert {3.0} == set(found["forward"][0].tolist())

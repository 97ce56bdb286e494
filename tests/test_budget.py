"""What values weigh, how much memory there is, and what a budget leaves."""

import io
import weakref

import pytest

from visualizer.store import NO_LIMIT, Budget, budget, bytes_by_device, memory_of
from visualizer.store.budget import resident_bytes
from visualizer.store.quick import quick_keeper

np = pytest.importorskip("numpy", reason="engine only: numpy is not in this environment")
torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")


class TestBudget:
    def test_it_counts_by_device(self):
        one = Budget(1000)
        assert one.add({"cpu": 600, "cuda:0": 1000}) is None
        assert (400, 0, 1000) == (one.room("cpu"), one.room("cuda:0"), one.room("cuda:1"))
        assert "cuda:0" == one.add({"cpu": 400, "cuda:0": 1})
        one.discount({"cuda:0": 1})
        assert one.exceeded({"cpu": 0, "cuda:0": 0}) is None
        one.clear()
        assert (1000, 1000) == (one.room("cpu"), one.room("cuda:0"))

    def test_the_default_is_a_quarter_of_each_device(self, monkeypatch):
        monkeypatch.setattr(budget, "memory_of", lambda device: {"cpu": 4000, "cuda:0": 8000}[device])
        one = Budget()
        assert (1000, 2000) == (one.limit("cpu"), one.limit("cuda:0"))
        assert "1,000 bytes on cpu (a quarter of its memory)" == one.why_full("cpu")
        one.allow(77)
        assert "77 bytes on cuda:0 (max_bytes)" == one.why_full("cuda:0")

    def test_without_a_limit_everything_fits(self):
        one = Budget(NO_LIMIT)
        assert one.add({"cpu": 2**80}) is None
        one.allow(2**80)
        assert 0 == one.room("cpu")

    def test_what_a_channel_takes_without_asking_counts(self):
        one = Budget(3 * 2**30)
        assert 3 * 2**30 == one.room("cpu")
        taken = one.purse.left
        one.purse.left = 0
        assert 3 * 2**30 - taken == one.room("cpu")
        assert one.add({"cpu": 2**30}) is None
        assert 2 * 2**30 - taken == one.room("cpu")
        assert one.purse.left > 2**29  # filled again
        assert "cpu" == one.add({"cpu": 2**31})
        one.discount({"cpu": 3 * 2**30})
        assert 3 * 2**30 - taken == one.room("cpu")

    @pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4, 5)])
    def test_an_array_weighs_the_same_whoever_weighs_it(self, shape):
        for keep, array in (("numpy", np.ones(shape)), ("graph", np.ones((2, *shape))[0, ...])):
            kept, size = quick_keeper(keep)(array)
            assert {"cpu": size} == resident_bytes(kept)


class TestWeights:
    def test_their_items_are_weighed(self):
        array = np.empty(2, object)
        array[0] = np.ones(1000)
        assert 8000 < bytes_by_device(array)["cpu"] < 8200
        array[1] = array
        assert 8000 < bytes_by_device(array)["cpu"] < 8200


@pytest.mark.parametrize("fails", ["__torch_function__", "__len__"])
def test_a_class_whose_own_code_fails_has_some_size(fails):
    if fails == "__len__":
        value = type("Odd", (list,), {"__iter__": lambda self: 1 / 0, "__len__": lambda self: 1 / 0})()
    else:
        odd = type("Odd", (torch.Tensor,), {"__torch_function__": classmethod(lambda *args, **options: 1 / 0)})
        value = torch.Tensor._make_subclass(odd, torch.ones(2))
    assert bytes_by_device(value)["cpu"] > 0


class TestMemory:
    def test_bytes_are_those_of_the_elements_by_device(self):
        assert {"cpu": 24} == bytes_by_device(torch.ones(2, 3))
        assert {"cpu": 24} == bytes_by_device(np.ones(3))
        assert {"meta": 8} == bytes_by_device(torch.ones(2, device="meta"))
        value = {"a": [torch.ones(2), torch.ones(2, device="meta")]}
        assert 8 == bytes_by_device(value)["meta"]
        assert 8 < bytes_by_device(value)["cpu"] < 1000

    def test_a_sparse_tensor_weighs_what_it_holds(self):
        sparse = torch.sparse_coo_tensor([[0], [5]], [1.0], (10**6, 10**6), check_invariants=True)
        assert {"cpu": 20} == bytes_by_device(sparse)

    def test_a_container_that_holds_itself_is_counted_once(self):
        value = [np.ones(100)]
        value.append(value)
        assert 800 < bytes_by_device(value)["cpu"] < 1600

    def test_the_machines_memory(self):
        with open("/proc/meminfo") as file:
            total = int(file.readline().split()[1]) * 1024
        assert 0 < memory_of("cpu") <= total * 1.01

    def test_a_containers_limit_counts(self, monkeypatch):
        monkeypatch.setattr(budget, "_container_limits", lambda: [2**30, 2**62])
        budget._usable_memory.cache_clear()
        try:
            assert 2**30 == memory_of("cpu")
        finally:
            budget._usable_memory.cache_clear()

    @pytest.mark.parametrize(
        ("groups", "files", "expected"),
        [
            (
                "0::/app/job\n",
                {"/sys/fs/cgroup/app/memory.max": "1000\n", "/sys/fs/cgroup/app/job/memory.max": "max\n"},
                [1000],
            ),
            ("3:cpu:/\n5:memory:/job\n", {"/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "77\n"}, [77]),
            ("0::/\n", {}, []),
        ],
        ids=["version 2", "version 1", "no limit"],
    )
    def test_control_groups_of_both_versions(self, monkeypatch, groups, files, expected):
        def opened(path):
            content = {"/proc/self/cgroup": groups, **files}.get(path)
            if content is None:
                raise FileNotFoundError(path)
            return io.StringIO(content)

        monkeypatch.setattr(budget, "open", opened, raising=False)
        assert expected == budget._container_limits()


@pytest.mark.parametrize("own", [None, lambda self: 1 / 0])
def test_values_whose_own_code_fails_have_some_size(own):
    class Meta(type):
        __hash__ = own

    class Odd(metaclass=Meta):
        pass

    class Lazy:
        @property
        def __class__(self):
            raise RuntimeError("evaluated")

    dead = weakref.proxy(Lazy())
    assert bytes_by_device(Odd())["cpu"] > 0
    assert bytes_by_device([Lazy(), dead])["cpu"] > 0

"""Common values are kept without detours, and as any others are."""

import threading
import weakref

import pytest

np = pytest.importorskip("numpy", reason="engine only: numpy is not in this environment")
torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")

from visualizer import VisualizerWarning  # noqa: E402
from visualizer.store.budget import resident_bytes  # noqa: E402
from visualizer.store.quick import quick_keeper  # noqa: E402
from visualizer.tensors import keeper  # noqa: E402

COMMON = {
    "number": 1.5,
    "large number": 10**40,
    "bool": True,
    "text": "text",
    "array": np.arange(6.0).reshape(2, 3),
    "view": np.arange(6.0).reshape(2, 3).T[::2],
    "record array": np.zeros(2, [("a", "f4"), ("b", "i8")]),
    "tensor": torch.arange(6.0).reshape(2, 3),
    "0-d tensor": torch.tensor(3),
    "transposed": torch.arange(6.0).reshape(2, 3).mT,
    "with a gradient": torch.ones(2, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
OTHERS = {
    "array of objects": np.array([[1], "a"], object),
    "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": torch.ones(2).to_sparse(),
    "meta": torch.ones(2, device="meta"),
    "list": [1],
    "object": weakref.WeakSet(),
}


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tolist()) == (other.dtype, other.shape, other.tolist())
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.requires_grad, one.tolist()) == (other.dtype, other.requires_grad, other.tolist())
    else:
        assert one is other


@pytest.mark.parametrize("keep", ["numpy", "tensor", "graph"])
@pytest.mark.parametrize("value", COMMON.values(), ids=COMMON)
def test_common_values_are_kept_as_by_the_keeper(keep, value):
    kept, size = quick_keeper(keep)(value)
    same(keeper(keep)(value, []), kept)
    assert {"cpu": size} == resident_bytes(kept)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        assert (kept is value) == (keep == "graph")
        one, other = (v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in (kept, value))
        assert np.shares_memory(one, other) == (keep == "graph")


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_others_take_the_long_way(value):
    assert (None, 0) == quick_keeper("numpy")(value)


def test_nothing_is_copied_where_tensors_have_no_numbers():
    found = []

    def look(x):
        found.append(quick_keeper("numpy")(x))
        return x.sum()

    torch.func.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    torch.fx.experimental.proxy_tensor.make_fx(look)(torch.ones(3))
    assert [(None, 0)] * 3 == found
    assert (None, 0) == quick_keeper(lambda value: value)(1.5), "whose own code runs"


@pytest.mark.parametrize("keep", ["tensor", "graph"])
def test_sparse_tensors_are_left_to_the_keeper(keep):
    torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")
    kept, size = quick_keeper(keep)(torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True))
    assert (None, 0) == (kept, size)


class TestSmallArraysAgainAndAgain:
    """Room for them is paid for ahead."""

    def decorated(self, gl, name):
        def forward(attn):
            return None

        forward.__qualname__ = name
        return gl("attn")(forward)

    def test_each_is_a_copy_whatever_comes_between(self, gl):
        forward = self.decorated(gl, "forward")
        row = [1.0, 2.0]
        values = [
            *(np.full(3, i, float) for i in range(5)),
            np.arange(3),  # another type of the same size
            *(np.full(3, i, float) for i in range(5)),
            np.array([row, row, None], object),  # its items are copied too
            *(np.full(shape, 7.0) for shape in ((3,), (3, 1), (3, 1), (3, 1), (4,), (3, 1), (4,)) for _ in range(2)),
            np.full(3, 1.0)[::-1],
            0.5,
            *(np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]) for _ in range(4)),
            *(np.zeros(3) for _ in range(5)),
        ]
        expected = [str(value) for value in values]
        gl.activate()
        for value in values:
            forward(value)
        for value in values:
            if isinstance(value, np.ndarray):
                value[...] = -1
        row.clear()
        assert expected == [str(value) for value in gl.cache["forward"]]
        assert [type(value) for value in values] == [type(value) for value in gl.cache["forward"]]
        assert [*range(len(values))] == [record.call for record in gl.records]

    @pytest.mark.parametrize("limit", [None, 10_000])
    def test_what_is_paid_for_and_not_used_is_there_for_others(self, gl, limit):
        """To the last value that fits, however many channels have paid ahead."""
        forwards = [self.decorated(gl, f"forward{i}") for i in range(5)]
        value = np.ones(12)
        price = sum(resident_bytes(value.copy()).values())
        gl.activate(max_bytes=1003 * price + 1, limit=limit)
        for forward in forwards[:4]:
            for _ in range(20):
                forward(value)
        with pytest.warns(VisualizerWarning, match="captured values would take more"):
            for _ in range(1000):
                forwards[4](value)
            assert [20, 20, 20, 20, 923] == [len(values) for values in gl.cache.values()]
        gl.clear()
        larger = np.ones(120)
        with pytest.warns(VisualizerWarning, match="captured values would take more"):
            for number in range(1000):
                forwards[4](larger if number % 5 == 4 else value)
            fives, rest = divmod(1003 * price, 4 * price + sum(resident_bytes(larger.copy()).values()))
            assert 5 * fives + min(rest // price, 4) == len(gl.cache["forward4"])

    def test_in_another_thread_they_are_that_threads(self, gl):
        forward = self.decorated(gl, "forward")
        gl.activate()

        def work():
            for _ in range(50):
                forward(np.full(3, threading.get_ident(), float))

        for _ in range(3):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            work()
        assert [record.value[0] for record in gl.records] == [record.thread for record in gl.records]
        assert 300 == len(gl.records)

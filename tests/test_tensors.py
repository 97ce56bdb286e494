"""What is kept of each kind of value."""

import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import gc
import http
import io
import pathlib
import re
import sys
import threading
import types
import uuid
import weakref

import numpy as np
import pytest
import torch

from visualizer import tensors
from visualizer.store import bytes_by_device
from visualizer.tensors import check_keep, keeper

to_numpy, to_tensor, itself = keeper("numpy"), keeper("tensor"), keeper("graph")


class TestNumpy:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [
            *((torch.float32, np.float32), (torch.float64, np.float64), (torch.float16, np.float16)),
            (torch.bfloat16, np.float32),
            *([(torch.float8_e4m3fn, np.float32)] if hasattr(torch, "float8_e4m3fn") else []),  # since torch 2.1
            *((torch.int64, np.int64), (torch.uint8, np.uint8), (torch.bool, np.bool_)),
            *((torch.complex64, np.complex64), (torch.complex32, np.complex64)),
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # torch's own word on complex32
    def test_values_and_types(self, dtype, expected):
        tensor = torch.tensor([[1, 0], [1, 1]]).to(dtype)
        kept = to_numpy(tensor)
        assert isinstance(kept, np.ndarray)
        assert expected == kept.dtype
        np.testing.assert_array_equal([[1, 0], [1, 1]], kept)

    @pytest.mark.parametrize(
        "view",
        [
            pytest.param(lambda t: t.t(), id="transposed"),
            pytest.param(lambda t: t[::2, 1:], id="strided"),
            pytest.param(lambda t: t[:1].expand(3, 4), id="expanded"),
            pytest.param(lambda t: t[0, 0], id="scalar"),
            pytest.param(lambda t: t[:0], id="empty"),
            pytest.param(lambda t: (t * 1j).conj(), id="conjugate"),
            pytest.param(lambda t: t.clone().requires_grad_() * 2, id="requires grad"),
            pytest.param(torch.nn.Parameter, id="parameter"),
        ],
    )
    def test_views_and_gradients(self, view):
        tensor = view(torch.arange(16.0).reshape(4, 4))
        kept = to_numpy(tensor)
        assert tuple(tensor.shape) == kept.shape
        np.testing.assert_array_equal(tensor.detach().resolve_conj().numpy(), kept)

    @pytest.mark.parametrize("convert", [to_numpy, to_tensor], ids=["numpy", "tensor"])
    @pytest.mark.parametrize(
        "view", [lambda t: t, lambda t: t.t(), lambda t: t[:1].expand(3, 4)], ids=["whole", "transposed", "expanded"]
    )
    def test_a_record_never_changes(self, convert, view):
        tensor = torch.ones(4, 4)
        kept = convert(view(tensor))
        tensor.zero_()
        assert kept.sum() == np.prod(kept.shape) > 0

    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda: torch.ones(2, 2, device="meta"), "meta device"),
            (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
            (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
            (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        ],
        ids=["meta", "sparse", "nested", "quantized"],
    )
    @pytest.mark.filterwarnings("ignore")  # prototypes and deprecations of torch's own
    def test_what_cannot_be_an_array_is_refused_with_the_way_out(self, make, said):
        tensor = make()
        with pytest.raises(TypeError) as caught:
            to_numpy(tensor)
        assert said in str(caught.value)
        assert "keep='tensor'" in str(caught.value)
        assert type(to_tensor(tensor)) is type(tensor)

    def test_arrays_are_copied(self):
        array = np.ones(3)
        for convert in (to_numpy, to_tensor):
            kept = convert(array)
            array[:] = 0
            assert kept.sum() == 3
            array[:] = 1


class TestTensor:
    def test_it_stays_on_its_device_in_its_type_without_its_graph(self):
        tensor = torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 2
        kept = to_tensor(tensor)
        assert (torch.bfloat16, tensor.device, False) == (kept.dtype, kept.device, kept.requires_grad)
        torch.testing.assert_close(tensor.detach(), kept)

    def test_graph_is_the_object_itself(self):
        tensor = torch.ones(2, requires_grad=True)
        assert itself(tensor) is tensor


class TestContainers:
    Pair = collections.namedtuple("Pair", "attn names")

    @pytest.mark.parametrize(
        "wrap",
        [
            *(lambda t: [t, "x"], lambda t: (t, "x"), lambda t: {"a": t}, lambda t: collections.deque([t])),
            *(lambda t: {"a": [(t,)]}, lambda t: collections.OrderedDict(a=t), lambda t: TestContainers.Pair(t, ["x"])),
            lambda t: collections.defaultdict(list, a=t),
        ],
    )
    def test_they_are_followed_and_stay_what_they_are(self, wrap):
        tensor = torch.ones(2)
        value = wrap(tensor)
        kept = to_numpy(value)
        tensor.zero_()
        assert type(value) is type(kept)
        leaves = [kept]
        while not isinstance(leaves[-1], np.ndarray):
            item = leaves[-1]
            leaves.append(next(iter(item.values())) if isinstance(item, dict) else item[0])
        assert leaves[-1].tolist() == [1, 1]

    def test_a_models_output_stays_one(self):
        from transformers.modeling_outputs import BaseModelOutput

        kept = to_numpy(BaseModelOutput(last_hidden_state=torch.ones(2), attentions=(torch.zeros(1),)))
        assert type(kept) is BaseModelOutput
        assert isinstance(kept.last_hidden_state, np.ndarray)
        assert isinstance(kept["attentions"][0], np.ndarray)

    def test_torchs_own_tuples(self):
        kept = to_numpy(torch.tensor([3.0, 1.0]).sort())
        assert kept.values.tolist() == [1, 3]
        assert to_numpy(torch.ones(2, 3).shape) == torch.Size([2, 3])

    def test_one_that_holds_itself(self):
        value = [torch.ones(1)]
        value.append(value)
        kept = to_numpy(value)
        assert kept[1] is kept
        assert isinstance(kept[0], np.ndarray)

    def test_sets_of_tensors_become_lists_of_arrays(self):
        assert [1.0] == [float(array[0]) for array in to_numpy({torch.ones(1)})]

    @pytest.mark.parametrize("base", [dict, list, tuple])
    def test_those_with_a_will_of_their_own_become_plain(self, base):
        def refuse(*args):
            raise ValueError("no")

        value = base({"a": torch.ones(1)} if base is dict else [torch.ones(1)])
        stubborn = type("Stubborn", (base,), {})(value)
        for name in ("__setitem__", "__copy__"):
            setattr(type(stubborn), name, refuse)
        type(stubborn).__new__ = refuse
        kept = to_numpy(stubborn)
        assert isinstance(kept, base)
        assert isinstance(kept["a"] if base is dict else kept[0], np.ndarray)

    def test_what_is_shared_is_copied_once(self):
        value = (torch.ones(1),)
        for _ in range(200):
            value = (value, value)
        kept = to_numpy(value)
        assert kept[0] is kept[1]

    def test_lazy_objects_and_dead_proxies_are_not_asked(self):
        class Lazy:
            @property
            def __class__(self):
                raise RuntimeError("evaluated")

        class Thing:
            pass

        lazy, dead = Lazy(), weakref.proxy(Thing())
        assert to_numpy([lazy])[0] is lazy
        assert next(map(id, to_numpy([dead]))) == id(dead)

    def test_what_has_no_numbers_yet_is_refused_with_the_way_out(self):
        with pytest.raises(TypeError, match="keep='tensor'"):
            torch.func.vmap(lambda row: to_numpy(row) is None or row)(torch.ones(2, 2))

    def test_other_objects_are_kept_by_reference(self):
        thing = object()
        assert to_numpy(thing) is thing
        assert to_numpy([thing])[0] is thing


@dataclasses.dataclass
class Output:
    attn: object
    more: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    attn: object


class Grid:
    """Like an array: it has a shape, and a method that copies it."""

    shape = (2,)

    def __init__(self, values):
        self.values = values

    def copy(self, deep=False):
        return Grid(list(self.values) if deep else self.values)


class Own:
    pass


def told_of(value):
    told = []
    return keeper("numpy", told.append)(value), told


class TestObjects:
    """What has a safe copy is a snapshot; the rest is told."""

    @pytest.mark.parametrize(
        ("make", "change", "show"),
        [
            pytest.param(*each, id=name)
            for name, each in {
                "bytearray": (lambda: bytearray(b"ab"), lambda v: v.extend(b"c"), bytes),
                "memoryview": (lambda: memoryview(bytearray(b"ab")), lambda v: v.__setitem__(0, 9), bytes),
                "memoryview of floats": (
                    lambda: memoryview(np.ones((2, 2))),
                    lambda v: v.__setitem__((0, 0), 9),
                    bytes,
                ),
                "array": (lambda: array.array("d", [1, 2]), lambda v: v.append(3), list),
                "namespace": (lambda: types.SimpleNamespace(a=[1]), lambda v: v.a.append(2), lambda v: v.a),
                "user dict": (lambda: collections.UserDict(a=[1]), lambda v: v["a"].append(2), lambda v: v["a"]),
                "user list": (lambda: collections.UserList([[1]]), lambda v: v[0].append(2), lambda v: v[0]),
                "chain map": (lambda: collections.ChainMap({"a": [1]}), lambda v: v["a"].append(2), lambda v: v["a"]),
                "dataclass": (lambda: Output(np.ones(2)), lambda v: v.attn.fill(9), lambda v: v.attn.tolist()),
                "its list": (lambda: Output(1, [2]), lambda v: v.more.append(9), lambda v: v.more),
                "its attribute": (lambda: Output(1), lambda v: setattr(v, "attn", 2), lambda v: v.attn),
                "frozen": (lambda: Frozen(np.ones(2)), lambda v: v.attn.fill(9), lambda v: v.attn.tolist()),
                "in a list": (lambda: [Frozen([1])], lambda v: v[0].attn.append(9), lambda v: v[0].attn),
                "like an array": (lambda: Grid([1]), lambda v: v.values.append(2), lambda v: v.values),
            }.items()
        ],
    )
    def test_snapshots(self, make, change, show):
        value = make()
        kept, told = told_of(value)
        before = show(kept)
        change(value)
        assert type(value) is type(kept)
        assert before == show(kept) != show(value)
        assert [] == told

    @pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "dok", "dia", "bsr"])
    @pytest.mark.parametrize("interface", ["array", "matrix"])
    def test_sparse_matrices_of_scipy(self, kind, interface):
        sparse = pytest.importorskip("scipy.sparse", reason="engine only: scipy is not in this environment")
        value = getattr(sparse, f"{kind}_{interface}")(np.eye(4))
        [kept, [of_list]], told = told_of([value, [value]])
        value *= 2
        if kind in ("lil", "dok"):
            value[0, 1] = 5
        else:
            value.data[:] = 7
        for copy in (kept, of_list):
            assert type(value) is type(copy)
            assert np.eye(4).tolist() == copy.toarray().tolist()
        assert [] == told
        assert bytes_by_device(kept)["cpu"] >= 4 * 8

    def test_tables_of_pandas(self):
        pandas = pytest.importorskip("pandas", reason="engine only: pandas is not in this environment")
        table = pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
        column = table["a"].copy()
        (kept, of_dict, kept_column), told = told_of((table, {"table": table}, column))
        table.loc[0, "a"] = column[0] = 9.0
        table["new"] = 1
        for copy in (kept, of_dict["table"]):
            assert {"a": [1.0, 2.0], "b": ["x", "y"]} == copy.to_dict("list")
        assert [1.0, 2.0] == kept_column.tolist()
        assert [] == told
        assert bytes_by_device(pandas.DataFrame({"a": np.ones(1000)}))["cpu"] >= 8000

    def test_pictures(self):
        image = pytest.importorskip("PIL.Image", reason="engine only: pillow is not in this environment")
        picture = image.new("L", (2, 2))
        kept, told = told_of(picture)
        picture.putpixel((0, 0), 9)
        assert (0, []) == (kept.getpixel((0, 0)), told)

    def test_tensors_in_attributes_are_converted(self):
        kept, _ = told_of(Output(torch.ones(2), [torch.zeros(1)]))
        assert isinstance(kept.attn, np.ndarray)
        assert isinstance(kept.more[0], np.ndarray)
        assert 4000 <= bytes_by_device(told_of(Output(torch.ones(1000)))[0])["cpu"] <= 4500

    def test_of_their_classes_no_code_runs(self):
        @dataclasses.dataclass
        class Stubborn:
            attn: list

            def __post_init__(self):
                assert self.attn == [1], "it is made once"

            def __setattr__(self, name, value):
                assert "attn" not in vars(self), "and set once"
                object.__setattr__(self, name, value)

            def __getattr__(self, name):
                raise AssertionError(name)

        value = Stubborn([1])
        kept, told = told_of(value)
        value.attn.append(2)
        assert ([1], []) == (kept.attn, told)

    def test_those_that_refer_to_themselves_and_to_each_other(self):
        one, two = Output(1), Output(2)
        one.more.extend([one, two])
        two.more.append(one)
        kept, _ = told_of([one, two])
        assert kept[0].more[0] is kept[0] is not one
        assert kept[0].more[1] is kept[1]
        assert kept[1].more[0] is kept[0]
        assert bytes_by_device(kept)["cpu"] > 0

    @pytest.mark.parametrize(
        "make",
        [
            *(Own, lambda: (i for i in "ab"), lambda: io.StringIO("a"), lambda: {1: 2}.keys(), lambda: iter([1])),
            *(lambda: torch.nn.Linear(1, 1), lambda: np.random.default_rng(0), lambda: types.MappingProxyType({})),
            *(threading.Lock, lambda: dataclasses.make_dataclass("Net", [], bases=(torch.nn.Module,))()),
            lambda: dataclasses.make_dataclass("Resource", [], namespace={"__del__": lambda self: None})(),
            lambda: type("Broken", (Grid,), {"copy": lambda self: 1 / 0})([1]),
        ],
    )
    def test_others_are_kept_by_reference_and_told(self, make):
        value = make()
        for wrapped in (value, [value], {"a": (value,)}):
            kept, told = told_of(wrapped)
            assert [type(value)] == told
        assert value is kept["a"][0]

    @pytest.mark.parametrize(
        "value",
        [
            *(None, True, 3, 1.5, 1j, "a", b"a", range(3), slice(1), ..., object(), np.float32(1), np.dtype("f4")),
            *(datetime.datetime(2020, 1, 1), datetime.timedelta(1), decimal.Decimal(1), fractions.Fraction(1, 2)),
            *(pathlib.Path("a"), uuid.UUID(int=1), re.compile("a"), enum.Enum("Colour", "red").red, http.HTTPStatus.OK),
            *(len, told_of, Own, types, [].append, torch.float32, torch.device("cpu"), torch.strided, torch.Size([1])),
            type("Name", (str,), {})("a"),
        ],
    )
    def test_what_never_changes_is_no_news(self, value):
        kept, told = told_of([value])
        assert (kept[0] is value, told) == (True, [])


class TestArraysOfObjects:
    """As numpy makes them of maps of several sizes."""

    def test_their_items_are_snapshots_too(self):
        array = np.empty((2, 2), object)
        array[0, 0], array[0, 1], array[1, 0], array[1, 1] = np.ones(3), [np.ones(2)], torch.ones(2), "text"
        kept = to_numpy(array)
        array[0, 0][:] = array[0, 1][0][:] = 7
        array[1, 0][:] = 7
        assert [1, 1, 1] == kept[0, 0].tolist()
        assert [1, 1] == kept[0, 1][0].tolist() == kept[1, 0].tolist()
        assert isinstance(kept[1, 0], np.ndarray)
        assert "text" == kept[1, 1]


def test_classes_that_come_and_go_are_not_held():
    kind = type("Own", (), {})
    to_numpy([kind(), kind()])
    gone = weakref.ref(kind)
    del kind
    gc.collect()
    assert gone() is None


class TestCallables:
    def test_only_the_result_is_kept_and_it_is_a_snapshot(self):
        tensor = torch.arange(4.0).reshape(2, 2)
        kept = keeper(lambda a: a[0])(tensor)
        tensor.zero_()
        assert kept.tolist() == [0, 1]
        assert not kept.requires_grad

    def test_none_is_not_asked_about(self):
        assert keeper(lambda a: a.mean(1))(None) is None

    @pytest.mark.parametrize(("keep", "error"), [("cuda", ValueError), (None, TypeError), (sys, TypeError)])
    def test_anything_else_is_an_error_that_lists_the_choices(self, keep, error):
        with pytest.raises(error, match="'numpy', 'tensor', 'graph' or a callable"):
            check_keep(keep)


@pytest.mark.parametrize("own", [None, lambda self: 1 / 0])
def test_values_whose_class_cannot_be_hashed(own):
    class Meta(type):
        __hash__ = own

    class Odd(metaclass=Meta):
        pass

    value = Odd()
    assert value is to_numpy(value)
    assert not tensors.is_tensor(value)

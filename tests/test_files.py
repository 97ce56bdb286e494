"""What is captured survives a file: the same keys, values and types, or an error that says what is wrong."""

import collections
import datetime
import enum
import errno
import json
import math
import os
import pickle
import random
import subprocess
import sys
import textwrap
import tracemalloc
import zlib

import pytest

np = pytest.importorskip("numpy", reason="files of arrays need numpy")
torch = pytest.importorskip("torch", reason="files of tensors need torch")
safetensors = pytest.importorskip("safetensors", reason="judges whether the files are valid")

from safetensors.numpy import load_file, save_file  # noqa: E402

import visualizer  # noqa: E402
from visualizer import (  # noqa: E402
    FileFormatError,
    VisualizerError,
    load,
)
from visualizer.store import Cache, Record, Saved, files  # noqa: E402


def write(path, keys, records, about):
    files.write(path, Saved("values", tuple(keys), records, about))


Pair = collections.namedtuple("Pair", "first second")


class Colour(enum.IntEnum):
    RED = 7


class Own(np.ndarray):
    """An array of a user's class."""


class Output(dict):
    """Like a model's output: a dict that is no plain one."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "maps.safetensors"


@pytest.fixture
def there_and_back(path):
    """What a value is after it was written and read."""

    def go(value):
        write(path, ["attn"], [record(value)], {})
        return load(path)["attn"][0]

    return go


def record(value, key="attn", call=0, variable="weights", line=None, thread=1, module=None):
    return Record(key, variable, value, call, line, thread, module)


def assert_same(expected, actual):
    """Equal, of equal types, to any depth; NaN equals NaN."""
    assert type(expected) is type(actual)
    if isinstance(expected, np.ndarray):
        assert expected.dtype.newbyteorder("=") == actual.dtype
        np.testing.assert_array_equal(expected, actual)
        assert actual.flags.writeable
    elif isinstance(expected, torch.Tensor):
        assert expected.dtype == actual.dtype
        assert expected.shape == actual.shape
        assert torch.device("cpu") == actual.device
        assert not actual.requires_grad
        assert bits(expected) == bits(actual)
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert_same(list(expected.items()), list(actual.items()))
    elif expected != expected:
        assert actual != actual
    else:
        assert expected == actual
        if isinstance(expected, (float, complex)):
            assert repr(expected) == repr(actual)  # 0.0 == -0.0


def bits(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    return [torch.view_as_real(tensor).tolist() if tensor.is_complex() else tensor.double().tolist()]


def forged(path, content, entries=None, data=b"", **metadata):
    """A file of any content whose checksums are right."""
    text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
    sums = [zlib.crc32(text.encode())] + [zlib.crc32(data)] * len(entries or {})
    given = {"visualizer": text, "crc32": " ".join(f"{each:08x}" for each in sums), **metadata}
    header = json.dumps({"__metadata__": given, **(entries or {})}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


COLUMNS = {name: [] for name in ("key", "variable", "line", "thread", "module", "call", "value")}
EMPTY = {"version": 2, "kind": "values", "entries": [], "packs": [], "nodes": [["dict", []]], "keys": [], "about": [0]}
EMPTY |= {"records": COLUMNS}


def one_record(key="a", variable="x", value=(0, 1), call=0, line=None, thread=1, module=None):
    """The columns of a file with one record."""
    facts = {"key": key, "variable": variable, "call": call, "line": line, "thread": thread, "module": module}
    return {name: [[fact, 1]] for name, fact in facts.items()} | {
        "value": [list(value) if isinstance(value, tuple) else value]
    }


def refusal(path):
    """The message of the error of a file that cannot be read, which is one line that names the file."""
    with pytest.raises(FileFormatError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def attend(x):
    attn = 2 * x
    return attn


@pytest.mark.parametrize("keep", ["numpy", "graph"])
def test_files_and_records_have_what_the_users_lists_have(keep, path, tmp_path):
    with visualizer.capture(attend, "attn", keep=keep) as found:
        for x in range(4):
            attend(x)
        del found["attend"][0]
        found["attend"][0] = "mine"
        found["attend"].insert(1, "added")
        found["other"] = [0.5, 0.25]
        attend(4)
    assert ["mine", "added", 4, 6, 8] == found["attend"]
    seen = [(record.key, record.value, record.call) for record in found.records]
    of_attend = [("attend", *each) for each in [("mine", -1), ("added", -1), (4, 2), (6, 3), (8, 4)]]
    assert [*of_attend, ("other", 0.5, -1), ("other", 0.25, -1)] == seen
    found.save(path, {"tokens": ["a"]})
    again = load(path)
    assert dict(found) == dict(again)
    assert seen == [(record.key, record.value, record.call) for record in again.records]
    again.save(tmp_path / "again.safetensors")
    assert {"tokens": ["a"]} == load(tmp_path / "again.safetensors").about


def test_an_array_in_a_lists_place(path):
    with visualizer.capture(attend, "attn") as found:
        attend(np.ones(3)), attend(np.ones(3))
        found["attend"] = np.stack(found["attend"])
        assert (2, 3) == found["attend"].shape
        attend(np.zeros(3))
    assert [[2, 2, 2], [2, 2, 2], [0, 0, 0]] == [value.tolist() for value in found["attend"]]
    found.save(path)
    assert (3, 3) == load(path).stack().shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_shown_and_not_stacked():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with visualizer.capture(attend, "attn", keep="tensor") as found:
        attend(nested)
    assert "nested" in repr(found)
    assert "Tensor" in repr(found.records[0])
    with pytest.raises(ValueError, match="'attend\\[0\\]' has no one shape: it is a nested tensor"):
        found.stack()


class TestRecords:
    def test_keys_records_and_about_are_those_that_were_written(self, path):
        records = [
            record(1.5, "b/attn", call=0, line=12, thread=140_000_000_000_000, module=""),
            record(2.5, "b/attn", call=3, variable="other", module="blocks.3"),
            record(None, "a", call=-1, line=2**40, thread=2**63 - 1),
        ]
        about = {"tokens": ["[CLS]", "猫"], "grid": (2, 3), "image": np.arange(6, dtype=np.uint8).reshape(2, 3)}
        write(path, ["z", "b/attn", "empty", "a"], records, about)
        cache = load(path)
        assert type(cache) is Cache
        assert {"z": [], "b/attn": [1.5, 2.5], "empty": [], "a": [None]} == cache
        assert ["z", "b/attn", "empty", "a"] == list(cache)
        fields = ("key", "variable", "value", "call", "line", "thread", "module")
        for expected, actual in zip(records, cache.records, strict=True):
            assert [getattr(expected, field) for field in fields] == [getattr(actual, field) for field in fields]
        assert_same(about, cache.about)

    def test_a_capture_is_saved_and_loaded(self, path):
        def attend(x):
            attn = [x, {"map": np.full((2, 3), x)}]
            return "done"

        with visualizer.capture(attend, "attn") as found:
            attend(1.0), attend(2.0)
        found.save(path, about={"n": 1})
        again = visualizer.load(path)
        assert list(found) == list(again)
        for key in found:
            assert_same(found[key], again[key])
        assert [(r.variable, r.call, r.thread) for r in found.records] == [
            (r.variable, r.call, r.thread) for r in again.records
        ]
        again.save(path, again.about)
        assert {"n": 1} == load(path).about

    def test_it_is_a_cache_like_any_other(self, path):
        write(path, ["a", "b"], [record(np.ones((2, 2)), "a"), record(np.ones((2, 2)), "b")], {})
        cache = load(path)
        assert (2, 2, 2) == cache.stack().shape
        assert f"load({os.fspath(path)!r})" in repr(cache)
        with pytest.raises(visualizer.UnknownKeyError, match=r"'a', 'b'.*read from .*maps\.safetensors"):
            cache["c"]

    @pytest.mark.parametrize(
        "key", ["", "/", "__metadata__", "a/0", "猫 😀", 'a\n"\\\0', "\ud800", "é" * 500], ids=ascii
    )
    def test_any_text_is_a_key(self, path, key):
        keys = [key, f"{key}/0", "?", "about", "a"]
        records = [record([np.full(2, float(i)), np.zeros(1)], key) for i, key in enumerate(keys)]
        records += [record(np.full(3, float(i)), key) for i, key in enumerate(keys)]
        write(path, keys, sorted(records, key=lambda each: keys.index(each.key)), {"more": np.full(4, 9.0)})
        cache = load(path)
        assert keys == list(cache)
        for i, each in enumerate(keys):
            assert_same([[np.full(2, float(i)), np.zeros(1)], np.full(3, float(i))], cache[each])
        assert_same(np.full(4, 9.0), cache.about["more"])
        assert 16 == len(load_file(path))

    def test_a_key_that_was_taken_out_of_the_cache_is_not_written(self, path):
        write(path, ["a"], [record(1, "a"), record(object(), "gone")], {})
        assert {"a": [1]} == load(path)

    def test_nothing_captured_is_a_file_too(self, path):
        write(path, [], [], {})
        assert {} == load(path)
        assert [] == load(path).records

    def test_about_must_be_a_dict(self, path):
        with pytest.raises(TypeError, match=r"about must be a dict, .* not list"):
            write(path, [], [], ["tokens"])
        assert not path.exists()

    def test_the_path_may_be_text(self, path):
        write(str(path), ["a"], [], {})
        assert ["a"] == list(load(str(path)))


class TestValues:
    @pytest.mark.parametrize(
        "value",
        [
            *(None, True, False, 0, -1, 2**53, -(2**53) - 1, 10**5000, -(10**5000)),
            *(0.1, -0.0, 1e308, 5e-324, math.inf, -math.inf, math.nan),
            *(1j, complex(-0.0, math.nan), complex(math.inf, -0.0)),
            *("", "text", "\ud800\0\n'\"\\", "猫" * 10, b"", b"\x00\xff"),
            *([], (), {}, set(), frozenset(), [[]], ([],), {"a": {}}, [None, [True, (1.5,)]]),
            {1: "int", 1.5: "float", None: "none", (1, (2,)): "tuple", frozenset({1, 2}): "set", b"b": 1, "": 2},
            {False: 1, "False": 2, 2**70: 3, math.inf: 4},
            pytest.param({1, "a", (1, 2), frozenset({3}), None}, id="a set"),  # its order is another in each process
            [{1}, frozenset({2.5})],
        ],
        ids=lambda value: ascii(value)[:40] if not isinstance(value, int) else f"{value.bit_length()} bits",
    )
    def test_come_back_equal_and_of_their_types(self, there_and_back, value):
        assert_same(value, there_and_back(value))
        assert_same([value, {"k": (value,)}], there_and_back([value, {"k": (value,)}]))

    @pytest.mark.parametrize(
        "name", "bool int8 uint16 int64 uint64 float16 float32 float64 complex64 complex128".split()
    )
    def test_numpy_numbers_stay_numpy_numbers(self, there_and_back, name):
        scalar = np.dtype(name).type(1)
        assert_same([scalar, {scalar: 2}], there_and_back([scalar, {scalar: 2}]))

    def test_numpy_numbers_that_are_not_finite(self, there_and_back):
        assert_same([np.float32("nan"), np.float64("-inf")], there_and_back([np.float32("nan"), np.float64("-inf")]))

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (Pair(1, [2]), (1, [2])),
            (Output(a=1, b=Output()), {"a": 1, "b": {}}),
            (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
            (collections.defaultdict(list, a=[1]), {"a": [1]}),
            (torch.Size([2, 3]), (2, 3)),
            ([Colour.RED, np.str_("text")], [7, "text"]),
        ],
    )
    def test_of_a_subclass_come_back_plain(self, there_and_back, value, expected):
        assert_same(expected, there_and_back(value))

    def test_what_a_model_returns(self, there_and_back):
        outputs = pytest.importorskip("transformers.modeling_outputs")
        output = outputs.BaseModelOutput(last_hidden_state=torch.ones(1, 2), attentions=(torch.zeros(1, 2),))
        expected = {"last_hidden_state": torch.ones(1, 2), "attentions": (torch.zeros(1, 2),)}
        assert_same(expected, there_and_back(output))

    @pytest.mark.parametrize("make", [list, tuple, dict, set], ids=lambda make: make.__name__)
    def test_depth_has_no_limit(self, there_and_back, make):
        wrap = {dict: lambda value: {"in": value}, set: lambda value: [{1}, value]}.get(
            make, lambda value: make([value])
        )
        value = 1.5
        for _ in range(20_000):
            value = wrap(value)
        value, depth = there_and_back(value), 0
        while isinstance(value, (list, tuple, dict)):
            value, depth = value["in"] if make is dict else value[-1], depth + 1
        assert (1.5, 20_000) == (value, depth)

    def test_small_arrays_of_many_kinds_in_any_order(self, there_and_back):
        kinds = [
            *(lambda i: np.full((2, 3), i, "f4"), lambda i: np.full((2, 3), i, ">f4"), lambda i: np.array(i)),
            *(lambda i: np.full(2, i * 1j), lambda i: np.zeros((0, 3)), lambda i: np.full(2, i).view(Own)),
            *(lambda i: torch.full((2,), i, dtype=torch.bfloat16), lambda i: torch.tensor(i + 1j).conj()),
            *(lambda i: torch.full((2,), float(i), requires_grad=True), lambda i: i, lambda i: [np.array(i), "text"]),
        ]
        order = random.Random(0).choices(range(len(kinds)), k=600)
        values = [kinds[kind](i) for i, kind in enumerate(order)]
        plain = [np.asarray(v) if isinstance(v, Own) else v for v in values]
        plain = [v.detach() if isinstance(v, torch.Tensor) else v for v in plain]
        assert_same(plain, there_and_back(values))

    def test_small_arrays_come_back_each_on_its_own(self, path):
        for make in (np.ones, torch.ones):
            write(path, ["attn"], [record(make(3)) for _ in range(100)], {})
            first, second, *_ = load(path)["attn"]
            first[:] = 5
            assert [1, 1, 1] == second.tolist()
            assert first.base is None if make is np.ones else first.nbytes == first.untyped_storage().nbytes()

    def test_what_is_one_object_stays_one(self, path):
        array, row, tensor = np.ones(1000), [1], torch.zeros(1000)
        records = [record([array, row, tensor, (row, array)]), record(tensor), record(array)]
        write(path, ["attn"], records, {"same": array})
        first, second, third = load(path)["attn"]
        assert first[0] is third is first[3][1] is not None
        assert first[1] is first[3][0]
        assert first[2] is second
        assert 2 == len(load_file(path))

    def test_objects_that_an_iterator_makes_anew_are_not_mixed_up(self, there_and_back):
        class Odd(list):
            def __iter__(self):
                return (np.full(3, float(i)) for i in range(5))

        assert [1, 2] == there_and_back(Odd([1, 2]))

    @pytest.mark.parametrize("kind", ["list", "dict", "through a tuple"])
    def test_what_contains_itself_is_refused(self, path, kind):
        value = {} if kind == "dict" else []
        if kind == "dict":
            value["me"] = [value]
        else:
            value.append((value,) if kind == "through a tuple" else value)
        with pytest.raises(TypeError, match=r"'attn'\[0\] holds a (list|dict) that contains itself"):
            write(path, ["attn"], [record(value)], {})
        assert [] == os.listdir(path.parent)

    def test_a_key_of_too_many_parts_is_refused(self, path, there_and_back):
        """Python's own hash of it can overflow the stack."""
        key = ()
        for _ in range(900):
            key = (key,)
        assert there_and_back({key: 1}) == {key: 1}
        for _ in range(200):
            key = (key,)
        for value in ({key: 1}, {key}, frozenset([(1, key)])):
            with pytest.raises(TypeError, match=r"'attn'\[0\] holds a dict's key or a set's element of more than 1000"):
                write(path, ["attn"], [record(value)], {})


NUMPY = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
TORCH = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
VIEWS = {
    "whole": lambda a: a,
    "transposed": lambda a: a.swapaxes(0, 1),
    "strided": lambda a: a[::2, 1:],
    "a column": lambda a: a[:, 1],
    "one of a column": lambda a: a[::3, 1][:1],
    "none of a column": lambda a: a[:, 1][:0],
    "scalar": lambda a: a[0, 0, ...],
    "empty": lambda a: a[:, :0],
    "one": lambda a: a[None, :1, None, :1],
}


def every_view(test):
    return pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)(test)


class TestArrays:
    @every_view
    @pytest.mark.parametrize("order", "<>")
    @pytest.mark.parametrize("name", NUMPY)
    def test_of_numpy(self, there_and_back, name, order, view):
        array = np.arange(-6, 6).astype(np.dtype(name).newbyteorder(order)).reshape(4, 3)
        if "complex" in name:
            array *= 1 - 2j
        array = view(array)
        actual = there_and_back(array)
        assert_same(array, actual)
        assert actual.dtype.isnative

    @every_view
    @pytest.mark.parametrize("name", TORCH)
    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")  # torch's own word on complex32
    def test_of_torch(self, there_and_back, name, view):
        dtype = getattr(torch, name, None)
        if dtype is None:
            pytest.skip(f"this torch has no {name}")
        size = torch.empty(0, dtype=dtype).element_size()
        numbers = torch.arange(1, 13) if "complex" not in name else torch.arange(1, 13) * (1 - 2j)
        tensor = view(numbers.reshape(4, 3).to(dtype))
        assert size == tensor.element_size()
        assert_same(tensor, there_and_back(tensor))

    def test_numbers_that_are_not_finite(self, there_and_back):
        array = np.array([np.nan, np.inf, -np.inf, -0.0])
        actual = there_and_back([array, torch.from_numpy(array)])
        assert array.tobytes() == actual[0].tobytes() == actual[1].numpy().tobytes()

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda t: (t * 1j).conj(), id="conjugate"),
            pytest.param(lambda t: (t[:1, :1] * 1j).conj().imag, id="negative"),
            pytest.param(lambda t: (t * 1j).conj().imag, id="negative, strided"),
            pytest.param(lambda t: t.requires_grad_() * 2, id="with a graph"),
            pytest.param(torch.nn.Parameter, id="parameter"),
            pytest.param(lambda t: t[:1].expand(3, 4), id="expanded"),
            pytest.param(lambda t: t[None, None].to(memory_format=torch.channels_last), id="channels last"),
        ],
    )
    def test_tensors_that_are_not_what_lies_in_memory(self, there_and_back, make):
        tensor = make(torch.arange(16.0).reshape(4, 4))
        actual = there_and_back(tensor)
        assert torch.Tensor is type(actual)
        assert tensor.tolist() == actual.tolist()
        assert not actual.requires_grad
        assert not actual.is_conj()

    def test_tensors_come_to_the_cpu_whatever_the_default_device(self, there_and_back):
        torch.set_default_device("meta")
        try:
            assert "cpu" == there_and_back(torch.ones(3, device="cpu")).device.type
        finally:
            torch.set_default_device(None)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_tensors_on_a_gpu(self, there_and_back):
        for tensor in (torch.arange(6.0, device="cuda"), torch.ones(2, 3, device="cuda", dtype=torch.bfloat16).T):
            assert_same(tensor.cpu(), there_and_back(tensor))

    def test_subclasses_of_arrays_come_back_plain(self, there_and_back):
        class Own(np.ndarray):
            pass

        assert_same(np.arange(3.0), there_and_back(np.arange(3.0).view(Own)))

    def test_reading_what_has_no_tensor_needs_no_torch(self, path):
        write(path, ["a"], [record([np.ones(2), np.float32(1)], "a")], {})
        code = "import sys; sys.modules['torch'] = None; from visualizer import load; load(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)

    def test_what_has_no_array_needs_no_numpy(self, path):
        code = """
            import sys
            sys.modules["torch"] = sys.modules["numpy"] = None
            from visualizer import load
            from visualizer.store import Record, Saved, files
            files.write(sys.argv[1], Saved("values", ("a",), [Record("a", "x", [1, {2.5}], 0, None, 1)], {}))
            assert {"a": [[1, {2.5}]]} == load(sys.argv[1])
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=True)

    def test_tensors_of_a_type_that_an_older_torch_lacks(self, path, monkeypatch):
        write(path, ["a"], [record(torch.zeros(2, dtype=torch.bfloat16), "a")], {})
        monkeypatch.delattr(torch, "bfloat16")
        assert "has bfloat16 tensors, which torch" in refusal(path)


ONES = torch.ones(2)
REFUSED = [
    # a value that cannot be written, the words for it, the way out
    (lambda: np.array([1, "a"], object), "an array of the dtype object", "x.tolist()"),
    (lambda: np.array(["a"]), "an array of the dtype <U1", "x.tolist()"),
    (lambda: np.zeros(2, [("w", float)]), "an array of the dtype [('w', '<f8')]", "x['w']"),
    (lambda: np.zeros(2, "datetime64[s]"), "an array of the dtype datetime64[s]", "x.astype('int64')"),
    (lambda: np.ma.masked_array([1.0], [True]), "a masked array", "x.filled()"),
    (lambda: np.datetime64(0, "s"), "an object of type datetime64", "x.attentions"),
    (lambda: torch.eye(2).to_sparse(), "a tensor of the layout torch.sparse_coo", "x.to_dense()"),
    (lambda: torch.eye(2).to_sparse_csr(), "a tensor of the layout torch.sparse_csr", "x.to_dense()"),
    (lambda: torch.ones(2, device="meta"), "a tensor without numbers, on the meta device", "x.shape"),
    (lambda: torch.quantize_per_tensor(ONES, 1.0, 0, torch.qint8), "a quantized tensor", "x.dequantize()"),
    (lambda: torch.nested.nested_tensor([ONES, torch.ones(3)]), "a nested tensor", "x.to_padded_tensor(0)"),
    (object, "an object of type object", "x.attentions"),
    (lambda: collections.deque([1]), "an object of type deque", "x.attentions"),
    (lambda: datetime.date(2020, 1, 1), "an object of type date", "x.attentions"),
    (lambda: int, "an object of type type", "x.attentions"),
]
if np.dtype(np.longdouble).name != "float64":
    REFUSED += [
        (lambda: np.zeros(2, np.longdouble), "an array of the dtype float", "x.astype('float64')"),
        (lambda: np.longdouble(1), "an object of type ", "x.attentions"),
    ]
if hasattr(torch, "bits8"):
    REFUSED += [(lambda: torch.empty(2, dtype=torch.bits8), "a tensor of the dtype torch.bits8", "x.float()")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own words on sparse, quantized and nested tensors
class TestRefused:
    @pytest.mark.parametrize(("make", "what", "way"), REFUSED, ids=[what for _, what, _ in REFUSED])
    def test_before_a_byte_is_written(self, path, make, what, way):
        value = make()
        for bad in ([value], value, {"a": (value,)}):
            records = [record(np.ones(1000), "good"), record(1, "blocks.3"), record(bad, "blocks.3")]
            with pytest.raises(TypeError) as caught:
                write(path, ["good", "blocks.3"], records, {})
            message = str(caught.value)
            assert message.startswith(f"'blocks.3'[1] holds {what}")
            assert message.endswith(f"which cannot be written to a file; keep a part, e.g. keep=lambda x: {way}")
            assert [] == os.listdir(path.parent)

    def test_in_about(self, path):
        with pytest.raises(TypeError, match=r"about holds an object of type object, which .* give a part of it"):
            write(path, [], [], {"image": [object()]})
        assert [] == os.listdir(path.parent)

    def test_tensors_that_have_no_numbers_yet(self, path):
        from torch._subclasses.fake_tensor import FakeTensorMode

        path.write_text("old")
        with FakeTensorMode():
            fake = torch.ones(3)
        with pytest.raises(TypeError, match=r"'attn/0'.* cannot be written to a file"):
            write(path, ["attn"], [record(fake)], {})

        def inside(x):
            with pytest.raises(TypeError, match=r"'attn/0'.* cannot be written to a file"):
                write(path, ["attn"], [record(x)], {})
            return x

        torch.vmap(inside)(torch.ones(2, 3))
        assert "old" == path.read_text()
        assert [path.name] == os.listdir(path.parent)

    def test_tensors_that_are_elsewhere_in_parts(self, path):
        class Sharded(torch.Tensor):
            def detach(self):
                return super().detach()[:1]

        with pytest.raises(TypeError, match=r"'attn/0': a .* in parts cannot be written to a file"):
            write(path, ["attn"], [record(torch.ones(3).as_subclass(Sharded))], {})
        assert [] == os.listdir(path.parent)

    def test_more_text_than_the_format_has_room_for(self, path, monkeypatch):
        monkeypatch.setattr(visualizer.store.files, "_MAX_HEADER", 1000)
        with pytest.raises(ValueError, match=r"takes 1,\d\d\d bytes, of which a safetensors file holds 1,000"):
            write(path, ["attn"], [record(list(range(300)))], {})
        assert [] == os.listdir(path.parent)


class TestTheFile:
    def test_other_programs_read_its_entries(self, path):
        records = [
            record(np.arange(6.0, dtype="f4").reshape(2, 3), "blocks.3.attn"),
            record([np.array([True]), torch.ones(2, dtype=torch.bfloat16)], "blocks.3.attn"),
            record(np.array([1 + 2j]), "z"),
            record(np.array([1 + 2j], "c8"), "z"),
            record(np.zeros((0, 3), ">i2"), "z"),
        ]
        write(path, ["blocks.3.attn", "z"], records, {"image": np.ones((2, 2), np.uint8)})
        names = ["blocks.3.attn/0", "blocks.3.attn/1/0", "blocks.3.attn/1/1", "z/0", "z/1", "z/2", "about/0"]
        with safetensors.safe_open(path, framework="pt") as file:
            assert sorted(names) == sorted(file.keys())
            assert [[0, 1, 2], [3, 4, 5]] == file.get_tensor("blocks.3.attn/0").tolist()
            assert [True] == file.get_tensor("blocks.3.attn/1/0").tolist()
            assert torch.bfloat16 == file.get_tensor("blocks.3.attn/1/1").dtype
            assert [[1, 2]] == file.get_tensor("z/0").tolist()
            assert [1 + 2j] == file.get_tensor("z/1").tolist()
            assert (0, 3) == file.get_tensor("z/2").shape
            metadata = file.metadata()
        assert 2 == json.loads(metadata["visualizer"])["version"]

    def test_the_text_is_json_that_anything_reads(self, path):
        def refuse(constant):
            raise AssertionError(constant)

        write(path, ["a"], [record([math.nan, math.inf, 10**5000, "\ud800"], "a")], {})
        with safetensors.safe_open(path, framework="np") as file:
            content = json.loads(file.metadata()["visualizer"], parse_constant=refuse)
        assert 2 == content["version"]

    def test_every_type_is_one_that_the_format_knows(self, path):
        tensors = [torch.zeros(3, dtype=getattr(torch, name)) for name in TORCH if hasattr(torch, name)]
        arrays = [np.zeros(3, name) for name in NUMPY]
        write(path, ["a"], [record([tensors, arrays], "a")], {})
        with safetensors.safe_open(path, framework="pt") as file:
            assert len(tensors) + len(arrays) == len([file.get_slice(name).get_shape() for name in file.keys()])

    def test_small_arrays_take_no_more_than_three_times_their_bytes(self, path):
        for value in (np.ones((), "f4"), np.ones(4, "f2"), torch.ones(2), np.ones((3, 4))):
            values = [value * i for i in range(1_000)]
            values = [np.asarray(value, values[0].dtype) if value.ndim == 0 else value for value in values]
            write(path, ["attn"], [record(value, call=i) for i, value in enumerate(values)], {})
            assert path.stat().st_size <= 1.5 * 1_000 * value.nbytes + 2_000
            assert_same(values, load(path)["attn"])

    def test_records_of_every_order(self, path):
        rng = random.Random(0)
        records = [
            record(rng.choice([i, np.ones(2), "x", None]), rng.choice("ab"), rng.randrange(9), rng.choice(["q", "k"]))
            for i in range(300)
        ]
        records += [record(i, "a", 2**62 + i, line=rng.choice([None, 3]), thread=rng.choice([1, 2])) for i in range(99)]
        records += [record(np.ones(2) * i, "b", -i, module=rng.choice([None, "", "x"])) for i in range(99)]
        write(path, ["a", "b"], records, {})
        of_keys = sorted(records, key=lambda each: each.key)

        def plain(each):
            return each.key, each.variable, str(each.value), each.call, each.line, each.thread, each.module

        assert [*map(plain, of_keys)] == [*map(plain, load(path).records)]
        assert [*map(plain, records)] == [*map(plain, files.read(path).records)]

    @pytest.mark.parametrize("order", [[0] * 20, [0, 1, 2, 2, 3, 3, 4, 4], [0, 1, 2] * 30, [1, 0, 1, 2, 0]], ids=str)
    def test_the_same_objects_again_and_again(self, path, order):
        kept = [np.full(3, number) for number in range(6)]
        write(path, ["attn"], [record(kept[number], call=call) for call, number in enumerate(order)], {})
        read = load(path)["attn"]
        assert order == [int(value[0]) for value in read]
        assert len({*order}) == len({*map(id, read)})

    def test_no_second_copy_of_the_values_is_held(self, path):
        records = [record(np.ones((10, 100, 250))) for _ in range(10)]  # 20 MB
        tracemalloc.start()
        try:
            write(path, ["attn"], records, {})
            assert tracemalloc.get_traced_memory()[1] < 1e6
            tracemalloc.reset_peak()
            cache = load(path)
            assert tracemalloc.get_traced_memory()[1] < 21e6
        finally:
            tracemalloc.stop()
        assert 10 == len(cache["attn"])

    def test_no_second_copy_of_small_values_is_held(self, path):
        values = [np.ones(500) for _ in range(5000)]  # 20 MB
        records = [record(value) for value in values]
        tracemalloc.start()
        try:
            write(path, ["attn"], records, {})
            assert tracemalloc.get_traced_memory()[1] < 6e6
        finally:
            tracemalloc.stop()

    def test_entries_lie_aligned(self, path):
        mixed = [np.ones(3, bool), np.ones(3), np.ones(3, "f2"), np.ones(1, "c16"), np.ones(5, "f4")]
        write(path, ["a"], [record(mixed, "a")], {})
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        sizes = {"BOOL": 1, "F16": 2, "F32": 4, "F64": 8}
        for name in header.keys() - {"__metadata__"}:
            assert 0 == (8 + length + header[name]["data_offsets"][0]) % sizes[header[name]["dtype"]]

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
    def test_its_permissions_are_those_of_any_new_file(self, path):
        old = os.umask(0o027)
        try:
            write(path, [], [], {})
        finally:
            os.umask(old)
        assert 0o640 == path.stat().st_mode & 0o777

    @pytest.mark.skipif(os.name == "nt", reason="Windows asks for rights to make links")
    def test_a_link_still_leads_to_it(self, path, tmp_path):
        (tmp_path / "link").symlink_to(path)
        write(tmp_path / "link", ["a"], [], {})
        assert (tmp_path / "link").is_symlink()
        assert ["a"] == list(load(path))

    def test_a_name_of_the_longest_kind(self, tmp_path):
        write(tmp_path / ("n" * 255), ["a"], [], {})
        assert ["n" * 255] == os.listdir(tmp_path)

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("step", ["os.fsync", "os.replace", "zlib.crc32"])
    def test_an_error_leaves_the_old_file(self, path, monkeypatch, step, error):
        write(path, ["old"], [], {})

        def fail(*args):
            if step != "zlib.crc32" or isinstance(args[0], np.ndarray):  # in the middle of the entries
                raise error
            return 0

        monkeypatch.setattr(f"visualizer.store.files.{step}", fail)
        with pytest.raises(type(error)):
            write(path, ["new"], [record(np.ones(5), "new")], {})
        monkeypatch.undo()
        assert ["old"] == list(load(path))
        assert [path.name] == os.listdir(path.parent)

    @pytest.mark.parametrize("step", ["zlib.crc32", "os.fsync", "os.replace"])
    @pytest.mark.parametrize("before", [True, False], ids=["over an old file", "where there was none"])
    def test_a_killed_process_leaves_the_old_file_or_none(self, path, step, before):
        if before:
            write(path, ["old"], [record(1, "old")], {})
        code = f"""
            import sys, time
            import numpy as np
            from visualizer.store import Record, Saved, files

            def stuck(*args):
                if {step!r} != "zlib.crc32" or type(args[0]) is np.ndarray and args[0].sum():  # the second entry
                    print("in the middle", flush=True)
                    time.sleep(60)
                return 0

            files.{step} = stuck
            records = [Record("new", "x", np.full(100_000, value), 0, None, 1) for value in (0, 1)]
            files.write(sys.argv[1], Saved("values", ("new",), records, {{}}))
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert "in the middle\n" == process.stdout.readline()
            process.kill()
        assert 0 != process.returncode
        if before:
            assert {"old": [1]} == load(path)
        else:
            assert not path.exists()

    def test_where_it_cannot_be_written(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            write(tmp_path / "no folder" / "maps", [], [], {})
        assert str(caught.value.filename).endswith("maps")
        with pytest.raises(OSError):
            write(tmp_path, [], [], {})
        assert [] == os.listdir(tmp_path)


class TestRefusedFiles:
    @pytest.fixture
    def whole(self, path):
        """A small file of everything, as bytes."""
        alike = [np.full(1, i + 0.5) for i in range(16)]
        value = [np.arange(3.0), torch.ones(2, dtype=torch.bfloat16), np.zeros((0, 5)), np.float32(2), {"a": (1, 1j)}]
        value += alike
        write(path, ["b.attn", "empty"], [record(value, "b.attn", line=3, module="b")], {"tokens": ["a", "猫"]})
        load(path)
        return path.read_bytes()

    def test_any_changed_byte(self, path, whole):
        rng = random.Random(0)
        for place in range(len(whole)):
            for change in {1 << rng.randrange(8), rng.randrange(1, 256)}:
                path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
                refusal(path)

    def test_cut_off_anywhere_or_longer(self, path, whole):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            refusal(path)
        for more in (b"\0", b" ", whole):
            path.write_bytes(whole + more)
            refusal(path)

    def test_pieces_lost_doubled_or_swapped(self, path, whole):
        rng = random.Random(1)
        for _ in range(500):
            a, b, c = sorted(rng.sample(range(len(whole) + 1), 3))
            for changed in (
                whole[:a] + whole[b:],
                whole[:b] + whole[a:],
                whole[:a] + whole[b:c] + whole[a:b] + whole[c:],
            ):
                if changed != whole:
                    path.write_bytes(changed)
                    refusal(path)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is empty; copy it again"),
            (b"abc", "is not a safetensors file"),
            (b"just a text, and a rather long one at that", "is not a safetensors file"),
            (pickle.dumps({"a": list(range(1000))}), "not a safetensors file"),
            (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a safetensors file"),
            (bytes(100), "not written by save(), or damaged"),
            ((1000).to_bytes(8, "little") + b"{}", "is cut off after 10 bytes"),
            ((2**40).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
            (b"\xff" * 16, "is not a safetensors file"),
        ],
        ids=range(9),
    )
    def test_what_is_something_else(self, path, content, words):
        path.write_bytes(content)
        assert words in refusal(path)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"visualizer": "{}"}])
    def test_a_safetensors_file_of_another_program(self, path, metadata):
        save_file({"weight": np.ones(3)}, path, metadata)
        assert "a safetensors file that was not written by save()" in refusal(path)

    def test_what_another_program_wrote_anew(self, path, whole):
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata()
        save_file({"b.attn/0/0": np.arange(3.0)}, path, metadata)
        assert "another program changed it" in refusal(path)

    def test_which_part_is_damaged(self, path, whole):
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert "the checksum of 'b.attn/0/1' does not match" in refusal(path)
        path.write_bytes(whole.replace(b"tokens", b"tokenz"))
        assert "the checksum of its metadata does not match" in refusal(path)
        path.write_bytes(whole[:-1])
        assert f"has {len(whole) - 1:,} bytes in place of {len(whole):,}" in refusal(path)

    def test_a_newer_version(self, path):
        forged(path, {"version": 3, "whatever": {}})
        assert "written by a newer version of this package, in format 3; upgrade with: pip" in refusal(path)

    def test_a_version_from_before_the_first_release(self, path):
        forged(path, EMPTY | {"version": 1})
        assert "before its first release, in format 1; save it again" in refusal(path)

    def test_errors_of_the_system_stay_its_own(self, path, tmp_path):
        with pytest.raises(FileNotFoundError):
            load(path)
        with pytest.raises((IsADirectoryError, PermissionError)):
            load(tmp_path)

    def test_the_error_is_of_the_family(self, path):
        path.write_bytes(b"")
        for family in (VisualizerError, ValueError):
            with pytest.raises(family):
                load(path)


class TestHostileFiles:
    """Their checksums are right."""

    def test_the_forger_can_write_a_good_file(self, path):
        forged(path, EMPTY)
        assert {} == load(path)
        entry = {"a/0": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
        nodes = [["array", "a/0"], ["dict", []]]
        entries = [["a/0", "numpy", "float64", [1]]]
        content = {"entries": entries, "nodes": nodes, "keys": ["a"], "records": one_record(), "about": [1]}
        forged(path, EMPTY | content, entry, bytes(8))
        assert_same([np.zeros(1)], load(path)["a"])

    @pytest.mark.parametrize(
        "shape", [[2**40], [2**62, 2**62], [0, 2**70], [-1], [-1, -8], [-1, -1], [0, -1], [1.0], [True]], ids=str
    )
    @pytest.mark.parametrize("library", ["numpy", "torch"])
    def test_shapes_beyond_the_file(self, path, shape, library):
        size = 8 * math.prod(shape)
        entry = {"a": {"dtype": "F64", "shape": shape, "data_offsets": [0, size]}}
        forged(
            path,
            EMPTY | {"entries": [["a", library, "float64", shape]]},
            entry,
            bytes(int(size)) if 0 < size < 99 else b"",
        )
        refusal(path)

    def test_more_axes_than_an_array_may_have(self, path):
        entry = {"a": {"dtype": "F64", "shape": [1] * 100, "data_offsets": [0, 8]}}
        forged(path, EMPTY | {"entries": [["a", "numpy", "float64", [1] * 100]]}, entry, bytes(8))
        refusal(path)

    @pytest.mark.parametrize("depth", [1_000, 200_000])
    def test_deep_json(self, path, depth):
        deep = "[" * depth + "]" * depth
        forged(path, deep)
        refusal(path)
        forged(path, json.dumps(EMPTY)[:-1] + f', "more": {deep}}}' if depth > 1_000 else deep)
        refusal(path)
        path.write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
        refusal(path)

    @pytest.mark.parametrize(
        "nodes",
        [
            pytest.param([["tuple", []], *(["tuple", [[i]]] for i in range(100_000))], id="deep"),
            pytest.param([["tuple", []], *(["tuple", [[i], [i]]] for i in range(300))], id="doubling"),
            pytest.param([["tuple", [1] * 100_000], ["tuple", [[0]] * 900]], id="wide"),
        ],
    )
    @pytest.mark.parametrize("kind", ["set", "frozenset", "dict"])
    def test_what_would_take_ages_or_all_of_the_stack_to_hash(self, path, nodes, kind):
        last = [len(nodes) - 1]
        forged(path, EMPTY | {"nodes": [*nodes, [kind, [last, 1] if kind == "dict" else [last]]]})
        assert "of more than 1000 containers" in refusal(path)

    @pytest.mark.parametrize("wrong", [None, True, 5, 1.5, "text", [None], [[]], [{}], [5], {"a": 1}], ids=str)
    @pytest.mark.parametrize("field", sorted(EMPTY))
    def test_any_field_of_a_wrong_type(self, path, field, wrong):
        forged(path, EMPTY | {field: wrong})
        refusal(path)

    @pytest.mark.parametrize("field", sorted(EMPTY))
    def test_any_field_missing(self, path, field):
        forged(path, {name: value for name, value in EMPTY.items() if name != field})
        refusal(path)

    @pytest.mark.parametrize(
        "wrong", [None, True, 5, "text", [5], [[]], [[1]], [[None, 5]], [[1, -1]], [["a", 10**12]]], ids=str
    )
    @pytest.mark.parametrize("column", sorted(COLUMNS))
    def test_any_column_of_a_wrong_type(self, path, column, wrong):
        columns = one_record(value=0.5)
        forged(path, EMPTY | {"keys": ["a"], "records": columns})
        assert {"a": [0.5]} == load(path)
        if (column, wrong) != ("value", [5]):  # that is a value
            forged(path, EMPTY | {"keys": ["a"], "records": columns | {column: wrong}})
            refusal(path)
        forged(path, EMPTY | {"keys": ["a"], "records": {n: c for n, c in columns.items() if n != column}})
        refusal(path)

    @pytest.mark.parametrize(
        "node",
        [
            *([0], [0, 0], [0, 0, 3], [0, 1, 2], [0, -1, 1], [-1, 0, 1], [1, 0, 1], [0, 0, -1], [0, 0, 0]),
            *([0, "0", 1], [0, 0, 1.0], [0, 0, 2**70], [2**70, 0, 1]),
        ],
        ids=str,
    )
    def test_rows_that_are_not_there(self, path, node):
        entry = {"p": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}
        content = EMPTY | {"entries": [["p", "numpy", "float64", [2]]], "packs": ["p"]}
        forged(path, content | {"nodes": [["dict", []], [0, 0, 2]]}, entry, bytes(16))
        load(path)
        forged(path, content | {"nodes": [["dict", []], node]}, entry, bytes(16))
        refusal(path)

    def test_a_few_bytes_that_would_become_endless_rows(self, path):
        entry = {"p": {"dtype": "F64", "shape": [2**40, 0], "data_offsets": [0, 0]}}
        content = EMPTY | {"entries": [["p", "numpy", "float64", [2**40, 0]]], "packs": ["p"]}
        forged(path, content | {"nodes": [["dict", []], [0, 0, 2**40]]}, entry)
        refusal(path)
        entry = {"p": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}
        content = EMPTY | {"entries": [["p", "numpy", "float64", [2]]], "packs": ["p"]}
        forged(path, content | {"nodes": [["dict", []], [0, 0, 2], [0, 0, 2]]}, entry, bytes(16))
        refusal(path)
        endless = {name: [[value, 2**40]] for name, value in {"key": "a", "call": 0, "value": 0}.items()}
        forged(path, EMPTY | {"keys": ["a"], "records": COLUMNS | endless})
        refusal(path)
        forged(path, EMPTY | {"keys": ["a"], "records": COLUMNS | {"value": [[0, 1]] * 100}})
        refusal(path)

    @pytest.mark.parametrize(
        "node",
        [
            *([], ["what"], ["list"], ["list", [], []], ["list", 5], ["list", "ab"], ["list", [[5]]], ["list", [[-1]]]),
            *(["list", [[1]]], ["list", [{}]], ["list", [[0, 0]]], ["set", [[0]]], ["dict", [1]], ["dict", [[0], 1]]),
            *(["int", 5], ["int", "xyz"], ["int", []], ["float", "x"], ["float", 1], ["float", "0x1p99999"]),
            *(["complex", "1"], ["complex", ["0x0p+0"] * 3], ["complex", 5], ["str", 5], ["bytes", "0"], ["bytes", 5]),
            *(
                ["scalar", "object", "00"],
                ["scalar", "V1", "00"],
                ["scalar", "float32", "00"],
                ["scalar", "float32", "00" * 8],
            ),
            *(["scalar", "float32", 5], ["scalar", [], "00"], ["scalar", "float32"], ["array", "x"], ["array", []]),
            *([[], []], [5, []], "node", 5, None, {"list": []}),
        ],
        ids=str,
    )
    def test_nodes_that_make_no_sense(self, path, node):
        forged(path, EMPTY | {"nodes": [["dict", []], node]})
        refusal(path)

    @pytest.mark.parametrize(
        "fact",
        [
            *(
                {"key": "b"},
                {"key": []},
                {"variable": 5},
                {"value": [9]},
                {"value": {}},
                {"call": "0"},
                {"call": 2**63},
            ),
            *({"call": 2**63}, {"line": 1.5}, {"line": 2**70}, {"thread": None}, {"module": 5}),
        ],
        ids=str,
    )
    def test_records_that_make_no_sense(self, path, fact):
        forged(path, EMPTY | {"keys": ["a"], "records": one_record(**{"value": 1, **fact})})
        refusal(path)

    @pytest.mark.parametrize(
        "entry",
        [
            *(
                [],
                ["a"],
                "entry",
                5,
                ["a", "numpy", "float64", "1"],
                ["a", "numpy", "float64", {}],
                [5, "numpy", "int8", [1]],
            ),
            *(["a", "jax", "float64", [1]], ["a", "numpy", "bfloat16", [4]], ["a", "numpy", "object", [1]]),
            *(["a", [], "float64", [1]], ["a", "numpy", [], [1]], ["a", "numpy", "float64", [1.0]]),
            *(["a", "numpy", "float64", [1], 0], ["a", "numpy", "int64", [1]], ["a", "numpy", "float64", [1, 1]]),
            ["__metadata__", "numpy", "float64", [1]],
        ],
        ids=str,
    )
    def test_entries_that_make_no_sense(self, path, entry):
        header = {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
        forged(path, EMPTY | {"entries": [entry]}, header, bytes(8))
        refusal(path)

    @pytest.mark.parametrize(
        "metadata", [{"crc32": ""}, {"crc32": "xyz"}, {"crc32": 5}, {"visualizer": 5}, {"other": "x"}], ids=str
    )
    def test_metadata_that_makes_no_sense(self, path, metadata):
        forged(path, EMPTY, **metadata)
        refusal(path)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "5", "null", "{}", "9" * 5000, '{"version": ' + "9" * 5000 + "}", "\ud800"],
        ids=lambda t: ascii(t)[:20],
    )
    def test_texts_that_make_no_sense(self, path, text):
        if text == "\ud800":
            raw = json.dumps({"__metadata__": {"visualizer": text, "crc32": "00000000"}}).encode()
            path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        else:
            forged(path, text)
        refusal(path)

"""Captured functions under torch.compile, and under torch's other ways to turn code into graphs."""

import contextlib
import functools
import gc
import os
import shutil
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo
from attention import Attention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from visualizer import VisualizerWarning, capture
from visualizer.instrument import GetLocal, compiler
from visualizer.store import receive

if not hasattr(torch._dynamo.eval_frame, "set_code_exec_strategy"):
    pytest.skip("capturing works, but older releases of torch put many things differently", allow_module_level=True)

# Torch hides this from users when its compiler asks each input for its gradient, but not from a filter that raises.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

ROOT = Path(__file__).parent.parent
Unsupported = torch._dynamo.exc.Unsupported

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))
NEEDS_COMPILER = pytest.mark.skipif(not HAS_COMPILER, reason="inductor needs a C++ compiler")
INDUCTOR = pytest.param("inductor", marks=[NEEDS_COMPILER, pytest.mark.slow])
each_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
with_or_without_breaks = pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "breaks allowed"])


@pytest.fixture(scope="module", autouse=True)
def inductor():
    """Loaded once, for parts of torch talk about themselves as they are loaded; with what makes it compile sooner."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.compile_fx
        import torch.utils.cpp_extension
    with torch._inductor.config.patch({"compile_threads": 1, "cpp.simdlen": 1}):
        yield


@pytest.fixture(autouse=True)
def nothing_compiled_nothing_said(capfd):
    """Every test begins with nothing compiled; torch prints no log."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    assert "" == capfd.readouterr().err


class Counting:
    """A backend that counts the graphs that are compiled."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def model_of(layers):
    return nn.Sequential(*[Attention() for _ in range(layers)]).eval()


def images():
    return torch.randn(2, 5, 8)


def softmax_twice(x):
    attn = x * 2
    attn = attn.softmax(-1)
    return attn + 1


def mean(a):
    return a.mean(1)


def assert_same(expected, actual):
    """The same keys, and under each the same values."""
    assert list(expected) == list(actual)
    for key in expected:
        assert len(expected[key]) == len(actual[key]) > 0
        for one, other in zip(expected[key], actual[key], strict=True):
            assert type(one) is type(other)
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))


def values(found):
    return [record.value for record in found.records]


# The same values


@each_backend
@with_or_without_breaks
@pytest.mark.parametrize("keep", ["numpy", "graph"])
@pytest.mark.slow
def test_a_compiled_model_captures_what_the_plain_one_does(backend, fullgraph, keep):
    model, x = model_of(2), images()
    fast = torch.compile(model, backend=backend, fullgraph=fullgraph)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(expected, fast(x))
        with capture(model, "attn", keep=keep) as plain:
            model(x), model(x)
        with capture(fast, "attn", keep=keep) as found:
            torch.testing.assert_close(expected, fast(x))
            torch.testing.assert_close(expected, fast(x))
        torch.testing.assert_close(expected, fast(x))
    assert ["0", "1"] == list(found)
    assert_same(plain, found)


@with_or_without_breaks
@pytest.mark.parametrize("keep", ["tensor", mean])
def test_what_is_kept_is_what_the_plain_model_gives(fullgraph, keep):
    model, x = model_of(2), images()
    fast = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with capture(model, "attn", "q", keep=keep) as plain:
        model(x)
    with capture(model, "attn", "q", keep=keep) as found:
        fast(x)
    assert ["0:attn", "0:q", "1:attn", "1:q"] == sorted(found)
    assert_same(plain, found)
    assert not any(value.requires_grad for value in values(found))


@each_backend
def test_what_the_model_does_to_a_value_later_does_not_reach_the_record(backend):
    def inner(x):
        attn = x.softmax(-1)
        return attn

    def outer(x):
        return inner(x).mul_(0).add_(7)

    x = images()
    with capture(inner, "attn") as found:
        torch.testing.assert_close(torch.full_like(x, 7), torch.compile(outer, backend=backend, fullgraph=True)(x))
    torch.testing.assert_close(x.softmax(-1).numpy(), *values(found))


def test_numbers_tuples_lists_and_arrays():
    def inner(x, array):
        size, name, pair = x.shape[1], "name", (x + 1, x.transpose(1, 2))
        nested = [x * 2, [pair, None, 1.5]]
        twice = array * 2
        return x.sum(), nested, twice

    def outer(x, array):
        total, nested, twice = inner(x, array)
        nested[0].zero_()
        nested.append("more")
        twice += 1
        return total

    names = "size", "name", "pair", "nested", "twice", "x"
    x, array = images(), np.arange(3.0)
    with capture(inner, *names) as plain:
        inner(x, array)
    with capture(inner, *names) as found:
        torch.compile(outer, backend="aot_eager", fullgraph=True)(x, array)
    for expected, actual in zip(values(plain), values(found), strict=True):
        assert type(expected) is type(actual)
        np.testing.assert_equal(expected, actual)


def test_with_dynamic_shapes_one_graph_is_enough():
    def inner(x):
        count = x.shape[1]
        attn = x.softmax(-1) * count
        return attn

    backend = Counting()
    fast = torch.compile(inner, backend=backend, fullgraph=True, dynamic=True)
    with capture(inner, "attn", "count") as found:
        for n in range(5, 10):
            fast(torch.ones(2, n, 3))
    maps, counts = found.values()
    assert [5, 6, 7, 8, 9] == counts
    assert [(2, n, 3) for n in range(5, 10)] == [value.shape for value in maps]
    assert 1 == backend.count


@each_backend
@pytest.mark.slow
def test_a_loss_on_a_captured_map_of_a_compiled_model_reaches_its_weights(backend):
    model, x, aim = model_of(1), images(), torch.rand(5)

    def gradients(call):
        model.zero_grad()
        with capture(model, "attn", keep="graph") as found:
            loss = call(x).square().sum()
        (loss + sum((map_ * aim).sum() for map_ in values(found))).backward()
        return [p.grad.clone() for p in model.parameters()]

    torch.testing.assert_close(gradients(model), gradients(torch.compile(model, backend=backend, fullgraph=True)))


@pytest.mark.parametrize(
    ("backend", "keep"),
    [
        *((backend, keep) for backend in ("eager", "aot_eager") for keep in ("numpy", "tensor", mean)),
        # of inductor one, for each takes seconds, and its graphs are aot_eager's
        pytest.param("inductor", "numpy", marks=NEEDS_COMPILER),
    ],
)
@pytest.mark.slow
def test_training_goes_on_as_without_capture(backend, keep):
    model, x = model_of(1), images()
    fast = torch.compile(model, backend=backend)

    def gradients():
        model.zero_grad()
        fast(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    with capture(model, "attn", keep=keep) as found:
        torch.testing.assert_close(expected, gradients())
    assert 1 == len(values(found))


# Whose calls


@pytest.mark.parametrize("how", ["torch.compile", "model.compile()", "parts compiled", "parts exchanged"])
def test_only_the_models_own_calls_under_the_plain_models_paths(how):
    first, second, x = model_of(2), model_of(2), images()
    for model in (first, second):
        for name, part in list(model.named_children()):
            if how == "parts compiled":
                part.compile(backend="eager")
            elif how == "parts exchanged":
                setattr(model, name, torch.compile(part, backend="eager"))
        if how == "model.compile()":
            model.compile(backend="eager")
    calls = [torch.compile(m, backend="eager") if how == "torch.compile" else m for m in (first, second)]
    with capture(first, "attn") as found:
        for call in calls:
            call(x)
    with capture(Attention.forward, "attn") as everything:
        for call in calls:
            call(x)
    assert ["0", "1"] == list(found)
    assert 4 == len(values(everything))
    for one, other in zip(values(found), values(everything), strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@torch.no_grad()
def test_layers_that_are_compiled_one_by_one_share_a_graph():
    model, x, backend = model_of(12), images(), Counting()
    for layer in model:
        layer.compile(backend=backend, fullgraph=True)
    counts = []
    for _ in range(2):
        model(x)
        counts.append(backend.count)
        with capture(model, "attn") as found:
            model(x), model(x)
        counts.append(backend.count)
    assert [1, 2, 3, 4] == counts
    assert [2] * 12 == [len(maps) for maps in found.values()]


@with_or_without_breaks
def test_functions_and_methods_that_are_compiled_by_themselves(fullgraph):
    x, layer = images(), Attention()
    function = torch.compile(softmax_twice, backend="eager", fullgraph=fullgraph)
    method = torch.compile(layer.forward, backend="eager", fullgraph=fullgraph)
    with capture(function, "attn") as one, capture(layer.forward, "attn") as other:
        with capture(method, "attn") as behind_the_wrapper:
            function(x), method(x), Attention()(x)
    assert (["Attention.forward"], 1) == (list(behind_the_wrapper), len(values(behind_the_wrapper)))
    assert (["softmax_twice"], 1) == (list(one), len(values(one)))
    assert (["Attention.forward"], 1) == (list(other), len(values(other)))


# When it is switched


def test_each_switch_compiles_once_and_no_call_between_does(gl):
    @gl("attn")
    def inner(x):
        attn = x.softmax(-1)
        return attn * 2

    backend, x, counts = Counting(), images(), []
    fast = torch.compile(lambda x: inner(x) + 1, backend=backend, fullgraph=True)
    expected = fast(x)
    for _ in range(2):
        with gl.activate():
            for _ in range(3):
                torch.testing.assert_close(expected, fast(x))
        counts.append(backend.count)
        for _ in range(3):
            torch.testing.assert_close(expected, fast(x))
        counts.append(backend.count)
    assert [2, 3, 4, 5] == counts
    [maps] = gl.cache.values()
    assert 6 == len(maps)


def test_what_does_not_change_the_code_does_not_compile():
    backend, x = Counting(), images()
    fast = torch.compile(softmax_twice, backend=backend)
    own = GetLocal()
    own.deactivate()
    found = capture(softmax_twice, "attn")
    fast(x)
    with found:
        fast(x)
    fast(x)
    del found
    gc.collect()
    fast(x)
    assert 3 == backend.count


def test_another_keep_compiles_and_another_limit_does_not(gl):
    @gl("attn")
    def inner(x):
        attn = x.softmax(-1)
        return attn * 2

    backend, x = Counting(), images()
    fast = torch.compile(inner, backend=backend)
    for count, settings in enumerate(({}, {"keep": "graph"}, {"keep": "graph", "limit": 5}), 1):
        gl.activate(**settings)
        fast(x), fast(x)
        assert min(count, 2) == backend.count
    [maps] = gl.cache.values()
    assert [np.ndarray, *[torch.Tensor] * 4] == [type(value) for value in maps]


def test_a_function_that_is_decorated_after_it_was_compiled(gl):
    gl.activate()
    model, x = model_of(1), images()
    fast = torch.compile(model, backend="eager")
    fast(x)

    class Own(Attention):
        pass

    with pytest.warns(VisualizerWarning, match=r"takes Attention\.forward"):
        gl("attn")(Own)
    try:
        fast(x)
        assert [1] == [len(maps) for maps in gl.cache.values()]
    finally:
        gl.deactivate()


def test_any_number_of_switches_stays_below_the_limit_on_recompilations():
    backend, x, cycles = Counting(), torch.ones(2), torch._dynamo.config.recompile_limit + 2
    fast = torch.compile(softmax_twice, backend=backend)
    for _ in range(cycles):
        with capture(softmax_twice, "attn") as found:
            fast(x)
        fast(x)
        assert 1 == len(values(found))
    assert 2 * cycles == backend.count


def test_switching_within_compiled_code():
    def inner(x):
        attn = x.softmax(-1)
        return attn * 2

    def outer(x):
        y = inner(x)
        with capture(inner, "attn") as found:
            z = inner(y)
        return inner(z), found

    x = images()
    fast = torch.compile(outer, backend="eager")
    expected, _ = outer(x)
    for _ in range(3):
        actual, found = fast(x)
        torch.testing.assert_close(expected, actual)
        [value] = values(found)
        torch.testing.assert_close(inner(x).softmax(-1).numpy(), value)


def test_a_running_capture_that_is_dropped_while_something_is_compiled():
    @torch.compiler.assume_constant_result
    def collect():
        gc.collect()
        return 1

    x, code = images(), softmax_twice.__code__
    fast = torch.compile(lambda x: softmax_twice(x) * collect(), backend="eager")
    found = capture(softmax_twice, "attn").start()
    found.itself = found
    del found
    for _ in range(2):
        torch.testing.assert_close(softmax_twice(x), fast(x))
    assert softmax_twice.__code__ is code


# Assignments


@with_or_without_breaks
@pytest.mark.parametrize("inlined", [True, False])
def test_assignments_have_the_values_the_calls_and_the_lines_of_plain_calls(fullgraph, inlined):
    def twice(x):
        return softmax_twice(softmax_twice(x))

    x = images()
    call = twice if inlined else softmax_twice
    fast = torch.compile(call, backend="aot_eager", fullgraph=fullgraph)
    with capture(softmax_twice, "attn", at="assign") as plain:
        call(x), call(x)
    with capture(softmax_twice, "attn", at="assign") as found:
        fast(x), fast(x)
    assert_same(plain, found)
    assert [(r.call, r.line) for r in plain.records] == [(r.call, r.line) for r in found.records]


def test_assignments_of_a_models_layers():
    model, x = model_of(2), images()
    with capture(model, "attn", at="assign") as plain:
        model(x)
    with capture(model, "attn", at="assign") as found:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert_same(plain, found)
    assert [r.call for r in plain.records] == [r.call for r in found.records]


def test_assignments_of_a_function_that_calls_itself_are_right_or_refused():
    def inner(x, depth):
        attn = x * 1
        y = inner(x + 1, depth - 1) if depth else x
        attn = attn.softmax(-1)
        return attn + y

    x = images()
    with capture(inner, "attn", at="assign") as plain:
        inner(x, 2)
    with capture(inner, "attn", at="assign") as found:
        torch.compile(lambda x: inner(x, 2), backend="eager")(x)
        with pytest.raises(Unsupported, match="nested or interleaved"):
            torch.compile(lambda x: inner(x, 2), backend="eager", fullgraph=True)(x)
    assert [(r.call, r.line) for r in plain.records] == [(r.call, r.line) for r in found.records]
    for expected, actual in zip(values(plain), values(found), strict=True):
        np.testing.assert_allclose(expected, actual, rtol=1e-6)


# What no graph can have


def test_an_unbound_name_is_refused_in_one_graph_and_else_warned_about():
    def inner(x, flag=False):
        if flag:
            attn = x
        return x * 2

    x = images()
    with capture(inner, "attn") as found:
        with pytest.raises(Unsupported, match="undefined local variable"):
            torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)(x)
        with pytest.warns(VisualizerWarning, match="'attn' was not bound"):
            torch.testing.assert_close(x * 2 + 1, torch.compile(lambda x: inner(x) + 1, backend="eager")(x))
        torch.compile(lambda x: inner(x, True) + 1, backend="eager")(x)
    assert 1 == len(values(found))


def test_none_is_recorded_and_warned_about():
    def inner(x):
        attn = None
        return x * 2

    with capture(inner, "attn") as found, pytest.warns(VisualizerWarning, match="'attn' was None"):
        torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)(images())
    assert [None] == values(found)


@pytest.mark.filterwarnings("ignore:.*is or holds a Identity")
@pytest.mark.parametrize("name", ["by_name", "thing"])
def test_other_objects_are_refused_in_one_graph_and_end_it_otherwise(name):
    special = nn.Identity()

    def inner(x):
        by_name, thing = {"map": x.softmax(-1)}, special
        return by_name["map"] + 1

    x = images()
    with capture(inner, name) as found:
        with pytest.raises(Unsupported, match=f"{name} of .*inner cannot be captured within a graph: only tensors"):
            torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(x.softmax(-1) + 2, torch.compile(lambda x: inner(x) + 1, backend="eager")(x))
    [value] = values(found)
    if name == "thing":
        assert value is special
    else:
        torch.testing.assert_close(x.softmax(-1).numpy(), value["map"])


def test_a_function_that_ends_the_graph_itself():
    def inner(x):
        first = x + 1
        torch._dynamo.graph_break()
        attn = first.softmax(-1)
        return attn * 2

    x = images()
    fast = torch.compile(lambda x: inner(x) + 1, backend="eager")
    with capture(inner, "attn", "first") as plain:
        inner(x), inner(x)
    with capture(inner, "attn", "first") as found:
        fast(x), fast(x)
    assert_same(plain, found)


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (lambda inner, x: checkpoint(inner, x, use_reentrant=False), "takes functions"),
        (lambda inner, x: torch.func.vmap(inner)(x), "vmap"),
        (lambda inner, x: torch.func.grad(lambda x: inner(x).sum())(x), "torch.func"),
    ],
    ids=["checkpoint", "vmap", "grad"],
)
def test_inside_operations_that_take_functions(around, reason):
    x = images()
    is_batch = reason == "vmap"
    told = functools.partial(pytest.warns, VisualizerWarning, match="vmap") if is_batch else contextlib.nullcontext
    with capture(softmax_twice, "attn", keep="tensor") as plain, told():
        expected = around(softmax_twice, x)
    with capture(softmax_twice, "attn", keep="tensor") as found:
        with pytest.raises(Unsupported, match="torch.func" if is_batch else reason):
            torch.compile(lambda x: around(softmax_twice, x), backend="eager", fullgraph=True)(x)
        with told():
            result = torch.compile(lambda x: around(softmax_twice, x), backend="eager")(x)
        torch.testing.assert_close(expected, result, rtol=1e-4, atol=1e-6)
    assert [value.shape for value in values(plain)] == [value.shape for value in values(found)]
    assert is_batch == (not values(found))


def test_inside_cond_the_refusal_says_which_function_it_is():
    def branch(x):
        return softmax_twice(x)

    with pytest.raises(Exception, match="attn of softmax_twice cannot be captured"), capture(softmax_twice, "attn"):
        torch.cond(torch.tensor(True), branch, lambda x: x + 1, (images(),))


def test_generators_and_contexts():
    def pieces(x):
        for factor in range(3):
            attn = x * factor
            yield attn

    @torch.no_grad()
    def inner(x):
        try:
            with torch.autocast("cpu", enabled=False):
                attn = sum(pieces(x))
                return attn
        finally:
            attn = attn + 100

    x = images()
    fast = torch.compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)
    for function, at in ((inner, "return"), (pieces, "return"), (pieces, "assign")):
        with capture(function, "attn", at=at) as plain:
            inner(x)
        with capture(function, "attn", at=at) as found:
            fast(x)
        assert_same(plain, found)


def test_the_error_of_a_keep_function_says_whose_value_it_was():
    def fail(value):
        raise KeyError("no")

    with capture(softmax_twice, "attn", keep=fail) as found, pytest.raises(KeyError) as error:
        torch.compile(softmax_twice, backend="eager", fullgraph=True)(images())
    assert "'attn' of softmax_twice" in error.value.__notes__[0]
    with pytest.raises(KeyError):
        _ = found.records


def test_a_release_that_cannot_put_calls_off_ends_the_graph(monkeypatch):
    """As torch before 2.3; the compiler is made to forget what it was told."""
    from torch._dynamo.variables.builder import VariableBuilder

    compiler.prepare()
    monkeypatch.delitem(VariableBuilder._id_dispatch(), id(receive))
    model, x = model_of(2), images()
    with capture(model, "attn") as plain:
        model(x)
    with capture(model, "attn") as found:
        torch.compile(model, backend="eager")(x)
    assert_same(plain, found)


# Other ways to make graphs


def plain_and_decorated(gl):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            q = self.lin(x)
            attn = (q @ q.transpose(-2, -1)).softmax(dim=-1)
            return attn @ x

    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        @gl("attn")
        def forward(self, x):
            q = self.lin(x)
            attn = (q @ q.transpose(-2, -1)).softmax(dim=-1)
            return attn @ x

    plain, decorated = Plain().eval(), Decorated().eval()
    decorated.load_state_dict(plain.state_dict())
    return plain, decorated


def operations(graph):
    nodes = getattr(getattr(graph, "graph", None), "nodes", None)
    return None if callable(nodes) else [str(node.target) for node in nodes or () if node.op.startswith("call")]


WAYS = {
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "script": lambda model, x: torch.jit.script(model),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx of fakes": lambda model, x: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_decorated_model_that_is_not_active_is_like_any_other(gl, way):
    (plain, decorated), x = plain_and_decorated(gl), images()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about torch.jit
        expected, actual = WAYS[way](plain, x), WAYS[way](decorated, x)
        torch.testing.assert_close(plain(x), actual(x))
    assert operations(expected) == operations(actual)


@pytest.mark.parametrize("way", WAYS)
def test_an_active_one_gives_the_same_graph_and_no_value_without_numbers(gl, way):
    (plain, decorated), x = plain_and_decorated(gl), images()
    q = plain.lin(x)
    attn = (q @ q.transpose(-2, -1)).softmax(dim=-1).detach()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = WAYS[way](plain, x)
        with gl.activate():
            actual = WAYS[way](decorated, x)
            torch.testing.assert_close(plain(x), actual(x))
    said = [str(warning.message) for warning in caught if warning.category is VisualizerWarning]
    if way not in ("script", "trace"):
        [message] = said
        assert "such calls are not recorded" in message
    assert operations(expected) == operations(actual)
    values = gl.cache[next(iter(gl.cache))]
    assert len(values) == (way == "trace"), "the run that is traced is real, those that torch compares with are its own"
    for value in values:
        torch.testing.assert_close(attn, torch.as_tensor(value))


@pytest.mark.parametrize("is_active", [False, True])
def test_fake_tensors_pass_through(gl, is_active):
    _, decorated = plain_and_decorated(gl)
    if is_active:
        gl.activate()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (2, 5, 8) == decorated(mode.from_tensor(images())).shape
    assert is_active == ("fake tensor" in "".join(str(warning.message) for warning in caught))
    assert [[]] == list(gl.cache.values())


def test_what_was_captured_goes_at_once_where_something_was_compiled():
    """The look at who is running compiled code held the frames that it looked at, until the collector came."""

    class Value:
        pass

    def forward():
        attn = Value()
        return None

    torch.compile(Attention(), backend="eager")(torch.ones(1, 5, 8))
    gc.collect()
    gc.disable()
    try:
        with capture(forward, "attn", keep="graph") as found:
            forward()
        seen = weakref.ref(next(iter(found.values()))[0])
        del found
        assert seen() is None
    finally:
        gc.enable()

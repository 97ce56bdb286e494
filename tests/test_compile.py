"""torch.compile, and torch's other ways to trace: a captured function gives the values that it gives without them."""

import copy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from visualizer import VisualizerWarning, capture
from visualizer.instrument import GetLocal

# What inductor imports on its first use says so of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

BACKENDS = ["eager", "aot_eager", "inductor"]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
each_backend = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[needs_compiler] if name == "inductor" else []) for name in BACKENDS]
)


class Attention(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.qk = nn.Linear(dim, 2 * dim)

    def forward(self, x):
        q, k = self.qk(x).chunk(2, -1)
        attn = (q @ k.mT).softmax(-1)
        return attn @ x


class InPlace(nn.Module):
    """It goes on working on the map when the function that made it has returned."""

    def weigh(self, x):
        attn = (x @ x.mT).softmax(-1)
        return attn

    def forward(self, x):
        weights = self.weigh(x)
        weights.mul_(0)
        return weights @ x


def make(depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*[Attention() for _ in range(depth)]).eval()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def gl():
    own = GetLocal()
    yield own
    own.deactivate()


@pytest.fixture
def x():
    return torch.randn(2, 5, 8)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


class TestCompiled:
    @each_backend
    @pytest.mark.parametrize("fullgraph", [True, False])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_same_maps_as_eager(self, x, backend, fullgraph, when):
        model = make()
        with torch.no_grad():
            with capture(model, "attn") as eager:
                expected = model(x)
            found = capture(model, "attn")
            if when == "before":
                found.start()
            compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
            if when == "after":
                torch.testing.assert_close(expected, compiled(x))
                found.start()
            torch.testing.assert_close(expected, compiled(x))
            found.stop()
            torch.testing.assert_close(expected, compiled(x))
        assert ["0", "1", "2"] == list(found)
        np.testing.assert_allclose(eager.stack(), found.stack(), atol=1e-6)
        assert ["0", "1", "2"] == [record.module for record in found.records]

    @pytest.mark.parametrize("keep", ["numpy", "tensor", "graph", lambda a: a.amax(-1)], ids=str)
    def test_every_keep(self, x, keep):
        model = make()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with capture(model, "attn", keep=keep) as eager:
            model(x)
        with capture(compiled, "attn", keep=keep) as found:
            compiled(x)
        assert list(eager) == list(found), "the wrapper's prefix is not part of the paths"
        for [one], [other] in zip(eager.values(), found.values(), strict=True):
            assert type(one) is type(other)
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other))

    def test_a_loss_on_a_compiled_models_map(self, x):
        model = make()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        def gradient(run):
            model.zero_grad()
            with capture(model, "attn", keep="graph") as found:
                run(x)
            sum(values[0].square().sum() for values in found.values()).backward()
            return model[0].qk.weight.grad.clone()

        torch.testing.assert_close(gradient(model), gradient(compiled))

    def test_training_through_a_compiled_model_is_the_same(self, x):
        model = make()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

        def gradients():
            model.zero_grad()
            compiled(x).square().sum().backward()
            return [p.grad.clone() for p in model.parameters()]

        expected = gradients()
        for keep in ("numpy", "tensor"):
            with capture(model, "attn", keep=keep) as found:
                torch.testing.assert_close(expected, gradients())
            assert [1, 1, 1] == [len(values) for values in found.values()]

    @each_backend
    def test_what_the_model_does_later_in_place_does_not_reach_it(self, x, backend):
        model = InPlace()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for keep in ("numpy", "tensor"):
            with torch.no_grad(), capture(model.weigh, "attn", keep=keep) as found:
                assert 0 == compiled(x).abs().sum()
            [value] = next(iter(found.values()))
            torch.testing.assert_close((x @ x.mT).softmax(-1), torch.as_tensor(value))

    def test_get_local(self, gl, x):
        gl("q", "attn")(Attention)
        model = make()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        expected = compiled(x)
        for run in (1, 2):
            with gl.activate(keep="tensor"):
                torch.testing.assert_close(expected, compiled(x))
            torch.testing.assert_close(expected, compiled(x))
            assert {"Attention.forward:q": 3 * run, "Attention.forward:attn": 3 * run} == {
                key: len(values) for key, values in gl.cache.items()
            }

    def test_graphs_are_compiled_once_for_each_switch(self, x):
        backend = Counting()
        model = make()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        counts = []
        with torch.no_grad():
            for switch in ("off", "on", "off", "on", "off"):
                with capture(model if switch == "on" else make(), "attn") as found:
                    for _ in range(20):
                        compiled(x)
                counts.append(backend.graphs)
                assert (20 if switch == "on" else 0) == len(found["0"])
            before = backend.graphs
            for _ in range(20):
                compiled(x)
        assert backend.graphs - before <= 1
        assert max(b - a for a, b in zip([0, *counts], counts, strict=False)) <= 2

    def test_a_layer_compiled_on_its_own_and_shapes_that_change(self):
        model = make()
        for layer in model:
            layer.compile(backend="eager", dynamic=True)
        with torch.no_grad(), capture(model, "attn") as found:
            for length in (3, 4, 5, 6):
                model(torch.randn(1, length, 8))
        assert [[(1, n, n) for n in (3, 4, 5, 6)]] * 3 == [[m.shape for m in values] for values in found.values()]

    @pytest.mark.filterwarnings("ignore")  # the compiler says what it does not trace
    def test_every_assignment(self, x):
        model = make(1)
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad(), capture(model, "q", "attn", at="assign") as found:
            compiled(x)
        assert {"0:q": 1, "0:attn": 1} == {key: len(values) for key, values in found.items()}

    def test_an_unbound_local_and_odd_values_are_right_or_refused(self, x):
        class Odd(nn.Module):
            def forward(self, x, flag):
                if flag:
                    attn = x.softmax(-1)
                held = {"a": x}
                return x + 1

        model = Odd()
        compiled = torch.compile(model, backend="eager")
        with capture(model, "held", keep="tensor") as found:
            compiled(x, True)
        assert torch.equal(x, found[""][0]["a"])
        strict = torch.compile(model, backend="eager", fullgraph=True)
        with capture(model, "held"), pytest.raises(Exception, match=r"held of .*Odd\.forward|graph break|Unsupported"):
            strict(x, True)

    def test_two_captures_of_different_kinds_at_once(self, gl, x):
        gl("q")(Attention)
        model = make()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad(), gl.activate(keep="tensor"), capture(model[1], "attn") as one:
            compiled(x)
            with capture(model, "attn", limit=1) as all_of_them:
                compiled(x), compiled(x)
        assert 9 == len(gl.cache["Attention.forward"])
        assert 3 == len(one[""])
        assert [1, 1, 1] == [len(values) for values in all_of_them.values()]


@pytest.mark.parametrize(
    "order",
    [
        "activate; import torch; import dynamo; define; compile",
        "import torch; define; activate; compile",
        "import torch; define; compile; activate",
        "import torch; import dynamo; define; activate; compile",
    ],
)
def test_in_any_order_of_imports_and_switches(order):
    """In a fresh process, without a word on stderr."""
    steps = {
        "activate": "get_local.activate(keep='numpy')",
        "import torch": "import torch",
        "import dynamo": "import torch._dynamo",
        "define": """
            @get_local("attn")
            def attend(x):
                attn = x.softmax(-1)
                return attn * 2
        """,
        "compile": "compiled = torch.compile(attend, backend='eager', fullgraph=True); compiled(torch.ones(2, 4))",
    }
    lines = ["from visualizer import get_local", *(textwrap.dedent(steps[step]) for step in order.split("; "))]
    lines += ["n = len(get_local.cache['attend'])", "compiled(torch.zeros(2, 4)); compiled(torch.zeros(2, 4))"]
    lines += ["assert len(get_local.cache['attend']) == n + 2", "print(n, get_local.cache['attend'][-1].tolist())"]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(lines)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert (0, "") == (done.returncode, done.stderr)
    expected = 0 if order.endswith("compile; activate") else 1
    assert f"{expected} {[[0.25] * 4] * 2}" == done.stdout.strip()


class TestOtherWaysToTrace:
    """Of decorated code: inactive, they work as without the decorator; active, they capture or say that they do not."""

    @pytest.fixture
    def attend(self, gl):
        torch.manual_seed(0)

        @gl("attn")
        def attend(x):
            attn = x.softmax(-1)
            return attn * 2

        return attend

    @pytest.fixture
    def module(self, gl):
        class Decorated(Attention):
            forward = gl("attn")(copy_of(Attention.forward))

        return Decorated().eval()

    @pytest.mark.parametrize("active", [False, True])
    def test_fx(self, gl, attend, x, active):
        if active:
            gl.activate()
            with pytest.warns(VisualizerWarning, match="symbol of torch.fx"):
                graph = torch.fx.symbolic_trace(attend)
        else:
            graph = torch.fx.symbolic_trace(attend)
        assert torch.equal(attend(x), graph(x))
        assert (1 if active else 0) == len(gl.cache[next(iter(gl.cache))])

    @pytest.mark.parametrize("active", [False, True])
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_export(self, gl, module, x, active, strict):
        expected = module(x)
        if active:
            gl.activate()
            with pytest.warns(VisualizerWarning, match="not recorded"):
                exported = torch.export.export(module, (x,), strict=strict)
            gl.deactivate()
        else:
            exported = torch.export.export(module, (x,), strict=strict)
        torch.testing.assert_close(expected, exported.module()(x))
        assert [] == gl.cache[next(iter(gl.cache))]

    @pytest.mark.parametrize("active", [False, True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_jit_trace(self, gl, module, x, active):
        expected = module(x)
        if active:
            gl.activate()
            with pytest.warns(VisualizerWarning, match=r"torch\.jit\.trace"):
                traced = torch.jit.trace(module, x)
        else:
            traced = torch.jit.trace(module, x)
        torch.testing.assert_close(expected, traced(x))
        # To compare, torch also runs the module once as it is: that is a call like any other.
        assert (1 if active else 0) == len(gl.cache[next(iter(gl.cache))])

    @pytest.mark.parametrize("active", [False, True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_jit_script(self, gl, x, active):
        """It compiles the source, decorator line and all, and never runs the Python function."""
        if active:
            gl.activate()
        gl("attn")(scripted_attend)
        scripted = torch.jit.script(scripted_attend)
        torch.testing.assert_close(x.softmax(-1) * 2, scripted(x))
        assert [] == gl.cache["scripted_attend"]

    def test_fake_tensors(self, gl, attend):
        from torch._subclasses.fake_tensor import FakeTensorMode

        gl.activate()
        with FakeTensorMode(), pytest.warns(VisualizerWarning, match="fake tensor"):
            attend(torch.ones(2, 2))
        assert [] == gl.cache[next(iter(gl.cache))]

    def test_make_fx(self, gl, attend, x):
        from torch.fx.experimental.proxy_tensor import make_fx

        expected = attend(x)
        torch.testing.assert_close(expected, make_fx(attend)(x)(x))
        gl.activate(keep="tensor")
        graph = make_fx(attend)(x)
        gl.deactivate()
        torch.testing.assert_close(expected, graph(x))


def copy_of(function):
    import types

    return types.FunctionType(copy.copy(function.__code__), function.__globals__, "forward")


def scripted_attend(x: torch.Tensor) -> torch.Tensor:
    attn = x.softmax(-1)
    return attn * 2

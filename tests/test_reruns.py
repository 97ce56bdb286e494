"""What torch runs a second time for its own purposes is recorded once."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason="engine only: torch is not in this environment")

from torch.utils.checkpoint import checkpoint, checkpoint_sequential  # noqa: E402

from visualizer import VisualizerWarning, attention, capture  # noqa: E402


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(4, 4)

    def forward(self, x):
        attn = self.lin(x).softmax(-1)
        number = 1.5
        return attn @ x.mT @ x


def activate(x):
    doubled = 2 * x
    return doubled.tanh()


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 3 * x

    @staticmethod
    def backward(ctx, gradient):
        _ = ctx.saved_tensors  # makes a checkpoint compute its layers again
        inner = 3 * gradient
        return inner


class Model(torch.nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last, self.reentrant = Layer(), Layer(), reentrant

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        x = checkpoint(lambda inner: Triple.apply(activate(inner)), x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.fixture(params=[True, False], ids=["reentrant", "not reentrant"])
def reentrant(request):
    return request.param


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4, requires_grad=True)


class TestCheckpoint:
    @pytest.mark.parametrize("at", ["return", "assign"])
    @pytest.mark.parametrize("name", ["attn", "number"])
    def test_layers_come_once_for_each_call(self, reentrant, x, name, at):
        model = Model(reentrant)
        expected = []
        with capture(model, name, at=at) as found:
            for _ in range(2):
                with torch.no_grad():
                    model.last(model.first(x)) if name == "attn" else None
                expected = {key: len(values) for key, values in found.items()}
                model(x).sum().backward()
                assert {key: count + 1 for key, count in expected.items()} == {k: len(v) for k, v in found.items()}

    @pytest.mark.parametrize("at", ["return", "assign"])
    def test_functions_in_them_too(self, reentrant, x, at):
        with capture(activate, "doubled", at=at) as found:
            Model(reentrant)(x).sum().backward()
        [values] = found.values()
        assert 1 == len(values)

    def test_what_runs_in_the_backward_pass_alone_is_recorded(self, reentrant, x):
        seen = []

        def look(gradient):
            copied = gradient.clone()
            seen.append(copied)

        x.register_hook(look)
        with capture(Triple.backward, "inner") as inner, capture(look, "copied") as found:
            Model(reentrant)(x).sum().backward()
        assert [1, 1] == [len(values) for captured in (inner, found) for values in captured.values()]
        assert 1 == len(seen)

    def test_nested_and_in_a_row(self, reentrant, x):
        layers = torch.nn.Sequential(*[Layer() for _ in range(4)])

        def outer(inner):
            return checkpoint(layers[:2], inner, use_reentrant=reentrant)

        with capture(layers, "attn") as found:
            checkpoint(outer, x, use_reentrant=reentrant).sum().backward()
            checkpoint_sequential(layers[2:], 2, x, use_reentrant=reentrant).sum().backward()
        assert [1] * 4 == [len(values) for values in found.values()]

    def test_the_gradients_are_the_same(self, reentrant, x):
        model = Model(reentrant)

        def gradients():
            x.grad = None
            model(x).sum().backward()
            return x.grad.clone()

        before = gradients()
        with capture(model, "attn"):
            assert torch.equal(before, gradients())
        assert torch.equal(before, gradients())

    def test_a_layer_that_fails_when_it_runs_again_leaves_the_next_call_recorded(self, reentrant, x):
        runs = []

        def fragile(inner):
            runs.append(1)
            if len(runs) == 2:
                raise ValueError("the second time")
            return activate(inner)

        with capture(activate, "doubled") as found:
            with pytest.raises(ValueError, match="the second time"):
                checkpoint(fragile, x, use_reentrant=reentrant).sum().backward()
            activate(x)
        assert [2] == [len(values) for values in found.values()]

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # its name before version 6
    def test_a_model_of_transformers(self, reentrant):
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 16}
        config = transformers.GPT2Config(**sizes, attn_implementation="eager", use_cache=False)
        model = transformers.GPT2LMHeadModel(config).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        tokens = torch.arange(8)[None]
        function = "transformers.models.gpt2.modeling_gpt2:eager_attention_forward"
        with (
            capture(function, "attn_weights") as found,
            capture(model, "attn_output") as outputs,
            attention(model) as maps,
        ):
            model(tokens, labels=tokens).loss.backward()
        [weights] = found.values()
        assert 3 == len(weights) == len(maps)
        assert all(len(values) == 1 for values in outputs.values())


def operations(traced):
    return [node.kind() for node in traced.graph.nodes()]


class TestTrace:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("at", ["return", "assign"])
    @pytest.mark.parametrize("keep", ["numpy", "tensor", "graph", lambda value: value.mean()])
    def test_the_run_that_is_traced_is_recorded(self, x, keep, at, check):
        model = Layer()
        with capture(model, "attn", keep=keep, at=at) as found, capture(model, "number", at=at) as numbers:
            traced = torch.jit.trace(model, x, check_trace=check)
            traced(x)
        [value] = found[""]
        attn = model.lin(x).softmax(-1)
        expected = attn.mean() if callable(keep) else attn
        torch.testing.assert_close(expected.detach(), torch.as_tensor(value).detach())
        assert {"": [1.5]} == numbers
        assert operations(torch.jit.trace(model, x)) == operations(traced)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_container_adds_nothing_to_the_graph(self, x):
        def function(x):
            both = [x + 1, {"a": x + 2}]
            return both[0]

        before = operations(torch.jit.trace(function, x))
        with capture(function, "both") as found:
            assert before == operations(torch.jit.trace(function, x))
        [values] = found.values()
        assert 1 == len(values)
        assert (x + 2).tolist() == values[0][1]["a"].tolist()

    def test_attention_maps_are_not_those_of_the_comparison(self, x):
        class Attends(torch.nn.Module):
            def forward(self, x):
                return torch.nn.functional.scaled_dot_product_attention(x, x, x)

        model = torch.nn.Sequential(Attends())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            with pytest.warns(VisualizerWarning, match=r"torch\.jit\.trace"), attention(model) as maps:
                torch.jit.trace(model, torch.ones(1, 2, 3, 4))
        assert 0 == len(maps)

"""capture() on PyTorch modules: whose calls, under which paths, kept how, in how much memory."""

import copy
import functools
import gc
import types
import unittest.mock
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from attention import Attention
from torch import nn

from visualizer import UnknownLocalError, VisualizerWarning, capture


class Split(nn.Module):
    """Its map is made in another method than forward."""

    def attend(self, x):
        attn = (x @ x.mT).softmax(-1)
        return attn @ x

    def forward(self, x):
        return self.attend(x)


class Block(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), attention()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self, depth=3, attention=Attention):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attention) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def x():
    return torch.randn(2, 5, 8)


PATHS = [f"blocks.{i}.attn" for i in range(3)]


class TestPaths:
    def test_modules_of_a_list_that_run_one_function_share_its_hook(self, x):
        """Not one each, all of which every call would pass: on twelve layers that made a hundred milliseconds."""
        layers = [Attention() for _ in range(4)]
        size = []
        for targets in (layers[:1], layers):
            with capture(targets, "attn") as found:
                size.append(len(Attention.forward.__code__.co_code))
                for layer in targets:
                    layer(x)
            assert {key: len(values) for key, values in found.items()} == {str(i): 1 for i in range(len(targets))}
        assert size[0] == size[1]

    def test_a_module_listed_twice_is_recorded_under_both_keys(self, x):
        model = Model(1)
        with capture([model, model.blocks[0].attn], "attn") as found:
            model(x)
        assert {key: len(values) for key, values in found.items()} == {"0.blocks.0.attn": 1, "1": 1}
        assert np.array_equal(found["1"][0], found["0.blocks.0.attn"][0])

    def test_each_layer_under_its_path(self, x):
        model, code = Model(), Attention.forward.__code__
        expected = model(x)
        with capture(model, "attn") as found:
            assert torch.equal(expected, model(x))
        assert Attention.forward.__code__ is code
        assert PATHS == list(found)
        assert [(np.ndarray, (2, 2, 5, 5))] * 3 == [(type(m), m.shape) for [m] in found.values()]
        np.testing.assert_allclose(np.ones((3, 2, 2, 5)), found.stack().sum(-1), rtol=1e-6)
        assert [(path, path, "attn") for path in PATHS] == [(r.key, r.module, r.variable) for r in found.records]

    def test_only_these_instances(self, x):
        model, other = Model(), Model()
        twin = copy.deepcopy(model)
        with capture(model, "attn") as found, capture(other.blocks[1], "attn") as one:
            model(x), other(x), twin(x)
        assert [1, 1, 1] == [len(values) for values in found.values()]
        assert {"attn": 1} == {key: len(values) for key, values in one.items()}

    def test_several_names_wherever_each_is(self, x):
        found = capture(Model(2), "q", "attn", "block")
        expected = ["block", *(f"blocks.{i}.attn:{name}" for i in range(2) for name in ("q", "attn"))]
        assert [":block", *expected[1:]] == list(found)

    def test_the_module_itself_has_the_empty_path(self, x):
        attention = Attention()
        with capture(attention, "attn") as found:
            attention(x)
        assert {"": 1} == {key: len(values) for key, values in found.items()}
        assert [""] == [record.module for record in found.records]

    def test_a_list_of_modules_is_numbered_as_a_module_list_would(self, x):
        teacher, student = Model(), Model(1)
        with capture([teacher, student.blocks[0].attn, Split.attend], "attn") as found:
            teacher(x), student(x), Split()(x)
        assert [*(f"0.{path}" for path in PATHS), "1", "Split.attend"] == list(found)
        assert 5 == sum(map(len, found.values()))

    def test_a_method_beside_forward(self, x):
        model = Model(attention=Split)
        with capture(model, "attn") as found:
            model(x)
        assert PATHS == list(found)

    def test_two_methods_beside_forward_have_a_key_each(self, x):
        class Two(nn.Module):
            def rows(self, x):
                attn = x.softmax(-1)
                return attn

            def columns(self, x):
                attn = x.softmax(-2)
                return attn

            def forward(self, x):
                return self.rows(x) + self.columns(x)

        model = nn.Sequential(Two())
        with capture(model, "attn") as found:
            model(x)
        assert ["0.rows", "0.columns"] == list(found)
        torch.testing.assert_close(x.softmax(-2), torch.from_numpy(found["0.columns"][0]))

    def test_a_shared_module_has_its_first_path_and_all_its_calls(self, x):
        attention = Attention()
        model = nn.Sequential(attention, attention)
        with capture(model, "attn") as found:
            model(x)
        assert {"0": 2} == {key: len(values) for key, values in found.items()}

    def test_a_class_means_all_its_instances_and_not_its_bases(self, x):
        class Special(Attention):
            pass

        with capture(Special, "attn") as special, capture(Attention, "attn") as both:
            Special()(x), Attention()(x)
        assert [1] == [len(values) for values in special.values()]
        assert {"Attention.forward": 2} == {key: len(values) for key, values in both.items()}

    def test_decorated_forwards(self, x):
        class Still(Attention):
            @torch.no_grad()
            def forward(self, x):
                attn = x.softmax(-1)
                return attn

        model = nn.Sequential(Still(), Still())
        with capture(model, "attn") as found:
            model(x)
        assert {"0": 1, "1": 1} == {key: len(values) for key, values in found.items()}

    @pytest.mark.parametrize("attribute", [torch.classes, unittest.mock.call], ids=["raises", "answers"])
    def test_a_class_attribute_that_answers_to_any_name_or_raises(self, x, attribute):
        class Odd(Attention):
            backend = attribute

            def forward(self, x):
                attn = x
                return super().forward(x)

        model = Odd()
        with capture([model, Odd], "attn") as found:
            model(x)
        assert [1, 1] == [len(values) for values in found.values()]

    def test_every_assignment(self, x):
        model = Model()
        with capture(model, "attn", at="assign") as found:
            model(x)
        scores, weights = found["blocks.1.attn"]
        np.testing.assert_allclose(torch.from_numpy(scores).softmax(-1), weights, rtol=1e-6)
        assert [("blocks.1.attn", 1), ("blocks.1.attn", 1)] == [
            (record.module, record.call) for record in found.records if record.key == "blocks.1.attn"
        ]

    def test_every_assignment_where_there_is_one(self, x):
        model = Model(1)
        with capture(model, "x", at="assign") as found:
            model(x)
        assert {"": 1} == {key: len(values) for key, values in found.items()}
        with pytest.raises(ValueError, match=r"LayerNorm\.forward .*'input': it is a parameter"):
            capture(model, "input", at="assign")

    def test_nothing_has_it(self):
        with pytest.raises(UnknownLocalError) as caught:
            capture(Model(), "atn")
        lines = str(caught.value).splitlines()
        assert "no submodule of Model (16, and the model itself) has a local 'atn'; did you mean 'attn'?" in lines[0]
        assert "  Attention.forward: x, b, n, c, q, k, v, attn" in lines
        assert "  Linear.forward: input" in lines
        with pytest.raises(UnknownLocalError, match="'qkv'"):
            capture(Model(), "attn", "qkv")

    def test_what_has_it_where_a_models_call_is_not_followed_is_named(self, x):
        class Base(nn.Module):
            def forward(self, x):
                attn = x
                return attn

        class OnlySuper(Base):
            def forward(self, x):
                return super().forward(x)

        class WithoutForward(nn.Module):
            def encode(self, x):
                attn = x
                return attn

        class Helped(nn.Module):
            @staticmethod
            def helper(x):
                attn = x
                return attn

            def forward(self, x):
                return self.helper(x)

        class Starred(nn.Module):
            def forward(*args):
                attn = args[1]
                return attn

        kinds = {OnlySuper: "forward", WithoutForward: "encode", Helped: "helper", Starred: "forward"}
        for kind, method in kinds.items():
            model, owner = nn.Sequential(kind(), kind()), Base if kind is OnlySuper else kind
            name = f"{owner.__qualname__}.{method}"
            with pytest.raises(UnknownLocalError) as caught:
                capture(model, "attn")
            assert f"has a local 'attn'. {name} has it: capture({name}, 'attn')." in str(caught.value)
            with capture(getattr(owner, method), "attn") as found:
                getattr(model[0], method)(x)
            assert [1] == [len(values) for values in found.values()]
        with pytest.raises(UnknownLocalError) as caught:
            capture(nn.Sequential(WithoutForward(), Helped()), "attn")
        assert f"{WithoutForward.__qualname__}.encode and {Helped.__qualname__}.helper have it" in str(caught.value)
        with pytest.raises(UnknownLocalError, match="'attn'") as caught:
            capture(nn.Sequential(Attention(), Helped()), "atn")
        assert "has it" not in str(caught.value)

    def test_a_forward_that_loses_its_self_does_not_say_whose_call_returns(self, x):
        class Loses(Attention):
            def forward(self, x):
                attn = x
                del self
                return attn

        model = Model(1, Loses)
        with pytest.raises(TypeError, match=r"Loses\.forward \(.*'self'.*capture\(.*Loses\.forward, 'attn'\)"):
            capture(model, "attn")
        with capture(model, "attn", at="assign") as found, capture(Loses.forward, "attn") as every:
            model(x)
        assert [1, 1] == [len(values) for values in (*found.values(), *every.values())]

    def test_what_the_model_raises_is_raised_and_nothing_stays(self, x):
        model, code = Model(), Attention.forward.__code__
        with pytest.raises(RuntimeError), capture(model, "attn") as found:
            model(x), model(x[..., :3])
        assert Attention.forward.__code__ is code
        assert [1, 1, 1] == [len(values) for values in found.values()]


class TestWrappers:
    def test_parallel_wrappers_leave_the_paths_alone(self, x):
        model = nn.DataParallel(Model())
        with capture(model, "attn") as found:
            model(x)
        assert PATHS == list(found)
        assert [1, 1, 1] == [len(values) for values in found.values()]

    def test_a_module_of_that_name_keeps_it(self, x):
        class Holder(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = Attention()

            def forward(self, x):
                return self.module(x)

        assert ["module"] == list(capture(Holder(), "attn"))

    @pytest.mark.filterwarnings("ignore:nothing was recorded under")
    def test_the_copies_that_data_parallel_makes_are_told(self, x):
        model = Model(1)
        replica = copy.deepcopy(model)
        for module in replica.modules():
            module._is_replica = True
        with capture(model, "attn") as found:
            with pytest.warns(VisualizerWarning, match="DataParallel") as caught:
                replica(x), replica(x)
        assert 1 == len(caught)
        assert [[]] == list(found.values())

    def test_a_forward_that_was_put_on_the_instance(self, x):
        """As libraries do that move weights in before a call."""
        model = Model(2)
        attention = model.blocks[0].attn
        old = attention.forward

        @functools.wraps(old)
        def forward(*args, **kwargs):
            return old(*args, **kwargs)

        attention.forward = forward
        other = model.blocks[1].attn
        other.forward = functools.update_wrapper(functools.partial(Attention.forward, other), other.forward)
        with capture(model, "attn") as found:
            model(x)
        assert [1, 1] == [len(values) for values in found.values()]

    def test_a_forward_of_its_own(self, x):
        def forward(self, x):
            special = x * 2
            return special

        model = Model(2)
        attention = model.blocks[1].attn
        attention.forward = types.MethodType(forward, attention)
        with capture(model, "special") as found:
            model(x)
        assert {"blocks.1.attn": 1} == {key: len(values) for key, values in found.items()}

    def test_scripted_modules_say_that_they_are(self, x):
        with pytest.warns(DeprecationWarning):
            scripted = torch.jit.script(nn.Linear(8, 8))
        with pytest.raises(UnknownLocalError, match="scripted: torch runs it without Python"):
            capture(scripted, "input")


KINDS = {
    "meta": lambda: torch.ones(2, 2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "bool": lambda: torch.tensor([True, False]),
    "integer": lambda: torch.tensor([1, 2]),
    "half": lambda: torch.ones(2, dtype=torch.float16),
    "array": lambda: np.ones(3),
    "containers": lambda: {"a": [torch.ones(2), (np.ones(3), "text")], "b": None},
}


class TestKeep:
    def test_a_loss_on_a_captured_map_trains_what_made_it(self, x):
        """A tensor is fitted until the map that a model makes of it is the wanted one."""
        torch.manual_seed(0)
        model = Split()
        wanted = torch.eye(5).expand(2, 5, 5)
        fitted = x.clone().requires_grad_()
        optimizer = torch.optim.Adam([fitted], lr=0.1)
        losses = []
        for _ in range(150):
            with capture(model, "attn", keep="graph") as found:
                model(fitted)
            loss = (found[""][0] - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 20

    def test_gradients_of_the_local_itself(self, x):
        model = Model()
        with capture(model, "attn", keep="graph") as found:
            output = model(x)
        for [attn] in found.values():
            attn.retain_grad()
        output.square().sum().backward()
        gradients = [attn.grad for [attn] in found.values()]
        assert [(2, 2, 5, 5)] * 3 == [tuple(gradient.shape) for gradient in gradients]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)

    def test_tensors_stay_where_they_are_without_their_graph(self, x):
        model = Model().to(torch.bfloat16)
        with capture(model, "attn", keep="tensor") as found:
            model(x.to(torch.bfloat16))
        stacked = found.stack()
        assert (torch.bfloat16, False, (3, 2, 2, 5, 5)) == (stacked.dtype, stacked.requires_grad, tuple(stacked.shape))
        with capture(model, "attn") as found:
            model(x.to(torch.bfloat16))
        assert np.float32 == found.stack().dtype

    def test_only_a_reduction(self, x):
        model = Model()
        with capture(model, "attn", keep=lambda a: -(a * a.log()).sum(-1).mean((0, 2))) as entropy:
            model(x)
        assert (3, 2) == tuple(entropy.stack().shape)
        assert 0 < entropy.stack().max() <= np.log(5)

    def test_training_is_the_same_to_the_bit(self, x):
        model = Model()

        def gradients():
            model.zero_grad()
            model(x).square().sum().backward()
            return [p.grad.clone() for p in model.parameters()]

        off = gradients()
        for keep in ("numpy", "tensor", "graph"):
            with capture(model, "attn", keep=keep):
                on = gradients()
            assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))

    @pytest.mark.parametrize("keep", ["numpy", "tensor", "graph"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.filterwarnings("ignore")  # prototypes and deprecations of torch's own
    def test_every_kind_is_kept_right_or_refused_by_name(self, kind, keep):
        made = KINDS[kind]()

        class Makes(nn.Module):
            def forward(self, x):
                value = x
                return 0

        model = Makes()
        found = capture(model, "value", keep=keep).start()
        assert 0 == model(made)
        if keep == "numpy" and kind in ("meta", "sparse", "nested", "quantized"):
            with pytest.warns(VisualizerWarning, match="1 values of .*under '', .*keep='tensor'"):
                found.stop()
            assert {"": []} == found
            return
        found.stop()
        [kept] = found[""]
        if keep == "graph":
            assert kept is made
        elif kind == "containers":
            assert ["a", "b"] == list(kept)
            assert (kept["a"][0].sum(), kept["a"][1][0].sum(), kept["a"][1][1]) == (2, 3, "text")
            assert kept["a"][1][0] is not made["a"][1][0]
        elif kind in ("meta", "sparse", "nested", "quantized"):
            assert kept is not made
            assert (made.layout, made.device, made.dtype) == (kept.layout, kept.device, kept.dtype)
        else:
            assert (np.ndarray if keep == "numpy" or kind == "array" else torch.Tensor) is type(kept)
            np.testing.assert_array_equal(np.asarray(made.resolve_conj() if kind == "complex" else made), kept)


class TestWhatKeepRuns:
    """A function passed for `keep` runs in the middle of the model's forward pass, and leaves no trace there."""

    @pytest.mark.parametrize("keep", ["numpy", "tensor", "graph", lambda a: -(a * a.log()).sum(-1)])
    @pytest.mark.parametrize("goes_back_inside", [True, False])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_under_gradient_checkpointing(self, x, keep, goes_back_inside, use_reentrant):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj = nn.Linear(8, 8)

            def forward(self, x):
                attn = self.proj(x).softmax(-1)
                return attn * x

        layer = Layer()
        x.requires_grad_()
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)

        def run():
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant).square().sum()

        with capture(layer, "attn", keep=keep) as found:
            loss = run()
            if goes_back_inside:
                loss.backward()
        if not goes_back_inside:
            loss.backward()
        torch.testing.assert_close(expected, x.grad)
        assert 1 == len(found[""]), "what it computes anew is not recorded again"

    def test_what_it_calls_is_no_call_of_the_model(self):
        class Norm(nn.Module):
            def forward(self, hidden):
                hidden = hidden / hidden.norm()
                return hidden

        class Layers(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.norm = Split(), Split(), Norm()

            def forward(self, x):
                hidden = self.second(self.first(x))
                return self.norm(hidden)

        model = Layers()
        with capture([model], "hidden", keep=lambda hidden: model.norm(hidden)) as found:
            model(torch.ones(1, 5, 8))
        assert {"0": 1, "0.norm": 1} == {key: len(values) for key, values in found.items()}
        assert 1 == pytest.approx(float(found["0"][0].norm()), abs=1e-6)

    def test_a_tensor_class_whose_own_operations_are_captured(self):
        class Lens(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                result = super().__torch_function__(function, types, args, kwargs or {})
                return result

        with capture(Lens.__torch_function__, "result", keep="tensor") as found:
            both = torch.ones(2).as_subclass(Lens) + 1
        assert [2, 2] == both.tolist()
        assert [2, 2] == next(iter(found.values()))[0].tolist()

    @pytest.mark.parametrize("keep", ["numpy", "tensor", lambda a: a * 2])
    def test_inside_the_transforms_of_torch_func(self, keep):
        class Layer(nn.Module):
            def forward(self, x):
                attn = x.softmax(-1)
                return attn * x

        layer, x = Layer(), torch.randn(2, 4)
        weights = x.softmax(-1) * (2 if callable(keep) else 1)
        for transform in (torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.vjp(f, x)[0]):
            expected = transform(lambda x: layer(x).sum())(x)
            with capture(layer, "attn", keep=keep) as found:
                torch.testing.assert_close(expected, transform(lambda x: layer(x).sum())(x))
            assert 1 == len(found[""])
            torch.testing.assert_close(weights, torch.as_tensor(found[""][0]))
        batch = torch.randn(3, 2, 4)
        expected = torch.func.vmap(layer)(batch)
        with capture(layer, "attn", keep=keep) as found:
            with pytest.warns(VisualizerWarning, match=r"'attn' of .*Layer.forward .* vmap.* not recorded"):
                torch.testing.assert_close(expected, torch.func.vmap(layer)(batch))
        assert [] == found[""]


class TestMemory:
    def test_the_model_is_not_kept(self, x):
        gc.collect()
        gc.disable()
        try:
            model = Model()
            seen = weakref.ref(model), weakref.ref(model.blocks[0].attn)
            with capture(model, "attn") as found:
                model(x)
            del model
            assert (None, None) == tuple(reference() for reference in seen)
        finally:
            gc.enable()
        assert [1, 1, 1] == [len(values) for values in found.values()]

    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc, which is not there")
    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{"limit": 5}, {"max_bytes": 10**6}], ids=str)
    @pytest.mark.filterwarnings("ignore:captured values would take more")
    def test_ten_thousand_runs_in_bounded_memory(self, x, options):
        def resident():
            gc.collect()
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

        model = Split()
        x = x[:, :, :2].repeat(1, 20, 1)  # 80 kB a map: kept, ten thousand would be 800 MB
        with torch.no_grad(), capture(model, "attn", **options) as found:
            for _ in range(200):
                model(x)
            before = resident()
            for _ in range(10_000):
                model(x)
            assert resident() - before < 20 * 2**20
        assert sum(value.nbytes for value in found[""]) <= 10**6

    @pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one core
    def test_workers_of_a_data_loader_do_not_grow_the_cache(self, x):
        model = Split().eval()
        with torch.no_grad(), capture(model, "attn") as found:
            loader = torch.utils.data.DataLoader(Runs(model, x), batch_size=2, num_workers=2)
            assert 4 == len(list(loader))
            model(x)
        assert 1 == len(found[""])


class Runs(torch.utils.data.Dataset):
    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.model(self.x)


def test_what_torch_runs_natively_says_how_it_is_seen_all_the_same():
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    x = torch.randn(1, 5, 16)
    with torch.no_grad(), pytest.warns(VisualizerWarning, match="under 6 of 6 keys .*self_attn") as told:
        with capture(encoder, "attn_output_weights") as found:
            encoder(x)
    assert "visualizer.attention(model)" in str(told[0].message)
    assert 6 == repr(found).count("not reached")
    assert "torch.backends.mha.set_fastpath_enabled(False)" in str(told[0].message)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), capture(encoder, "attn_output") as found:
            encoder(x)
        assert 6 == sum(map(len, found.values()))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)

"""attention(): what it sees of a model's calls, what it keeps, and what it leaves as it was."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.attention.bias
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as by_another_name

from visualizer import AttentionMap, UnknownKeyError, VisualizerWarning, attention, load
from visualizer.intercept import evidence, kernels, snapshots
from visualizer.intercept.modules import works_by_token
from visualizer.maps import Factors, Keys


class Heads(nn.Module):
    """Attention of several heads; how it is computed is what the subclasses differ in."""

    def __init__(self, heads=2, width=8):
        super().__init__()
        self.qkv, self.heads, self.last = nn.Linear(width, 3 * width), heads, None

    def forward(self, x, **options):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, **options).transpose(1, 2).reshape(batch, tokens, width)


class Fused(Heads):
    def attend(self, q, k, v, **options):
        self.last = q, k, v
        return F.scaled_dot_product_attention(q, k, v, **options)


class Open(Heads):
    """The same, and it keeps its weights for the tests to read."""

    def attend(self, q, k, v, dropout_p=0.0):
        self.weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return F.dropout(self.weights, dropout_p) @ v


class LinearAttention(Heads):
    def attend(self, q, k, v):
        q, k = q.softmax(-1), k.softmax(-2)
        return q @ (k.mT @ v)


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), kind()

    def forward(self, x):
        return x + self.attn(self.norm(x))


def model_of(kind=Fused, depth=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(kind) for _ in range(depth)))


def pair(depth=3):
    """The same weights, fused and open."""
    fused, opened = model_of(Fused, depth), model_of(Open, depth)
    opened.load_state_dict(fused.state_dict())
    return fused, opened


def replica_of(model):
    """As torch.nn.parallel.replicate makes one for each GPU."""
    replica = model._replicate_for_data_parallel()
    for name, parameter in model._parameters.items():
        setattr(replica, name, parameter.detach().clone())
    for name, part in model._modules.items():
        replica._modules[name] = replica_of(part)
    return replica


@pytest.fixture
def x():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def largest_error(maps, opened):
    return max((one.dense() - block.attn.weights).abs().max().item() for one, block in zip(maps, opened, strict=True))


class TestSeen:
    def test_fused_calls_equal_the_open_computation(self, x):
        fused, opened = pair()
        before = fused(x)
        with attention(fused) as maps:
            after = fused(x)
        opened(x)
        assert torch.equal(before, after)
        assert maps.paths == ("0.attn", "1.attn", "2.attn")
        assert [one.kind for one in maps] == ["self"] * 3
        assert not any(one.is_dense for one in maps)
        assert largest_error(maps, opened) < 1e-6

    def test_an_open_softmax_is_kept_as_it_was_before_dropout(self, x):
        opened = model_of(Open)
        for block in opened:
            block.attn.forward = lambda x, attn=block.attn: Heads.forward(attn, x, dropout_p=0.5)
        with attention(opened) as maps:
            opened(x)
        assert all(one.is_dense for one in maps)
        assert largest_error(maps, opened) == 0

    @pytest.mark.parametrize("name", ["torch.matmul", "@", "bmm", "einsum"])
    @pytest.mark.parametrize("softmax", ["method", "torch", "functional", "module"])
    def test_ways_to_write_it(self, x, name, softmax):
        class Written(nn.Module):
            def __init__(self):
                super().__init__()
                self.softmax = nn.Softmax(dim=-1)

            def forward(self, x):
                scores = x @ x.mT
                made = {
                    "method": lambda: scores.softmax(-1),
                    "torch": lambda: torch.softmax(scores, dim=2),
                    "functional": lambda: F.softmax(scores, -1, dtype=torch.float64).to(x.dtype),
                    "module": lambda: self.softmax(scores),
                }[softmax]()
                self.weights = made.clone()
                made = made.masked_fill(made < 0, 0).contiguous()
                return {
                    "torch.matmul": lambda: torch.matmul(made, x),
                    "@": lambda: made @ x,
                    "bmm": lambda: torch.bmm(made, x),
                    "einsum": lambda: torch.einsum("bij,bjd->bid", made, x),
                }[name]()

        model = Written()
        with attention(model) as maps:
            model(x)
        assert (maps[""].dense()[:, 0] - model.weights).abs().max() < 1e-6
        assert maps[0].shape == (2, 1, 5, 5)

    def test_a_sink_behind_the_keys_is_no_key(self, x):
        """As in gpt-oss: a learnt score that takes part of the softmax, and is cut off before the product."""

        class Sink(nn.Module):
            def forward(self, x):
                scores = torch.cat([x @ x.mT, torch.ones(2, 5, 1)], -1)
                self.weights = F.softmax(scores - scores.max(-1, keepdim=True).values, dim=-1)
                self.weights.retain_grad()
                return F.dropout(self.weights[..., :-1], 0.5) @ x

        model = Sink()
        with attention(model, gradients=True) as maps:
            model(x.requires_grad_()).sum().backward()
        assert maps[0].shape == (2, 1, 5, 5)
        assert torch.equal(maps[0].dense()[:, 0], model.weights[..., :-1])
        assert torch.equal(maps[0].grad_dense()[:, 0], model.weights.grad[..., :-1])

    @pytest.mark.parametrize("is_in_place", [True, False])
    def test_the_map_is_what_is_multiplied_without_dropout(self, x, is_in_place):
        class Changes(nn.Module):
            def forward(self, x):
                attn = (x @ x.mT).softmax(-1)
                self.weights = attn.clone()
                attn = F.dropout(attn, 0.5, True, is_in_place)
                attn *= 3
                attn[..., 0] = 0
                self.dropped = attn
                return attn @ x

        model = Changes()
        with attention(model) as maps:
            model(x)
        expected = 3 * model.weights
        expected[..., 0] = 0
        assert torch.equal(maps[0].dense()[:, 0], expected)
        assert not torch.equal(model.dropped, expected)
        [softmax] = maps[0].softmaxes
        assert torch.equal(softmax.dense()[:, 0], model.weights)
        assert "made of 1 softmax" in repr(maps[0])

    def test_dropout_in_place_alone(self, x):
        class Drops(nn.Module):
            def forward(self, x):
                attn = (x @ x.mT).softmax(-1)
                self.weights = attn.clone()
                return F.dropout(attn, 0.5, True, True) @ x

        model = Drops()
        with attention(model) as maps:
            model(x)
        assert torch.equal(maps[0].dense()[:, 0], model.weights)
        assert maps[0].softmaxes == ()

    def test_a_softmax_without_a_product_is_no_attention(self, x):
        class Classifier(nn.Module):
            def forward(self, x):
                return (x @ x.mT).softmax(-1)

        model = nn.Sequential(Block(Fused), Classifier())
        with attention(model) as maps:
            model(x)
        assert maps.paths == ("0.attn",)

    def test_another_name_of_the_function(self, x):
        class Named(Heads):
            def attend(self, q, k, v):
                return by_another_name(q, k, v)

        model = model_of(Named)
        with attention(model) as maps:
            model(x)
        assert len(maps) == 3

    @pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 4, 5, 4)])
    def test_other_numbers_of_axes(self, shape):
        class Plain(nn.Module):
            def forward(self, q):
                return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

        q, mask = torch.randn(shape), torch.randn(5, 5)
        model = Plain()
        with attention(model) as maps:
            model(q)
        eye = torch.eye(5).expand(*shape[:-1], 5)
        expected = F.scaled_dot_product_attention(q, q, eye, attn_mask=mask)
        assert (maps[0].dense().reshape(expected.shape) - expected).abs().max() < 1e-6

    def test_arguments_of_the_fused_function(self, x):
        lower = torch.nn.attention.bias.causal_lower_right(5, 5)
        for options in (
            {"is_causal": True},
            {"attn_mask": torch.rand(5, 5) > 0.4},
            {"attn_mask": torch.randn(2, 1, 5, 5), "scale": 0.3},
            {"attn_mask": lower},
            {"dropout_p": 0.5},
        ):
            model = Fused()
            with attention(model) as maps:
                model(x, **options)
            q, k, _ = model.last
            options.pop("dropout_p", None)
            expected = F.scaled_dot_product_attention(q, k, torch.eye(5).expand(2, 2, 5, 5), **options)
            assert (maps[0].dense() - expected).abs().max() < 1e-6

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("average", [True, False])
    def test_multihead_attention(self, x, need_weights, average):
        model = nn.MultiheadAttention(8, 2, batch_first=True)
        options = {"need_weights": need_weights, "average_attn_weights": average}
        before, weights = model(x, x, x, **options)
        with attention(model) as maps:
            after, same = model(x, x, x, **options)
        assert torch.equal(before, after)
        assert same is None if weights is None else torch.equal(weights, same)
        expected = model(x, x, x, average_attn_weights=False)[1]
        assert (maps[0].dense() - expected).abs().max() < 1e-6

    def test_dropout_in_multihead_attention_comes_after_the_map(self, x):
        model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        with attention(model) as maps:
            model(x, x, x)
        model.eval()
        expected = model(x, x, x, average_attn_weights=False)[1]
        assert (maps[0].dense() - expected).abs().max() < 1e-6

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of torch's native path
    @pytest.mark.parametrize("norm", [None, nn.LayerNorm(8)])
    @pytest.mark.parametrize("padded", [False, True])
    def test_an_encoder_where_torch_would_take_its_native_path(self, x, padded, norm):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, norm).eval()
        if norm is not None:
            nn.init.normal_(norm.bias)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
        with torch.no_grad():
            before = model(x, src_key_padding_mask=mask)
            with attention(model) as maps:
                after = model(x, src_key_padding_mask=mask)
        seen = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
        assert (before - after).abs().max() < 1e-5  # padding included, which the native path makes zeros
        assert maps.paths == ("layers.0.self_attn", "layers.1.self_attn")
        first = model.layers[0].self_attn(x, x, x, key_padding_mask=mask, average_attn_weights=False)[1]
        assert (maps[0].dense() - first)[seen.unsqueeze(1).expand(2, 2, 5)].abs().max() < 1e-6

    def test_a_decoder_tells_self_from_cross(self, x):
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        model = nn.TransformerDecoder(layer, 2).eval()
        with attention(model) as maps:
            model(x, torch.randn(2, 7, 8), tgt_mask=nn.Transformer.generate_square_subsequent_mask(5))
        assert [one.kind for one in maps] == ["self", "cross"] * 2
        assert [one.shape for one in maps] == [(2, 2, 5, 5), (2, 2, 5, 7)] * 2
        assert maps[0].dense().triu(1).abs().max() == 0

    def test_self_attention_beside_hidden_states_of_an_encoder_is_self(self, x):
        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = Fused()

            def forward(self, x, encoder_hidden_states):
                return self.attn(x) + encoder_hidden_states.mean()

        model = Layer()
        with attention(model) as maps:
            model(x, encoder_hidden_states=torch.randn(2, 7, 8))
        assert maps["attn"].kind == "self"

    def test_a_core_that_is_handed_query_and_key_asks_the_module_around_it(self, x):
        class Core(nn.Module):
            def forward(self, q, k):
                return F.scaled_dot_product_attention(q, k, k)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.core = Core()

            def forward(self, x, encoder_hidden_states):
                return self.core(x, encoder_hidden_states)

        model = Layer()
        with attention(model) as maps:
            model(x, encoder_hidden_states=torch.randn(2, 5, 8))
        assert maps["core"].kind == "cross"

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within its compiler
    @pytest.mark.parametrize("is_first", [True, False], ids=["compiled before", "compiled inside"])
    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    @pytest.mark.slow
    def test_a_compiled_model(self, x, backend, is_first):
        fused, opened = pair(2)
        compiled = torch.compile(fused, backend=backend, fullgraph=True)
        with torch.no_grad():
            if is_first:
                before = compiled(x)
            with attention(compiled) as maps:
                inside = compiled(x)
            opened(x)
            assert largest_error(maps, opened) < 1e-6
            assert maps.paths == ("0.attn", "1.attn")
            after = compiled(x)
            assert (inside - after).abs().max() < 1e-6
            assert not is_first or torch.equal(before, after)
        assert len(maps) == 2

    def test_a_compiled_model_where_torch_is_too_old(self, x, monkeypatch):
        model = nn.Sequential(torch.compile(model_of(), backend="eager"))
        monkeypatch.delattr(torch.compiler, "set_stance")
        with pytest.raises(RuntimeError, match=r"'0' is compiled, and torch before 2\.6"):
            attention(model).start()
        assert not model[0]._forward_hooks

    def test_overlapping_recordings_leave_compiling_as_it_was(self, x):
        fused = model_of()
        counted = []

        def backend(graph, inputs):
            counted.append(1)
            return graph

        compiled = torch.compile(fused, backend=backend)
        one, other = attention(fused).start(), attention(fused).start()
        one.stop()
        compiled(x)
        assert counted == []
        other.stop()
        compiled(x)
        assert counted == [1]

    @pytest.mark.parametrize("kind", [Fused, Open])
    def test_mixed_precision(self, x, kind):
        model = model_of(kind)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), attention(model) as maps:
            model(x)
        if kind is Fused:
            q, k, _ = model[0].attn.last
            assert q.dtype == torch.bfloat16
            expected = (q.float() @ k.float().mT / 2).softmax(-1)
            assert (maps[0].dense() - expected).abs().max() < 1e-6
        else:
            assert torch.equal(maps[0].dense(), model[0].attn.weights.float())
        assert maps[0].dtype == torch.float32

    def test_float64_gives_float64(self, x):
        fused, opened = pair()
        with attention(fused.double()) as maps:
            fused(x.double())
        opened.double()(x.double())
        assert maps[0].dense().dtype == torch.float64
        assert largest_error(maps, opened) < 1e-14

    def test_other_threads(self, x):
        model = model_of()
        with attention(model) as maps:
            threads = [threading.Thread(target=model, args=(x,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [len(maps.calls(path)) for path in maps.paths] == [4, 4, 4]

    @pytest.mark.parametrize("kind", [Fused, Open])
    def test_replicas_of_data_parallel(self, x, kind):
        """Each runs in a thread of its own, and its parameters are plain tensors: layers are layers all the same."""
        model = model_of(kind)
        with torch.no_grad(), attention(model) as whole:
            model(x)
        with torch.no_grad(), attention(model) as maps:
            for part in x.split(1):
                thread = threading.Thread(target=replica_of(model), args=(part,))
                thread.start()
                thread.join()  # one after the other, for the order of the maps
        assert [len(maps.calls(path)) for path in whole.paths] == [len(x)] * len(whole)
        for path in whole.paths:
            found = torch.cat([one.dense() for one in maps.calls(path)])
            assert torch.allclose(found, whole[path].dense(), atol=1e-6)
            assert {one.kind for one in maps.calls(path)} == {"self"}

    def test_data_parallel_without_a_gpu(self, x):
        model = nn.DataParallel(model_of())
        with attention(model) as maps:
            model(x)
        assert maps.paths == ("0.attn", "1.attn", "2.attn")

    def test_submodules_called_on_their_own(self, x):
        model = model_of()
        with attention(model) as maps:
            model[1](x)
            Fused()(x)
        assert maps.paths == ("1.attn",)

    def test_an_exported_program(self, x):
        fused, opened = pair()
        exported = torch.export.export(fused, (x,)).module()
        with attention(exported) as maps:
            exported(x)
        opened(x)
        assert largest_error(maps, opened) < 1e-6

    def test_what_checkpointing_computes_again_is_recorded_once(self, x):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = Block(Fused)

            def forward(self, x):
                return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

        model = Checkpointed()
        with attention(model) as maps:
            model(x.requires_grad_()).sum().backward()
        assert maps.paths == ("block.attn",)
        assert len(maps) == 1


class Norm(nn.Module):
    """As in Llama: its code shows that nothing in it attends. What it is called with counts the modes meanwhile."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(8)), nn.Identity()

    def forward(self, x):
        return self.weight * self.inner(x) * x.pow(2).mean(-1, keepdim=True).rsqrt()


class Counts(torch.nn.SiLU):
    """One of torch's own layers, as far as its class says, that counts the modes."""

    def forward(self, x):
        modes.append(torch._C._len_torch_function_stack())
        if errors:
            raise errors.pop()
        return x


Counts.__module__ = "torch.nn.modules.activation"
modes, errors = [], []


class TestLayersInWhichNothingAttends:
    """They run without the mode: each function that it sees costs more than most of these functions do."""

    @pytest.fixture
    def model(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.attn = Norm(), Open()
                self.norm.inner = Counts()

            def forward(self, x):
                return self.attn(self.norm(x))

        modes.clear()
        return Model()

    def test_the_mode_is_there_before_and_behind(self, x, model):
        with attention(model) as maps:
            for _ in range(2):
                model(x)
        assert modes == [0, 0]
        assert [(one.path, one.kind) for one in maps] == [("attn", "self")] * 2
        assert torch.equal(maps[1].dense(), model.attn.weights)

    def test_a_mode_of_the_user_s_stays(self, x, model):
        with attention(model) as maps, torch.device("cpu"):
            model(x)
        assert modes == [2]
        assert len(maps) == 1

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_in_one(self, x, model, error):
        with attention(model) as maps:
            errors.append(error)
            with pytest.raises(error):
                model(x)
            model(x)
        assert modes == [0, 0]
        assert torch._C._len_torch_function_stack() == 0
        assert [one.path for one in maps] == ["attn"]

    def test_a_hook_of_the_user_s_may_attend(self, x, model):
        handle = model.norm.register_forward_hook(lambda module, args, output: Open()(output))
        with attention(model) as maps:
            model(x)
        handle.remove()
        assert [one.path for one in maps][-1:] == ["attn"]
        assert len(maps) == 2

    def test_another_forward_of_an_object(self, x, model):
        own = model.norm.forward
        with attention(model) as maps:
            model(x)
            model.norm.forward = lambda y: own(y) + (y @ y.mT).softmax(-1) @ y
            model(x)
        assert [one.path for one in maps] == ["attn", "norm", "attn"]

    def test_a_layer_of_what_was_attended_tells_the_heads(self, x):
        """As BERT's output: it is given what the heads made."""

        class Output(nn.Module):
            def __init__(self):
                super().__init__()
                self.dense = nn.Linear(8, 8)

            def forward(self, x, y):
                return self.dense(x) + y

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.own, self.output = Open(), Output()

            def forward(self, x):
                return self.output(self.own(x), x)

        model = Layer()
        assert works_by_token(model.output)
        with attention(model) as maps:
            model(x)
        assert (maps[0].shape, maps[0].axes_assumed) == ((2, 2, 5, 5), False)

    @pytest.mark.parametrize(
        "body",
        [
            "x @ x.mT",
            "x.matmul(x.mT)",
            "torch.matmul(x, x.mT)",
            "attend(x)",
            "self.attend(x)",
            "self.function(x)",
            "(lambda y: y)(x)",
            "torch.nn.functional.scaled_dot_product_attention(x, x, x)",
            "self.inner(x).softmax(-1)",
        ],
    )
    def test_code_that_may_attend(self, body):
        space = {"torch": torch, "attend": lambda x: x}
        exec(f"def forward(self, x): return {body}", space)
        layer = type("Layer", (nn.Module,), {"forward": space["forward"], "attend": lambda self, x: x})()
        layer.function, layer.inner = lambda x: x, nn.Linear(8, 8)
        assert not works_by_token(layer)

    def test_a_layer_with_another_in_it(self):
        norm = Norm()
        assert works_by_token(norm)
        norm.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        assert works_by_token(norm)
        norm.inner = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
        assert not works_by_token(norm)


class TestTold:
    def test_linear_attention_has_no_map(self, x):
        model = nn.Sequential(Block(Fused), Block(LinearAttention), Block(LinearAttention))
        with pytest.warns(
            VisualizerWarning, match=r"LinearAttention \('1.attn' and 1 more\) ran, .* softmax over features"
        ):
            with attention(model) as maps:
                model(x)
        assert maps.paths == ("0.attn",)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_scripted_modules(self, x):
        class Scripted(nn.Module):
            def forward(self, x):
                return F.scaled_dot_product_attention(x, x, x)

        model = nn.Sequential(Block(Fused), torch.jit.script(Scripted()))
        with pytest.warns(VisualizerWarning, match="'1' is scripted"), attention(model) as maps:
            model(x)
        assert maps.paths == ("0.attn",)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, about the fused kernel
    def test_transforms_of_functions(self, x):
        model = Fused()
        with pytest.warns(VisualizerWarning, match=r"the attention of '' was inside a transform of torch\.func"):
            with attention(model) as maps:
                torch.vmap(model)(x.unsqueeze(0))
        assert len(maps) == 0

    def test_a_layer_that_is_not_there(self, x):
        model = model_of()
        with pytest.warns(VisualizerWarning, match=r"no attention was seen in 'blocks\.\*'.*'0\.attn'"):
            with attention(model, layers=["0.attn", "blocks.*"]):
                model(x)

    def test_a_model_without_attention(self, x):
        model = nn.Linear(8, 8)
        with pytest.warns(VisualizerWarning, match="Linear ran without any attention that can be seen"):
            with attention(model):
                model(x)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"model": "vit"}, TypeError, "takes an nn.Module, not str"),
            ({"keep": "numpy"}, TypeError, "keep is a function of an AttentionMap"),
            ({"layers": [1.5]}, TypeError, "layers are numbers or module paths, not 1.5"),
            ({"layers": 1.5}, TypeError, "layers are numbers or module paths, not 1.5"),
            ({"layers": b"attn"}, TypeError, "layers are numbers or module paths, not b'attn'"),
            ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        with pytest.raises(error, match=message):
            attention(**({"model": model_of()} | arguments))


class TestKept:
    @pytest.mark.parametrize(
        ("layers", "paths"),
        [
            (0, ["0.attn"]),
            (-1, ["2.attn"]),
            ([0, -1], ["0.attn", "2.attn"]),
            ("*.attn", ["0.attn", "1.attn", "2.attn"]),
            (["1.attn"], ["1.attn"]),
        ],
    )
    def test_layers(self, x, layers, paths):
        model = model_of()
        with attention(model, layers=layers) as maps:
            model(x)
            model(x)
        assert sorted(maps.paths) == paths
        assert all(len(maps.calls(path)) == 2 for path in paths)

    def test_what_a_function_makes_of_each_map(self, x):
        fused, opened = pair()
        with attention(fused, keep=lambda a: a.rows([0, -1])) as maps:
            fused(x)
        opened(x)
        assert [one.shape for one in maps] == [(2, 2, 2, 5)] * 3
        assert (maps["1.attn"] - opened[1].attn.weights[:, :, [0, -1]]).abs().max() < 1e-6

    def test_a_function_may_run_the_model(self, x):
        model = model_of()
        with attention(model, layers=0, keep=lambda a: model(x).sum()) as maps:
            y = model(x)
        assert torch.equal(maps[0], y.sum())

    def test_an_error_of_the_function_names_the_module_and_leaves_the_model_in_order(self, x):
        model = model_of()
        with attention(model, keep=lambda a: 1 / 0) as maps:
            with pytest.raises(ZeroDivisionError) as caught:
                model(x)
        assert "while keeping the attention of '0.attn'" in caught.value.__notes__[0]
        assert not maps.is_running
        model(x)

    def test_a_budget(self, x):
        model = model_of()
        each = 2 * 2 * 2 * 5 * 4 * 4  # query and key
        with pytest.warns(VisualizerWarning, match=r"more than 1,300 bytes on cpu \(max_bytes\): that of '2.attn'"):
            with attention(model, max_bytes=1300) as maps:
                model(x)
                model(x)
        assert len(maps) == 2
        assert 2 * each <= 1300 < 3 * each
        maps.clear()
        with maps:
            model[0](x)
        assert len(maps) == 1

    def test_a_map_does_not_change_with_the_model(self, x):
        class Overwrites(Heads):
            def attend(self, q, k, v):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                q.zero_(), k.zero_(), mask.zero_()
                return out

        mask = torch.randn(5, 5)
        model, same = Overwrites(), Fused()
        same.load_state_dict(model.state_dict())
        with torch.no_grad():
            with attention(same) as expected:
                same(x, attn_mask=mask)
            with attention(model) as maps:
                model(x)
        assert torch.equal(maps[0].dense(), expected[0].dense())

    def test_layers_that_share_a_mask_share_its_copy(self, x):
        class Masked(Heads):
            def attend(self, q, k, v):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        mask = torch.zeros(2, 1, 1, 5).expand(2, 2, 5, 5)
        model = model_of(Masked)
        with attention(model) as maps:
            model(x)
        masks = {id(one.source.mask) for one in maps}
        assert len(masks) == 1
        assert maps[0].source.mask.shape == (2, 1, 1, 5)

    def test_maps_made_in_inference_mode_work_outside_of_it(self, x):
        model = model_of()
        with torch.inference_mode(), attention(model) as maps:
            model(x)
        weight = torch.ones(5, requires_grad=True)
        (maps[0].dense() * weight).sum().backward()
        assert weight.grad is not None

    def test_a_file(self, x, tmp_path):
        model = model_of()
        with attention(model) as maps:
            model(x)
            model[1](x)
        maps.save(tmp_path / "maps.safetensors", about={"tokens": list("abcde")})
        again = load(tmp_path / "maps.safetensors")
        assert again.about == {"tokens": list("abcde")}
        assert [one.path for one in again] == [one.path for one in maps]
        assert all(torch.equal(one.dense(), other.dense()) for one, other in zip(again, maps, strict=True))
        assert repr(again).splitlines()[1:] == repr(maps).splitlines()[1:]
        with pytest.raises(RuntimeError, match="the maps are from a file"):
            again.start()

    def test_a_file_of_what_a_function_made(self, x, tmp_path):
        model = model_of()
        with attention(model, keep=lambda a: a.rows(0)) as maps:
            model(x)
        maps.save(tmp_path / "rows.safetensors")
        again = load(tmp_path / "rows.safetensors")
        assert all(torch.equal(one, other) for one, other in zip(again, maps, strict=True))


class TestGradients:
    def test_equal_the_open_models(self, x):
        fused, opened = pair()
        with attention(fused, gradients=True) as maps:
            fused(x).square().sum().backward()
        y = opened(x)
        for block in opened:
            block.attn.weights.retain_grad()
        y.square().sum().backward()
        for one, block in zip(maps, opened, strict=True):
            assert (one.grad_dense() - block.attn.weights.grad).abs().max() < 1e-5
            assert torch.equal(one.grad_rows([1]), one.grad_dense()[:, :, [1]])

    def test_of_an_open_softmax(self, x):
        opened = model_of(Open)
        with attention(opened, gradients=True) as maps:
            y = opened(x)
            for block in opened:
                block.attn.weights.retain_grad()
            y.square().sum().backward()
        assert all(torch.equal(one.grad_dense(), b.attn.weights.grad) for one, b in zip(maps, opened, strict=True))

    def test_what_is_missing_is_said(self, x):
        model = model_of()
        with attention(model) as maps:
            model(x)
        with pytest.raises(RuntimeError, match=r"attention\(model, gradients=True\)"):
            maps[0].grad_dense()
        with attention(model, gradients=True) as maps:
            model(x)
        with pytest.raises(RuntimeError, match="no backward pass has come through"):
            maps[0].grad_dense()
        dropping = Fused()
        with attention(dropping, gradients=True) as maps:
            dropping(x, dropout_p=0.5).sum().backward()
        with pytest.raises(RuntimeError, match="there was dropout"):
            maps[0].grad_dense()


class TestLeftAsItWas:
    def test_hooks_and_modes_are_gone(self, x):
        model = model_of()
        with attention(model):
            model(x)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
        assert torch.overrides._get_current_function_mode() is None

    def test_after_an_error_in_the_model(self, x):
        class Fails(nn.Module):
            def forward(self, x):
                raise ValueError("no")

        model = nn.Sequential(Block(Fused), Fails())
        maps = attention(model).start()
        with pytest.raises(ValueError, match="no"):
            model(x)
        assert torch.overrides._get_current_function_mode() is None
        model[0](x)
        maps.stop()
        assert len(maps.calls("0.attn")) == 2
        with maps:
            with pytest.raises(ValueError, match="no"):
                model(x)
            F.scaled_dot_product_attention(x, x, x)
        assert torch.overrides._get_current_function_mode() is None
        assert len(maps) == 3

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
    def test_what_torch_calls_no_hooks_for_leaves_the_default_device_as_it_was(self, x, error):
        class Stops(nn.Module):
            def forward(self, x):
                raise error

        model = nn.Sequential(Block(Fused), Stops())
        with pytest.raises(error), attention(model) as maps:
            with torch.device("meta"):
                model(x)
        assert torch.empty(1).device.type == "cpu"
        assert torch.overrides._get_current_function_mode() is None
        assert maps.paths == ("0.attn",)

    def test_an_interrupted_call_in_a_notebook(self, x):
        """There start() and the next call are cells of their own."""

        class Stops(nn.Module):
            def forward(self, x):
                if is_interrupted:
                    raise KeyboardInterrupt
                return x

        model, is_interrupted = nn.Sequential(Block(Fused), Stops()), True
        maps = attention(model).start()
        with pytest.raises(KeyboardInterrupt):
            model(x)
        is_interrupted = False
        model(x)
        assert torch.overrides._get_current_function_mode() is None
        maps.stop()
        assert maps.paths == ("0.attn",)
        assert not maps[-1].axes_assumed or maps[-1].shape == (2, 2, 5, 5)

    @pytest.mark.parametrize("begin", ["start", "with"])
    @pytest.mark.parametrize("around", ["device", "mode"])
    def test_an_interrupt_takes_no_mode_away(self, x, begin, around):
        """Between start() and stop(), and inside a `with`, what is around the call ends what it began."""

        class Around(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        class Stops(nn.Module):
            def forward(self, x):
                raise KeyboardInterrupt

        model = nn.Sequential(Block(Fused), Stops())
        maps = attention(model)
        maps.start() if begin == "start" else maps.__enter__()
        with pytest.raises(KeyboardInterrupt), torch.device("meta") if around == "device" else Around():
            model(x)
        assert torch.empty(1).device.type == "cpu"
        F.scaled_dot_product_attention(x, x, x)  # of nobody
        maps.stop()
        assert torch.overrides._get_current_function_mode() is None
        assert maps.paths == ("0.attn",)
        assert len(maps) == 1

    @pytest.mark.parametrize("first", ["recording", "mode"])
    def test_modes_that_end_out_of_order(self, x, first):
        class Counts(torch.overrides.TorchFunctionMode):
            calls = 0

            def __torch_function__(self, func, types, args=(), kwargs=None):
                Counts.calls += 1
                return func(*args, **(kwargs or {}))

        model, counts = model_of(depth=1), Counts()
        maps = attention(model)
        for one in (maps, counts) if first == "recording" else (counts, maps):
            one.__enter__()
        model(x)
        for one in (maps, counts) if first == "recording" else (counts, maps):
            one.__exit__(None, None, None)
        assert torch.overrides._get_current_function_mode() is None
        assert len(maps) == 1 and Counts.calls > 0

    def test_the_default_device_changes_meanwhile(self, x):
        model = model_of(depth=1)
        try:
            with attention(model) as maps:
                torch.set_default_device("meta")
                model(x)
            assert torch.empty(1).device.type == "meta"
            with attention(model) as others:
                torch.set_default_device(None)
                model(x)
        finally:
            torch.set_default_device(None)
        assert torch.empty(1).device.type == "cpu"
        assert torch.overrides._get_current_function_mode() is None
        assert len(maps) == len(others) == 1

    @pytest.mark.parametrize("which", ["record", "doubt", "map_of"])
    def test_the_model_sees_no_error_of_any_step(self, x, which, monkeypatch):
        def fails(*args, **kwargs):
            raise IndexError("of ours")

        target, name = {
            "record": (snapshots.Copies, "of"),
            "doubt": (evidence.Evidence, "doubt"),
            "map_of": (snapshots.AttentionMap, "from_source"),
        }[which]
        model = model_of(depth=1)
        before = model(x)
        monkeypatch.setattr(target, name, fails)
        with pytest.warns(VisualizerWarning, match="'0.attn' is not recorded.*IndexError: of ours") as warned:
            with attention(model) as maps:
                assert torch.equal(before, model(x))
        assert len(maps) == 0 and len(warned) == 1

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("which", ["recorder", "doubt", "wrong", "meta", "budget"])
    def test_warnings_that_are_errors_wait_for_the_end(self, x, which, monkeypatch):
        model, options = model_of(depth=1), {}
        if which == "recorder":
            monkeypatch.setattr(snapshots.Copies, "of", lambda *_: {}["of ours"])
        elif which == "doubt":
            monkeypatch.setattr(evidence.Evidence, "doubt", lambda *_: {}["of ours"])
        elif which == "wrong":
            monkeypatch.setattr(evidence.Evidence, "doubt", lambda *_: "by 1")
        elif which == "meta":
            model, x = model.to("meta"), x.to("meta")
        else:
            options = {"max_bytes": 1}
        maps = attention(model, **options).start()
        assert model(x).shape == x.shape
        with pytest.raises(VisualizerWarning, match=r"not recorded|not kept"):
            maps.stop()
        assert not maps.is_running and len(maps) == 0
        assert torch.overrides._get_current_function_mode() is None

    @pytest.mark.parametrize("kind", [Fused, Open])
    def test_a_model_without_numbers(self, x, kind):
        model = Block(kind).to("meta")
        with (
            pytest.warns(VisualizerWarning, match="was on the meta device, which holds no numbers"),
            attention(model) as maps,
        ):
            model(x.to("meta"))
        assert len(maps) == 0

    @pytest.mark.filterwarnings("error")
    def test_a_scripted_model_under_warnings_that_are_errors(self, x):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn, self.scripted = Fused(), torch.jit.trace(nn.Linear(8, 8), torch.randn(2, 5, 8))

            def forward(self, x):
                return self.scripted(self.attn(x))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model = Both()
        with pytest.raises(VisualizerWarning, match="'scripted' is scripted"):
            with attention(model) as maps:
                model(x)
        assert maps.paths == ("attn",)

    def test_a_generator_is_recorded_as_far_as_it_runs(self, x):
        class Steps(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn = Fused()

            def forward(self, x):
                for _ in range(3):
                    yield self.attn(x)

        model = Steps()
        with attention(model) as maps:
            steps = model(x)
            next(steps)
        list(steps)
        assert len(maps) == 1
        assert torch.overrides._get_current_function_mode() is None

    @pytest.mark.parametrize("how", ["in place", ".data", "numpy"])
    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_a_mask_that_changes_between_two_calls(self, x, mode, how):
        class Twice(nn.Module):
            def forward(self, q, mask):
                first = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
                {"in place": lambda: mask, ".data": lambda: mask.data, "numpy": mask.numpy}[how]()[..., 0] = -torch.inf
                return first + F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

        model = Twice()
        with mode(), attention(model) as maps:
            model(x[:, None], torch.zeros(5, 5))
        assert (maps[0].dense()[..., 0] > 0).all()
        assert (maps[1].dense()[..., 0] == 0).all()

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
    @pytest.mark.parametrize("kind", [Fused, Open, "flex"])
    @pytest.mark.parametrize("gradients", [False, True])
    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda maps: pickle.loads(pickle.dumps(maps))])
    def test_maps_copied_or_pickled(self, x, kind, gradients, copied):
        class Flex(Heads):
            def attend(self, q, k, v):
                return flex_attention(q, k, v, score_mod=lambda score, *_: score * 2)

        if kind == "flex" and gradients:
            kind = Fused
        model = model_of(Flex if kind == "flex" else kind, 2)
        with torch.set_grad_enabled(gradients), attention(model, gradients=gradients) as maps:
            model(x).square().sum().backward() if gradients else model(x)
            meanwhile = copied(maps)
        assert not meanwhile.is_running
        for twins in (meanwhile, copied(maps), [copied(one) for one in maps]):
            assert all(torch.equal(one.dense(), twin.dense()) for one, twin in zip(maps, twins, strict=True))
        for one in maps if gradients else ():
            assert torch.equal(one.grad_dense(), copied(one).grad_dense())

    @pytest.mark.parametrize("is_open", [False, True])
    @pytest.mark.parametrize(
        ("shape", "keys"),
        [((0, 2, 5, 8), 5), ((2, 0, 5, 8), 5), ((2, 2, 0, 8), 5), ((2, 2, 5, 8), 0), ((2, 2, 5, 0), 5)],
        ids=["batch", "heads", "queries", "keys", "width"],
    )
    def test_nothing_of_something(self, shape, keys, is_open):
        class Cross(nn.Module):
            def forward(self, q, k):
                return (q @ k.mT).softmax(-1) @ k if is_open else F.scaled_dot_product_attention(q, k, k)

        model = Cross()
        with attention(model) as maps:
            model(torch.randn(shape), torch.randn(*shape[:2], keys, shape[3]))
        assert maps[0].shape == (*shape[:3], keys)
        assert maps[0].dense().shape == (*shape[:3], keys)

    @pytest.mark.parametrize("passes", [0, 3])
    def test_another_thread_stops_while_a_call_is_under_way(self, x, passes):
        """As where a program reads what a thread writes, and has read enough."""
        waits, goes_on, after = threading.Event(), threading.Event(), []

        class Waits(nn.Module):
            def forward(self, x):
                if passed:
                    waits.set()
                    goes_on.wait(60)
                return x

        def run():
            for _ in range(passes):
                model(x)
            passed.append(None)
            model(x)
            after.append(torch._C._len_torch_function_stack())
            after.append(torch._C._is_any_autocast_enabled())

        model, passed = nn.Sequential(Block(Fused), Waits(), Block(Fused)), []
        thread = threading.Thread(target=run)
        with attention(model) as maps:
            thread.start()
            assert waits.wait(60)
        assert pickle.loads(pickle.dumps(model[0]))(x).shape == x.shape
        goes_on.set()
        thread.join()
        assert after == [0, False]
        assert len(maps) == 2 * passes + 1
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())

    @pytest.mark.parametrize("kind", [Fused, Open])
    def test_keep_stops_recording(self, x, kind):
        """It is called from within the mode, which torch puts back behind it."""
        model = nn.Sequential(Block(kind), Block(kind))
        for passes in (0, 3):  # after three there is a plan
            with attention(model):
                for _ in range(passes):
                    model(x)
            maps = attention(model, keep=lambda made: maps.stop()).start()
            model(x)
            assert len(maps) == 1
            assert torch._C._len_torch_function_stack() == 0
            assert not torch._C._is_any_autocast_enabled()
            assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())

    @pytest.mark.parametrize("kind", [Fused, Open])
    def test_models_that_keep_runs_are_not_recorded(self, x, kind):
        """Nor warned of: the hooks of a module may run where nothing of it is seen."""
        model, other = Block(kind), Block(Fused)

        def keep(made):
            other(x)
            return made.rows(0)

        with attention(other) as inner, attention(model, keep=keep) as outer:
            model(x)
        assert (1, 0) == (len(outer), len(inner))

    def test_two_threads_record_two_models(self, x):
        models, found = [model_of(), model_of()], {}

        def run(number):
            with attention(models[number]) as maps:
                for _ in range(5):
                    models[number](x)
            found[number] = len(maps)

        threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {0: 15, 1: 15}

    @pytest.mark.parametrize("is_same", [False, True])
    def test_two_recordings_at_once(self, x, is_same):
        model = model_of()
        other = model if is_same else model_of()
        with attention(model) as one, attention(other) as two:
            model(x)
            if not is_same:
                other(x)
        assert len(one) == len(two) == 3
        assert torch.overrides._get_current_function_mode() is None

    def test_stop_in_a_hook(self, x):
        model = model_of()
        maps = attention(model).start()
        model[1].register_forward_pre_hook(lambda *_: maps.stop())
        with torch.device("cpu"):
            model(x)
        assert torch.overrides._get_current_function_mode() is None
        assert maps.paths == ("0.attn",)

    def test_the_model_sees_no_error_of_the_recorder(self, x, monkeypatch):
        def fails(output, *args, **kwargs):
            raise IndexError("of ours")

        model = model_of(depth=1)
        before = model(x)
        monkeypatch.setitem(kernels.KERNELS, "scaled_dot_product_attention", fails)
        with pytest.warns(VisualizerWarning, match="'0.attn' is not recorded.*IndexError: of ours") as warned:
            with attention(model) as maps:
                after = model(x)
                model(x)
        assert torch.equal(before, after)
        assert len(maps) == 0
        assert len(warned) == 1

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_model_copied_or_pickled_meanwhile_is_a_model(self, x, copied):
        model = model_of()
        with attention(model) as maps:
            twin = copied(model)
            assert torch.equal(twin(x), model(x))
        assert len(maps) == 3
        assert torch.equal(twin(x), model(x))

    def test_a_model_saved_meanwhile_is_read_where_this_package_is_not(self, x, tmp_path):
        model = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
        with attention(model) as maps:
            model(x)
            torch.save(model, tmp_path / "model.pt")
            torch.save(copy.deepcopy(model), tmp_path / "copied.pt")
        expected = model(x)
        torch.save((x, expected), tmp_path / "expected.pt")
        code = (
            "import sys, torch\n"
            "sys.modules['visualizer'] = None\n"
            "x, expected = torch.load('expected.pt')\n"
            "for name in ('model.pt', 'copied.pt'):\n"
            "    model = torch.load(name, weights_only=False)\n"
            "    with torch.no_grad():\n"
            "        torch.testing.assert_close(model(x), expected.detach())\n"
            "print('read')\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.stdout, done.returncode) == ("read\n", 0), done.stderr
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        with attention(again) as later:
            again(x)
        assert torch.equal(later[0].dense(), maps[0].dense())
        assert all(not one._forward_hooks and not one._forward_pre_hooks for one in again.modules())

    def test_empty_batches_and_no_queries(self):
        class Cross(nn.Module):
            def forward(self, q, k):
                return F.scaled_dot_product_attention(q, k, k)

        model = Cross()
        with attention(model) as maps:
            model(torch.randn(0, 2, 5, 8), torch.randn(0, 2, 5, 8))
            model(torch.randn(2, 2, 0, 8), torch.randn(2, 2, 5, 8))
        assert [one.shape for one in maps] == [(0, 2, 5, 5), (2, 2, 0, 5)]
        assert [one.dense().shape for one in maps] == [(0, 2, 5, 5), (2, 2, 0, 5)]

    @pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
    def test_heads_of_nothing_are_heads(self, shape):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.proj = nn.Linear(8, 8)

            def forward(self, x):
                q = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
                return self.proj(((q @ q.mT).softmax(-1) @ q).transpose(1, 2).flatten(2))

        model = Own()
        with attention(model) as maps:
            model(torch.randn(shape))
        assert maps[0].shape == (shape[0], 2, shape[1], shape[1])
        assert not maps[0].axes_assumed

    @pytest.mark.parametrize("sizes", [(0, 5), (2, 0), (0, 0), (2, 5)])
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("has_encoder", [True, False])
    def test_no_tokens_in_modules_of_torch(self, sizes, batch_first, has_encoder):
        options = {"batch_first": batch_first}
        if has_encoder:
            model = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32, **options), 2, enable_nested_tensor=False
            )
        else:
            model = nn.MultiheadAttention(16, 2, **options).eval()
        batch, tokens = sizes
        x = torch.randn(*(sizes if batch_first else sizes[::-1]), 16)
        with attention(model) as maps:
            model(x) if has_encoder else model(x, x, x)
        assert {one.shape for one in maps} == {(batch, 2, tokens, tokens)}
        assert not any(one.axes_assumed for one in maps)

    def test_what_is_dropped_stops(self, x):
        model = model_of()
        maps = attention(model).start()
        del maps
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())

    def test_two_at_once(self, x):
        fused, opened = pair()
        with attention(fused) as one:
            with attention(fused, layers=0) as other:
                fused(x)
            fused(x)
        opened(x)
        assert [len(one), len(other)] == [6, 1]
        assert largest_error(one[:3], opened) < 1e-6

    def test_a_model_is_not_kept_alive(self, x):
        model = model_of()
        with attention(model) as maps:
            model(x)
        alive = weakref.ref(model)
        gc.disable()
        try:
            del model
            assert alive() is None
        finally:
            gc.enable()
        assert len(maps) == 3

    def test_a_model_copied_meanwhile_records_nothing_of_its_own(self, x):
        model = model_of()
        with attention(model):
            twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))


class TestReading:
    def test_keys(self, x):
        model = model_of()
        with attention(model) as maps:
            model(x)
            assert maps["1.attn"] is maps[1]
            assert "1.attn" in maps and maps[1] in maps
            assert [one.path for one in maps] == ["0.attn", "1.attn", "2.attn"]
            model(x)
        with pytest.raises(UnknownKeyError, match=r"'1.attn' attended 2 times: maps.calls\('1.attn'\)"):
            maps["1.attn"]
        with pytest.raises(UnknownKeyError, match=r"no attention of '1\.atn' was recorded; did you mean '1.attn'"):
            maps["1.atn"]
        with pytest.raises(IndexError, match="there is no map 6: 6 were recorded"):
            maps[6]
        with pytest.raises(TypeError, match=r"a number, a slice or a module's path, not by \(0, 1\)"):
            maps[0, 1]
        assert maps[-1] is maps.calls("2.attn")[1]
        assert len(maps[:3]) == 3

    def test_tables(self, x):
        model = model_of()
        with attention(model) as maps:
            model(x)
        assert "attention of Sequential: 3 maps of 3 modules, 1.92 kB" in repr(maps)
        assert "<td" in maps._repr_html_()
        assert isinstance(maps[0], AttentionMap)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_sums_of_a_softmax_that_the_kernel_has_anyway(mode):
    """With them a few columns take no second attention; the model's output stays what it was, bit by bit."""
    model, x = Fused(), torch.randn(2, 5, 8)
    with mode():
        expected = model(x)
        maps = attention(model)
        maps.recorder.needs_sums = True
        with maps:
            made = model(x)
    assert torch.equal(expected, made)
    q, k, _ = (one.detach() for one in model.last)
    torch.testing.assert_close(maps[0].source.log_sums, (q @ k.mT / 2).logsumexp(-1))
    torch.testing.assert_close(maps[0].columns([3, 0]), maps[0].dense()[..., [3, 0]])


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([0.0, 0.0, -torch.inf, 0.5, 1.0]).expand(2, 1, 1, 5),
        torch.tensor([True, False, True, True, True]).view(1, 1, 1, 5),
        torch.randn(5, 5),
        torch.tensor([-1e4, -1e4, -1e4, -1e4, -1e4]).expand(2, 1, 5, 5).tril() + torch.randn(5),  # all hidden in a row
    ],
)
def test_a_few_columns_of_a_masked_softmax(mask):
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    source = Factors(query, Keys(key), 5, mask=mask)
    source.log_sums = source.scores(slice(None))[0].logsumexp(-1)
    columns = AttentionMap.from_source(source).columns([3, 0])
    torch.testing.assert_close(columns, source.rows(slice(None))[..., [3, 0]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_copies_stay_as_they_were_and_can_go_anywhere(dtype):
    class Attends(nn.Module):
        def forward(self, tokens):
            query, key, value = tokens.reshape(2, 1100, 3, 8, 64).permute(2, 0, 3, 1, 4)
            made = F.scaled_dot_product_attention(query, key, value)
            query.zero_(), key.zero_()
            return made

    tokens = torch.randn(2, 1100, 3 * 8 * 64, dtype=dtype)
    query, key, _ = tokens.clone().reshape(2, 1100, 3, 8, 64).permute(2, 0, 3, 1, 4)
    model = Attends()
    with attention(model) as maps:
        model(tokens)
    expected = (query[:, :, [7]].float() @ key.float().mT / 8).softmax(-1)
    taken = maps[0]
    maps.clear()
    del maps
    gc.collect()
    for made in (taken, copy.deepcopy(taken), pickle.loads(pickle.dumps(taken))):
        assert torch.allclose(made.rows([7]), expected, atol=1e-6)

"""Kernels that are functions in Python: stand-ins with the documented signatures, and what models do with them."""

import copy
import functools
import gc
import inspect
import pickle
import sys
import threading
import types

import kernels_by_hand
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import IDS, PADDING, SIZE, TEXT, transformers_model

from visualizer import VisualizerWarning, attention, load
from visualizer.intercept import evidence, functions

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.modeling_utils")

CLOSE = {"atol": 1e-5, "rtol": 0}


@torch.compiler.disable
def exact(query, key, value, mask, scale, softcap=None):
    """Attention that no mode can see: the arithmetic of a compiled kernel, in numpy."""
    query, key, value = (tensor.detach().double().numpy() for tensor in (query, key, value))
    key, value = (array.repeat(query.shape[1] // key.shape[1], 1) for array in (key, value))
    scores = query @ key.swapaxes(-1, -2) * scale
    if softcap:
        import numpy as np

        scores = softcap * np.tanh(scores / softcap)
    scores[~mask.expand(scores.shape).numpy()] = -1e300
    scores -= scores.max(-1, keepdims=True)
    weights = 2.718281828459045**scores
    weights /= weights.sum(-1, keepdims=True)
    return torch.from_numpy(weights @ value).float()


def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **_):
    """As flash attention is called: the last query sees the last key; the mask, if any, is (batch, keys)."""
    queries, keys = query.shape[2], key.shape[2]
    place = torch.arange(queries)[:, None] + keys - queries
    mask = (torch.arange(keys) <= place)[None, None]
    if sliding_window is not None:
        mask = mask & (torch.arange(keys) > place - sliding_window)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, -keys:].bool()
    return exact(query, key, value, mask, scaling, softcap).transpose(1, 2).contiguous(), None


@pytest.fixture
def kernel(request):
    modeling.AttentionInterface.register("stand_in", getattr(request, "param", flash))
    masks = pytest.importorskip("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    masks.register("stand_in", masks["flash_attention_2"])
    yield
    del modeling.AttentionInterface._global_mapping["stand_in"]
    del type(masks)._global_mapping["stand_in"]


def pair(name, head="Model", **options):
    options = TEXT | SIZE | {"num_key_value_heads": 2, "head_dim": 8} | options
    eager = transformers_model(name, head=head, **options)
    other = transformers_model(name, head=head, attention="stand_in", **options)
    other.load_state_dict(eager.state_dict())
    return eager, other


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 3}),
        ("Gemma2", {"sliding_window": 3, "attn_logit_softcapping": 2.0}),
    ],
)
def test_a_map_as_the_eager_model_has_it(kernel, name, options, is_padded):
    eager, model = pair(name, **options)
    inputs = {"input_ids": IDS} | ({"attention_mask": PADDING} if is_padded else {})
    with torch.no_grad():
        before = model(**inputs)[0]
        expected = eager(**inputs, output_attentions=True).attentions
        with attention(model) as maps:
            after = model(**inputs)[0]
    assert torch.equal(before, after)
    assert len(maps) == len(expected) == 2
    real = PADDING.bool() if is_padded else torch.ones(2, 5, dtype=torch.bool)
    for found, eagerly in zip(maps, expected, strict=True):
        assert found.shape == eagerly.shape
        assert not found.axes_assumed
        assert (found.dense() - eagerly)[real[:, None].expand(found.shape[:3])].abs().max() < 1e-5


def test_generation(kernel):
    eager, model = pair("Llama", head="ForCausalLM")
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = IDS[:1]
    steps = eager.generate(prompt, **settings, output_attentions=True, return_dict_in_generate=True).attentions
    with attention(model) as maps:
        model.generate(prompt, **settings)
    whole = maps.generated()
    for step, expected in enumerate(steps):
        for path, eagerly in zip(maps.paths, expected, strict=True):
            assert (maps.calls(path)[step].dense() - eagerly).abs().max() < 1e-5
            rows = whole[path].dense()[:, :, slice(0, 5) if step == 0 else [4 + step]]
            assert (rows[..., : eagerly.shape[3]] - eagerly).abs().max() < 1e-5


def wrong(module, query, key, value, attention_mask, **options):
    output, _ = flash(module, query, key, value, attention_mask, **options)
    return output + torch.linspace(0, 1, output.shape[-1]), None


@pytest.mark.parametrize("kernel", [wrong], indirect=True)
def test_a_kernel_that_does_something_else_has_no_map(kernel):
    _, model = pair("Llama")
    with pytest.warns(VisualizerWarning, match="stand_in returned, by") as warned, attention(model) as maps:
        model(IDS)
    assert len(maps) == 0
    assert len(warned) == 2


def through(module, query, key, value, attention_mask, **options):
    return modeling.ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **options)


@pytest.mark.parametrize("kernel", [through], indirect=True)
def test_a_kernel_that_calls_a_known_one_is_recorded_once(kernel):
    _, model = pair("Llama")
    with attention(model) as maps:
        model(IDS)
    assert len(maps) == 2


def test_functions_are_again_what_they_were(kernel):
    functions = modeling.ALL_ATTENTION_FUNCTIONS
    before = {name: functions[name] for name in functions}
    functions["stand_in"] = local = lambda *args, **kwargs: flash(*args, **kwargs)
    try:
        _, model = pair("Llama")
        with attention(model), attention(model) as maps:
            model(IDS)
            assert functions["sdpa"] is not before["sdpa"]
        assert len(maps) == 2
        assert functions["stand_in"] is local
    finally:
        del functions["stand_in"]
    assert {name: functions[name] for name in functions} == before
    assert not functions._local_mapping


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None
):
    """As flash_attn and the kernels of transformers' hub have it."""
    return kernels_by_hand.attend_batch(
        q, k, v, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, sinks=s_aux
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, s_aux=None,
):  # fmt: skip
    ends = kernels_by_hand.pairs(cu_seqlens_q), kernels_by_hand.pairs(cu_seqlens_k)
    return kernels_by_hand.attend_packed(
        q, k, v, *ends, scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, sinks=s_aux
    )


@pytest.fixture
def library(monkeypatch):
    """A package flash_attn of exact arithmetic. Its functions are new ones each time."""
    module = types.ModuleType("flash_attn")
    for function in (flash_attn_func, flash_attn_varlen_func):
        made = types.FunctionType(function.__code__, globals(), function.__name__, function.__defaults__)
        setattr(module, function.__name__, made)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.delitem(globals(), "flash_attn_func")
    monkeypatch.delitem(globals(), "flash_attn_varlen_func")
    return module


@pytest.fixture
def flash_attention_2(library, monkeypatch):
    """Models of transformers that are set to "flash_attention_2" call the library."""
    utils = pytest.importorskip("transformers.modeling_flash_attention_utils")
    if not hasattr(utils, "_lazy_define_process_function"):
        pytest.skip("this release of transformers loads the library in another way")
    loaded = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": library.flash_attn_func,
        "_flash_varlen_fn": library.flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": utils._lazy_define_process_function(library.flash_attn_varlen_func),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, value in loaded.items():
        monkeypatch.setattr(utils, name, value)

    def made(name, head="Model", **options):
        options = TEXT | SIZE | {"num_key_value_heads": 2, "head_dim": 8} | options
        eager = transformers_model(name, head=head, **options)
        model = transformers_model(name, head=head, **options)
        model.load_state_dict(eager.state_dict())
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = "flash_attention_2"
        return eager, model

    return made


FAMILIES = [
    ("Llama", {}),
    ("Mistral", {"sliding_window": 3}),
    ("Gemma2", {"sliding_window": 3, "attn_logit_softcapping": 2.0}),
    ("GptOss", {"sliding_window": 3, "num_local_experts": 2, "num_experts_per_tok": 1}),
]


class TestFlashAttention2:
    @pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["whole", "right", "left"])
    @pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
    def test_maps_as_the_eager_model_has_them(self, flash_attention_2, name, options, padding):
        eager, model = flash_attention_2(name, **options)
        real = (torch.ones(2, 5) if padding is None else padding).bool()
        with torch.no_grad():
            before = model(IDS, attention_mask=padding)[0]
            expected = eager(IDS, attention_mask=padding, output_attentions=True).attentions
            with attention(model) as maps:
                after = model(IDS, attention_mask=padding)[0]
        assert torch.equal(before, after)
        assert len(maps) == len(expected) == 2
        for found, eagerly in zip(maps, expected, strict=True):
            assert found.shape == eagerly.shape
            assert not found.axes_assumed
            assert found.sequences == ()
            of_tokens = real[:, None].expand(found.shape[:3])
            torch.testing.assert_close(found.dense()[of_tokens], eagerly[of_tokens], **CLOSE)
            assert found.dense()[~of_tokens].sum() == 0  # flash attention takes padding out

    @pytest.mark.parametrize(("name", "options"), FAMILIES, ids=[name for name, _ in FAMILIES])
    @pytest.mark.parametrize("how", ["positions", "lengths"])
    def test_packed_sequences(self, flash_attention_2, name, options, how):
        eager, model = flash_attention_2(name, **options)
        first, second = IDS[:1, :3], IDS[1:]
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
        lengths = torch.tensor([0, 3, 8], dtype=torch.int32)
        given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
        with torch.no_grad():
            expected = [eager(one, output_attentions=True).attentions for one in (first, second)]
            with attention(model) as maps:
                ids = torch.cat([first, second], 1)
                model(ids, position_ids=positions, **(given if how == "lengths" else {}))
        assert len(maps) == 2
        for found, *parts in zip(maps, *expected, strict=True):
            assert found.shape == (1, 4, 8, 8)
            torch.testing.assert_close(
                found.dense()[0], kernels_by_hand.block_diagonal([part[0] for part in parts]), **CLOSE
            )
            for sequence, part in zip(found.sequences, parts, strict=True):
                assert (sequence.path, sequence.kind) == (found.path, found.kind)
                torch.testing.assert_close(sequence.dense(), part, **CLOSE)
                torch.testing.assert_close(sequence.rows([-1]), part[:, :, -1:], **CLOSE)

    def test_generation_with_padding(self, flash_attention_2):
        eager, model = flash_attention_2("Llama", head="ForCausalLM")
        settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        padding = PADDING.flip(1)
        asked = {"output_attentions": True, "return_dict_in_generate": True}
        steps = eager.generate(IDS, attention_mask=padding, **settings, **asked).attentions
        with attention(model) as maps:
            model.generate(IDS, attention_mask=padding, **settings)
        for step, expected in enumerate(steps):
            for path, eagerly in zip(maps.paths, expected, strict=True):
                found = maps.calls(path)[step].dense()
                real = torch.ones_like(found[..., 0], dtype=torch.bool)
                if step == 0:
                    real &= padding[:, None].bool()
                torch.testing.assert_close(found[real], eagerly[real], **CLOSE)
                rows = maps.generated()[path].dense()[:, :, slice(0, 5) if step == 0 else [4 + step]]
                torch.testing.assert_close(rows[..., : found.shape[3]], found, **CLOSE)

    def test_loaded_while_recording(self, flash_attention_2, library):
        """transformers asks the function which arguments it takes; what it is told is what there was before."""
        before = inspect.signature(library.flash_attn_func)
        _, model = flash_attention_2("Llama")
        with attention(model):
            assert inspect.signature(library.flash_attn_func) == before
        assert vars(library.flash_attn_func) == {}


def inputs(heads=4, key_heads=2, lead=(2,), queries=5, keys=5):
    generator = torch.Generator().manual_seed(0)
    sizes = (queries, heads), (keys, key_heads), (keys, key_heads)
    return [torch.randn(*lead, *size, 8, generator=generator) for size in sizes]


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *args):
        return self.function(*args, **self.options)


class FlashAttnFunc(torch.autograd.Function):
    """As flash_attn has it, behind its function."""

    @staticmethod
    def forward(ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic):
        return kernels_by_hand.attend_batch(q, k, v, scale=softmax_scale, causal=causal, window=window_size)


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal):
        ends = kernels_by_hand.pairs(cu_seqlens_q), kernels_by_hand.pairs(cu_seqlens_k)
        return kernels_by_hand.attend_packed(q, k, v, *ends, scale=softmax_scale, causal=causal)


class TestAutogradFunctions:
    def test_apply_is_called_by_itself(self):
        q, k, v = inputs()
        model = Calls(lambda *args: FlashAttnFunc.apply(*args, 0.0, None, True, (2, 0), 0.0, None, False))
        with torch.no_grad(), attention(model) as maps:
            model(q, k, v)
        [found] = maps
        expected = kernels_by_hand.weights_of(q[0], k[0], causal=True, window=(2, 0))
        torch.testing.assert_close(found.dense()[0].double(), expected, **CLOSE)
        assert not found.axes_assumed
        assert "apply" not in vars(FlashAttnFunc)

    def test_of_packed_sequences(self):
        q, k, v = inputs(lead=())
        lengths = torch.tensor([0, 2, 5])
        model = Calls(lambda *args: FlashAttnVarlenFunc.apply(*args, lengths, lengths, 3, 3, 0.0, None, False))
        with torch.no_grad(), attention(model) as maps:
            model(q, k, v)
        assert [part.shape for part in maps[0].sequences] == [(1, 4, 2, 2), (1, 4, 3, 3)]

    def test_behind_its_function_it_is_recorded_once(self, library):
        space = {"apply": lambda *args: FlashAttnFunc.apply(*args, 0.0, None, False, (-1, -1), 0.0, None, False)}
        exec("def flash_attn_func(q, k, v): return apply(q, k, v)", space)
        library.flash_attn_func = space["flash_attn_func"]
        model = Calls(library.flash_attn_func)
        with torch.no_grad(), attention(model) as maps:
            model(*inputs())
        assert len(maps) == 1


class TestFunctionsOfALibrary:
    def test_one_that_takes_its_options_as_keywords(self, library):
        space = {"attend": library.flash_attn_func}
        exec("def flash_attn_func(q, k, v, **others): return attend(q, k, v, **others)", space)
        library.flash_attn_func = space["flash_attn_func"]
        q, k, v = inputs()
        model = Calls(library.flash_attn_func, causal=True)
        with attention(model) as maps:
            model(q, k, v)
        [found] = maps
        expected = kernels_by_hand.weights_of(q[0], k[0], causal=True)
        torch.testing.assert_close(found.dense()[0].double(), expected, **CLOSE)

    def test_a_recording_that_is_dropped_while_another_one_looks_for_functions(self, library, monkeypatch):
        other = Calls(library.flash_attn_func)
        dropped = [attention(other).start()]
        look = functions._search.look
        monkeypatch.setattr(functions._search, "look", lambda: (dropped.clear(), gc.collect(), look()))
        model = Calls(library.flash_attn_func)
        with attention(model) as maps:
            model(*inputs())
        assert len(maps) == 1

    def test_however_the_function_got_there(self, library):
        """By its module, imported by name, in a partial, by another decorator, and as an attribute of a class."""

        class Holder:
            attend = staticmethod(library.flash_attn_func)

        imported = library.flash_attn_func

        @functools.wraps(imported)
        def decorated(*args):
            return imported(*args)

        ways = [
            lambda *args: library.flash_attn_func(*args),
            imported,
            functools.partial(imported),
            decorated,
            Holder.attend,
            Holder().attend,
            torch.compiler.disable(imported),
        ]
        q, k, v = inputs()
        for way in ways:
            model = Calls(way)
            with attention(model) as maps:
                output = model(q, k, v)
            assert torch.equal(output, imported(q, k, v))
            [found] = maps
            for number in range(2):
                expected = kernels_by_hand.weights_of(q[number], k[number])
                torch.testing.assert_close(found.dense()[number].double(), expected, **CLOSE)
            assert not found.axes_assumed

    def test_a_function_with_a_closure(self, library):
        scale = 0.3

        def flash_attn_func(q, k, v):
            return kernels_by_hand.attend_batch(q, k, v, scale=scale)

        library.flash_attn_func = flash_attn_func
        model = Calls(flash_attn_func)
        with pytest.warns(VisualizerWarning, match="is not the one that was used"), attention(model) as maps:
            model(*inputs())
        assert len(maps) == 0  # its signature does not say the scale, so its map would be another
        assert model(*inputs()).shape == (2, 5, 4, 8)

    def test_the_code_is_again_what_it_was(self, library):
        function = library.flash_attn_func
        before = function.__code__
        model, other = Calls(function), Calls(function)
        with attention(model) as first:
            model(*inputs())
            ours = function.__code__
            assert ours is not before
            with attention(other) as second:
                assert function.__code__ is ours
                model(*inputs())
                other(*inputs())
            assert function.__code__ is ours
        assert function.__code__ is before
        assert (len(first), len(second)) == (2, 1)

    def test_code_that_another_tool_has_swapped_stays(self, library):
        function = library.flash_attn_func

        def other(q, k, v):
            return q

        model = Calls(function)
        with attention(model):
            function.__code__ = other.__code__
        assert function.__code__ is other.__code__

    def test_an_error_is_the_function_s_own(self, library):
        model = Calls(library.flash_attn_func)
        with pytest.raises(TypeError, match="missing"), attention(model):
            model(*inputs()[:2])

    def test_other_threads_and_other_code_are_not_recorded(self, library):
        model, q, k, v = Calls(library.flash_attn_func), *inputs()
        results = []
        with attention(model) as maps:
            library.flash_attn_func(q, k, v)
            thread = threading.Thread(target=lambda: results.append(library.flash_attn_func(q, k, v)))
            thread.start()
            thread.join()
            model(q, k, v)
        assert len(maps) == 1
        assert len(results) == 1

    def test_a_function_of_that_name_that_calls_a_known_kernel(self, library):
        """As models define it where flash_attn is not installed."""

        def flash_attn_func(q, k, v, causal=False):
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

        library.flash_attn_func = flash_attn_func
        model = Calls(flash_attn_func, causal=True)
        with attention(model) as maps:
            model(*inputs())
        assert len(maps) == 1
        assert maps[0].dense()[0, 0, 0].tolist() == [1, 0, 0, 0, 0]

    def test_gradients(self, library):
        q, k, v = (tensor.double().requires_grad_() for tensor in inputs())
        model = Calls(library.flash_attn_func, causal=True)
        with attention(model, gradients=True) as maps:
            output = model(q, k, v)
        (output**2).sum().backward()
        weights = torch.stack([kernels_by_hand.weights_of(*pair, causal=True) for pair in zip(q, k, strict=True)])
        weights = weights.detach().requires_grad_()
        (torch.einsum("bhqk,bkhd->bqhd", weights, v.detach().repeat_interleave(2, 2)) ** 2).sum().backward()
        torch.testing.assert_close(maps[0].grad_dense(), weights.grad)

    def test_copied_pickled_saved_and_reduced(self, library, tmp_path):
        q, k, v = inputs(lead=(), queries=8, keys=8)
        starts = torch.tensor([0, 3, 8], dtype=torch.int32)
        options = {"causal": True, "window_size": (2, 0), "softcap": 1.5, "s_aux": torch.tensor([0.5, -1, 2, 0])}
        model = Calls(library.flash_attn_varlen_func, **options)
        with attention(model) as maps:
            model(q, k, v, starts, starts, 5, 5)
        [found] = maps
        options = {"causal": True, "window": (2, 0), "softcap": 1.5, "sinks": options["s_aux"]}
        parts = [kernels_by_hand.weights_of(q[part], k[part], **options) for part in (slice(0, 3), slice(3, 8))]
        expected = kernels_by_hand.block_diagonal(parts)[None].float()
        maps.save(tmp_path / "maps.safetensors")
        [loaded] = load(tmp_path / "maps.safetensors")
        for one in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found)), loaded, found.to("cpu")):
            torch.testing.assert_close(one.dense(), expected)
            torch.testing.assert_close(one.rows([6, -1]), expected[:, :, [6, -1]])
            torch.testing.assert_close(one.row_product(torch.ones(1, 8)), expected.sum(2))
            assert [part.shape for part in one.sequences] == [(1, 4, 3, 3), (1, 4, 5, 5)]
            torch.testing.assert_close(one.sequences[1].dense(), expected[:, :, 3:, 3:])
        assert found.nbytes < 8 * 8 * 4 * 8 * 4


def test_what_is_defined_between_two_recordings_is_seen(library):
    """A recording looks for it in its first pass that is watched in full."""
    model, other = Calls(library.flash_attn_func), Calls(torch.nn.functional.scaled_dot_product_attention)
    q = inputs(4, 4)[0].transpose(1, 2)
    with attention(other) as maps:
        for _ in range(4):
            other(q, q, q)  # the last by a plan
    assert len(maps) == 4

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None):
        return kernels_by_hand.attend_batch(q, k, v, scale=softmax_scale)

    class FlashAttnFunc(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, dropout_p, softmax_scale):
            return kernels_by_hand.attend_batch(q, k, v, scale=softmax_scale)

    library.flash_attn_func = flash_attn_func
    for function, more in ((flash_attn_func, ()), (FlashAttnFunc.apply, (0.0, None))):
        model = Calls(function if more == () else lambda *args: FlashAttnFunc.apply(*args))
        with attention(model) as maps:
            model(*inputs(), *more)
        assert [one.shape for one in maps] == [(2, 4, 5, 5)]
    assert "apply" not in vars(FlashAttnFunc)


class Routes(nn.Module):
    """Which of its parts attends depends on a number, which a plan knows; the other is in no plan."""

    def __init__(self, function):
        super().__init__()
        self.usual, self.other = Calls(torch.nn.functional.scaled_dot_product_attention), Calls(function)

    def forward(self, x):
        q = x.transpose(1, 2)
        return self.usual(q, q, q) if x.sum().item() > 0 else self.other(x, x, x)


def test_what_is_imported_after_a_plan_was_made(monkeypatch):
    module = types.ModuleType("flash_attn_of_later")
    model = Routes(lambda *args: module.flash_attn_func(*args))
    x = inputs(4, 4)[0].abs()
    with attention(model):
        for _ in range(3):
            model(x)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None):
        return torch.from_numpy(kernels_by_hand.attend_batch(q, k, v, scale=softmax_scale).numpy())

    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with attention(model) as maps:
        model(-x)
    assert maps.paths == ("other",)


class TestTheProofOfForeignKernels:
    """Their arguments may mean more than is known here: rows of all heads and texts, from all parts, are compared."""

    @pytest.fixture(autouse=True, params=[evidence._WHOLE, 0], ids=["all heads at once", "one by one"])
    def whole(self, request, monkeypatch):
        monkeypatch.setattr(evidence, "_WHOLE", request.param)

    @pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_right_maps_are_kept(self, library, heads, causal):
        model = Calls(library.flash_attn_func, causal=causal)
        with attention(model) as maps:
            for queries in (1, 2, 5, 40):
                model(*inputs(*heads, queries=queries, keys=40))
        assert len(maps) == 4

    @pytest.mark.parametrize("place", [(0, slice(None), 3), (1, slice(None), 0), (1, 4, 1), (0, 2, 2), (0, 3, 0)])
    def test_one_head_of_one_text(self, place, monkeypatch):
        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None):
            output = kernels_by_hand.attend_batch(q, k, v, scale=softmax_scale).clone()
            output[place] += 0.01
            return output

        assert self.maps_of(flash_attn_func, monkeypatch, 5) == 0

    @pytest.mark.parametrize(("tokens", "window"), [(40, 8), (128, 64), (512, 16)])
    def test_a_window_that_nothing_tells(self, tokens, window, monkeypatch):
        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
            return kernels_by_hand.attend_batch(q, k, v, scale=softmax_scale, causal=causal, window=(window, 0))

        assert self.maps_of(flash_attn_func, monkeypatch, tokens, causal=True) == 0

    def maps_of(self, function, monkeypatch, tokens, **options):
        """How many are kept; a warning says why the others are not."""

        @functools.wraps(function)
        def opaque(*args, **kwargs):
            with torch._C.DisableTorchFunction():  # as what is not written in torch
                return function(*args, **kwargs)

        module = types.ModuleType("flash_attn_that_is_wrong")
        module.flash_attn_func = opaque
        monkeypatch.setitem(sys.modules, module.__name__, module)
        model = Calls(opaque, **options)
        with pytest.warns(VisualizerWarning, match="is not the one that was used"), attention(model) as maps:
            model(*inputs(4, 4, queries=tokens, keys=tokens))
        return len(maps)

"""In a pass that follows a plan layers in which nothing attends have no hooks; nothing may be lost by that."""

import copy
import gc
import pickle
import sys
import threading
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from test_plans import CALLS, Attends, both_ways, facts, needs_operators
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from visualizer import VisualizerWarning, attention
from visualizer.intercept.hooks import Hook

pytestmark = needs_operators
acts = []
acts_now = acts.copy  # a plan does not look at what is behind a method of a list


class Acts(nn.Module):
    """Does what a test asks for in the middle of a pass, which no plan foresees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        for act in acts_now():
            act(self, x)
        return x * self.weight


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


class Layer(nn.Module):
    """Nothing in it attends, by its code; it has a part of which that holds too."""

    def __init__(self):
        super().__init__()
        self.scale, self.linear = Scale(), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.scale(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.attn, self.layer, self.behind = Acts(), Attends(), Layer(), Acts()

    def forward(self, x):
        return self.behind(x + self.layer(self.attn(self.before(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(x)


@pytest.fixture(autouse=True)
def no_acts():
    acts.clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def x():
    return torch.randn(3, 5, 8)


def have_ours(model):
    """The paths of modules that have hooks of ours."""
    hooks = {
        path: (*one._forward_hooks.values(), *one._forward_pre_hooks.values()) for path, one in model.named_modules()
    }
    return {path for path, several in hooks.items() if any(type(one) is Hook for one in several)}


def once_in(module, act):
    """Have something done in the next call of a module, and only then."""

    def acting(other, x):
        if other is module:
            acts.remove(acting)
            act(x)

    acts.append(acting)


PATHS = {"blocks.0.attn", "blocks.1.attn"}
HIDDEN = {f"blocks.{number}.layer{part}" for number in (0, 1) for part in ("", ".scale")}


class TestHidden:
    def test_layers_have_no_hooks_in_a_planned_pass(self, model, x):
        within = []
        with attention(model) as maps:
            everything = have_ours(model)
            for _ in range(CALLS):
                once_in(model.blocks[0].behind, lambda _: within.append(have_ours(model)))
                model(x)
                assert have_ours(model) == everything
        assert len(maps) == 2 * CALLS
        assert within[0] == everything
        assert within[-1] == everything - HIDDEN
        assert everything > HIDDEN
        assert have_ours(model) == set()
        for module in model.modules():
            assert not module._forward_hooks_always_called
            assert not module._forward_pre_hooks_with_kwargs

    def test_an_unforeseen_attention_has_its_own_path(self, model, x, monkeypatch):
        q = torch.randn(1, 2, 5, 8)
        with attention(model) as maps:
            for _ in range(3):
                model(x)
            once_in(model.blocks[1].before, lambda _: scaled_dot_product_attention(q, q, q))
            model(x)
            assert [one.path for one in maps][-3:] == ["blocks.0.attn", "blocks.1.before", "blocks.1.attn"]
            assert torch.allclose(maps[-2].dense(), (q @ q.mT / 8**0.5).softmax(-1), atol=1e-6)
            model(x)
        assert [one.path for one in maps][-2:] == sorted(PATHS)

    def test_an_unforeseen_kernel_of_another_library_too(self, model, x, monkeypatch):
        def flash_attn_func(q, k, v, softmax_scale=None):  # of numbers that torch does not see
            scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q.numpy(), k.numpy()) / 8**0.5)
            weights = scores / scores.sum(-1, keepdims=True)
            return torch.from_numpy(np.einsum("bhqk,bkhd->bqhd", weights, v.numpy()))

        library = types.ModuleType("flash_attn")
        library.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", library)
        q = torch.randn(1, 5, 2, 8)
        with attention(model) as maps:
            for _ in range(3):
                model(x)
            once_in(model.blocks[1].before, lambda _: flash_attn_func(q, q, q))
            model(x)
        assert [one.path for one in maps][-3:] == ["blocks.0.attn", "blocks.1.before", "blocks.1.attn"]
        assert maps[-2].shape == (1, 2, 5, 5)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_part_is_seen_after_a_pass_that_failed(self, model, x, error):
        def fail(_):
            raise error

        with attention(model) as maps:
            for _ in range(3):
                model(x)
            once_in(model.blocks[0].behind, fail)
            with pytest.raises(error):
                model(x)
            before = len(maps)
            model.blocks[1](x)
            model(x)
        assert before == 7
        assert [one.path for one in maps][before:] == ["blocks.1.attn", *sorted(PATHS)]
        assert have_ours(model) == set()

    def test_other_threads_lose_nothing(self, model, x):
        def elsewhere(_):
            for call in (lambda: model(x), lambda: model.blocks[1](x), lambda: model(x)):
                thread = threading.Thread(target=call)
                thread.start()
                thread.join()

        with attention(model) as maps:
            for _ in range(3):
                model(x)
            once_in(model.blocks[0].behind, elsewhere)
            model(x)
            model(x)
        paths = sorted(PATHS)
        here = [one.value.path for one in maps.records if one.thread == threading.get_ident()]
        others = [one.value.path for one in maps.records if one.thread != threading.get_ident()]
        assert here == paths * 5
        assert others == [*paths, "blocks.1.attn", *paths]

    def test_a_pass_in_a_thread_of_its_own_begins_in_the_middle(self, x):
        """As the replicas of nn.DataParallel do, and whatever hands parts to workers."""

        class Handing(Model):
            def forward(self, x):
                with ThreadPoolExecutor(1) as pool:
                    return self.blocks[0](x) + pool.submit(self.blocks[1], x).result()

        model = Handing().eval()
        for _ in range(3):
            with attention(model) as maps:
                for _ in range(3):
                    model(x)
            assert sorted(one.path for one in maps) == sorted([*PATHS] * 3)

    def test_a_thread_that_is_watched_in_full_keeps_its_hooks(self, model, x):
        """Where the mode is taken away before a layer, the hook behind it puts it back."""
        began, may_end = threading.Event(), threading.Event()

        def wait(_):
            began.set()
            assert may_end.wait(60)

        with attention(model) as maps:
            for _ in range(3):
                model(x)
            other = threading.Thread(target=lambda: model(x[:, :4]))  # of a form that is new
            once_in(model.blocks[0].before, wait)
            other.start()
            assert began.wait(60)
            model(x)
            may_end.set()
            other.join()
            left = []
            other = threading.Thread(target=lambda: left.append(torch._C._len_torch_function_stack()))
            other.start()
            other.join()
            model(x)
        assert left == [0]
        assert sorted(one.path for one in maps) == sorted([*PATHS] * 6)
        assert {one.kind for one in maps} == {"self"}

    def test_hooks_of_others_keep_their_order(self, model, x):
        hidden, seen = model.blocks[1].layer, []

        def hook(_):
            hidden.register_forward_pre_hook(lambda *_: seen.append("before"))
            hidden.register_forward_hook(lambda *_: seen.append("behind"))

        with attention(model) as maps:
            for _ in range(3):
                model(x)
            once_in(model.blocks[0].behind, hook)
            model(x)
            assert seen == ["before", "behind"]
            assert [type(one) is Hook for one in hidden._forward_pre_hooks.values()] == [True, False]
            assert [type(one) is Hook for one in hidden._forward_hooks.values()] == [True, False]
            model(x)
        assert seen == ["before", "behind"] * 2
        assert [len(one) for one in (hidden._forward_pre_hooks, hidden._forward_hooks)] == [1, 1]
        assert facts(maps)[-2:] == facts(maps)[:2]

    def test_the_recording_stops_in_the_middle(self, model, x):
        maps = attention(model).start()
        for _ in range(3):
            model(x)
        once_in(model.blocks[0].behind, lambda _: maps.stop())
        model(x)
        assert len(maps) == 7
        assert have_ours(model) == set()
        with attention(model) as again:
            model(x)
        assert facts(again) == facts(maps)[:2]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_a_copy_made_in_the_middle_is_a_model_like_any(self, model, x, copied):
        copies = []
        with attention(model) as maps:
            for _ in range(3):
                model(x)
            once_in(model.blocks[0].behind, lambda _: copies.append(copied(model)))
            model(x)
            copies[0](x)
            assert len(maps) == 8
        with attention(copies[0]) as others:
            copies[0](x)
        assert facts(others) == facts(maps)[:2]

    def test_what_ran_unseen_is_told_in_later_recordings_too(self, x):
        class LinearAttention(nn.Module):
            def __init__(self):
                super().__init__()
                self.project = nn.Linear(8, 8)

            def forward(self, x):
                return self.project(x)

        model = nn.Sequential(Block(), LinearAttention()).eval()
        for _ in range(4):  # the last of these follow a plan
            with pytest.warns(VisualizerWarning, match="LinearAttention") as told, attention(model):
                model(x)
            assert len(told) == 1

    def test_two_recordings_at_a_time(self, model, x):
        with attention(model) as one, attention(model) as other:
            for _ in range(CALLS):
                model(x)
        assert facts(one) == facts(other) == facts(one)[:2] * CALLS

    def test_call_arguments_are_those_of_all_calls_for_a_keep(self, model, x):
        with attention(model, keep=lambda one: len(maps.recorder.watch.calls)) as maps:
            for _ in range(CALLS):
                model(x)
        assert [*maps] == [4] * (2 * CALLS)


def test_layers_tell_layouts_apart_in_planned_passes(monkeypatch):
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "img_size": 32, "patch_size": 2}
    model, pixels = timm.models.SwinTransformer(**sizes).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        maps = both_ways(model, [lambda: model(pixels)] * CALLS, monkeypatch)
    shifts = [one.layout.windows.shift for one in maps[:4]]
    assert shifts == [(0, 0), (2, 2), (0, 0), (2, 2)]
    assert {one.kind for one in maps} == {"window"}


class Through(nn.Module):
    def __init__(self, top):
        super().__init__()
        self.top = (top,)  # no part of it

    def forward(self, x, y):
        top = self.top[0]
        return top.attn(top.first(x), top.second(y))


class Decides(nn.Module):
    """Attends through another module, to another input, where a text is long."""

    def __init__(self):
        super().__init__()
        self.attn, self.first, self.second = Attends(), nn.LayerNorm(8), nn.LayerNorm(8)
        self.through = Through(self)

    def forward(self, x, y):
        return self.through(x, y) if x.shape[1] > 6 else self.attn(self.first(x), self.second(x))


def test_the_kind_is_that_of_the_way_through_other_modules():
    model = Decides().eval()
    with attention(model) as maps:
        for length in (4, 5, 6, 8, 9, 8):
            model(torch.randn(2, length, 8), torch.randn(2, length, 8))
    assert [one.kind for one in maps[:3]] == ["self"] * 3
    assert maps[3].kind is None  # it was not foreseen
    assert [one.kind for one in maps[4:]] == ["cross"] * 2


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attends()

    def forward(self, hidden, attention_mask):
        return hidden + self.attn(hidden)


class Turns(nn.Module):
    """Its second layer is given another mask where a text is long."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList((Masked(), Masked()))

    def forward(self, hidden, mask):
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, 1 - mask if number == 1 and hidden.shape[1] > 6 else mask)
        return hidden


def test_each_layer_has_the_layout_of_the_mask_that_it_is_given():
    def call(length):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :2] = 0
        return lambda: model(torch.ones(2, length, 8), mask)

    model = Turns().eval()
    with attention(model) as maps:
        for length in (4, 5, 6, 8, 9):
            call(length)()
    for first, second in zip(maps[::2], maps[1::2], strict=True):
        runs = [[(part.kind, part.count) for part in one.layout.of(0).parts] for one in (first, second)]
        length = first.shape[2]
        assert runs[0] == [("padding", 2), ("text", length - 2)]
        assert runs[1] == ([("text", 2), ("padding", length - 2)] if length > 6 else runs[0])


def test_each_layer_has_it_too_where_all_texts_are_as_long(monkeypatch):
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :2] = 0
    model = Turns().eval()
    maps = both_ways(model, [lambda: model(torch.ones(2, 8, 8), mask)] * 5, monkeypatch)
    first, second = ([part.kind for part in one.layout.of(0).parts] for one in maps[-2:])
    assert (first, second) == (["padding", "text"], ["text", "padding"])


class Picks(nn.Module):
    """What its second layer is given depends on a number that differs from text to text."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList((Masked(), Masked()))

    def forward(self, hidden, mask, other):
        count = mask.sum().item()
        hidden = self.layers[0](hidden, mask)
        return self.layers[1](hidden, mask if count < 100 else other)


def test_layouts_are_not_shared_where_a_number_may_decide(monkeypatch):
    masks = [torch.ones(2, 5, dtype=torch.long) for _ in range(5)]
    for number, mask in enumerate(masks[:4]):
        mask[0, :number] = 0
    masks[3][1, 0] = 101
    other = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    model, hidden = Picks().eval(), torch.randn(2, 5, 8)
    maps = both_ways(model, [lambda mask=mask: model(hidden, mask, other) for mask in masks], monkeypatch)
    assert [part.kind for part in maps[7].layout.of(0).parts] == ["text", "padding"]


class TestOneRecordingAndAnother:
    def test_one_recording_after_the_other(self, model, x):
        expected = None
        for _ in range(4):
            with attention(model) as maps:
                model(x)
                assert have_ours(model) >= HIDDEN | PATHS
            assert have_ours(model) == set()
            expected = facts(maps) if expected is None else expected
            assert facts(maps) == expected

    def test_several_at_a_time_have_their_own(self, model, x):
        for _ in range(2):
            with attention(model) as outer:
                model(x)
                with attention(model, layers="blocks.1.*") as inner:
                    model(x)
                model(x)
            assert [len(outer), len(inner)] == [6, 1]

    def test_a_copy_made_while_recording_is_no_part_of_later_recordings(self, model, x):
        with attention(model):
            model(x)
            copied = copy.deepcopy(model)
        with attention(model) as maps:
            copied(x)
            model(x)
        assert len(maps) == 2

    def test_a_model_that_has_other_parts_now(self, model, x):
        with attention(model):
            model(x)
        model.blocks.append(Block())
        with attention(model) as maps:
            model(x)
        assert maps.paths == ("blocks.0.attn", "blocks.1.attn", "blocks.2.attn")
        del model.blocks[0]
        with attention(model) as maps:
            model(x)
        assert maps.paths == ("blocks.0.attn", "blocks.1.attn")

    def test_nothing_of_a_recording_stays_in_the_model(self, model, x):
        recording = attention(model).start()
        model(x)
        watch = weakref.ref(recording.recorder.watch)
        recording.stop()
        del recording
        gc.collect()
        assert watch() is None

    @pytest.mark.parametrize("is_stopped", [True, False])
    @pytest.mark.parametrize("passes", [1, CALLS])
    def test_maps_that_nobody_holds_are_gone_at_once(self, model, x, is_stopped, passes):
        recording = attention(model).start()
        for _ in range(passes):
            model(x)
        known = [weakref.ref(recording), *(weakref.ref(one) for one in recording)]
        gc.disable()  # for what is in a cycle would be there until it comes
        try:
            if is_stopped:
                recording.stop()
            del recording
            assert [one() for one in known] == [None] * (1 + 2 * passes)
        finally:
            gc.enable()
        assert not have_ours(model)

    def test_maps_that_their_own_keep_refers_to_stop_with_it(self, model, x):
        class Studies:
            def __init__(self):
                self.maps = attention(model, keep=self.kept).start()

            def kept(self, one):
                return one.shape

        studies = Studies()
        model(x)
        known = weakref.ref(studies.maps)
        del studies
        gc.collect()
        assert known() is None
        assert not have_ours(model)

    def test_maps_that_are_dropped_in_a_call_keep_nothing_of_it(self):
        class Drops(nn.Module):
            def forward(self, x):
                y = F.scaled_dot_product_attention(x, x, x)
                held.clear()
                return y

        model, x, kept = Drops(), torch.randn(1, 2, 4, 8), []
        held = [attention(model, keep=kept.append, max_bytes=10).start()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
        assert kept == []
        assert not have_ours(model)

    def test_hooks_of_the_user_are_behind_ours_each_time(self, model, x):
        seen = []
        handle = model.blocks[0].attn.register_forward_pre_hook(lambda module, args: seen.append(len(have_ours(model))))
        for _ in range(3):
            with attention(model) as maps:
                model(x)
            assert len(maps) == 2
            [*hooks] = model.blocks[0].attn._forward_pre_hooks.values()
            assert len(hooks) == 1
        handle.remove()
        assert len(seen) == 3

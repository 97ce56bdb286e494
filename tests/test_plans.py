"""Passes that follow a plan are recorded as those that are watched in full; where it may be wrong there is no plan."""

import contextlib
import contextvars
import datetime
import functools
import gc
import os
import random
import sys
import threading
import time as clocks  # so that no global is called as the module is
import types
import warnings
import weakref
from collections import deque
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from time import monotonic

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from visualizer import VisualizerWarning, attention
from visualizer.intercept import operators, plans
from visualizer.intercept.states import States

CALLS = 6
modes = []
note_mode = modes.append  # a list that the code of a model reads is looked at, what is behind a method of one is not
turns = []
take_turn = turns.pop  # nor is this


def split(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


class Attends(nn.Module):
    """Calls the kernel under a name of its own, and notes how many modes look at it."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(8, 8) for _ in range(3))

    def attend(self, x, y):
        note_mode(torch._C._len_torch_function_stack())
        k = split(self.k(y))
        return self.out(joined(scaled_dot_product_attention(split(self.q(x)), k, k)))

    def forward(self, x, y=None):
        return self.attend(x, x if y is None else y)


class Opens(Attends):
    def attend(self, x, y):
        q, k = split(self.q(x)), split(self.k(y))
        return self.out(joined((q @ k.mT).softmax(-1) @ k))


class Joins(Attends):
    def forward(self, text, picture, *others):
        both = torch.cat([text, picture, *others], 1)
        return self.attend(both, both)


class Padded(nn.Module):
    """Cuts the padding off a text, and puts it behind the picture."""

    def __init__(self, cuts):
        super().__init__()
        self.cuts, self.inner = cuts, Joins()

    def forward(self, text, picture, mask):
        cut = self.cuts(mask)
        text = text[:, :cut] if isinstance(cut, int) else text[:, cut]
        return self.inner(text, picture, picture.new_zeros(len(picture), 5 - text.shape[1] - picture.shape[1], 8))


class Around(nn.Module):
    def __init__(self, inner=Attends):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), inner()

    def forward(self, x, *others):
        return x + self.attn(self.norm(x), *others)


@pytest.fixture(autouse=True)
def no_modes_noted():
    modes.clear()


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 5, 8)


def facts(maps):
    return [(one.path, one.kind, one.shape, one.axes_assumed) for one in maps]


def both_ways(model, calls, monkeypatch):
    """The maps of the calls as they are recorded, which have to be those of a full watch of all."""
    with attention(model) as maps:
        outputs = [call() for call in calls]
    with monkeypatch.context() as patch:
        patch.setattr(operators, "are_seen", lambda: False)
        with attention(model) as full:
            for call, output in zip(calls, outputs, strict=True):
                assert torch.equal(call(), output)
    assert facts(maps) == facts(full)
    for one, other in zip(maps, full, strict=True):
        assert torch.equal(one.dense(), other.dense())
        assert one.layout == other.layout and one.query_layout == other.query_layout
    return maps


needs_operators = pytest.mark.skipif(not operators.are_seen(), reason="this torch cannot show operators alone")


class Remembers(Attends):
    """Attends to what it remembers, once there is something; or to something else, by a number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("memory", None)
        self.register_parameter("weight", None)
        self.number = self.one = None
        self.other = torch.randn(3, 5, 8)

    def forward(self, x):
        known = self.memory if self.weight is None else self.weight
        if known is None and self.number is not None and self.number == self.one:
            known = self.other
        return self.attend(x, x if known is None else known)


@needs_operators
@pytest.mark.parametrize("number", [np.int64, np.float32, Fraction, Decimal, slice, lambda one: (one, slice(one))])
def test_a_new_number_in_the_place_of_one_that_is_gone(number, x):
    model = Remembers()
    model.number, model.one = number(0), number(1)
    with attention(model) as maps:
        for _ in range(4):
            model(x)
        model.number = None
        model.number = number(1)
        model(x)
    assert [one.kind for one in maps] == ["self"] * 4 + ["cross"]


@needs_operators
@pytest.mark.parametrize("name", ["memory", "weight"])
def test_a_buffer_or_a_parameter_that_was_none(name, x):
    model = Remembers()
    with attention(model) as maps:
        for _ in range(4):
            model(x)
        setattr(model, name, nn.Parameter(torch.randn(3, 5, 8)) if name == "weight" else torch.randn(3, 5, 8))
        model(x)
    assert [one.kind for one in maps] == ["self"] * 4 + ["cross"]


@needs_operators
@pytest.mark.parametrize("changes", ["an attribute", "chance"])
def test_a_model_that_is_another_in_each_pass_is_not_looked_at_for_ever(changes, x, monkeypatch):
    class Counts(Around):
        number = 0

        def forward(self, x):
            if changes == "chance":
                random.random()
            else:
                self.number += 1
            return super().forward(x)

    looked = []
    monkeypatch.setattr(plans, "States", lambda *args: looked.append(args) or States(*args))
    model = Counts()
    with attention(model) as maps:
        for _ in range(40):
            model(x)
    assert 0 < len(looked) <= 8
    assert facts(maps) == facts(maps)[:1] * 40


@needs_operators
class TestFollowed:
    def test_after_two_passes_there_is_no_mode(self, x, monkeypatch):
        model = nn.Sequential(Around(), Around())
        both_ways(model, [lambda: model(x)] * CALLS, monkeypatch)
        assert modes[: 2 * CALLS] == [1] * 4 + [0] * (2 * CALLS - 4)

    def test_other_lengths_and_numbers(self, x, monkeypatch):
        model = Around()
        calls = [lambda n=n: model(x[:, :n] * n) for n in (5, 4, 3, 5, 2, 1)]
        maps = both_ways(model, calls, monkeypatch)
        assert modes[:CALLS] == [1, 1, 0, 0, 0, 0]
        assert {one.kind for one in maps} == {"self"}

    def test_the_next_recording_goes_on(self, x):
        model = Around()
        for _ in range(2):
            with attention(model):
                model(x)
        with attention(model) as maps:
            model(x)
        assert modes == [1, 1, 0]
        assert facts(maps) == [("attn", "self", (3, 2, 5, 5), False)]

    def test_self_and_cross_attention_in_one_module(self, x, monkeypatch):
        class Both(Attends):
            def forward(self, x, y):
                return self.attend(self.attend(x, x), y)

        model = Around(Both)
        maps = both_ways(model, [lambda: model(x, x[:, :4] + 1)] * CALLS, monkeypatch)
        assert modes[:8] == [1] * 4 + [0] * 4
        assert [one.kind for one in maps[-2:]] == ["self", "cross"]

    def test_gradients(self, x):
        model = Around()
        with attention(model, gradients=True) as maps:
            for _ in range(CALLS):
                model(x).square().sum().backward()
        assert modes[-1] == 0
        assert torch.equal(maps[-1].grad_rows(slice(None)), maps[0].grad_rows(slice(None)))

    def test_a_mask_of_another_form(self, x, monkeypatch):
        class Masked(Attends):
            def forward(self, x, mask=None):
                k = split(self.k(x))
                note_mode(torch._C._len_torch_function_stack())
                return self.out(joined(scaled_dot_product_attention(split(self.q(x)), k, k, attn_mask=mask)))

        model, mask = Around(Masked), torch.ones(5, 5, dtype=torch.bool).tril()
        masks = [None, None, None, mask, mask[None], torch.randn(5, 5)]
        both_ways(model, [lambda mask=mask: model(x, mask) for mask in masks], monkeypatch)
        assert modes[:6] == [1, 1, 0, 1, 1, 1]

    def test_some_layers(self, x):
        model = nn.Sequential(Around(), Around())
        with attention(model, layers=-1) as maps:
            for _ in range(CALLS):
                model(x)
        assert facts(maps) == [("1.attn", "self", (3, 2, 5, 5), False)] * CALLS

    def test_a_recording_of_more_than_the_one_before(self, x):
        """What was not recorded was not looked at, and no axes of it are known."""
        model = nn.Sequential(Around(), Around())
        for options in ({"layers": 0}, {"layers": "1.*"}, {"layers": -1}, {"max_bytes": 2000}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with attention(model, **options) as some:
                    for _ in range(3):
                        model(x)
                    some.clear()
                    model(x)
            with attention(model) as maps:
                model(x)
            assert facts(maps) == [(f"{number}.attn", "self", (3, 2, 5, 5), False) for number in range(2)]
            assert {(one.kind, one.axes_assumed) for one in some} == {("self", False)}

    def test_other_types_of_numbers(self, x):
        model = nn.Sequential(nn.Embedding(9, 8), Around())
        tokens = torch.randint(9, (3, 5))
        with attention(model) as maps:
            for _ in range(3):
                model(tokens)
            with torch.autocast("cpu", torch.bfloat16):
                model(tokens)
            model.double()(tokens)
        assert [one.source.dtype for one in maps] == [torch.float32] * 3 + [torch.bfloat16, torch.float64]
        assert facts(maps) == [("1.attn", "self", (3, 2, 5, 5), False)] * 5
        assert modes == [1, 1, 0, 0, 0]

    def test_plans_hold_no_model(self, x):
        class Knows(Attends):
            def __len__(self):
                raise TypeError("as a module that torch.compile has wrapped")

            def __init__(self):
                super().__init__()
                self.around, self.known = [], types.SimpleNamespace(of=self)

        model = Around(Knows)
        model.attn.around.append(model)
        known = weakref.ref(model)
        with attention(model) as maps:
            for _ in range(3):
                model(x)
        assert modes == [1, 1, 0]
        del model, maps
        gc.collect()
        assert known() is None

    def test_two_recordings_at_once(self, x):
        model = Around()
        with attention(model) as first:
            for _ in range(3):
                model(x)
            with attention(model) as second:
                for _ in range(3):
                    model(x)
        assert facts(first) == [("attn", "self", (3, 2, 5, 5), False)] * 6
        assert facts(second) == facts(first)[:3]

    def test_maps_that_are_read_in_the_middle_of_a_pass(self, x):
        """They are proven then, which is no step of the model."""
        model, counts = nn.Sequential(Around(), Around()), []
        note = counts.append
        with attention(model) as maps:
            model[0].register_forward_hook(lambda *_: note(len(maps)))
            for _ in range(CALLS):
                model(x)
        assert counts == [2 * number + 1 for number in range(CALLS)]
        assert modes == [1] * 4 + [0] * (2 * CALLS - 4)

    def test_threads(self, x):
        model, found = Around(), {}

        def run(number):
            for _ in range(CALLS):
                model(x[:number])

        with attention(model) as maps:
            threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2, 3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for one in maps:
            found[one.shape] = found.get(one.shape, 0) + 1
            assert (one.kind, one.axes_assumed) == ("self", False)
        assert found == {(number, 2, 5, 5): CALLS for number in (1, 2, 3)}

    def test_an_interrupted_pass(self, x):
        class Stops(nn.Module):
            def forward(self, x):
                for error in errors:
                    raise error
                return x

        errors = []

        model = nn.Sequential(Around(), Stops())
        maps = attention(model).start()
        for _ in range(3):
            model(x)
        errors.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            model(x)
        scaled_dot_product_attention(x, x, x)  # of nobody
        errors.clear()
        model(x)
        maps.stop()
        scaled_dot_product_attention(x, x, x)
        assert facts(maps) == [("0.attn", "self", (3, 2, 5, 5), False)] * 5
        assert modes == [1, 1, 0, 0, 0]
        assert torch.overrides._get_current_function_mode() is None
        assert not torch._C._is_any_autocast_enabled()

    @pytest.mark.slow
    def test_a_text_that_is_written(self, monkeypatch):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model, prompt = LlamaForCausalLM(config).eval(), torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
        mask = (prompt > 0).long()

        def write():
            options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            return model.generate(prompt, attention_mask=mask, **options)

        maps = both_ways(model, [write], monkeypatch)
        assert len(maps) == 16
        assert maps.generated()[0].shape == (2, 4, 11, 11)


class Mode(Enum):
    SELF, CROSS = 0, 1


class Slotted:
    __slots__ = ("mode",)

    def __init__(self, mode):
        self.mode = mode

    def read(self):
        return self.mode


SETTINGS = types.SimpleNamespace(is_cross=False)


CONTEXT = contextvars.ContextVar("CONTEXT", default=False)
HOLDS = contextvars.ContextVar("HOLDS")


def imported_late():
    from time import perf_counter as late

    return int(late() * 100)


CLOCKS = {
    "function": lambda: int(monotonic() * 100),
    "module": lambda: clocks.monotonic_ns() // 10**7,
    "imported late": imported_late,
    "date": lambda: datetime.datetime.now().microsecond // 10**4,
}
"""Hundredths of a second."""


class Helper:
    is_cross = False

    def chooses(self):
        return self.is_cross


class TestNotFollowed:
    """Where a plan may be wrong, the pass is watched in full."""

    @pytest.mark.parametrize(
        ("given", "read"),
        [
            (lambda mode: mode, lambda option: option),
            (Slotted, lambda option: option.mode),
            (lambda mode: types.SimpleNamespace(inner=Slotted(mode)), lambda option: option.inner.mode),
            (lambda mode: {mode}, lambda option: next(iter(option))),
            (lambda mode: deque([mode], 3), lambda option: option[0]),
            (lambda mode: np.array([mode.value]), lambda option: Mode(option[0])),
            (lambda mode: np.int64(mode.value), Mode),
            (lambda mode: lambda: mode, lambda option: option()),
            (lambda mode: functools.partial(Mode, mode.value), lambda option: option()),
            (lambda mode: Slotted(mode).read, lambda option: option()),
        ],
        ids=["enum", "slots", "attributes", "set", "deque", "array", "number", "closure", "partial", "method"],
    )
    def test_another_argument_of_the_same_type(self, x, given, read, monkeypatch):
        class Chooses(Attends):
            def forward(self, x, y, option):
                return self.attend(x, y if read(option) is Mode.CROSS else x)

        model = Around(Chooses)
        modes_given = [Mode.SELF] * 3 + [Mode.CROSS]
        maps = both_ways(model, [lambda one=one: model(x, x + 1, given(one)) for one in modes_given], monkeypatch)
        assert [one.kind for one in maps] == ["self"] * 3 + ["cross"]

    def test_what_attends_to_depends_on_numbers(self, x, monkeypatch):
        class Chooses(Attends):
            def forward(self, x, y):
                return self.attend(x, y if y.mean() > 0 else x)

        class Reads(Attends):
            def forward(self, x, y):
                return self.attend(x, y if y[0, 0].tolist()[0] > 0 else x)

        for cls in (Chooses, Reads):
            model = Around(cls)
            signs = [1, 1, 1, -1, 1, -1, -1]
            calls = [lambda sign=sign: model(x, torch.full_like(x, sign) + x / 100) for sign in signs]
            maps = both_ways(model, calls, monkeypatch)
            assert [one.kind for one in maps] == ["cross" if sign > 0 else "self" for sign in signs]

    @pytest.mark.parametrize(
        "where",
        [
            *("random", "numpy", "generator", "iterator", "global", "helper", "closure", "list", "thread"),
            *("context", "context in an object", "what a context holds", "environment", "variable"),
        ],
    )
    def test_something_else_than_arguments_chooses(self, x, where, monkeypatch):
        """Some passes in a row are alike by chance."""
        turns, chosen = [False, False, False, True, True, True, False, True] * 2, []
        flag, turn, notes, own, iterator = False, 0.0, [], random.Random(0), iter(turns)
        local, around = threading.local(), types.SimpleNamespace(context=contextvars.ContextVar("of an object"))
        choose = {
            "thread": lambda: local.is_cross,
            "context": lambda: CONTEXT.get(),
            "context in an object": lambda: around.context.get(False),
            "what a context holds": lambda: HOLDS.get()["is_cross"],
            "environment": lambda: "IS_CROSS" in os.environ,
            "variable": lambda: os.getenv("IS_CROSS") is not None,
            "random": lambda: random.random() < 0.5,
            "numpy": lambda: np.random.rand() < 0.5,
            "generator": lambda: own.random() < 0.5,
            "iterator": lambda: next(iterator),
            "global": lambda: SETTINGS.is_cross,
            "helper": lambda: Helper().chooses(),
            "closure": lambda: flag,
            "list": lambda: notes[-1] > 0,
        }[where]
        note = chosen.append

        class Chooses(Attends):
            def forward(self, x, y):
                is_cross = choose()
                note("cross" if is_cross else "self")
                return self.attend(x, y if is_cross else x)

        model = Around(Chooses)
        random.seed(0)
        np.random.seed(0)
        with attention(model) as maps:
            for turn in turns:
                flag = SETTINGS.is_cross = Helper.is_cross = turn
                notes.append(float(turn))
                local.is_cross = turn
                CONTEXT.set(turn)
                around.context.set(turn)
                HOLDS.set({"is_cross": turn})
                if where in ("environment", "variable"):  # it is compared in any case
                    monkeypatch.setenv("IS_CROSS", "") if turn else monkeypatch.delenv("IS_CROSS", raising=False)
                model(x, x + 1)
        assert set(chosen) == {"self", "cross"}
        assert [one.kind for one in maps] == chosen

    @pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
    def test_a_clock_chooses(self, x, clock):
        """It is read in the pass, and before it until it shows what is to be."""
        notes = []
        note = notes.append

        class Chooses(Attends):
            def forward(self, x, y):
                is_cross = clock() % 2 > 0
                note("cross" if is_cross else "self")
                return self.attend(x, y if is_cross else x)

        model = Around(Chooses)
        with attention(model) as maps:
            for is_cross in [False, False, False, True, True, True, False, True]:
                while (clock() % 2 > 0) is not is_cross:
                    pass
                model(x, x + 1)
        assert set(notes) == {"self", "cross"}
        assert [one.kind for one in maps] == notes

    def test_a_module_of_clocks_that_is_not_asked(self, x):
        class Sleeps(Attends):
            def forward(self, x):
                clocks.sleep(0)
                return self.attend(x, x)

        model = Around(Sleeps)
        with attention(model):
            for _ in range(3):
                model(x)
        assert modes == [1, 1, 0]

    @pytest.mark.parametrize("reads", [bool, lambda number: number.item() > 0, lambda number: number.tolist() > 0])
    def test_a_number_that_is_read_elsewhere_chooses(self, x, reads):
        """What attends from there on is not known, and the next pass is watched in full."""

        class Router(nn.Module):
            def forward(self, x):
                return reads(x.sum() > 0)

        class Sets(nn.Module):
            def __init__(self):
                super().__init__()
                self.router, self.core = Router(), Core()

            def forward(self, x, y):
                is_cross = self.router(x)
                self.core.known = y if is_cross else x
                return self.core(x, y)

        class Core(Attends):
            def forward(self, x, y):
                return self.attend(x, self.known)

        model, signs = Sets(), [1, 1, 1, -1, -1, -1, -1, 1]
        with attention(model) as maps:
            for sign in signs:
                model(sign * x.abs(), x + 1)
        kinds = ["cross" if sign > 0 else "self" for sign in signs]
        wrong = [number for number, one in enumerate(maps) if one.kind != kinds[number]]
        assert all(maps[number].kind is None for number in wrong)
        assert set(wrong) <= {3, 7}

    def test_the_module_around_is_given_something_else(self, x, monkeypatch):
        class Core(nn.Module):
            def forward(self, q, k):
                return scaled_dot_product_attention(q, k, k)

        class Chooses(Attends):
            def __init__(self):
                super().__init__()
                self.core = Core()

            def forward(self, x, y, is_cross):
                return self.core(self.q(x), self.k(y if is_cross else x))

        class Calls(Around):
            def forward(self, x, y):
                return self.attn(x, y, bool(x.sum() > 0))

        model, signs = Calls(Chooses), [1, 1, 1, -1, -1, -1, -1, 1]
        calls = [lambda sign=sign: model(sign * x.abs(), x + 1) for sign in signs]
        with attention(model) as maps:
            for call in calls:
                call()
        kinds = [one.kind for one in maps]
        assert all(kind in ("cross" if sign > 0 else "self", None) for kind, sign in zip(kinds, signs, strict=True))
        assert kinds.count(None) <= 2

    def test_a_module_inside_is_given_something_else(self, x):
        class Chooses(Attends):
            def forward(self, x, y, is_cross):
                return self.attend(x, y if is_cross else x)

        class Calls(Around):
            def forward(self, x, y):
                return self.attn(x, y, take_turn())

        model = Calls(Chooses)
        turns[:] = [True] * 4 + [False] * 4
        with attention(model) as maps:
            for _ in range(8):
                model(x, x + 1)
        assert [one.kind for one in maps] == ["self"] * 4 + [None] + ["cross"] * 3

    def test_an_argument_whose_class_fails(self, x, monkeypatch):
        class Fails:
            def __getattr__(self, name):
                raise ValueError(name)

        class Takes(Attends):
            def forward(self, x, option):
                return self.attend(x, x)

        model, option = Around(Takes), Fails()
        model.attn.option = option
        maps = both_ways(model, [lambda: model(x, option)] * 4, monkeypatch)
        assert facts(maps) == [("attn", "self", (3, 2, 5, 5), False)] * 4

    def test_whether_it_attends_depends_on_numbers(self, x, monkeypatch):
        class Chooses(Attends):
            def forward(self, x):
                return self.attend(x, x) if x.mean() > 0 else x

        model = Around(Chooses)
        calls = [lambda sign=sign: model.attn(sign * x.abs()) for sign in (1, 1, 1, -1, 1, -1, 1, 1)]
        assert len(both_ways(model, calls, monkeypatch)) == 6

    def test_the_module_around_gives_it_something_else(self, x, monkeypatch):
        class Gives(Around):
            def forward(self, x, y):
                return self.attn(x, y if y.mean() > 0 else x)

        model = Gives()
        signs = [1, 1, 1, -1, 1, -1]
        calls = [lambda sign=sign: model(x, torch.full_like(x, sign) + x / 100) for sign in signs]
        maps = both_ways(model, calls, monkeypatch)
        assert [one.kind for one in maps] == ["cross" if sign > 0 else "self" for sign in signs]

    def test_inputs_that_are_joined(self, x, monkeypatch):
        """As text and picture are in makers of pictures."""
        model = Joins()
        calls = [lambda n=n: model(x[:, :n], x[:, n:]) for n in (2, 2, 2, 3, 3, 3)]
        maps = both_ways(model, calls, monkeypatch)
        assert [one.joined["text"].stop for one in maps] == [2, 2, 2, 3, 3, 3]
        assert modes[:6] == [1, 1, 0, 1, 1, 0]

    @pytest.mark.parametrize("cuts", [lambda mask: int(mask.sum()), lambda mask: mask])
    def test_a_part_whose_length_numbers_say(self, x, monkeypatch, cuts):
        """The whole stays as long, and the tensors that the model is given too."""
        model = Padded(cuts)
        masks = [torch.arange(3) < n for n in (2, 2, 2, 3, 1)]
        maps = both_ways(model, [lambda mask=mask: model(x[:, :3], x[:, 3:], mask) for mask in masks], monkeypatch)
        assert [one.joined["text"].stop for one in maps] == [2, 2, 2, 3, 1]

    def test_calls_that_are_joined(self, x, monkeypatch):
        class Heads(Attends):
            def forward(self, x):
                note_mode(torch._C._len_torch_function_stack())
                q, k = split(self.q(x)), split(self.k(x))
                heads = [scaled_dot_product_attention(q[:, i], k[:, i], k[:, i]) for i in range(2)]
                return self.out(joined(torch.stack(heads, 1)))

        model = Around(Heads)
        maps = both_ways(model, [lambda: model(x)] * 4, monkeypatch)
        assert facts(maps) == [("attn", "self", (3, 2, 5, 5), False)] * 4
        assert modes[:4] == [1] * 4

    def test_a_recurrent_layer_that_is_given_another_type(self, x):
        """It asks whether there is autocast, before it says what is wrong."""
        model = nn.Sequential(Around(), nn.LSTM(8, 8).double())
        for recording in (contextlib.nullcontext(), attention(model)):
            with recording, pytest.raises(ValueError, match="RNN input dtype"):
                model(x)

    def test_multihead_attention_of_torch(self, x, monkeypatch):
        """Without a mode torch may take its native path, in which nothing is seen."""
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval()
        with torch.no_grad():
            maps = both_ways(model, [lambda: model(x)] * 4, monkeypatch)
        assert facts(maps) == [("layers.0.self_attn", "self", (3, 2, 5, 5), False)] * 4

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: setattr(model.attn, "is_cross", False),
            lambda model: setattr(model.attn.config, "is_cross", False),
            lambda model: setattr(model, "attn", Opens()) or setattr(model.attn, "config", None),
            lambda model: setattr(model.attn, "forward", lambda x, y: model.attn.attend(x, x)),
            lambda model: setattr(type(model.attn), "forward", lambda self, x, y: self.attend(x, x)),
            lambda model: model.norm.register_forward_hook(lambda module, args, output: Opens()(output)),
            lambda model: setattr(type(model.attn), "looks_elsewhere", False),
            lambda model: model.attn.options.update(is_cross=False),
            lambda model: model.attn.flags.append("self"),
            lambda model: model.swap_hook(lambda module, args: (args[0], args[0])),
        ],
        ids=["attribute", "config", "part", "forward", "class", "hook", "of class", "dict", "list", "other hook"],
    )
    def test_the_model_changes(self, x, change, monkeypatch):
        class Config:
            is_cross = True

        class Changes(Attends):
            looks_elsewhere = True

            def __init__(self):
                super().__init__()
                self.is_cross, self.config, self.options, self.flags = True, Config(), {"is_cross": True}, []
                self.config.is_cross = True

            def forward(self, x, y):
                options = self.is_cross, self.config.is_cross, self.options["is_cross"], self.looks_elsewhere
                return self.attend(x, y if all(options) and not self.flags else x)

        def swap_hook(hook):
            handle.remove()
            model.attn.register_forward_pre_hook(hook)

        model, y = Around(Changes), x + 1
        handle = model.attn.register_forward_pre_hook(lambda module, args: None)
        model.swap_hook = swap_hook
        with attention(model) as maps:
            for _ in range(3):
                model(x, y)
        assert [one.kind for one in maps] == ["cross"] * 3
        change(model)
        with monkeypatch.context() as patch:
            patch.setattr(operators, "are_seen", lambda: False)
            with attention(model) as full:
                model(x, y)
        with attention(model) as maps:
            model(x, y)
        assert facts(maps) == facts(full)

    @pytest.mark.parametrize(
        ("change", "path"),
        [
            (lambda model: setattr(model, "other", model._modules.pop("attn")), "other"),
            (lambda model: model.empty.append(Attends()), "empty.0"),
            (lambda model: setattr(model.layer, "forward", Attends().forward), "layer"),
            (lambda model: setattr(model.layer, "__class__", Opens), "layer"),
        ],
        ids=["another name", "a part in what was empty", "forward", "class"],
    )
    def test_the_parts_change_between_recordings(self, x, change, path):
        """What was found of the modules at the first recording is looked for anew."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn, self.empty, self.layer = Attends(), nn.Sequential(), Works()

            def forward(self, x):
                return self.layer(self.empty(self.attn(x)))

        class Works(Attends):
            def forward(self, x):
                return nn.functional.gelu(self.out(x))

        model = Model()
        for _ in range(3):
            with attention(model) as maps:
                model(x)
            assert [*maps.paths] == ["attn"]
        change(model)
        with attention(model) as maps:
            model.other(x) if path == "other" else model(x)
        assert path in maps.paths

    def test_another_forward_while_it_is_recorded(self, x):
        model = Around()
        own = model.norm.forward
        with attention(model) as maps:
            for _ in range(3):
                model(x)
            model.norm.forward = lambda y: own(y) + (y @ y.mT).softmax(-1) @ y
            model(x)
        assert len(maps) == 5


@needs_operators
class TestToldApart:
    """What a plan could not foresee is told, or recorded as far as it is known."""

    @pytest.fixture
    def late(self):
        """Something else happens at a call that nothing announces."""

        class Late(Attends):
            def forward(self, x):
                return self.attend(x, x) if take_turn() else self.other(x)

        turns[:] = [False] * 3 + [True] * 4
        return Late

    def test_an_attention_without_a_kernel(self, x, late):
        model = Around(late)
        model.attn.other = lambda x: Opens.attend(model.attn, x, x)
        with pytest.warns(VisualizerWarning, match=r"Late, called in 'attn', multiplied matrices"):
            with attention(model) as maps:
                for _ in range(7):
                    model(x)
        assert facts(maps) == [("attn", "self", (3, 2, 5, 5), False)] * 6

    def test_one_more_kernel(self, x, late):
        model = Around(late)
        model.attn.other = lambda x: model.attn.attend(model.attn.attend(x, x), x + 1)
        with attention(model) as maps:
            for _ in range(7):
                model(x)
        assert [(one.kind, one.axes_assumed) for one in maps[:4]] == [("self", False)] * 4
        assert [(one.kind, one.axes_assumed) for one in maps[4:6]] == [("self", False), (None, True)]
        assert [(one.kind, one.axes_assumed) for one in maps[6:]] == [("self", False)] * 4

    def test_a_function_of_another_library(self, x, late, monkeypatch):
        """It is seen without the mode, which alone knows where its query and key come from."""

        def flash_attn_func(q, k, v):
            return scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v))).transpose(1, 2)

        def other(x):
            q, k = model.attn.q(x).unflatten(-1, (2, -1)), model.attn.k(memory).unflatten(-1, (2, -1))
            return model.attn.out(library.flash_attn_func(q, k, k).flatten(2))

        library, memory = types.ModuleType("flash_attn_like"), torch.randn(3, 4, 8)
        library.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, library.__name__, library)
        model = Around(late)
        model.attn.other = other
        with attention(model) as maps:
            for _ in range(6):
                model(x)
        assert [one.kind for one in maps] == ["self"] * 4 + [None, "cross"]

    def test_other_heads(self, x, late):
        model = Around(late)

        def other(x):
            q = model.attn.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
            return model.attn.out(joined(scaled_dot_product_attention(q, q, q)))

        model.attn.other = other
        with attention(model) as maps:
            for _ in range(7):
                model(x)
        assert [one.shape[1] for one in maps] == [2] * 4 + [4] * 3
        assert [one.axes_assumed for one in maps] == [False] * 4 + [True] + [False] * 2
        assert maps[4].kind is None

    def test_a_hook_that_attends_in_a_layer_of_torch(self, x):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.attn, self.mlp = Attends(), MLP()

            def forward(self, x):
                return self.mlp(self.attn(x))

        class MLP(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x):
                return self.fc(x)

        def attends(module, args, output):
            return scaled_dot_product_attention(output, output, output)

        def opens(module, args, output):
            return (output @ output.mT).softmax(-1) @ output

        for hook in (attends, opens):
            model = Block()
            with attention(model) as maps:
                for _ in range(3):
                    model(x)
                model.mlp.fc.register_forward_hook(hook)
                for _ in range(4):
                    model(x)
            assert [one.path for one in maps] == ["attn"] * 3 + ["attn", "mlp"] * 4


def test_without_operators_everything_is_watched_in_full(x, monkeypatch):
    monkeypatch.setattr(operators, "are_seen", lambda: False)
    model = Around()
    with attention(model) as maps, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(x)
    assert modes == [1] * 4
    assert facts(maps) == [("attn", "self", (3, 2, 5, 5), False)] * 4

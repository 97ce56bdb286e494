"""What tells whether two passes are alike: what calls are given, what modules hold, what their code reads."""

import contextvars
import gc
import random
import types
import weakref
from collections import OrderedDict, deque, namedtuple
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from visualizer.intercept.settings import Objects, Settings
from visualizer.intercept.states import Forms, Given, States

Pair = namedtuple("Pair", ("first", "second"))
NAN = float("nan")


class Mode(Enum):
    SELF, CROSS = 0, 1


class Cache:
    def get_seq_length(self):
        return 0


class Fails:
    def __getattr__(self, name):
        raise ValueError(name)


class Moody:
    def __init__(self, fails):
        self.fails = fails

    def __getattr__(self, name):
        if self.fails:
            raise ValueError(name)
        return 1


def plain():
    return 1


COMMON = [
    *(lambda: None, lambda: True, lambda: 1, lambda: 1.0, lambda: 0, lambda: -0.0, lambda: "a", lambda: NAN),
    *(lambda: float("nan"), lambda: torch.float32, lambda: ..., lambda: Mode.SELF, lambda: Mode.CROSS, lambda: int),
    *(lambda: np.int64(1), lambda: np.float64("nan"), lambda: nn.Parameter(torch.ones(2))),
    *(lambda: torch.ones(2), lambda: torch.ones(3), lambda: torch.ones(1, 2), lambda: torch.ones(2).half()),
    *(lambda: torch.ones(2).long(), lambda: torch.ones(2).bool(), lambda: torch.ones(1, 2).long()),
    *(Cache, lambda: types.SimpleNamespace(get_seq_length=None), lambda: types.SimpleNamespace(one=1)),
    *(lambda: Moody(False), lambda: Moody(True)),
]
OTHERS = [
    *(lambda: np.arange(2), lambda: np.zeros((1, 2)), lambda: {1, 2}, lambda: deque([1]), lambda: Pair(1, None)),
    *(Fails, lambda: types.SimpleNamespace(one=[1]), lambda: OrderedDict(a=1), lambda: iter([1])),
    *(lambda: plain, lambda: lambda: 2, lambda: partial(plain), lambda: Cache().get_seq_length),
]


def given(numbers, known, depth=3):
    """Arguments that a generator of random numbers makes; some of them are there twice."""
    kind = numbers.random()
    if known and kind < 0.25:
        return numbers.choice(known)
    if depth == 0 or kind < 0.6:
        value = numbers.choice(COMMON if numbers.random() < 0.95 else OTHERS)()
    else:
        held = [given(numbers, known, depth - 1) for _ in range(numbers.randrange(4))]
        value = numbers.choice([tuple, list, lambda several: dict(zip("abc", several, strict=False))])(held)
    known.append(value)
    return value


def call(seed, other=None):
    """Arguments by position and by name; with another seed, as the first but for one part."""
    numbers, known = random.Random(seed), []
    args = tuple(given(numbers, known) for _ in range(numbers.randrange(4)))
    kwargs = {name: given(numbers, known) for name in ("x", "mask", "cache")[: numbers.randrange(4)]}
    if other is not None:
        numbers = random.Random(other)
        places = [*range(len(args)), *kwargs]
        if places:
            place = numbers.choice(places)
            value = given(numbers, known)
            if isinstance(place, int):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                kwargs[place] = value
    return args, kwargs


class TestGiven:
    def test_it_fits_what_has_the_same_form(self):
        """Of random arguments: the same ones made anew, and with one that differs or does not."""
        verdicts = {True: 0, False: 0}
        for seed in range(1500):
            first = call(seed)
            known = Given(*first)
            for other in (first, call(seed), *(call(seed, one) for one in range(4))):
                expected = bool(Forms().of(other) == known.form)
                assert known.fits(*other) is expected
                assert (Given(*other) == known) is expected
                verdicts[expected] += 1
        assert min(verdicts.values()) > 1000

    def test_of_most_calls_no_form_is_made(self, monkeypatch):
        """As of an attention of transformers."""
        x, cache, both = torch.ones(1, 2, 8), Cache(), torch.ones(2)

        def kwargs():
            return {
                "hidden_states": x,
                "position_embeddings": (both, both),
                "mask": None,
                "past": cache,
                "causal": True,
            }

        known = Given((x,), kwargs())
        monkeypatch.setattr(Forms, "of", None)
        assert known.fits((x + 1,), kwargs() | {"hidden_states": x}) is False
        assert known.fits((x,), kwargs()) is True
        assert known.fits((x,), kwargs() | {"past": None}) is False
        assert known.fits((x,), kwargs() | {"causal": 1}) is False
        assert known.fits((x,), kwargs() | {"position_embeddings": (both, x)}) is False

    def test_a_cache_is_known_by_what_it_has(self):
        for one, other in (
            (Moody(False), Moody(True)),
            (types.SimpleNamespace(get_seq_length=1), types.SimpleNamespace(one=1)),
        ):
            known = Given((one,), {})
            assert known.fits((one,), {}) and not known.fits((other,), {})
            assert Forms().of(((other,), {})) != known.form

    def test_it_holds_no_tensor(self):
        x = torch.ones(2)
        known, of = Given((x, [x]), {"cache": (cache := Cache())}), (weakref.ref(x), weakref.ref(cache))
        del x, cache
        gc.collect()
        assert [one() for one in of] == [None, None] and known.form


class TestSettings:
    def test_what_is_no_setting_may_move(self, monkeypatch):
        """It is only looked for again where something moved."""
        held = [[torch.ones(2), 1], {"of": {"x": torch.ones(2), "scale": 0.5}}]
        known = Settings(held, [0, 1])
        held[0][0] = held[1]["of"]["x"] = torch.ones(3)
        assert known.are_same(held)
        monkeypatch.setattr("visualizer.intercept.settings.settings", None)
        assert known.are_same(held)

    @pytest.mark.parametrize(
        "change",
        [
            lambda held: held[0].append("one more"),
            lambda held: held[1]["of"].update(scale=0.25),
            lambda held: held[1]["of"].update(scale=torch.ones(1)),
            lambda held: held[2].pop(),
            lambda held: setattr(held[3], "mode", Mode.CROSS),
            lambda held: held[4].inner.clear(),
            lambda held: held[5].set(held[0]),
            lambda held: held[5].set(plain),
        ],
        ids=["list", "inner dict", "no longer", "no longer long", "enum", "inner set", "context", "held by a context"],
    )
    def test_changes(self, change):
        inner = types.SimpleNamespace(inner={1, 2})
        held = [[1], {"of": {"scale": 0.5}}, [1] * 101, types.SimpleNamespace(mode=Mode.SELF), inner]
        held.append(contextvars.ContextVar("of a test"))
        held[5].set(Cache)
        known = Settings(held, range(6))
        assert known.are_same(held)
        change(held)
        assert not known.are_same(held)

    def test_another_number_at_the_same_address(self):
        held = [[float("0.5")]]
        known = Settings(held, [0])
        held[0].clear()
        held[0].append(float("0.25"))
        assert not known.are_same(held)


class TestObjects:
    @pytest.mark.parametrize("make", [Cache, lambda: float("0.5"), lambda: (float("0.5"), "a"), lambda: lambda: 1])
    def test_another_object_at_the_same_address(self, make):
        one = make()
        known, number, others = Objects([one]), id(one), []
        assert known.are([one])
        del one
        for _ in range(100):
            other = make()
            if id(other) == number:
                assert not known.are([other])
            others.append(other)

    def test_what_compares_in_its_own_way(self):
        held = [torch.ones(2), np.ones(2), [1], [1], NAN, Fails(), "a", None]
        assert Objects(held).are([*held])
        for place in range(len(held)):
            assert not Objects(held).are([*held[:place], torch.ones(2), *held[place + 1 :]])
        assert Objects([]).are([]) and not Objects([]).are([None]) and not Objects([None]).are([])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


class TestStates:
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: setattr(model, "another", 1),
            lambda model: model.eval(),
            lambda model: model._modules.update(other=model._modules.pop("layer")),
            lambda model: setattr(model.layer, "__class__", type("Linear", (nn.Linear,), {})),
            lambda model: setattr(model.layer, "forward", lambda x: x),
            lambda model: setattr(model.layer, "part", nn.Identity()),
            lambda model: setattr(model, "_buffers", {}),
        ],
        ids=["attribute", "mode", "name", "class of a layer", "forward of a layer", "part of a layer", "buffers"],
    )
    def test_changes(self, change):
        model = Model()
        known = States([model])
        assert known.are_same() and known.are_steady
        model(torch.ones(2)).sum().backward()
        model.load_state_dict(Model().state_dict())
        assert known.are_same()
        change(model)
        assert not known.are_same()

    def test_a_module_that_is_gone(self):
        model = Model()
        known = States([model])
        del model
        gc.collect()
        assert not known.are_same()


def test_another_thread_puts_others_in_their_place_between_two_looks(monkeypatch):
    """Nothing is taken for steady whose settings are not followed."""
    layer = nn.Linear(2, 2)
    layer.options = {"is_on": True}
    assert States([layer]).are_steady
    look = States._held

    def replace_and_look(states):
        layer.options = {"is_on": False}
        return look(states)

    monkeypatch.setattr(States, "_held", replace_and_look)
    assert not States([layer]).are_steady

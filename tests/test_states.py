"""What tells whether two passes are alike: what calls are given, what modules hold, what their code reads."""

import gc
import random
import types
import weakref
from collections import OrderedDict, deque, namedtuple
from enum import Enum
from functools import partial

import numpy as np
import torch
from torch import nn

from visualizer.intercept.states import Forms, Given

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


def plain():
    return 1


LEAVES = [
    *(lambda: None, lambda: True, lambda: 1, lambda: 1.0, lambda: 0, lambda: -0.0, lambda: "a", lambda: NAN),
    *(lambda: float("nan"), lambda: torch.float32, lambda: ..., lambda: Mode.SELF, lambda: Mode.CROSS, lambda: int),
    *(lambda: np.int64(1), lambda: np.float64("nan"), lambda: np.arange(2), lambda: np.zeros((1, 2)), lambda: {1, 2}),
    *(lambda: torch.ones(2), lambda: torch.ones(3), lambda: torch.ones(1, 2), lambda: torch.ones(2).half()),
    *(lambda: torch.ones(2).long(), lambda: torch.ones(2).bool(), lambda: nn.Parameter(torch.ones(2))),
    *(lambda: Cache(), lambda: Cache(), lambda: Fails(), lambda: types.SimpleNamespace(one=1), lambda: deque([1])),
    *(lambda: plain, lambda: lambda: 2, lambda: partial(plain), lambda: Cache().get_seq_length, lambda: iter([1])),
    *(
        lambda: Pair(1, None),
        lambda: OrderedDict(a=1),
        lambda: [],
        lambda: (),
        lambda: {},
        lambda: [1],
        lambda: {"a": 1},
    ),
]


def given(numbers, known, depth=3):
    """Arguments that a generator of random numbers makes; some of them are there twice."""
    kind = numbers.random()
    if known and kind < 0.25:
        return numbers.choice(known)
    if depth == 0 or kind < 0.6:
        value = numbers.choice(LEAVES)()
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
        for seed in range(3000):
            first = call(seed)
            known = Given(*first)
            for other in (first, call(seed), *(call(seed, one) for one in range(4))):
                expected = bool(Forms().of(other) == known.form)
                assert known.fits(*other) is expected
                assert (Given(*other) == known) is expected
                verdicts[expected] += 1
        assert min(verdicts.values()) > 3000

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

    def test_it_holds_no_tensor(self):
        x = torch.ones(2)
        known, of = Given((x, [x]), {"cache": (cache := Cache())}), (weakref.ref(x), weakref.ref(cache))
        del x, cache
        gc.collect()
        assert [one() for one in of] == [None, None] and known.form

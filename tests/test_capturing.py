"""capture() on plain Python: functions, classes, names, several at once. Modules are in test_capturing_modules.py."""

import functools
import gc
import itertools
import weakref

import pytest
from functions import Base, attend

from visualizer import UnknownLocalError, VisualizerWarning, capture


class Loses:
    """Its methods no longer have themselves when they return."""

    def assigns(self, x):
        attn = x
        self = None
        return x

    def deletes(self, x):
        attn = x
        del self

    def loops(self, x):
        attn = x
        for self in range(x):
            pass

    def shares(self, x):
        def lose():
            nonlocal self
            self = None

        attn = x
        lose()
        return x


class TestMistakes:
    @pytest.mark.parametrize(
        ("make", "error", "parts"),
        [
            (lambda: capture(attend), TypeError, ["needs the name", 'capture(model, "attn")']),
            (lambda: capture(attend, attend), TypeError, ["strings"]),
            (lambda: capture(attend, "atn"), UnknownLocalError, ["'atn'", "did you mean 'attn'", "x, q, attn"]),
            (lambda: capture(Base, "atn"), UnknownLocalError, ["no method of Base", "Base.score: x, attn"]),
            (lambda: capture(len, "x"), TypeError, ["an nn.Module, a function", "len"]),
            (lambda: capture(3, "x"), TypeError, ["3 has no Python code"]),
            (lambda: capture([], "x"), ValueError, ["empty"]),
            (lambda: capture("textwrap.dedent", "x"), ValueError, ["'textwrap.dedent'", "package.module:function"]),
            (lambda: capture("textwrap:dedet", "x"), AttributeError, ["'textwrap:dedet'", "did you mean 'dedent'"]),
            (lambda: capture("no_such_module:f", "x"), ModuleNotFoundError, ["no_such_module"]),
            (lambda: capture(attend, "attn", at="exit"), ValueError, ["'return', 'assign'"]),
            (lambda: capture(attend, "attn", keep="torch"), ValueError, ["'numpy', 'tensor', 'graph'"]),
            (lambda: capture(attend, "attn", limit=0), ValueError, ["limit"]),
            (lambda: capture(attend, "attn", max_bytes="1"), TypeError, ["max_bytes"]),
        ],
    )
    def test_each_is_told_at_once(self, make, error, parts):
        code = attend.__code__
        with pytest.raises(error) as caught:
            make()
        for part in parts:
            assert part in str(caught.value)
        assert attend.__code__ is code

    @pytest.mark.parametrize("method", ["assigns", "deletes", "loops", "shares"])
    def test_a_method_that_loses_its_self_does_not_say_whose_call_returns(self, method):
        one, line = Loses(), getattr(Loses, method).__code__.co_firstlineno
        with pytest.raises(TypeError) as caught:
            capture(getattr(one, method), "attn")
        for part in (f"Loses.{method} ({__file__}:{line})", "'self'", f"capture(Loses.{method}, 'attn')"):
            assert part in str(caught.value)
        with capture(getattr(one, method), "attn", at="assign") as found:
            with pytest.warns(VisualizerWarning, match="3 of 4 keys"), capture(Loses, "attn") as both:
                getattr(one, method)(1), getattr(Loses(), method)(2)
        assert [1] == found[f"Loses.{method}"]
        assert [1, 2] == both[f"Loses.{method}"]
        with pytest.raises(TypeError, match="whose call"):
            capture(type("LosesToo", (Loses,), {}), "attn")

    def test_a_method_without_self_does_not_say_whose_call_it_is(self):
        class Starred:
            def score(*args):
                attn = args[1:]
                return attn

        class Inherits(Starred):
            pass

        for target in (Starred().score, Inherits):
            for at in ("return", "assign"):
                with pytest.raises(TypeError, match=r"Starred.score \(.*no parameter.*capture\(.*Starred.score"):
                    capture(target, "attn", at=at)
        with capture(Starred, "attn") as found:
            Starred().score(1)
        assert [[(1,)]] == list(found.values())

    @pytest.mark.parametrize("name", ["x", "rest", "options"])
    def test_a_parameter_that_is_never_assigned_has_nothing_for_assign(self, name):
        def forward(x, *rest, by=2, **options):
            by = x * by
            return by

        line = forward.__code__.co_firstlineno
        for names in ([name], ["by", name]):
            with pytest.raises(ValueError) as caught:
                capture(forward, *names, at="assign")
            for part in (f"forward ({__file__}:{line})", f"assigns to {name!r}: it is a parameter", "at='return'"):
                assert part in str(caught.value)
        with capture(forward, "by", at="assign") as found:
            forward(3)
        assert [[6]] == list(found.values())

    def test_what_only_others_assign_has_nothing_for_assign(self):
        total = 1

        def forward(x):
            def add():
                nonlocal attn
                attn = x

            attn: int
            add()
            return attn + total

        with pytest.raises(ValueError, match="'total': it is a variable of an outer function"):
            capture(forward, "total", at="assign")
        with pytest.raises(ValueError, match="'attn': only a function inside it may do so"):
            capture(forward, "attn", at="assign")
        with capture(forward, "attn", "total") as found:
            assert 2 == forward(1)
        assert [[1], [1]] == list(found.values())

    def test_for_assign_methods_and_wrappers_that_do_not_are_left_out(self):
        class Scores:
            def first(self, attn):
                return attn

            def second(self, x):
                attn = x
                return self.first(attn)

        @functools.wraps(attend)
        def wrapper(x):
            x = 2 * x
            return attend(x)

        with capture(wrapper, "x", at="assign") as found:
            assert 7 == wrapper(1)
        assert {"attend": [2]} == found
        with capture(Scores, "attn", at="assign") as found:
            Scores().second(3)
        assert [[3]] == list(found.values())
        with pytest.raises(ValueError, match=r"Scores\.first .*'self': it is a parameter"):
            capture(Scores, "attn", "self", at="assign")

    def test_a_call_that_raises_leaves_nothing_behind(self):
        def forward(x):
            attn = 1 / x
            return attn

        code = forward.__code__
        with pytest.raises(ZeroDivisionError), capture(forward, "attn") as found:
            forward(2)
            forward(0)
        assert forward.__code__ is code
        assert [[0.5]] == list(found.values())


class TestSeveralAtOnce:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
    def test_each_has_its_own_whatever_the_order_of_leaving(self, gl, order):
        code = attend.__code__
        gl("attn")(attend)
        captures = [capture(attend, "attn"), capture(attend, "q", at="assign"), capture([Base, attend], "x")]
        switches = [gl.deactivate, *(found.stop for found in captures)]
        gl.activate()
        for found in captures:
            found.start()
        for number, index in enumerate(order):
            assert 5 + 2 * number == attend(1 + number)
            switches[index]()
        attend(99)
        assert attend.__code__ is code
        left_at = {index: number + 1 for number, index in enumerate(order)}
        xs = [1, 2, 3, 4]
        assert [2 * (x + 1) for x in xs][: left_at[0]] == gl.cache["attend"]
        assert [2 * (x + 1) for x in xs][: left_at[1]] == captures[0]["attend"]
        assert [x + 1 for x in xs][: left_at[2]] == captures[1]["attend"]
        assert xs[: left_at[3]] == captures[2]["attend"]

    def test_nested(self):
        with capture(attend, "attn") as outer:
            attend(1)
            with capture(attend, "attn") as inner:
                attend(2)
            attend(3)
        assert ([4, 6, 8], [6]) == (outer["attend"], inner["attend"])

    def test_stop_and_start_go_on_in_the_same_lists(self):
        found = capture(attend, "attn")
        attend(1)
        with found as same:
            assert same is found
            attend(2)
        assert found.start().start() is found
        assert found.is_running
        attend(3)
        found.stop(), found.stop()
        assert not found.is_running
        attend(4)
        assert {"attend": [6, 8]} == found
        assert [0, 1] == [record.call for record in found.records]

    def test_clear_starts_over(self):
        with capture(attend, "attn") as found:
            attend(1)
            held = found["attend"]
            found.clear()
            attend(2)
        assert ([4], [6]) == (held, found["attend"])

    def test_limits(self):
        with capture(attend, "attn", limit=2) as found, capture(attend, "attn", max_bytes=160) as small:
            attend(1), attend(2)
            with pytest.warns(VisualizerWarning, match=r"160 bytes on cpu \(max_bytes\).*until its clear"):
                attend(3)
            attend(4)
        assert ([8, 10], [4, 6]) == (found["attend"], small["attend"])

    def test_keep_raises_here_and_on_reading(self):
        def swallows(x):
            try:
                attn = x
            except ValueError:
                return "swallowed"

        def keep(value):
            raise ValueError("no")

        with capture(swallows, "attn", at="assign", keep=keep) as found:
            assert "swallowed" == swallows(1)
        with pytest.raises(ValueError, match="no") as caught:
            found["TestSeveralAtOnce"]
        assert "while keeping 'attn'" in caught.value.__notes__[0]


class TestKeysWithoutValues:
    """The end of the `with` says which, why, and the way out; printing shows them too."""

    def message(self, *arguments, run=lambda: None, **options):
        with pytest.warns(VisualizerWarning, match="nothing was recorded under") as told:
            with capture(*arguments, **options) as found:
                run()
        assert 1 == len(told)
        assert __file__ == told[0].filename
        return str(told[0].message), found

    def test_nothing_was_called(self):
        message, found = self.message(attend, "attn")
        place = f"attend ({attend.__code__.co_filename}:{attend.__code__.co_firstlineno})"
        assert f"under 1 of 1 keys ('attend'): no call of {place} returned. Call the model inside" in message
        assert "0 (not reached)" in repr(found)
        with found:
            pass  # it was told

    def test_some_of_many(self):
        def make(number):
            def function(x):
                return x

            function.__qualname__ = f"function_{number}"
            return function

        functions = [make(number) for number in range(12)]
        message, found = self.message(functions, "x", run=lambda: [functions[7](1), functions[0](1)])
        assert (
            "10 of 12 keys ('function_1', 'function_2', 'function_3', 'function_4' and 6 more): no call of" in message
        )
        assert "The usual causes: a branch that the model did not take" in message
        assert 10 == repr(found).count("not reached")
        assert 900 > len(message)

    def test_a_line_that_was_not_reached(self):
        def forward(x):
            if x > 5:
                attn = x
            return x

        line = forward.__code__.co_firstlineno + 2
        message, _ = self.message(forward, "attn", at="assign", run=lambda: forward(1))
        assert f"came to line {line}, which assigns 'attn'" in message

    def test_objects_that_were_not_called(self):
        class Layer:
            def forward(self, x):
                return x

        called, other = Layer(), Layer()
        called_only = [called.forward, other.forward]
        message, found = self.message(called_only, "x", run=lambda: called.forward(1))
        assert "on these objects returned" in message
        assert [1, 0] == [len(values) for values in found.values()]

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    @pytest.mark.parametrize(
        "take",
        [
            *(lambda found: found.clear(), lambda found: found["attend"].clear(), lambda found: found.pop("attend")),
            *(lambda found: found.__setitem__("attend", []), lambda found: None),
        ],
    )
    def test_what_the_user_has_taken_out_was_recorded(self, keep, take):
        with capture(attend, "attn", keep=keep) as found:
            attend(1), attend(2), attend(3)
            take(found)
        assert "not reached" not in repr(found)

    def test_what_was_told_otherwise_is_not_told_again(self):
        def forward(x):
            if x > 5:
                attn = x
            return x

        with pytest.warns(VisualizerWarning, match="was not bound") as told, capture(forward, "attn"):
            forward(1)
        assert 1 == len(told)
        with pytest.warns(VisualizerWarning, match="captured values would take more") as told:
            with capture([attend, forward], "x", max_bytes=1):
                attend(1)
        assert 1 == len(told)
        with pytest.raises(ZeroDivisionError), capture(forward, "x", keep=lambda x: 1 / 0):
            forward(1)

    def test_an_error_inside_is_enough(self):
        with pytest.raises(ZeroDivisionError), capture(attend, "attn"):
            1 / 0


@pytest.mark.filterwarnings("ignore:.*is or holds a .*Value")
class TestMemory:
    def test_what_was_captured_goes_with_what_holds_it(self):
        """At once, by counting references: on a GPU the collector comes too late."""

        class Value:
            pass

        def forward():
            attn = Value()
            return None

        gc.collect()
        gc.disable()
        try:
            with capture(forward, "attn", keep="graph") as found:
                forward()
            seen = weakref.ref(next(iter(found.values()))[0])
            assert seen() is not None
            del found
            assert seen() is None
        finally:
            gc.enable()

    @pytest.mark.filterwarnings("ignore:.*kept by reference")
    @pytest.mark.parametrize("keep", ["numpy", "graph", "callable"])
    @pytest.mark.parametrize("reads", ["before the end", "after it", "never"])
    def test_however_it_was_read(self, keep, reads):
        class Value:
            pass

        def forward():
            attn = Value()
            return None

        gc.collect()
        gc.disable()
        try:
            with capture(forward, "attn", keep=(lambda value: value) if keep == "callable" else keep) as found:
                forward()
                if reads == "before the end":
                    assert 1 == len(next(iter(found.values())))
                alive = [weakref.ref(one) for one in gc.get_objects() if type(one) is Value]
            if reads == "after it":
                assert 1 == len(next(iter(found.values())))
            assert [True] == [one() is not None for one in alive]
            del found
            assert [False] == [one() is not None for one in alive]
        finally:
            gc.enable()

    def test_one_whose_keep_refers_back_to_it(self):
        class Probe:
            def __init__(self):
                self.found = capture(attend, "attn", keep=self.reduce)

            def reduce(self, value):
                return self, value

        probe = Probe()
        with probe.found:
            attend(1)
        gone = weakref.ref(probe)
        del probe
        gc.collect()
        assert gone() is None

    def test_one_that_goes_with_a_value_that_it_trims(self):
        class Value:
            def __del__(self):
                works.clear()

        def forward(x):
            return "done"

        code = forward.__code__
        works = [capture(forward, "x", limit=1).start()]
        forward(Value())
        assert forward.__code__ is not code
        assert "done" == forward(1)
        assert forward.__code__ is code
        assert "done" == forward(2)

    def test_what_is_taken_out_of_the_cache_goes(self):
        class Value:
            pass

        def forward(value):
            return None

        def taken_out(take):
            with capture(forward, "value", keep="graph") as found:
                alive = weakref.WeakSet([value := Value()])
                forward(value)
                del value
                [key] = found
                take(found, key)
                gc.collect()
                return len(alive), found.records

        assert (0, []) == taken_out(lambda found, key: found.pop(key) and None)
        assert (0, []) == taken_out(lambda found, key: found.popitem() and None)
        assert (0, []) == taken_out(lambda found, key: found.__delitem__(key))
        assert (0, []) == taken_out(lambda found, key: found.__setitem__(key, []))
        assert (0, []) == taken_out(lambda found, key: found.update({key: []}))
        assert (0, []) == taken_out(lambda found, key: found[key].clear() or found.fetch())

    def test_one_that_is_dropped_while_it_runs_ends(self):
        code = attend.__code__
        found = capture(attend, "attn").start()
        assert attend.__code__ is not code
        del found
        gc.collect()
        assert attend.__code__ is code

    def test_a_function_can_go_while_it_is_captured(self):
        def function(x):
            attn = x
            return attn

        found = capture(function, "attn").start()
        gone = weakref.ref(function)
        del function
        gc.collect()
        assert gone() is None
        found.stop()

    def test_an_object_can_go_and_its_place_in_memory_be_taken(self):
        one = Base()
        with capture(one.score, "x") as found:
            one.score(1)
            gone = weakref.ref(one)
            del one
            gc.collect()
            assert gone() is None
            for _ in range(100):  # one of them may well get the same address
                Base().score(2)
        assert [1] == found["Base.score"]

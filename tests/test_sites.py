"""Which functions `capture` takes for what a user names, whose calls it records, and under which keys."""

import asyncio
import functools
import textwrap

import pytest
from functions import Base, Derived, attend

from visualizer import capture


class TestTargets:
    def test_a_function(self):
        code = attend.__code__
        with capture(attend, "attn") as found:
            assert 9 == attend(3)
            assert attend.__code__ is not code
        assert attend.__code__ is code
        attend(4)
        assert {"attend": [8]} == found

    def test_several_names_have_a_key_each(self):
        with capture(attend, "q", "attn", "q") as found:
            attend(3)
        assert {"attend:q": [4], "attend:attn": [8]} == found

    def test_every_assignment_with_its_line(self):
        first = attend.__code__.co_firstlineno
        with capture(attend, "attn", "q", at="assign") as found:
            attend(3)
        expected = [("attn", 8, first + 2), ("q", 4, first + 1)]
        assert expected == sorted((r.variable, r.value, r.line) for r in found.records)

    @pytest.mark.parametrize("wrap", [lambda f: functools.wraps(f)(lambda x: f(x)), functools.partial, staticmethod])
    def test_what_is_wrapped(self, wrap):
        with capture(wrap(attend), "attn") as found:
            attend(1)
        assert {"attend": [4]} == found

    @pytest.mark.filterwarnings("ignore:nothing was recorded under", "ignore:.*is or holds a Derived")
    def test_a_class_is_its_methods_that_have_the_local(self):
        with capture(Derived, "attn") as found:
            Derived().score(1), Derived().other(2), Base().score(3)
        assert {"Base.score": 1, "Derived.other": 1} == {key: len(values) for key, values in found.items()}
        assert [-2] == found["Derived.other"]

    @pytest.mark.filterwarnings("ignore:nothing was recorded under")
    def test_an_inherited_method_is_captured_only_for_the_class(self):
        derived = Derived()
        with capture(Derived, "x") as found:
            derived.score(1), Base().score(2)
        assert [1] == found["Base.score"]

    def test_class_and_static_methods(self):
        with capture(Base, "made", "scaled") as found:
            Base.build(1), Derived.build(2), Base.scale(3)
        assert {"Base.build:made": [("Base", 1), ("Derived", 2)], "Base.scale:scaled": [30]} == found

    def test_the_default_of_a_method_by_type(self):
        class Scores:
            @functools.singledispatchmethod
            def score(self, x):
                attn = x
                return attn

        with capture(Scores, "attn") as found:
            Scores().score(1)
        assert [[1]] == list(found.values())

    def test_a_bound_method_means_that_object(self):
        one, other = Base(), Base()
        with capture(one.score, "x") as found:
            one.score(1), other.score(2)
        assert {"Base.score": [1]} == found

    @pytest.mark.parametrize("wrap", [functools.partial, lambda f: functools.wraps(f)(lambda x: f(x))])
    def test_a_bound_method_behind_a_wrapper_means_that_object(self, wrap):
        one, other = Base(), Base()
        wrapped = wrap(one.score)
        with capture(wrapped, "x") as found:
            wrapped(1), other.score(2)
        assert {"Base.score": [1]} == found

    def test_a_bound_method_of_an_object_without_weak_references(self):
        class Slim:
            __slots__ = ()

            def score(self, x):
                return x

        one, other = Slim(), Slim()
        with capture(one.score, "x") as found:
            one.score(1), other.score(2)
        assert [[1]] == list(found.values())

    def test_an_inherited_class_or_static_method(self):
        """A static method's calls do not say for which class they are."""
        with capture(Derived, "made", "scaled") as found:
            Derived.build(1), Derived().build(2), Base.build(3), Derived.scale(4), Derived().scale(5)
        assert {"Base.build:made": [("Derived", 1), ("Derived", 2)], "Base.scale:scaled": [40, 50]} == found

    def test_a_wrapper_with_the_local_around_a_bound_method(self):
        one = Base()

        @functools.wraps(one.score)
        def wrapper(x):
            doubled = 2 * x
            return one.score(doubled)

        with capture(wrapper, "doubled") as found:
            wrapper(1)
        assert [[2]] == list(found.values())

    def test_a_dotted_name(self):
        code = textwrap.dedent.__code__
        with capture("textwrap:dedent", "text") as found:
            textwrap.dedent("  a")
        assert textwrap.dedent.__code__ is code
        assert ["dedent"] == list(found)
        with capture(f"{__name__}:Base.build", "made") as found:
            Base.build(1)
        assert {"Base.build": [("Base", 1)]} == found

    def test_a_list_of_any_depth(self):
        with capture([attend, [Base.score, (f"{__name__}:Derived.other",)]], "x") as found:
            attend(1), Base().score(2), Derived().other(3)
        assert {"attend": [1], "Base.score": [2], "Derived.other": [3]} == found

    def test_one_function_by_two_names_is_captured_once(self):
        alias = attend
        with capture([attend, alias, f"{__name__}:attend"], "attn") as found:
            attend(1)
        assert {"attend": [4]} == found

    def test_functions_of_one_name_have_two_keys(self):
        def make(module):
            def attend(x):
                attn = module, x
                return attn

            attend.__qualname__, attend.__module__ = "attend", module
            return attend

        functions = [make("one"), make("two"), make("two")]
        with capture(functions, "attn") as found:
            for function in functions:
                function(1)
        assert {"attend": [("one", 1)], "two.attend": [("two", 1)], "two.attend@2": [("two", 1)]} == found

    def test_generators_and_coroutines(self):
        def numbers(n):
            total = 0
            for i in range(n):
                total += i
                yield i

        async def add(x):
            await asyncio.sleep(0)
            total = x + 1
            return total

        async def both():
            await asyncio.gather(*[add(x) for x in range(5)])

        with capture([numbers, add], "total") as found:
            list(numbers(4))
            asyncio.run(both())
        assert [[6], [1, 2, 3, 4, 5]] == [sorted(values) for values in found.values()]

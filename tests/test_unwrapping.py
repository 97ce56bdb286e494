"""The Python functions behind methods, wrappers and other objects, found by decorating them."""

import asyncio
import copy
import functools
import inspect
import pickle

from functions import make


def decorated_at_module_level(x, /, *, y=2):
    attn = x
    return attn


class TestWhatCanBeDecorated:
    def test_methods_of_every_kind(self, gl):
        class Layer:
            @gl("a")
            @staticmethod
            def outside_static(x):
                a = ("static", x)
                return a

            @staticmethod
            @gl("b")
            def inside_static(x):
                b = ("inner static", x)
                return b

            @gl("c")
            @classmethod
            def outside_class(cls):
                c = cls.__name__
                return c

            @classmethod
            @gl("d")
            def inside_class(cls):
                d = cls.__name__
                return d

            @gl("e")
            @property
            def outside_property(self):
                e = "property"
                return e

            @property
            @gl("f")
            def inside_property(self):
                f = "inner property"
                return f

            @gl("g")
            @functools.cached_property
            def cached(self):
                g = "cached"
                return g

        gl.activate()
        layer = Layer()
        results = [
            *(layer.outside_static(1), layer.inside_static(2), layer.outside_class(), layer.inside_class()),
            *(layer.outside_property, layer.inside_property, layer.cached),
        ]
        assert results == [values[0] for values in gl.cache.values()]

    def test_wrapped_functions_outside_and_inside(self, gl):
        def logged(function):
            @functools.wraps(function)
            def wrapper(*args):
                result = function(*args)
                return result

            return wrapper

        @gl("attn")
        @logged
        def outside(x):
            attn = x
            return attn

        @logged
        @gl("attn")
        def inside(x):
            attn = x
            return attn

        gl.activate()
        outside(1), inside(2)
        assert [[1], [2]] == list(gl.cache.values())

    def test_other_wrappers(self, gl):
        @gl("attn")
        @functools.lru_cache
        def remembered(x):
            attn = x
            return attn

        part = gl("attn")(functools.partial(make(gl, "attn"), 1))
        gl.activate()
        remembered(1), remembered(1), part()
        assert [[1], [4]] == list(gl.cache.values())

    def test_the_default_of_a_method_by_type(self, gl):
        class Scores:
            @gl("attn")
            @functools.singledispatchmethod
            def score(self, x):
                attn = x
                return attn

            @score.register
            def _(self, x: str):
                return x

        gl.activate()
        assert [1, "one"] == [Scores().score(1), Scores().score("one")]
        assert [[1]] == list(gl.cache.values())

    def test_lambdas_generators_and_coroutines(self, gl):
        square = gl("x")(lambda x: x * x)

        @gl("total")
        def running(values):
            total = 0
            for value in values:
                total += value
                yield total

        @gl("got")
        async def fetch(x):
            got = await asyncio.sleep(0, x)
            return got

        @gl("sent")
        async def produce(x):
            sent = x
            yield sent

        async def consume():
            return [item async for item in produce(8)]

        gl.activate()
        assert square(3) == 9
        assert list(running([1, 2, 3])) == [1, 3, 6]
        assert asyncio.run(fetch(7)) == 7
        assert asyncio.run(consume()) == [8]
        assert [[3], [6], [7], [8]] == list(gl.cache.values())
        assert inspect.isgeneratorfunction(running)
        assert inspect.iscoroutinefunction(fetch)
        assert inspect.isasyncgenfunction(produce)

    def test_closures_on_both_sides(self, gl):
        def build(scale):
            @gl("scale", "weights")
            def forward(x):
                weights = [x * scale]

                def inner():
                    return weights

                return inner()

            return forward

        gl.activate()
        assert build(3)(2) == [6]
        assert [[3], [[6]]] == list(gl.cache.values())

    def test_the_object_itself_is_returned(self, gl):
        def plain(x):
            attn = x
            return attn

        for thing in (plain, staticmethod(plain), classmethod(plain), property(plain), functools.partial(plain)):
            assert gl("attn")(thing) is thing

    def test_identity_signature_and_pickling_stay(self, gl):
        before = inspect.signature(decorated_at_module_level), pickle.dumps(decorated_at_module_level)
        gl("attn")(decorated_at_module_level)
        with gl.activate():
            after = inspect.signature(decorated_at_module_level), pickle.dumps(decorated_at_module_level)
            assert before == after
            assert pickle.loads(after[1]) is decorated_at_module_level
            assert copy.deepcopy(decorated_at_module_level) is decorated_at_module_level
            assert "attn = x" in inspect.getsource(decorated_at_module_level)

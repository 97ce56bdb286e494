"""get_local as its users know it, on plain Python: what tensors add is in test_tensors.py and test_modules.py."""

import asyncio
import copy
import functools
import gc
import importlib
import inspect
import pickle
import sys
import textwrap
import types
import warnings
import weakref

import pytest

from visualizer import RewriteError, UnknownLocalError, VisualizerWarning, get_local
from visualizer.instrument import GetLocal


@pytest.fixture
def gl():
    """A get_local of its own, switched off at the end."""
    own = GetLocal()
    yield own
    own.deactivate()


def make(gl, *names, **options):
    def forward(x):
        q = x + 1
        attn = q * 2
        return attn + 1

    forward.__qualname__ = "forward"
    return gl(*names, **options)(forward)


def write_module(path, name, text):
    (path / f"{name}.py").write_text(textwrap.dedent(text))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module(name)


class TestAsItsUsersKnowIt:
    """What the original Visualizer's users wrote."""

    MODEL = """
        from visualizer import get_local

        @get_local('attention_map')
        def your_attention_function(*args, **kwargs):
            attention_map = [args, kwargs]
            return None

        class Attention:
            @get_local('attn_map')
            def forward(self, x):
                attn_map = [x, x + 1]
                return sum(attn_map)
    """

    @pytest.mark.parametrize("activate_first", [True, False], ids=["activated, then imported", "imported first"])
    def test_function_and_method(self, tmp_path, monkeypatch, activate_first):
        monkeypatch.syspath_prepend(tmp_path)
        get_local.clear()
        name = f"their_model_{activate_first}"
        if activate_first:
            get_local.activate()
        try:
            model = write_module(tmp_path, name, self.MODEL)
            get_local.activate()
            function, method = (f"{name}.{k}" for k in ("your_attention_function", "Attention.forward"))
            keys = list(get_local.cache.keys())
            function = function if function in keys else "your_attention_function"
            method = method if method in keys else "Attention.forward"
            assert model.your_attention_function(1, a=2) is None
            attention = model.Attention()
            assert [attention.forward(layer) for layer in range(12)] == [2 * layer + 1 for layer in range(12)]
            cache = get_local.cache
            assert [[(1,), {"a": 2}]] == cache[function]
            assert [[layer, layer + 1] for layer in range(12)] == cache[method]
            assert cache[method][3] == [3, 4]
            get_local.clear()
            assert {function, method} <= set(get_local.cache.keys())
            assert get_local.cache[method] == []
        finally:
            get_local.deactivate()

    def test_a_training_run_has_the_code_it_would_have_without_the_decorator(self, gl):
        def forward(x):
            attn = x
            return attn

        code = forward.__code__
        assert gl("attn")(forward) is forward
        assert forward.__code__ is code
        gl.activate()
        assert forward.__code__ is not code
        gl.deactivate()
        assert forward.__code__ is code

    def test_a_list_in_hand_grows_with_the_calls_and_keeps_its_values_after_clear(self, gl):
        forward = make(gl, "attn")
        gl.activate()
        cache, values = gl.cache, gl.cache["forward"]
        forward(1)
        assert [4] == values
        gl.clear()
        forward(2)
        assert [4] == values
        assert [6] == gl.cache["forward"] == cache["forward"]


class TestSwitching:
    def test_on_and_off_between_calls(self, gl):
        forward = make(gl, "attn")
        forward(1)
        gl.activate()
        forward(2)
        gl.deactivate()
        forward(3)
        gl.activate()
        forward(4)
        assert [6, 10] == gl.cache["forward"]

    def test_decorating_while_active_captures_at_once(self, gl):
        gl.activate()
        forward = make(gl, "attn")
        forward(1)
        assert [4] == gl.cache["forward"]

    def test_the_with_form_brings_back_the_state_before(self, gl):
        forward = make(gl, "attn")
        code = forward.__code__
        with gl.activate(keep=lambda value: -value) as inside:
            assert inside is gl
            forward(1)
            with gl.activate(keep="numpy"):
                forward(1)
            forward(1)
            assert gl.is_active
        forward(1)
        assert not gl.is_active
        assert forward.__code__ is code
        assert [-4, 4, -4] == gl.cache["forward"]

    def test_the_with_form_ends_by_an_error_too(self, gl):
        forward = make(gl, "attn")
        code = forward.__code__
        with pytest.raises(ZeroDivisionError), gl.activate():
            forward(1 / 0)
        assert forward.__code__ is code

    def test_activating_twice_records_once(self, gl):
        forward = make(gl, "attn")
        gl.activate()
        gl.activate()
        forward(1)
        assert [4] == gl.cache["forward"]
        gl.deactivate()
        gl.deactivate()

    def test_references_taken_earlier_see_the_switch(self, gl):
        class Attention:
            @gl("attn")
            def forward(self, x):
                attn = x
                return attn

        class Sub(Attention):
            pass

        bound, plain = Sub().forward, Attention.__dict__["forward"]
        gl.activate()
        bound(1), plain(None, 2)
        [key] = gl.cache
        assert [1, 2] == gl.cache[key]

    def test_a_call_under_way_when_capture_ends_records_nothing_and_runs_on(self, gl):
        @gl("attn")
        def stream(x):
            attn = x
            yield attn
            yield attn + 1

        gl.activate()
        running = stream(1)
        assert next(running) == 1
        gl.deactivate()
        assert list(running) == [2]
        assert gl.cache[next(iter(gl.cache))] == []

    def test_what_another_tool_put_in_place_stays_with_a_warning(self, gl):
        forward = make(gl, "attn")
        gl.activate()

        def other(x):
            attn = "other"
            return attn

        forward.__code__ = other.__code__
        with pytest.warns(VisualizerWarning, match="another tool"):
            gl.deactivate()
        assert forward.__code__ is other.__code__
        with gl.activate():
            assert forward(1) == "other"
        assert forward.__code__ is other.__code__
        assert {"forward": ["other"]} == gl.cache

    def test_a_copy_of_rewritten_code_does_not_record_twice(self, gl):
        forward = make(gl, "attn")
        gl.activate()
        forward.__code__ = forward.__code__.replace()  # as line profilers and debuggers do
        with pytest.warns(VisualizerWarning, match="another tool"):
            gl.deactivate()
        forward(1)
        gl.activate()
        forward(2)
        assert {"forward": [6]} == gl.cache

    def test_a_reload_that_patches_the_old_function_is_undone(self, gl):
        """As IPython's autoreload does it: the old function gets the new one's code, while capture is active."""
        old, code = make(gl, "attn"), make(gl, "attn").__code__
        gl.activate()
        new = make(gl, "attn")
        old.__code__ = new.__code__
        old(1)
        gl.deactivate()
        assert old.__code__ is new.__code__ is code
        with gl.activate():
            old(2)
        assert {"forward": [4, 6]} == gl.cache

    def test_warnings_as_errors_come_when_all_is_done(self, gl):
        functions = [make(gl, "attn") for _ in range(3)]
        for number, function in enumerate(functions):
            function.__qualname__ = f"forward{number}"
        codes = [function.__code__ for function in functions]
        gl.activate()
        functions[1].__code__ = (lambda attn: attn).__code__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(VisualizerWarning):
                gl.deactivate()
            assert not gl.is_active
            assert functions[0].__code__ is codes[0]
            assert functions[2].__code__ is codes[2]
            gl.activate(limit=1)
            with pytest.raises(VisualizerWarning):
                gl("attn", keep=lambda value: -value)(functions[0])
            functions[0](1)
            gl.deactivate()
        assert functions[0].__code__ is codes[0]
        assert [-4] == gl.cache["forward0"]

    def test_an_inner_with_has_limits_of_its_own_and_loses_nothing_at_its_end(self, gl):
        forward = make(gl, "attn")
        with gl.activate(limit=2):
            with gl.activate():
                for x in range(5):
                    forward(x)
            assert [2, 4, 6, 8, 10] == gl.cache["forward"]
            forward(5)
            assert [10, 12] == gl.cache["forward"]

    def test_a_refused_decoration_while_active_leaves_no_trace(self, gl, monkeypatch):
        gl.activate()
        module = sys.modules["visualizer.instrument.patches"]
        real = module.rewrite_for

        def refuse(code, captures):
            raise RewriteError("no")

        monkeypatch.setattr(module, "rewrite_for", refuse)

        def forward(x):
            attn = x
            return attn

        forward.__qualname__, forward.__module__ = "forward", "first_module"
        code = forward.__code__
        with pytest.raises(RewriteError):
            gl("attn")(forward)
        assert {} == gl.cache
        assert forward.__code__ is code
        monkeypatch.setattr(module, "rewrite_for", real)
        make(gl, "attn")(1)
        assert {"forward": [4]} == gl.cache, "the plain key is still free"

    def test_nothing_is_half_activated(self, gl, monkeypatch):
        good, bad = make(gl, "attn"), make(gl, "q")
        codes = good.__code__, bad.__code__
        module = sys.modules["visualizer.instrument.patches"]
        real, calls = module.rewrite_for, []

        def refuse_the_second(code, captures):
            calls.append(captures)
            if captures[0].names == ("q",):
                raise RewriteError("no")
            return real(code, captures)

        monkeypatch.setattr(module, "rewrite_for", refuse_the_second)
        with pytest.raises(RewriteError):
            gl.activate()
        assert len(calls) == 2
        assert not gl.is_active
        assert codes == (good.__code__, bad.__code__)
        assert good.__code__ is codes[0]


class TestKeys:
    def test_an_empty_list_is_there_from_the_start(self, gl):
        make(gl, "attn")
        assert {"forward": []} == gl.cache

    def test_several_names_have_a_key_each(self, gl):
        forward = make(gl, "q", "attn")
        gl.activate()
        forward(1), forward(2)
        assert {"forward:q": [2, 3], "forward:attn": [4, 6]} == gl.cache

    def test_decorated_twice_for_two_names(self, gl):
        forward = make(gl, "q")
        with gl.activate():
            forward(0)
        gl("attn")(forward)
        gl.activate()
        forward(1)
        assert {"forward:q": [1, 2], "forward:attn": [4]} == gl.cache

    def test_decorated_twice_for_one_name_records_once(self, gl):
        forward = gl("attn")(make(gl, "attn"))
        gl.activate()
        forward(1)
        assert [4] == gl.cache["forward"]

    def test_decorated_anew_in_another_way_says_that_the_new_one_counts(self, gl):
        forward = make(gl, "attn")
        gl.activate()
        with pytest.warns(VisualizerWarning, match="takes its place"):
            gl("attn", keep=lambda value: -value)(forward)
        forward(1)
        assert {"forward": [-4]} == gl.cache

    def test_decorated_anew_for_some_of_its_names_keeps_the_others(self, gl):
        forward = make(gl, "q", "attn")
        gl("q")(forward)
        with pytest.warns(VisualizerWarning, match="decorated for q before"):
            gl("q", keep=lambda value: -value)(forward)
        gl.activate()
        forward(1)
        assert {"forward:q": [-2], "forward:attn": [4]} == gl.cache

    def test_a_name_given_twice_counts_once(self, gl):
        forward = make(gl, "attn", "attn")
        gl.activate()
        forward(1)
        assert {"forward": [4]} == gl.cache

    def test_one_name_in_two_modules(self, gl, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, "gl_for_modules", types.SimpleNamespace(gl=gl))
        text = """
            from gl_for_modules import gl
            class Attention:
                @gl("attn")
                def forward(self, x):
                    attn = x
                    return attn
        """
        first, second = (write_module(tmp_path, name, text) for name in ("first_module", "second_module"))
        gl.activate()
        second.Attention().forward(2), first.Attention().forward(1)
        assert {"Attention.forward": [1], "second_module.Attention.forward": [2]} == gl.cache

    def test_a_cell_run_again_goes_on_under_its_key(self, gl):
        gl.activate()
        cell = textwrap.dedent("""
            @gl("attn")
            def forward(x):
                attn = x
                return attn
        """)
        space = {"gl": gl, "__name__": "__main__"}
        for x in range(3):
            exec(cell, space)
            space["forward"](x)
        assert {"forward": [0, 1, 2]} == gl.cache

    def test_a_cell_run_again_with_another_name_loses_and_mixes_nothing(self, gl):
        gl.activate()
        space = {"gl": gl, "__name__": "__main__"}
        for name in ("q", "attn"):
            exec(f"@gl({name!r})\ndef forward(x):\n    q = x\n    attn = 2 * x\n    return x", space)
            space["forward"](5)
        assert {"forward:q": [5], "forward": [10]} == gl.cache

    def test_a_factorys_functions_share_a_key_and_one_rewriting(self, gl):
        gl.activate()
        functions = [make(gl, "attn", keep=lambda value: value) for _ in range(5)]
        for function in functions:
            function(1)
        assert {"forward": [4] * 5} == gl.cache
        assert len({id(function.__code__) for function in functions}) == 1

    def test_lambdas_of_one_scope_are_told_apart(self, gl):
        one = gl("x")(lambda x: x)
        two = gl("x")(lambda x: -x)
        gl.activate()
        one(1), two(2)
        assert [[1], [2]] == list(gl.cache.values())


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


def decorated_at_module_level(x, /, *, y=2):
    attn = x
    return attn


class TestBadInput:
    """Each is one clear error at once, active or not, and changes nothing."""

    @pytest.mark.parametrize("active", [False, True], ids=["off", "on"])
    def test_a_wrong_name(self, gl, active):
        if active:
            gl.activate()

        def attention(query, key):
            attn_weights = query
            return attn_weights

        code = attention.__code__
        with pytest.raises(UnknownLocalError) as caught:
            gl("attn_weight")(attention)
        for part in (
            *("attention", __file__, str(code.co_firstlineno)),
            *("'attn_weight'", "did you mean 'attn_weights'?", "query, key, attn_weights"),
        ):
            assert part in str(caught.value)
        assert isinstance(caught.value, NameError)
        assert attention.__code__ is code
        assert gl.cache == {}

    def test_a_parameter_that_is_never_assigned_has_nothing_for_assign(self, gl):
        def forward(x, attn):
            x = attn
            return x

        with pytest.raises(ValueError, match=r"forward \(.*'attn': it is a parameter.*at='return'"):
            gl("attn", at="assign")(forward)
        assert gl("x", at="assign")(forward) is forward
        assert [forward.__qualname__] == list(gl.cache)

    def test_a_name_that_is_an_attribute_there(self, gl):
        def forward(self):
            self.attn_weights = 1

        with pytest.raises(UnknownLocalError, match="assign it to a local first"):
            gl("attn_weights")(forward)

    def test_above_a_decorator_that_does_not_say_what_it_wraps(self, gl):
        def logged(function):
            later = []

            def wrapper(*args):
                later.append(unbound)
                return function(*args)

            return wrapper
            unbound = 1

        def forward(x):
            attn = x
            return attn

        with pytest.raises(UnknownLocalError) as caught:
            gl("attn")(logged(forward))
        line = forward.__code__.co_firstlineno
        for part in (f"forward ({__file__}:{line}), which it uses, has it", "@get_local beneath", "functools.wraps"):
            assert part in str(caught.value)
        with pytest.raises(UnknownLocalError) as caught:
            gl("atn")(logged(forward))
        assert "has it" not in str(caught.value)

    @pytest.mark.parametrize("thing", [len, "attn".upper, 3, None, int, dict, type("Plain", (), {})])
    def test_what_has_no_python_code(self, gl, thing):
        with pytest.raises(TypeError) as caught:
            gl("attn")(thing)
        assert "function" in str(caught.value)

    def test_no_name(self, gl):
        with pytest.raises(TypeError, match=r'@get_local\("attn"\)'):
            gl()

    def test_the_decorator_without_its_parentheses(self, gl):
        with pytest.raises(TypeError, match=r'write @get_local\("attn"\)'):

            @gl
            def forward(x):
                return x

    @pytest.mark.parametrize("name", [3, None, b"attn", ["attn"]])
    def test_a_name_that_is_no_string(self, gl, name):
        with pytest.raises(TypeError, match="as strings"):
            gl(name)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"at": "end"}, ValueError, "'return', 'assign'"),
            ({"at": None}, ValueError, "'return', 'assign'"),
            ({"keep": "cpu"}, ValueError, "'numpy', 'tensor', 'graph'"),
            ({"keep": 3}, TypeError, "callable"),
        ],
    )
    def test_options_of_the_wrong_kind(self, gl, options, error, said):
        with pytest.raises(error, match=said):
            gl("attn", **options)

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"keep": "cpu"}, ValueError, "'numpy', 'tensor', 'graph'"),
            ({"keep": None}, TypeError, "callable"),
            ({"limit": 0}, ValueError, "limit must be at least 1"),
            ({"limit": "all"}, TypeError, "limit must be a whole number"),
            ({"max_bytes": -1}, ValueError, "max_bytes must be at least 1"),
            ({"max_bytes": 1e9}, TypeError, "max_bytes must be a whole number"),
        ],
    )
    def test_activate_options_of_the_wrong_kind(self, gl, options, error, said):
        forward = make(gl, "attn")
        code = forward.__code__
        with pytest.raises(error, match=said):
            gl.activate(**options)
        assert not gl.is_active
        assert forward.__code__ is code


class TestKeep:
    def test_a_keep_with_state_and_no_hash(self, gl):
        class Scale:
            __hash__ = None

            def __init__(self, factor):
                self.factor = factor

            def __call__(self, value):
                return self.factor * value

        one, two = make(gl, "attn", keep=Scale(10)), make(gl, "attn", keep=Scale(100))
        gl.activate()
        one(1), two(1)
        assert {"forward": [40, 400]} == gl.cache

    def test_channels_of_closures_go_with_their_functions(self, gl):
        gl.activate()
        for number in range(300):
            make(gl, "attn", keep=lambda value, number=number: value + number)(1)
        gc.collect()
        assert 300 == len(gl.cache["forward"])
        assert len(gl._store._sources) < 10


class TestRobustness:
    def test_recursion(self, gl):
        @gl("n")
        def down(n):
            return n and down(n - 1)

        gl.activate()
        down(3)
        assert [0, 1, 2, 3] == gl.cache[next(iter(gl.cache))]

    def test_tracebacks_keep_their_lines(self, gl):
        @gl("attn")
        def forward(x):
            attn = 1

            raise ValueError(attn)

        lines = []
        for active in (False, True):
            if active:
                gl.activate()
            try:
                forward(1)
            except ValueError as error:
                lines.append(error.__traceback__.tb_next.tb_lineno)
        assert lines[0] == lines[1] == forward.__code__.co_firstlineno + 4

    @pytest.mark.parametrize("active", [False, True], ids=["off", "on"])
    def test_a_decorated_function_can_be_collected(self, gl, active):
        if active:
            gl.activate()
        function = make(gl, "attn")
        gone = weakref.ref(function)
        function(1)
        del function
        gc.collect()
        assert gone() is None
        gl.deactivate()
        gl.activate()

    def test_an_error_while_capturing_is_active_is_the_functions_own(self, gl):
        @gl("attn")
        def forward(x):
            attn = 1 / x
            return attn

        gl.activate()
        with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
            warnings.simplefilter("error")
            forward(0)
        assert [] == gl.cache[next(iter(gl.cache))]

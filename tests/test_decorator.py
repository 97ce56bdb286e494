"""get_local as its users know it, on plain Python. What tensors add is in test_tensors.py, modules are in
test_decorator_modules.py."""

import gc
import importlib
import re
import subprocess
import sys
import textwrap
import warnings
import weakref

import pytest
from functions import make

from visualizer import RewriteError, VisualizerWarning, get_local


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


class TestTheOriginalsNames:
    """Programs that were written for the original Visualizer go on to work."""

    def test_the_import(self):
        from visualizer.visualizer import get_local as original

        assert original is get_local

    def test_in_a_fresh_process(self):
        code = "import visualizer.visualizer as v; from visualizer.visualizer import get_local; print(v.get_local)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (0, "") == (done.returncode, done.stderr)

    @pytest.mark.parametrize(
        "line",
        [
            *("from visualizer.display import visualize_head", "from visualizer import visualize_head"),
            *("from visualizer.display import *", "import visualizer.display as d; d.visualize_head"),
            "import visualizer; visualizer.visualize_head([[1]])",
        ],
    )
    def test_what_forks_had_says_what_replaces_it(self, line):
        with pytest.raises(ImportError, match=r"no visualize_head: `from visualizer import plot` and write plot\.head"):
            exec(line, {})

    def test_what_replaces_it_is_there(self):
        from visualizer import display

        plot = pytest.importorskip("visualizer.plot", reason="engine only: matplotlib is not in this environment")
        for name in display.__all__:
            with pytest.raises(ImportError) as caught:
                getattr(display, name)
            for function in re.findall(r"plot\.(\w+)", str(caught.value)):
                assert function in plot.__all__
        for name in ("nonsense", "__wrapped__"):
            for module in (display, sys.modules["visualizer"]):
                assert not hasattr(module, name)

    def test_is_activate(self, gl):
        assert gl.is_activate is False
        with gl.activate():
            assert gl.is_activate is True

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_the_cache_may_be_assigned(self, gl, keep):
        forward = make(gl, "attn", keep=keep)
        gl.activate()
        forward(1), forward(2)
        before = gl.cache["forward"]
        gl.cache = {}
        assert {} == gl.cache
        assert [4, 6] == before
        forward(3)
        assert {"forward": [8]} == gl.cache
        gl.cache = {"mine": [1]}
        forward(4)
        assert {"mine": [1], "forward": [10]} == gl.cache


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
        module = sys.modules["visualizer.instrument.swapped_code"]
        real = module.rewrite

        def refuse(code, *captures):
            raise RewriteError("no")

        monkeypatch.setattr(module, "rewrite", refuse)

        def forward(x):
            attn = x
            return attn

        forward.__qualname__, forward.__module__ = "forward", "first_module"
        code = forward.__code__
        with pytest.raises(RewriteError):
            gl("attn")(forward)
        assert {} == gl.cache
        assert forward.__code__ is code
        monkeypatch.setattr(module, "rewrite", real)
        make(gl, "attn")(1)
        assert {"forward": [4]} == gl.cache, "the plain key is still free"


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


class TestBadInput:
    """Each is one clear error at once, active or not, and changes nothing."""

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

    def test_whole_numbers_of_numpy(self, gl):
        np = pytest.importorskip("numpy", reason="engine only: numpy is not in this environment")
        forward = make(gl, "attn")
        gl.activate(limit=np.int64(1), max_bytes=np.int32(10_000))
        forward(1)
        forward(2)
        assert len(next(iter(gl.cache.values()))) == 1


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

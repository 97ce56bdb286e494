"""get_local as its users know it, on plain Python: what tensors add is in test_tensors.py and test_modules.py."""

import contextlib
import copy
import gc
import importlib
import os
import pickle
import signal
import sys
import textwrap
import threading
import time
import types
import warnings
import weakref

import pytest

from visualizer import RewriteError, VisualizerWarning, get_local
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

    def test_a_key_that_the_user_deletes_starts_over(self, gl):
        forward = make(gl, "attn")
        gl.activate()
        forward(1)
        del gl.cache["forward"]
        gl.activate(limit=1)
        assert {} == gl.cache
        forward(2), forward(3)
        assert {"forward": [8]} == gl.cache

    def test_a_missing_key_says_what_is_known_and_whether_capture_is_active(self, gl):
        with pytest.raises(KeyError) as caught:
            gl.cache["Attention.forward"]
        assert "none yet" in str(caught.value)
        make(gl, "attn")
        with pytest.raises(KeyError) as caught:
            gl.cache["Attention.forward"]
        for part in ("'Attention.forward'", "'forward'", "not active", "activate()"):
            assert part in str(caught.value)
        gl.activate()
        with pytest.raises(KeyError, match="capture is active"):
            gl.cache["Attention.forward"]


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


class TestReturns:
    def test_a_call_that_raises_records_nothing(self, gl):
        @gl("attn")
        def forward(x):
            attn = x
            if x < 0:
                raise ValueError(x)
            return attn

        gl.activate()
        forward(1)
        with pytest.raises(ValueError, match="-1"):
            forward(-1)
        assert [1] == gl.cache[next(iter(gl.cache))]

    def test_an_unbound_name_warns_once_with_the_lines(self, gl):
        @gl("attn")
        def forward(fused):
            if not fused:
                attn = "weights"
            return fused

        line = forward.__code__.co_firstlineno + 3
        gl.activate()
        with pytest.warns(VisualizerWarning) as caught:
            assert [forward(True), forward(True), forward(False)] == [True, True, False]
        assert len(caught) == 1
        for part in ("'attn'", "forward", f"line {line}", "fused", "set_fused_attn(False)"):
            assert part in str(caught[0].message)
        assert caught[0].filename == __file__
        assert ["weights"] == gl.cache[next(iter(gl.cache))]

    def test_none_is_recorded_and_is_no_cause_to_warn_where_nothing_else_was_to_be_expected(self, gl):
        @gl("best")
        def search(x):
            best = None
            return x

        gl.activate()
        search(1)
        assert [None] == gl.cache[next(iter(gl.cache))]


class TestAssignments:
    def test_every_value_in_order_with_its_line_and_call(self, gl):
        @gl("attn", at="assign")
        def forward(scores):
            attn = scores
            attn = [s / sum(attn) for s in attn]
            for attn in [attn[0]]:
                pass
            return attn

        first = forward.__code__.co_firstlineno
        gl.activate()
        forward([1, 3]), forward([1, 1])
        [key] = gl.cache
        assert [[1, 3], [0.25, 0.75], 0.25, [1, 1], [0.5, 0.5], 0.5] == gl.cache[key]
        assert [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)] == [(r.call, r.line - first) for r in gl.records]

    def test_a_call_that_raises_has_recorded_what_it_assigned(self, gl):
        @gl("attn", at="assign")
        def forward(x):
            attn = x
            raise ValueError

        gl.activate()
        with pytest.raises(ValueError):
            forward(1)
        assert [1] == gl.cache[next(iter(gl.cache))]

    def test_calls_that_interleave_are_told_apart(self, gl):
        @gl("x", at="assign")
        def stream(start):
            x = start
            yield x
            x = start + 1
            yield x

        gl.activate()
        one, two = stream(10), stream(20)
        next(one), next(two), next(two), next(one)
        assert [(10, 0), (20, 1), (21, 1), (11, 0)] == [(r.value, r.call) for r in gl.records]

    @pytest.mark.parametrize("limit", [1, 2])
    def test_the_limit_counts_calls_that_interleave(self, gl, limit):
        @gl("x", at="assign")
        def stream(start):
            for step in range(100):
                x = start + step
                yield x

        gl.activate(limit=limit)
        first, second = stream(0), stream(1000)
        next(first), next(second)
        for _ in range(50):
            next(first), next(second)
        values = gl.cache[next(iter(gl.cache))]
        assert [*range(1000, 1051)] == [value for value in values if value >= 1000]
        assert ([] if limit == 1 else [*range(51)]) == [value for value in values if value < 1000]

    def test_the_limit_counts_calls(self, gl):
        @gl("x", at="assign")
        def twice(start):
            x = start
            x = start + 1
            return x

        gl.activate(limit=2)
        for start in (10, 20, 30):
            twice(start)
        assert [20, 21, 30, 31] == gl.cache[next(iter(gl.cache))]


class TestKeepAndLimits:
    def test_containers_are_snapshots_and_graph_is_the_object(self, gl):
        @gl("values", keep="graph")
        def by_reference(values):
            return None

        @gl("values")
        def by_copy(values):
            return None

        gl.activate()
        values = [1]
        by_reference(values), by_copy(values)
        values.append(2)
        kept, copied = (key[0] for key in gl.cache.values())
        assert kept is values
        assert [1] == copied

    def test_a_callable_keeps_only_its_result(self, gl):
        forward = make(gl, "attn", keep=str)
        gl.activate()
        forward(1)
        assert ["4"] == gl.cache["forward"]

    def test_a_raising_keep_says_whose_variable_it_was(self, gl):
        forward = make(gl, "attn", keep=lambda value: value.mean(1))
        gl.activate()
        with pytest.raises(AttributeError) as caught:
            forward(1)
        [note] = caught.value.__notes__
        assert "'attn'" in note
        assert "forward" in note
        assert __file__ in note

    def test_a_raising_keep_that_the_function_swallows_is_raised_by_reading(self, gl):
        @gl("attn", at="assign", keep=lambda value: value.mean(1))
        def forward(x):
            try:
                attn = x
            except Exception:
                attn = None
            return attn

        gl.activate()
        assert forward(1) is None
        with pytest.raises(AttributeError, match="mean"):
            gl.cache
        assert [None] == gl.cache[next(iter(gl.cache))]

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_a_list_that_the_user_works_on_stays_within_the_limits(self, gl, keep):
        forward = make(gl, "attn", keep=keep)
        gl.activate(limit=3, max_bytes=3 * sys.getsizeof(1))
        for x in range(50):
            forward(x)
            values = gl.cache["forward"]
            assert 2 * x + 2 == values[-1]
            assert len(values) <= 3
            if x % 4 == 0:
                values[:] = [value + 1000 for value in values]
            if x % 7 == 0:
                values.clear()

    def test_the_same_small_value_again_after_the_list_was_emptied(self, gl):
        forward = make(gl, "attn")
        gl.activate(limit=2)
        forward(1), forward(1)
        gl.cache["forward"].clear()
        forward(1)
        assert {"forward": [4]} == gl.cache

    def test_calls_that_began_unseen_are_calls_of_their_own(self, gl):
        @gl("x", at="assign")
        def stream(start):
            x = start
            yield x
            x = start + 1
            yield x

        gl.activate()
        for _ in range(5):
            list(stream(0))
        running = [stream(10 * number) for number in range(1, 5)]  # made while on: they have the rewritten code
        gl.deactivate()
        for one in running:
            next(one)
        gl.clear()
        gl.activate()
        for one in running:
            list(one)
        assert 4 == len({record.call for record in gl.records})

    def test_a_recursion_error_that_the_function_deals_with_is_its_own_affair(self, gl):
        @gl("values")
        def deep(values):
            try:
                return 1 + deep(values)
            except RecursionError:
                return 0

        gl.activate(limit=5)
        assert deep([1]) > 0
        with pytest.warns(VisualizerWarning, match=r"calls of .*deep .* too close to the recursion limit"):
            assert gl.cache

    def test_a_remembered_error_does_not_hold_on_to_locals(self, gl):
        alive = []

        class Large:
            def __init__(self):
                alive.append(weakref.ref(self))

        def broken(value):
            raise ValueError("no")

        @gl("large", keep=broken)
        def forward():
            large = Large()
            return None

        gl.activate()
        with pytest.raises(ValueError, match="no"):
            forward()
        gc.collect()
        assert [None] == [one() for one in alive]
        with pytest.raises(ValueError, match="no"):
            gl.cache

    def test_reading_comes_to_an_end_while_others_record(self, gl):
        @gl("x", keep="graph")
        def forward(x):
            return x

        gl.activate()
        stop = threading.Event()

        def work():
            while not stop.is_set():
                forward(1)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            start = time.monotonic()
            while time.monotonic() - start < 0.5:
                gl.clear()
            assert time.monotonic() - start < 20
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # it is what is tested
    def test_a_forked_child_reads_its_cache_while_the_parents_threads_record(self, gl):
        forward = make(gl, "attn")
        gl.activate(limit=10)
        stop = threading.Event()

        def work():
            while not stop.is_set():
                forward(1)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    try:
                        signal.alarm(20)
                        forward(2)
                        os._exit(0 if gl.cache["forward"][-1] == 6 else 1)
                    finally:  # or a second session of tests would go on in it
                        os._exit(2)
                assert 0 == os.waitpid(child, 0)[1]
        finally:
            stop.set()
            thread.join()

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

    def test_what_a_with_ends_does_not_hide_an_error_that_was_swallowed(self, gl):
        @gl("attn", at="assign", keep=lambda value: value.mean(1))
        def forward(x):
            try:
                attn = x
            except Exception:
                pass

        with gl.activate(), gl.activate():
            forward(1)
        with pytest.raises(AttributeError, match="mean"):
            gl.cache

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_the_limit_keeps_the_most_recent_calls_of_each_key(self, gl, keep):
        forward = make(gl, "q", "attn", keep=keep)
        gl.activate(limit=3)
        for x in range(10):
            forward(x)
        assert {"forward:q": [8, 9, 10], "forward:attn": [16, 18, 20]} == gl.cache

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_past_the_budget_nothing_more_is_recorded_and_one_warning_says_so(self, gl, keep):
        @gl("data", keep=keep)
        def forward(size):
            data = "x" * size
            return data

        size = sys.getsizeof("x" * 1000)
        gl.activate(max_bytes=3 * size)
        with pytest.warns(VisualizerWarning) as caught:
            for _ in range(100):
                forward(1000)
            [key] = gl.cache
            assert 3 == len(gl.cache[key])
        assert len(caught) == 1
        for part in (f"{3 * size:,} bytes", "cpu", "forward", "get_local.clear()", "max_bytes"):
            assert part in str(caught[0].message)
        gl.clear()
        forward(1000)
        assert 1 == len(gl.cache[key])

    def test_what_several_functions_have_not_had_filed_yet_shares_the_budget(self, gl):
        class Value:
            def __sizeof__(self):
                return 1000

        @gl("value", keep="graph")
        def one(value):
            return None

        @gl("value", keep="graph")
        def two(value):
            return None

        @gl("value", keep="graph")
        def three(value):
            return None

        gl.activate(max_bytes=10_500)
        alive = weakref.WeakSet()
        with pytest.warns(VisualizerWarning, match="10,500 bytes"):
            for _ in range(10):
                for function in (one, two, three):
                    alive.add(value := Value())
                    function(value)
                    del value
                    assert len(alive) <= 11
        assert 10 == sum(map(len, gl.cache.values())) == len(alive)

    @pytest.mark.parametrize("first", ["graph", "numpy"])
    def test_whatever_is_kept_of_values_they_share_the_budget_in_the_order_of_the_calls(self, gl, first):
        class Value:
            def __sizeof__(self):
                return 1000

        @gl("value", keep=first)
        def one(value):
            return None

        @gl("value", keep="numpy" if first == "graph" else "graph")
        def two(value):
            return None

        gl.activate(max_bytes=10_500)
        alive = weakref.WeakSet()
        with pytest.warns(VisualizerWarning, match="10,500 bytes"):
            for _ in range(10):
                for function in (one, two):
                    alive.add(value := Value())
                    function(value)
                    del value
                    assert len(alive) <= 11
            assert [5, 5] == [len(values) for values in gl.cache.values()]

    @pytest.mark.parametrize("number", [10**6, 0.5], ids=str)
    def test_numbers_count_too_if_nobody_reads_them(self, gl, number):
        forward = make(gl, "x", keep="graph")
        gl.activate(max_bytes=200_000)
        with pytest.warns(VisualizerWarning, match="200,000 bytes"):
            for _ in range(20_000):
                forward(number)
        assert 200_000 // sys.getsizeof(number) == len(gl.cache["forward"])

    @pytest.mark.parametrize("keep", ["numpy", "tensor", "graph"])
    def test_a_value_whose_own_code_fails_is_kept_and_the_function_goes_on(self, gl, keep):
        class Lazy:
            @property
            def __class__(self):
                raise RuntimeError("evaluated")

            def __sizeof__(self):
                raise RuntimeError("measured")

        class Unhashable(type):
            __hash__ = None

            def __eq__(self, other):
                raise RuntimeError("compared")

        class Odd(metaclass=Unhashable):
            pass

        class Thing:
            pass

        @gl("value", keep=keep)
        def forward(value):
            return "done"

        values = [Lazy(), Odd(), weakref.proxy(Thing())]
        with gl.activate():
            assert ["done"] * 3 == [forward(value) for value in values]
        [kept] = gl.cache.values()
        assert list(map(id, values)) == list(map(id, kept))

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    def test_where_warnings_are_errors_all_is_done_before_they_are_raised(self, gl, keep):
        forward = make(gl, "x", keep=keep)
        before = forward.__code__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gl.activate(max_bytes=100)
            with contextlib.suppress(VisualizerWarning):
                for x in range(10):
                    forward(x)
            with contextlib.suppress(VisualizerWarning):
                gl.clear()
            assert [] == gl.cache["forward"]
            for x in range(3):
                forward(x)
            with contextlib.suppress(VisualizerWarning):
                gl.activate(keep=keep, limit=2)
            for x in range(3):
                forward(x)
            assert [1, 2] == gl.cache["forward"]
            with contextlib.suppress(VisualizerWarning):
                gl.deactivate()
        assert forward.__code__ is before

    def test_a_warning_is_given_when_nobody_is_waited_for(self, gl, monkeypatch):
        """What shows it may wait for another thread: a handler of logging, whose lock one has that prints the cache."""
        forward = make(gl, "x")
        seen = []

        def show(*_, **__):
            reader = threading.Thread(target=lambda: seen.append(len(gl.cache["forward"])))
            reader.start()
            reader.join(60)

        monkeypatch.setattr(warnings, "warn", show)
        gl.activate(max_bytes=100)
        for x in range(10):
            forward(x)
        assert [3] == seen

    def test_the_most_recent_calls_are_those_that_began_last(self, gl):
        """However they are counted: a definition run again, as in a notebook, counts from 0, and so does clear()."""

        def define(keep):
            @gl("a", at="assign", keep=keep)
            def cell(x):
                a = x
                a = -x

            return cell

        gl.activate(limit=2)
        cell = define("numpy")
        for x in range(10):
            cell(x)
        [values] = gl.cache.values()
        assert [8, -8, 9, -9] == values
        cell = define(lambda value: value)
        for x in range(100, 105):
            cell(x)
        assert [103, -103, 104, -104] == next(iter(gl.cache.values()))

    def test_a_call_under_way_is_numbered_anew_when_the_cache_is_cleared(self, gl):
        @gl("a", at="assign")
        def forward(values):
            for value in values:
                a = value
                yield

        gl.activate(limit=2)
        for _ in range(20):
            list(forward([0]))
        under_way = forward([1, 2, 3])
        next(under_way)
        gl.clear()
        list(forward([10]))
        next(under_way)
        list(forward([20]))
        [key] = gl.cache
        assert [10, 20] == gl.cache[key]  # the one under way began before either
        assert [0, 2] == [record.call for record in gl.records]
        list(forward([30])), list(forward([40]))
        assert [30, 40] == gl.cache[key]

    def test_switching_on_again_in_the_middle_of_a_call_does_not_split_it(self, gl):
        @gl("a", at="assign")
        def forward():
            a = 1
            gl.activate()
            a = 2
            return a

        gl.activate()
        forward()
        assert [(1, 0), (2, 0)] == [(record.value, record.call) for record in gl.records]

    def test_a_limit_makes_room_within_the_budget(self, gl):
        @gl("data")
        def forward(size):
            data = "x" * size
            return data

        gl.activate(limit=2, max_bytes=3 * sys.getsizeof("x" * 1000))
        for _ in range(100):
            forward(1000)
        assert 2 == len(gl.cache[next(iter(gl.cache))])

    def test_the_default_budget_is_a_quarter_of_the_memory(self, gl, monkeypatch):
        monkeypatch.setattr("visualizer.store.store.memory_of", lambda device: 4 * 1100)
        forward = make(gl, "x", keep=lambda value: b"x" * (1000 - sys.getsizeof(b"")))
        gl.activate()
        with pytest.warns(VisualizerWarning, match="a quarter of its memory"):
            forward(1), forward(2)
        assert 1 == len(gl.cache["forward"])


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

    def test_threads_get_their_own_records(self, gl):
        forward = make(gl, "q", "attn")
        gl.activate()

        together = threading.Barrier(4)  # all alive at once: an ended thread's number is given away again

        def work(start):
            together.wait()
            for x in range(start, start + 200):
                forward(x)
            together.wait()

        threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        q, attn = gl.cache["forward:q"], gl.cache["forward:attn"]
        assert [2 * value for value in q] == attn
        assert sorted(1000 * i + x + 1 for i in range(4) for x in range(200)) == sorted(q)
        assert 4 == len({record.thread for record in gl.records})

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

    def test_reading_through_plain_dict_ways_fetches_what_arrived(self, gl):
        forward = make(gl, "attn", keep="graph")
        gl.activate()
        cache = gl.cache
        for read in (
            *(dict, copy.copy, lambda c: {**c}, lambda c: pickle.loads(pickle.dumps(c))),
            *(lambda c: {"forward": c.get("forward")}, lambda c: {"forward": next(iter(c.values()))}),
        ):
            gl.clear()
            cache = gl.cache
            forward(1)
            assert {"forward": [4]} == read(cache)
        assert repr(gl) == "<get_local: active, 1 keys>"

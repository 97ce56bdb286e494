"""Functions of one qualified name: which are one, and how a program that knows only the short key finds its values."""

import functools
import importlib
import linecache
import pickle
import sys
import textwrap
import types

import pytest

from visualizer import UnknownKeyError, VisualizerWarning, load
from visualizer.instrument import GetLocal

ATTENTION = """
from gl_of_tests import gl
class Attention:
    @gl("attn")
    def forward(self, x):
        attn = x
        return attn
"""


@pytest.fixture
def gl(monkeypatch):
    """A get_local of its own, switched on, which modules import from `gl_of_tests`."""
    own = GetLocal()
    monkeypatch.setitem(sys.modules, "gl_of_tests", types.SimpleNamespace(gl=own))
    own.activate()
    yield own
    own.deactivate()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Imports a module of this name and text, or the same module anew with another text."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second would not be seen

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        if name in sys.modules:
            return importlib.reload(sys.modules[name])
        made = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return write


@pytest.fixture
def two(gl, module):
    """Two modules with an Attention.forward each."""
    return module("first_of_two", ATTENTION), module("second_of_two", ATTENTION)


SHORT, FIRST, SECOND = "Attention.forward", "first_of_two.Attention.forward", "second_of_two.Attention.forward"


class TestTwoModules:
    @pytest.mark.parametrize("ran", [0, 1])
    def test_the_short_key_reads_the_one_that_ran(self, gl, two, ran):
        two[ran].Attention().forward(1), two[ran].Attention().forward(2)
        cache = gl.cache
        assert [1, 2] == cache[SHORT] == cache.get(SHORT) == cache[(FIRST, SECOND)[ran]]
        assert SHORT in cache
        assert "forward" not in cache
        assert [FIRST, SECOND] == list(cache)
        assert [0, 2] == sorted(map(len, cache.values()))
        two[ran].Attention().forward(3)
        assert [1, 2, 3] == cache[SHORT]

    def test_if_both_ran_it_says_where_their_values_are(self, gl, two):
        two[1].Attention().forward(2), two[0].Attention().forward(1)
        for read in (lambda c: c[SHORT], lambda c: c.get(SHORT), lambda c: c.pop(SHORT), lambda c: c.setdefault(SHORT)):
            with pytest.raises(
                UnknownKeyError, match=r"2 functions named 'Attention\.forward' were recorded"
            ) as caught:
                read(gl.cache)
            for part in (repr(FIRST), repr(SECOND), "first_of_two.py:4", "second_of_two.py:4"):
                assert part in str(caught.value)
        assert {FIRST: [1], SECOND: [2]} == gl.cache
        assert [FIRST, SECOND] == [record.key for record in gl.records]
        gl.clear()
        two[1].Attention().forward(3)
        assert [3] == gl.cache[SHORT]

    def test_if_none_ran_the_list_is_empty_and_says_that_it_stays_so(self, gl, two):
        with pytest.warns(VisualizerWarning, match="none has run: this list stays empty") as told:
            assert [] == gl.cache[SHORT]
        assert FIRST in str(told[0].message)

    def test_a_program_that_ran_before_the_second_was_imported(self, gl, module):
        first = module("first_of_two", ATTENTION)
        first.Attention().forward(1)
        held, others = gl.cache[SHORT], gl.cache.setdefault("other", [0])
        second = module("second_of_two", ATTENTION)
        first.Attention().forward(2)
        assert [1, 2] == held == gl.cache[SHORT]
        assert [FIRST, "other", SECOND] == list(gl.cache), "in the order that they had"
        assert others is gl.cache["other"]
        second.Attention().forward(3)
        assert [1, 2, 0, 3] == [record.value for record in gl.records]
        assert {FIRST, "other", SECOND} == {record.key for record in gl.records}

    def test_emptying_and_removing_by_the_short_key(self, gl, two):
        gl.cache[SHORT] = []
        two[1].Attention().forward(1)
        gl.cache[SHORT] = []
        assert {FIRST: [], SECOND: []} == gl.cache
        two[1].Attention().forward(2)
        gl.cache[SHORT] = [*gl.cache[SHORT], 7]
        assert {FIRST: [], SECOND: [2, 7]} == gl.cache
        two[0].Attention().forward(3)
        with pytest.raises(UnknownKeyError, match=r"set 'first_of_two\.Attention\.forward' or"):
            gl.cache[SHORT] = [1]
        gl.cache[SHORT] = []
        assert {FIRST: [], SECOND: []} == gl.cache
        two[0].Attention().forward(4)
        assert [4] == gl.cache.pop(SHORT)
        assert {SECOND: []} == gl.cache
        assert [] == gl.cache.pop(SHORT)
        assert SHORT not in gl.cache
        with pytest.raises(KeyError):
            del gl.cache[SHORT]
        gl.cache = {}
        two[1].Attention().forward(5)
        assert [5] == gl.cache[SHORT]
        gl.cache = {SHORT: ["mine"]}
        assert ["mine"] == gl.cache[SHORT]

    def test_copies_and_files_say_it_too(self, gl, two, tmp_path):
        pytest.importorskip("numpy", reason="engine only: files need numpy")
        two[1].Attention().forward(2)
        gl.cache.save(tmp_path / "x.safetensors")
        for copy in (pickle.loads(pickle.dumps(gl.cache)), load(tmp_path / "x.safetensors")):
            assert {FIRST: [], SECOND: [2]} == copy
            with pytest.raises(UnknownKeyError, match=f"did you mean '{FIRST}' or '{SECOND}'"):
                copy[SHORT]

    def test_several_variables(self, gl, module):
        text = ATTENTION.replace('gl("attn")', 'gl("attn", "x")')
        one, other = module("first_of_two", text), module("second_of_two", text)
        other.Attention().forward(2)
        assert [2] == gl.cache[f"{SHORT}:attn"] == gl.cache[f"{SECOND}:x"]
        one.Attention().forward(1)
        with pytest.raises(UnknownKeyError, match=r"Attention\.forward:x"):
            gl.cache[f"{SHORT}:x"]

    def test_three(self, gl, two, module):
        third = module("third_of_two", ATTENTION)
        third.Attention().forward(3)
        assert [3] == gl.cache[SHORT]
        assert 3 == len(gl.cache)

    @pytest.mark.slow
    def test_in_threads_that_run_while_the_second_is_imported(self, gl, module):
        import threading

        first, stop = module("first_of_two", ATTENTION).Attention(), threading.Event()
        calls = [0, 0]

        def run(number):
            while not stop.is_set():
                first.forward(calls[number])
                calls[number] += 1

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        [thread.start() for thread in threads]
        for number in range(20):
            module(f"more_{number}_of_two", ATTENTION)
        stop.set()
        [thread.join() for thread in threads]
        assert sum(calls) == len(gl.cache[SHORT]) == len(gl.records)


class TestOneFunctionOrTwo:
    def test_a_reloaded_module_goes_on_under_its_key(self, gl, module):
        for number, before in enumerate(("", "# an edit\n\n", "")):
            module("edited", before + ATTENTION).Attention().forward(number)
        assert {SHORT: [0, 1, 2]} == gl.cache

    def test_a_cell_of_a_notebook_run_again(self, gl):
        space = {"gl": gl, "__name__": "__main__"}
        for number, text in enumerate((ATTENTION, "x = 0\n" + ATTENTION, ATTENTION)):
            exec(compile(text, self.cell(number, text), "exec"), space)
            space["Attention"]().forward(number)
        assert {SHORT: [0, 1, 2]} == gl.cache

    def test_a_cell_that_awaits_and_defines_a_class_twice(self, gl):
        text = ATTENTION + "Old = Attention" + ATTENTION
        file = self.cell(5, "await ready" + text)
        space = {"gl": gl, "__name__": "__main__"}
        exec(compile(text, file, "exec"), space)
        space["Old"]().forward(1), space["Attention"]().forward(2)
        assert [[1], [2]] == list(gl.cache.values())

    def cell(self, number, text):
        """The file name of a cell, whose text is known as IPython makes it known."""
        file = f"<cell {number} of the tests>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        return file

    def test_a_class_defined_twice_in_a_module(self, gl, module):
        twice = module("twice", ATTENTION + "Old = Attention" + ATTENTION)
        twice.Attention().forward(2)
        assert [2] == gl.cache[SHORT]
        twice.Old().forward(1)
        assert {f"{SHORT}@4": [1], f"{SHORT}@11": [2]} == gl.cache
        with pytest.raises(UnknownKeyError, match=r"'Attention\.forward@4' .* or 'Attention\.forward@11'"):
            gl.cache[SHORT]

    PROPERTY = """
        from gl_of_tests import gl
        class Layer:
            @property
            @gl("value")
            def scale(self):
                value = 5
                return value
            @scale.setter
            @gl("value")
            def scale(self, value):
                self.x = value
    """

    def test_a_getter_and_a_setter(self, gl, module):
        layer = module("with_property", self.PROPERTY).Layer()
        layer.scale = 3
        assert [3] == gl.cache["Layer.scale"]
        assert 5 == layer.scale
        assert [[5], [3]] == list(gl.cache.values())
        edited = self.PROPERTY.replace("class Layer:", "\n\n        class Layer:")
        layer = module("with_property", edited).Layer()
        layer.scale = 4
        assert 5 == layer.scale
        assert {"Layer.scale@6": [5, 5], "Layer.scale@11": [3, 4]} == gl.cache

    def test_implementations_that_nobody_names(self, gl, module):
        made = module(
            "dispatching",
            """
            import functools
            from gl_of_tests import gl
            @functools.singledispatch
            def show(x):
                return None
            @show.register
            @gl("attn")
            def _(x: int):
                attn = x
                return attn
            @show.register
            @gl("attn")
            def _(x: str):
                attn = x
                return attn
            """,
        )
        made.show("a")
        assert ["a"] == gl.cache["_"]
        made.show(1)
        assert {"_@7": [1], "_@12": ["a"]} == gl.cache

    def test_what_nobody_names_in_two_cells(self, gl):
        space = {"gl": gl, "__name__": "__main__", "functools": functools}
        for number in range(2):
            exec(compile(f'f = gl("x")(lambda x: x + {number})', f"/tmp/cell_{number}.py", "exec"), space)
            space["f"](number)
        assert [[0], [1]] == list(gl.cache.values())
        assert {record.key for record in gl.records} == set(gl.cache)

    def test_two_classes_in_functions_and_a_factory(self, gl, module):
        made = module(
            "factories",
            """
            from gl_of_tests import gl
            def small():
                class Attention:
                    @gl("attn")
                    def forward(self, x):
                        attn = x
                        return attn
                return Attention()
            def large():
                class Attention:
                    @gl("attn")
                    def forward(self, x):
                        attn = x
                        return attn
                return Attention()
            """,
        )
        for number in range(3):
            made.small().forward(number)
            made.large().forward(-number)
        assert [[0, 1, 2], [0, -1, -2]] == list(gl.cache.values())

    def test_a_qualified_name_that_is_anothers_module_and_name(self, gl, module):
        package = ATTENTION.replace("class Attention", "class second_of_two:\n  class Attention")
        package = package.replace("    @gl", "     @gl").replace("    def", "     def")
        module("third", package)
        one, other = module("first_of_two", ATTENTION), module("second_of_two", ATTENTION)
        other.Attention().forward(2)
        assert 3 == len(gl.cache)
        assert [] == gl.cache[SECOND], "the key of the class in the class"
        assert [2] == gl.cache[SHORT]

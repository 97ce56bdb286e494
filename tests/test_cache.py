"""The cache as its users read, change, print, copy and stack it."""

import copy
import pickle
import threading
from collections import deque

import pytest
from functions import make

from visualizer import UnknownKeyError, capture, load


def attend(x):
    q = x + 1
    attn = q * 2
    return attn + 1


def make_attend(number):
    def attend(x):
        attn = number
        return attn

    attend.__qualname__ = f"attend_{number}"
    return attend


class TestResults:
    def test_it_is_a_dict(self):
        with capture(attend, "attn") as found:
            attend(1)
        for read in (dict, copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f)), lambda f: {**f}):
            assert {"attend": [4]} == read(found)
        assert (True, 1, ["attend"]) == (isinstance(found, dict), len(found), [*found])

    def test_records_say_where_each_comes_from(self):
        with capture(attend, "q", "attn") as found:
            attend(1), attend(2)
        expected = [("attend:q", "q", 2, 0), ("attend:q", "q", 3, 1)]
        expected += [("attend:attn", "attn", 4, 0), ("attend:attn", "attn", 6, 1)]
        assert expected == [(r.key, r.variable, r.value, r.call) for r in found.records]
        assert {(threading.get_ident(), None, None)} == {(r.thread, r.line, r.module) for r in found.records}

    def test_printed_it_is_a_table(self):
        with capture(attend, "q", "attn", at="assign") as found:
            attend(1), attend(2)
        text = repr(found)
        assert text.startswith("<captured q, attn: 2 keys, 4 values, ")
        assert ["key", "calls", "shape", "dtype", "bytes"] == text.splitlines()[1].split()
        assert ["attend:q", "2", "int"] == text.splitlines()[2].split()[:3]
        assert "<captured attn: 1 key, 0 values, 0 B" in repr(capture(attend, "attn"))

    def test_a_long_table_says_what_it_leaves_out(self):
        found = capture([make_attend(number) for number in range(150)], "attn")
        assert "... 50 more" in repr(found)
        assert 103 >= len(repr(found).splitlines())

    def test_the_notebook_table_escapes_names(self):
        def forward(x):
            attn = x
            return attn

        forward.__qualname__ = "<script>alert(1)</script>"
        with capture(forward, "attn") as found:
            forward(1)
        html = found._repr_html_()
        assert "<script" not in html
        assert "&lt;script&gt;" in html
        assert 2 == html.count("<tr>")

    def test_get_local_has_all_of_it(self, gl):
        gl("attn")(attend)
        with gl.activate():
            attend(1)
        assert repr(gl.cache).startswith("<get_local.cache: 1 key, 1 value")
        assert "attend" in gl.cache._repr_html_()
        assert ["attend"] == [record.key for record in gl.cache.records]


class TestTheUsersHand:
    """The cache is a dict of lists, and whoever has it may change it: all ways of reading follow."""

    @pytest.mark.parametrize("keep", ["numpy", "graph"])
    @pytest.mark.parametrize("other", [tuple, deque])
    def test_a_list_that_was_made_something_else_is_gone_on_with(self, keep, other):
        with capture(attend, "attn", keep=keep) as found:
            attend(1), attend(2)
            found["attend"] = other(found["attend"])
            assert isinstance(found["attend"], other)
            assert 9 == attend(3)
            assert [4, 6, 8] == found["attend"] == [record.value for record in found.records]
            found["attend"] = None
            assert 9 == attend(3)
            assert [None, 8] == found["attend"]

    def test_equal_values_keep_their_own_records(self):
        with capture(attend, "attn") as found:
            for x in (1, 1, 1, 2):
                attend(x)
            del found["attend"][1]
            assert [0, 1, 3] == [record.call for record in found.records]

    def test_what_waits_belongs_under_the_key_that_is_changed(self):
        with capture(attend, "attn", keep="graph") as found:
            attend(1)
            del found["attend"]
            assert {} == dict(found)
            attend(2)
            assert [6] == found["attend"]
            attend(3)
            found["attend"] = []
            attend(4)
            assert {"attend": [10]} == dict(found)
            attend(5)
            assert ("attend", [10, 12]) == found.popitem()
            attend(6)
            found |= {"attend": [0]}
            assert [0] == found.setdefault("attend", [1]) == found["attend"]
            assert [1] == found.setdefault("other", [1])


class TestStack:
    @pytest.fixture(autouse=True)
    def numpy(self):
        self.np = pytest.importorskip("numpy", reason="engine only: numpy is not in this environment")

    def captured(self, shapes, calls=1):
        functions = []
        for number, shape in enumerate(shapes):

            def attend(shape=shape):
                attn = self.np.ones(shape)
                return None

            attend.__qualname__ = f"attend_{number}"
            functions.append(attend)
        with capture(functions, "attn") as found:
            for _ in range(calls):
                for function in functions:
                    function()
        return found

    def test_one_of_each_key(self):
        assert (3, 2, 5) == self.captured([(2, 5)] * 3).stack().shape

    def test_one_key_has_all_its_calls(self):
        assert (4, 2, 5) == self.captured([(2, 5)], calls=4).stack().shape

    def test_a_chosen_call(self):
        found = self.captured([(2, 5)] * 3, calls=2)
        assert (3, 2, 5) == found.stack(call=-1).shape
        with pytest.raises(ValueError, match=r"'attend_0' has 2 values .*call=-1"):
            found.stack()
        with pytest.raises(ValueError, match="has 2 values, none at 2"):
            found.stack(call=2)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"'attend_1' cannot be stacked on 'attend_0': shape \(3, 5\) on"):
            self.captured([(2, 5), (3, 5)]).stack()

    @pytest.mark.filterwarnings("ignore:nothing was recorded under")
    def test_nothing_to_stack(self):
        with pytest.raises(ValueError, match="did not run, or had nothing to record"):
            self.captured([(2, 5)] * 2, calls=0).stack()
        with pytest.raises(ValueError, match="no values"):
            self.captured([(2, 5)], calls=0).stack()

    def test_numbers_and_what_is_no_array(self):
        with capture(attend, "attn") as found:
            attend(1), attend(2)
        assert [4, 6] == found.stack().tolist()

        def score(thing):
            return None

        with capture(score, "thing") as found:
            score(object())
        with pytest.raises(ValueError, match="no arrays, tensors or numbers"):
            found.stack()


def test_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors", reason="engine only: safetensors is not in this environment")
    with capture(attend, "q", "attn") as found:
        attend(1), attend(2)
    found.save(tmp_path / "maps.safetensors", about={"tokens": ["a", "b"]})
    again = load(tmp_path / "maps.safetensors")
    assert {"attend:q": [2, 3], "attend:attn": [4, 6]} == again
    assert [(r.key, r.call, r.thread) for r in found.records] == [(r.key, r.call, r.thread) for r in again.records]
    assert {"tokens": ["a", "b"]} == again.about


class TestKeys:
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

    def test_a_missing_key_says_what_there_is(self):
        with capture(attend, "attn") as found:
            attend(1)
            with pytest.raises(UnknownKeyError, match=r"did you mean 'attend'\? The keys are: 'attend'; .*is running"):
                found["atend"]
        with pytest.raises(KeyError, match="not running"):
            found["Attention.forward"]

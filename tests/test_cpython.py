"""A few modules of CPython's own tests end the same under the engine. All of them: `python tests/cpython/run.py`."""

import importlib.util
import sys

import pytest
from cpython.expected import Difference
from cpython.run import Compared, Ended, Rewriter, compare, different, judge

MODULES = ("test_grammar", "test_generators", "test_scope", "test_with")
FILES = ("test/test_", "contextlib.py", "functools.py", "types.py", "unittest/")
"""What of the standard library is rewritten here; the whole command rewrites all of it."""

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="CPython's tests are run in the way of POSIX"),
    pytest.mark.skipif(
        importlib.util.find_spec("test.test_grammar") is None, reason="this Python came without its test suite"
    ),
]


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory):
    return Rewriter(tmp_path_factory.mktemp("cpython") / "rewritten")


@pytest.mark.parametrize("module", MODULES)
def test_same_results_under_the_engine(module, rewriter):
    result = compare(module, rewriter, only=FILES)
    assert judge(result).unexplained == []
    assert min(len(result.tests), result.functions, result.values) > 0


class Mixed(Rewriter):
    """Tells the hook the names in the wrong order."""

    def key(self, names):
        return " ".join(reversed(names))


def test_a_wrong_value_is_found(tmp_path):
    result = compare("test_with", Mixed(tmp_path / "rewritten"), modes=("identity",), only=("test/test_with",))
    assert len(result.mismatches) > 100
    assert any("test/test_with.py:" in line for line in judge(result, ("identity",)).unexplained)


def test_a_module_that_does_not_run_is_told(rewriter):
    assert compare("test_of_nothing", rewriter).not_run == ["test_of_nothing as a whole: it ended with 1"]


def test_another_ending_is_found():
    before = Ended({"a": ["passed"], "b": ["passed"], "c": ["part failed", "passed"]})
    after = Ended({"a": ["failed"], "b": ["passed"], "c": ["passed"], "d": ["passed"]})
    expected = {
        "a": ("passed", "failed"),
        "c": ("part failed and passed", "passed"),
        "d": ("was not run", "passed"),
    }
    assert different([before], [after]) == expected
    assert different([before, after], [after]) == {}  # one that ends now so, now so, says nothing


def test_what_differs_must_be_known_and_what_is_known_must_differ(monkeypatch):
    tests = ["test.test_one.Case.test_a", "test.test_one.Case.test_b"]
    result = Compared("test_one", tests, differences={(tests[0], "captured"): ("passed", "failed")})
    monkeypatch.setattr("cpython.expected.DIFFERENCES", ())
    assert len(judge(result).unexplained) == 1
    monkeypatch.setattr("cpython.expected.DIFFERENCES", (Difference("test.test_one.Case.*", "why", ("captured",)),))
    assert judge(result).unexplained == []
    assert "why" in judge(result).explained[0]
    assert "does not differ" in judge(Compared("test_one", tests)).unexplained[0]
    assert judge(Compared("test_two", ["test.test_two.Case.test_a"])).unexplained == []

"""CPython's own tests give the same results, test by test, when the engine has rewritten every function of theirs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
AT_ONCE = ("test_grammar", "test_generators", "test_scope", "test_with")
LONG = (
    *("test_argparse", "test_asyncgen", "test_augassign", "test_contextlib", "test_coroutines", "test_decorators"),
    *("test_dict", "test_enum", "test_except_star", "test_exceptions", "test_functools", "test_json"),
    *("test_listcomps", "test_patma", "test_raise", "test_super", "test_unpack"),
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("test.test_grammar") is None, reason="this Python came without its test suite"
)


def results(how: str, module: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(TESTS / "cpython_tests.py"), how, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", [*AT_ONCE, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_same_results_under_the_engine(module):
    plain, captured = results("plain", module), results("captured", module)
    assert plain["ended"], "no test was run"
    assert plain["ended"] == captured["ended"]
    assert 0 == plain["received"] < captured["received"]

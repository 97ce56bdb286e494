"""Run modules of CPython's own test suite, plain or under the engine, and print each test's result as JSON.

    python tests/cpython_tests.py plain|captured test_grammar test_generators ...

Under the engine every function of the module, nested ones and methods too, is rewritten to hand over all its locals at
every return. The hook is a builtin here, so that functions with globals of their own find it.
"""

import builtins
import importlib.util
import inspect
import io
import json
import sys
import types
import unittest
import warnings

from visualizer.errors import RewriteError
from visualizer.rewrite import HOOK, local_names, rewrite

received = 0


def hook(key, value):
    global received
    received += 1


def captured(code):
    """The code with all functions inside it rewritten, innermost first."""
    constants = tuple(captured(one) if isinstance(one, types.CodeType) else one for one in code.co_consts)
    code = code.replace(co_consts=constants)
    names = local_names(code)
    if not code.co_flags & inspect.CO_OPTIMIZED or not names:
        return code
    try:
        return rewrite(code, names, key="k")
    except RewriteError:
        return code


def load(name, under_engine):
    spec = importlib.util.find_spec(f"test.{name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    code = spec.loader.get_code(spec.name)
    exec(captured(code) if under_engine else code, vars(module))
    return module


class Results(unittest.TextTestResult):
    """Each test's id with how it ended."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ended = {}

    def stopTest(self, test):
        super().stopTest(test)
        self.ended.setdefault(test.id(), "passed")

    def addError(self, test, error):
        super().addError(test, error)
        self.ended[test.id()] = f"error: {error[0].__name__}"

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.ended[test.id()] = "failed"

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.ended[test.id()] = "skipped"


def main():
    under_engine = sys.argv[1] == "captured"
    setattr(builtins, HOOK, hook)
    ended = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in sys.argv[2:]:
            suite = unittest.defaultTestLoader.loadTestsFromModule(load(name, under_engine))
            runner = unittest.TextTestRunner(stream=io.StringIO(), resultclass=Results)
            ended.update({f"{name}: {test}": how for test, how in runner.run(suite).ended.items()})
    json.dump({"ended": ended, "received": received}, sys.__stdout__)


if __name__ == "__main__":
    main()

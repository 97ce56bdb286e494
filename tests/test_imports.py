"""Acting when a module has been imported, by whomever."""

import importlib.util
import sys

import pytest

from visualizer.instrument.imports import after_import


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The name of a module that can be imported."""
    (tmp_path / "example_to_import.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    yield "example_to_import"
    sys.modules.pop("example_to_import", None)


def test_what_is_imported_already_is_at_hand_at_once():
    seen = []
    after_import("json", seen.append)
    assert [sys.modules["json"]] == seen


def test_it_acts_once_when_somebody_imports_it_and_leaves_nothing_behind(example):
    seen, finders = [], list(sys.meta_path)
    after_import(example, lambda module: seen.append(module.value))
    assert example not in sys.modules
    assert example == importlib.util.find_spec(example).name  # to look is not to import
    assert [] == seen
    importlib.import_module(example)
    assert [3] == seen
    assert finders == sys.meta_path
    sys.modules.pop(example)
    importlib.import_module(example)
    assert [3] == seen


def test_to_ask_twice_for_the_same_is_to_ask_once(example):
    seen = []
    after_import(example, seen.append)
    after_import(example, seen.append)
    importlib.import_module(example)
    assert 1 == len(seen)


def test_two_may_wait_for_one_module(example):
    first, second = [], []
    after_import(example, first.append)
    after_import(example, second.append)
    importlib.import_module(example)
    assert (1, 1) == (len(first), len(second))


def test_a_module_that_fails_is_waited_for_again(tmp_path, example):
    seen = []
    path = tmp_path / "example_to_import.py"
    path.write_text("raise ValueError('not yet')  # first")
    after_import(example, seen.append)
    with pytest.raises(ValueError, match="not yet"):
        importlib.import_module(example)
    assert [] == seen
    path.write_text("value = 3")
    importlib.invalidate_caches()
    importlib.import_module(example)
    assert 1 == len(seen)

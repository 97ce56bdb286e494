"""Acting when a module has been imported, by whomever."""

import importlib.util
import subprocess
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


def test_captures_before_torch_is_loaded_wait_for_it_once():
    code = """if True:
        import sys
        from visualizer import capture
        def attend(x):
            attn = x
            return attn
        counts = []
        for number in range(50):
            with capture(attend, "attn"):
                attend(number)
            counts.append(len(sys.meta_path))
        assert "torch" not in sys.modules
        print(counts[0] == counts[-1])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ("True\n", "") == (done.stdout, done.stderr)


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

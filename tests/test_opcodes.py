"""Which interpreters the engine accepts, and what it says to the others."""

import sys

import pytest

from visualizer import UnsupportedPythonError, get_local, opcodes


def test_this_python_is_known():
    assert opcodes.why_unsupported() is None


OLDEST, NEWEST = (".".join(map(str, version)) for version in (opcodes.OLDEST, opcodes.NEWEST))


@pytest.mark.parametrize(
    "version",
    [(3, 10), (3, opcodes.NEWEST[1] + 1), (4, 0)],
    ids=["older", "newer", "next"],
)
def test_an_unknown_version_is_one_clear_error_at_activation(monkeypatch, version):
    @get_local("attn")
    def forward(x):
        attn = x
        return attn

    code = forward.__code__
    monkeypatch.setattr(sys, "version_info", (*version, 0, "final", 0))
    with pytest.raises(UnsupportedPythonError) as caught:
        get_local.activate()
    assert f"this is {version[0]}.{version[1]}." in str(caught.value)
    assert f"CPython {OLDEST} to {NEWEST}" in str(caught.value)
    assert not get_local.is_active
    assert forward.__code__ is code
    assert forward(1) == 1


def test_another_implementation_is_named(monkeypatch):
    monkeypatch.setattr(sys.implementation, "name", "pypy")
    assert "pypy" in str(opcodes.why_unsupported())


def test_a_build_without_the_lock_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert "free-threaded" in str(opcodes.why_unsupported())

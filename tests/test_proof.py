"""The proof: what it compares, and that it refuses any difference."""

import pytest

from visualizer import opcodes
from visualizer.errors import RewriteError
from visualizer.rewrite import Capture, rewrite


class TestTheProof:
    """It compares what will run with what would have run; any difference is a refusal with the reason."""

    @staticmethod
    def function(x):
        for i in range(x):
            try:
                attn = i + 0.5
            except ValueError:
                attn = None
        return attn

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda c: c.replace(co_flags=c.co_flags | 0x20), id="flags"),
            pytest.param(lambda c: c.replace(co_consts=tuple((k,) for k in c.co_consts)), id="constants"),
            pytest.param(lambda c: c.replace(co_names=tuple(f"{n}_" for n in c.co_names)), id="names"),
            pytest.param(lambda c: c.replace(co_varnames=c.co_varnames[::-1]), id="variables"),
            pytest.param(lambda c: c.replace(co_exceptiontable=b""), id="handlers"),
            pytest.param(lambda c: c.replace(co_linetable=c.co_linetable[:-4]), id="lines"),
            pytest.param(lambda c: c.replace(co_firstlineno=c.co_firstlineno + 1), id="first line"),
        ],
    )
    def test_every_kind_of_damage_is_seen(self, monkeypatch, change):
        from bytecode import Bytecode

        assemble = Bytecode.to_code
        monkeypatch.setattr(Bytecode, "to_code", lambda self, *args, **kw: change(assemble(self, *args, **kw)))
        with pytest.raises(RewriteError) as caught:
            rewrite(self.function.__code__, Capture(("attn",), "return", "k"))
        assert "TestTheProof.function" in str(caught.value)
        assert "left as it is" in str(caught.value)

    def test_a_changed_jump_is_seen(self, monkeypatch):
        from bytecode import Bytecode, Instr

        assemble = Bytecode.to_code

        def damaged(self, *args, **kwargs):
            labels = [i.arg for i in self if isinstance(i, Instr) and i.has_jump()]
            jump = next(i for i in self if isinstance(i, Instr) and i.has_jump() and "FORWARD" not in i.name)
            jump.arg = next(label for label in labels if label is not jump.arg)
            return assemble(self, *args, **kwargs)

        monkeypatch.setattr(Bytecode, "to_code", damaged)
        with pytest.raises(RewriteError):
            rewrite(self.function.__code__, Capture(("attn",), "return", "k"))

    def test_what_the_package_cannot_take_apart_is_refused(self, monkeypatch):
        from bytecode import Bytecode

        def broken(*args, **kwargs):
            raise IndexError("list index out of range")

        monkeypatch.setattr(Bytecode, "from_code", broken)
        with pytest.raises(RewriteError, match="IndexError"):
            rewrite(self.function.__code__, Capture(("attn",), "return", "k"))

    def test_an_unknown_way_to_return_is_refused(self, monkeypatch):
        monkeypatch.setattr(opcodes, "KNOWN_RETURNS", frozenset())
        with pytest.raises(RewriteError, match="RETURN_VALUE"):
            rewrite(self.function.__code__, Capture(("attn",), "return", "k"))

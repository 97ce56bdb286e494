"""Rewrite a code object so that named locals reach a hook, and prove that nothing else changed.

Pure: (code, names, at, key) -> code. Nothing here knows a store or a tensor; the rewritten code looks the hook up as a
global of its function, under the name `HOOK`, so any function of two arguments will do.

    at="return"  before every return, while the result waits on the stack: hook(key, value), or
                 hook(key, (value1, value2, ...)) for several names; for an unbound name the value is the hook itself
    at="assign"  once as a call begins: hook(key, None); after each assignment: hook(key, (name, line, value))

With an owner, a parameter such as `self`, the values of a return are hook(key, (owner, value1, ...)), and the beginning
of a call is hook(key, (owner,)).

The proof: without the injected instructions, the rewritten code is the original, instruction by instruction: the same
operations on the same names and constants, the same jumps, exception handlers, lines and columns. A function that
fails it is refused with `RewriteError` and stays as it was.

The `bytecode` package is loaded when the first function is taken apart, for no release of it may know a new Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import CodeType

from .. import opcodes
from ..errors import RewriteError, UnknownLocalError
from ..proof import prove, refusal
from .locals import HOOK, At, Capture, assigned_lines, assigns, deletes, local_names, rebinds

__all__ = [
    "HOOK",
    "At",
    "Capture",
    "assigned_lines",
    "assigns",
    "deletes",
    "local_names",
    "rebinds",
    "rewrite",
    "rewrite_for",
]


def rewrite(code: CodeType, names: Sequence[str], *, at: At = "return", key: str) -> CodeType:
    """A code object that does what `code` does and also brings the locals `names` to a hook.

    >>> from visualizer.rewrite import HOOK
    >>> def scale(x):
    ...     attn = 2 * x
    ...     return attn + 1
    >>> captured = []
    >>> globals()[HOOK] = lambda key, value: captured.append((key, value))
    >>> scale.__code__ = rewrite(scale.__code__, ["attn"], key="scale")
    >>> scale(3), captured
    (7, [('scale', 6)])

    See `Capture` for the arguments, and `rewrite_for` for the errors.
    """
    return rewrite_for(code, [Capture(tuple(names), at, key)])


def rewrite_for(code: CodeType, captures: Sequence[Capture]) -> CodeType:
    """A code object that does what `code` does and makes the hook calls of all the captures, in their order.

    Raises:
        UnknownLocalError: `code` has no local of that name.
        RewriteError: the result cannot be proved to do the same; the message has the reason.
        UnsupportedPythonError: this interpreter's bytecode is not known.
    """
    opcodes.require_supported()
    known = local_names(code)
    for name in (name for capture in captures for name in capture.names):
        if name not in known:
            raise UnknownLocalError(f"{code.co_qualname} has no local {name!r}; it has {', '.join(known)}")
    from .writer import Writer

    writer = Writer(code)
    for capture in captures:
        writer.add(capture)
    try:
        rewritten = writer.assemble()
    except Exception as error:
        raise RewriteError(refusal(code, f"the bytecode package cannot put it together again: {error!r}")) from error
    prove(code, rewritten, writer.injected_indices())
    return rewritten

"""Rewrite a code object so that named locals reach a hook, and prove that nothing else changed.

Pure: (code, names, at, key) -> code. Nothing here knows a store or a tensor; the rewritten code looks the hook up as a
global or builtin of its function, under the name `HOOK`, so any function of two arguments will do. Where there is none,
as in a process that the code was sent to, it does without. It carries the original, as data, for whoever wants that
back: `original_of`.

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

from .captures import HOOK, At, Capture
from .locals import assigned_lines, assigns, deletes, local_names, rebinds
from .rewriting import original_of, rewrite, rewrite_for

__all__ = [
    "HOOK",
    "At",
    "Capture",
    "assigned_lines",
    "assigns",
    "deletes",
    "local_names",
    "original_of",
    "rebinds",
    "rewrite",
    "rewrite_for",
]

"""Rewrite a code object so that named locals reach a hook, and prove that nothing else changed.

Pure: (code, captures) -> code. Nothing here knows a store or a tensor; the rewritten code looks the hook up as a
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

The `bytecode` package is loaded when the first function is taken apart: there may be no release of it for a new Python.
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
    "original_of",
    "rebinds",
    "rewrite",
]


def rewrite(code: CodeType, *captures: Capture) -> CodeType:
    """A code object that does what `code` does and makes the hook calls of all the captures, in their order.

    >>> from visualizer.rewrite import HOOK, Capture
    >>> def scale(x):
    ...     attn = 2 * x
    ...     return attn + 1
    >>> captured = []
    >>> globals()[HOOK] = lambda key, value: captured.append((key, value))
    >>> scale.__code__ = rewrite(scale.__code__, Capture(("attn",), "return", key="scale"))
    >>> scale(3), captured
    (7, [('scale', 6)])

    Code that is rewritten again for other keys takes a fraction of the time: only the keys are exchanged.

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
    keys = {f"{HOOK}#{number}": capture.key for number, capture in enumerate(captures)}
    if any(constant in keys for constant in code.co_consts if isinstance(constant, str)):
        return _rewritten(code, captures)
    unnamed = tuple(capture._replace(key=key) for key, capture in zip(keys, captures, strict=True))
    # Found by identity: code objects that are equal may be of different files.
    _, templates = _templates.setdefault(id(code), (code, {}))
    if unnamed not in templates:
        templates[unnamed] = _rewritten(code, unnamed)
    template = templates[unnamed]
    if len(_templates) > _MOST_TEMPLATES:
        _templates.clear()
    constants = (keys.get(one, one) if isinstance(one, str) else one for one in template.co_consts)
    return template.replace(co_consts=tuple(constants))


_MOST_TEMPLATES = 1000
_templates: dict[int, tuple[CodeType, dict[tuple[Capture, ...], CodeType]]] = {}
"""What the last functions were rewritten to, with stand-ins for the keys, by the `id` of their code, which is kept."""


def _rewritten(code: CodeType, captures: Sequence[Capture]) -> CodeType:
    from .writer import Writer

    writer = Writer(code)
    for capture in captures:
        writer.add(capture)
    try:
        rewritten = writer.assemble()
    except Exception as error:
        raise RewriteError(refusal(code, f"the bytecode package cannot put it together again: {error!r}")) from error
    prove(code, rewritten, writer.injected_indices())
    # Behind its other constants the code carries the original, wherever it is copied to: see `original_of`.
    return rewritten.replace(co_consts=(*rewritten.co_consts, (HOOK, code, rewritten.co_code)))


def original_of(code: CodeType) -> CodeType:
    """The code that `rewrite` made this from, in this process or in another; any other code is its own original.

    >>> def scale(x):
    ...     attn = 2 * x
    ...     return attn
    >>> rewritten = rewrite(scale.__code__, Capture(("attn",), "return", key="scale"))
    >>> original_of(rewritten) is scale.__code__ is original_of(scale.__code__)
    True

    Code that another tool has made from rewritten code, with instructions of its own, is no longer ours.
    """
    mark = code.co_consts[-1] if code.co_consts else None
    if type(mark) is tuple and len(mark) == 3 and mark[0] == HOOK and mark[2] == code.co_code:
        return original_of(mark[1])
    return code

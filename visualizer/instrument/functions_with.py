"""Which functions have a local that can be captured."""

from __future__ import annotations

from types import FunctionType

from .. import opcodes
from ..errors import RewriteError
from ..rewrite import At, assigns, local_names


def has_local(function: FunctionType, name: str, at: At) -> bool:
    """Whether capturing the local from the function can record anything: with at="assign" something must assign it."""
    code = function.__code__
    if name not in local_names(code) or at == "return":
        return name in local_names(code)
    try:
        return opcodes.why_unsupported() is not None or assigns(code, name)
    except RewriteError:
        return True  # only those who want it rewritten need to hear of the refusal


def methods_with(methods: dict[str, list[FunctionType]], name: str, at: At) -> dict[str, FunctionType]:
    """The methods that have the local, each with the innermost function that has it; `forward` alone if it does."""
    holders = {}
    for method, functions in methods.items():
        for function in reversed(functions):
            if has_local(function, name, at):
                holders[method] = function
                break
    return {"forward": holders["forward"]} if "forward" in holders else holders

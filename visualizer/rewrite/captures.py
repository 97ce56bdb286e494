"""What is to be captured from a function, as the rewriter takes it."""

from __future__ import annotations

from typing import Literal, NamedTuple

At = Literal["return", "assign"]

HOOK = "__get_local__"
"""The global or builtin name under which rewritten code finds its hook."""


class Capture(NamedTuple):
    """Which locals go to the hook, and when."""

    names: tuple[str, ...]
    """Locals, out of `local_names(code)`."""
    at: At
    """"return": their values at every return. "assign": every value assigned to them."""
    key: str
    """The hook gets it with each value. It is a string, so that the code can still be marshalled."""
    owner: str | None = None
    """A parameter that goes before the values: the object whose method is called."""

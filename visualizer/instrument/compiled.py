"""What torch's compiler has to be told: that code was swapped."""

from __future__ import annotations

import sys


def forget() -> None:
    """Have compiled models compiled anew: torch's compiler does not notice that a function's code was swapped."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()

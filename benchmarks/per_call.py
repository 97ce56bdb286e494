"""What one call of a decorated function costs: off, on with each `keep`, and beside the other ways to get at a local.

    python benchmarks/per_call.py

All variants run in one process, in turn, round after round; the figures are medians over the rounds, in nanoseconds a
call, and their distance from the bare function. The function does next to nothing, so that what is seen is the cost;
the value is a number where no other is named.
"""

from __future__ import annotations

import functools
import gc
import platform
import statistics
import sys
import timeit
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from visualizer import get_local
from visualizer.instrument import GetLocal

try:
    import torch
except ImportError:  # no wheel for this Python: the two rows of modules are left out
    torch = None

ROUNDS, CALLS = 41, 20_000


def bare(x):
    attn = x
    return attn


handmade: list = []


def append(x):
    attn = x
    handmade.append(attn)
    return attn


def decorated() -> Callable:
    def forward(x):
        attn = x
        return attn

    return forward


def profiled(function: Callable) -> Callable:
    """By sys.setprofile: the frame's locals at each return."""
    code, seen = function.__code__, []

    def profile(frame, event, arg):
        if event == "return" and frame.f_code is code:
            seen.append(frame.f_locals["attn"])

    def call(x):
        sys.setprofile(profile)
        try:
            return function(x)
        finally:
            sys.setprofile(None)

    call.clear = seen.clear
    return call


def monitored() -> Callable:
    """By sys.monitoring, for this function alone: the frame's locals at each return."""
    seen, tool = [], 3

    def function(x):
        attn = x
        return attn

    monitoring = sys.monitoring

    def at_return(code, offset, result):
        seen.append(sys._getframe(1).f_locals["attn"])

    monitoring.use_tool_id(tool, "benchmark")
    monitoring.register_callback(tool, monitoring.events.PY_RETURN, at_return)
    monitoring.set_local_events(tool, function.__code__, monitoring.events.PY_RETURN)
    function.clear = seen.clear
    return function


def handed_up() -> Callable:
    """As the original Visualizer does it: the function returns the local too, and a wrapper takes them apart."""
    seen = []

    def forward(x):
        attn = x
        result = attn
        value = attn
        both = (result, value)
        return both

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        result, value = forward(*args, **kwargs)
        seen.append(value)
        return result

    wrapper.clear = seen.clear
    return wrapper


def hooked() -> Callable:
    """By a forward hook of torch, which sees a module's output: only what the module returns."""
    seen = []

    class Module(torch.nn.Module):
        def forward(self, x):
            attn = x
            return attn

    module = Module()
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    module.clear = seen.clear
    return module


def plain_module() -> Callable:
    """The module of `hooked`, called without its hook."""

    class Module(torch.nn.Module):
        def forward(self, x):
            attn = x
            return attn

    return Module()


def variants() -> dict[str, tuple]:
    """Name -> the function to call, what empties what it has filled, and the value, if that is no number."""
    found: dict[str, tuple] = {"bare": (bare, lambda: None), "hand-written append": (append, handmade.clear)}
    off = get_local("attn")(decorated())
    found["get_local, never activated"] = off, lambda: None
    was_on = GetLocal()
    function = was_on("attn")(decorated())
    with was_on.activate():
        function(1)
    found["get_local, activated once, off again"] = function, lambda: None
    values = [("graph", 1), ("tensor", 1), ("numpy", 1)]
    if torch is not None:
        values.insert(1, ("graph", torch.zeros(3, 4)))
    for keep, value in values:
        own = GetLocal()
        function = own("attn")(decorated())
        own.activate(keep=keep)
        what = "" if isinstance(value, int) else ", a tensor"
        found[f'get_local, on, keep="{keep}"{what}'] = function, own.clear, value
    function = handed_up()
    found["the original Visualizer's way"] = function, function.clear
    function = profiled(decorated())
    found["sys.setprofile"] = function, function.clear
    if hasattr(sys, "monitoring"):
        function = monitored()
        found["sys.monitoring"] = function, function.clear
    if torch is not None:
        found["nn.Module, bare"] = plain_module(), lambda: None
        function = hooked()
        found["nn.Module, forward hook"] = function, function.clear
    return found


def main() -> None:
    candidates = variants()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.disable()
    for _ in range(ROUNDS):
        for name, (function, clear, *others) in candidates.items():
            value = others[0] if others else 1
            times[name].append(timeit.timeit(lambda f=function, v=value: f(v), number=CALLS) / CALLS * 1e9)
            clear()
    loop = statistics.median(timeit.timeit(lambda: None, number=CALLS) / CALLS * 1e9 for _ in range(ROUNDS))
    print(machine())
    print(
        f"medians of {ROUNDS} alternating rounds of {CALLS} calls; the timing loop itself, {loop:.0f} ns, taken off\n"
    )
    print(f"{'':42}{'ns a call':>10}{'above bare':>12}{'above append':>14}")
    medians = {name: statistics.median(values) - loop for name, values in times.items()}
    for name, median in medians.items():
        above = median - medians["bare"], median - medians["hand-written append"]
        print(f"{name:42}{median:10.1f}{above[0]:12.1f}{above[1]:14.1f}")


def machine() -> str:
    """The interpreter, the versions and the processor, in a line."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return f"CPython {platform.python_version()}, bytecode {version('bytecode')}, {cpu}, {sys.platform}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

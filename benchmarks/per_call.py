"""What one call of a decorated function costs: off, on with each `keep`, and beside a hand-written append.

    python benchmarks/per_call.py

All variants run in one process, in turn, round after round; the figures are medians over the rounds, in nanoseconds a
call, and their distance from the bare function. The function does next to nothing, so that what is seen is the cost.
"""

from __future__ import annotations

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


def variants() -> dict[str, tuple[Callable, Callable[[], object]]]:
    """Name -> the function to call, and what empties what it has filled."""
    found = {"bare": (bare, lambda: None), "hand-written append": (append, handmade.clear)}
    off = get_local("attn")(decorated())
    found["get_local, never activated"] = off, lambda: None
    was_on = GetLocal()
    function = was_on("attn")(decorated())
    with was_on.activate():
        function(1)
    found["get_local, activated once, off again"] = function, lambda: None
    for keep in ("graph", "tensor", "numpy"):
        own = GetLocal()
        function = own("attn")(decorated())
        own.activate(keep=keep)
        found[f'get_local, on, keep="{keep}"'] = function, own.clear
    return found


def main() -> None:
    candidates = variants()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    gc.disable()
    for _ in range(ROUNDS):
        for name, (function, clear) in candidates.items():
            times[name].append(timeit.timeit(lambda f=function: f(1), number=CALLS) / CALLS * 1e9)
            clear()
    loop = statistics.median(timeit.timeit(lambda: None, number=CALLS) / CALLS * 1e9 for _ in range(ROUNDS))
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    print(f"CPython {platform.python_version()}, bytecode {version('bytecode')}, {cpu}, {sys.platform}")
    print(
        f"medians of {ROUNDS} alternating rounds of {CALLS} calls; the timing loop itself, {loop:.0f} ns, taken off\n"
    )
    print(f"{'':42}{'ns a call':>10}{'above bare':>12}{'above append':>14}")
    medians = {name: statistics.median(values) - loop for name, values in times.items()}
    for name, median in medians.items():
        above = median - medians["bare"], median - medians["hand-written append"]
        print(f"{name:42}{median:10.1f}{above[0]:12.1f}{above[1]:14.1f}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

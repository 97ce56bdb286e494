"""What each thing that the hook knows of a value costs: the key's list, the thread, whether it must be weighed.

    python benchmarks/hook_steps.py

Beside the hook in Python each step is measured as instructions within the function itself, calling nothing but C: the
least that any rewriting of the function could pay for it. All variants run in one process, in turn, round after round;
the figures are medians over the rounds, in nanoseconds a call above a hand-written append to a list.
"""

from __future__ import annotations

import gc
import statistics
import timeit
from _thread import RLock, _local, get_ident
from collections import deque
from collections.abc import Callable

from per_call import CALLS, ROUNDS, machine

from visualizer.instrument import GetLocal

OWN = RLock()  # of the thread that made it; asking whose it is costs less than the thread's number
OWN.acquire()


class PerThread(_local):
    pass


# What holds the key's list, and how a value gets there: as the body of a hook(key, value), and within the function.
HOOKS = {
    "the key's list": ({"k": "append"}, "table[key](value)"),
    "  and whether the thread is the usual one": (
        {"k": "append"},
        "append = table[key]\n    if is_own(): append(value)\n    else: other(value)",
    ),
    "  and the number of the thread": ({"k": "append"}, "table[key]((value, get_ident()))"),
    "  and whether it is a number, too small to be weighed": (
        {"k": "append"},
        "append = table[key]\n    if type(value) is int: append(value)\n    else: other(value)",
    ),
    "  and both: the usual thread, a number": (
        {"k": "append"},
        "append = table[key]\n    if type(value) is int and is_own(): append(value)\n    else: other(value)",
    ),
}
INLINE = {
    "the key's list": ({"k": "append"}, "table['k'](attn)"),
    "  and whether the thread is the usual one": ({"k": {True: "append"}}, "table['k'][is_own()](attn)"),
    "  and the thread's own table": ({"k": "append"}, "per_thread.table['k'](attn)"),
    "  and the number of the thread": ({"k": {get_ident(): "append"}}, "table['k'][get_ident()](attn)"),
    "  and whether it is a number, too small to be weighed": ({"k": {int: "append"}}, "table['k'][type(attn)](attn)"),
    "  and both: the usual thread, a number": (
        {"k": {True: {int: "append"}}},
        "table['k'][is_own()][type(attn)](attn)",
    ),
}


def made(table: dict, hook: str | None, line: str) -> tuple[Callable, Callable]:
    """A function that brings its local to a list, and what empties that."""
    kept: deque = deque()

    def filled(part: object) -> object:
        return {key: filled(value) for key, value in part.items()} if isinstance(part, dict) else kept.append

    per_thread = PerThread()
    per_thread.table = filled(table)
    names = {
        "table": filled(table),
        "per_thread": per_thread,
        "is_own": OWN._is_owned,
        "get_ident": get_ident,
        "other": kept.append,
    }
    if hook is not None:
        exec(f"def hook(key, value):\n    {hook}\n", names)
    exec(f"def function(x):\n    attn = x\n    result = attn\n    {line}\n    return result\n", names)
    return names["function"], kept.clear


def main() -> None:
    kept: list = []

    def append(x):
        attn = x
        kept.append(attn)
        return attn

    own = GetLocal()

    @own("attn", keep="graph")
    def forward(x):
        attn = x
        return attn

    own.activate()
    candidates = {("", "hand-written append"): (append, kept.clear), ("", "get_local, all of it"): (forward, own.clear)}
    for name, (table, hook) in HOOKS.items():
        candidates["a hook in Python", name] = made(table, hook, "hook('k', attn)")
    for name, (table, line) in INLINE.items():
        candidates["within the function", name] = made(table, None, line)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in candidates}
    gc.disable()
    for _ in range(ROUNDS):
        for name, (function, clear) in candidates.items():
            times[name].append(timeit.timeit(lambda f=function: f(1), number=CALLS) / CALLS * 1e9)
            clear()
    print(machine())
    print(f"medians of {ROUNDS} alternating rounds of {CALLS} calls with a number, ns above a hand-written append\n")
    medians = {name: statistics.median(values) for name, values in times.items()}
    least = medians.pop(("", "hand-written append"))
    room = ""
    for (where, name), median in medians.items():
        if where != room:
            print(f"\n{where}")
            room = where
        print(f"{name:58}{median - least:8.1f}")


if __name__ == "__main__":
    main()

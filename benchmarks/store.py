"""What it costs to keep a value, to read it, and how much memory it takes, beside the line that a person would write.

    python benchmarks/store.py

Each ratio is of two times of one run, by the processor's time, in turn, round after round: what a captured call costs
more than the same call bare, over a call that does what a person would write by hand. Memory is that of fresh
processes: what they have more after keeping many values.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any

from visualizer import capture, load
from visualizer.instrument import GetLocal

try:
    import numpy as np
except ImportError:  # the rows of arrays are left out
    np = None
try:
    import torch
except ImportError:  # no wheel for this Python: the rows of tensors are left out
    torch = None

ROUNDS, CALLS, MANY = 101, 2_000, 1_000_000


def decorated() -> Callable[[Any], Any]:
    def forward(x):
        attn = x
        return attn

    return forward


def above_bare(keep: str, value: Any, by_hand: Callable[[list, Any], None], limit: int | None = None) -> float:
    """What a captured call costs more than a bare one, over the hand-written line.

    What was kept is dropped before each part: who is the first to keep values pays for the pages of memory.
    """
    owner, bare, kept = GetLocal(), decorated(), []
    captured = owner("attn")(decorated())
    owner.activate(keep=keep, limit=limit)
    ratios = []
    for _ in range(ROUNDS):
        parts = [(lambda: bare(value)), (lambda: captured(value)), (lambda: by_hand(kept, value))]
        times = []
        for part in parts:
            times.append(timeit.timeit(part, number=CALLS, timer=process_time))
            kept.clear(), owner.clear()
        bare_time, captured_time, hand_time = times
        ratios.append((captured_time - bare_time) / hand_time)
    owner.deactivate()
    return statistics.median(ratios)


def limited(limit: int) -> float:
    """What a captured call costs with a limit, over what it costs without one."""
    times: dict[int | None, list[float]] = {None: [], limit: []}
    owners = {}
    for one in times:
        owners[one] = GetLocal()
        function = owners[one]("attn")(decorated())
        owners[one].activate(limit=one)
        owners[one].function = function
        timeit.timeit(lambda f=function: f(1.5), number=2 * limit if limit > CALLS else CALLS)
    for _ in range(ROUNDS):
        for one, owner in owners.items():
            times[one].append(timeit.timeit(lambda f=owner.function: f(1.5), number=10 * CALLS, timer=process_time))
    for owner in owners.values():
        owner.deactivate()
    return statistics.median(times[limit]) / statistics.median(times[None])


def reading(keep: str) -> tuple[float, float, float]:
    """The first read of a million numbers and all their records, a value, over an append; the seconds of their repr."""
    owner = GetLocal()
    forward = owner("attn")(decorated())
    owner.activate(keep=keep)
    for i in range(MANY):
        forward(i * 0.5)
    values: list[float] = []
    append = timeit.timeit(lambda: values.append(0.5), number=10 * CALLS, timer=process_time) / (10 * CALLS)
    read = timeit.timeit(lambda: next(iter(owner.cache.values())), number=1, timer=process_time) / MANY
    records = timeit.timeit(lambda: owner.records, number=1, timer=process_time) / MANY
    shown = timeit.timeit(lambda: repr(owner.cache), number=1, timer=process_time)
    owner.deactivate()
    return read / append, records / append, shown


def functions(number: int) -> tuple[float, float]:
    """Seconds to decorate so many functions, and to capture a list of them."""
    names = {}
    exec("\n".join(f"def f{i}(x):\n    attn = x\n    return attn" for i in range(number)), names)
    many = [names[f"f{i}"] for i in range(number)]
    owner = GetLocal()
    decorating = timeit.timeit(lambda: [owner("attn")(function) for function in many], number=1, timer=process_time)

    def listing() -> None:
        with capture(many, "attn"):
            pass

    return decorating, timeit.timeit(listing, number=1, timer=process_time)


def files(shape: tuple[int, ...]) -> tuple[float, float, float]:
    """Seconds to save 10,000 captured arrays and to load them, and the bytes of the file over theirs."""
    owner = GetLocal()
    forward = owner("attn")(decorated())
    owner.activate()
    for i in range(10_000):
        forward(np.full(shape, i, np.float32))
    owner.deactivate()
    size = sum(value.nbytes for value in next(iter(owner.cache.values())))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.safetensors"
        saving = timeit.timeit(lambda: owner.cache.save(path), number=1, timer=process_time)
        loading = timeit.timeit(lambda: load(path), number=1, timer=process_time)
        return saving, loading, path.stat().st_size / size


VALUES = {
    "float": "i * 0.5",
    "0-d tensor": "torch.tensor(0.5)",
    "0-d tensor as array": "torch.tensor(0.5)",
    "array of 4": "np.ones(4)",
    "string": "'x' * 30 + str(i)",
    "map of 1 MB": "torch.ones(512, 512)",
}


def resident(name: str) -> tuple[float, float]:
    """In a fresh process: bytes a value, and what a budget of 64 MB grows the process by, over the budget."""
    keep = "tensor" if name == "0-d tensor" else "numpy"
    number = 60 if "MB" in name else 100_000
    code = f"""
import gc, os, sys, warnings
for library in ("import numpy as np", "import torch"):
    try:
        exec(library)
    except ImportError:
        pass
from visualizer.instrument import GetLocal
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
def run(number, **options):
    owner = GetLocal()
    @owner("attn")
    def forward(attn):
        return None
    owner.activate(keep={keep!r}, **options)
    warnings.simplefilter("ignore")
    for i in range(number):
        forward({VALUES[name]})
        if owner._store.is_full:
            break
    owner.cache
    return owner
run(10)
gc.collect()
before = rss()
first = run({number})
print((rss() - before) / {number})
before = rss()
second = run(10**7, max_bytes=64 * 10**6)
print((rss() - before) / 64e6)
"""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    each, share = map(float, done.stdout.split())
    return each, share


def main() -> None:
    print(machine())
    print(f"medians of {ROUNDS} alternating rounds of {CALLS} calls\n")

    def line(text: str, figure: float, bound: float, unit: str = "x") -> None:
        print(f"{text:66}{figure:10.2f} {unit:8}at most {bound:g}{'' if figure <= bound else '   MISSED'}", flush=True)

    gc.disable()
    line("a number, by default, beside L.append(x)", above_bare("numpy", 1.5, list.append), 10)
    line('a number, keep="graph", beside L.append(x)', above_bare("graph", 1.5, list.append), 7)
    if torch is not None and np is not None:
        small = torch.ones(3, 4)
        copied = above_bare("numpy", small, lambda kept, t: kept.append(t.detach().cpu().numpy().copy()))
        line("a small tensor, by default, beside L.append(t...numpy().copy())", copied, 1.5)
    if np is not None:
        line("a small array, by default, beside L.append(a.copy())",
             above_bare("numpy", np.ones((3, 4)), lambda kept, a: kept.append(a.copy())), 2)  # fmt: skip
    gc.enable()
    for limit in (1, 10, 10_000, 100_000):
        line(f"a number with limit={limit:,}, beside one without", limited(limit), 3)
    for keep in ("numpy", "graph"):
        read, records, shown = reading(keep)
        line(f'reading a million numbers, keep="{keep}", a value, beside an append', read, 12)
        print(f"{'making a Record of each':66}{records:10.2f} x", flush=True)
        line("repr of them", shown, 1, "s")
    rounds = [(*functions(1000), *functions(8000)) for _ in range(5)]
    few_decorated, few_captured, decorated_all, captured_all = map(statistics.median, zip(*rounds, strict=True))
    line("decorating 8,000 functions, beside 1,000", decorated_all / few_decorated, 10)
    line("capture of a list of 8,000 functions, beside 1,000", captured_all / few_captured, 10)
    for shape in ((4,), (3, 4)) if np is not None else ():
        saving, loading, share = files(shape)
        line(f"saving 10,000 arrays of shape {shape}", saving, 0.5, "s")
        line("loading them", loading, 0.5, "s")
        line("bytes of the file beside theirs", share, 3)
    if Path("/proc/self/statm").exists():
        for name, needed in VALUES.items():
            if any(known is None and f"{library}." in needed for library, known in (("np", np), ("torch", torch))):
                continue
            each, share = resident(name)
            if name == "float":
                line("memory of a number", each, 150, "bytes")
            line(f"memory of values that fill a budget of 64 MB: {name}", share, 1.5)


def machine() -> str:
    """The interpreter, the versions and the processor, in a line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, platform.processor())
    more = "".join(f", {known.__name__} {known.__version__}" for known in (torch, np) if known is not None)
    return f"CPython {platform.python_version()}, bytecode {version('bytecode')}{more}, {cpu}, {sys.platform}"


if __name__ == "__main__":
    main()

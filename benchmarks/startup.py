"""What it costs to import the package, and to activate a thousand decorated functions.

    python benchmarks/startup.py

Import: the median of fresh processes, of what comes on top of numpy and bytecode. Activation: medians over rounds in
one process, of functions of 2 and of 61 lines, the first time (each is rewritten and proved) and again (remembered).
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time

from visualizer.instrument import GetLocal

FUNCTIONS, ROUNDS = 1000, 5


def import_time() -> float:
    code = "import numpy, bytecode; from time import perf_counter as now; start = now(); import visualizer;"
    code += "print(now() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(12)]
    return statistics.median(float(run.stdout) for run in runs[1:])


def functions(lines: int) -> list:
    body = "\n".join(f"    b{i} = x + {i}" for i in range(lines - 1))
    made = []
    for number in range(FUNCTIONS):
        space: dict = {}
        exec(f"def forward_{number}(x):\n    attn = x\n{body}\n    return attn", space)
        made.append(space[f"forward_{number}"])
    return made


def activation(lines: int) -> tuple[float, float, float]:
    first, again, off = [], [], []
    for _ in range(ROUNDS):
        own = GetLocal()
        for function in functions(lines):
            own("attn")(function)
        for times in (first, again):
            start = time.perf_counter()
            own.activate()
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
            own.deactivate()
            off.append(time.perf_counter() - start)
    return statistics.median(first), statistics.median(again), statistics.median(off)


def main() -> None:
    print(f"CPython {platform.python_version()}, {sys.platform}")
    print(f"import visualizer, after numpy and bytecode: {import_time() * 1e3:.1f} ms")
    for lines in (1, 60):
        first, again, off = activation(lines)
        print(
            f"{FUNCTIONS} decorated functions of {lines + 1} lines: activate() {first:.2f} s the first time, "
            f"{again * 1e3:.0f} ms again, deactivate() {off * 1e3:.0f} ms"
        )


if __name__ == "__main__":
    main()

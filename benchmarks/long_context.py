"""What the class token's rollout costs over long inputs: from query and key, beside storing every map.

    python benchmarks/long_context.py

12 layers, 6 heads, width 64 a head, random queries and keys, as a ViT-S has them for pictures of 512, 1024 and 2048
pixels a side in patches of 16. Three ways to the same row, each in a fresh process:

- from query and key: `visualizer.analysis.rollout(maps, query=0)`;
- every map stored, then the ordinary rollout: the product of twelve N x N matrices, of which row 0 is taken;
- every map stored, then `rollout(maps, query=0)` over them: what the row alone saves without the memory.

Seconds: medians of the rounds. Memory: the peak of the process above that of one with the same queries and keys that
has done all three over a few tokens, which loads the libraries (Linux).
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from visualizer import AttentionMap
from visualizer.analysis import rollout

ROUNDS, LAYERS, HEADS, WIDTH = 3, 12, 6, 64


def make_layers(tokens: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(1, HEADS, tokens, WIDTH), torch.randn(1, HEADS, tokens, WIDTH)) for _ in range(LAYERS)]


def from_query_and_key(layers):
    return rollout([AttentionMap.from_query_key(query, key) for query, key in layers], query=0)


def stored(layers):
    return [(query @ key.mT * WIDTH**-0.5).softmax(-1) for query, key in layers]


def stored_whole(layers):
    maps = stored(layers)
    identity = torch.eye(maps[0].shape[-1])
    flow = identity
    for weights in maps:
        mixed = (weights.mean(1) + identity) / 2
        flow = mixed / mixed.sum(-1, keepdim=True) @ flow
    return flow[:, 0]


def stored_row(layers):
    return rollout(stored(layers), query=0)


VARIANTS: dict[str, Callable] = {
    "from query and key": from_query_and_key,
    "maps stored, whole product": stored_whole,
    "maps stored, row only": stored_row,
}
# The maps of 16,385 tokens would take 77 GB.
RUNS = {1025: list(VARIANTS), 4097: list(VARIANTS), 16385: ["from query and key"]}


def measure(name: str, tokens: int) -> None:
    """In a fresh process: print the seconds, the peak in MB and the class token's own share."""
    layers, few = make_layers(tokens), make_layers(17)
    for run in VARIANTS.values():
        run(few)
    taken, share = [0.0], 0.0
    if name in VARIANTS:
        taken = []
        for _ in range(ROUNDS):
            gc.collect()
            start = time.perf_counter()
            flow = VARIANTS[name](layers)
            taken.append(time.perf_counter() - start)
            share = flow[0, 0].item()
            assert abs(flow.sum().item() - 1) < 1e-4
    # Not getrusage, whose peak a process inherits from the one that started it.
    peak = next(int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith("VmHWM")) / 1000
    print(statistics.median(taken), peak, share)


def measured(name: str, tokens: int) -> list[float]:
    command = [sys.executable, __file__, name, str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(number) for number in done.stdout.split()]


def main() -> None:
    if sys.argv[1:]:
        return measure(sys.argv[1], int(sys.argv[2]))
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    machine = f"{len(cpu)} x {''.join(cpu[:1])}, {torch.get_num_threads()} threads"
    print(f"CPython {platform.python_version()}, torch {torch.__version__}, {machine}")
    print(f"medians of {ROUNDS} rounds; {LAYERS} layers of {HEADS} heads of width {WIDTH}, float32, one image\n")
    print(
        f"{'':9}{'':28}{'seconds':>9}{'times as long':>15}{'MB above bare':>15}{'times as much':>15}{'MB in all':>11}"
    )
    for tokens, names in RUNS.items():
        _, bare, _ = measured("bare", tokens)
        first = None
        for name in names:
            seconds, peak, share = measured(name, tokens)
            first = first or (seconds, peak - bare, share)
            assert abs(share / first[2] - 1) < 1e-4, "the ways do not agree"
            print(
                f"{tokens if name == names[0] else '':<9}{name:28}{seconds:9.2f}{seconds / first[0]:15.1f}"
                f"{peak - bare:15.0f}{(peak - bare) / first[1]:15.1f}{peak:11.0f}"
            )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

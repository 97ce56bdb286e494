"""What it costs to watch the attention of a ViT-S while it is trained: a step in 50 is measured, the others are not.

    python benchmarks/training.py

timm's vit_small_patch16_224 (12 layers, 6 heads, 197 tokens, random weights), forward, backward and a step of AdamW on
8 images; `Monitor` with Entropy and Sink. One process; in each round a bare step, one within the `with` of a step that
is not measured and one of a step that is, in an order that changes. The ratios are of steps of the same round, whose
median stands for all: others use the machine. In a step that is not measured nothing runs but the `with` itself, which
is timed alone as well: how far such steps are from bare ones is the noise of the others' ratios too.
"""

from __future__ import annotations

import contextlib
import gc
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import timm
import torch

from visualizer.statistics import Entropy, Monitor, Sink

ROUNDS, WARM_UP, BATCH, EVERY = 40, 3, 8, 50
BARE, UNMEASURED, MEASURED = "bare", "within the monitor, not measured", "measured: entropy and sink"


def times() -> dict[str, list[float]]:
    """Seconds of each kind of step, by rounds."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, classes = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    monitor = Monitor(model, Entropy(), Sink(), every=EVERY)
    kinds = {BARE: contextlib.nullcontext, UNMEASURED: lambda: monitor(1), MEASURED: lambda: monitor(0)}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = list(kinds)
    for _ in range(ROUNDS + WARM_UP):
        order = order[1:] + order[:1]
        for kind in order:
            gc.collect()
            start = time.perf_counter()
            with kinds[kind]() as values:
                loss = torch.nn.functional.cross_entropy(model(images), classes)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            taken[kind].append(time.perf_counter() - start)
            assert len(values or ()) == (24 if kind == MEASURED else 0)
    return {kind: seconds[WARM_UP:] for kind, seconds in taken.items()}


def overhead_alone() -> float:
    """Seconds that the `with` of a step takes that is not measured, with nothing in it."""
    monitor = Monitor(torch.nn.Identity(), Entropy(), every=EVERY)
    count, rounds = 10_000, []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            with monitor(1):
                pass
        rounds.append((time.perf_counter() - start) / count)
    return min(rounds)


def main() -> None:
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    machine = f"{len(cpu)} x {''.join(cpu[:1])}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchmetrics"))
    print(f"CPython {platform.python_version()}, {versions}, {machine}")
    print(f"medians of {ROUNDS} alternating rounds; a training step of ViT-S/16, {BATCH} images\n")
    taken = times()
    ratio = {
        kind: statistics.median(one / bare for one, bare in zip(seconds, taken[BARE], strict=True))
        for kind, seconds in taken.items()
    }
    print(f"{'':36}{'ms a step':>10}{'x bare':>9}")
    for kind, seconds in taken.items():
        print(f"{kind:36}{statistics.median(seconds) * 1e3:10.1f}{ratio[kind]:9.3f}")
    measured, others = (ratio[MEASURED] - 1) / EVERY, (ratio[UNMEASURED] - 1) * (EVERY - 1) / EVERY
    alone = overhead_alone()
    print(f"\na step on average, one in {EVERY} measured: {measured:+.2%} for that one, {others:+.2%} for the others,")
    print(
        f"in which the `with` itself takes {alone * 1e6:.1f} us, {alone / statistics.median(taken[BARE]):.5%} of a step"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

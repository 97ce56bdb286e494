"""What it costs to have the maps of a fused ViT-S by attention(model): time and memory beside the bare pass.

    python benchmarks/attention.py

timm's vit_small_patch16_224 (12 layers, 6 heads, random weights), 8 images. Times: one process, the variants in turn,
round after round; medians over the rounds and the ratio to the bare fused pass. Memory: the peak of a fresh process for
each variant, three passes long, above that of the bare one (Linux). Query and key of all layers are 58 MB.
"""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from timm.layers import set_fused_attn

from visualizer import analysis, attention, capture

ROUNDS, BATCH = 15, 8


def make_model(fused: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    set_fused_attn(fused)
    return timm.create_model("vit_small_patch16_224").eval()


def with_attention(**options) -> Callable:
    def run(model, images):
        with attention(model, **options) as maps:
            model(images)
        assert len(maps) == (1 if "layers" in options else 12)
        return maps

    return run


def captured(model, images):
    with capture(model, "attn") as found:
        model(images)
    assert len(found) == 12
    return found


# Name -> whether the model is fused, and what is run.
VARIANTS: dict[str, tuple[bool, Callable]] = {
    "fused, bare": (True, lambda model, images: model(images)),
    "fused, attention(model)": (True, with_attention()),
    "fused, attention(model, layers=-1)": (True, with_attention(layers=-1)),
    "fused, attention(model, keep=row 0)": (True, with_attention(keep=lambda a: a.rows(0))),
    "fused, attention(model, keep=entropy)": (True, with_attention(keep=analysis.entropy)),
    "unfused, bare": (False, lambda model, images: model(images)),
    'unfused, capture(model, "attn")': (False, captured),
}


def times(models, images) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with torch.inference_mode():
        for _ in range(ROUNDS + 2):
            for name, (fused, run) in VARIANTS.items():
                gc.collect()
                start = time.perf_counter()
                kept = run(models[fused], images)
                taken[name].append(time.perf_counter() - start)
                del kept
    return {name: statistics.median(values[2:]) for name, values in taken.items()}


def peak_of(name: str) -> float:
    """The peak memory in MB of a fresh process that runs one variant."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    images = torch.randn(BATCH, 3, 224, 224)
    if sys.argv[1:]:
        fused, run = VARIANTS[sys.argv[1]]
        model = make_model(fused)
        with torch.inference_mode():
            for _ in range(3):
                kept = run(model, images)
        del kept
        # Not getrusage, whose peak a process inherits from the one that started it.
        print(next(int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith("VmHWM")) / 1000)
        return
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    machine = f"{len(cpu)} x {''.join(cpu[:1])}, {torch.get_num_threads()} threads"
    print(f"CPython {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, {machine}")
    print(f"medians of {ROUNDS} alternating rounds; ViT-S/16, {BATCH} images\n")
    medians = times({fused: make_model(fused) for fused in (True, False)}, images)
    peaks = {name: peak_of(name) for name in VARIANTS}
    print(f"{'':40}{'ms a pass':>10}{'x bare':>9}{'peak MB above bare':>21}")
    for name, median in medians.items():
        ratio = median / medians["fused, bare"]
        print(f"{name:40}{median * 1e3:10.1f}{ratio:9.3f}{peaks[name] - peaks['fused, bare']:21.0f}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

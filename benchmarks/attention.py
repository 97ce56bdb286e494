"""What it costs to have the maps of a fused ViT-S by attention(model): time and memory beside the bare pass.

    python benchmarks/attention.py
    python benchmarks/attention.py generation [steps]

timm's vit_small_patch16_224 (12 layers, 6 heads, random weights), 8 images. Times: a process for each variant, in which
it and the bare fused pass take turns; the median of what a round took, and of its ratio to the bare pass of that round,
with the quartiles. In one process for all of them the memory that one leaves behind changed the times of the next. All
of it twice: as is, and with a C allocator that keeps what is freed: the usual one may hand memory of the model's own
back and fetch it anew, in one process often and in the next not at all. Memory: the peak of a fresh process for each
variant, three passes long, above that of the bare one (Linux). Query and key of all layers are 58 MB.

The second command has a small Llama of random weights and SmolLM2-135M generate, 500 steps unless told otherwise, plain
and recorded in turn. `IMAGES=1` has the first take one image in place of eight.
"""

from __future__ import annotations

import gc
import json
import os
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
from visualizer.intercept import operators, snapshots

ROUNDS, BATCH = 15, int(os.environ.get("IMAGES", 8))


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


def watched_in_full(run: Callable) -> Callable:
    """As recording, without plans: what is more is the share of the mode, and of following each function."""

    def made(*args):
        are_seen, operators.are_seen = operators.are_seen, lambda: False
        try:
            return run(*args)
        finally:
            operators.are_seen = are_seen

    return made


def without_proof(run: Callable) -> Callable:
    """As recording, without the proof that each map is the one that was used: what is less is its share."""

    def made(*args):
        proofs = snapshots.of_fused, snapshots.of_plain
        snapshots.of_fused = snapshots.of_plain = lambda *_: None
        try:
            return run(*args)
        finally:
            snapshots.of_fused, snapshots.of_plain = proofs

    return made


def captured(model, images):
    with capture(model, "attn") as found:
        model(images)
    assert len(found) == 12
    return found


# Name -> whether the model is fused, and what is run.
VARIANTS: dict[str, tuple[bool, Callable]] = {
    "fused, bare": (True, lambda model, images: model(images)),
    "fused, attention(model)": (True, with_attention()),
    "fused, the same without its proof": (True, without_proof(with_attention())),
    "fused, the same watched in full": (True, watched_in_full(with_attention())),
    "fused, attention(model, layers=-1)": (True, with_attention(layers=-1)),
    "fused, attention(model, keep=row 0)": (True, with_attention(keep=lambda a: a.rows(0))),
    "fused, attention(model, keep=entropy)": (True, with_attention(keep=analysis.entropy)),
    "unfused, bare": (False, lambda model, images: model(images)),
    'unfused, capture(model, "attn")': (False, captured),
}


def times(name: str, images: torch.Tensor) -> list[float]:
    """Milliseconds a pass, and the lower quartile, the median and the upper quartile of the ratio to the bare pass."""
    fused, run = VARIANTS[name]
    bare, model = make_model(True), make_model(fused)
    taken: tuple[list[float], list[float]] = [], []
    with torch.inference_mode():
        for _ in range(ROUNDS + 3):
            for values, one, variant in zip(taken, (bare, model), (VARIANTS["fused, bare"][1], run), strict=True):
                gc.collect()
                start = time.perf_counter()
                kept = variant(one, images)
                values.append(time.perf_counter() - start)
                del kept
    ratios = [own / other for other, own in zip(taken[0][3:], taken[1][3:], strict=True)]
    return [statistics.median(taken[1][3:]) * 1e3, *statistics.quantiles(ratios, n=4)]


def small_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def smollm() -> torch.nn.Module:
    from visualizer import models

    model, _ = models.smollm2()
    model.set_attn_implementation("sdpa")
    return model


def generation(steps: int, rounds: int = 3) -> None:
    """What recording costs models that generate: processor time of runs in turn, and what each map takes."""
    torch.manual_seed(0)
    prompt = torch.randint(0, 100, (1, 16))
    options = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def plain(model):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    def recorded(model):
        with attention(model) as maps:
            plain(model)
        return maps

    for make in (small_llama, smollm):
        model = make()
        variants = {
            "plain": plain,
            "recorded": recorded,
            "the same without its proof": without_proof(recorded),
            "watched in full": watched_in_full(recorded),
        }
        taken: dict[str, list[float]] = {name: [] for name in variants}
        calls = len(recorded(model))
        for _ in range(rounds):
            for name, run in variants.items():
                gc.collect()
                start = time.process_time()
                kept = run(model)
                taken[name].append(time.process_time() - start)
                del kept
        print(f"{make.__name__}, {steps} steps, {calls} maps")
        bare = statistics.median(taken["plain"])
        for name, values in taken.items():
            middle = statistics.median(values)
            print(f"  {name:30}{middle:8.2f} s, x {middle / bare:.2f}, {(middle - bare) / calls * 1e6:6.0f} us a map")


def in_a_fresh_process(*what: str, keeps_memory: bool = False) -> str:
    """What this script prints when it is asked for a part of its work."""
    never = {f"MALLOC_{name}_THRESHOLD_": "4000000000" for name in ("TRIM", "MMAP")}
    command = [sys.executable, __file__, *what]
    environment = os.environ | (never if keeps_memory else {})
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()[-1]


def main() -> None:
    if sys.argv[1:2] == ["generation"]:
        generation(int(sys.argv[2]) if len(sys.argv) > 2 else 500)
        return
    images = torch.randn(BATCH, 3, 224, 224)
    if sys.argv[1:2] == ["times"]:
        print(json.dumps(times(sys.argv[2], images)))
        return
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
    print(f"medians of {ROUNDS} alternating rounds; ViT-S/16, {BATCH} images")
    print("kept: with an allocator that hands no memory back to the system (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_...)")
    print("MB: the peak above bare\n")
    bare, peaks = "fused, bare", {name: float(in_a_fresh_process(name)) for name in VARIANTS}
    columns = f"{'x bare':>9}{'quartiles':>14}"
    print(f"{'':40}{'ms a pass':>10}{columns}{'kept: ms':>11}{columns}{'MB':>6}")
    for name in VARIANTS:
        line = f"{name:40}"
        for width, keeps_memory in ((10, False), (11, True)):
            own, low, middle, high = json.loads(in_a_fresh_process("times", name, keeps_memory=keeps_memory))
            line += f"{own:{width}.1f}{middle:9.3f}{low:8.3f}-{high:.3f}"
        print(f"{line}{peaks[name] - peaks[bare]:6.0f}", flush=True)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

"""What it costs to have the maps of a fused ViT-S by attention(model): time and memory beside the bare pass.

    python benchmarks/attention.py
    python benchmarks/attention.py generation [steps]

timm's vit_small_patch16_224 (12 layers, 6 heads, random weights), 8 images. Times: one process, the variants in turn,
round after round; medians over the rounds and the ratio to the bare fused pass. All of it twice: as is, and with a C
allocator that keeps what is freed. For whatever a process holds on to between passes makes the usual one hand memory
back and fetch it anew, which costs more than the copies do. Memory: the peak of a fresh process for each variant, three
passes long, above that of the bare one (Linux). Query and key of all layers are 58 MB.

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
        proof, snapshots.of_fused = snapshots.of_fused, lambda *_: None
        try:
            return run(*args)
        finally:
            snapshots.of_fused = proof

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


def in_a_fresh_process(what: str, keeps_memory: bool = False) -> str:
    """What this script prints when it is asked for a part of its work."""
    never = {f"MALLOC_{name}_THRESHOLD_": "4000000000" for name in ("TRIM", "MMAP")}
    command = [sys.executable, __file__, what]
    environment = os.environ | (never if keeps_memory else {})
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()[-1]


def main() -> None:
    if sys.argv[1:2] == ["generation"]:
        generation(int(sys.argv[2]) if len(sys.argv) > 2 else 500)
        return
    images = torch.randn(BATCH, 3, 224, 224)
    if sys.argv[1:] == ["times"]:
        print(json.dumps(times({fused: make_model(fused) for fused in (True, False)}, images)))
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
    print("kept: with an allocator that hands no memory back to the system (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_...)\n")
    usual, kept = (json.loads(in_a_fresh_process("times", keeps)) for keeps in (False, True))
    peaks = {name: float(in_a_fresh_process(name)) for name in VARIANTS}
    bare = "fused, bare"
    print(f"{'':40}{'ms a pass':>10}{'x bare':>9}{'kept: ms':>11}{'x bare':>9}{'peak MB above bare':>21}")
    for name in VARIANTS:
        print(
            f"{name:40}{usual[name] * 1e3:10.1f}{usual[name] / usual[bare]:9.3f}"
            f"{kept[name] * 1e3:11.1f}{kept[name] / kept[bare]:9.3f}{peaks[name] - peaks[bare]:21.0f}"
        )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

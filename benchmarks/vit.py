"""What it costs to have all 12 maps of a ViT-S: time and memory, beside the other ways to get them.

    python benchmarks/vit.py

transformers' ViT (12 layers, 6 heads, width 384, random weights, eager attention), 8 images of 224 x 224. Times: one
process, the variants in turn, round after round; medians over the rounds, and of the ratios to the bare pass and to the
hooks of the same round. Memory: the peak of a fresh process for each variant, three passes long, above that of the bare
one (Linux).
"""

from __future__ import annotations

import gc
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel

from visualizer import capture

ROUNDS, BATCH = 21, 8
HOOKS = "forward hooks, copied to numpy"


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    config._attn_implementation = "eager"
    return ViTModel(config, add_pooling_layer=False).eval()


def captured(keep: str) -> Callable:
    def run(model, images):
        with capture([layer.attention for layer in model.layers], "attn_weights", keep=keep) as found:
            model(images)
        assert all(len(values) == 1 for values in found.values())
        return found

    return run


def hooks(model, images):
    """Forward hooks on the 12 attention modules, which happen to return their weights."""
    maps = []
    handles = [
        layer.attention.register_forward_hook(lambda module, args, output: maps.append(output[1].cpu().numpy().copy()))
        for layer in model.layers
    ]
    model(images)
    for handle in handles:
        handle.remove()
    assert len(maps) == 12
    return maps


def output_attentions(model, images):
    maps = model(images, output_attentions=True).attentions
    assert len(maps) == 12
    return maps


def with_torchlens(model, images):
    import torchlens

    return torchlens.trace(model, images)


def with_nnsight(model, images):
    import nnsight

    wrapped = nnsight.NNsight(model)
    with wrapped.trace(images):
        maps = nnsight.save([layer.attention.output[1] for layer in wrapped.layers])
    return maps


VARIANTS: dict[str, Callable] = {
    "bare": lambda model, images: model(images),
    'capture, keep="numpy"': captured("numpy"),
    'capture, keep="tensor"': captured("tensor"),
    'capture, keep="graph"': captured("graph"),
    HOOKS: hooks,
    "transformers' output_attentions": output_attentions,
}
if importlib.util.find_spec("torchlens"):
    VARIANTS["torchlens"] = with_torchlens
if importlib.util.find_spec("nnsight"):
    VARIANTS["nnsight"] = with_nnsight


def times(model, images) -> dict[str, list[float]]:
    """The seconds of each round."""
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with torch.inference_mode():
        for _ in range(ROUNDS + 2):
            for name, run in VARIANTS.items():
                gc.collect()
                start = time.perf_counter()
                kept = run(model, images)
                taken[name].append(time.perf_counter() - start)
                del kept
    return {name: values[2:] for name, values in taken.items()}


def ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def peak_of(name: str) -> float:
    """The peak memory in MB of a fresh process that runs one variant."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    model, images = make_model(), torch.randn(BATCH, 3, 224, 224)
    if sys.argv[1:]:
        with torch.inference_mode():
            for _ in range(3):
                kept = VARIANTS[sys.argv[1]](model, images)
        del kept
        # Not getrusage, whose peak a process inherits from the one that started it.
        print(next(int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith("VmHWM")) / 1000)
        return
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    packages = [name for name in ("torch", "transformers", "torchlens", "nnsight") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    machine = f"{len(cpu)} x {''.join(cpu[:1])}, {torch.get_num_threads()} threads"
    print(f"CPython {platform.python_version()}, {versions}, {machine}")
    print(f"medians of {ROUNDS} alternating rounds; ViT-S/16, {BATCH} images, 12 maps of 6 heads: 90 MB\n")
    taken, peaks = times(model, images), {name: peak_of(name) for name in VARIANTS}
    print(f"{'':36}{'ms a pass':>10}{'x bare':>9}{'x hooks':>9}{'peak MB above bare':>21}")
    for name, seconds in taken.items():
        ratios = f"{ratio(seconds, taken['bare']):9.3f}{ratio(seconds, taken[HOOKS]):9.3f}"
        print(f"{name:36}{statistics.median(seconds) * 1e3:10.1f}{ratios}{peaks[name] - peaks['bare']:21.0f}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()

"""What capturing all maps of a ViT-S costs on a GPU: queued copies beside copies that the model waits for.

    python benchmarks/gpu_copies.py

One process, the variants in turn, round after round; medians over the rounds in milliseconds a forward pass, until the
device has finished and, where maps are captured, until they can be read; and the ratio to the bare pass.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext

import torch

from visualizer import capture
from visualizer.models import VisionTransformer

ROUNDS, BATCH, PASSES = 15, 8, 4


def main() -> None:
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing to measure")
        return
    torch.manual_seed(0)
    model = VisionTransformer(patch=16, width=384, depth=12, heads=6, hidden=1536, grid=14).cuda().eval()
    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    variants = {
        "bare": nullcontext,
        'capture, keep="numpy": copies queued': lambda: capture(model, "attn"),
        "capture, .cpu() in place": lambda: capture(model, "attn", keep=lambda attn: attn.cpu()),
        'capture, keep="tensor": copies on the device': lambda: capture(model, "attn", keep="tensor"),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, make in variants.items():
                with make() as found:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(PASSES):
                        model(images)
                    if found is not None:
                        found.fetch()
                    torch.cuda.synchronize()
                    times[name].append((time.perf_counter() - start) / PASSES * 1e3)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ViT-S/16, batch {BATCH}, 12 maps of 6 heads\n")
    for name, median in medians.items():
        print(f"{name:46} {median:8.2f} ms   x {median / medians['bare']:.2f}")


if __name__ == "__main__":
    main()

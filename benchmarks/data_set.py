"""What statistics over a data set cost: beside the bare forward pass, beside keeping the maps, and by two processes.

    python benchmarks/data_set.py

timm's vit_small_patch16_224 (12 layers, 6 heads, 197 tokens, random weights, fused attention), 8 images a batch.

- Time: one process, the variants in turn, round after round; medians over the rounds and the ratio to the bare pass.
- Memory: the peak of a fresh process for each variant over 1 and over 6 batches, above the bare one's (Linux). Kept are
  the weights themselves, as a study after the run would need them.
- Processes: `collect` over the same batches by one process and by two, one thread each.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import timm
import torch

from visualizer import attention
from visualizer.statistics import Distance, Entropy, collect

ROUNDS, BATCH, BATCHES = 9, 8, 6


def make_model():
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224").eval()


def bare(model, batches):
    with torch.no_grad():
        for batch in batches:
            model(batch)


def collected(model, batches):
    return collect(model, batches, Distance(patch_size=16), Entropy(), progress=False)


def kept(model, batches):
    with torch.no_grad(), attention(model, keep=lambda layer: layer.dense(), max_bytes=2**40) as maps:
        for batch in batches:
            model(batch)
    return maps


VARIANTS = {"bare": bare, "collect(Distance, Entropy)": collected, "every map kept": kept}


def times():
    model, batch = make_model(), torch.randn(1, BATCH, 3, 224, 224)
    taken = {name: [] for name in VARIANTS}
    for number in range(ROUNDS + 1):
        for name, run in VARIANTS.items():
            start = time.perf_counter()
            run(model, batch)
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in taken.items()}


def peak(name, batches):
    """In a fresh process: the peak of its memory in MB."""
    torch.set_num_threads(1)
    model = make_model()
    kept = VARIANTS[name](model, (torch.randn(BATCH, 3, 224, 224) for _ in range(batches)))
    # Not getrusage's: that has the peak of the process that started this one too.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(int(line.split()[1]) / 1000)
    del kept


def share(rank, ranks, folder):
    """One of several processes, in a fresh one: the seconds that `collect` takes, and the mean distances."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    model = make_model()
    batches = [torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(n)) for n in range(2 * BATCHES)]
    model(batches[0][:1])
    if ranks > 1:
        torch.distributed.barrier()
    start = time.perf_counter()
    found = collected(model, batches)
    taken = time.perf_counter() - start
    print(json.dumps([taken, found["distance"].mean.tolist()]))
    if ranks > 1:
        torch.distributed.destroy_process_group()


def in_fresh_processes(*calls):
    """What each of some processes that run at once prints."""
    commands = [[sys.executable, __file__, *map(str, call)] for call in calls]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main():
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        what, *arguments = sys.argv[1:]
        if what == "peak":
            peak(arguments[0], int(arguments[1]))
        else:
            share(int(arguments[0]), int(arguments[1]), arguments[2])
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchmetrics"))
    print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} cores, {platform.machine()}")
    for threads in (1, os.cpu_count()):
        torch.set_num_threads(threads)
        taken = times()
        print(f"\na batch of {BATCH}, {threads} thread(s)")
        for name, seconds in taken.items():
            print(f"  {name:<28} {1000 * seconds:8.1f} ms   {seconds / taken['bare']:.3f} x bare")
    print("\nmemory above the bare pass")
    for batches in (1, BATCHES):
        bare_peak, *peaks = (in_fresh_processes(("peak", name, batches))[0] for name in VARIANTS)
        for name, size in zip([*VARIANTS][1:], peaks, strict=True):
            print(f"  {name:<28} {batches} batch(es) {size - bare_peak:8.0f} MB")
    print(f"\n{2 * BATCHES} batches of {BATCH}, one thread a process")
    seconds, means = {}, {}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            done = in_fresh_processes(*(("share", rank, ranks, Path(folder)) for rank in range(ranks)))
        seconds[ranks] = max(taken for taken, _ in done)
        means[ranks] = torch.tensor(done[0][1])
        print(f"  {ranks} process(es) {seconds[ranks]:8.2f} s   {seconds[1] / seconds[ranks]:.2f} x as fast")
    print(f"  largest difference of the mean distances: {(means[1] - means[2]).abs().max():.1e} pixels")


if __name__ == "__main__":
    main()

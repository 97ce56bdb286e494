"""Processes that work together, for tests: `run(2, task)` gives what each made of it, or how it ended.

A server imports what all need and forks each process, so that one starts in no time. Started by torchrun, this file
collects its share of some batches.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn

from visualizer.statistics import (
    Confidence,
    Distance,
    Entropy,
    MeanMap,
    Moments,
    Patterns,
    PrefixMass,
    Received,
    Sink,
    collect,
)

TOKENS, WIDTH = 9, 4


class Look(nn.Module):
    """Attention without projections, softmax(scale x x'), of which numpy can say all by itself."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self, x):
        return F.scaled_dot_product_attention(x * self.scale, x, x, scale=1.0)


class Looking(nn.Module):
    """Layers that all see the same: (batch, heads, tokens, width)."""

    def __init__(self, *scales):
        super().__init__()
        self.layers = nn.ModuleList([Look(scale) for scale in scales or (0.5, 2.0)])
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x, attention_mask=None, input_ids=None):
        for layer in self.layers:
            layer(x)
        return x


def weights_of(x, scale):
    """What a `Look` attends to, in float64."""
    x = np.asarray(x, np.float64)
    raised = np.exp(scale * x @ x.swapaxes(-1, -2))
    return raised / raised.sum(-1, keepdims=True)


def texts(count, size=3, seed=0):
    """Batches of all that the statistics look at; the last tokens of some texts are padding."""
    random = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        x = random.normal(size=(size, 2, TOKENS, WIDTH)).astype(np.float32)
        lengths = random.integers(TOKENS - 3, TOKENS + 1, size)
        mask = torch.from_numpy((np.arange(TOKENS) < lengths[:, None]).astype(np.int64))
        ids = torch.from_numpy(random.integers(0, 4, (size, TOKENS)))
        batches.append({"x": torch.from_numpy(x), "attention_mask": mask, "input_ids": ids})
    return batches


def all_statistics():
    return [
        *(Confidence(), Distance((3, 3)), Entropy(), MeanMap(), Patterns(), PrefixMass(2), Received(), Sink()),
        Sink(3, name="third"),
    ]


@dataclass
class Facts:
    """What was collected, to be sent to another process."""

    moments: dict[str, Moments]
    paths: tuple
    samples: int
    batches: int
    failed: list


def facts(found):
    return Facts(dict(found), found.paths, found.samples, found.batches, found.failed)


def difference(one, other):
    """The largest between two collections, whose counts and the places of NaN are the same."""
    one, other = (facts(found) if hasattr(found, "keys") else found for found in (one, other))
    assert one.paths == other.paths
    assert (one.samples, one.batches) == (other.samples, other.batches)
    assert one.moments.keys() == other.moments.keys() != set()
    largest = 0.0
    for name, moments in one.moments.items():
        np.testing.assert_array_equal(moments.count, other.moments[name].count, name)
        for field in fields(Moments):
            mine, theirs = getattr(moments, field.name), getattr(other.moments[name], field.name)
            assert mine.size > 0
            np.testing.assert_array_equal(np.isnan(mine), np.isnan(theirs), f"{name}.{field.name}")
            largest = max(largest, float(np.nanmax(np.abs(mine - theirs), initial=0.0)))
    return largest


@dataclass
class Ended:
    """How a process ended."""

    value: Any = None
    error: BaseException | None = None
    """As far as it can be pickled: else a RuntimeError that tells it."""
    seconds: float = 0.0
    code: int | None = None
    """Its exit code; None: it hung, and was killed."""


_CONTEXT = multiprocessing.get_context("forkserver")


def run(count, task, *args, seconds=60.0, has_server=False):
    """What `count` processes make of `task(rank, *args)`, by their ranks; gloo joins them.

    With `has_server` the first of them holds their store, as without torchrun; else it is a file.
    """
    _CONTEXT.set_forkserver_preload(["ranks", "accelerate", "torch.distributed.fsdp"])
    with TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        if has_server:
            with socket.create_server(("127.0.0.1", 0)) as server:
                store = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        processes = [
            _CONTEXT.Process(target=_child, args=(rank, count, store, folder, task, args)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        deadline, found = time.monotonic() + seconds, []
        for rank, process in enumerate(processes):
            process.join(max(deadline - time.monotonic(), 0.1))
            code = process.exitcode
            if code is None:
                process.kill()
                process.join()
            file = Path(folder, f"{rank}.pickle")
            ended = pickle.loads(file.read_bytes()) if file.exists() else Ended()
            ended.code = code
            found.append(ended)
    return found


def values(*args, **kwargs):
    """What they made of it, where none of them failed."""
    found = run(*args, **kwargs)
    for ended in found:
        assert ended.error is None, repr(ended.error)
        assert 0 == ended.code
    return [ended.value for ended in found]


def _child(rank, count, store, folder, task, args):
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store, rank=rank, world_size=count)
    start, ended = time.monotonic(), Ended()
    try:
        ended.value = task(rank, *args)
    except BaseException as error:
        ended.error = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            ended.error = RuntimeError(f"{type(error).__name__}: {error}")
    ended.seconds = time.monotonic() - start
    Path(folder, f"{rank}.pickle.new").write_bytes(pickle.dumps(ended))
    os.replace(Path(folder, f"{rank}.pickle.new"), Path(folder, f"{rank}.pickle"))
    if ended.error is None:
        distributed.destroy_process_group()


class Failing(Looking):
    """From a call on it fails, or ends its process."""

    def __init__(self, good, how):
        super().__init__()
        self.good, self.how = good, how

    def forward(self, x, **kwargs):
        self.good -= 1
        if self.good < 0:
            if self.how == "dies":
                os._exit(7)
            if self.how == "interrupted":
                os.kill(os.getpid(), signal.SIGINT)
            raise ArithmeticError("no more of it" + 5000 * "\ud800\0 \n" * (self.how == "at length"))
        return super().forward(x, **kwargs)


def fresh(rank, folder):
    return facts(collect(Looking(), texts(9), *all_statistics(), timeout=5, checkpoint=folder, every=2))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    found = collect(Looking(), texts(7), *all_statistics(), checkpoint=folder / "run", every=2)
    found.save(folder / f"merged-{distributed.get_rank()}.safetensors")
    distributed.destroy_process_group()

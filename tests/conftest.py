"""What all tests share. Imported on bare interpreters too, where neither torch nor numpy nor matplotlib is there."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torchvision_schemas  # noqa: F401

TESTS = Path(__file__).resolve().parent

# In the background of a shell's script, Ctrl-C is ignored by all that is started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# In the environment, before anything is imported: the processes that tests start inherit it.
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on two cores a second thread makes the small models slower
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: some tests only wait for others to give up."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What is loaded stays: without it a full collection of garbage, which many tests make, takes far less time.

    From 3.14 on hypothesis asks which objects refer to its own, and those that are frozen do not count.
    """
    if sys.version_info < (3, 14):
        gc.collect()
        gc.freeze()


@pytest.fixture
def gl() -> Iterator[Any]:
    """A get_local of its own, switched off at the end."""
    from visualizer.instrument import GetLocal

    own = GetLocal()
    yield own
    own.deactivate()


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], str], None]:
    """Checks that the command says of wrong arguments what is wrong, in one line, with status 2."""

    def check(arguments: list[str], said: str) -> None:
        from visualizer import cli

        assert 2 == cli.main(arguments)
        printed = capsys.readouterr()
        assert "" == printed.out
        assert said in printed.err
        assert printed.err.startswith("visualizer: ")
        assert 1 == printed.err.count("\n")

    return check


# Weights that several files look at and none changes; each takes seconds to load.


@pytest.fixture(scope="session")
def dinov2():
    from visualizer import models

    return models.dinov2_small()


@pytest.fixture(scope="session")
def minilm():
    from visualizer import models

    return models.minilm()


@pytest.fixture(scope="session")
def smollm2():
    from visualizer import models

    return models.smollm2()


def pytest_itemcollected(item: pytest.Item) -> None:
    """What takes long to make is made in one process of those that run at a time, for all the tests that need it.

    Here, because xdist looks at the groups before `pytest_collection_modifyitems` of this file is called.
    """
    if item.path.name in WITH_RANKS:
        item.add_marker(pytest.mark.xdist_group("ranks"))
    for name in ("smollm2", "chromium", "demo"):
        if name in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(name))


WITH_RANKS = ("test_checkpoint.py", "test_collected.py", "test_heartbeat.py", "test_processes.py")
"""These start processes, from a server that takes seconds to start; most of the time they wait for one another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes a minute or more begins first: at the end only one process would be at work."""

    def rank(item: pytest.Item) -> int:
        groups = {mark.args[0] for mark in item.iter_markers("xdist_group")}
        long = (
            item.path.name in WITH_RANKS,
            item.path.name == "test_notebooks.py",
            "smollm2" in groups,
            "chromium" in groups,
        )
        return [*long, True].index(True)

    items.sort(key=rank)

"""Every notebook runs from top to bottom, in a kernel of its own."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra")
nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LESS = {"05_spike_driven": ("epochs=3", "epochs=1"), "06_long_context": ("side = 1792", "side = 896")}
"""What takes minutes in some notebooks, and what does the same in seconds."""


def run(path: Path, long: str = "", short: str = "") -> None:
    text = path.read_text(encoding="utf-8")
    assert long in text
    notebook = nbformat.reads(text.replace(long, short) if long else text, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    run(path, *LESS.get(path.stem, ()))


@pytest.mark.long
@pytest.mark.parametrize("name", LESS)
def test_long_notebook_runs_as_it_is(name: str) -> None:
    run(NOTEBOOKS[0].with_stem(name))

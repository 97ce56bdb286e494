"""Every notebook runs from top to bottom, in a kernel of its own."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra")
nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LESS = {
    "02_any_model": {"max_new_tokens=40": "max_new_tokens=8"},
    "03_inspecting_vit": {"in range(20)": "in range(2)"},
    "05_spike_driven": {"epochs=3": "epochs=1", "order[:1437]": "order[:320]"},
    "06_long_context": {"side = 1792": "side = 560"},
}
"""What takes long in some notebooks, and what does the same in seconds."""


def run(path: Path, less: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for long, short in less.items():
        assert long in text
        text = text.replace(long, short)
    notebook = nbformat.reads(text, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    run(path, LESS.get(path.stem, {}))


@pytest.mark.long
@pytest.mark.parametrize("name", LESS)
def test_long_notebook_runs_as_it_is(name: str) -> None:
    run(NOTEBOOKS[0].with_stem(name), {})

"""The READMEs and the pages of docs keep their word: their Python runs, and what they point to is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_zh.md")
RUN = (
    *READMES,
    "docs/fused-attention.md",
    "docs/gallery.md",
    "docs/explorer.md",
    "docs/statistics.md",
    "docs/words.md",
)
PAGES = (*RUN, "docs/command-line.md", "docs/how-it-works.md")


def python_blocks(text: str) -> str:
    """The text with all but its ```python blocks blanked, so that a traceback's lines are the README's."""
    inside, lines = False, []
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        if fence:
            inside = not inside and line.strip() == "```python"
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_python_blocks_run_in_order(name: str, tmp_path: Path) -> None:
    code = python_blocks((ROOT / name).read_text(encoding="utf-8"))
    assert code.strip(), "no python block found"
    script = tmp_path / f"{Path(name).name}.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_inside_the_repository_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)", text)
    local = {target for pair in targets for target in pair if target and "://" not in target}
    assert [target for target in sorted(local) if not (ROOT / name).parent.joinpath(target).exists()] == []


def test_python_blocks_are_found_at_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = 2\n```\n"
    assert python_blocks(text).splitlines() == ["", "", "x = 1", "", "", "", "", "", "y = 2", ""]


def test_both_languages_have_the_same_python() -> None:
    """Apart from the comments, and the words that a picture is labelled with."""
    import ast

    trees = [ast.parse(python_blocks((ROOT / name).read_text(encoding="utf-8"))) for name in READMES]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                node.values = []
    english, chinese = map(ast.dump, trees)
    assert english == chinese


def test_the_gallery_shows_every_plot_with_its_own_picture() -> None:
    from visualizer import plot

    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(?:(?!```).)*?\bplot\.(\w+)\((?:(?!```).)*?```\s*!\[[^]]+\]\(([^)]+)\)", page, re.S)
    assert set(plot.__all__) == {name for name, _ in shown}
    assert len(shown) == len({picture for _, picture in shown})

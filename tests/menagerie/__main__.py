"""`python -m menagerie`: compares every architecture and writes docs/menagerie.md; goes on where it was stopped."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .page import PACKAGES, page

PAGE = Path("docs/menagerie.md")
SECONDS = 40
PATIENCE = 600
GIGABYTES = 10


def main() -> None:
    """Run what is asked for on the command line."""
    parser = argparse.ArgumentParser(prog="python -m menagerie", description=__doc__)
    parser.add_argument("only", nargs="*", help="library, or library:name, to run these alone; nothing: all")
    parser.add_argument("--results", type=Path, default=Path("build/menagerie.jsonl"), help="one line a model")
    parser.add_argument("--again", action="store_true", help="compare anew what was not exact")
    parser.add_argument("--page", action="store_true", help="only write the page, of the results up to now")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return
    wanted = specimens(options.only)
    if options.page:
        known = results(options.results)
        PAGE.write_text(page(known, len({*wanted} - {(one["library"], one["name"]) for one in known})))
        return
    done = {
        (one["library"], one["name"])
        for one in results(options.results)
        if f"{one['library']}:{one['name']}" not in options.only
        and not (options.again and (one["outcome"] not in ("exact", "none") or one.get("earlier")))
    }
    run([one for one in wanted if one not in done], options.results)
    if not options.only:
        PAGE.write_text(page(results(options.results)))


def results(path: Path) -> list[dict[str, Any]]:
    """What is known of each model: its last line."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = {(one["library"], one["name"]): one for one in map(json.loads, lines)}
    return list(found.values())


def library(name: str) -> Any:
    """The file with the builders of a library."""
    return importlib.import_module(f"menagerie.{name}_models")


def specimens(only: list[str]) -> list[tuple[str, str]]:
    """(library, name) of all that are to be compared."""
    wanted = []
    for one in only or PACKAGES:
        where, _, name = one.partition(":")
        wanted += [(where, name)] if name else [(where, each) for each in library(where).names()]
    return wanted


def run(wanted: list[tuple[str, str]], path: Path) -> None:
    """Have workers compare models one after another; a worker that hangs or dies is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    worker = None
    with path.open("a") as file:
        for number, (where, name) in enumerate(wanted):
            if worker is None or worker.poll() is not None:
                worker = _worker()
            began = time.monotonic()
            outcome = _ask(worker, where, name)
            if outcome is None:
                worker.kill()
                code = worker.wait()
                worker = None
                why = "took too long" if time.monotonic() - began > PATIENCE else f"ended the process ({code})"
                outcome = {"outcome": "not built", "why": why}
            line = {"library": where, "name": name, **outcome, "seconds": round(time.monotonic() - began, 1)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{number + 1}/{len(wanted)} {where}:{name} {_words(outcome)}", flush=True)
    if worker is not None:
        worker.stdin.close()
        worker.wait()


def _words(outcome: dict[str, Any]) -> str:
    return f"{outcome['outcome']} {outcome.get('why', '')} {outcome.get('reasons') or ''}"[:300]


def _worker() -> subprocess.Popen[str]:
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "menagerie", "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **offline},
    )


def _ask(worker: Any, where: str, name: str) -> dict[str, Any] | None:
    """A worker's answer about one model; None if it dies or hangs."""
    import select

    try:
        worker.stdin.write(f"{where} {name}\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if select.select([worker.stdout], [], [], 1)[0]:
            line = worker.stdout.readline()
            if not line:
                return None
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
    return None


def work() -> None:
    """Compare the models that are named on standard input."""
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30,) * 2)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for line in sys.stdin:
        where, name = line.split()
        print(json.dumps(compared(where, name)), file=out, flush=True)


class TookTooLong(BaseException):
    """A model took more than its time; nothing that a model does shall catch it."""


def compared(where: str, name: str) -> dict[str, Any]:
    """The outcome for one model."""
    from menagerie.judging import judge
    from menagerie.making import NotBuilt

    def end(*_: Any) -> None:
        raise TookTooLong

    importlib.import_module(where)  # takes seconds, which are not those of the first model
    signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, whatever else it is doing
    outcome: dict[str, Any] = {}
    is_built = False
    try:
        for how, model, call, answers in library(where).build(name):
            is_built = True
            outcome = {"how": how, **judge(model, call, answers)}
    except TookTooLong:
        return {"outcome": "not built", "why": f"took more than {SECONDS} s"}
    except Exception as error:
        is_known = isinstance(error, NotBuilt) or "HigherOrderOperator" in str(error)
        why = str(error) if is_known else f"{type(error).__name__}: {error}"
        return {"outcome": "failed" if is_built and not is_known else "not built", "why": why[:700]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    wrong = {reason for reason in outcome["reasons"] if not reason.startswith("(")}
    if wrong:
        return {"outcome": "wrong", **outcome}
    return {"outcome": "exact" if outcome["products"] else "none", **outcome}


if __name__ == "__main__":
    main()

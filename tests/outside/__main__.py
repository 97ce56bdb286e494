"""`python -m outside`: computes every figure from outside again and writes docs/outside.md; names run these alone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from . import proteins, reactions, references, speech  # noqa: F401  (they fill FIGURES)
from .figures import FIGURES
from .page import page

PAGE = Path(__file__).parents[2] / "docs" / "outside.md"


def main() -> int:
    """Run what is asked for on the command line; the number of figures that do not hold or could not be computed."""
    parser = argparse.ArgumentParser(prog="python -m outside", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(FIGURES)}; nothing: all")
    names = parser.parse_args().names or list(FIGURES)
    torch.set_num_threads(1)
    results = {}
    for name in names:
        figure, start = FIGURES[name], time.perf_counter()
        if figure.missing:
            print(f"{name}: not computed, {', '.join(figure.missing)} not installed")
            continue
        try:
            results[name] = figure.check()
        except AssertionError as error:
            print(f"{name}: DOES NOT HOLD: {error}")
        else:
            print(f"{name}: {results[name]} ({time.perf_counter() - start:.0f} s)")
    if results.keys() == FIGURES.keys():
        PAGE.write_text(page(results), encoding="utf-8")
    return len(names) - len(results)


if __name__ == "__main__":
    sys.exit(main())

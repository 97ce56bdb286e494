"""Writes docs/outside.md: every figure with its source, its command, its tolerance and what came out."""

from __future__ import annotations

from .figures import FIGURES
from .hub import COMMANDS, SMOLLM2

_HEAD = """# Right on what nobody here wrote

Most tests compare this package with itself, or with a model's own eager attention. Here are figures from outside:
numbers that others published, or that their own code computes, on real weights that packages carry (random ones where
the table says so). They are computed again, from the maps of `attention(model)` on fused models or from locals by
`capture`, for every change. `python -m outside` writes this page:

```bash
pip install ".[dev,outside]" && pip install --no-deps rxnmapper==0.4.3  # it asks for RDKit and an older transformers
PYTHONPATH=tests python -m outside          # all, in a minute; or: make outside
PYTHONPATH=tests python -m outside NAME     # one of the names below
```

| name | what is compared | with whose numbers | tolerance | result |
|---|---|---|---|---|
"""

_HUB = """
## With a model hub

These numbers are published too, but the models are on the Hugging Face hub only, which no machine of this project
reaches. **Nobody here has seen these commands succeed.** What they call is tested on other models. Each prints our
number, and below it the published one.

| command, behind `PYTHONPATH=tests python -m outside.hub` | published | whose |
|---|---|---|
"""

_COPYING = """
## Heads that copy, in SmolLM2

Nobody published such numbers for SmolLM2-135M, so there is nothing to agree with. By the code of the commands above,
its three best heads are:

| score | layer.head |
|---|---|
"""
_SCORES = {
    "induction": "induction, on random tokens, once and again",
    "real": "induction on a real text, Lincoln's address at Gettysburg (even attention: 0.03)",
    "retrieval": "retrieval of a sentence hidden in that text, at three depths",
}


def page(results: dict[str, str]) -> str:
    """The page for the results of all figures."""
    commands = "".join(f"| `{one.line}` | {one.published} | {one.source} |\n" for one in COMMANDS)
    scores = "".join(
        f"| {words} | {', '.join(f'{layer}.{head} {value:.2f}' for (layer, head), value in SMOLLM2[score].items())} |\n"
        for score, words in _SCORES.items()
    )
    rows = "".join(row(name, results[name]) for name in sorted(results))
    return _HEAD + rows + _HUB + commands + _COPYING + scores


def row(name: str, result: str) -> str:
    """The line of one figure."""
    one = FIGURES[name]
    return f"| {name} | {one.claim} | {one.source} | {one.tolerance} | {result} |\n"

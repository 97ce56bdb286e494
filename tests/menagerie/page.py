"""Writes docs/menagerie.md: every model with its outcome."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = {
    "transformers": "transformers",
    "timm": "timm",
    "torchvision": "torchvision",
    "diffusers": "diffusers",
    "open_clip": "open_clip_torch",
    "vit_pytorch": "vit-pytorch",
    "x_transformers": "x-transformers",
    "esm": "fair-esm",
}

_HEAD = """# The menagerie

Every attention architecture that eight libraries can build, small and with random weights, compared with an independent
reading of the same calls. `make menagerie` makes this page. It was made with {versions}.

The reading sees torch's operators, below the functions that `attention(model)` looks at, with every fused kernel taken
apart. It notes each softmax of scores and the product of its weights with the values. A second run puts numbers in the
place of such a product; what the next linear layer is given tells which axes are heads and which are batch.

**Exact** means, for every such product of the model: a map has its numbers (to 2e-5), its axes (batch, heads, queries,
keys) and its kind, no map is there besides, and the model's output is the same as without recording. The reading tells
the kind by the linear layers that made query and key: of one input they are "self", of inputs without a common origin
"cross"; of different inputs with a common origin it cannot tell, and either counts. Where the model's own code returns
its weights (`output_attentions`), the maps were compared with these too: the column *own* has how many of them were
found, of how many.

| library | models | exact | not exact | no attention by softmax | could not be compared |
|---|---|---|---|---|---|
"""


def page(results: list[dict[str, Any]], missing: int = 0) -> str:
    """The page for some results, and for how many models there are none yet."""
    by_library: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        by_library.setdefault(one["library"], []).append(one)
    order = [name for name in PACKAGES if name in by_library]
    text = _HEAD.format(versions=", ".join(map(_version, ["torch", *order])))
    total: Counter[str] = Counter()
    for name in order:
        count = Counter(one["outcome"] for one in by_library[name])
        total.update(count)
        text += _counts(PACKAGES[name], count)
    text += _counts("all", total)
    if missing:
        text += f"\n**{missing} more models have not been compared yet.**\n"
    earlier = sum(one.get("earlier", False) for one in results)
    if earlier:
        text += f"\n**{earlier} rows, marked *earlier*, are those of an earlier state of the package.**\n"
    text += "\n" + _share(results) + "\n" + _why(results)
    for name in order:
        text += (
            f"\n## {PACKAGES[name]}\n\n| model | called | outcome | maps | kinds | own |\n|---|---|---|---|---|---|\n"
        )
        text += "".join(_row(one) for one in sorted(by_library[name], key=lambda one: one["name"].lower()))
    return text


def _version(name: str) -> str:
    try:
        return f"{PACKAGES.get(name, name)} {version(PACKAGES.get(name, name)).partition('+')[0]}"
    except PackageNotFoundError:
        return PACKAGES.get(name, name)


def _counts(name: str, count: Counter[str]) -> str:
    lost, wrong = count["not built"], count["wrong"] + count["failed"]
    return f"| {name} | {count.total()} | {count['exact']} | {wrong} | {count['none']} | {lost} |\n"


def _share(results: list[dict[str, Any]]) -> str:
    """How many are exact of those that can be compared."""
    read = [one for one in results if one["outcome"] in ("exact", "wrong", "failed")]
    own = [one for one in read if (answers := one.get("answers", {})).get("found", 0) + answers.get("differs", 0)]
    parts = []
    for those, words in ((read, "models whose attention the reading sees"), (own, "whose own code returns weights")):
        exact = sum(one["outcome"] == "exact" for one in those)
        parts.append(f"{exact} of the {len(those)} {words} are exact ({100 * exact / max(1, len(those)):.1f} %)")
    return "; ".join(parts) + ".\n"


def _why(results: list[dict[str, Any]]) -> str:
    """What is not exact, by its kind."""
    kinds: dict[str, list[str]] = {}
    for one in results:
        for reason in one.get("reasons", {}) if one["outcome"] == "wrong" else ():
            if not reason.startswith("("):
                kinds.setdefault(kind_of_reason(reason), []).append(one["name"])
    if not kinds:
        return ""
    text = "| what is not exact | models |\n|---|---|\n"
    for kind, names in sorted(kinds.items(), key=lambda pair: -len(set(pair[1]))):
        text += f"| {kind} | {', '.join(sorted(set(names)))} |\n"
    return text


def kind_of_reason(reason: str) -> str:
    """A reason without its numbers."""
    if reason.startswith("kind"):
        return reason
    if reason.startswith("own"):
        return "what its own code returns is not among the maps"
    for begin in ("axes", "numbers", "no map", "the output changes"):
        if reason.startswith(begin):
            return begin + (", which the map says" if "assumed" in reason else "")
    return "a map that the reading has not"


def _row(one: dict[str, Any]) -> str:
    outcome, mark = one["outcome"], " (earlier)" if one.get("earlier") else ""
    if outcome in ("not built", "failed"):
        what = "could not be compared" if outcome == "not built" else "fails"
        return f"| {one['name']} | | {what}{mark}: {_cell(one['why'])} | | | |\n"
    reasons = [reason for reason in one["reasons"] if not reason.startswith("(")]
    asides = [reason[1:-1] for reason in one["reasons"] if reason.startswith("(")]
    words = {"exact": "exact", "none": "no softmax of scores", "wrong": "; ".join(reasons)}[outcome] + mark
    if asides:
        words += f" ({'; '.join(asides)})"
    own = one["answers"]
    count = own.get("found", 0) + own.get("differs", 0)
    kinds = ", ".join(f"{number} {kind}" for kind, number in one["kinds"].items()).replace("None", "unknown")
    shown = f"{own.get('found', 0)} of {count}" if count else ""
    return f"| {one['name']} | {_cell(one['how'])} | {_cell(words)} | {one['maps']} | {kinds} | {shown} |\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")[:240]

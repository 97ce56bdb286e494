"""The figure of README, from what the other scripts printed: per_call.txt and vit.txt beside this file.

python benchmarks/figure.py [assets/cost.png]
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

HERE = Path(__file__).parent
OURS, OTHERS = "#1f6fb2", "#b8bec6"


def rows_of(text: str) -> dict[str, list[float]]:
    """Label -> numbers, of the first table in a text: rows are a label, two spaces and numbers."""
    rows: dict[str, list[float]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(\S.*?)\s{2,}(-?[\d.]+(?:\s+-?[\d.]+)*)", line):
            rows.setdefault(match[1], [float(number) for number in match[2].split()])
    return rows


def bars(axes: Axes, values: dict[str, float], unit: str, title: str) -> None:
    names = list(values)[::-1]
    colours = [OURS if name.startswith(("get_local", "capture")) else OTHERS for name in names]
    drawn = axes.barh(names, [values[name] for name in names], color=colours)
    axes.bar_label(drawn, [f"{values[name]:{unit}}" for name in names], padding=3, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.margins(x=0.14)


def main() -> None:
    per_call, vit = ((HERE / name).read_text() for name in ("per_call.txt", "vit.txt"))
    calls, passes = rows_of(per_call.split("\n\nCPython")[0]), rows_of(vit)
    plain = ("bare", "nn.Module, bare", "nn.Module, forward hook")
    above = {name: max(row[1], 0) for name, row in calls.items() if name not in plain}
    above["nn.Module, forward hook"] = calls["nn.Module, forward hook"][0] - calls["nn.Module, bare"][0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), layout="constrained")
    bars(left, above, ",.0f", "One call of an empty function: ns above bare")
    left.set_xscale("symlog", linthresh=10)
    left.set_xlim(0, 30_000)
    ratios = {name: row[1] for name, row in passes.items()}
    bars(right, ratios, ".2f", "A ViT-S pass with all 12 maps kept: × bare")
    for axes, text in ((left, per_call), (right, vit)):
        axes.set_xlabel(textwrap.fill(text.splitlines()[0], 66), fontsize=7, color="#666666")
    figure.savefig(sys.argv[1] if sys.argv[1:] else HERE.parent / "assets" / "cost.png", dpi=150)


if __name__ == "__main__":
    main()

"""`visualizer plot`: a picture of a saved file's maps."""

from __future__ import annotations

import argparse
import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import did_you_mean
from .outcome import Mistake, destination, save, warnings_as_lines
from .saved import add_choice, as_options, choose, grid_of, has_words, picture_of, read, tokens_of, whole_number

if TYPE_CHECKING:
    from ..statistics import Collected

KINDS = {
    "head": "one head's matrix",
    "heads": "all heads of a layer",
    "layers": "all layers, a row of heads each; with --head or --query one map of each",
    "query": "what the patch --query ROW,COLUMN attends to, over the --image",
    "class-token": "what the class token attends to, over the --image",
    "tokens": "a head's matrix with the words at its sides",
    "rollout": "what the class token, or --query, gets from all layers",
    "distance": "how far each head looks, in patches",
    "entropy": "how broadly each head looks",
    "patterns": "what each head of a text model does",
}
_OPTIONS = ("layer", "head", "batch", "query", "grid", "image", "sinks", "style", "cmap", "title")


def arguments(plot: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    plot.epilog = "\n".join(["kinds:", *(f"  {kind:12} {about}" for kind, about in KINDS.items())])
    add_choice(plot)
    plot.add_argument("--kind", default="heads", metavar="KIND", help="one of those below; default: heads")
    plot.add_argument("--layer", type=_choice, metavar="N", help="0 is the first, -1 the last; or mean, max, min")
    plot.add_argument("--head", type=_choice, metavar="N", help="a number, mean, max or min, as for --layer")
    plot.add_argument("--batch", type=_choice, metavar="N", help="which image or text; default: the first")
    plot.add_argument(
        "--query", type=_query, metavar="WHICH", help="a patch as ROW,COLUMN, a token's number, or a word"
    )
    plot.add_argument("--grid", type=grid_of, metavar="ROWSxCOLUMNS", help="of patches; default: a square")
    plot.add_argument("--style", choices=("overlay", "mask"), help="how weights lie over the --image")
    plot.add_argument("--cmap", metavar="NAME", help="a colour map of matplotlib, such as viridis or gray_r")
    plot.add_argument("--title", help="what to write above the picture")
    plot.add_argument(
        "--dpi", type=whole_number(10, 2400), default=150, metavar="N", help="of a PNG; default: %(default)s"
    )
    plot.add_argument("-o", "--out", metavar="FILE", help="the picture: .png, .svg, .pdf; default: KIND.png")


def _choice(text: str) -> int | str:
    words = "mean", "max", "min"
    if text in words:
        return text
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number, mean, max or min{did_you_mean(words, text)}")


def _query(text: str) -> int | tuple[int, ...] | str:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"\d+,\d+", text):
        return tuple(map(int, text.split(",")))
    return text


def main(options: argparse.Namespace) -> None:
    """Draw the maps of a saved file.

    --kind is one of those below, or a statistic that visualizer stats saved: visualizer stats --help lists them.
    """
    path = destination(options.out or f"{options.kind}.png", "png")
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    results: Any = read(options.file)
    image = picture_of(options.image)
    keywords = {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
    if image is not None:
        keywords["image"] = image
    import matplotlib

    matplotlib.use("agg")  # there may be no screen
    if options.cmap is not None and options.cmap not in matplotlib.colormaps:
        hint = did_you_mean(matplotlib.colormaps, options.cmap)
        raise Mistake(f"argument --cmap: matplotlib has no colour map {options.cmap!r}{hint}")
    if results.saved().kind == "statistics":
        draw, accepted = _of_statistics(options.kind, results, keywords)
    elif options.kind in KINDS:
        draw, accepted = _of_maps(options.kind, choose(results, options), tokens_of(results, options), keywords)
    else:
        raise Mistake(
            f"argument --kind: invalid choice: {options.kind!r}: {options.file} has maps, not statistics (choose from "
            f"{', '.join(KINDS)}){did_you_mean(KINDS, options.kind)}"
        )
    for name in keywords if options.tokens is None else {**keywords, "tokens": options.tokens}:
        if name not in accepted:
            others = ", ".join(f"--{name}" for name in (*_OPTIONS, "tokens") if name in accepted)
            raise Mistake(f"--kind {options.kind} has no use for --{name}; it takes {others}")
    try:
        with warnings_as_lines():
            drawn = draw()
            save(getattr(drawn, "figure", drawn), path, options.dpi)
    except (ValueError, TypeError, LookupError) as error:
        raise Mistake(as_options(str(error))) from error
    print(path)


def _of_maps(
    kind: str, maps: list[Any], tokens: list[str] | None, keywords: dict[str, Any]
) -> tuple[Callable[[], Any], set[str]]:
    """A function that draws maps as this kind of picture, and the options that the kind accepts."""
    from .. import plot

    if kind in ("distance", "entropy", "patterns"):
        accepted = {"title", {"distance": "grid", "patterns": "tokens"}.get(kind, "title")}
        return functools.partial(_measured, kind, maps, tokens, **keywords), accepted
    function = getattr(plot, kind.replace("-", "_"))
    if kind == "tokens":
        if tokens is None and not any(has_words(one) for one in maps):
            raise Mistake("--kind tokens needs the words: --tokens The cat sat (the file has none)")
        keywords = {**keywords, "tokens": tokens}
    if kind == "query" and "query" not in keywords:
        raise Mistake("--kind query needs --query: a patch as ROW,COLUMN, a token's number, or a word")
    accepted = set(inspect.signature(function).parameters)
    if kind == "query" and isinstance(keywords["query"], str):
        keywords, accepted = {**keywords, "query_tokens": tokens}, accepted | {"tokens"}
    return functools.partial(function, maps, **keywords), accepted


def _measured(kind: str, maps: list[Any], tokens: list[str] | None, grid: Any = None, title: str | None = None) -> Any:
    import torch

    from .. import analysis, plot

    if kind == "patterns":
        return plot.patterns(analysis.head_patterns(maps, tokens), title=title)
    if kind == "distance":
        return plot.distance(analysis.attention_distance(maps, grid), unit="patches", title=title)
    means = torch.as_tensor(analysis.entropy(maps)).nanmean(-1)  # without queries that attend to nothing
    ax = plot.distance(means, title=title)  # a dot for each head, as for distances
    ax.set_ylabel("mean entropy (nats)")
    return ax


def _of_statistics(kind: str, statistics: Collected, keywords: dict[str, Any]) -> tuple[Callable[[], Any], set[str]]:
    """A function that draws a statistic, and the options that it accepts."""
    from .. import plot

    name = kind.replace("-", "_")
    if name not in statistics:
        kinds = ", ".join(f"--kind {name.replace('_', '-')}" for name in statistics)
        hint = did_you_mean((name.replace("_", "-") for name in statistics), kind)
        raise Mistake(f"the file has statistics, and none that --kind {kind} draws: there are {kinds}{hint}")
    accepted = {"title", "layer"} if statistics[name].mean.ndim == 4 else {"title"}  # 4 axes: maps
    return functools.partial(plot.statistic, statistics, name, **keywords), accepted

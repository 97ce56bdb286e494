"""A word over the picture that it looks at, or that was made of it: `words`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..reading import as_numbers
from .canvas import full_rows, lay_out, name_panels, panel_size, panels, write_title
from .pictures import overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..grounding import WordMaps

__all__ = ["words"]


def words(
    maps: WordMaps,
    words: str | int | Sequence[str | int],
    image: Any = None,
    *,
    picture: int = 0,
    layer: int | str | None = None,
    head: int | Literal["pointing"] | None = None,
    step: int | None = None,
    sample: int = 0,
    negative: bool = False,
    frame: int | None = None,
    sinks: Literal["keep", "remove"] = "keep",
    columns: int | None = None,
    ax: Axes | None = None,
    smooth: bool = True,
    style: Literal["overlay", "mask"] = "overlay",
    cmap: Any = "YlOrRd",
    cbar: bool = True,
    title: str | None = None,
) -> Axes | Figure:
    """How much a word and each patch of a picture attend to each other, over the picture; of several, a panel for each.

        plot.words(maps, "cat", picture)
        plot.words(maps, ["cat", "mat"], picture, layer=-1)

    Args:
        maps: what `word_maps` recorded.
        words: a word or phrase, the number of a token, or several of these.
        image: the picture that the model read or made; None: the weights alone.
        picture, layer, head, step, sample, negative, sinks: as in `WordMaps.of`. Sinks that were removed are hatched.
        frame: which frame of a video; None: the mean of all.
        columns: how many panels stand in a row; None: up to four.
        ax: where to draw one word; None: on a new figure.
        smooth, style, cmap, cbar: as in `query`.
        title: None: the word and the layer.

    Returns:
        The axes of one word; the figure of several.

    Raises what `WordMaps.of` raises; TypeError where `maps` is no WordMaps.
    """
    if not hasattr(maps, "of") or not hasattr(maps, "layers"):
        raise TypeError(f"maps is a {type(maps).__name__}: pass what visualizer.word_maps recorded")
    options: dict[str, Any] = {
        "picture": picture,
        "layer": layer,
        "head": head,
        "step": step,
        "sample": sample,
        "negative": negative,
    }
    where = _where(maps, layer, head, step) + (", sinks removed" if sinks == "remove" else "")

    def draw(word: str | int, ax: Axes | None) -> Axes:
        heat = as_numbers(maps.of(word, sinks=sinks, **options))
        if heat.ndim == 3:
            heat = heat.mean(0) if frame is None else heat[frame]
        label = "attention weight"
        return overlay(heat, image, ax=ax, smooth=smooth, style=style, cmap=cmap, cbar=cbar, label=label)

    if isinstance(words, (str, int)):
        ax = draw(words, ax)
        write_title(ax, title, f"{words!r}, {where}")
        return ax
    if not words:
        raise ValueError(f"words={words!r}: pass a word, or several")
    if ax is not None:
        raise ValueError("ax= takes one word; several have a figure of their own")
    heat = maps.of(words[0], **options)
    size = panel_size(heat.shape[-2:] if image is None else np.asarray(image).shape[:2], 2.2)
    columns = full_rows(len(words), columns, 4)
    figure, axes = panels(len(words), columns, size, has_bar=False, bars_below=cbar)
    for word, one in zip(words, axes, strict=True):
        draw(word, one)
    name_panels(axes, [repr(word) for word in words])
    write_title(figure, title, where)
    lay_out(figure)
    return figure


def _where(maps: WordMaps, layer: int | str | None, head: int | str | None, step: int | None) -> str:
    """Which layers, heads and steps are drawn, in words."""
    layers = maps.layers
    where = f"mean of {len(layers)} layers" if layer is None else f"layer {layer}"
    heads = "heads that point" if head == "pointing" else f"head {head}"
    parts = [where, *([] if head is None else [heads]), *([] if step is None else [f"step {step}"])]
    return ", ".join(parts)

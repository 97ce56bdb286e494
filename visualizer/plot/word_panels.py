"""A word over the picture that it looks at, or that was made of it: `words`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        frame: which frame of a video, counted from 0; None: the mean of all.
        columns: how many panels stand in a row; None: up to four.
        ax: where to draw one word; None: on a new figure.
        smooth, style, cmap, cbar: as in `query`.
        title: None: the word, and what of the maps is drawn.

    Returns:
        The axes of one word; the figure of several.

    Raises what `WordMaps.of` raises; TypeError where `maps` is no WordMaps; IndexError for a frame that is not there.
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
        "sinks": sinks,
    }
    several = [words] if isinstance(words, (str, int)) else list(words)
    if not several:
        raise ValueError(f"words={words!r}: pass a word, or several")
    if ax is not None and several != [words]:
        raise ValueError("ax= takes one word; several have a figure of their own")
    heats = [as_numbers(maps.of(word, **options)) for word in several]
    frames = len(heats[0]) if heats[0].ndim == 3 else None
    if frame is not None and not -(frames or 0) <= frame < (frames or 0):
        raise IndexError(f"frame={frame}: picture {picture} " + (f"has {frames} frames" if frames else "is no video"))
    if frames is not None:
        heats = [heat.mean(0) if frame is None else heat[frame] for heat in heats]
    where = ", ".join(_where(maps, options, frame, frames))

    def draw(heat: Any, ax: Axes | None) -> Axes:
        label = "attention weight"
        return overlay(heat, image, ax=ax, smooth=smooth, style=style, cmap=cmap, cbar=cbar, label=label)

    if several == [words]:
        ax = draw(heats[0], ax)
        write_title(ax, title, f"{words!r}, {where}")
        return ax
    size = panel_size(heats[0].shape if image is None else np.asarray(image).shape[:2], 2.2)
    columns = full_rows(len(several), columns, 4)
    figure, axes = panels(len(several), columns, size, has_bar=False, bars_below=cbar)
    for heat, one in zip(heats, axes, strict=True):
        draw(heat, one)
    name_panels(axes, [repr(word) for word in several])
    write_title(figure, title, where)
    lay_out(figure)
    return figure


def _where(maps: WordMaps, options: dict[str, Any], frame: int | None, frames: int | None) -> Iterator[str]:
    """Which layers, heads, steps and frames are drawn, in words."""
    layer, head, step = options["layer"], options["head"], options["step"]
    yield f"mean of {len(maps.layers)} layers" if layer is None else f"layer {layer}"
    if head is not None:
        yield "heads that point" if head == "pointing" else f"head {head}"
    if step is not None:
        yield f"step {step}"
    if frames is not None:
        yield f"mean of {frames} frames" if frame is None else f"frame {frame}"
    if options["negative"]:
        yield "negative prompt"
    if options["sinks"] == "remove":
        yield "sinks removed"

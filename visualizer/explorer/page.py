"""The page: labels, coded maps, and the files that run in the browser, in one HTML text.

The page loads nothing, and its content security policy enforces that: script and style are allowed by their hashes.
Tokens and titles reach the page as JSON in a block that does not run, and the document as text.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import json
import math
import operator
import os
import tempfile
import webbrowser
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from ..analysis import without_sinks
from ..analysis.layers import maps_of, merged_into, pools_patches
from ..analysis.sinks import Sinks, check_sinks
from ..grounding import WordMaps
from ..layout import Layout, Patches, check_layout
from ..maps import AttentionMap
from ..reading import check_not_empty
from ..store import check_destination
from ..words import word_list
from .coding import NOTHING, STEP, WEIGHTS, Example, code_maps, pack
from .sides import Side, chosen_images, for_each, printable, read_sides
from .words import BY_WORD_MAPS, TextAndPictures, examples_of_texts, examples_of_word_maps, no_pictures

MAX_BYTES = 30_000_000
"""The most bytes of a page; larger maps are reduced, and the page says how."""

_FRAME_HEIGHT = 860


def explore(
    maps: Any,
    tokens: Sequence[Any] | None = None,
    image: Any = None,
    *,
    query_tokens: Sequence[Any] | None = None,
    key_tokens: Sequence[Any] | None = None,
    layout: Layout | None = None,
    grid: tuple[int, int] | None = None,
    prefix_tokens: int | Sequence[str] | None = None,
    batch: int | Sequence[int] | None = None,
    processor: Any = None,
    sinks: Sinks = "keep",
    title: str = "",
) -> Explorer:
    """A page to walk through the maps of all layers and heads: shown in a notebook, saved to a file or opened.

    >>> import torch
    >>> from visualizer import explore
    >>> maps = torch.randn(12, 1, 6, 5, 5).softmax(-1)
    >>> page = explore(maps, tokens=["The", "cat", "saw", "a", "bird"])
    >>> page
    <Explorer: 12 layers x 6 heads, 5 queries x 5 keys>
    >>> page.save("cat.html")                                           # doctest: +SKIP
    >>> both = page + explore(maps, grid=(2, 2), title="a picture")     # 1 class token and 2 x 2 patches

    Point at a word or a patch to see what it attends to in every head, click to keep it. The page is one file
    that loads nothing; `?` on it lists its keys. Of a model whose layers merge patches, such as a Swin, it has an
    example for each size of the grid; windows that `attention` knows are shown as parts of the whole picture.

    Args:
        maps: what `word_maps` recorded, which knows words and patches; or one map, or layers of one shape, or whose
            patches are merged: an `AttentionMap` or several; the result of `attention`, `capture` or `load`; a model's
            tuple of attentions; a tensor or an array (queries, keys), (heads, queries, keys), (batch, heads, queries,
            keys) or (layers, batch, heads, queries, keys). Rows sum to one.
        tokens: the words of a text, one for each query; the keys are the same tokens.
        image: the picture whose patches are the keys, and the queries too if there are as many: an array or tensor
            (height, width, channels) or (channels, height, width), of integers to 255 or floats to 1, a PIL image, or a
            file's path. Of a text with pictures in it, such as the prompt of a vision-language model, the picture, or a
            list of them in order: the page then shows what each word looks at on them, side by side.
        query_tokens, key_tokens: the words of one side alone, in cross-attention; `image` is then the other side.
        layout: what the tokens are; None: what the maps know of them, as those that `attention` records do.
        grid: (rows, columns) of patches; None: what the maps know, or the only grid that suits the picture, or without
            one the square that the tokens make, with or without a class token.
        prefix_tokens: how many tokens come before the patches, or their names.
        batch: which images or texts of the batch, one or several; None: all. For several, `tokens` and `image` are
            lists with one entry for each image or text of the whole batch.
        processor: names the tokens where these are ids: a model's processor or tokenizer of transformers.
        sinks: "remove": without the attention sinks of each head, see `analysis.sinks`, each row rescaled to its sum;
            the page says so.
        title: the heading of the page, and the name of the example on a page with several.

    Returns:
        An `Explorer`. It holds one byte for each weight and keeps no reference to the maps.

    Raises:
        ValueError: there are no maps, or layers have different shapes; words, pictures or grid do not fit them; or the
            numbers are not attention weights (negative or infinite).
        TypeError: `maps` or `image` has another type.
        IndexError: there is no such image in the batch.
    """
    check_layout(layout)
    where: Patches = {"layout": layout, "grid": grid, "prefix_tokens": prefix_tokens}
    if isinstance(maps, WordMaps):
        words = {"tokens": tokens, "query_tokens": query_tokens, "key_tokens": key_tokens, "processor": processor}
        if wrong := [name for name, value in {**words, **where}.items() if value is not None]:
            raise ValueError(f"{wrong[0]}= is known: word_maps knows its words and where the patches lie; leave it out")
        return Explorer(examples_of_word_maps(maps, image, batch, printable(title) if title else "", sinks))
    maps = [layer.stitched() for layer in maps_of(maps).layers]
    if stages := _stages(maps):
        options: Any = {"query_tokens": query_tokens, "key_tokens": key_tokens, "layout": layout, "grid": grid}
        options |= {"prefix_tokens": prefix_tokens, "batch": batch, "processor": processor, "sinks": sinks}
        names = [f"{one[0].layout}{', pooled' * (one[0].shape[2] == 1)}" for one in stages]
        titles = [f"{title}: {name}" if title else name for name in names]
        pages = [explore(one, tokens, image, **options, title=name) for one, name in zip(stages, titles, strict=True)]
        return functools.reduce(operator.add, pages)
    layers = _read_layers(maps, image is not None)
    words = {"tokens": tokens, "query_tokens": query_tokens, "key_tokens": key_tokens}
    words = {name: None if one is None else word_list(one, name) for name, one in words.items()}
    size, _, queries, keys = layers[0].shape
    images = chosen_images(batch, size)
    if tokens is not None and (query_tokens is not None or key_tokens is not None):
        raise ValueError(
            "tokens= names both queries and keys, so query_tokens= and key_tokens= cannot be passed with it: in "
            "cross-attention name one side by query_tokens= or key_tokens="
        )
    if image is not None and any(layer.kind == "window" for layer in layers):
        raise ValueError("these layers attend within windows, which are parts of the picture: pass no image")
    if is_clean := check_sinks(sinks):
        layers = without_sinks(layers)
    names = [title if len(images) == 1 else f"{title} {number}".strip() for number in images]
    names = [printable(name) if name else "" for name in names]
    of_each = {name: for_each(name, value, images, size) for name, value in {**words, "image": image}.items()}
    of_each["tokens"] = [_words_of(one, processor, layers) for one in of_each["tokens"]]
    if image is not None and query_tokens is None and key_tokens is None:
        known = [layout or _shared(layers, "layout", at) for at in images]
        found = [TextAndPictures.of(*both) for both in zip(known, of_each["tokens"], strict=True)]
        texts = [text for text in found if text is not None and text.layout.count == queries == keys]
        if len(texts) == len(found):
            where = {"grid": grid, "prefix_tokens": prefix_tokens}
            return Explorer(examples_of_texts(layers, images, texts, of_each["image"], where, names, is_clean))
        if tokens is not None:
            raise no_pictures(of_each["tokens"][0])
    sides = [
        read_sides(
            queries,
            keys,
            **{name: values[at] for name, values in of_each.items()},
            where=where,
            known=(_shared(layers, "query_layout", images[at]), _shared(layers, "layout", images[at])),
        )
        for at in range(len(images))
    ]
    return Explorer([replace(one, has_sinks=not is_clean) for one in code_maps(layers, images, sides, names)])


class Explorer:
    """A page about attention maps; made by `explore`. A notebook shows it as the last line of a cell.

    `page + other` is a page with the examples of both; two of one shape can be compared on it, side by side.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to an HTML file; returns its path. Another format's suffix is a ValueError."""
        path = Path(path)
        check_destination(path, "html")
        path.write_text(self.html, encoding="utf-8", newline="\n")
        return path

    def open(self) -> Path:
        """Show the page in a browser; returns the path of the temporary file."""
        path = self.save(Path(tempfile.mkdtemp(prefix="visualizer-")) / "explorer.html")
        webbrowser.open(path.as_uri())
        return path

    @cached_property
    def html(self) -> str:
        """The page as text."""
        return _page(self._examples)

    def _repr_html_(self) -> str:
        # The frame covers the picture, which is visible where a viewer of notebooks removes frames.
        return (
            f'<div style="position:relative;height:{_FRAME_HEIGHT}px;overflow:hidden">{_still(self._examples[0])}'
            '<iframe sandbox="allow-scripts allow-downloads" title="Attention explorer" '
            'style="position:absolute;inset:0;width:100%;height:100%;border:0;background:Canvas" '
            f'srcdoc="{html.escape(self.html)}"></iframe></div>'
        )

    def __add__(self, other: Explorer) -> Explorer:
        return Explorer(self._examples + other._examples) if isinstance(other, Explorer) else NotImplemented

    def __repr__(self) -> str:
        count = len(self._examples)
        layers, heads, queries, keys = self._examples[0].codes.shape
        first = f"{layers} layers x {heads} heads, {queries} queries x {keys} keys"
        return f"<Explorer: {first}>" if count == 1 else f"<Explorer: {count} examples, the first of {first}>"


def _words_of(tokens: Any, processor: Any, layers: Sequence[AttentionMap]) -> list[str] | None:
    """The words that the user passes, or that a processor reads from ids."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokens is None:
        if tokenizer is not None and not any(one.layout is not None and one.layout.of(0).has_words for one in layers):
            raise ValueError(
                "processor= reads words from ids, and maps have no ids: pass tokens=inputs['input_ids'] with it, or "
                "record with attention(model, processor=processor)"
            )
        return None
    if tokenizer is not None and all(isinstance(one, int) for one in tokens):
        return [str(one) for one in tokenizer.convert_ids_to_tokens(list(tokens))]
    return [str(one) for one in tokens]


def _stages(layers: Sequence[AttentionMap]) -> list[list[AttentionMap]]:
    """The layers by the size of their grid, where each has the merged patches of the one before, or pools them; [] of
    other layers."""
    groups = [[*group] for _, group in itertools.groupby(layers, lambda layer: layer.shape)]
    are_merged = all(
        before.shape[0] == after.shape[0]
        and (merged_into(before.layout, after.layout) is not None or pools_patches(after, before))
        for (before, *_), (after, *_) in itertools.pairwise(groups)
    )
    return groups if len(groups) > 1 and are_merged else []


def _read_layers(maps: Any, has_picture: bool) -> list[AttentionMap]:
    """The layers in whatever holds attention; raises ValueError if they have different shapes or an empty axis.

    Beside the layers of a text, those that look at its picture alone are left out where a picture is shown.
    """
    layers: list[AttentionMap] = maps_of(maps).layers
    check_not_empty(layers)
    hint = ""
    if has_picture and len({layer.shape for layer in layers}) > 1:
        texts = [one for one in layers if one.layout is not None and TextAndPictures.of(one.layout.of(0), None)]
        hint = f". {BY_WORD_MAPS}" if texts else ""
        layers = texts or layers
    for number, layer in enumerate(layers):
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"a page shows layers of one shape, (batch, heads, queries, keys): layer 0 has {layers[0].shape}, "
                f"layer {number} has {layer.shape}. Make a page for each shape, and add them: explore(some) "
                f"+ explore(others){hint}"
            )
    return layers


def _shared(layers: Sequence[AttentionMap], name: str, image: int) -> Layout | None:
    """The layout of an image's queries or keys, if all layers have the same."""
    first: Layout | None = getattr(layers[0], name)
    return None if first is None or any(getattr(layer, name) != first for layer in layers) else first.of(image)


def _page(examples: Sequence[Example]) -> str:
    stills = _still(examples[0])
    pictures: list[bytes] = []  # each once, even if several examples or sides have it

    def described(side: Side) -> dict[str, Any]:
        if side.picture is not None and side.picture not in pictures:
            pictures.append(side.picture)
        return {
            "labels": side.labels,
            "special": side.special,
            "grid": side.grid,
            "parts": side.parts,
            "pooled": side.pooled,
            "numbered": side.labels == [str(number) for number in range(len(side.labels))],  # nobody named them
            "picture": None if side.picture is None else pictures.index(side.picture),
        }

    about = []
    for example in examples:
        queries, keys = example.sides
        about.append(
            {
                "title": example.title,
                "layers": [printable(path) if path else "" for path in example.layers],
                "numbers": _numbers(example),
                "shape": example.codes.shape,
                "top": example.top.shape[3],
                "same": queries is keys,
                "multiplies": example.is_one_space,
                "sides": [described(queries), described(keys)],
                "sinks": example.sinks,
                "clean": not example.has_sinks,
                "opens": example.opens,
                "part": example.part,
            }
        )
    script, style = (_resource(name) for name in ("explore.js", "explore.css"))
    spent = len(stills) + len(script) + len(style) + len(_json(about)) + sum(map(len, pictures)) * 4 / 3 + 20_000
    budget = int((MAX_BYTES - spent) * 3 / 4 / len(examples))
    blocks = [_block(f"picture{number}", picture) for number, picture in enumerate(pictures)]
    for number, example in enumerate(examples):
        packed, notes = pack(example, budget)
        blocks.append(_block(f"weights{number}", packed))
        about[number]["notes"] = example.notes + notes
    colours = {"viridis": "viridis", "heat": "YlOrRd", "diverging": "RdBu_r"}
    page = {"step": STEP, "nothing": NOTHING, **{name: _colours(of) for name, of in colours.items()}}
    return Template(_resource("explore.html")).substitute(
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        still=stills,
        page=_json({**page, "examples": about}),
        data="\n".join(blocks),
    )


def _numbers(example: Example) -> list[int | str]:
    """What the layers are called on the page."""
    return [*_layer_numbers(example.layers[:-1]), "all"] if example.has_mean else [*_layer_numbers(example.layers)]


def _layer_numbers(paths: Sequence[str]) -> list[int]:
    """The layers' own numbers, from their modules' paths, so that the last three of twelve are 9, 10 and 11.

    >>> _layer_numbers(["blocks.9.attn", "blocks.11.attn"]), _layer_numbers(["", ""]), _layer_numbers(["a.3.self"])
    ([9, 11], [0, 1], [3])

    Where no number in the paths, or more than one, tells the layers apart, they are counted from 0.
    """
    parts = [path.split(".") for path in paths]
    columns = zip(*parts, strict=True) if len({len(path) for path in parts}) == 1 else ()
    varying = [column for column in columns if len(set(column)) > 1 or len(paths) == 1]
    numbers = [[int(part) for part in column] for column in varying if all(part.isdecimal() for part in column)]
    if len(numbers) == 1 and len(set(numbers[0])) == len(paths) and (len(varying) == 1 or len(paths) == 1):
        return numbers[0]
    return list(range(len(paths)))


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The name of a script or style in a content security policy."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _block(name: str, data: bytes) -> str:
    return f'<script type="text/plain" id="{name}">{b64encode(data).decode()}</script>'


def _json(value: Any) -> str:
    """JSON that can neither end a script block nor begin a tag; all non-ASCII is escaped, line separators too."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _colours(name: str) -> str:
    """A colour map of matplotlib as 256 x 3 bytes in hexadecimal."""
    return bytes(mpl.colormaps[name](range(256), bytes=True)[:, :3]).hex()


def _still(example: Example) -> str:
    """A picture of all heads, for viewers that run no script: an img tag."""
    layers, heads, queries, keys = example.codes.shape
    key_side = example.sides[1]
    if key_side.grid:
        weights = WEIGHTS[example.codes[:, :, 0]] * example.top[:, :, 0, :1]
        cells = key_side.on_sheet(weights)
        cells = cells / np.maximum(cells.max((2, 3), keepdims=True), 4 / keys)
        first = example.sides[0].labels
        caption = f"what {first[0] if first else 'the first patch'} attends to"
    else:
        down, across = (np.linspace(0, count, min(count, 32) + 1).astype(int)[:-1] for count in (queries, keys))
        cells = WEIGHTS[np.minimum.reduceat(np.minimum.reduceat(example.codes, down, axis=2), across, axis=3)]
        caption = "queries down and keys across"
    colours = mpl.colormaps["viridis"](cells, bytes=True)[..., :3]  # (layers, heads, rows, columns, 3)
    rows, columns = cells.shape[2:]
    scale = max(1, math.ceil(48 / max(rows, columns)))
    colours = colours.repeat(scale, 2).repeat(scale, 3)
    framed = np.pad(colours, [(0, 0), (0, 0), (0, 3), (0, 3), (0, 0)], constant_values=255)
    high, wide = framed.shape[2:4]
    sheet = framed.swapaxes(1, 2).reshape(layers * high, heads * wide, 3)
    file = io.BytesIO()
    Image.fromarray(sheet).quantize(64).save(file, "PNG", optimize=True)
    text = f"Attention of {layers} layers, down, and {heads} heads, across: {caption}. Open the page where scripts run."
    return (
        f'<img alt="{html.escape(text)}" title="{html.escape(text)}" '
        f'src="data:image/png;base64,{b64encode(file.getvalue()).decode()}">'
    )

"""`visualizer demo`: pictures of what real models attend to.

The demo runs the very Python that its index.md shows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .outcome import Commands, Mistake, destination, save, trying_to
from .saved import reading_picture

TEXT = "The cat sat on the mat because it was tired."
MINILM = "all-MiniLM-L6-v2"
VIT = "DINOv2-type ViT-S/14"
IMAGE_SIZE, PATCH, LAYERS = 448, 14, 12  # of the vision model, here so that wrong arguments fail before it is loaded

_PHOTOGRAPH = """\
import torch
from visualizer import get_local, models, plot

images, pixels = models.prepare({image}, size={size})
"""
_VISION = """
# the vision model: its attention is decorated with @get_local("attn")
with get_local.activate(), torch.inference_mode():
    models.dinov2_small()(images)
maps = get_local.cache["PlainAttention.forward"]  # one array per layer, (1, 6, 1025, 1025)
"""
_TEXT = """
# the text model: code that is not ours, so the decorator is called
model, tokenizer = models.minilm()
from transformers.models.bert import modeling_bert

get_local("attn_weights")(modeling_bert.eager_attention_forward)
batch = tokenizer({text!r}, return_tensors="pt", verbose=False)
"""
_WORDS = """\
with get_local.activate(), torch.inference_mode():
    model(**batch)
maps = get_local.cache["eager_attention_forward"]  # one array per layer, (1, 12, tokens, tokens)
tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
"""


class _Picture(NamedTuple):
    """What the index says of a picture, and the Python that draws it."""

    file: str
    title: str
    shown: str
    """The model, the layer and the head."""
    call: str


def add_to(commands: Commands) -> None:
    """Add the command to the parser's."""
    demo = commands.add_parser(
        "demo",
        help="draw what a vision transformer and a small BERT attend to",
        description="Runs a DINOv2-type ViT-S/14 on a photograph and MiniLM on a sentence, captures their attention "
        "with get_local, and writes five pictures and an index.md with the Python that made each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--image", metavar="FILE", help="a photograph, in place of scikit-image's cup of coffee")
    demo.add_argument("--text", default=TEXT, help="the sentence for the text model")
    demo.add_argument("--layer", type=int, default=LAYERS - 1, help=f"layer of the vision model, 0 to {LAYERS - 1}")
    demo.add_argument("--out", metavar="DIR", default="visualizer-demo", help="the folder for the pictures")
    demo.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    if not 0 <= options.layer < LAYERS:
        raise Mistake(f"there is no layer {options.layer}: the vision model has layers 0 to {LAYERS - 1}")
    if not options.text.strip():
        raise Mistake("the text is empty: --text takes a sentence")
    if any("\ud800" <= character <= "\udfff" for character in options.text):  # from bytes that are not UTF-8
        raise Mistake("the text is not valid Unicode")
    image = 'models.photo("coffee")' if options.image is None else repr(options.image)
    photograph = _PHOTOGRAPH.format(image=image, size=IMAGE_SIZE)
    text = _TEXT.format(text=options.text)
    seen: dict[str, Any] = {}  # the names of the vision model's Python
    with reading_picture("coffee.png" if options.image is None else options.image):
        _run(photograph, seen)
    folder = Path(options.out)
    with trying_to(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    index = destination(str(folder / "index.md"), "md")
    import matplotlib
    from tqdm import tqdm

    matplotlib.use("agg")  # there may be no screen
    with tqdm(total=7, leave=False, disable=options.quiet or None) as bar:  # None: no bar unless on a terminal
        bar.set_description("running the vision model")
        _run(_VISION, seen)
        bar.update()
        bar.set_description("running the text model")
        read = dict(seen)
        _run(text, read)
        count, most = read["batch"]["input_ids"].shape[1], read["model"].config.max_position_embeddings
        if count > most:
            raise Mistake(f"the text has {count} tokens; the text model takes {most} at most")
        _run(_WORDS, read)
        bar.update()
        pictures = _pictures(options)
        for one in pictures:
            bar.set_description(f"drawing {one.file}")
            with bar.external_write_mode(sys.stderr):  # save may print a line about missing characters
                _draw(one, read if one.shown.startswith(MINILM) else seen, folder)
            bar.update()
    with trying_to(f"write {index}"):
        index.write_text(_index(pictures, photograph + _VISION + text + _WORDS, options), encoding="utf-8")
    print(index)


def _run(source: str, names: dict[str, Any]) -> None:
    """Run a part of the index's Python, with nothing in the cache before."""
    from ..instrument import get_local

    get_local.clear()
    exec(source, names)


def _draw(picture: _Picture, names: dict[str, Any], folder: Path) -> None:
    from matplotlib import pyplot as plt

    drawn = eval(picture.call, names)
    figure = getattr(drawn, "figure", drawn)
    save(figure, folder / picture.file)
    plt.close(figure)


def _pictures(options: argparse.Namespace) -> list[_Picture]:
    layer, middle = options.layer, IMAGE_SIZE // PATCH // 2
    patch = (20, 20) if options.image is None else (middle, middle)  # (20, 20): the spoon beside the cup
    vision, mean = f"{VIT}, layer {layer}", f"{VIT}, layer {layer}, head mean"
    return [
        _Picture(
            "head.png",
            "One head: which patch (row) attends to which (column)",
            f"{vision}, head 0",
            f"plot.head(maps, layer={layer}, head=0)",
        ),
        _Picture("heads.png", "All heads of the layer", f"{vision}, head 0 to 5", f"plot.heads(maps, layer={layer})"),
        _Picture(
            "query.png",
            "What one patch, the framed one, attends to",
            mean,
            f"plot.query(maps, pixels, query={patch}, layer={layer})",
        ),
        _Picture(
            "class_token.png",
            "What the class token attends to",
            mean,
            f"plot.class_token(maps, pixels, layer={layer})",
        ),
        _Picture(
            "tokens.png",
            "Which token (row) attends to which (column)",
            f"{MINILM}, layer 3, head 1",  # where "it" attends to the cat
            "plot.tokens(maps, tokens, layer=3, head=1)",
        ),
    ]


def _index(pictures: list[_Picture], source: str, options: argparse.Namespace) -> str:
    """Markdown that shows the pictures, and how each was made."""
    name = "coffee.png" if options.image is None else Path(options.image).name
    text = (
        "# What the models attended to\n\n"
        f"Photograph: {_escaped(name)}, {IMAGE_SIZE} x {IMAGE_SIZE} pixels as the model saw it. "
        f"Text: “{_escaped(options.text)}”. Layers and heads are counted from 0. Nothing here is random.\n"
    )
    for one in pictures:
        text += f"\n## {one.title}\n\n![{one.title}]({one.file})\n\n{one.shown}; `{one.call}`\n"
    return f"{text}\n## The maps\n\n```python\n{source}```\n"


def _escaped(text: str) -> str:
    """The text with its Markdown characters escaped."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else " " if c in "\r\n" else c for c in text)

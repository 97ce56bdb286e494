"""`visualizer demo`: pictures of what real models attend to.

The demo runs the very Python that its index.md shows.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from .outcome import Mistake, destination, save, trying_to
from .saved import reading_picture

SIZE, PATCH, LAYERS = 448, 14, 12  # of the vision model, here so that wrong arguments fail before it is loaded

PHOTOGRAPH = """\
import torch
from visualizer import get_local, models, plot

images, pixels = models.prepare({image}, size={size})
"""
VISION = """
# the vision model: its attention is decorated with @get_local("attn")
with get_local.activate(), torch.inference_mode():
    models.dinov2_small()(images)
maps = get_local.cache["PlainAttention.forward"]  # one array per layer, (1, 6, 1025, 1025)
"""
TEXT = """
# the text model: code that is not ours, so the decorator is called
model, tokenizer = models.minilm()
from transformers.models.bert import modeling_bert

get_local("attn_weights")(modeling_bert.eager_attention_forward)
batch = tokenizer({text!r}, return_tensors="pt", verbose=False)
"""
WORDS = """\
with get_local.activate(), torch.inference_mode():
    model(**batch)
maps = get_local.cache["eager_attention_forward"]  # one array per layer, (1, 12, tokens, tokens)
tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
"""
INDEX = """\
# What the models attended to

Photograph: {photograph}, {size} x {size} pixels as the model saw it. Text: “{text}”.
Layers and heads are counted from 0. Nothing here is random.
{pictures}
## The maps

```python
{source}```
"""
PICTURES = """
## One head: which patch (row) attends to which (column)

![One head](head.png)

DINOv2-type ViT-S/14, layer {layer}, head 0; `plot.head(maps, layer={layer}, head=0)`

## All heads of the layer

![All heads of the layer](heads.png)

DINOv2-type ViT-S/14, layer {layer}, head 0 to 5; `plot.heads(maps, layer={layer})`

## What one patch, the framed one, attends to

![What one patch attends to](query.png)

DINOv2-type ViT-S/14, layer {layer}, head mean; `plot.query(maps, pixels, query={patch}, layer={layer})`

## What the class token attends to

![What the class token attends to](class_token.png)

DINOv2-type ViT-S/14, layer {layer}, head mean; `plot.class_token(maps, pixels, layer={layer})`

## Which token (row) attends to which (column)

![Which token attends to which](tokens.png)

all-MiniLM-L6-v2, layer 3, head 1; `plot.tokens(maps, tokens, layer=3, head=1)`
"""


def arguments(demo: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    sentence = "The cat sat on the mat because it was tired."
    demo.add_argument("--image", metavar="FILE", help="a photograph, in place of scikit-image's cup of coffee")
    demo.add_argument("--text", default=sentence, help="the sentence for the text model; default: %(default)s")
    demo.add_argument("--layer", type=int, default=LAYERS - 1, help="of the vision model; default: %(default)s")
    demo.add_argument("--out", metavar="DIR", default="visualizer-demo", help="the folder; default: %(default)s")
    demo.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def main(options: argparse.Namespace) -> None:
    """Draw what a vision transformer and a small BERT attend to.

    It runs a DINOv2-type ViT-S/14 on a photograph and MiniLM on a sentence, captures their attention with get_local,
    and writes five pictures and an index.md with the Python that made each.
    """
    if not 0 <= options.layer < LAYERS:
        raise Mistake(f"there is no layer {options.layer}: the vision model has layers 0 to {LAYERS - 1}")
    if not options.text.strip():
        raise Mistake("the text is empty: --text takes a sentence")
    if any("\ud800" <= character <= "\udfff" for character in options.text):  # from bytes that are not UTF-8
        raise Mistake("the text is not valid Unicode")
    photograph = 'models.photo("coffee")' if options.image is None else repr(options.image)
    image, text = PHOTOGRAPH.format(image=photograph, size=SIZE), TEXT.format(text=options.text)
    middle = SIZE // PATCH // 2
    patch = (20, 20) if options.image is None else (middle, middle)  # (20, 20): the spoon beside the cup
    pictures = PICTURES.format(layer=options.layer, patch=patch)
    seen: dict[str, Any] = {}  # the names of the vision model's Python
    with reading_picture("coffee.png" if options.image is None else options.image):
        _run(image, seen)
    folder = Path(options.out)
    with trying_to(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    index = destination(str(folder / "index.md"), "md")
    import matplotlib
    from tqdm import tqdm

    matplotlib.use("agg")  # there may be no screen
    with tqdm(total=7, leave=False, disable=options.quiet or None) as bar:  # None: no bar unless on a terminal
        bar.set_description("running the vision model")
        _run(VISION, seen)
        bar.update()
        bar.set_description("running the text model")
        read = dict(seen)
        _run(text, read)
        count, most = read["batch"]["input_ids"].shape[1], read["model"].config.max_position_embeddings
        if count > most:
            raise Mistake(f"the text has {count} tokens; the text model takes {most} at most")
        _run(WORDS, read)
        bar.update()
        for file, call in re.findall(r"\]\((\w+\.png)\)\n\n.*; `(.*)`", pictures):
            bar.set_description(f"drawing {file}")
            with bar.external_write_mode(sys.stderr):  # save may print a line about missing characters
                _draw(call, read if file == "tokens.png" else seen, folder / file)
            bar.update()
    name = "coffee.png" if options.image is None else Path(options.image).name
    facts = {"photograph": _escaped(name), "size": SIZE, "text": _escaped(options.text)}
    with trying_to(f"write {index}"):
        whole = INDEX.format(**facts, pictures=pictures, source=image + VISION + text + WORDS)
        index.write_text(whole, encoding="utf-8")
    print(index)


def _run(source: str, names: dict[str, Any]) -> None:
    """Run a part of the index's Python, with nothing in the cache before."""
    from ..instrument import get_local

    get_local.clear()
    exec(source, names)


def _draw(call: str, names: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    drawn = eval(call, names)
    figure = getattr(drawn, "figure", drawn)
    save(figure, path)
    plt.close(figure)


def _escaped(text: str) -> str:
    """The text with its Markdown characters escaped."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else " " if c in "\r\n" else c for c in text)

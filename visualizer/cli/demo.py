"""`visualizer demo`: attention of real models on real input, drawn."""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outcome import Mistake, save, writable, write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .outcome import Commands

TEXT = "The cat sat on the mat because it was tired."
TEXT_LAYER, TEXT_HEAD = 3, 1  # where "it" finds the cat
IMAGE_SIZE, PATCH, LAYERS = 448, 14, 12  # of the vision model; known before it is loaded, so that errors come at once


@dataclass
class _Picture:
    """One picture of the demo: how it is drawn, and what the index says of it."""

    file: str
    title: str
    model: str
    layer: int
    head: str
    call: str
    draw: Callable[[], Figure]


def add_to(commands: Commands) -> None:
    """Add the command to the parser's."""
    demo = commands.add_parser(
        "demo",
        help="draw what a vision transformer and a small BERT attend to",
        description="Runs a DINOv2-type ViT-S/14 on a photograph and MiniLM on a sentence, captures their attention "
        "with get_local, and writes five pictures and an index.md that says what made each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--image", metavar="FILE", help="a photograph of your own, instead of scikit-image's cup of coffee"
    )
    demo.add_argument("--text", default=TEXT, help="a sentence")
    demo.add_argument("--layer", type=int, default=LAYERS - 1, help=f"of the vision model, 0 to {LAYERS - 1}")
    demo.add_argument("--out", metavar="DIR", default="visualizer-demo", help="where the pictures go")
    demo.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    if not 0 <= options.layer < LAYERS:
        raise Mistake(f"there is no layer {options.layer}: the vision model has layers 0 to {LAYERS - 1}")
    if not options.text.strip():
        raise Mistake("the text is empty: --text takes a sentence")
    if any("\ud800" <= character <= "\udfff" for character in options.text):  # bytes that were no text
        raise Mistake("the text is not valid Unicode")
    images, pixels, name = _read(options.image)
    folder = writable(options.out)
    from tqdm import tqdm

    with tqdm(total=7, leave=False, disable=options.quiet or None) as bar:  # None: where nobody is watching
        bar.set_description("running the vision model")
        vision = _vision_attention(images)
        bar.update()
        bar.set_description("running the text model")
        text, tokens = _text_attention(options.text)
        bar.update()
        pictures = _pictures(vision, pixels, name, text, tokens, options)
        for picture in pictures:
            bar.set_description(f"drawing {picture.file}")
            figure = picture.draw()
            with bar.external_write_mode(sys.stderr):  # there may be something to say of its characters
                write(folder / picture.file, functools.partial(save, figure))
            bar.update()
    index = _index(pictures, name, options)
    write(folder / "index.md", lambda path: path.write_text(index, encoding="utf-8"))
    print(folder / "index.md")


def _read(image: str | None) -> tuple[Any, Any, str]:
    """The vision model's input, the pixels that it sees, and what the picture is called."""
    from PIL import Image

    from .. import models

    if image == "":
        raise Mistake("the picture has no name: --image takes a file")
    path = models.photo("coffee") if image is None else Path(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL thinks of a picture that it can read all the same
            images, pixels = models.prepare(path, size=IMAGE_SIZE, patch=PATCH)
    except FileNotFoundError as error:
        raise Mistake(f"there is no picture {path}") from error
    except Image.DecompressionBombError as error:
        raise Mistake(f"{path} is too large: {error}") from error
    except (OSError, ValueError, TypeError, SyntaxError) as error:  # SyntaxError: what PIL raises for a broken PNG
        raise Mistake(f"cannot read {path} as a picture: {error}") from error
    return images, pixels, path.name


def _vision_attention(images: Any) -> Any:
    """The attention of every layer, a list of (1, 6, 1025, 1025): the class token, then 32 x 32 patches."""
    import torch

    from .. import models
    from ..instrument import get_local

    model = models.dinov2_small()
    get_local.clear()
    with get_local.activate(), torch.inference_mode():
        model(images)
    return get_local.cache["PlainAttention.forward"]


def _text_attention(text: str) -> tuple[Any, list[str]]:
    """The attention of every layer, a list of (1, 12, tokens, tokens), and the tokens."""
    import torch

    from .. import models
    from ..instrument import get_local

    model, tokenizer = models.minilm()
    from transformers.models.bert import modeling_bert

    batch = tokenizer(text, return_tensors="pt", verbose=False)  # a text that is too long is told below
    most = model.config.max_position_embeddings
    if batch["input_ids"].shape[1] > most:
        raise Mistake(f"the text has {batch['input_ids'].shape[1]} tokens; the text model takes {most} at most")
    get_local("attn_weights")(modeling_bert.eager_attention_forward)
    get_local.clear()
    with get_local.activate(), torch.inference_mode():
        model(**batch)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    return get_local.cache["eager_attention_forward"], list(tokens)


def _pictures(
    vision: Any, pixels: Any, name: str, text: Any, tokens: list[str], options: argparse.Namespace
) -> list[_Picture]:
    from matplotlib.figure import Figure

    from .. import plot

    layer, vit = options.layer, "DINOv2-type ViT-S/14"
    side = IMAGE_SIZE // PATCH
    row, column = (20, 20) if options.image is None else (side // 2, side // 2)  # the spoon, or the middle

    def alone(draw: Callable[[Any], Any], width: float = 6, height: float = 5) -> Callable[[], Figure]:
        def figure() -> Figure:
            figure = Figure(figsize=(width, height), layout="compressed")
            draw(figure.add_subplot())
            return figure

        return figure

    size = min(12.0, max(5.0, 0.32 * len(tokens) + 2))
    return [
        _Picture(
            "head.png",
            "One head: which patch (row) attends to which (column)",
            vit,
            layer,
            "0",
            f"plot.head(maps, layer={layer}, head=0)",
            alone(lambda ax: plot.head(vision, layer=layer, head=0, ax=ax)),
        ),
        _Picture(
            "heads.png",
            "All heads of the layer",
            vit,
            layer,
            "0 to 5",
            f"plot.heads(maps, layer={layer})",
            lambda: plot.heads(vision, layer=layer),
        ),
        _Picture(
            "query.png",
            "What one patch, the framed one, attends to",
            vit,
            layer,
            "mean",
            f"plot.query(maps, pixels, query=({row}, {column}), layer={layer})",
            alone(lambda ax: plot.query(vision, pixels, query=(row, column), layer=layer, ax=ax)),
        ),
        _Picture(
            "class_token.png",
            "What the class token attends to",
            vit,
            layer,
            "mean",
            f"plot.class_token(maps, pixels, layer={layer})",
            alone(lambda ax: plot.class_token(vision, pixels, layer=layer, ax=ax)),
        ),
        _Picture(
            "tokens.png",
            "Which token (row) attends to which (column)",
            "all-MiniLM-L6-v2",
            TEXT_LAYER,
            str(TEXT_HEAD),
            f"plot.tokens(maps, tokens, layer={TEXT_LAYER}, head={TEXT_HEAD})",
            alone(lambda ax: plot.tokens(text, tokens, layer=TEXT_LAYER, head=TEXT_HEAD, ax=ax), size + 1, size),
        ),
    ]


def _index(pictures: list[_Picture], name: str, options: argparse.Namespace) -> str:
    """What made each picture, as Markdown."""
    lines = [
        "# What the models attended to",
        "",
        f"Photograph: {_escaped(name)}, {IMAGE_SIZE} x {IMAGE_SIZE} pixels as the model saw it. "
        f"Text: “{_escaped(options.text)}”. Layers and heads are counted from 0. Nothing here is random.",
    ]
    for picture in pictures:
        lines += [
            "",
            f"## {picture.title}",
            "",
            f"![{picture.title}]({picture.file})",
            "",
            f"{picture.model}, layer {picture.layer}, head {picture.head}; `{picture.call}`",
        ]
    lines += [
        "",
        "## The maps",
        "",
        "```python",
        "import torch",
        "from transformers.models.bert import modeling_bert",
        "from visualizer import get_local, models, plot",
        "",
        '# the vision model: its attention is decorated with @get_local("attn")',
        f"images, pixels = models.prepare({_source(options.image)}, size={IMAGE_SIZE})",
        "with get_local.activate(), torch.inference_mode():",
        "    models.dinov2_small()(images)",
        'maps = get_local.cache["PlainAttention.forward"]  # one array per layer, (1, 6, 1025, 1025)',
        "",
        "# the text model: code that is not ours, so the decorator is called",
        'get_local("attn_weights")(modeling_bert.eager_attention_forward)',
        "model, tokenizer = models.minilm()",
        f'batch = tokenizer({options.text!r}, return_tensors="pt")',
        "with get_local.activate(), torch.inference_mode():",
        "    model(**batch)",
        'maps = get_local.cache["eager_attention_forward"]  # one array per layer, (1, 12, tokens, tokens)',
        'tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])',
        "```",
        "",
    ]
    return "\n".join(lines)


def _source(image: str | None) -> str:
    return 'models.photo("coffee")' if image is None else repr(image)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else " " if c in "\r\n" else c for c in text)

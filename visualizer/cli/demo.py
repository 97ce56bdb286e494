"""`visualizer demo`: pictures of what real models attend to."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .outcome import Mistake, destination, save, trying_to
from .saved import reading_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .outcome import Commands

TEXT = "The cat sat on the mat because it was tired."
MINILM = "all-MiniLM-L6-v2"
TEXT_LAYER, TEXT_HEAD = 3, 1  # where "it" attends to the cat
VIT = "DINOv2-type ViT-S/14"
IMAGE_SIZE, PATCH, LAYERS = 448, 14, 12  # of the vision model, here so that wrong arguments fail before it is loaded


class _Picture(NamedTuple):
    """A call of a function of `plot`, and what the index says of it."""

    function: str
    arguments: tuple[str, ...]  # the names of what the model made, in order
    keywords: dict[str, Any]
    title: str
    model: str
    head: str
    size: tuple[float, float] | None = (6, 5)  # in inches; None: the function makes a grid of panels

    @property
    def file(self) -> str:
        return f"{self.function}.png"

    @property
    def call(self) -> str:
        keywords = (f"{name}={value!r}" for name, value in self.keywords.items())
        return f"plot.{self.function}({', '.join([*self.arguments, *keywords])})"

    def draw(self, values: dict[str, Any]) -> Figure:
        """Draw it with the values of the arguments."""
        from matplotlib.figure import Figure

        from .. import plot

        keywords = dict(self.keywords)
        if self.size is not None:
            keywords["ax"] = Figure(figsize=self.size, layout="compressed").add_subplot()
        drawn = getattr(plot, self.function)(*(values[name] for name in self.arguments), **keywords)
        figure: Figure = getattr(drawn, "figure", drawn)
        return figure


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
    images, pixels, name = _read(options.image)
    folder = Path(options.out)
    with trying_to(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    index = destination(str(folder / "index.md"), "md")
    import matplotlib
    from tqdm import tqdm

    matplotlib.use("agg")  # there may be no screen
    with tqdm(total=7, leave=False, disable=options.quiet or None) as bar:  # None: no bar unless on a terminal
        bar.set_description("running the vision model")
        vision = _vision_attention(images)
        bar.update()
        bar.set_description("running the text model")
        text, tokens = _text_attention(options.text)
        bar.update()
        values = {VIT: {"maps": vision, "pixels": pixels}, MINILM: {"maps": text, "tokens": tokens}}
        pictures = _pictures(options, len(tokens))
        for one in pictures:
            bar.set_description(f"drawing {one.file}")
            figure = one.draw(values[one.model])
            with bar.external_write_mode(sys.stderr):  # save may print a line about missing characters
                save(figure, folder / one.file)
            bar.update()
    with trying_to(f"write {index}"):
        index.write_text(_index(pictures, name, options), encoding="utf-8")
    print(index)


def _read(image: str | None) -> tuple[Any, Any, str]:
    """The vision model's input, the pixels that it sees, and the picture's name."""
    from .. import models

    path = str(models.photo("coffee")) if image is None else image
    with reading_picture(path):
        images, pixels = models.prepare(path, size=IMAGE_SIZE, patch=PATCH)
    return images, pixels, Path(path).name


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

    batch = tokenizer(text, return_tensors="pt", verbose=False)  # no warning of long texts: see below
    most = model.config.max_position_embeddings
    if batch["input_ids"].shape[1] > most:
        raise Mistake(f"the text has {batch['input_ids'].shape[1]} tokens; the text model takes {most} at most")
    get_local("attn_weights")(modeling_bert.eager_attention_forward)
    get_local.clear()
    with get_local.activate(), torch.inference_mode():
        model(**batch)
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    return get_local.cache["eager_attention_forward"], list(tokens)


def _pictures(options: argparse.Namespace, tokens: int) -> list[_Picture]:
    layer = {"layer": options.layer}
    middle = IMAGE_SIZE // PATCH // 2
    patch = {"query": (20, 20) if options.image is None else (middle, middle)}  # (20, 20): the spoon beside the cup
    words = {"layer": TEXT_LAYER, "head": TEXT_HEAD}
    side = min(12.0, max(5.0, 0.32 * tokens + 2))
    maps, on_image, on_words = ("maps",), ("maps", "pixels"), ("maps", "tokens")
    of_tokens = "Which token (row) attends to which (column)"
    return [
        _Picture("head", maps, layer | {"head": 0}, "One head: which patch (row) attends to which (column)", VIT, "0"),
        _Picture("heads", maps, layer, "All heads of the layer", VIT, "0 to 5", None),
        _Picture("query", on_image, patch | layer, "What one patch, the framed one, attends to", VIT, "mean"),
        _Picture("class_token", on_image, layer, "What the class token attends to", VIT, "mean"),
        _Picture("tokens", on_words, words, of_tokens, MINILM, str(TEXT_HEAD), (side + 1, side)),
    ]


def _index(pictures: list[_Picture], name: str, options: argparse.Namespace) -> str:
    """Markdown that shows the pictures, and how each was made."""
    source = 'models.photo("coffee")' if options.image is None else repr(options.image)
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
            f"{picture.model}, layer {picture.keywords['layer']}, head {picture.head}; `{picture.call}`",
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
        f"images, pixels = models.prepare({source}, size={IMAGE_SIZE})",
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


def _escaped(text: str) -> str:
    """The text with its Markdown characters escaped."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|" else " " if c in "\r\n" else c for c in text)

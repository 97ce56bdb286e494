"""`visualizer stats`: statistics of a model's attention over a folder of pictures or a file of texts."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import did_you_mean
from ..images import as_pil
from .outcome import Failure, Mistake, destination, say, trying_to, warnings_as_lines, why_import_failed
from .saved import whole_number
from .script import build, is_builder

if TYPE_CHECKING:
    from ..statistics import Statistic


def arguments(stats: Any) -> None:
    """Add the command's arguments."""
    stats.epilog = _listed
    stats.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="one of visualizer.models, of the Hugging Face hub (texts) or of timm (pictures), a folder, or "
        "package.module:function, which returns a model, and a tokenizer or a function from a picture's path to input",
    )
    data = stats.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", metavar="DIR", help="a folder; the pictures in its folders count too")
    data.add_argument("--texts", metavar="FILE", help="a UTF-8 file with one text per line")
    stats.add_argument("-o", "--out", metavar="FILE", default="stats.safetensors", help="default: %(default)s")
    stats.add_argument(
        "--measure",
        nargs="+",
        type=lambda name: name.replace("-", "_"),  # plot --kind has dashes
        metavar="NAME",
        help="the statistics to collect, of those below",
    )
    count = whole_number(1)
    stats.add_argument("--batch-size", type=count, default=8, metavar="N", help="default: %(default)s")
    stats.add_argument("--size", type=count, default=224, metavar="PIXELS", help="of pictures; default: %(default)s")
    stats.add_argument("--length", type=count, default=128, metavar="N", help="tokens per text; default: %(default)s")
    stats.add_argument("--limit", type=count, metavar="N", help="only the first N pictures or texts")
    stats.add_argument("--device", metavar="NAME", help="cpu, cuda, mps; default: cuda where there is one")
    stats.add_argument("--checkpoint", metavar="DIR", help="save progress here; a stopped run goes on from it")
    stats.add_argument("-q", "--quiet", action="store_true", help="no progress bar, and no lines about what failed")


def _listed() -> str:
    """The statistics, below the options of the help."""
    try:
        from ..statistics.measures import MEASURES
    except ImportError as error:
        return why_import_failed(error) or str(error)
    lines = ["statistics of each head:"]
    for name, measure in MEASURES.items():
        default = f"default for {' and '.join(measure.default_for)}" if measure.default_for else "only if named"
        lines.append(f"  {name:12} {measure.about} ({default})")
    return "\n".join(lines)


def main(options: argparse.Namespace) -> None:
    """Collect statistics of a model's attention over a folder of pictures or a file of texts.

    What is saved are the moments, over all of them, of what each head does; visualizer plot draws them. Under torchrun
    each process takes its share, and the first one writes.
    """
    out = destination(options.out, "safetensors")
    items: list[Any] = _pictures(options.images) if options.images else _lines(options.texts)
    items = items[: options.limit]
    measures = _chosen(options)
    import torch

    from ..statistics import collect

    with _processes() as rank:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        model, prepare = _model(options)
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise Mistake(f"--device {device}: {error}") from error
        if options.images:
            batches = _batches(items, list, options.batch_size, options.size)  # read by the process that runs them
            arguments: dict[str, Any] = {
                "call": lambda model, paths: model(_read(paths, prepare, options.quiet).to(device))
            }
        else:
            arguments, batches = {}, _tokenized(items, prepare, options.batch_size, options.length)
        statistics = [measure.for_tokenizer(prepare if options.texts else None) for measure in measures]
        try:
            with warnings_as_lines(options.quiet):
                collected = collect(
                    model,
                    batches,
                    *statistics,
                    checkpoint=options.checkpoint,
                    progress=not options.quiet,
                    **arguments,
                )
        except (ValueError, RuntimeError, OSError) as error:
            raise Failure(error) from error
        if rank == 0:
            about = {"model": options.model, "data": options.images or options.texts}
            with trying_to(f"write {out}"):
                collected.save(out, about)
            print(out)


def _chosen(options: argparse.Namespace) -> list[type[Statistic]]:
    """The statistics that --measure names; without it, the defaults for the data."""
    from ..statistics.measures import MEASURES

    data = "images" if options.images else "texts"
    names = options.measure or [name for name, measure in MEASURES.items() if data in measure.default_for]
    for name in names:
        if name not in MEASURES:
            hint = did_you_mean(MEASURES, name)
            raise Mistake(f"argument --measure: invalid choice: {name!r} (choose from {', '.join(MEASURES)}){hint}")
    return [MEASURES[name] for name in dict.fromkeys(names)]


@contextlib.contextmanager
def _processes() -> Iterator[int]:
    """Join the processes that torchrun started, if any; yields the rank of this process."""
    import torch.distributed as distributed

    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ
    if is_alone or not distributed.is_available():
        yield 0
        return
    distributed.init_process_group("gloo")  # for CPU tensors: the processes exchange only moments
    try:
        yield distributed.get_rank()
    finally:
        distributed.destroy_process_group()


def _pictures(folder: str) -> list[Path]:
    from PIL import Image

    if not os.path.isdir(folder):
        raise Mistake(f"there is no folder {folder}")
    known = Image.registered_extensions()
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in known and path.is_file())
    if not paths:
        raise Mistake(f"there is no picture in {folder}")
    return paths


def _lines(file: str) -> list[str]:
    with trying_to(f"read {file}"):
        text = Path(file).read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise Mistake(f"there is no text in {file}")
    return lines


def _model(options: argparse.Namespace) -> tuple[Any, Callable[..., Any]]:
    """The model, and a tokenizer or a function from a picture's path to the model's input."""
    from .. import models

    name = options.model
    if is_builder(name):
        built = build(name)
        if not isinstance(built, tuple) or len(built) != 2:
            raise Mistake(f"{name}() must return a model and what makes its input, not a {type(built).__name__}")
        return built
    try:
        if options.texts or name in models.MODELS:
            model, prepare = models.load(name)
            if prepare is models.prepare:
                if options.texts:
                    raise Mistake(f"{name} sees pictures: pass --images")
                return model, lambda path: models.prepare(path, size=options.size)[0]
            if hasattr(prepare, "feature_extractor"):
                raise Mistake(f"{name} hears speech; stats reads pictures and texts: use visualizer.statistics.collect")
            if options.images:
                raise Mistake(f"{name} reads texts: pass --texts")
            return model, prepare
        try:
            timm: Any = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            if error.name != "timm":
                raise
            raise Mistake(f"{name} may be a model of timm, which is not installed: pip install timm") from error
        if not timm.is_model(name):
            hint = did_you_mean([*models.MODELS, *timm.list_models()], name)
            raise Mistake(
                f"there is no model {name!r} in timm{hint}. For pictures name a model of timm, or dinov2-small"
            )
        model = timm.create_model(name, pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        return model, lambda path: transform(as_pil(path))[None]
    except Mistake:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise Mistake(why_import_failed(error) or f"cannot load {name}: {error}") from error


def _read(paths: list[Path], prepare: Callable[[Path], Any], quiet: bool) -> Any:
    """The pictures of a batch, (batch, channels, height, width), without those that cannot be read."""
    import torch

    pictures = []
    for path in paths:
        try:
            pictures.append(prepare(path))
        except (OSError, ValueError, SyntaxError) as error:
            if not quiet:
                say(f"{path} does not count: {error}")
    if not pictures:
        raise ValueError("no picture of this batch can be read")
    return torch.cat(pictures)


def _batches(items: list[Any], collate: Callable[[list[Any]], Any], size: int, detail: int) -> Any:
    """A loader of pictures or texts with a fingerprint, which a checkpoint compares."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(items, size, collate_fn=collate)  # type: ignore[arg-type]
    # A picture is known by its name and size, because copying changes its time.
    known = [(str(item), item.stat().st_size) if isinstance(item, Path) else item for item in items]
    loader.fingerprint = f"{zlib.crc32(repr(known).encode()):08x} by {size}, {detail}"
    return loader


def _tokenized(texts: list[str], tokenizer: Any, size: int, length: int) -> Any:
    """A loader of texts, tokenized."""
    if getattr(tokenizer, "pad_token", "") is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": length, "verbose": False}
    return _batches(texts, lambda batch: dict(tokenizer(batch, **options)), size, length)

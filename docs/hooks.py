"""Hooks of mkdocs and griffe, see mkdocs.yml: pages for the reference, and files outside docs/ that the pages link to.

The pages also stand as they are, in a clone: so they link to `../assets/...`, which the site has as `assets/...`.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Function, Object, Parameter, ParameterKind, Parameters
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = ("assets", "benchmarks", "notebooks")
ROOMS = {
    "visualizer": "What `from visualizer import ...` gives, but for its rooms, which have pages of their own.",
    "analysis": "What maps say.",
    "plot": "Maps as pictures; the [gallery](../gallery.md) shows each.",
    "statistics": "Attention over a whole data set; see [the guide](../statistics.md).",
    "models": "Models whose weights an installed package carries, and photographs.",
}
RESULTS = {
    "visualizer.instrument.capturing.Captured": "What `capture` returns.",
    "visualizer.instrument.decorator.GetLocal": "`get_local` is the one object of this class.",
    "visualizer.store.cache.Cache": "What `get_local.cache` is.",
    "visualizer.store.records.Record": "One value of `records`.",
    "visualizer.intercept.attention.Maps": "What `attention` returns.",
    "visualizer.maps.samples.Samples": "The `source` of a map of deformable attention.",
    "visualizer.explorer.page.Explorer": "What `explore` returns.",
}


def public_names(room: str) -> dict[str, str]:
    """Each public name of a room, and where it is defined."""
    module = importlib.import_module("visualizer" if room == "visualizer" else f"visualizer.{room}")
    names = {}
    for name in module.__all__:
        value = getattr(module, name)
        if name in ROOMS:
            continue
        if name == "get_local":
            names[name] = "visualizer.instrument.decorator.GetLocal"
        elif hasattr(value, "__qualname__") and hasattr(value, "__module__"):
            names[name] = f"{value.__module__}.{value.__qualname__}"
        else:  # a table
            names[name] = next(
                f"{part.__name__}.{name}"
                for part in vars(module).values()
                if type(part) is type(module) and name in vars(part) and part.__name__.startswith(module.__name__)
            )
    return names


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference, and what lies outside docs/."""
    for room, about in ROOMS.items():
        title = room if room == "visualizer" else f"visualizer.{room}"
        parts = [f"# {title}\n\n{about}\n"]
        parts += [f"\n[](){{#{title}.{name}}}\n\n::: {place}\n" for name, place in public_names(room).items()]
        files.append(File.generated(config, f"api/{room}.md", content="".join(parts)))
    parts = ["# What is returned\n\nThese classes are made by functions, and have no public name of their own.\n"]
    parts += [f"\n{about}\n\n::: {place}\n" for place, about in RESULTS.items()]
    files.append(File.generated(config, "api/results.md", content="".join(parts)))
    for folder in OUTSIDE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".png", ".html", ".txt", ".ipynb"):
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def not_shown(gallery: str) -> str:
    """A list of the plots that the gallery does not show, each with what its docstring says first."""
    plot = importlib.import_module("visualizer.plot")
    lines = [
        f"- [`{name}`](api/plot.md#visualizer.plot.{name}): {inspect.getdoc(getattr(plot, name)).splitlines()[0]}\n"
        for name in plot.__all__
        if f"plot.{name}(" not in gallery
    ]
    return "\n\n## More plots\n\n" + "".join(lines) if lines else ""


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to what lies beside docs/ in a clone, as links within the site; and what the gallery does not show."""
    if page.file.src_uri == "gallery.md":
        markdown += not_shown(markdown)
    return re.sub(rf"\]\(\.\./({'|'.join(OUTSIDE)})/", r"](\1/", markdown)


def on_post_build(config: Any) -> None:
    """Every public name is in the reference; else the build fails."""
    missing = []
    for room in ROOMS:
        page = (Path(config.site_dir) / "api" / room / "index.html").read_text(encoding="utf-8")
        missing += [f"{room}.{name}" for name, place in public_names(room).items() if f'id="{place}"' not in page]
    if missing:
        raise PluginError(f"the reference lacks {', '.join(missing)}")


class Docstrings(Extension):
    """What griffe reads of the package, as the site shows it."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Examples as blocks of code: Markdown takes >>> for a quotation within a quotation."""
        if obj.docstring is not None:
            text = re.sub(r" *# doctest: \+\w+$", "", obj.docstring.value, flags=re.M)
            pattern = r"^( *)(>>> .*(?:\n(?! *$).*)*)"
            obj.docstring.value = re.sub(pattern, r"\1```pycon\n\1\2\n\1```", text, flags=re.M)

    def on_function(self, *, func: Function, **_: Any) -> None:
        """The keywords that a plot takes in place of the one name for them all, **options."""
        if not any("Unpack[" in str(parameter.annotation) for parameter in func.parameters):
            return
        function = importlib.import_module(func.module.canonical_path)
        for name in func.path.removeprefix(func.module.path).strip(".").split("."):
            function = getattr(function, name)
        known = {parameter.name: parameter for parameter in func.parameters}
        func.parameters = Parameters(
            *(
                known.get(name) or Parameter(name, kind=ParameterKind.keyword_only, default=repr(parameter.default))
                for name, parameter in inspect.signature(function).parameters.items()
            )
        )

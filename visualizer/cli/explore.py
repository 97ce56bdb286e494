"""`visualizer explore`: a web page that shows the maps of a saved file."""

from __future__ import annotations

import argparse
import webbrowser

from .outcome import Mistake, destination, trying_to, warnings_as_lines
from .saved import add_choice, as_options, choose, grid_of, picture_of, read, tokens_of


def arguments(explore: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_choice(explore)
    explore.add_argument("--grid", type=grid_of, metavar="ROWSxCOLUMNS", help="of patches; default: a square")
    explore.add_argument("--batch", type=int, metavar="N", help="which image or text; default: all")
    explore.add_argument("--title", default="", help="the title of the page")
    explore.add_argument("-o", "--out", metavar="FILE", default="explorer.html", help="default: %(default)s")
    explore.add_argument("--open", action="store_true", help="show the page in the browser")


def main(options: argparse.Namespace) -> None:
    """Make a web page that shows the maps of a saved file.

    One HTML page has all layers and heads. Point at a word or a patch to see what it attends to.
    """
    from ..explorer import explore

    path = destination(options.out, "html")
    results = read(options.file)
    maps, image, tokens = choose(results, options), picture_of(options.image), tokens_of(results, options)
    if image is not None and options.tokens is None:
        tokens = None  # the keys are patches; the tokens saved in the file would be those of a text
    try:
        with warnings_as_lines():
            given = {name: getattr(options, name) for name in ("grid", "batch", "title")}
            page = explore(maps, tokens, image, sinks=options.sinks or "keep", **given)
            with trying_to(f"write {path}"):
                page.save(path)
    except (ValueError, TypeError, LookupError) as error:
        raise Mistake(as_options(str(error))) from error
    print(path)
    if options.open:
        webbrowser.open(path.absolute().as_uri())

"""`explore(maps)`: one page to walk through all layers and heads, for a notebook, a file or a browser.

`sides` reads what the queries and keys are, `coding` turns the maps into bytes, and `page` makes the page of both. The
files `explore.html`, `explore.css` and `explore.js` run in the browser.
"""

from .page import Explorer, explore

__all__ = ["Explorer", "explore"]

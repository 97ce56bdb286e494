"""`explore(maps)`: one page to walk through all layers and heads, for a notebook, a file or a browser.

`data` makes bytes of the maps, `page` makes the page of the bytes; what runs in the browser is in `explore.html`,
`explore.css` and `explore.js`.
"""

from .page import Explorer, explore

__all__ = ["Explorer", "explore"]

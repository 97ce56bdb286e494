"""Make the pictures of gallery.md: its Python runs from top to bottom, and a picture is what the block before drew."""

import os
import re
import tempfile
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

PAGE = Path(__file__).absolute().with_name("gallery.md")


def main() -> None:
    """Run the page and save its pictures."""
    mpl.use("Agg")
    names: dict[str, object] = {}
    os.chdir(tempfile.mkdtemp())  # for the files that the page writes
    for code, picture in re.findall(r"```python\n(.*?)```|!\[.*?\]\((.*?)\)", PAGE.read_text(encoding="utf-8"), re.S):
        if code:
            exec(code, names)
        else:
            figure = plt.gcf()
            dpi = 160 if figure.get_size_inches()[0] < 3.4 else 80  # small text is read on the screen too
            figure.savefig(PAGE.parent / picture, dpi=dpi, bbox_inches="tight")
            plt.close(figure)
            print(picture)


if __name__ == "__main__":
    main()

"""`python -m visualizer` does what the command `visualizer` does."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Statistics of attention over a whole data set. Only numbers that add up are kept, no map.

`collect` runs a model over a data set, on one process or many. `Monitor` measures steps of a training. The statistics
are torchmetrics metrics, which work alone as well.
"""
# ruff: noqa: F403

from .base import *
from .collected import *
from .collecting import *
from .measures import *
from .moments import *
from .tokens import *
from .training import *

__all__ = [name for name, value in [*globals().items()] if getattr(value, "__module__", "").startswith(__name__)]

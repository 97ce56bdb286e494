"""Statistics of attention over a whole data set. Only numbers that add up are kept, no map.

`collect` runs a model over a data set, on one process or many. `Monitor` measures steps of a training. The statistics
are torchmetrics metrics, which work alone as well.
"""
# ruff: noqa: F403

from . import base, collected, collecting, measures, moments, tokens, training
from .base import *
from .collected import *
from .collecting import *
from .measures import *
from .moments import *
from .tokens import *
from .training import *

__all__ = [*base.__all__, *collected.__all__, *collecting.__all__, *measures.__all__, *moments.__all__]
__all__ += [*tokens.__all__, *training.__all__]

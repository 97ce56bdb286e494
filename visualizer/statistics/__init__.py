"""Statistics of attention over a whole data set: what adds up, so that no map is kept.

`collect` runs a model over a data set, on one process or many; the statistics are torchmetrics metrics that work alone
as well.
"""

from .collected import Collected
from .collecting import collect
from .measures import (
    Confidence,
    Distance,
    Entropy,
    MeanMap,
    Patterns,
    PrefixMass,
    Received,
    Sink,
    Statistic,
    Texts,
)
from .moments import Moments
from .training import Monitor, lightning_callback, trainer_callback

__all__ = [
    "Collected",
    "Confidence",
    "Distance",
    "Entropy",
    "MeanMap",
    "Moments",
    "Monitor",
    "Patterns",
    "PrefixMass",
    "Received",
    "Sink",
    "Statistic",
    "Texts",
    "collect",
    "lightning_callback",
    "trainer_callback",
]

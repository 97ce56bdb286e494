"""What a figure from outside is, and the list of all."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Numbers that others published, or that their own code computes, to be computed again from our maps."""

    name: str
    """What `python -m outside NAME` runs."""
    claim: str
    """What is compared with what, in a sentence."""
    source: str
    """Whose numbers they are."""
    tolerance: str
    """How far apart they may be."""
    needs: tuple[str, ...]
    """The modules that must be installed."""
    is_slow: bool
    """Whether it is left to the slow tests: it takes five seconds, or needs packages of the extra `outside`."""
    check: Callable[[], str]
    """Computes it, raises AssertionError where it does not hold, and says what came out."""

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.needs if importlib.util.find_spec(module) is None]


FIGURES: dict[str, Figure] = {}


def figure(
    *, claim: str, source: str, tolerance: str, needs: tuple[str, ...], is_slow: bool = False
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Add the function, which computes a figure, to FIGURES, under its name."""

    def added(check: Callable[[], str]) -> Callable[[], str]:
        name = check.__name__.replace("_", "-")
        FIGURES[name] = Figure(name, claim, source, tolerance, needs, is_slow, check)
        return check

    return added


def below(value: float, bound: float) -> str:
    """That the value is below the bound, in words alike on every machine; AssertionError where it is not."""
    assert value <= bound, f"{value:.3g} is above {bound:.0e}"
    return f"below {bound:.0e}".replace("e-0", "e-")

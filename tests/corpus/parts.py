"""What the cases are made with: managers, awaitables and objects that behave in one plain way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from types import coroutine
from typing import Any


class Box:
    """An object with the given attributes, equal to nothing else, and the same on every run."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __repr__(self) -> str:
        return f"Box({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class Point:
    """A class to match by position and by name."""

    __match_args__ = ("x", "y")

    def __init__(self, x: Any, y: Any) -> None:
        self.x = x
        self.y = y

    def __repr__(self) -> str:
        return f"Point({self.x!r}, {self.y!r})"


class Manager:
    """A context manager that gives a value and may swallow what is raised in it, or raise itself."""

    def __init__(
        self,
        value: Any = None,
        swallow: bool = False,
        enter: type[BaseException] | None = None,
        leave: type[BaseException] | None = None,
    ) -> None:
        self.value = value
        self.swallow = swallow
        self.enter = enter
        self.leave = leave

    def __enter__(self) -> Any:
        if self.enter is not None:
            raise self.enter("on entry")
        return self.value

    def __exit__(self, *raised: object) -> bool:
        if self.leave is not None:
            raise self.leave("on exit")
        return self.swallow

    async def __aenter__(self) -> Any:
        await pause("enter")
        return self.__enter__()

    async def __aexit__(self, *raised: object) -> bool:
        await pause("exit")
        return self.__exit__(*raised)


@coroutine
def pause(value: Any) -> Generator[Any, Any, Any]:
    """Give the value to whoever runs the coroutine; what is sent back is the result."""
    return (yield value)


class Ticks:
    """Counts to n, asynchronously, and raises there if told to."""

    def __init__(self, n: int, error: type[BaseException] | None = None) -> None:
        self.n = n
        self.error = error

    async def __aiter__(self) -> AsyncIterator[int]:
        for tick in range(self.n):
            await pause("tick")
            yield tick
        if self.error is not None:
            raise self.error("out of ticks")

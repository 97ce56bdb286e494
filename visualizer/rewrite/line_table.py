"""A workaround for the `bytecode` package, to be dropped when the oldest release that pyproject.toml allows is right.

Up to 0.19.1, the newest release when this was written, its `_pack_location` writes a line and two columns below 256 as
single bytes. The format allows that only below 128: a byte with its highest bit set begins the next entry. So whoever
reads lines alone, as tracebacks do, gets wrong ones from there on. Without this file the writer would return the code
as the package assembles it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby
from types import CodeType


def line_table(code: CodeType) -> bytes:
    """A code object's line table, made anew from its positions, in the format of CPython's Objects/locations.md."""
    table, before = bytearray(), code.co_firstlineno
    for (line, end_line, column, end_column), run in groupby(code.co_positions()):
        units = sum(1 for _ in run)
        while units:
            size = min(units, 8)
            units -= size
            step = 0 if line is None else line - before
            if line is None:
                form, rest = 15, b""
            elif end_line is None or column is None or end_column is None:
                form, rest = 13, bytes(_signed(step))
            elif end_line == line and step == 0 and column < 80 and end_column - column < 16:
                form, rest = column >> 3, bytes([(column & 7) << 4 | end_column - column])
            elif end_line == line and 0 <= step <= 2 and column < 128 and end_column < 128:
                form, rest = 10 + step, bytes([column, end_column])
            else:
                numbers = (_number(end_line - line), _number(column + 1), _number(end_column + 1))
                form, rest = 14, bytes(chain(_signed(step), *numbers))
            table.append(128 | form << 3 | size - 1)
            table += rest
            before += step
    return bytes(table)


def _number(value: int) -> Iterator[int]:
    """Six bits in each byte, the lowest first; bit 6 says that more follow."""
    while value > 63:
        yield value & 63 | 64
        value >>= 6
    yield value


def _signed(value: int) -> Iterator[int]:
    return _number(-value << 1 | 1 if value < 0 else value << 1)

"""Results printed as tables, in a terminal and in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod

_ROWS = 100  # the most that a table prints; a last line says how many are left out


class Printed(ABC):
    """What is printed as a table."""

    @abstractmethod
    def table(self) -> tuple[str, list[tuple[str, ...]]]:
        """A line that sums everything up, and the rows of the table; the first row has the column names."""

    def __repr__(self) -> str:
        return _as_text(*self.table())

    def _repr_html_(self) -> str:
        return _as_html(*self.table())


def _as_text(head: str, rows: list[tuple[str, ...]]) -> str:
    if len(rows) == 1:
        return f"<{head}>"
    rows = _few_rows(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"<{head}", *(f"  {line.rstrip()}" for line in lines)]) + ">"


def _as_html(head: str, rows: list[tuple[str, ...]]) -> str:
    import html

    names, *rest = _few_rows(rows)
    cell = '<{0} style="text-align:left">{1}</{0}>'.format
    body = "".join(f"<tr>{''.join(cell('td', html.escape(text)) for text in row)}</tr>" for row in rest)
    header = "".join(cell("th", name) for name in names)
    return (
        f'<table><caption style="text-align:left;white-space:nowrap">{html.escape(head)}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    )


def _few_rows(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    left = len(rows) - 1 - _ROWS
    if left < 1:
        return rows
    return [*rows[: _ROWS + 1], (f"... {left} more", *[""] * (len(rows[0]) - 1))]


def human(size: int) -> str:
    """Bytes as people write them: 999 B, 55.5 kB, 1.42 GB."""
    amount, unit = float(size), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, bigger
    return f"{size} B" if unit == "B" else f"{amount:.3g} {unit}"

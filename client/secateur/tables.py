"""Tables and lists of names as text."""

from collections.abc import Sequence
from dataclasses import dataclass

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A table with the lines around it; `str` is the text of all.

    Attributes:
        rows: The first is the head.
        left: How many columns are aligned left; see `text_table`.
        above: Lines before the table.
        below: Lines after it.
        has_total: Whether the last row is the total of the others.
    """

    rows: Rows
    left: int = 1
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()
    has_total: bool = False

    def __str__(self) -> str:
        return "\n".join((*self.above, text_table(self.rows, self.left), *self.below))


def text_table(rows: Rows, left: int = 1) -> str:
    """Returns a table as text; the first `left` columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def listed(names: Sequence[str], most: int, count: int | None = None) -> str:
    """Returns the first names in one line, and how many more there are.

    Args:
        names: All names, or the first ones.
        most: How many to show.
        count: How many names there are; None is the length of `names`.
    """
    shown = names[:most]
    more = (len(names) if count is None else count) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")

"""How results show themselves in notebooks: small tables, styled by the notebook's own theme."""

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from secateur.tables import Table

# A longer table has its first and last rows or columns, and the number of the others between them.
_MOST_ROWS, _LAST_ROWS = 30, 5  # without the head
_MOST_COLUMNS, _LAST_COLUMNS = 13, 2
_MOST_LINES, _LAST_LINES = 12, 2

Value = TypeVar("Value")


class Displayed:
    """A result with a table: whole as text, and shortened in a notebook."""

    def __init_subclass__(cls) -> None:
        """Makes IPython prefer the short text to a __repr__ of the class, such as a dataclass's."""
        super().__init_subclass__()
        cls._repr_pretty_ = Displayed._repr_pretty_  # type: ignore[method-assign]

    def table(self) -> Table:
        """Returns the rows, and the lines around them."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return html_of(self.table())

    def _repr_pretty_(self, printer: Any, is_cycle: bool) -> None:
        """Writes the text that IPython shows, or keeps beside the HTML."""
        printer.text(str(_short(self.table())))


def html_of(table: Table) -> str:
    """Returns a shortened table with its lines; every text is escaped."""
    short = _short(table)
    rows = "".join(_row(cells, short.left, not index) for index, cells in enumerate(short.rows))
    # Notebooks align the cells of tables to the right; a table elsewhere inherits it.
    table_element = f'<table style="text-align:right">{rows}</table>'
    return paragraphs(short.above) + table_element + paragraphs(short.below)


def paragraphs(lines: Sequence[str]) -> str:
    """Returns an element for each line."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _row(cells: Sequence[str], left: int, is_head: bool) -> str:
    """A row; the first cell names it."""
    elements = []
    for column, cell in enumerate(cells):
        scope = "col" if is_head else None if column else "row"
        tag = f'th scope="{scope}"' if scope else "td"
        style = ' style="text-align:left"' if column < left else ""
        elements.append(f"<{tag}{style}>{html.escape(cell)}</{tag[:2]}>")
    return f"<tr>{''.join(elements)}</tr>"


def _short(table: Table) -> Table:
    head, *body = table.rows
    rows = [head, *_shortened(body, _MOST_ROWS, _LAST_ROWS, lambda more: _gap(more, len(head)))]
    columns = [_shortened(row, _MOST_COLUMNS, _LAST_COLUMNS, lambda more: "…") for row in rows]
    above, below = (
        tuple(_shortened(lines, _MOST_LINES, _LAST_LINES, "… {:,} more lines".format))
        for lines in (table.above, table.below)
    )
    return replace(table, rows=columns, above=above, below=below)


def _gap(more: int, columns: int) -> Sequence[str]:
    return [f"… {more:,} more", *[""] * (columns - 1)]


def _shortened(
    values: Sequence[Value], most: int, last: int, gap: Callable[[int], Value]
) -> Sequence[Value]:
    """At most `most` values; one in the place of those that are left out says how many."""
    if len(values) <= most:
        return values
    first = most - last - 1
    return [*values[:first], gap(len(values) - first - last), *values[-last:]]

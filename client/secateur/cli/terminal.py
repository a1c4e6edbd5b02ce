"""Tables on a terminal: colours, bars, and the columns and rows that fit."""

from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from secateur.cli.output import has_colours
from secateur.tables import Table

# Columns that a narrow terminal leaves out, the first ones first; then any, from the right.
_OPTIONAL = (
    *("zero slices", "dtype", "bytes", "bytes of kept values", "patterns", "shape"),
    *("threshold", "masks", "created", "total", "zeros"),
)
_BAR_WIDTH = 10
_GAP = 2  # between columns
_NAME_WIDTH = 32  # of the first column, before others are left out
_AROUND = 8  # lines of a terminal that are not rows
_FEWEST = 10
_HEAT = ((5, "green"), (20, "yellow"))
_STYLES = {"warning:": "yellow", "note:": "cyan"}


def print_table(table: Table, stream: TextIO, is_whole: bool) -> None:
    """Prints a table that fits the terminal.

    Args:
        table: The table.
        stream: The terminal.
        is_whole: Whether to print every row.
    """
    console = Console(file=stream, color_system="auto" if has_colours() else None, highlight=False)
    for line in table.above:
        console.print(Text(_printable(line)), style="dim")
    rows, hidden = _rows(table, max(_FEWEST, console.height - _AROUND), is_whole)
    columns = _columns(rows, console.width)
    console.print(_grid(rows, columns, table.left, console.width))
    if hidden:
        console.print(Text(f"{hidden:,} more rows: --all shows them"), style="dim")
    if len(columns) < len(rows[0]):
        left_out = ", ".join(name for c, name in enumerate(rows[0]) if c not in columns)
        console.print(Text(f"too narrow for {left_out}: widen it, or | cat"), style="dim")
    for line in table.below:
        console.print(Text(_printable(line)), style=_STYLES.get(line.partition(" ")[0], ""))


def _printable(text: str) -> str:
    """Text without control characters, which a terminal would obey; names may have any."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _rows(table: Table, most: int, is_whole: bool) -> tuple[list[list[str]], int]:
    """The rows to print, the head and the total among them, and how many others there are."""
    rows = [[_printable(cell) for cell in row] for row in table.rows]
    end = len(rows) - table.has_total
    hidden = end - 1 - most
    if is_whole or hidden < 1:
        return rows, 0
    return [*rows[: most + 1], *rows[end:]], hidden


def _columns(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The columns that fit beside a first column that may be cut."""
    head, columns, widths = rows[0], list(range(len(rows[0]))), _widths(rows)
    widths[0] = min(widths[0], _NAME_WIDTH)

    def rank(column: int) -> tuple[int, int]:
        if head[column] in _OPTIONAL:
            return _OPTIONAL.index(head[column]), 0
        return len(_OPTIONAL) + _has_bar(head[column]), -column

    for column in sorted(columns[1:], key=rank)[:-1]:
        if _total(widths, columns) <= width:
            break
        columns.remove(column)
    return columns


def _has_bar(head: str) -> bool:
    return head.startswith("sparsity")


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The width of each column, with its bar."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    bars = [(_BAR_WIDTH + _GAP) * _has_bar(name) for name in rows[0]]
    return [width + bar for width, bar in zip(widths, bars, strict=True)]


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[column] + _GAP for column in columns) - _GAP


def _grid(
    rows: Sequence[Sequence[str]], columns: Sequence[int], left: int, width: int
) -> RichTable:
    """The table that rich prints."""
    head, *body = rows
    widths = _widths(rows)
    room = widths[0] - max(0, _total(widths, columns) - width)
    grid = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(head[column], justify="left" if column < left else "right", no_wrap=True)
        if _has_bar(head[column]):
            grid.add_column("", width=_BAR_WIDTH)
    for row in body:
        cells: list[Text | ProgressBar] = [Text(_end(row[0], room))]
        for column in columns[1:]:
            cells.append(Text(row[column], style=_heat(head[column], row[column])))
            if _has_bar(head[column]):
                cells.append(_bar(row[column]))
        grid.add_row(*cells)
    return grid


def _bar(cell: str) -> Text | ProgressBar:
    """The bar of a percentage; empty for a cell that has none."""
    if not cell.endswith("%"):
        return Text("")
    return ProgressBar(
        total=100,
        completed=float(cell.rstrip("%")),
        width=_BAR_WIDTH,
        complete_style="cyan",
        finished_style="cyan",
    )


def _end(name: str, width: int) -> str:
    """The end of a name that is too long: names of tensors differ there."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _heat(head: str, cell: str) -> str:
    """The colour of a share of a norm that is lost."""
    if _has_bar(head) or not cell.endswith("%"):
        return ""
    share = float(cell.rstrip("%"))
    return next((colour for limit, colour in _HEAT if share < limit), "red")

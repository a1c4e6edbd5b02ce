"""What a page holds, whatever it is about: totals, notes, charts and tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

# A cell: a number, a text, or None where there is none.
Cell = float | str | None

Kind = Literal["text", "count", "number", "share", "difference", "heat"]


@dataclass(frozen=True)
class Total:
    """A figure at the top of the page.

    Attributes:
        label: What it is of.
        value: As a person reads it.
        note: More about it, such as the value before.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        label: Its head.
        kind: "share" is drawn as a bar, and "heat" as a colour; both are numbers in [0, 1].
        is_minor: Whether a narrow screen leaves it out.
        group: How the row of a module path adds up its tensors: "sum", a pair of column numbers
            whose sums are divided, or None.
        hue: The colour of the bars: 0 or 1.
    """

    label: str
    kind: Kind
    is_minor: bool = False
    group: Literal["sum"] | tuple[int, int] | None = None
    hue: int = 0


@dataclass(frozen=True)
class Frame:
    """The rows of a table for one choice.

    Attributes:
        label: The choice.
        rows: A cell for each column.
    """

    label: str
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and searched.

    Attributes:
        title: Its heading.
        head: The head of the names.
        columns: The columns beside the names.
        names: A name for each row.
        frames: At least one; a reader chooses among several.
        chosen: The number of the frame that is shown first.
        is_grouped: Whether names are module paths, by which rows can be grouped.
        note: A line below the heading.
    """

    title: str
    head: str
    columns: Sequence[Column]
    names: Sequence[str]
    frames: Sequence[Frame]
    chosen: int = 0
    is_grouped: bool = False
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Its heading.
        subtitle: A line below it.
        totals: Figures.
        warnings: Lines that a reader must not miss.
        notes: Other lines.
        charts: What charts.js draws, each with its `kind`.
        tables: The first one is of tensors.
        details: Of tensors by their names: pairs of a label and what `details.py` encodes.
    """

    title: str
    subtitle: str
    totals: Sequence[Total]
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    charts: Sequence[Mapping[str, Any]] = ()
    tables: Sequence[Table] = ()
    details: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]] = field(default_factory=dict)


def finite(number: float | None) -> Cell:
    """A cell for a number; JSON has neither infinities nor NaN."""
    if number is None or math.isfinite(number):
        return number
    return str(number)


def count(number: int) -> str:
    """A count as a person reads it."""
    return f"{number:,}"


def size(number: float) -> str:
    """Bytes, rounded for a person."""
    units = ["TB", "GB", "MB", "kB", "bytes"]
    while number >= 1000 and len(units) > 1:
        number, _ = number / 1000, units.pop()
    return f"{number:,.3g} {units[-1]}" if units[-1] != "bytes" else f"{number:,} bytes"


def share(part: float, whole: float) -> str:
    """A share in percent."""
    return f"{part / whole:.2%}" if whole else "-"


def shape(lengths: Sequence[int]) -> str:
    """A shape as a person reads it."""
    return "x".join(map(str, lengths)) or "scalar"

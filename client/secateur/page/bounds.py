"""The table of what guard rails bound."""

from collections.abc import Iterable

from secateur.page.views import Column, Frame, Table
from secateur.report import Choice


def bounds_table(what: str, choices: Iterable[tuple[str, Iterable[Choice]]]) -> Table | None:
    """Makes the table, or None if no guard rail bound.

    Args:
        what: The head of the labels.
        choices: Those of each label.
    """
    found = [
        (bound.tensor, (bound.rail, bound.pruned, label))
        for label, those in choices
        for choice in those
        for bound in choice.bounds
    ]
    if not found:
        return None
    columns = Column("guard rail", "text"), Column("units pruned", "count"), Column(what, "text")
    names, rows = zip(*found, strict=True)
    note = "Without its guard rail, more or less of these tensors would be pruned."
    return Table("Guard rails that bound", "tensor", columns, names, [Frame("", rows)], note=note)

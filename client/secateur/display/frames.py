"""Results as frames of pandas, which is imported when it is needed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.display.extra import extra

if TYPE_CHECKING:
    from pandas import DataFrame

# From the name of each column to its dtype and its values.
Columns = Mapping[str, tuple[str, Sequence[Any]]]


def frame_of(columns: Columns, names: Sequence[str] | None = None) -> "DataFrame":
    """Returns a frame.

    Args:
        columns: See `Columns`.
        names: Of the tensors, which are the index; None numbers the rows.

    Raises:
        SecateurError: pandas is not installed.
    """
    pandas = extra("to_frame", "pandas")
    index = None if names is None else pandas.Index(names, dtype="str", name="tensor")
    series = {
        name: pandas.Series(values, index, dtype=dtype) for name, (dtype, values) in columns.items()
    }
    frame: DataFrame = pandas.DataFrame(series, index)
    return frame


def amount_column(amounts: Sequence[float | None]) -> tuple[str, Sequence[float | None]]:
    """Returns a column of amounts: ints are units, and floats are fractions; None is missing."""
    kinds = {type(amount) for amount in amounts if amount is not None}
    dtype = {(int,): "Int64", (float,): "float64", (): "float64"}.get(tuple(kinds), "object")
    return dtype, amounts

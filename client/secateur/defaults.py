"""Defaults of methods and commands for what the caller does not name."""

from collections.abc import Callable

from secateur.errors import InvalidSpec
from secateur.model import Source
from secateur.report import Report
from secateur.tables import listed

# Names of tensors in an error.
_SHOWN = 3

# The amounts of a plan.
SOME_AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def matrices(model: Source, report: Callable[[Source], Report]) -> list[str]:
    """Returns the floating tensors of 2 or more dimensions: weights, but not biases and norms.

    Args:
        model: The model.
        report: Asks the server for the report of a model that only the server has.

    Raises:
        InvalidSpec: The model has no such tensor.
    """
    tensors = model.prunable() if model.is_here else report(model).tensors
    names = [name for name, tensor in tensors.items() if len(tensor.shape) >= 2]
    if not names:
        known = listed(list(tensors), _SHOWN)
        there_are = f"there are: {known}" if known else "no floating tensor exists"
        raise InvalidSpec(
            "no floating tensor has 2 or more dimensions; name some as `tensors` (--tensors), "
            f"integers by their exact names; {there_are}"
        )
    return names

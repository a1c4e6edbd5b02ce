"""What is pruned where nothing is named."""

from collections.abc import Callable
from typing import Any

from secateur.checkpoint import place_of
from secateur.errors import InvalidSpec
from secateur.report import Report
from secateur.source import read_source

# Names of tensors in an error.
_SHOWN = 3

# Of plans.
SOME_AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def matrices(report: Callable[[Any], Report], source: Any) -> list[str]:
    """Names of the floating tensors of 2 or more dimensions: weights, but not biases and norms.

    report: asks the server for that of a source which only it has.  Errors: InvalidSpec.
    """
    if place_of(source):
        shapes = {name: tensor.shape for name, tensor in report(source).tensors.items()}
    else:
        shapes = {name: tensor.shape for name, tensor in read_source(source).prunable().items()}
    names = [name for name, shape in shapes.items() if len(shape) >= 2]
    if not names:
        raise InvalidSpec(
            "no floating tensor has 2 or more dimensions; name some as `tensors` (--tensors), "
            f"integers by their exact names; {_listed(list(shapes))}"
        )
    return names


def _listed(names: list[str]) -> str:
    if not names:
        return "no floating tensor exists"
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"there are: {', '.join(names[:_SHOWN])}{more}"

"""Defaults of methods and commands for what the caller does not name."""

from collections.abc import Mapping
from typing import Protocol

from secateur.errors import InvalidSpec
from secateur.tables import listed

# Names of tensors in an error.
_SHOWN = 3

# The amounts of a plan.
SOME_AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def matrices(tensors: Mapping[str, _Shaped]) -> list[str]:
    """Returns the tensors of 2 or more dimensions: weights, but not biases and norms.

    Args:
        tensors: The floating tensors of a model.

    Raises:
        InvalidSpec: None has 2 or more dimensions.
    """
    names = [name for name, tensor in tensors.items() if len(tensor.shape) >= 2]
    if not names:
        known = listed(list(tensors), _SHOWN)
        there_are = f"there are: {known}" if known else "no floating tensor exists"
        raise InvalidSpec(
            "no floating tensor has 2 or more dimensions; name some as `tensors` (--tensors), "
            f"integers by their exact names; {there_are}"
        )
    return names

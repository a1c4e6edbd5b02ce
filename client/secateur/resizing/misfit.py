"""Checks of a layer's tensors against each other."""

from collections.abc import Sequence
from typing import Any

from secateur.errors import InvalidStateDict


class Misfit(InvalidStateDict):
    """A tensor does not fit its layer; the caller of a check adds the layer's name."""


def expect(layer: Any, name: str, shape: Sequence[int]) -> None:
    """Checks the shape of a tensor of a layer; the layer may lack it.

    Raises:
        Misfit: It has another shape.
    """
    value = getattr(layer, name, None)
    if value is not None and list(value.shape) != list(shape):
        raise Misfit(
            f"{name} has shape {list(value.shape)}, and {list(shape)} fits the layer's other "
            "tensors; add it to the group that they are in"
        )

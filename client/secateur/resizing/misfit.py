"""Checks of a layer's tensors against each other."""

from collections.abc import Sequence
from typing import Any

from secateur.errors import InvalidStateDict


class Misfit(InvalidStateDict):
    """A tensor does not fit its layer; the caller of a check adds the layer's name.

    Attributes:
        fact: What does not fit.
        advice: What to do with the groups that cut it.
    """

    def __init__(self, fact: str, advice: str = "") -> None:
        super().__init__(f"{fact}; {advice}" if advice else fact)
        self.fact, self.advice = fact, advice


def expect(layer: Any, name: str, shape: Sequence[int]) -> None:
    """Checks the shape of a tensor of a layer; the layer may lack it.

    Raises:
        Misfit: It has another shape.
    """
    value = getattr(layer, name, None)
    if value is not None and list(value.shape) != list(shape):
        raise Misfit(
            f"{name} has shape {list(value.shape)}, and {list(shape)} fits the layer's other "
            "tensors",
            "add it to the group that they are in",
        )

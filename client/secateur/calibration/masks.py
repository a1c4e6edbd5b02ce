"""Which tokens of a batch count. Imported with torch only."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.checks import shown
from secateur.errors import InvalidSpec
from secateur.evaluation import brief

Mask = str | Callable[[Any], Any] | Literal[False] | None

_DEFAULT = "attention_mask"
_ADVICE = "give mask=False to count all tokens"


class Kept:
    """The tokens of a batch that count.

    Attributes:
        is_used: Whether it fitted any input.

    Args:
        mask: Bool of shape [batch, tokens]; None: all count.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self._mask, self.is_used = mask, mask is None

    def of(self, values: Tensor, positions: int) -> Tensor:
        """Returns the values of the tokens that count, or all if the mask does not fit.

        Args:
            values: Their first `positions` dimensions are those of tokens.
            positions: See above.
        """
        found = self.fitted(values.shape[:positions])
        return values if found is None else values[found.to(values.device)]

    def fitted(self, shape: torch.Size) -> Tensor | None:
        """Returns the mask for inputs of a shape, without channels; None if it does not fit."""
        mask = self._mask
        if mask is None:
            return None
        if shape[:2] == mask.shape:
            self.is_used = True
            return mask
        if len(shape) == 1 and shape[0] == mask.numel():
            self.is_used = True
            return mask.flatten()
        return None

    def check_used(self) -> None:
        """Refuses a mask that fitted no input.

        Raises:
            InvalidSpec: It did not.
        """
        if not self.is_used and self._mask is not None:
            shape = [*self._mask.shape]
            raise InvalidSpec(f"mask: no layer has an input that begins with {shape}; {_ADVICE}")


def kept_of(mask: Mask, batch: Any) -> Kept:
    """Finds which tokens of a batch count.

    Args:
        mask: See `calibrate`.
        batch: As the caller gave it.

    Raises:
        InvalidSpec: The batch has no such mask, or it is not a matrix.
    """
    has_names = isinstance(batch, Mapping)
    if mask is None:
        mask = _DEFAULT if has_names and batch.get(_DEFAULT) is not None else False
    if mask is False:
        return Kept(None)
    if isinstance(mask, str):
        if not has_names or mask not in batch:
            names = f"has {', '.join(map(shown, batch))}" if has_names else "is not a mapping"
            raise InvalidSpec(f"mask: the batch has no {mask!r}: it {names}")
        return Kept(_as_bools(batch[mask]))
    if not callable(mask):
        raise InvalidSpec(f"mask: {shown(mask)} is not a name, a function, None or False")
    return Kept(_as_bools(mask(batch)))


def _as_bools(value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except Exception as error:  # of any kind, for a value of any kind
        raise InvalidSpec(f"mask: {shown(value)} is not an array: {brief(error)}") from None
    if found.dim() != 2:
        raise InvalidSpec(f"mask: has shape {[*found.shape]}, not [batch, tokens]; {_ADVICE}")
    return found.detach() != 0

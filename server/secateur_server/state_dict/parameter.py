"""A tensor that can be pruned, with its mask."""

from typing import NamedTuple

from torch import Tensor

from secateur_server.backends.looks import Seen
from secateur_server.backends.masks import Mask


class Parameter(NamedTuple):
    """A tensor that can be pruned.

    Attributes:
        weight: Has a dtype of backends.dtypes.PRUNABLE. Only `fold` writes to it.
        mask: Of its elements; None if the tensor was never pruned.
        seen: Statistics gathered while the tensor arrived; None if there are none.
    """

    weight: Tensor
    mask: Mask | None = None
    seen: Seen | None = None

    @property
    def is_nonzero(self) -> bool:
        """Whether it is known that no element of the weight itself is zero."""
        return self.seen is not None and not self.seen.zeros

"""A tensor that can be pruned, with its mask."""

from typing import NamedTuple

from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.backends.scan import Scan


class Parameter(NamedTuple):
    """A tensor that can be pruned.

    weight: of a dtype of backends.dtypes.PRUNABLE; only fold writes to it.
    mask: of its elements; None where the tensor was never pruned.
    scan: of its elements, where they were scanned as they arrived.
    """

    weight: Tensor
    mask: Mask | None = None
    scan: Scan | None = None

    @property
    def is_nonzero(self) -> bool:
        """Whether it is known that no element of the weight itself is zero."""
        return self.scan is not None and not self.scan.zeros

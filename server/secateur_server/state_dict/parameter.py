"""A tensor that can be pruned, with its mask."""

from typing import NamedTuple

from torch import Tensor

from secateur_server.backends.batches import SMALL
from secateur_server.backends.masks import Mask
from secateur_server.backends.scan import Scan
from secateur_server.runtime.context import RequestContext


class Parameter(NamedTuple):
    """A tensor that can be pruned.

    Attributes:
        weight: Has a dtype of backends.dtypes.PRUNABLE. Only `fold` writes to it.
        mask: Of its elements; None if the tensor was never pruned.
        scan: Facts about its values that were found while it was read; None if there are none.
    """

    weight: Tensor
    mask: Mask | None = None
    scan: Scan | None = None

    @property
    def is_nonzero(self) -> bool:
        """Whether it is known that no element of the weight itself is zero."""
        return self.scan is not None and not self.scan.zeros

    @property
    def is_small(self) -> bool:
        """Whether the tensor is on the CPU and has few elements, but at least one."""
        return 0 < self.weight.numel() <= SMALL and self.weight.is_cpu

    def count_pruned(self, context: RequestContext) -> int:
        """Counts the elements that the mask prunes."""
        return 0 if self.mask is None else self.mask.elements - self.mask.kept(context)

"""Units: the elements that are pruned as one.

One file for each kind. A new kind is a file here, and a line in GRANULARITIES.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.masks import Mask
from secateur_server.granularity.block import Block
from secateur_server.granularity.element import Element
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.runtime.context import RequestContext


class Granularity(Protocol):
    """The units of one tensor.

    In all methods, `values` are the scores of the elements, in the tensor's shape: the weight, or
    uploaded scores. `mask` is the prior mask of the elements, or None.
    """

    @property
    def is_element(self) -> bool:
        """Whether each unit is one element."""

    @property
    def is_normed(self) -> bool:
        """Whether units of one tensor are compared by norms, as in torch, and not by power means.

        Units of several sizes, or of several tensors, are always compared by power means.
        """

    @property
    def is_part(self) -> bool:
        """Whether a unit is the least important part of a larger group of elements.

        Then pruned elements count in no score, and no unit is scored where all are pruned.
        """

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        """Refuses a tensor that does not have such units.

        Args:
            path: Of the selection in the request.
            name: Of the tensor.
            shape: Of the tensor.

        Raises:
            NotStructured: It has too few dimensions, or their sizes do not fit.
            DimOutOfRange: It does not have the dimension.
        """

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the units of a tensor."""

    def candidates(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        """Returns the units that have an unpruned element; None if all have."""

    def scores(
        self, context: RequestContext, values: Tensor, mask: Mask | None, p: float, is_mean: bool
    ) -> Tensor:
        """Computes the importance of each unit. Its absolute value counts.

        Args:
            context: The request.
            values: As above.
            mask: As above. Pruned elements count as 0.
            p: The order of the norm.
            is_mean: Whether to compute a power mean: the norm / the unit's elements ** (1/p).

        Returns:
            Flat. For elements, the values; else float32, or float64 for values of float64.
        """

    def expand(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        """Expands a mask of units to one of elements. It may keep elements that `mask` prunes."""

    def unit_elements(self, shape: Sequence[int]) -> int | None:
        """Returns the elements of a unit; None if units differ, or are pruned in part."""

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """Computes what is pruned with each unit, and is not pruned yet. Not called for elements.

        Returns:
            The number of elements, int64, and the sum of their weights' squares, float64. Flat.
        """


# Each decodes its own fields of a selection, whose path is for errors.
GRANULARITIES: dict[int, Callable[[pb.Selection, str], Granularity]] = {
    pb.GRANULARITY_ELEMENT: Element.decode,
    pb.GRANULARITY_SLICE: Slice.decode,
    pb.GRANULARITY_N_M: NM.decode,
    pb.GRANULARITY_BLOCK: Block.decode,
}

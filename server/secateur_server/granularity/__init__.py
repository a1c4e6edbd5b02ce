"""What is pruned as one: a unit, and how the elements of a tensor make up its units.

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

    In all methods `values` are what the elements are scored by, in the tensor's shape: the weight,
    or uploaded scores; `mask` is the prior mask of the elements, None if there is none.
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
        """Refuses a tensor that has no such units.

        Args:
            path: Of the selection in the request.
            name: Of the tensor.
            shape: Of the tensor.

        Raises:
            NotStructured: It has too few dimensions, or they do not fit.
            DimOutOfRange: It does not have the dimension.
        """

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the units of a tensor have."""

    def candidates(self, context: RequestContext, values: Tensor, mask: Mask | None) -> Mask | None:
        """The units that can be pruned: those with an unpruned element. None: all of them."""

    def scores(
        self, context: RequestContext, values: Tensor, mask: Mask | None, p: float, is_mean: bool
    ) -> Tensor:
        """The importance of each unit: the absolute value counts.

        Args:
            context: The request.
            values: As above.
            mask: As above; pruned elements count as 0.
            p: The order of the norm.
            is_mean: A power mean in place of the norm: divided by the unit's elements to 1/p.

        Returns:
            Flat. Of elements the values; else float64 for values that rank as float64, or float32.
        """

    def expand(
        self, context: RequestContext, kept: Mask, values: Tensor, mask: Mask | None
    ) -> Mask:
        """The elements that are kept if the units `kept` are. It may keep what `mask` prunes."""

    def unit_elements(self, shape: Sequence[int]) -> int | None:
        """Elements of a unit. None: units differ, or not all of their elements are pruned."""

    def costs(
        self, context: RequestContext, weight: Tensor, values: Tensor, mask: Mask | None
    ) -> tuple[Tensor, Tensor]:
        """What is pruned with each unit, and is not pruned yet.

        Returns:
            The number of elements, int64, and the sum of their weights' squares, float64; both
            flat. Never called for elements.
        """


# Each decodes its own fields of a selection, whose path is for errors.
GRANULARITIES: dict[int, Callable[[pb.Selection, str], Granularity]] = {
    pb.GRANULARITY_ELEMENT: Element.decode,
    pb.GRANULARITY_SLICE: Slice.decode,
    pb.GRANULARITY_N_M: NM.decode,
    pb.GRANULARITY_BLOCK: Block.decode,
}

"""The magnitude of values: their absolute value, or a norm of a unit's values."""

import math
from dataclasses import dataclass

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.masks import Mask
from secateur_server.errors import InvalidSpec
from secateur_server.fields import chosen
from secateur_server.granularity import Granularity
from secateur_server.importance.nuclear import Nuclear
from secateur_server.importance.protocol import Importance
from secateur_server.runtime.context import RequestContext


@dataclass(frozen=True)
class Magnitude(Importance):
    """The norm of a unit's values, or their power mean.

    Attributes:
        order: p of the norm. Not used for elements, whose score is the absolute value.
    """

    order: float = 1.0

    is_value = True

    @property
    def ranks_zeros_lowest(self) -> bool:
        return self.order >= 0

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        granularity: Granularity,
        is_mean: bool,
    ) -> Tensor:
        return granularity.scores(context, values, mask, self.order, is_mean)


def decode_magnitude(
    selection: pb.Selection, granularity: Granularity | None, path: str
) -> Magnitude | Nuclear:
    """Reads `magnitude`, whose fields are not used for elements.

    Raises:
        InvalidSpec: The norm is missing, or the units do not have it.
    """
    magnitude, path = selection.magnitude, f"{path}.magnitude"
    if math.isnan(magnitude.p):
        raise InvalidSpec(f"{path}.p", "the order of a norm cannot be NaN")
    if granularity is not None and granularity.is_element:
        return Magnitude()
    if chosen(magnitude, "norm", path) == "p":
        return Magnitude(magnitude.p)
    is_sliced = selection.granularity == pb.GRANULARITY_SLICE
    if selection.scope != pb.SCOPE_PER_TENSOR or not is_sliced:
        raise InvalidSpec(
            f"{path}.matrix_norm", "needs GRANULARITY_SLICE and SCOPE_PER_TENSOR; or use p"
        )
    if magnitude.matrix_norm == pb.MATRIX_NORM_FROBENIUS:
        return Magnitude(2.0)
    if magnitude.matrix_norm == pb.MATRIX_NORM_NUCLEAR:
        return Nuclear(selection.dim)
    raise InvalidSpec(f"{path}.matrix_norm", f"{magnitude.matrix_norm} is not a matrix norm")

"""Scores: how much a unit matters.

One file for each kind. A new kind is a file here, and a line in IMPORTANCES.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from secateur_proto import spec_pb2 as pb
from secateur_server.backends.masks import Mask
from secateur_server.backends.randomness import RandomScores
from secateur_server.granularity import Granularity
from secateur_server.importance.magnitude import decode_magnitude
from secateur_server.importance.random import Random
from secateur_server.runtime.context import RequestContext


class Importance(Protocol):
    """Scores units. Units with the lowest absolute scores are pruned first."""

    @property
    def is_measured(self) -> bool:
        """Whether scores come from values. Others have no threshold and are not normalized."""

    @property
    def is_value(self) -> bool:
        """Whether the score of a single element is its value, so that it need not be computed."""

    @property
    def ranks_zeros_lowest(self) -> bool:
        """Whether the score is 0 if all values of a unit are 0, and only then."""

    @property
    def order(self) -> float:
        """The order of the norm for members of a group; 0 if groups are not measured."""

    def by_name(self, name: str) -> RandomScores | None:
        """Returns the scores of a tensor, or group, if they depend on its name alone."""

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        """Refuses a tensor that cannot be scored.

        Args:
            path: The path of the selection in the request.
            name: The name of the tensor.
            shape: The shape of the tensor, which has units of the rule's granularity.

        Raises:
            InvalidSpec: It cannot be scored.
        """

    def scores(
        self,
        context: RequestContext,
        values: Tensor,
        mask: Mask | None,
        granularity: Granularity,
        is_mean: bool,
    ) -> Tensor:
        """Scores a tensor's units.

        Args:
            context: The request.
            values: The weight, or uploaded scores of its elements.
            mask: Pruned elements count as 0; None if all elements are kept.
            granularity: The granularity of the rule.
            is_mean: Whether units are compared with units of other sizes.

        Returns:
            Floating, flat, one for each unit.
        """


# Each decodes its own field of a selection, whose path is for errors.
IMPORTANCES: dict[str, Callable[[pb.Selection, Granularity | None, str], Importance]] = {
    "magnitude": decode_magnitude,
    "random": Random.decode,
}

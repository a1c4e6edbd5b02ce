"""What each importance does."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.backends.randomness import RandomScores
from secateur_server.granularity import Granularity
from secateur_server.runtime.context import RequestContext


class Importance(Protocol):
    """Scores units. Units with the lowest absolute scores are pruned first.

    A kind inherits what it does not define itself.
    """

    @property
    def is_measured(self) -> bool:
        """Whether scores come from values. Others have no threshold and are not normalized."""
        return True

    @property
    def is_value(self) -> bool:
        """Whether the score of a single element is its value, so that it need not be computed."""
        return False

    @property
    def ranks_zeros_lowest(self) -> bool:
        """Whether the score is 0 if all values of a unit are 0, and only then."""
        return False

    @property
    def order(self) -> float | None:
        """The order of the norm for members of a group; None if values of groups have no score."""
        return None

    def by_name(self, name: str) -> RandomScores | None:
        """Returns the scores of a tensor, or group, if they depend on its name alone."""
        return None

    def elements(self, context: RequestContext, name: str, values: Tensor) -> Tensor:
        """Scores the elements that compete within a group of elements, as those of N:M do.

        Args:
            context: The request.
            name: Of the tensor.
            values: The weight, or uploaded scores of its elements.

        Returns:
            Floating, in the shape of `values`. The least absolute values are pruned.
        """
        return values

    def check(self, path: str, name: str, shape: Sequence[int]) -> None:
        """Refuses a tensor that cannot be scored.

        Args:
            path: The path of the selection in the request.
            name: The name of the tensor.
            shape: The shape of the tensor, which has units of the rule's granularity.

        Raises:
            InvalidSpec: It cannot be scored.
        """
        return

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
            Floating, flat, one for each unit. To be the same on every machine, and to be bounded in
            memory and time, it is computed in pieces: by the granularity, or by Backend.map.
        """
        ...

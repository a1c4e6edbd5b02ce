"""What each importance does."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from secateur_server.backends.masks import Mask
from secateur_server.backends.randomness import RandomScores
from secateur_server.granularity import Granularity
from secateur_server.importance.products import Products
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter

# By the field of a selection: from the name of a tensor to that of the tensor uploaded for it.
Uploads = Mapping[str, Mapping[str, str]]


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

    @property
    def uploads(self) -> Uploads:
        """The uploaded tensors that scores are computed from, all floating."""
        return {}

    def with_uploads(self, uploads: Uploads) -> "Importance":
        """Returns the importance with other names in `uploads`, as the state_dict has them."""
        return self

    def check_upload(
        self, field: str, path: str, shape: Sequence[int], uploaded: Sequence[int]
    ) -> None:
        """Refuses the shape of an uploaded tensor.

        Args:
            field: A key of `uploads`.
            path: The path of the uploaded tensor in the request.
            shape: The shape of the tensor that it is for.
            uploaded: The shape of the uploaded tensor.

        Raises:
            InvalidScores: It does not fit.
        """
        return

    def check_values(self, context: RequestContext, extras: Mapping[str, Tensor]) -> None:
        """Refuses the values of uploaded tensors. `extras` are all uploaded tensors.

        Raises:
            InvalidScores: A value is wrong.
        """
        return

    def products(
        self,
        context: RequestContext,
        name: str,
        parameter: Parameter,
        extras: Mapping[str, Tensor],
    ) -> Products | None:
        """Returns scores of elements from which units are scored; None: from the weight itself."""
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

"""Divides an amount among the tensors whose units are compared.

One file for each kind. A new kind is a file here, and a line in ALLOCATIONS.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from secateur_server.cut.allocation.lamp import decide_by_lamp
from secateur_server.cut.allocation.rank import decide_by_rank
from secateur_server.cut.allocation.shares import decide_by_erk, decide_uniformly
from secateur_server.cut.decision import Decision
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.scored import ScoredTensor
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection


class Allocation(Protocol):
    """Divides targets among tensors."""

    def __call__(
        self,
        context: RequestContext,
        rule: Selection,
        tensors: Sequence[ScoredTensor],
        limits: Sequence[Limits],
        targets: Sequence[float],
    ) -> list[Decision]:
        """Decides how many units of each tensor are pruned.

        Args:
            context: The request.
            rule: Resolved. Its amount is not a threshold.
            tensors: The tensors, or groups, whose units are compared.
            limits: How many units of each may be pruned.
            targets: To prune in all, within the limits: units, or their costs for a budget.

        Returns:
            One decision for each target.
        """


# By the name of the allocation in a rule.
ALLOCATIONS: Mapping[str, Allocation] = {
    "rank": decide_by_rank,
    "uniform": decide_uniformly,
    "erk": decide_by_erk,
    "lamp": decide_by_lamp,
}

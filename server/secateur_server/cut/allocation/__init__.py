"""Divides an amount among the tensors whose units are compared.

One file for each kind. A new kind is a file here, and a line in ALLOCATIONS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from secateur_server.cut.allocation.lamp import decide_by_lamp
from secateur_server.cut.allocation.owl import fractions_by_owl
from secateur_server.cut.allocation.rank import decide_by_rank
from secateur_server.cut.allocation.shares import decide_by_erk, decide_uniformly
from secateur_server.cut.decision import Decision
from secateur_server.cut.guard_rails import Limits
from secateur_server.cut.scored import RankedTensor
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Table
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter


class Allocation(Protocol):
    """Divides targets among tensors."""

    def __call__(
        self,
        context: RequestContext,
        rule: Selection,
        tensors: Sequence[RankedTensor],
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

# Gives each tensor a fraction of its own, before any unit is chosen.
MakeTable = Callable[
    [RequestContext, Selection, Mapping[str, Parameter], Mapping[str, Tensor]], dict[str, float]
]

# As ALLOCATIONS, for rules whose tensors are not compared.
TABLES: Mapping[str, MakeTable] = {"owl": fractions_by_owl}


def with_table(
    context: RequestContext,
    rule: Selection,
    state: Mapping[str, Parameter],
    extras: Mapping[str, Tensor],
) -> Selection:
    """Replaces an allocation of TABLES by a table of fractions; other rules are unchanged.

    Args:
        context: The request.
        rule: Resolved.
        state: All parameters.
        extras: Uploaded tensors.
    """
    if rule.allocation not in TABLES:
        return rule
    table = Table(TABLES[rule.allocation](context, rule, state, extras))
    return replace(rule, amount=table, allocation="rank")

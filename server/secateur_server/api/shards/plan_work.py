"""The task of a Plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from secateur_server.api.convert.plan import Unplanned, unplanned
from secateur_server.api.shards.work import FileWork, close_file, state_before
from secateur_server.backends.pieces import Cut
from secateur_server.backends.protocol import Backend
from secateur_server.cut.plan import plan, removed_of
from secateur_server.cut.removed import Outcome, Removed
from secateur_server.cut.scored import score_tensors
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter
from secateur_server.uris.references import Reference


@dataclass(frozen=True)
class CutTensors:
    """Tensors of a file whose units were compared with those of other files.

    Attributes:
        rule: For these tensors.
        cuts: For each tensor the units that each amount prunes, and the cuts.
        dtype: In which the scores were compared.
    """

    rule: Selection
    cuts: Sequence[tuple[Sequence[int], Sequence[Cut]]]
    dtype: torch.dtype


@dataclass(frozen=True)
class PlanWork:
    """A file to plan.

    Attributes:
        work: The file, with the rules before the planned one.
        rules: Together they are the planned rule for tensors that are compared in this file alone.
        amounts: Each takes the place of the rule's amount.
        at: The path of `amounts` in the request; empty if they are the rule's own.
        across: All other tensors.
    """

    work: FileWork
    rules: Sequence[Selection]
    amounts: Sequence[Amount]
    at: str
    across: Sequence[CutTensors]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.work.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.work.reference


@dataclass(frozen=True)
class PlannedFile:
    """What a Plan makes of a file.

    Attributes:
        outcomes: Of each rule, one for each amount.
        removed: For each tensor that is compared across files, what each amount prunes of it.
        before: All planned tensors.
    """

    outcomes: Sequence[Sequence[Outcome]]
    removed: Mapping[str, Sequence[Removed]]
    before: Mapping[str, Unplanned]

    def of_amount(self, index: int) -> list[Outcome]:
        """Returns the outcome of each rule for an amount."""
        return [of_rule[index] for of_rule in self.outcomes]


def plan_file(context: RequestContext, backend: Backend, asked: PlanWork) -> PlannedFile:
    """Plans the tensors of a file."""
    state = state_before(context, asked.work)
    outcomes = [plan(context, rule, asked.amounts, state, {}, asked.at) for rule in asked.rules]
    removed: dict[str, Sequence[Removed]] = {}
    for part in asked.across:
        removed |= _removed(context, part, state)
    rules = chain(asked.rules, (part.rule for part in asked.across))
    names = chain.from_iterable(rule.tensors for rule in rules)
    before = {name: unplanned(context, state[name]) for name in context.each(names)}
    close_file(asked.work.reference)
    return PlannedFile(outcomes, removed, before)


def _removed(
    context: RequestContext, part: CutTensors, state: Mapping[str, Parameter]
) -> dict[str, Sequence[Removed]]:
    tensors = score_tensors(context, part.rule, part.rule.tensors, state, {})
    return {
        tensor.name: removed_of(context, tensor, state[tensor.name], counts, cuts, part.dtype)
        for tensor, (counts, cuts) in zip(context.each(tensors), part.cuts, strict=True)
    }

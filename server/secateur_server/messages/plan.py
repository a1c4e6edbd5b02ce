"""Amounts from the wire, and a plan to it."""

import math
from collections.abc import Mapping, Sequence

from secateur_proto import plan_pb2 as pb
from secateur_proto.pruner_pb2 import PlanHeader
from secateur_server.errors import InvalidRequest, InvalidSpec
from secateur_server.messages.report import encode_choice
from secateur_server.messages.spec import fraction_of
from secateur_server.pruning.norms import total
from secateur_server.pruning.plan import Outcome, Removed
from secateur_server.pruning.spec import Amount, Parameter, Rule, Selection
from secateur_server.runtime.context import RequestContext

MOST_AMOUNTS = 1000


def decode_amounts(header: PlanHeader, rules: Sequence[Rule]) -> tuple[Selection, list[Amount]]:
    """The rule that is planned, and by what amounts.  Errors: InvalidRequest, InvalidSpec."""
    planned = rules[-1]
    if not isinstance(planned, Selection):
        raise InvalidSpec(f"spec.rules[{len(rules) - 1}]", "the last one must be a selection")
    if len(header.amounts) > MOST_AMOUNTS:
        raise InvalidRequest(
            "header.amounts", f"{len(header.amounts)} are more than {MOST_AMOUNTS}"
        )
    amounts = [_amount(a, f"header.amounts[{i}]") for i, a in enumerate(header.amounts)]
    return planned, amounts or [planned.amount]


def _amount(amount: pb.Amount, path: str) -> Amount:
    chosen = amount.WhichOneof("amount")
    if chosen is None:
        raise InvalidRequest(f"{path}.amount", "fraction or count is needed")
    if chosen == "fraction":
        return fraction_of(amount.fraction, f"{path}.fraction")
    return int(amount.count)


def encode_plan(
    context: RequestContext,
    outcomes: Sequence[Outcome],
    parameters: Mapping[str, Parameter],
    names: Sequence[str],
) -> pb.PruningPlan:
    """A plan for the tensors `names`, in their order."""
    return pb.PruningPlan(
        amounts=[_planned(context, outcome, parameters, names) for outcome in outcomes]
    )


def _planned(
    context: RequestContext,
    outcome: Outcome,
    parameters: Mapping[str, Parameter],
    names: Sequence[str],
) -> pb.PlannedAmount:
    tensors = [
        _tensor(context, name, parameters[name], outcome.removed[name])
        for name in context.each(names)
    ]
    pruned = sum(tensor.pruned for tensor in tensors)
    total = sum(tensor.total for tensor in tensors)
    removed = [outcome.removed[name] for name in names]
    return pb.PlannedAmount(
        choices=map(encode_choice, context.each(outcome.choices)),
        tensors=tensors,
        pruned=pruned,
        total=total,
        sparsity=pruned / total if total else 0.0,
        norm_removed=_norm_share(removed),
        kept_bytes=sum(
            (tensor.total - tensor.pruned) * parameters[tensor.name].weight.element_size()
            for tensor in tensors
        ),
    )


def _tensor(
    context: RequestContext, name: str, parameter: Parameter, removed: Removed
) -> pb.PlannedTensor:
    total = parameter.weight.numel()
    before = 0 if parameter.mask is None else total - parameter.mask.kept(context)
    pruned = before + removed.elements
    return pb.PlannedTensor(
        name=name,
        pruned=pruned,
        total=total,
        sparsity=pruned / total if total else 0.0,
        norm_removed=_norm_share([removed]),
    )


def _norm_share(removed: Sequence[Removed]) -> float:
    whole = total(r.whole for r in removed)
    share = total(r.energy for r in removed) / whole if whole else 0.0
    return min(1.0, math.sqrt(share)) if math.isfinite(share) else 1.0

"""Decodes a server's plans."""

from collections.abc import Sequence
from functools import partial

from secateur.decoding import decoded
from secateur.lazy import LazyMapping, LazySequence
from secateur.plan import Plan, PlannedAmount, PlannedTensor
from secateur.report_decoding import decode_choice
from secateur_proto import plan_pb2 as pb
from secateur_proto import spec_pb2
from secateur_proto.enums import plain_name
from secateur_proto.pruner_pb2 import PlanHeader
from secateur_proto.spec_pb2 import Selection


def decode_plan(message: pb.PruningPlan, header: PlanHeader) -> Plan:
    """Decodes a plan.

    Args:
        message: The answer.
        header: The header of the request.
    """
    rules = header.spec.rules
    asked = header.amounts or [rules[-1].selection]
    return decoded(
        Plan, message, amounts=tuple(map(_planned, asked, message.amounts)), method=_method(rules)
    )


_SCOPES = {
    spec_pb2.SCOPE_PER_ROW: "each output row by itself",
    spec_pb2.SCOPE_PER_TENSOR: "each tensor by itself",
    spec_pb2.SCOPE_GLOBAL: "all tensors together",
    spec_pb2.SCOPE_ISOMORPHIC: "tensors of like names together",
}


def _method(rules: Sequence[spec_pb2.Rule]) -> str:
    """How the planned rule ranks units, for a person."""
    selection = rules[-1].selection
    importance = str(selection.WhichOneof("importance"))
    for other in ("scales", "importance_scores"):
        importance = other if getattr(selection, other) else importance
    unit = plain_name(spec_pb2.Granularity.DESCRIPTOR, selection.granularity)
    allocation = plain_name(spec_pb2.Allocation.DESCRIPTOR, selection.allocation)
    by = f", allocation {allocation}" if selection.allocation else ""
    last = f"the last of {len(rules)} rules, after the others: " if len(rules) > 1 else ""
    return f"{last}{importance}, {_SCOPES[selection.scope]}{by}; a unit is 1 {unit}"


def _planned(asked: pb.Amount | Selection, message: pb.PlannedAmount) -> PlannedAmount:
    kind = asked.WhichOneof("amount")
    return decoded(
        PlannedAmount,
        message,
        amount=getattr(asked, kind) if kind in ("fraction", "count") else None,
        choices=LazySequence(message.choices, decode_choice),
        tensors=LazyMapping(message.tensors, partial(decoded, PlannedTensor)),
    )

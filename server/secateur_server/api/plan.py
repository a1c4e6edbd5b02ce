"""The work of Plan: a Prune is predicted for many amounts."""

from collections.abc import Mapping, Sequence

from secateur_proto import pruner_pb2 as pb
from secateur_proto.plan_pb2 import PruningPlan
from secateur_server.api.convert.columns import field_head
from secateur_server.api.convert.plan import Unplanned, decode_amounts, encode_plan, unplanned
from secateur_server.api.rules import before, check_prior, is_solving, reads_of
from secateur_server.cut.plan import plan
from secateur_server.cut.plan_small import is_planned_by_runs
from secateur_server.cut.prune import prune
from secateur_server.cut.removed import Outcome
from secateur_server.errors import InvalidSpec
from secateur_server.outputs.dense import Dense
from secateur_server.outputs.hollow import hollow_state_dict
from secateur_server.outputs.masks import Masks
from secateur_server.outputs.protocol import PlannedOutput
from secateur_server.outputs.reparametrized import Reparametrized
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Amount
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Rule, Selection
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.state_dict.state_dict import StateDict

# Bytes of a plan for each amount: for a character of a name, and for a tensor. The answer is in
# memory in parts and as a whole, and has each name and number twice, for the tensor and for its
# choice. A plan without arrays has a Python object for each number.
NAME_BYTES, ARRAY_BYTES, OBJECT_BYTES = 4, 250, 700

# By the fields of a plan that have their sizes.
PLANNED_OUTPUTS: Mapping[str, PlannedOutput] = {
    "masks_bytes": Masks(),
    "reparametrized_bytes": Reparametrized(),
    "dense_bytes": Dense(),
}


def decode_plan(context: RequestContext, header: pb.PlanHeader) -> list[Rule]:
    """Decodes the rules of a call, the last of which is planned.

    Raises:
        InvalidSpec, InvalidRequest: A field is wrong.
    """
    rules = decode_spec(context, header.spec)
    if is_solving(rules):
        raise InvalidSpec("spec.rules", "Plan takes no solver, which updates weights; leave it out")
    check_prior(header)
    return rules


def plan_call(sources: Sources, call: Call[pb.PlanHeader], asked: Sequence[Rule]) -> bytes:
    """Makes the answer of a call of Plan: a PlanResponse, encoded.

    Args:
        sources: Opens the source.
        call: The call.
        asked: The decoded rules.
    """
    context = call.context
    with sources.open(call) as incoming:
        rules = resolve(context, asked, incoming.state_dict.catalog)
        planned, amounts = decode_amounts(context, call.header, rules)
        charge_plan(context, planned, amounts)
        with context.stage("receive"):
            incoming.read(reads_of(rules))
        with sources.scheduler.cores(context, incoming.size):
            state = before(context, call.header, incoming.state_dict, rules)
            extras = incoming.state_dict.extras
            state |= prune(context, state, rules[:-1], extras)[0]
            outcomes = plan(context, planned, amounts, state, extras, path_of(call.header))
        tensors = {n: unplanned(context, state[n]) for n in context.each(planned.tensors)}
        sizes = sizes_of(incoming.state_dict, rules, list(state), incoming.digest())
        answer = encoded(context, outcomes, tensors, sizes)
        incoming.check_unchanged()
        return answer


def path_of(header: pb.PlanHeader) -> str:
    """Returns the path of the amounts in a request; empty if the rule has its own."""
    return "header.amounts" if header.amounts else ""


def encoded(
    context: RequestContext,
    outcomes: Sequence[Outcome],
    before: Mapping[str, Unplanned],
    sizes: PruningPlan,
) -> bytes:
    """Encodes a PlanResponse. The arguments are those of encode_plan, and what sizes_of returns."""
    parts = [*encode_plan(context, outcomes, before), sizes.SerializeToString()]
    return b"".join([field_head(1, sum(map(len, parts))), *parts])


def charge_plan(context: RequestContext, rule: Selection, amounts: Sequence[Amount]) -> None:
    """Reserves the memory of a plan of a resolved rule. Raises RequestTooLarge, QueueFull."""
    names = rule.names()
    of_tensor = ARRAY_BYTES if is_planned_by_runs(rule, amounts) else OBJECT_BYTES
    parts = len(names) + len(rule.groups)
    size = len(amounts) * (NAME_BYTES * sum(map(len, names)) + of_tensor * parts)
    what = f"a plan of {len(amounts)} amounts of {len(names)} tensors"
    context.charge("header.amounts", size, what)


def sizes_of(
    state_dict: StateDict, rules: Sequence[Rule], names: Sequence[str], digest: str
) -> PruningPlan:
    """Returns the fields of a plan that are the same for all amounts.

    Args:
        state_dict: Of the source.
        rules: Resolved.
        names: All parameters that were read.
        digest: Of the source.
    """
    named = {name for rule in rules for name in rule.names()}
    pruned = [name for name in names if name in named]
    hollow = hollow_state_dict(state_dict, pruned)
    planned = PruningPlan(input_blake3=digest)
    for field, output in PLANNED_OUTPUTS.items():
        setattr(planned, field, output.size(hollow, pruned))
    return planned

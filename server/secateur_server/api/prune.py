"""The work of Prune: read, prune, measure, write."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from secateur_proto import pruner_pb2 as pb
from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.answers import Made, written
from secateur_server.api.convert.checkpoint import checkpoint_message
from secateur_server.api.convert.report import encode_report
from secateur_server.api.details import add_details, check_details, choose_detailed
from secateur_server.api.rules import (
    before,
    check_prior,
    divided,
    extras_of,
    groups_of,
    is_solving,
    reads_of,
)
from secateur_server.api.smaller import add_shrinkage, masked_names
from secateur_server.api.solve import solve
from secateur_server.cut.choice import Choice
from secateur_server.cut.prune import prune
from secateur_server.errors import CheckpointNotFound, InvalidRequest, InvalidSpec, quote
from secateur_server.granularity.group import Group
from secateur_server.outputs import OUTPUTS
from secateur_server.report.shrinkage import measure_sent, member_flags
from secateur_server.report.warnings import NOT_SMALLER, Remarks, changes_of, warnings_of
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import Scheduler
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Rule, Selection
from secateur_server.spec.solve import check_steps, working_bytes
from secateur_server.state_dict.incoming import Incoming
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.state_dict.state_dict import StateDict, masks_of, packed_masks
from secateur_server.storage.receiver import Receiver
from secateur_server.wire.writer import OutgoingFile, digest_of


def decode_prune(context: RequestContext, header: pb.PruneHeader) -> list[Rule]:
    """Decodes the rules of a call, and checks its other fields.

    Raises:
        InvalidSpec, InvalidRequest: A field is wrong.
    """
    needs_groups = header.output in OUTPUTS and OUTPUTS[header.output].needs_groups
    rules = decode_spec(context, header.spec, default_align=0 if needs_groups else 1)
    if header.output not in OUTPUTS:
        raise InvalidRequest("header.output", f"{header.output} is not an output")
    if needs_groups and not any(rule.units_together() for rule in rules):
        name = pb.Output.Name(header.output)
        raise InvalidSpec(
            "spec.rules",
            f"have no groups, whose units {name} removes: use secateur.grouped with what "
            "secateur.groups(module, inputs) finds, or `secateur shrink FOLDER`",
        )
    if header.destination_uri and not OUTPUTS[header.output].has_data:
        name = pb.Output.Name(header.output)
        raise InvalidRequest("header.destination_uri", f"{name} writes nothing there")
    if is_solving(rules):
        _check_solving(header)
        _check_holders(context, rules)
    check_prior(header)
    check_details(header)
    return rules


def _check_solving(header: pb.PruneHeader) -> None:
    """Refuses results that do not have the updated weights."""
    if not OUTPUTS[header.output].has_weights:
        name = pb.Output.Name(header.output or pb.OUTPUT_MASKS)
        raise InvalidRequest(
            "header.output",
            f"{name} has no weights, and the spec updates them (`solver`); use OUTPUT_DENSE or "
            "OUTPUT_REPARAMETRIZED",
        )
    if header.keep:
        raise InvalidRequest(
            "header.keep",
            "cannot be used with a solver, whose result is more than masks; use OUTPUT_DENSE, and "
            "upload the result",
        )


def _check_holders(context: RequestContext, rules: Sequence[Rule]) -> None:
    """Refuses a tensor that is a Gram matrix, and scores, factors or a mask as well."""
    extras = extras_of(rules)
    for rule in divided(rules)[1]:
        for name, gram in context.each(rule.grams.items()):
            if gram.holder in extras:
                raise InvalidSpec(
                    f"{rule.path}.grams[{quote(name)}]",
                    f"{quote(gram.holder)} also holds scores, factors or a mask; send the Gram "
                    "matrix as a tensor of its own",
                )


def prune_call(
    sources: Sources, call: Call[pb.PruneHeader], asked: Sequence[Rule], held: ExitStack
) -> Made:
    """Makes the answer of a call of Prune.

    All weights that are not part of the answer are freed when this returns.

    Args:
        sources: Opens the source.
        call: The call.
        asked: The decoded rules.
        held: Receives the source, which is closed once the files have been sent.
    """
    context, header = call.context, call.header
    receiver = held.enter_context(sources.receiver(context)) if header.keep else None
    incoming = held.enter_context(sources.open(call, receiver))
    output, catalog = OUTPUTS[header.output], incoming.state_dict.catalog
    rules = resolve(context, asked, catalog)
    groups = groups_of(context, rules, catalog) if output.needs_groups else []
    solving, scheduler = divided(rules)[1], sources.scheduler
    check_steps(context, solving, catalog)
    size = working_bytes(context, solving, catalog)
    with scheduler.working_memory(context, "spec.rules", size, "the solver of the largest layer"):
        with context.stage("receive"):
            incoming.read(None if output.needs_all_tensors else reads_of(rules))
        pruned = _prune(scheduler, call, asked, rules, groups, incoming)
    incoming.check_unchanged()
    result = pb.PruneResult()
    result.report.CopyFrom(pruned.report)  # faster than to construct it with a report
    with _kept(sources, context, receiver, incoming, pruned, result):
        made = written(sources, call, result, pruned.files, incoming.check_unchanged)
    sources.metrics.reported(context, pruned.report)
    sources.metrics.pruned(context, pruned.count, pruned.report.sparsity)
    return made


@dataclass(frozen=True)
class Pruned:
    """The outcome of a Prune.

    Attributes:
        parameters: Those that the rules name, with their new masks.
        files: To send.
        report: Measured on what is sent.
        count: Elements that no mask pruned before.
    """

    parameters: Mapping[str, Parameter]
    files: list[OutgoingFile]
    report: SparsityReport
    count: int


def _prune(
    scheduler: Scheduler,
    call: Call[pb.PruneHeader],
    asked: Sequence[Rule],
    rules: Sequence[Rule],
    groups: Sequence[Group],
    incoming: Incoming,
) -> Pruned:
    """Prunes the tensors that were read, and measures them."""
    context, state_dict = call.context, incoming.state_dict
    selecting, solving = divided(rules)
    remarks = Remarks(without_factors=_without_factors(context, selecting, state_dict))
    encode = partial(_encoded, call, asked, rules, groups, incoming, remarks)
    with scheduler.cores(context, incoming.size):
        context.begin("prune")
        prior = before(context, call.header, state_dict, rules)
        pruned, outcomes = prune(context, prior, selecting, state_dict.extras)
        if not solving:
            return encode(prior, pruned, outcomes)
    solved, more = solve(context, scheduler, incoming, solving, {**prior, **pruned}, remarks)
    with scheduler.cores(context, incoming.size):
        updated = {**pruned, **solved}
        in_order = {name: updated[name] for name in prior if name in updated}
        return encode(prior, in_order, [*outcomes, *more])


def _without_factors(
    context: RequestContext, rules: Sequence[Rule], state_dict: StateDict
) -> list[str]:
    """The tensors whose uploaded factors are all zero."""
    return [
        name
        for rule in rules
        if isinstance(rule, Selection)
        for uploads in rule.importance.uploads.values()
        for name, holder in context.each(uploads.items())
        if name in rule.tensors and state_dict.parameters[name].weight.numel()
        if not state_dict.extras[holder].any()
    ]


def _encoded(
    call: Call[pb.PruneHeader],
    asked: Sequence[Rule],
    rules: Sequence[Rule],
    groups: Sequence[Group],
    incoming: Incoming,
    remarks: Remarks,
    prior: Mapping[str, Parameter],
    pruned: Mapping[str, Parameter],
    outcomes: Sequence[Sequence[Choice]],
) -> Pruned:
    """Makes the files and the report."""
    context, header, state_dict = call.context, call.header, incoming.state_dict
    with context.stage("encode"):
        histograms = choose_detailed(context, header, pruned)
        files = OUTPUTS[header.output].files(context, state_dict, pruned, groups)
        digests = incoming.digest(), digest_of(files)
        measured = measure_sent(context, pruned, state_dict.shrinking)
        catalog = state_dict.catalog
        report = encode_report(context, measured, catalog, *digests, outcomes)
        add_details(context, report, histograms, pruned, state_dict.shrinking)
        changes = changes_of(context, report, catalog, prior, pruned)
        if state_dict.shrinking is not None:
            every = {**prior, **pruned}
            flags_of = partial(member_flags, context, every)
            add_shrinkage(context, report, state_dict, groups, masked_names(every), flags_of)
        warnings = warnings_of(context, report, asked, rules, catalog, changes, remarks)
        if header.output == pb.OUTPUT_PACKED:
            warnings = [warning for warning in warnings if warning.code != NOT_SMALLER]
        report.warnings.extend(warnings)
    return Pruned(pruned, files, report, sum(change.pruned for change in changes))


@contextmanager
def _kept(
    sources: Sources,
    context: RequestContext,
    receiver: Receiver | None,
    incoming: Incoming,
    pruned: Pruned,
    result: pb.PruneResult,
) -> Iterator[None]:
    """Creates a checkpoint, if the call asks for one.

    The checkpoint is deleted if the block fails, since no caller has its name.
    """
    if receiver is None:
        yield
        return
    masks = {**incoming.state_dict.masks, **masks_of(pruned.parameters)}
    stored = receiver.receive_file(packed_masks(context, masks))
    record, owner = receiver.create(incoming.files, stored), context.tenant.owner
    try:
        expire_time = sources.store.expire_time(owner, record)
        result.checkpoint.CopyFrom(checkpoint_message(record, expire_time))
        yield
    except BaseException:
        with suppress(CheckpointNotFound):  # it may have been removed for another one
            sources.store.delete(owner, record.name)
        raise

"""The work of Finalize: masks are applied to their weights."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.answers import Made, written
from secateur_server.api.convert.report import encode_report
from secateur_server.api.details import add_details, check_details, choose_detailed
from secateur_server.api.rules import check_prior
from secateur_server.api.smaller import add_shrinkage, masked_names
from secateur_server.cut.prior import prune_zeros
from secateur_server.errors import InvalidRequest, InvalidSpec
from secateur_server.granularity.group import Group
from secateur_server.granularity.groups import resolve_group
from secateur_server.granularity.kept_units import distinct_groups
from secateur_server.outputs import OUTPUTS
from secateur_server.outputs.dense import folded_files
from secateur_server.outputs.packed import packed_files
from secateur_server.report.shrinkage import measure_sent, member_flags
from secateur_server.report.warnings import not_shrunk
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.decode import decode_groups
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile, digest_of

# The outputs of a model without masks.
FINAL = {pb.OUTPUT_UNSPECIFIED, pb.OUTPUT_DENSE, pb.OUTPUT_SHRUNK, pb.OUTPUT_PACKED}


def decode_finalize(context: RequestContext, header: pb.FinalizeHeader) -> Sequence[Group]:
    """Decodes the groups of a call, and checks its other fields.

    Raises:
        InvalidSpec, InvalidRequest: A field is wrong.
    """
    if header.output not in FINAL:
        raise InvalidRequest("header.output", f"{header.output} is not an output of Finalize")
    check_prior(header)
    check_details(header)
    needs_groups = OUTPUTS[header.output].needs_groups
    if needs_groups != bool(header.groups):
        why = (
            "is empty; OUTPUT_SHRUNK needs groups, such as secateur.groups(module, inputs) finds"
            if needs_groups
            else "needs OUTPUT_SHRUNK"
        )
        raise InvalidSpec("header.groups", why)
    if header.prior == pb.PRIOR_ZEROS and not needs_groups:
        raise InvalidRequest("header.prior", "needs OUTPUT_SHRUNK")
    if header.tensors and needs_groups:
        raise InvalidRequest(
            "header.tensors",
            "cannot be used with OUTPUT_SHRUNK, which folds all pairs; leave it out",
        )
    return decode_groups(context, header.groups, "header.groups")


def finalize_call(
    sources: Sources, call: Call[pb.FinalizeHeader], asked: Sequence[Group], held: ExitStack
) -> Made:
    """Makes the answer of a call of Finalize.

    Args:
        sources: Opens the source.
        call: The call.
        asked: The decoded groups.
        held: Receives the source, which is closed once the files have been sent.
    """
    context, header = call.context, call.header
    incoming = held.enter_context(sources.open(call))
    state_dict = incoming.state_dict
    names = state_dict.named(context, "header.tensors", header.tensors)
    groups = resolved_groups(context, asked, state_dict.catalog)
    with context.stage("receive"):
        incoming.read(None)
    with sources.scheduler.cores(context, incoming.size), context.stage("encode"):
        context.begin("prune")
        _add_prior(context, header, state_dict, groups)
        parameters = dict(state_dict.parameters)
        covered = {name: parameters[name] for name in names}
        histograms = choose_detailed(context, header, covered)
        files = final_files(context, header, state_dict, groups, names)
        measured = measure_sent(context, covered, state_dict.shrinking)
        digests = incoming.digest(), digest_of(files)
        report = encode_report(context, measured, state_dict.catalog, *digests, are_folded=True)
        add_details(context, report, histograms, covered, state_dict.shrinking)
        if groups:
            flags_of = partial(member_flags, context, parameters)
            add_shrinkage(context, report, state_dict, groups, masked_names(parameters), flags_of)
            report.warnings.extend(filter(None, [not_shrunk(report.shrinkage)]))
    incoming.check_unchanged()
    sources.metrics.reported(context, report)
    result = pb.FinalizeResult(report=report)
    return written(sources, call, result, files, incoming.check_unchanged)


def resolved_groups(
    context: RequestContext, groups: Sequence[Group], catalog: Catalog
) -> list[Group]:
    """Resolves the groups of a call, each once.

    Raises:
        InvalidSpec: They do not fit the state_dict, or each other.
    """
    resolved = [resolve_group(context, group, catalog) for group in context.each(groups)]
    return distinct_groups(context, resolved, catalog)


def _add_prior(
    context: RequestContext,
    header: pb.FinalizeHeader,
    state_dict: StateDict,
    groups: Sequence[Group],
) -> None:
    """Masks the zeros of the groups' tensors, if the call counts them as pruned."""
    if header.prior == pb.PRIOR_ZEROS:
        named = {member.tensor for group in groups for member in group.members}
        state_dict.parameters = prune_zeros(context, state_dict.parameters, named)


def final_files(
    context: RequestContext,
    header: pb.FinalizeHeader,
    state_dict: StateDict,
    groups: Sequence[Group],
    names: Sequence[str],
) -> list[OutgoingFile]:
    """Makes the files. names: The parameters that the report covers."""
    if groups:
        return OUTPUTS[header.output].files(context, state_dict, {}, groups)
    parameters = state_dict.parameters
    # Without names, masks of integer tensors are applied too, which no report covers.
    folded = names if header.tensors else parameters
    make = packed_files if header.output == pb.OUTPUT_PACKED else folded_files
    return make(context, state_dict, {name: parameters[name] for name in folded})

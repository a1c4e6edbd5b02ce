"""The work of Finalize: masks are applied to their weights."""

from contextlib import ExitStack

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.answers import Made, written
from secateur_server.api.convert.report import encode_report
from secateur_server.errors import InvalidRequest
from secateur_server.outputs.dense import folded_files
from secateur_server.outputs.packed import packed_files
from secateur_server.report.tensors import measure_tensors
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.wire.writer import digest_of

# Make the files of each output of a Finalize.
FINAL_OUTPUTS = {
    pb.OUTPUT_UNSPECIFIED: folded_files,
    pb.OUTPUT_DENSE: folded_files,
    pb.OUTPUT_PACKED: packed_files,
}


def finalize_call(sources: Sources, call: Call[pb.FinalizeHeader], held: ExitStack) -> Made:
    """Makes the answer of a call of Finalize.

    Args:
        sources: Opens the source.
        call: The call.
        held: Receives the source, which is closed once the files have been sent.
    """
    context = call.context
    if call.header.output not in FINAL_OUTPUTS:
        raise InvalidRequest(
            "header.output", f"{call.header.output} is not one of a Finalize: dense or packed"
        )
    incoming = held.enter_context(sources.open(call))
    state_dict = incoming.state_dict
    names = state_dict.named(context, "header.tensors", call.header.tensors)
    with context.stage("receive"):
        incoming.read(None)
    with sources.scheduler.cores(context, incoming.size), context.stage("encode"):
        context.begin("prune")
        # Without names, masks of integer tensors are applied too, which no report covers.
        folded = names if call.header.tensors else list(state_dict.parameters)
        parameters = state_dict.parameters
        make_files = FINAL_OUTPUTS[call.header.output]
        files = make_files(context, state_dict, {name: parameters[name] for name in folded})
        measured = measure_tensors(context, {name: parameters[name] for name in names})
        digests = incoming.digest(), digest_of(files)
        report = encode_report(context, measured, state_dict.catalog, *digests, are_folded=True)
    incoming.check_unchanged()
    sources.metrics.reported(context, report)
    return written(sources, call, pb.FinalizeResult(report=report), files, incoming)

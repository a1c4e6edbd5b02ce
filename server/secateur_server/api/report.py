"""The work of Report: tensors are measured."""

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.convert.report import encode_report
from secateur_server.api.details import add_details, check_details, choose_detailed
from secateur_server.report.tensors import measure_tensors
from secateur_server.state_dict.sources import Call, Sources


def report_call(sources: Sources, call: Call[pb.ReportHeader]) -> pb.ReportResponse:
    """Makes the answer of a call of Report."""
    context = call.context
    check_details(call.header)
    with sources.open(call) as incoming:
        state_dict = incoming.state_dict
        names = state_dict.named(context, "header.tensors", call.header.tensors)
        with context.stage("receive"):
            incoming.read(names)
        covered = {name: state_dict.parameters[name] for name in names}
        with sources.scheduler.cores(context, incoming.size), context.stage("encode"):
            measured = measure_tensors(context, covered)
            report = encode_report(context, measured, state_dict.catalog, incoming.digest())
            add_details(context, report, choose_detailed(context, call.header, covered), covered)
        incoming.check_unchanged()
        sources.metrics.reported(context, report)
        return pb.ReportResponse(report=report)

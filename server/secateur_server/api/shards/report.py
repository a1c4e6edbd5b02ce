"""Report: each file is measured by a task."""

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.convert.report import report_of
from secateur_server.api.details import check_details
from secateur_server.api.shards.model import NotDivisible, divided_model, worked
from secateur_server.api.shards.work import FileWork, measure_file
from secateur_server.cut.drivers import Cluster
from secateur_server.state_dict.sources import Call, Sources


def report_files(
    sources: Sources, cluster: Cluster, call: Call[pb.ReportHeader]
) -> pb.ReportResponse:
    """Makes the answer of a call of Report, as report_call does.

    Raises:
        NotDivisible: The server must do the work.
    """
    context, header = call.context, call.header
    check_details(header)
    if header.HasField("details"):
        raise NotDivisible
    with divided_model(sources, cluster, call) as model:
        names = model.state_dict.named(context, "header.tensors", header.tensors)
        works = [
            FileWork(reference, of_file)
            for reference, of_file in zip(model.references, model.divide(names), strict=True)
            if of_file
        ]
        with context.stage("encode"):
            parts = worked(context, model.cluster, "read", measure_file, works)
            report = report_of(context, b"".join(parts), names, model.catalog, "")
        model.check_unchanged()
    sources.metrics.reported(context, report)
    return pb.ReportResponse(report=report)

"""Details of the tensors of a report, where the header asks for them."""

from collections.abc import Mapping

from secateur_proto import pruner_pb2 as pb
from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.convert.details import encode_details
from secateur_server.errors import InvalidRequest
from secateur_server.report.details import choose, details_of
from secateur_server.report.histogram import Histogram
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.slices import Shrinking, smaller_parameter

_Header = pb.PruneHeader | pb.ReportHeader | pb.FinalizeHeader

# Without `max_bytes` a report of some thousand tensors is below the 4 MiB that gRPC's clients
# accept by default.
_DEFAULT_BYTES, _MOST_BYTES = 3 << 20, 16 << 20


def check_details(header: _Header) -> None:
    """Raises InvalidRequest for a budget that is too large."""
    if header.details.max_bytes > _MOST_BYTES:
        raise InvalidRequest(
            "header.details.max_bytes",
            f"{header.details.max_bytes} is above {_MOST_BYTES}; ask for fewer bytes",
        )


def choose_detailed(
    context: RequestContext, header: _Header, parameters: Mapping[str, Parameter]
) -> Mapping[str, Histogram]:
    """Chooses the tensors that get details, and makes their histograms.

    Args:
        context: The request.
        header: Of the call.
        parameters: Those of the report. Masks have not been applied to weights.

    Returns:
        The histograms by name; empty if the header does not ask for details.
    """
    if not header.HasField("details"):
        return {}
    chosen = choose(context, parameters, header.details.max_bytes or _DEFAULT_BYTES)
    # A message has copies of what is in it, and the answer another one.
    context.charge("header.details", 3 * chosen.bytes, "the details of a report")
    return chosen.histograms


def add_details(
    context: RequestContext,
    report: SparsityReport,
    histograms: Mapping[str, Histogram],
    parameters: Mapping[str, Parameter],
    shrinking: Shrinking | None = None,
) -> None:
    """Adds the details of tensors to a report.

    Args:
        context: The request.
        report: Measured on what is sent.
        histograms: As choose_detailed returns them.
        parameters: Those of the report, before slices are removed.
        shrinking: The kept slices; None if nothing is removed.
    """
    for tensor in context.each(report.tensors if histograms else ()):
        histogram, parameter = histograms.get(tensor.name), parameters[tensor.name]
        if histogram is None:
            continue
        if shrinking is not None and tensor.name in shrinking.slices:
            parameter = smaller_parameter(context, tensor.name, parameter, shrinking)
        details = details_of(context, histogram, parameter, tensor.zero_slices)
        tensor.details.CopyFrom(encode_details(details))

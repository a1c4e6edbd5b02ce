"""Reports of shrunk models."""

from collections.abc import Mapping, Sequence

from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.convert.report import replace_tensors
from secateur_server.api.convert.shrinkage import encode_shrinkage
from secateur_server.granularity.group import Group
from secateur_server.report.shrinkage import find_uncut, measure_smaller
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict


def describe_smaller(
    context: RequestContext,
    report: SparsityReport,
    state_dict: StateDict,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
    are_folded: bool = False,
) -> None:
    """Changes a report of a model to one of the shrunk model.

    Args:
        context: The request.
        report: Of the model before slices are removed.
        state_dict: With the slices that it keeps, if any are removed. Else nothing happens.
        groups: As distinct_groups returns them.
        parameters: All, with the masks that decided what is removed.
        are_folded: As for encode_report.
    """
    shrinking = state_dict.shrinking
    if shrinking is None:
        return
    covered = {tensor.name: parameters[tensor.name] for tensor in report.tensors}
    replace_tensors(report, measure_smaller(context, covered, shrinking), are_folded)
    zero_slices = {
        tensor.name: list(tensor.zero_slices)
        for tensor in report.tensors
        if parameters[tensor.name].mask is not None
    }
    uncut = list(find_uncut(context, zero_slices, groups, parameters))
    report.shrinkage.CopyFrom(encode_shrinkage(context, state_dict, groups, uncut))

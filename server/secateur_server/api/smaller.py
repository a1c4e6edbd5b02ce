"""Reports of shrunk models."""

from collections.abc import Mapping, Sequence

from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.convert.report import replace_tensors
from secateur_server.api.convert.shrinkage import encode_shrinkage
from secateur_server.granularity.group import Group
from secateur_server.report.shrinkage import find_uncut, measure_sent
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict


def describe_smaller(
    context: RequestContext,
    report: SparsityReport,
    state_dict: StateDict,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
) -> None:
    """Changes a report of a model to one of the shrunk model.

    Args:
        context: The request.
        report: Of the model before slices are removed.
        state_dict: With the slices that it keeps, if any are removed. Else nothing happens.
        groups: As distinct_groups returns them.
        parameters: All, with the masks that decided what is removed.
    """
    if state_dict.shrinking is None:
        return
    covered = {tensor.name: parameters[tensor.name] for tensor in report.tensors}
    replace_tensors(report, measure_sent(context, covered, state_dict.shrinking))
    add_shrinkage(context, report, state_dict, groups, parameters)


def add_shrinkage(
    context: RequestContext,
    report: SparsityReport,
    state_dict: StateDict,
    groups: Sequence[Group],
    parameters: Mapping[str, Parameter],
) -> None:
    """Adds to a report of a shrunk model what was removed. The arguments are as above."""
    zero_slices = {
        tensor.name: list(tensor.zero_slices)
        for tensor in report.tensors
        if parameters[tensor.name].mask is not None
    }
    uncut = list(find_uncut(context, zero_slices, groups, parameters))
    report.shrinkage.CopyFrom(encode_shrinkage(context, state_dict, groups, uncut))

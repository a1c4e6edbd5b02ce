"""Reports of shrunk models."""

from collections.abc import Container, Mapping, Sequence

from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.convert.shrinkage import encode_shrinkage
from secateur_server.granularity.group import Group
from secateur_server.report.shrinkage import FlagsOf, find_uncut
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict


def add_shrinkage(
    context: RequestContext,
    report: SparsityReport,
    state_dict: StateDict,
    groups: Sequence[Group],
    masked: Container[str],
    flags_of: FlagsOf,
) -> None:
    """Adds to a report of a shrunk model what was removed.

    Args:
        context: The request.
        report: Measured on what is sent.
        state_dict: With the slices that it keeps.
        groups: As distinct_groups returns them.
        masked: The names of the parameters that have masks.
        flags_of: As of find_uncut.
    """
    zero_slices = {
        tensor.name: list(tensor.zero_slices) for tensor in report.tensors if tensor.name in masked
    }
    uncut = list(find_uncut(context, zero_slices, groups, flags_of))
    report.shrinkage.CopyFrom(encode_shrinkage(context, state_dict, groups, uncut))


def masked_names(parameters: Mapping[str, Parameter]) -> set[str]:
    """Returns the names of the parameters that have masks."""
    return {name for name, parameter in parameters.items() if parameter.mask is not None}

"""All tensors, without the units of groups that are wholly pruned."""

from collections.abc import Mapping, Sequence

from secateur_server.granularity.group import Group
from secateur_server.granularity.kept_units import shrinking_of
from secateur_server.outputs.dense import folded_files
from secateur_server.outputs.protocol import Output
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.slices import Shrinking
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile


class Shrunk(Output):
    """OUTPUT_SHRUNK."""

    needs_groups = True

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        parameters = {**state_dict.parameters, **pruned}
        shrinking = shrinking_of(context, groups, parameters, state_dict.catalog)
        return shrunk_files(context, state_dict, pruned, shrinking)


def shrunk_files(
    context: RequestContext,
    state_dict: StateDict,
    pruned: Mapping[str, Parameter],
    shrinking: Shrinking,
) -> list[OutgoingFile]:
    """Makes the files of a state_dict without the slices that are removed.

    Args:
        context: The request.
        state_dict: As of Output.files.
        pruned: As of Output.files.
        shrinking: What is kept.
    """
    parameters = {**state_dict.parameters, **pruned}
    for name in context.each(parameters.keys() & shrinking.slices.keys()):
        if shrinking.removes_all_pruned(context, name, parameters[name]):
            parameters[name] = parameters[name]._replace(mask=None)  # nothing to fold
    state_dict.parameters, state_dict.shrinking = parameters, shrinking
    return folded_files(context, state_dict, parameters)

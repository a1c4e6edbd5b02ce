"""All tensors, with zeros where they are pruned."""

from collections.abc import Mapping, Sequence

from secateur_server.granularity.group import Group
from secateur_server.outputs.protocol import PlannedOutput
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.fold import fold
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile


class Dense(PlannedOutput):
    """OUTPUT_DENSE."""

    def is_stored(self, catalog: Catalog) -> bool:
        return not catalog.pairs

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        state_dict.parameters |= pruned
        return folded_files(context, state_dict, state_dict.parameters)

    def size(self, state_dict: StateDict, pruned: Sequence[str]) -> int:
        return state_dict.size(state_dict.parameters)


def folded_files(
    context: RequestContext, state_dict: StateDict, parameters: Mapping[str, Parameter]
) -> list[OutgoingFile]:
    """Makes the files of a state_dict, with masks applied to weights.

    Args:
        context: The request.
        state_dict: The weights of `parameters` are written to, unless they are mapped files.
        parameters: The parameters whose masks are applied. Others are sent as pairs.

    Returns:
        The files, as StateDict.files makes them.
    """
    if not state_dict.is_mapped:
        for parameter in parameters.values():
            fold(context, parameter)
    return state_dict.files(context, parameters)

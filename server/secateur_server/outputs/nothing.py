"""The report alone."""

from collections.abc import Mapping, Sequence

from secateur_server.granularity.group import Group
from secateur_server.outputs.protocol import Output
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile


class Nothing(Output):
    """OUTPUT_NONE."""

    has_data = needs_all_tensors = False

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        return []

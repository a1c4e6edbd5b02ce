"""The report alone."""

from collections.abc import Mapping, Sequence

from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.model import Model
from secateur_server.state_dict.parameter import Parameter
from secateur_server.wire.writer import OutgoingFile


class Nothing:
    """OUTPUT_NONE."""

    needs_model = False

    def files(
        self, context: RequestContext, model: Model, pruned: Mapping[str, Parameter]
    ) -> list[OutgoingFile]:
        return []

    def size(self, model: Model, pruned: Sequence[str]) -> int:
        return 0

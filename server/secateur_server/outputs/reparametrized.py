"""Pairs X_orig and X_mask, as torch.nn.utils.prune leaves them."""

from collections.abc import Mapping, Sequence

from secateur_server.errors import InvalidStateDict
from secateur_server.granularity.group import Group
from secateur_server.outputs.protocol import PlannedOutput
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile


class Reparametrized(PlannedOutput):
    """OUTPUT_REPARAMETRIZED."""

    def is_stored(self, catalog: Catalog) -> bool:
        return True

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        state_dict.parameters |= pruned
        return state_dict.files(context, ())

    def size(self, state_dict: StateDict, pruned: Sequence[str]) -> int:
        try:
            return state_dict.size(())
        except InvalidStateDict:
            return 0

"""Pairs X_orig and X_mask, as torch.nn.utils.prune leaves them."""

from collections.abc import Mapping, Sequence

from secateur_server.errors import InvalidStateDict
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.model import Model
from secateur_server.state_dict.parameter import Parameter
from secateur_server.wire.writer import OutgoingFile


class Reparametrized:
    """OUTPUT_REPARAMETRIZED."""

    needs_model = True

    def files(
        self, context: RequestContext, model: Model, pruned: Mapping[str, Parameter]
    ) -> list[OutgoingFile]:
        model.parameters |= pruned
        return model.files(context, ())

    def size(self, model: Model, pruned: Sequence[str]) -> int:
        try:
            return model.size(())
        except InvalidStateDict:
            return 0

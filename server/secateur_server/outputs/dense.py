"""All tensors, with zeros where they are pruned."""

from collections.abc import Mapping, Sequence

from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.fold import fold
from secateur_server.state_dict.model import Model
from secateur_server.state_dict.parameter import Parameter
from secateur_server.wire.writer import OutgoingFile


class Dense:
    """OUTPUT_DENSE."""

    needs_model = True

    def files(
        self, context: RequestContext, model: Model, pruned: Mapping[str, Parameter]
    ) -> list[OutgoingFile]:
        model.parameters |= pruned
        return folded_files(context, model, model.parameters)

    def size(self, model: Model, pruned: Sequence[str]) -> int:
        return model.size(model.parameters)


def folded_files(
    context: RequestContext, model: Model, parameters: Mapping[str, Parameter]
) -> list[OutgoingFile]:
    """A model's files with the masks of some parameters applied to their weights."""
    if not model.is_mapped:
        for parameter in parameters.values():
            fold(context, parameter)
    return model.files(context, parameters)

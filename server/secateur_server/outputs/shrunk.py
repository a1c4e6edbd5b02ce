"""All tensors, without the units of groups that are wholly pruned."""

import math
from collections.abc import Mapping, Sequence

from secateur_server.granularity.group import Group
from secateur_server.granularity.kept_units import shrinking_of
from secateur_server.outputs.dense import folded_files
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.slices import Slices, smaller_shape
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile


class Shrunk:
    """OUTPUT_SHRUNK."""

    has_data = needs_all_tensors = needs_groups = True

    def is_stored(self, catalog: Catalog) -> bool:
        return False

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        parameters = {**state_dict.parameters, **pruned}
        state_dict.shrinking = shrinking_of(context, groups, parameters, state_dict.catalog)
        # Of these, kept elements may be removed too, so that counts do not tell.
        unmasked = {member.tensor for group in groups for member in group.unmasked}
        for name, kept in state_dict.shrinking.slices.items():
            if name in unmasked or name not in parameters:
                continue
            if _is_unmasked(context, parameters[name], kept):
                parameters[name] = parameters[name]._replace(mask=None)
        state_dict.parameters = parameters
        return folded_files(context, state_dict, parameters)


def _is_unmasked(context: RequestContext, parameter: Parameter, kept: Slices) -> bool:
    """Whether a mask prunes nothing of the slices that are kept, so that it need not be applied.

    It prunes all of the slices that are removed.
    """
    elements = math.prod(smaller_shape(parameter.weight.shape, kept))
    return parameter.mask is not None and parameter.mask.kept(context) == elements

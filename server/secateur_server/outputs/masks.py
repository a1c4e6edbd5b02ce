"""Masks alone, one bit for each element."""

import math
from collections.abc import Mapping, Sequence

from secateur_proto.framing import file_head, mask_bytes
from secateur_server.granularity.group import Group
from secateur_server.outputs.protocol import PlannedOutput
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict, masks_of, packed_masks
from secateur_server.wire.writer import OutgoingFile


class Masks(PlannedOutput):
    """OUTPUT_MASKS."""

    has_weights = needs_all_tensors = False

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        return [packed_masks(context, masks_of(pruned))]

    def size(self, state_dict: StateDict, pruned: Sequence[str]) -> int:
        shapes = state_dict.catalog.prunable
        return file_head((n, "U8", (mask_bytes(math.prod(shapes[n])),)) for n in pruned)[1]

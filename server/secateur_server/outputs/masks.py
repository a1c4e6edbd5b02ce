"""Masks alone, one bit an element."""

import math
from collections.abc import Mapping, Sequence

from secateur_proto.framing import file_head, mask_bytes
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.model import Model, masks_of, packed_masks
from secateur_server.state_dict.parameter import Parameter
from secateur_server.wire.writer import OutgoingFile


class Masks:
    """OUTPUT_MASKS."""

    needs_model = False

    def files(
        self, context: RequestContext, model: Model, pruned: Mapping[str, Parameter]
    ) -> list[OutgoingFile]:
        return [packed_masks(context, masks_of(pruned))]

    def size(self, model: Model, pruned: Sequence[str]) -> int:
        shapes = model.catalog.prunable
        return file_head((n, "U8", (mask_bytes(math.prod(shapes[n])),)) for n in pruned)[1]

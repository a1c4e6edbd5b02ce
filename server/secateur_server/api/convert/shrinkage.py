"""What a shrunk model lost, to the wire."""

import math
from collections.abc import Iterable, Sequence

from secateur_proto.report_pb2 import Shrinkage, ShrunkGroup, ShrunkTensor
from secateur_proto.report_pb2 import Uncut as UncutMessage
from secateur_server.backends.masks import mask_of_flags
from secateur_server.granularity.group import Group
from secateur_server.report.shrinkage import Uncut
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.slices import smaller_shape
from secateur_server.state_dict.state_dict import StateDict


def encode_shrinkage(
    context: RequestContext,
    state_dict: StateDict,
    groups: Sequence[Group],
    uncut: Iterable[Uncut],
) -> Shrinkage:
    """Makes the message.

    Args:
        context: The request.
        state_dict: With all tensors, and with the slices that they keep.
        groups: As distinct_groups returns them.
        uncut: Zero slices that were not removed.
    """
    shrinking = state_dict.shrinking
    assert shrinking is not None, "only a shrunk model has this message"
    named = {member.tensor for group in groups for member in group.every}
    names = {orig: name for name, (orig, *_) in state_dict.catalog.pairs.items()}
    message = Shrinkage()
    for stored, tensor in context.each(state_dict.tensors.items()):
        name, before = names.get(stored, stored), tensor.shape
        shape = smaller_shape(before, shrinking.slices.get(name, {}))
        elements, smaller = math.prod(before), math.prod(shape)
        size = tensor.data.nbytes
        smaller_size = size if smaller == elements else size // elements * smaller
        message.parameters_before += elements
        message.parameters += smaller
        message.bytes_before += size
        message.bytes += smaller_size
        if name in named:
            message.tensors.append(
                ShrunkTensor(
                    name=name,
                    shape_before=before,
                    shape=shape,
                    bytes_before=size,
                    bytes=smaller_size,
                )
            )
    message.groups.extend(
        ShrunkGroup(
            name=name,
            units=len(kept),
            kept=int(kept.sum()),
            mask=mask_of_flags(context, kept).bits.numpy().tobytes(),
        )
        for name, kept in context.each(shrinking.groups)
    )
    message.uncut.extend(UncutMessage(**found._asdict()) for found in uncut)
    return message

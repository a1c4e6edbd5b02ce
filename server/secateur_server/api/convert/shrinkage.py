"""What a shrunk model lost, to the wire."""

import math
from collections.abc import Iterable, Sequence

from secateur_proto.report_pb2 import Shrinkage, ShrunkGroup, ShrunkTensor
from secateur_proto.report_pb2 import Uncut as UncutMessage
from secateur_server.backends.masks import mask_of_flags
from secateur_server.granularity.group import Group
from secateur_server.report.shrinkage import Uncut
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.slices import Slices, smaller_shape
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.tensors import WireTensor


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
        name = names.get(stored, stored)
        sizes = _sizes(name, tensor, shrinking.slices.get(name, {}))
        message.parameters_before += math.prod(sizes.shape_before)
        message.parameters += math.prod(sizes.shape)
        message.bytes_before += sizes.bytes_before
        message.bytes += sizes.bytes
        if name in named:
            message.tensors.append(sizes)
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


def _sizes(name: str, tensor: WireTensor, kept: Slices) -> ShrunkTensor:
    """The sizes of a tensor before and after."""
    shape, size = smaller_shape(tensor.shape, kept), tensor.data.nbytes
    elements, smaller = math.prod(tensor.shape), math.prod(shape)
    return ShrunkTensor(
        name=name,
        shape_before=tensor.shape,
        shape=shape,
        bytes_before=size,
        bytes=size if smaller == elements else size // elements * smaller,
    )

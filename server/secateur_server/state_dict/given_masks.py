"""Masks that callers upload: 0 is pruned, 1 is kept."""

import torch
from torch import Tensor

from secateur_server.backends.masks import Mask, mask_of
from secateur_server.runtime.context import RequestContext


def to_mask(context: RequestContext, values: Tensor, error: type[Exception], field: str) -> Mask:
    """Packs a mask of 0 and 1.

    Args:
        context: The request.
        values: The mask in any dtype and shape.
        error: Raised with the field and a message for a value other than 0 and 1.
        field: The path of the mask in the request.

    Returns:
        The mask, one bit for each element.
    """
    shape = values.shape
    values = values.reshape(-1)
    if values.dtype == torch.bool:  # torch lets a bool hold a byte other than 0 and 1
        values = values.view(torch.uint8)

    def flags(begin: int, end: int) -> Tensor:
        part = values[begin:end]
        kept = part.to(torch.bool)  # faster than != 0
        other = kept & (part != 1)
        if int(other.count_nonzero()):  # faster than any()
            at = begin + int(other.nonzero()[0])
            index = [int(place) for place in torch.unravel_index(torch.tensor(at), shape)]
            raise error(field, f"is {values[at].item()} at {index}; a mask is 0 or 1")
        return kept

    return mask_of(context, flags, len(values), values.device)

"""Conversion between packed masks and masks of bool."""

import numpy as np
import torch
from torch import Tensor

from secateur_server.backends.masks import Mask, mask_of
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter


def packed(mask: Tensor) -> Mask:
    flat = mask.reshape(-1)
    return mask_of(RequestContext(), lambda begin, end: flat[begin:end], len(flat), flat.device)


def unpacked(parameter: Parameter) -> Tensor:
    """Returns the mask of a parameter, and checks that the unused bits of the last byte are 0."""
    mask = parameter.mask
    assert mask is not None
    flags = torch.from_numpy(np.unpackbits(mask.bits.cpu().numpy(), bitorder="little")).bool()
    assert not flags[mask.elements :].any()
    return flags[: mask.elements].view(parameter.weight.shape)

"""Masks as bits."""

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """A mask as bits: row-major, lowest bit first, the last byte padded with 0.

    mask: bool, any shape.  Returns: uint8, ceil(elements / 8), on the CPU.
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))

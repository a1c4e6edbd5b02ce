"""The dtypes of the safetensors format that torch computes with here."""

import torch

from secateur_proto.dtypes import DTYPES

# Tensors of other dtypes are passed on as bytes.
TORCH_DTYPES: dict[str, torch.dtype] = {
    wire: getattr(torch, dtype.name) for wire, dtype in DTYPES.items() if dtype.name and dtype.kind
}
WIRE_DTYPES = {dtype: wire for wire, dtype in TORCH_DTYPES.items()}

# Globs match floating tensors only: integers are mostly counts and indices, not weights.
PRUNABLE = tuple(TORCH_DTYPES[wire] for wire, dtype in DTYPES.items() if dtype.is_prunable)

FP8 = tuple(dtype for dtype in PRUNABLE if dtype.is_floating_point and dtype.itemsize == 1)

"""Files of masks: a bit for each element, and in the metadata the shapes, which bits do not have."""

import json
from collections.abc import Mapping, Sequence

# From names to shapes, as JSON.
MASK_SHAPES = "secateur.mask_shapes"


def mask_metadata(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """The metadata of a safetensors file that holds the masks of tensors with these shapes."""
    table = {name: list(shape) for name, shape in shapes.items()}
    return {MASK_SHAPES: json.dumps(table, separators=(",", ":"), ensure_ascii=False)}

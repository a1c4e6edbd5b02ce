"""The index of a model in shards, as Hugging Face writes it.

{"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: FILE}}
https://huggingface.co/docs/safetensors/metadata_parsing
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur_proto.framing import tensor_bytes

SUFFIX = ".index.json"


def parse_index(data: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight_map of an index, and the rest of it.  Errors: ValueError."""
    try:
        table = json.loads(data)
        weight_map = table.pop("weight_map")
        "".join(weight_map.values()).encode()  # JSON can spell what UTF-8 cannot
        is_map = isinstance(table.get("metadata", {}), dict)
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        is_map = False
    if not is_map or not weight_map:
        raise ValueError("is no index: it needs a weight_map from names to files")
    return weight_map, table


def index_text(
    weight_map: Mapping[str, str],
    rest: Mapping[str, Any],
    tensors: Iterable[tuple[str, Sequence[int]]],
) -> str:
    """An index.  rest: what else it says.  tensors: dtype and shape of all that is in the files."""
    size = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors)
    metadata = {**rest.get("metadata", {}), "total_size": size}
    table = {**rest, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(table, indent=2) + "\n"

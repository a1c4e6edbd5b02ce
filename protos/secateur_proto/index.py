"""The index of a model in shards, as Hugging Face writes it.

{"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: FILE}}
https://huggingface.co/docs/safetensors/metadata_parsing
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur_proto.framing import tensor_bytes
from secateur_proto.text import Text

SUFFIX = ".index.json"


# What an index says beside its weight_map is little.
_MOST_KEYS = 64
_MOST_LEVELS = 32


def parse_index(data: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight_map of an index, and the rest of it.  Errors: ValueError."""
    try:
        weight_map, rest = _tables(Text(data.decode("utf-8-sig")))
        "".join(weight_map.values()).encode()  # JSON can spell what UTF-8 cannot
        is_index = isinstance(rest.get("metadata", {}), dict) and _is_flat(rest)
    except (ValueError, RecursionError):
        is_index = False
    if not is_index or not weight_map:
        raise ValueError("is no index: it needs a weight_map from names to files")
    return weight_map, rest


def _tables(text: Text) -> tuple[dict[str, str], dict[str, Any]]:
    """Errors: ValueError, RecursionError."""
    weight_map: dict[str, str] = {}
    rest: dict[str, Any] = {}
    for key in text.keys():  # noqa: SIM118 (not a dict's)
        if key == "weight_map":
            weight_map = {name: text.string() for name in text.keys()}  # noqa: SIM118
        elif len(rest) == _MOST_KEYS:
            raise ValueError("there are too many keys")
        else:
            rest[key] = text.value()
    text.end()
    return weight_map, rest


def _is_flat(value: object, levels: int = _MOST_LEVELS) -> bool:
    """Whether it can be written again: that takes more of the stack than to read it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(part, levels - 1) for part in inner)


def index_text(
    weight_map: Mapping[str, str],
    rest: Mapping[str, Any],
    tensors: Iterable[tuple[str, Sequence[int]]],
) -> str:
    """An index.  rest: what else it says.  tensors: dtype and shape of all that is in the files."""
    described = list(tensors)
    size = sum(tensor_bytes(dtype, shape) for dtype, shape in described)
    metadata = {**rest.get("metadata", {}), "total_size": size}
    if isinstance(before := metadata.get("total_parameters"), int):
        # A shrunk model has fewer; the masks of pairs are elements, and not parameters.
        elements = sum(math.prod(shape) for _, shape in described)
        metadata["total_parameters"] = min(before, elements)
    table = {**rest, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(table, indent=2) + "\n"

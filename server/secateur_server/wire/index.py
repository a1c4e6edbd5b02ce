"""The index of a model in shards, as Hugging Face writes it.

{"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: FILE}}
https://huggingface.co/docs/safetensors/metadata_parsing
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from secateur_proto.framing import tensor_bytes
from secateur_server.errors import InvalidStateDict, quote
from secateur_server.wire.header import MAX_HEADER_BYTES
from secateur_server.wire.writer import Outgoing

SUFFIX = ".index.json"


@dataclass(frozen=True)
class Index:
    """An index.

    tied: names of tensors that are stored under another name, and the file of that one.
    rest: what else the index says.
    """

    filename: str
    tied: Mapping[str, str]
    rest: Mapping[str, Any]

    def rewritten(self, written: Mapping[str, Mapping[str, Outgoing]]) -> bytes:
        """The index of a model that has become other tensors.  written: by file and by name."""
        weight_map = {name: file for file, tensors in written.items() for name in tensors}
        size = sum(
            tensor_bytes(tensor.dtype, tensor.shape)
            for tensors in written.values()
            for tensor in tensors.values()
        )
        metadata = {**self.rest.get("metadata", {}), "total_size": size}
        weight_map |= {name: file for name, file in self.tied.items() if file in written}
        table = {**self.rest, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        return (json.dumps(table, indent=2) + "\n").encode()


def check_length(filename: str, length: int) -> None:
    """To be called before an index is read: the whole of it is taken to memory.

    Errors: InvalidStateDict.
    """
    if length > MAX_HEADER_BYTES:
        field = f"data[{quote(filename)}]"
        raise InvalidStateDict(field, f"{length} bytes are too many for an index")


def weight_map_of(filename: str, data: memoryview) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight_map of an index, and the rest of it.  Errors: InvalidStateDict."""
    check_length(filename, len(data))
    field = f"data[{quote(filename)}]"
    try:
        table = json.loads(bytes(data))
        weight_map = table.pop("weight_map")
        "".join(weight_map.values()).encode()  # JSON can spell what UTF-8 cannot
        is_map = isinstance(table.get("metadata", {}), dict)
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        is_map = False
    if not is_map or not weight_map:
        raise InvalidStateDict(field, "is no index: it needs a weight_map from names to files")
    return weight_map, table


def read_index(
    filename: str,
    data: memoryview,
    shards: Mapping[str, Collection[str]],
    tied: Mapping[str, str],
) -> Index:
    """The index of files that are here.

    shards: from each file to the tensors in it.  tied: names that the files' metadata has for a
    tensor that is stored under another, as safetensors.torch.save_model leaves them.
    Errors: InvalidStateDict, where index and files differ.
    """
    weight_map, rest = weight_map_of(filename, data)
    field = f"data[{quote(filename)}]"
    for name, file in weight_map.items():
        if file not in shards:
            raise InvalidStateDict(field, f"{quote(name)} is in {quote(file)}, which is not here")
        if name not in shards[file] and name not in tied:
            raise InvalidStateDict(field, f"{quote(name)} is not in {quote(file)}, as it says")
    unnamed = shards.keys() - weight_map.values()
    if unnamed:
        raise InvalidStateDict(field, f"does not name the file {quote(min(unnamed))}")
    return Index(filename, {n: f for n, f in weight_map.items() if n not in shards[f]}, rest)

"""The index of a model in shards, and whether its files are as it says."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from secateur_proto.index import index_text, parse_index
from secateur_server.errors import InvalidStateDict, quote
from secateur_server.wire.header import MAX_HEADER_BYTES
from secateur_server.wire.writer import Outgoing


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
        weight_map |= {name: file for name, file in self.tied.items() if file in written}
        all_written = (tensor for tensors in written.values() for tensor in tensors.values())
        described = ((tensor.dtype, tensor.shape) for tensor in all_written)
        return index_text(weight_map, self.rest, described).encode()


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
    try:
        return parse_index(bytes(data))
    except ValueError as error:
        raise InvalidStateDict(f"data[{quote(filename)}]", str(error)) from None


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

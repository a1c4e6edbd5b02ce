"""The index of a sharded model, and the check that its files match it."""

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

    Attributes:
        filename: Of the index.
        tied: Names of tensors that are stored under another name, with the file of that one.
        rest: The keys of the index beside its weight_map.
    """

    filename: str
    tied: Mapping[str, str]
    rest: Mapping[str, Any]

    def rewritten(self, written: Mapping[str, Mapping[str, Outgoing]]) -> bytes:
        """The text of an index for other tensors in the same files.

        Args:
            written: The new tensors, by file and by name.
        """
        weight_map = {name: file for file, tensors in written.items() for name in tensors}
        weight_map |= {name: file for name, file in self.tied.items() if file in written}
        all_written = (tensor for tensors in written.values() for tensor in tensors.values())
        described = ((tensor.dtype, tensor.shape) for tensor in all_written)
        return index_text(weight_map, self.rest, described).encode()


def check_length(filename: str, length: int) -> None:
    """Refuses an index that is too long to be read into memory.

    Args:
        filename: Of the index, for errors.
        length: Bytes.

    Raises:
        InvalidStateDict: It is longer than MAX_HEADER_BYTES.
    """
    if length > MAX_HEADER_BYTES:
        field = f"data[{quote(filename)}]"
        raise InvalidStateDict(
            field, f"an index of {length} bytes is larger than the limit of {MAX_HEADER_BYTES}"
        )


def weight_map_of(filename: str, data: memoryview) -> tuple[dict[str, str], dict[str, Any]]:
    """Parses an index.

    Args:
        filename: Of the index, for errors.
        data: Its bytes.

    Returns:
        The weight_map, and the other keys.

    Raises:
        InvalidStateDict: It is not an index, or too long.
    """
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
    """Parses an index, and checks that it matches its files.

    Args:
        filename: Of the index.
        data: Its bytes.
        shards: The names of the tensors in each file.
        tied: Names in the files' metadata of tensors that are stored under another name, as
            safetensors.torch.save_model writes them.

    Raises:
        InvalidStateDict: The index and the files differ.
    """
    weight_map, rest = weight_map_of(filename, data)
    field = f"data[{quote(filename)}]"
    for name, file in weight_map.items():
        if file not in shards:
            raise InvalidStateDict(
                field, f"{quote(name)} is in {quote(file)}, which is not among the files"
            )
        if name not in shards[file] and name not in tied:
            raise InvalidStateDict(
                field, f"{quote(name)} is not in {quote(file)}, as the index says"
            )
    unnamed = shards.keys() - weight_map.values()
    if unnamed:
        raise InvalidStateDict(field, f"does not name the file {quote(min(unnamed))}")
    return Index(filename, {n: f for n, f in weight_map.items() if n not in shards[f]}, rest)

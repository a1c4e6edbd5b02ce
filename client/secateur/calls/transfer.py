"""The data of a call: a file is sent in messages, and files are received."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from blake3 import blake3

from secateur.cycles import no_search_for_cycles
from secateur.errors import DataLoss, ServerError
from secateur.packing.packed import unpacked
from secateur.shards import Index
from secateur.tensor_file import TensorFile, parse_file
from secateur.tensors import LocalTensor
from secateur_proto.codec import Data
from secateur_proto.framing import cut
from secateur_proto.index import SUFFIX, parse_index
from secateur_proto.ties import read_ties

Request = TypeVar("Request")


class Upload:
    """A safetensors file made of tensors in this process, one at a time.

    Attributes:
        file_bytes: The length of the file.
    """

    def __init__(
        self,
        tensors: Mapping[str, LocalTensor],
        metadata: Mapping[str, str],
        is_file: bool = True,
    ) -> None:
        """Describes the file.

        Args:
            tensors: In their order.
            metadata: The metadata of the file.
            is_file: False if a file without tensors is not sent at all.
        """
        self._file = TensorFile(tensors, metadata) if tensors or is_file else None
        self.file_bytes = self._file.size if self._file else 0

    def messages(
        self, make: Callable[..., Request], header: Any
    ) -> Iterator[tuple[Request | Data, int]]:
        """Yields the messages of a call, each with the bytes of the file in it.

        Args:
            make: Makes a request of a header and data.
            header: The header of the first request.
        """
        pieces = cut(self._file.parts() if self._file else ())
        first = next(pieces, b"")
        yield make(header=header, data=bytes(first)), len(first)
        for piece in pieces:
            yield Data(piece), len(piece)


@dataclass(frozen=True)
class Received:
    """The files of an answer.

    Attributes:
        tensors: The tensors of all files.
        index: The index of a model in shards.
        metadata: The metadata of the file, or of one file that is made of all shards.
    """

    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    index: Index | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def other_names(self) -> Mapping[str, str]:
        """Maps each other name of a tied tensor to its name in `tensors`; a pair is its X."""
        return read_ties(self.metadata, self.tensors).names


class Receiver:
    """Receives the messages of an answer.

    Args:
        working: Called with each progress message.
    """

    def __init__(self, working: Callable[[Any], None]) -> None:
        self._working = working
        self._result: Any = None
        self._data, self._filled = np.empty(0, np.uint8), 0

    def take(self, message: Any) -> None:
        """Takes the next message.

        Raises:
            ServerError: The answer is longer than the server announced.
        """
        if message.HasField("result"):
            self._result = message.result
            self._data = np.empty(self._result.data_bytes, np.uint8)
        elif not isinstance(message, Data):
            self._working(message.progress)
        piece = np.frombuffer(message.data, np.uint8)
        end = self._filled + len(piece)
        if end > len(self._data):
            raise ServerError(f"more than the {len(self._data)} bytes that the server announced")
        self._data[self._filled : end] = piece
        self._filled = end

    def finish(self) -> tuple[Any, Received]:
        """Returns the result, and the files behind it.

        Raises:
            SecateurError: The answer is not what the server announced.
        """
        if self._result is None or self._filled < len(self._data):
            raise ServerError(f"the answer ended after {self._filled} of {len(self._data)} bytes")
        return self._result, _parse(self._result, self._data.data) if self._filled else Received()


@no_search_for_cycles()
def _parse(result: Any, data: memoryview) -> Received:
    """The tensors of one file, or of shards and their index."""
    tensors: dict[str, LocalTensor] = {}
    files: dict[str, str] = {}
    metadata = {}
    index = None
    begin = 0
    for file in result.files:
        part = data[begin : begin + file.size_bytes]
        begin += file.size_bytes
        if blake3(part, max_threads=blake3.AUTO).hexdigest() != file.blake3:
            raise DataLoss(f"{file.filename or 'the answer'} did not arrive as it was sent")
        if file.filename.endswith(SUFFIX):
            index = file.filename, part
            continue
        of_file, metadata[file.filename] = unpacked(*parse_file(part))
        files |= dict.fromkeys(of_file, file.filename)
        tensors |= of_file
    if index is None:
        return Received(tensors, metadata=next(iter(metadata.values()), {}))
    filename, text = index
    weight_map, rest = parse_index(bytes(text))
    made = Index({**weight_map, **files}, rest, metadata, filename)
    return Received(tensors, made, made.of_one_file())

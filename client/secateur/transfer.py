"""One call: a file up in messages, a file down."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
import numpy as np

from secateur.errors import ServerError, from_rpc
from secateur.tensors import LocalTensor, parse_file
from secateur_proto.codec import Data
from secateur_proto.framing import cut, file_header, tensor_bytes

Request = TypeVar("Request")


class Upload:
    """A safetensors file made of tensors in this process, one at a time."""

    def __init__(self, tensors: Mapping[str, LocalTensor], metadata: Mapping[str, str]) -> None:
        self._tensors = tensors
        described = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        self._header = file_header(described, metadata)
        sizes = (tensor_bytes(dtype, shape) for _, dtype, shape in described)
        self.file_bytes = len(self._header) + sum(sizes)
        self.error: Exception | None = None

    def messages(
        self, make: Callable[..., Request], header: Any, sending: Callable[[int], None]
    ) -> Iterator[Request | Data]:
        """The messages of a call.

        grpc pulls them in a thread of its own and hides what raises there: `error` keeps it.
        """
        try:
            pieces = cut(self._parts())
            first = next(pieces)
            yield make(header=header, data=bytes(first))
            sending(len(first))
            for piece in pieces:
                yield Data(piece)
                sending(len(piece))
        except Exception as error:
            self.error = error
            raise

    def _parts(self) -> Iterator[bytes | memoryview]:
        yield self._header
        for tensor in self._tensors.values():
            yield tensor.read().data


@contextmanager
def errors_of(upload: Upload, call: grpc.RpcContext | None = None) -> Iterator[None]:
    """Raises what a failed call means, and ends a call that is left early."""
    try:
        yield
    except grpc.RpcError as error:
        raise upload.error or from_rpc(error) from None
    finally:
        if call is not None:
            call.cancel()


def receive(responses: Iterable[Any]) -> tuple[Any, dict[str, LocalTensor]]:
    """The result of an answer, and the tensors of the file behind it."""
    result, data, filled = None, np.empty(0, np.uint8), 0
    for message in responses:
        if message.HasField("result"):
            result = message.result
            data = np.empty(result.data_bytes, np.uint8)
        piece = np.frombuffer(message.data, np.uint8)
        if filled + len(piece) > len(data):
            raise ServerError(f"more than the {len(data)} bytes that the server announced")
        data[filled : filled + len(piece)] = piece
        filled += len(piece)
    if result is None or filled < len(data):
        raise ServerError(f"the answer ended after {filled} of {len(data)} bytes")
    return result, parse_file(data.data)[0] if len(data) else {}

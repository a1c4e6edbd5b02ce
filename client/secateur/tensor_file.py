"""Safetensors files of tensors in this process."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from secateur.errors import InvalidStateDict
from secateur.tensors import Bytes, LocalTensor
from secateur_proto.dtypes import DTYPES
from secateur_proto.framing import file_head


class TensorFile:
    """A file that is made of tensors, one at a time.

    Attributes:
        size: In bytes.
    """

    def __init__(self, tensors: Mapping[str, LocalTensor], metadata: Mapping[str, str]) -> None:
        described = ((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        self._header, self.size = file_head(described, metadata)
        self._tensors = tensors

    def parts(self) -> Iterator[bytes | memoryview]:
        """Yields the bytes of the file."""
        yield self._header
        for tensor in self._tensors.values():
            yield tensor.read().data


def parse_file(data: memoryview) -> tuple[dict[str, LocalTensor], dict[str, str]]:
    """Parses a valid safetensors file.

    Returns:
        The tensors, as views of `data`, and the metadata.

    Raises:
        InvalidStateDict: Its header has a name twice, or an unknown dtype.
    """
    begin = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(bytes(data[8:begin]), object_pairs_hook=_distinct)
    metadata = table.pop("__metadata__", {})
    body = np.frombuffer(data, np.uint8)[begin:]
    return {name: _entry(name, body, fields) for name, fields in table.items()}, metadata


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise InvalidStateDict("the header has a name twice")
    return table


_FIELDS = {"dtype", "shape", "data_offsets"}


def _entry(name: str, body: Bytes, fields: Mapping[str, Any]) -> LocalTensor:
    if fields.keys() != _FIELDS:
        raise InvalidStateDict(f"{name}: the header has {sorted(fields)}, not {sorted(_FIELDS)}")
    if fields["dtype"] not in DTYPES:
        raise InvalidStateDict(f"{name}: dtype {fields['dtype']} is unknown; update secateur")
    read = partial(body.__getitem__, slice(*fields["data_offsets"]))
    return LocalTensor(fields["dtype"], tuple(fields["shape"]), read)

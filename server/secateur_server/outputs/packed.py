"""All tensors without their zeros, compressed: see docs/packed.md."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur_proto.packing import Bytes, Dense, Item, Made, describe, pack_all
from secateur_server.backends import allocate_in_scratch, backend_for
from secateur_server.granularity.group import Group
from secateur_server.outputs.protocol import Output
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.fold import zeroed
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import Outgoing, OutgoingFile, on_host

CPU = torch.device("cpu")


class Packed(Output):
    """OUTPUT_PACKED."""

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        state_dict.parameters |= pruned
        return packed_files(context, state_dict, state_dict.parameters)


def packed_files(
    context: RequestContext, state_dict: StateDict, parameters: Mapping[str, Parameter]
) -> list[OutgoingFile]:
    """Packs the files of a state_dict, with masks applied to weights.

    The sizes of packed tensors are in a file's header, so all are packed before the first is sent.

    Args:
        context: The request.
        state_dict: The state_dict.
        parameters: The parameters whose masks are applied. Others are packed as pairs.
    """
    layout = state_dict.layout(parameters)
    files = {
        filename: [_dense(name, outgoing, parameters.get(name)) for name, outgoing in file.items()]
        for filename, file in layout.items()
    }
    sizes = {filename: sum(tensor.size for tensor in file) for filename, file in files.items()}
    buffer = allocate_in_scratch(context, "header.output", sum(sizes.values()))
    packed, more, begin = {}, {}, 0
    for filename, file in files.items():
        room = buffer[begin : begin + sizes[filename]]
        packed[filename], more[filename] = _pack(context, file, room)
        begin += sizes[filename]
    return state_dict.written(context, packed, more)


def _dense(name: str, outgoing: Outgoing, parameter: Parameter | None) -> Dense:
    """A tensor to pack. parameter: Given if its mask is applied."""
    parts: Callable[[], Iterable[Tensor]] = outgoing.parts
    if parameter is not None and parameter.mask is not None:
        parts = lambda: zeroed(parameter)  # noqa: E731

    def on_host_parts() -> Iterator[Bytes]:
        for part in parts():
            yield from on_host(part.reshape(-1).view(torch.uint8))

    return Dense(name, outgoing.dtype, outgoing.shape, on_host_parts)


def _pack(
    context: RequestContext, tensors: list[Dense], room: Tensor
) -> tuple[dict[str, Outgoing], dict[str, str]]:
    """Packs the tensors of a file into a buffer. Returns them, and the metadata of the file."""
    into, backend = room.numpy(), backend_for(CPU)

    def write(offset: int, data: Bytes) -> None:
        into[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def run(function: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
        return backend.map(context, function, items)

    outgoing, begin = {}, 0
    placed = pack_all(tensors, write, run)
    for tensor in placed:
        name, dtype, shape = tensor.entry()
        outgoing[name] = Outgoing(dtype, tuple(shape), _slice(room, begin, tensor.size))
        begin += tensor.size
    return outgoing, describe(placed)


def _slice(room: Tensor, begin: int, size: int) -> Callable[[], list[Tensor]]:
    return lambda: [room[begin : begin + size]]

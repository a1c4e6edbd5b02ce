"""What each device can do: hold memory, take bytes that arrive, and pass over pieces of tensors."""

import torch

from secateur_server.devices import kernels
from secateur_server.devices.cpu import Compiled, Cpu
from secateur_server.devices.cuda import Cuda
from secateur_server.devices.passes import Passes

Span = tuple[int, int]

_CPU, _COMPILED = Cpu(torch.device("cpu")), Compiled(torch.device("cpu"))


def passes_of(device: torch.device) -> Passes:
    """The passes of a device."""
    if device.type == "cuda":
        return Cuda(device)
    return _COMPILED if kernels.enabled else _CPU


def spans(count: int, size: int) -> list[Span]:
    """[begin, end) of the pieces of `size` that make up `count`."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]

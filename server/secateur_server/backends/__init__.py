"""What each device can do: hold memory, take bytes that arrive, and pass over pieces of tensors."""

from functools import cache

import torch
from torch import Tensor

from secateur_server.backends import kernels
from secateur_server.backends.cpu import Compiled, Cpu
from secateur_server.backends.cuda import Cuda
from secateur_server.backends.mapping import room_on_disk
from secateur_server.backends.passes import Passes
from secateur_server.runtime.context import RequestContext

Span = tuple[int, int]

_CPU, _COMPILED = Cpu(torch.device("cpu")), Compiled(torch.device("cpu"))


def passes_of(device: torch.device) -> Passes:
    """The passes of a device."""
    if device.type == "cuda":
        return _kind_of(device)(device)
    return _COMPILED if kernels.enabled else _CPU


@cache
def _kind_of(device: torch.device) -> type[Passes]:
    try:
        from secateur_server.backends.fused import passes_on  # Triton, which takes 0.2 s to import
    except ImportError:
        return Cuda
    return passes_on(device)


# What takes more than this share of a call's memory to work in lies on disk: some are held at once.
_ON_DISK_SHARE = 8


def room_to_work(context: RequestContext, size: int, passes: Passes) -> Tensor:
    """Memory for what a request makes beside its model, uint8, flat.  Errors: StoreFull."""
    is_large = context.work_memory is not None and size > context.work_memory // _ON_DISK_SHARE
    if context.scratch is not None and is_large and passes.device.type == "cpu":
        return room_on_disk(context.scratch, size)
    return passes.room(size)


def spans(count: int, size: int) -> list[Span]:
    """[begin, end) of the pieces of `size` that make up `count`."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]

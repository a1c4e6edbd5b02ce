"""What each device can do: hold memory, receive bytes, and work on pieces of tensors."""

from functools import cache

import torch
from torch import Tensor

from secateur_server.backends import kernels
from secateur_server.backends.mapping import allocate_on_disk
from secateur_server.backends.numba_backend import NumbaBackend
from secateur_server.backends.protocol import Backend
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.runtime.context import RequestContext

Span = tuple[int, int]

_TORCH, _NUMBA = TorchBackend(torch.device("cpu")), NumbaBackend(torch.device("cpu"))


def backend_for(device: torch.device) -> Backend:
    """The fastest backend of a device. Without compiled kernels torch's operations serve."""
    if device.type == "cuda":
        return _kind_of(device)(device)
    return _NUMBA if kernels.enabled else _TORCH


@cache
def _kind_of(device: torch.device) -> type[TorchBackend]:
    try:
        from secateur_server.backends.triton_backend import triton_or_torch  # takes 0.2 s to import
    except ImportError:  # a build of torch without Triton
        return TorchBackend
    return triton_or_torch(device)


# What takes more than this share of a call's memory to work in lies on disk: some are held at once.
_ON_DISK_SHARE = 8


def allocate(context: RequestContext, size: int, backend: Backend) -> Tensor:
    """Allocates what a request makes beside its model.

    Returns:
        uint8, (size,), with any values.

    Raises:
        StoreFull: The disk for large ones is full.
    """
    is_large = context.work_memory is not None and size > context.work_memory // _ON_DISK_SHARE
    if context.scratch is not None and is_large and backend.device.type == "cpu":
        return allocate_on_disk(context.scratch, size)
    return backend.allocate(size)


def spans(count: int, size: int) -> list[Span]:
    """[begin, end) of the pieces of `size` that make up `count`."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]

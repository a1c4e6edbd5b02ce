"""What each device can do: hold memory, receive bytes, and work on pieces of tensors."""

import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from secateur_server.backends.mapping import allocate_on_disk
from secateur_server.backends.protocol import Backend
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.runtime.context import RequestContext

Span = tuple[int, int]

_TORCH = TorchBackend(torch.device("cpu"))


def backend_for(device: torch.device) -> Backend:
    """The fastest backend of a device. Without compiled kernels torch's operations serve."""
    if device.type == "cuda":
        return _kind_of(device)(device)
    compiled = _compiled()
    return compiled[1] if compiled and has_kernels() else _TORCH


def has_kernels() -> bool:
    """Whether compiled kernels serve the CPU."""
    compiled = _compiled()
    return compiled is not None and bool(compiled[0].enabled)


@cache
def _compiled() -> tuple[ModuleType, Backend] | None:
    """The kernels of the CPU and their backend. None: the environment disables them."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        return None
    from secateur_server.backends import kernels  # numba takes 0.4 s to import
    from secateur_server.backends.numba_backend import NumbaBackend

    return kernels, NumbaBackend(torch.device("cpu"))


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


# A result that is made before it is sent is in memory up to this size.
_IN_MEMORY_BYTES = 16 << 20


def allocate_in_scratch(context: RequestContext, field: str, size: int) -> Tensor:
    """Allocates a result that is made before it is sent, on disk if it is large.

    Args:
        context: The request.
        field: The field of the request that asks for it.
        size: Bytes.

    Returns:
        uint8, (size,), with any values.

    Raises:
        StoreFull: The disk is full.
        QueueFull: A small one does not fit beside those of other requests.
    """
    if context.scratch is not None and size > _IN_MEMORY_BYTES:
        return allocate_on_disk(context.scratch, size)
    context.charge(field, size, "a result that is made before it is sent")
    return torch.empty(size, dtype=torch.uint8)


def spans(count: int, size: int) -> list[Span]:
    """[begin, end) of the pieces of `size` that make up `count`."""
    return [(begin, min(begin + size, count)) for begin in range(0, count, size)]

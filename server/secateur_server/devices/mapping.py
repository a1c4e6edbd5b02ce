"""Files in mapped memory, which the system takes back and reads again as it likes."""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from secateur_server.devices.faults import Torn
from secateur_server.durable import full_disk


def map_file(file: int) -> memoryview:
    """A whole file. What is written to the memory stays in this process.

    file: an open descriptor, of which nothing is kept.
    """
    size = os.fstat(file).st_size
    return memoryview(_map(file, size) if size else b"")  # nobody can map what is empty


def map_shared(file: int) -> tuple[memoryview, Torn | None]:
    """As map_file, of a file that others may make shorter; and what tells whether they did."""
    size = os.fstat(file).st_size
    if size == 0:
        return memoryview(b""), None
    mapped = _map(file, size)
    return memoryview(mapped), Torn(mapped)


def _map(file: int, size: int) -> mmap.mmap:
    # Nothing is set aside for pages that will not be written to: the file may exceed the memory.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def room_on_disk(folder: Path, size: int) -> Tensor:
    """Memory that is a file without a name, and goes with the tensor.

    Returns: uint8, flat.  Errors: StoreFull.
    """
    with full_disk(), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not at a later touch
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)

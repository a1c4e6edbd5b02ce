"""Files in mapped memory, which the system takes back and reads again as it likes."""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from secateur_server.backends.faults import Torn
from secateur_server.runtime.disk import full_disk


def map_file(file: int) -> tuple[memoryview, Torn | None]:
    """A whole file, and what tells whether it became shorter, or its disk failed, since.

    file: an open descriptor, of which Python keeps a copy for as long as the memory is used. What
    is written to the memory stays in this process.
    """
    size = os.fstat(file).st_size
    if size == 0:  # which nobody can map
        return memoryview(b""), None
    # Nothing is set aside for pages that will not be written to: the file may exceed the memory.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
    mapped = mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return memoryview(mapped), Torn(mapped)


def allocate_on_disk(folder: Path, size: int) -> Tensor:
    """Memory that is a file without a name, and goes with the tensor.

    Returns: uint8, flat.  Errors: StoreFull.
    """
    with full_disk(), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not at a later touch
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)

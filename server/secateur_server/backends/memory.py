"""How much memory there is, in use and free."""

import os
from pathlib import Path

import torch

from secateur_server.backends.cgroups import Limit, memory_limits

_ROOT = Path("/")


def total_memory(device: torch.device) -> int:
    """Bytes of memory that this process may use on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(least_limit().value)


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes in use, by anybody, and bytes that are free, of a device's memory.

    Of a CPU: of the machine or the control group that has least free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, free
    tightest = min(_limits(), key=lambda limit: limit.value - limit.used)
    return tightest.used, max(0, int(tightest.value) - tightest.used)


def least_limit() -> Limit:
    """The least of the machine's memory and the limits of this process's control groups."""
    return min(_limits(), key=lambda limit: limit.value)


def machine_memory() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits() -> list[Limit]:
    """The machine's memory first; its group is the root."""
    used = _meminfo("MemTotal") - _meminfo("MemAvailable")
    machine = Limit(machine_memory(), used, _ROOT)
    return [machine, *memory_limits(_ROOT)]


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/meminfo has no {name}")

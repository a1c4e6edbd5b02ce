"""How much memory there is, in use and free."""

import os
from pathlib import Path

import torch

# Of a group of processes, as containers are: its limit, what it uses, and the file whose line
# says how much of that is only kept because nobody needs the room; version 2, then version 1.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_ROOT = Path("/sys/fs/cgroup")


def total_memory(device: torch.device) -> int:
    """Bytes of memory that this process may use on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (_number(_ROOT / limit) for limit, *_ in _GROUPS)
    return min([physical, *(limit for limit in limits if limit is not None)])


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes in use, by anybody, and bytes that are free, of a device's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, free
    total = total_memory(device)
    used = _used_by_group() if total < _meminfo("MemTotal") else None
    if used is None:
        used = _meminfo("MemTotal") - _meminfo("MemAvailable")
    return used, max(0, total - used)


def _used_by_group() -> int | None:
    for _, usage, stat, line in _GROUPS:
        used = _number(_ROOT / usage)
        if used is not None:
            words = (_ROOT / stat).read_text().split()
            return used - int(words[words.index(line) + 1])
    return None


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdecimal() else None


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/meminfo has no {name}")

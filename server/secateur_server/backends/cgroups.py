"""The limits of this process's control groups, versions 1 and 2: its own and all their parents'."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limit:
    """A limit of one control group.

    Attributes:
        value: Bytes of memory, or CPUs.
        used: Bytes that the group uses and the kernel cannot simply take back; 0 for CPUs.
        group: The group's folder.
    """

    value: float
    used: int
    group: Path


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """All limits of memory that hold for this process.

    Args:
        root: The folder in which `proc` and the mount points are looked up.
    """
    found = []
    for group in _groups("memory", root):
        for limit, usage, cache in _MEMORY:
            value, used = _number(group / limit), _number(group / usage)
            if value is not None and used is not None:
                found.append(Limit(value, max(0, used - _cache(group, cache)), group))
    return found


def cpu_limits(root: Path = Path("/")) -> list[Limit]:
    """All CPU quotas that hold for this process. As memory_limits."""
    found = []
    for group in _groups("cpu", root):
        quota, period = (*_words(group / "cpu.max"), "", "")[:2]
        if not quota:
            quota, period = (
                "".join(_words(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period")
            )
        if quota.isdecimal() and period.isdecimal() and int(period):
            found.append(Limit(int(quota) / int(period), 0, group))
    return found


def cores(available: int, root: Path = Path("/")) -> int:
    """How many threads can work at once: the available CPUs, or the least quota, rounded up."""
    return min([available, *(max(1, math.ceil(limit.value)) for limit in cpu_limits(root))])


# The limit, the usage, and the line of memory.stat with the cache that nobody needs; version 2
# (memory.high slows a group down to a halt), then version 1.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's groups of a controller, and of all their parents."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue  # version 2 names none
        for mounted, top in _mounts(controllers, controller, root):
            group = _within(mounted, top, Path(path))
            yield from (group, *(above for above in group.parents if above.is_relative_to(top)))


def _mounts(controllers: str, controller: str, root: Path) -> Iterator[tuple[Path, Path]]:
    """Where groups are mounted: the group that is mounted, and the folder."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == ("cgroup" if controllers else "cgroup2") and (
            not controllers or controller in options.split(",")
        ):
            mounted, folder = before.split(" ")[3:5]
            yield Path(mounted), root / folder.lstrip("/")


def _within(mounted: Path, top: Path, path: Path) -> Path:
    """The folder of a group; the mounted one where the group lies outside of it."""
    if path.is_relative_to(mounted) and ".." not in path.parts:
        return top / path.relative_to(mounted)
    return top


def _cache(group: Path, name: str) -> int:
    for line in _lines(group / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = "".join(_words(path))
    return int(text) if text.isdecimal() else None


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # this kernel, or this group, has no such file
        return []

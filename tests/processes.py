"""Resources of a process, read from /proc."""

import os
import re
from pathlib import Path


def memory(pid: int, field: str) -> int:
    """Returns a field of /proc/PID/status in bytes: VmRSS, RssAnon, or VmHWM, the peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match is not None, field
    return int(match[1]) << 10


def reset_peak(pid: int) -> None:
    """Sets the peak of memory to the memory of now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def thread_ids(pid: int) -> list[int]:
    """Returns the ids of the threads of a process."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def open_files(pid: int) -> int:
    """Returns the number of open files of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))

"""The disk of the crash tests loses unsynced data, and nothing else."""

import random
import subprocess
import sys
from pathlib import Path

from tests.storage.lost_pages import PAGE, losing_disk

WRITER = """
import os, sys

def write(name, data, *more):
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        for each in more:
            file.write(each)

def sync():
    folder = os.open(".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

os.chdir(sys.argv[1])
pages = b"1" * 4 * 4096
write("synced", pages)
write("grown", pages, b"2" * 4 * 4096)
write("replaced", b"before")
write("removed", b"before")
sync()
write("new", b"after")
os.replace("new", "replaced")
os.remove("removed")
write("unnamed", pages)
"""


def test_crash_leaves_all_synced_data_and_any_subset_of_the_rest(tmp_path: Path) -> None:
    disk = losing_disk(tmp_path)
    with disk.preloaded():
        subprocess.run([sys.executable, "-c", WRITER, str(disk.store)], check=True)
    seen: dict[str, set[bytes | None]] = {}
    for seed in range(30):
        left = tmp_path / str(seed)
        disk.leave(left, random.Random(seed))
        for name in ("synced", "grown", "replaced", "removed", "unnamed"):
            path = left / name
            seen.setdefault(name, set()).add(path.read_bytes() if path.exists() else None)
    ones = b"1" * 4 * PAGE
    assert seen["synced"] == {ones}
    assert seen["replaced"] == {b"before", b"after"}
    assert seen["removed"] == {b"before", None}
    assert seen["unnamed"] == {ones, None}
    assert all(data and data.startswith(ones) for data in seen["grown"])
    grown = [data[4 * PAGE :] for data in seen["grown"] if data]
    assert {b"", bytes(PAGE), b"2" * PAGE} <= {data[:PAGE] for data in grown}

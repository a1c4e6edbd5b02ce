"""Limits of control groups: in recorded folders, and in real groups if the user is root."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from secateur_server.backends import memory
from secateur_server.backends.cgroups import cores, cpu_limits, memory_limits
from tests.conftest import PATIENCE

GIB = 1 << 30
V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "35 31 0:32 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def machine(root: Path, groups: str, mounts: str, files: Mapping[str, object]) -> Path:
    """Makes a root folder, with `files` under /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text("23 1 0:1 / / rw - ext4 /dev/vda rw\n" + mounts)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def found(root: Path) -> dict[str, tuple[float, int]]:
    top = root / "sys/fs/cgroup"
    return {
        str(limit.group.relative_to(top)): (limit.value, limit.used)
        for limit in (*memory_limits(root), *cpu_limits(root))
    }


def test_version_2_uses_the_own_group_and_all_parents(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/pods/server\n",
        V2,
        {
            "pods/memory.max": 2 * GIB,
            "pods/memory.current": GIB,
            "pods/memory.stat": "anon 5\ninactive_file 1000",
            "pods/server/memory.max": "max",
            "pods/server/memory.high": 3 * GIB,
            "pods/server/memory.current": 70,
            "other/memory.max": 5,
            "other/memory.current": 1,
        },
    )
    assert found(root) == {"pods": (2 * GIB, GIB - 1000), "pods/server": (3 * GIB, 70)}


def test_version_1_has_a_mount_for_each_controller(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "9:name=systemd:/x\n4:memory:/a/b\n1:cpu,cpuacct:/c\n0::/\n",
        V1.format(mounted="/"),
        {
            "memory/a/memory.limit_in_bytes": GIB,
            "memory/a/memory.usage_in_bytes": 500,
            "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
            "cpu,cpuacct/c/cpu.cfs_quota_us": 150000,
            "cpu,cpuacct/c/cpu.cfs_period_us": 100000,
            "cpu,cpuacct/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
    )
    assert found(root) == {"memory/a": (GIB, 400), "cpu,cpuacct/c": (1.5, 0)}


@pytest.mark.parametrize("path", ["/docker/x/job", "/docker/x"])
def test_a_container_has_its_own_group_mounted(tmp_path: Path, path: str) -> None:
    files = {"memory/memory.limit_in_bytes": GIB, "memory/memory.usage_in_bytes": 1}
    mounts = V1.format(mounted="/docker/x")
    root = machine(tmp_path, f"4:memory:{path}\n", mounts, files)
    assert found(root) == {"memory": (GIB, 1)}


def test_group_outside_the_mount_has_the_limits_of_the_root(tmp_path: Path) -> None:
    files = {"memory.max": GIB, "memory.current": 1}
    assert found(machine(tmp_path, "0::/../../other\n", V2, files)) == {".": (GIB, 1)}


def test_a_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert found(tmp_path) == {}


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max 100000", 8), ("50000 100000", 1), ("150000 100000", 2), ("1600000 100000", 8)],
)
def test_threads_follow_the_quota(tmp_path: Path, quota: str, threads: int) -> None:
    files = {"cpu.max": "max 100000", "a/cpu.max": quota, "a/b/cpu.max": "max 100000"}
    assert cores(8, machine(tmp_path, "0::/a/b\n", V2, files)) == threads


def test_metrics_show_the_tightest_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        **{"a/memory.max": 4000, "a/memory.current": 3900},
        **{"a/b/memory.max": 3000, "a/b/memory.current": 1000},
    }
    monkeypatch.setattr(memory, "_ROOT", machine(tmp_path, "0::/a/b\n", V2, files))
    cpu = torch.device("cpu")
    assert memory.total_memory(cpu) == 3000
    assert memory.memory_of(cpu) == (3900, 100)


# Real groups ----------------------------------------------------------------------------------

REAL = {name: Path("/sys/fs/cgroup", name) for name in ("memory", "cpu")}
needs_groups = pytest.mark.skipif(
    not all(os.access(top / "cgroup.procs", os.W_OK) for top in REAL.values()),
    reason="only root may make control groups of version 1",
)


@contextmanager
def nested(top: Path, limits: dict[str, int]) -> Iterator[Path]:
    """Makes a group inside another one, which has the limits."""
    outer = top / f"secateur-{uuid.uuid4().hex}"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    try:
        for name, value in limits.items():
            (outer / name).write_text(str(value))
        yield inner
    finally:
        inner.rmdir()
        outer.rmdir()


@needs_groups
def test_check_shows_the_limits_of_a_real_nested_group() -> None:
    command = [sys.executable, "-m", "secateur_server", "--check", "--device", "cpu"]
    command += ["--address", "127.0.0.1:0", "--metrics-address", ""]
    with ExitStack() as opened:
        memory_group = opened.enter_context(
            nested(REAL["memory"], {"memory.limit_in_bytes": 2 * GIB})
        )
        cpu_group = opened.enter_context(nested(REAL["cpu"], {"cpu.cfs_quota_us": 90000}))
        join = f'echo $$ >{memory_group}/cgroup.procs; echo $$ >{cpu_group}/cgroup.procs; exec "$@"'
        ended = subprocess.run(
            ["sh", "-c", join, "sh", *command], capture_output=True, text=True, timeout=PATIENCE
        )
    assert (ended.returncode, ended.stderr) == (0, "")
    said = ended.stdout.splitlines()
    assert said[2].startswith("prunes on cpu, threads: 1, ")
    assert said[3].startswith("accepts models of up to 1.5 GiB, at once up to 1.5 GiB;")
    assert said[-1] == (
        f"may use 2.0 GiB of memory, the limit of {memory_group.parent}; "
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs, "
        f"0.9 at a time, the quota of {cpu_group.parent}"
    )

"""examples/cluster.py, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "cluster.py"


@pytest.mark.cluster
def test_the_demo_has_the_same_bits_as_one_machine(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(DEMO)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^total .* 60\.00%$", ran.stdout, re.M), ran.stdout
    assert re.search(r"^shrunk: 22,713,728 -> [\d,]+ parameters", ran.stdout, re.M), ran.stdout
    assert ran.stdout.count("the same bits as on this machine alone") == 2, ran.stdout
    tasks = re.search(r"^(\d+) tasks of the cluster did this$", ran.stdout, re.M)
    assert tasks is not None, ran.stdout
    assert int(tasks[1]) >= 3 * 6, "each of 6 shards was read, counted and written by a task"
    assert list(tmp_path.iterdir()) == []

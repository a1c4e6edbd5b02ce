"""Inputs that atheris generates, guided by coverage. `make fuzz` runs it for longer."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

SECONDS = int(os.environ.get("SECATEUR_FUZZ_SECONDS", "60"))
# An input of 4 KiB that takes more memory or time than this is a defect, too.
MOST_MIB, MOST_SECONDS = 2048, 10


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_atheris_finds_no_defect(target: str, tmp_path: Path) -> None:
    options = (
        *(f"-max_total_time={SECONDS}", "-max_len=4096", "-print_final_stats=1"),
        *(f"-rss_limit_mb={MOST_MIB}", f"-timeout={MOST_SECONDS}", f"-artifact_prefix={tmp_path}/"),
    )
    command = [sys.executable, "-m", "tests.fuzz.run", target, str(tmp_path / "corpus"), *options]
    ran = subprocess.run(command, stderr=subprocess.PIPE, timeout=SECONDS + 300, text=True)
    assert ran.returncode == 0, ran.stderr[-5000:]  # it has the input as Base64
    executions = re.search(r"number_of_executed_units: (\d+)", ran.stderr)
    assert executions
    print(f"\n{target}: {executions[1]} executions in {SECONDS} s")

"""examples/iterative.py, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "iterative.py"


def test_ten_rounds_by_handle_are_those_of_ten_uploads() -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    rounds = re.findall(r"^ +(\d+) +(\d+\.\d\d)% +([\d,]+) +([\d,]+)$", ran.stdout, re.M)
    assert [int(number) for number, *_ in rounds] == list(range(1, 11))
    expected = [100 * (1 - 0.1 ** (number / 10)) for number in range(1, 11)]
    assert [float(sparsity) for _, sparsity, *_ in rounds] == pytest.approx(expected, abs=0.01)
    assert {weights for _, _, weights, _ in rounds} == {"88,981,136"}, "one upload, of full.pth"
    assert "the masks are the same" in ran.stdout

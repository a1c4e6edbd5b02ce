"""The benchmarks run to their end, and so compare every mask with torch's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # three minutes


def test_every_benchmark_runs(tmp_path: Path) -> None:
    figures, drawing = tmp_path / "bench.json", tmp_path / "bench.svg"
    command = [sys.executable, "benchmarks/run.py", "--largest", "10"]
    ended = subprocess.run(
        [*command, "--json", figures, "--svg", drawing], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    sections = {"global_unstructured", "lenet", "many", "many_small", "choices", "plans"}
    found = json.loads(figures.read_text())
    assert sections <= found.keys()
    assert all(found[section] for section in sections)
    assert drawing.read_text().startswith("<svg")


def test_the_gains_of_shrunk_models_are_measured(tmp_path: Path) -> None:
    figures = tmp_path / "gains.json"
    command = [sys.executable, "benchmarks/gains.py", "--json", str(figures)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(figures.read_text())
    assert len(found["gains"]) == 4
    for one in found["gains"]:
        assert one["parameters"][1] < one["parameters"][0]
    assert len(found["zeros"]["CSR, torch"]) == 5

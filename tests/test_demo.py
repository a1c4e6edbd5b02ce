"""examples/demo.py, run as a user runs it: its figures match its files."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import asset

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"
LAYERS = {
    "conv1": (6, 1, 3, 3),
    "conv2": (16, 6, 3, 3),
    "fc1": (120, 400),
    "fc2": (84, 120),
    "fc3": (10, 84),
}
WEIGHTS = 54 + 864 + 48_000 + 10_080 + 840


@pytest.mark.slow  # 15 seconds
def test_the_figures_and_files_of_the_demo_are_right(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(DEMO)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "", "no warning, and no bar where there is no terminal"
    section = partial(_section, ran.stdout)
    folder = tmp_path / "demo-files"
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert re.search(rf"^it serves at [\d.:]+, and prunes on: {device}$", ran.stdout, re.M)
    _check_training(section("A LeNet"))
    _check_global(section("Global"))
    _check_local_and_global(section("Local against global"))
    _check_amounts(section("Accuracy before and after"))
    _check_channels(section("Structured"))
    _check_rounds(section("Iterative"))
    _check_finalized(section("Finalize"), section("Iterative"), folder)
    _check_pretrained(section("A pretrained network"), folder)
    _check_names(section("Files"), folder)
    shutil.rmtree(folder)  # pytest would keep 90 MB


def test_make_announces_the_installation_once(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(DEMO.parents[1] / name, tmp_path)

    def printed(*options: str) -> list[str]:
        command = ["make", "PYTHON=false", *options, "demo"]
        path = {"PATH": os.environ["PATH"]}  # without the variables of a make that runs this test
        ran = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
        return ran.stdout.splitlines()

    line, *more = printed()
    assert re.match(r"Installing .*torch.* into \.venv.* minutes", line)
    assert more == ["false -m venv .venv"]
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    assert not [line for line in printed("--dry-run") if "Installing" in line]


def _section(text: str, begin: str) -> str:
    """Returns the section of the output whose heading begins with `begin`."""
    _, *parts = re.split(r"^(.+)\n-+\n", text, flags=re.M)
    headings = [heading for heading in parts[::2] if heading.startswith(begin)]
    assert len(headings) == 1, text
    return parts[parts.index(headings[0]) + 1]


def _row(section: str, label: str) -> list[float]:
    """Returns the numbers of the line that begins with `label`."""
    match = re.search(rf"^{re.escape(label)}[ :]+([\d.,% ]+)", section, re.M)
    assert match is not None, f"{label!r} begins no line of:\n{section}"
    return [float(number) for number in re.sub("[,%]", "", match[1]).split()]


def _check_training(section: str) -> None:
    assert "60,074 parameters" in section
    assert _row(section, "accuracy")[0] > 90


def _check_global(section: str) -> None:
    zeros, total = _row(section, "total")[1:3]
    assert (zeros, total) == (round(0.2 * WEIGHTS), WEIGHTS)
    assert "Global sparsity: 20.00%" in section
    shown = re.search(r"^Sparsity in conv1.weight: (\d+\.\d\d)%$", section, re.M)
    rows = re.search(r"^conv1.weight +6x1x3x3 +F32 +216 +(\d+) +54", section, re.M)
    assert shown is not None
    assert rows is not None
    assert float(shown[1]) == round(100 * int(rows[1]) / 54, 2)


def _check_local_and_global(section: str) -> None:
    zeros = 0
    for layer, shape in LAYERS.items():
        total, local, overall = _row(section, f"{layer}.weight")
        assert total == torch.Size(shape).numel()
        assert local == round(100 * round(0.8 * total) / total, 2)
        zeros += round(overall / 100 * total)
    assert abs(zeros - round(0.8 * WEIGHTS)) <= 3, "per cents of two decimals, over five layers"
    assert _row(section, "all") == [WEIGHTS, 80.0, 80.0]


def _check_amounts(section: str) -> None:
    rows = [_row(section, f"{amount}%") for amount in (20, 50, 80, 90)]
    assert [row[0] for row in rows] == [20.0, 50.0, 80.0, 90.0]
    assert {row[1] for row in rows} == {rows[0][1]}, "one network, one accuracy before"
    assert rows[0][2] > rows[3][2], "90 % costs more than 20 %"


def _check_channels(section: str) -> None:
    norms = [_row(section, str(channel)) for channel in range(6)]
    lowest = sorted(range(6), key=lambda channel: norms[channel][0])[:2]
    for channel, (before, after) in enumerate(norms):
        assert before > 0
        assert after == (0 if channel in lowest else before)
    assert "wholly zero: 2 of 6" in section


def _check_rounds(section: str) -> None:
    left = WEIGHTS
    for number in range(1, 5):
        left -= round(0.5 * left)
        assert _row(section, str(number))[0] == round(100 * (1 - left / WEIGHTS), 2)
    assert "is_pruned(module): True" in section


def _check_finalized(section: str, rounds: str, folder: Path) -> None:
    accuracies = set(re.findall(r"^(?:accuracy|lenet).+ (\d+\.\d\d)%$", section, re.M))
    assert accuracies == {f"{_row(rounds, '4')[2]:.2f}"}
    loaded = load_file(folder / "lenet.safetensors")
    again = torch.load(folder / "lenet.pt", weights_only=True)
    assert loaded.keys() == again.keys() == {f"{n}.{p}" for n in LAYERS for p in ("weight", "bias")}
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.items())
    weights = {name: loaded[f"{name}.weight"] for name in LAYERS}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == LAYERS
    assert _zeros(loaded) == _row(section, "total")[1]
    left = WEIGHTS
    for _ in range(4):
        left -= round(0.5 * left)
    assert _zeros(weights) == WEIGHTS - left


def _check_pretrained(section: str, folder: Path) -> None:
    before = torch.load(asset("full.pth"), weights_only=True)
    after = torch.load(folder / "crepe-pruned.pth", weights_only=True)
    assert list(after) == list(before)
    named = [n for n in before if n.endswith(".weight") and "BN" not in n]
    same = [n for n in before if n not in named]
    assert all(torch.equal(after[name], before[name]) for name in same)
    kept = torch.cat([after[name].flatten() for name in named])
    original = torch.cat([before[name].flatten() for name in named])
    pruned = kept == 0
    assert int(pruned.sum()) == round(0.5 * len(kept)) == _row(section, "total")[1]
    assert torch.equal(kept[~pruned], original[~pruned])
    assert original[pruned].abs().max() <= original[~pruned].abs().min()
    assert re.search(r"in \d+\.\d\d s$", section, re.M)


def _check_names(section: str, folder: Path) -> None:
    named = dict(re.findall(r"^demo-files/(\S+) +([\d,]+) bytes$", section, re.M))
    assert named == {path.name: f"{path.stat().st_size:,}" for path in folder.iterdir()}


def _zeros(tensors: Mapping[str, Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in tensors.values())

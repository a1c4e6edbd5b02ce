"""examples/iterative.py, run as a user runs it; and a small part of examples/accuracy.py."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import secateur
from tests.conftest import asset

EXAMPLE = Path(__file__).parents[1] / "examples" / "iterative.py"


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("1,952,072", [asset("tiny.pth")]),
        pytest.param("88,981,168", [], marks=pytest.mark.slow),  # full.pth
    ],
)
def test_ten_rounds_on_a_checkpoint_equal_ten_uploads(weights: str, options: list[Path]) -> None:
    command: list[str | Path] = [sys.executable, "-W", "error", EXAMPLE, *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    rounds = re.findall(r"^ +(\d+) +(\d+\.\d\d)% +([\d,]+) +([\d,]+)$", ran.stdout, re.M)
    assert [int(number) for number, *_ in rounds] == list(range(1, 11))
    expected = [100 * (1 - 0.1 ** (number / 10)) for number in range(1, 11)]
    assert [float(sparsity) for _, sparsity, *_ in rounds] == pytest.approx(expected, abs=0.01)
    assert {size for *_, size, _ in rounds} == {weights}, "one upload"
    assert "the masks are the same" in ran.stdout


@pytest.fixture
def accuracy() -> ModuleType:
    """The module. It is imported late, because scikit-learn takes a second to import."""
    from examples import accuracy

    return accuracy


@pytest.fixture
def one_thread() -> Iterator[None]:
    """More threads would wait for each other while other tests use a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_training_restores_the_accuracy_in_both_ways(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "ROUNDS", 3)
    torch.manual_seed(2)  # others end closer to the bounds below
    digits, model = accuracy.read_digits(), accuracy.LeNet()
    accuracy.train(model, digits, epochs=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with secateur.embedded(device="cpu") as client:
        calls = recorded(client, monkeypatch)
        outcome = accuracy.measure(client, model, digits, accuracy.global_magnitude(0.95))
    # One-shot; then three rounds, of which each continues the one before: 0.95 * (1 - (1 - t)^3).
    assert [was_pruned for was_pruned, _ in calls] == [False, False, True, True]
    shares = [1, 19 / 27, 26 / 27, 1]
    assert [zeros for _, zeros in calls] == [round(0.95 * share * 59_838) for share in shares]
    assert outcome.sparsity == round(0.95 * 59_838) / 59_838
    assert outcome.untrained < 0.7
    assert min(outcome.at_once, outcome.in_rounds) > outcome.untrained + 0.2
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def recorded(client: secateur.Client, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Records for each prune whether the module was pruned before, and the zeros afterwards."""
    calls: list[tuple[bool, int]] = []
    prune = client.prune

    def recording(module: torch.nn.Module, *arguments: Any, **options: Any) -> secateur.PruneResult:
        was_pruned = secateur.is_pruned(module)
        result = prune(module, *arguments, **options)
        calls.append((was_pruned, result.report.zeros))
        return result

    monkeypatch.setattr(client, "prune", recording)
    return calls


def test_the_methods_and_the_table_of_the_accuracy_example(accuracy: ModuleType) -> None:
    weights = accuracy.LeNet().state_dict()
    rows = {}
    with secateur.embedded(device="cpu") as client:
        for name, spec in accuracy.METHODS.items():
            report = client.prune(weights, spec(0.9), output="none", progress=False).report
            rows[name] = [accuracy.Outcome(report.sparsity, 0.25, 0.5, 1.0)] * 4
    exact = round(0.9 * 59_838) / 59_838
    for name in ("uniform", "global", "LAMP", "ERK"):
        assert rows[name][0].sparsity == exact
    # One of each 8 inputs is kept, and one of the rest. The layers have 6, 400, 120 and 84 inputs.
    kept = 54 + 16 * 9 + 120 * 50 + 84 * 15 + 10 * 11
    assert rows["2:4, 1:4, 1:8, 1:16"][0].sparsity == (59_838 - kept) / 59_838
    lines = accuracy.table(rows).splitlines()
    assert lines[0] == "| method |  | 50% | 80% | 90% | 95% |"
    assert "| global | its sparsity | 90.0 | 90.0 | 90.0 | 90.0 |" in lines
    assert lines.count("|  | one-shot, then trained | 50.0 | 50.0 | 50.0 | 50.0 |") == 6


def test_the_mean_of_seeds_is_computed_for_each_level(accuracy: ModuleType) -> None:
    def outcome(sparsity: float, value: float) -> Any:
        return accuracy.Outcome(sparsity, value, value, value)

    seeds = [[outcome(0.5, 0.25), outcome(0.75, 1.0)], [outcome(0.5, 0.75), outcome(0.75, 0.0)]]
    assert accuracy.mean_levels(seeds) == [outcome(0.5, 0.5), outcome(0.75, 0.5)]

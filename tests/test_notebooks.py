"""The notebooks of examples/, executed as they are, and what they show."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import PATIENCE

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    """Times and figures depend on the machine, and a change of a line stays a change of a line."""
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert re.fullmatch("[a-z-]+", cell.id)


def executed(name: str) -> dict[str, Any]:
    """Executes a notebook. Returns what each cell shows by the cell's id, as MIME types."""
    notebook = read(EXAMPLES / f"{name}.ipynb")
    resources = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(notebook, timeout=PATIENCE, resources=resources).execute()
    shown: dict[str, Any] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "stream" or output.name == "stdout", output.text
            shown.setdefault(cell.id, {}).update(output.get("data", {}))
    return shown


def numbers(shown: Any) -> list[float]:
    """The numbers at the ends of the lines of a text."""
    found = re.findall(r"(?<= )(\d+\.\d+)$", shown["text/plain"], re.M)
    return [float(number) for number in found]


@pytest.mark.slow  # 10 seconds
def test_first_steps() -> None:
    shown = executed("first_steps")
    assert numbers({"text/plain": f" {shown['train']['text/plain']}"})[0] > 0.9
    for cell in ("server", "prune", "sweep", "finalize"):
        assert shown[cell]["text/html"].count("<table") == 1 + (cell == "sweep")
    for cell in ("bars", "sweep-plot"):
        assert len(shown[cell]["image/png"]) > 5000
    assert "47,870 zeros of 59,838 elements" in shown["prune"]["text/html"]
    unpruned, *_, most = numbers(shown["sweep"])
    assert unpruned > 0.9 > most, "95 % is too much without training"
    pruned, trained = numbers(shown["apply"])
    assert pruned < trained
    assert trained > 0.9
    assert "53,854 zeros of 60,074 elements" in shown["finalize"]["text/html"]


@pytest.mark.slow  # 2 minutes
def test_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = executed("encoder")
    operations = re.search(r"multiply-accumulates.* (\d\.\d\d)$", shown["gain"]["text/plain"], re.M)
    assert operations is not None
    assert 1.9 < float(operations[1]) < 2.1, "half of the operations"
    rows = shown["train"]["text/plain"].splitlines()[1:]
    cosines = [float(re.split(" {2,}", row)[1]) for row in rows]
    assert cosines[0] == 1.0
    assert cosines[1] < 0.75, "three of four channels are missed"
    assert cosines[1] + 0.15 < cosines[-1] < 0.99
    assert "'config.json'" in shown["save"]["text/plain"]

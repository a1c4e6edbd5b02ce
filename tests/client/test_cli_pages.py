"""The commands that write pages: --html, and compare."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import secateur
from secateur import cli

WEIGHTS = np.random.default_rng(0).standard_normal((8, 8), np.float32)


@pytest.fixture
def model(tmp_path: Path, at_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file in the current folder, beside a pruned one."""
    monkeypatch.chdir(tmp_path)
    save_file({"fc.weight": WEIGHTS}, "model.safetensors")
    save_file({"fc.weight": np.triu(WEIGHTS)}, "pruned.safetensors")
    return tmp_path / "model.safetensors"


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def data_of(path: str) -> Any:
    text = Path(path).read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_report_writes_a_page_with_details(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("report", "pruned.safetensors", "--html", "page.html") == 0
    assert "43.75%" in capsys.readouterr().out
    ((_, details),) = data_of("page.html")["details"]["fc.weight"]
    assert details["histogram"]["zeros"] == 28
    assert "<h1>Sparsity of pruned.safetensors</h1>" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (["--amounts", "0.25,0.5,0.75"], 1),  # the middle one
        (["--amounts", "0.25,0.5,0.75", "--amount", "0.75"], 2),
        (["--amounts", "0.25,1,1.0", "--amount", "1.0"], 2),
        (["--amounts", "0.25,0.5", "--amount", "0.6"], 1),
        (["--amount", "0.6"], 0),
    ],
)
def test_plan_marks_the_amount(model: Path, arguments: Any, chosen: int) -> None:
    assert run("plan", model, "--html", "page.html", "--quiet", *arguments) == 0
    assert data_of("page.html")["tables"][0]["chosen"] == chosen


def test_sensitivity_writes_a_heat_map(model: Path) -> None:
    assert run("sensitivity", model, "--html", "page.html", "--quiet") == 0
    columns = data_of("page.html")["tables"][0]["columns"]
    assert [column["label"] for column in columns] == [f"0.{n}" for n in range(1, 10)]


def test_compare_prints_both_side_by_side(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", "model.safetensors", "pruned.safetensors", "--html", "page.html") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["A: model.safetensors", "B: pruned.safetensors"]
    assert lines[3].split()[:5] == ["fc.weight", "0.00%", "43.75%", "0", "28"]
    details = data_of("page.html")["details"]["fc.weight"]
    assert [label for label, _ in details] == ["model.safetensors", "pruned.safetensors"]
    assert run("compare", model, "pruned.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = secateur.compare(model, "pruned.safetensors").to_dict()
    assert found == json.loads(json.dumps(expected))


@pytest.mark.parametrize("command", ["report", "plan", "sensitivity", "compare"])
def test_a_page_that_cannot_be_written_fails_before_the_call(
    model: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens there, so that a call would fail with another error.
    monkeypatch.setenv("SECATEUR_SERVER", "127.0.0.1:1")
    models = [model, model] if command == "compare" else [model]
    assert run(command, *models, "--html", "none/page.html") == 1
    assert re.fullmatch(r"secateur: none/page\.html: .*\n", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(command, *models, "--html", "page.html") == 1
    assert "pip install 'secateur[html]'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        run(command, *models, "--html", "-")
    assert raised.value.code == 2
    assert "--html: a page is a file" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"model.safetensors", "pruned.safetensors"}


def test_a_wrong_second_model_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", model, "none.safetensors", "--html", "page.html") == 1
    assert capsys.readouterr().err.startswith("secateur: none.safetensors: ")
    assert not Path("page.html").exists()

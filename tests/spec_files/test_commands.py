"""The commands that read specs from files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import secateur
from secateur import cli
from tests.spec_files.rules import TENSORS

pytestmark = pytest.mark.usefixtures("at_server")

LAMP = "rules:\n- method: lamp\n  amount: 0.5\n"
WRONG = "rules:\n- method: lamp\n  amount: 0.5\n  tensors:\n  - 0.weight\n  - 3.weight\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with a model and specs."""
    monkeypatch.chdir(tmp_path)
    save_file(TENSORS, "model.safetensors")
    Path("lamp.yaml").write_text(LAMP)
    Path("wrong.yaml").write_text(WRONG)


def test_check_prints_what_the_rules_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spec", "check", "lamp.yaml", "model.safetensors"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == [
        "lamp.yaml:2: names 3 tensors: 0.weight, 2.weight, conv.weight",
        "lamp.yaml:2: would prune 224 of 448 units",
        "no rule matches 1 tensor: 0.bias",
    ]
    assert any(line.startswith("total") and " 224 " in line for line in printed)
    here = {path.name for path in Path().iterdir()}
    assert here == {"lamp.yaml", "wrong.yaml", "model.safetensors"}


def test_check_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["spec", "check", "lamp.yaml", "model.safetensors", "--json", "--tensors", "[02]*t"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    (rule,) = found["rules"]
    assert rule["tensors"] == {"[02]*t": ["0.weight", "2.weight"]}
    assert (rule["place"], rule["pruned"], found["problems"]) == ("lamp.yaml:2", 80, [])
    assert found["report"]["zeros"] == 80


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
def test_check_fails_with_the_line(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert cli.main(["spec", "check", "wrong.yaml", "model.safetensors", *options]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("secateur: wrong.yaml:6: rules[0].tensors[1]: '3.weight' matches no fl")
    if options == ["--json"]:
        assert json.loads(printed.out)["problems"] == [line.removeprefix("secateur: ")]
    else:
        assert printed.out.splitlines()[:1] == (
            [] if options else ["wrong.yaml:2: names 1 tensor: 0.weight"]
        )


@pytest.mark.parametrize(
    "command", [["prune", "-o", "out.safetensors"], ["plan"]], ids=lambda command: command[0]
)
def test_what_the_server_refuses_has_a_line(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert cli.main([*command, "model.safetensors", "--spec", "wrong.yaml"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("secateur: wrong.yaml:6: spec.rules[0].selection.tensors[1]: '3.weight'")
    assert not Path("out.safetensors").exists()


def test_prune_takes_the_tensors_that_rules_do_not_name() -> None:
    command = ["prune", "model.safetensors", "-o", "out.safetensors", "--spec", "lamp.yaml"]
    for options, names in (
        ([], {"conv.weight", "0.weight", "2.weight"}),
        (["--tensors", "0.*t", "--tensors", "0.bias"], {"0.weight", "0.bias"}),
    ):
        assert cli.main([*command, *options, "--quiet"]) == 0
        found = load_file("out.safetensors")
        changed = {name for name in TENSORS if not np.array_equal(found[name], TENSORS[name])}
        assert changed <= names
        zeros = sum(int((found[name] == 0).sum()) for name in names)
        assert zeros == sum(TENSORS[name].size for name in names) // 2


@pytest.mark.parametrize(("at", "given", "out"), [("", ".", "../out"), ("x", "..", "../../out")])
def test_the_current_folder_is_pruned(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: str,
    given: str,
    out: str,
) -> None:
    model = Path("model").absolute()
    (model / "x").mkdir(parents=True)
    Path("model.safetensors").rename(model / "model.safetensors")
    (model / "config.json").write_text("{}")
    spec = str(Path("lamp.yaml").absolute())
    monkeypatch.chdir(model / at)
    assert cli.main(["prune", given, "-o", out, "--spec", spec]) == 0
    assert f"secateur shrink {given} -o {out}-small " in capsys.readouterr().out
    assert Path(out, "recipe.yaml").read_text() == LAMP


@pytest.mark.parametrize("is_embedded", [False, True])
def test_a_pruned_folder_has_the_spec_with_its_comments(
    monkeypatch: pytest.MonkeyPatch, is_embedded: bool
) -> None:
    if is_embedded:
        monkeypatch.delenv("SECATEUR_SERVER")
    Path("model").mkdir()
    Path("model.safetensors").rename("model/model.safetensors")
    Path("model/config.json").write_text("{}")
    text = f"# Half of all: \u00bd\n{LAMP}  # the end"
    Path("lamp.yml").write_text(text)
    command = ["prune", "model", "-o", "out", "--spec", "lamp.yml", "--quiet"]
    assert cli.main(command) == 0
    assert Path("out/recipe.yml").read_text() == text
    here = {path.name for path in Path("out").iterdir()}
    assert here == {"config.json", "model.safetensors", "recipe.yml"}


def test_tensors_of_rules_that_name_theirs_are_wrong_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for command in (
        ["spec", "check", "wrong.yaml", "model.safetensors"],
        ["prune", "model.safetensors", "-o", "o.safetensors", "--spec", "wrong.yaml"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*command, "--tensors", "*"])
        assert "--tensors: the rules of wrong.yaml name theirs" in capsys.readouterr().err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spec", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == secateur.spec_schema()


def test_without_ruamel_a_spec_may_be_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    Path("lamp.json").write_text('{"rules": [{"method": "lamp", "amount": 0.5}]}')
    assert cli.main(["spec", "check", "lamp.json", "model.safetensors"]) == 0
    assert capsys.readouterr().out.startswith("lamp.json: names 3 tensors: 0.weight, 2")
    assert cli.main(["spec", "check", "lamp.yaml", "model.safetensors"]) == 1
    assert "YAML needs pip install 'secateur[cli]'" in capsys.readouterr().err

"""What check_spec says of a spec and a model, against the prune itself."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import secateur
from tests.spec_files.rules import TENSORS

MODEL: dict[str, Any] = {**TENSORS, "steps": np.arange(12).reshape(3, 4)}
TEXT = """\
rules:
  - method: l1_unstructured
    tensors: ["*.weight", steps]
    amount: 0.5
  - method: ln_structured
    tensors:
      - 0.weight
    amount: 2
    n: 2
    dim: 0
"""


def read(folder: Path, text: str) -> secateur.Spec:
    (folder / "spec.yaml").write_text(text)
    return secateur.read_spec(folder / "spec.yaml")


def test_what_each_rule_matches_and_prunes(client: secateur.Client, tmp_path: Path) -> None:
    spec = read(tmp_path, TEXT)
    found = secateur.check_spec(client, MODEL, spec)
    assert found.rules == (
        secateur.RuleCheck(
            f"{tmp_path}/spec.yaml:2",
            {"*.weight": ("conv.weight", "0.weight", "2.weight"), "steps": ("steps",)},
            *(288 + 128 + 32 + 12, 144 + 64 + 16 + 6),
        ),
        secateur.RuleCheck(f"{tmp_path}/spec.yaml:5", {"0.weight": ("0.weight",)}, 8, 2),
    )
    assert (found.unnamed, found.problems) == (("0.bias",), ())
    pruned = client.prune(MODEL, spec).report
    assert found.report is not None
    assert found.report.zeros == pruned.zeros
    assert found.report.warnings == (), "no zeros were written"
    assert dict(found.report.tensors) == dict(pruned.tensors)
    lines = str(found).splitlines()
    place = f"{tmp_path}/spec.yaml:2"
    assert lines[:2] == [
        f"{place}: names 1 tensor: steps",
        f"{place}: *.weight matches 3 tensors: conv.weight, 0.weight, 2.weight",
    ]
    assert lines[2].endswith("spec.yaml:2: would prune 230 of 460 units")
    assert "no rule matches 1 tensor: 0.bias" in lines
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["rules"][1] == {
        **{"place": f"{tmp_path}/spec.yaml:5", "tensors": {"0.weight": ["0.weight"]}},
        **{"candidates": 8, "pruned": 2},
    }
    assert plain["report"]["zeros"] == pruned.zeros


def test_the_model_is_not_changed(client: secateur.Client, tmp_path: Path) -> None:
    save_file(MODEL, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    secateur.check_spec(client, tmp_path / "model.safetensors", read(tmp_path, TEXT))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_all_names_that_match_nothing_are_named(client: secateur.Client, tmp_path: Path) -> None:
    text = TEXT.replace("- 0.weight", "- 0.wieght\n      - 2.*\n      - x*")
    found = secateur.check_spec(client, MODEL, read(tmp_path, text))
    assert found.report is None
    assert [problem.removeprefix(f"{tmp_path}/spec.yaml") for problem in found.problems] == [
        ":7: rules[1].tensors[0]: '0.wieght' matches no floating tensor; did you mean '0.weight'?",
        ":9: rules[1].tensors[2]: 'x*' matches no floating tensor; integers need their exact name",
    ]
    assert found.rules[1].tensors == {"0.wieght": (), "2.*": ("2.weight",), "x*": ()}
    assert found.rules[1].pruned is None
    assert str(found).endswith(found.problems[1])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("amount: 2", "amount: 9", r":8: spec\.rules\[1\]\.selection\.count: "),
        ("dim: 0", "dim: 2", r":10: spec\.rules\[1\]\.selection\.dim: "),
        ("0.weight", "0.bias", r":10: spec\.rules\[1\]\.selection\.dim: "),
    ],
)
def test_what_the_server_refuses_has_a_line(
    client: secateur.Client, tmp_path: Path, old: str, new: str, said: str
) -> None:
    spec = read(tmp_path, TEXT.replace(old, new))
    (problem,) = secateur.check_spec(client, MODEL, spec).problems
    assert re.search(said, problem), problem


def test_a_spec_without_a_file(client: secateur.Client) -> None:
    group = secateur.group(
        "g", secateur.member("0.weight"), secateur.member("0.bias", scored=False)
    )
    masks = {"2.weight": np.ones((4, 8)), "none": np.ones(3)}
    spec = secateur.grouped([group], 2) + secateur.custom_from_mask(masks)
    found = secateur.check_spec(client, MODEL, spec)
    assert [rule.place for rule in found.rules] == ["rules[0]", "rules[1]"]
    assert found.rules[0].tensors == {"g": ("0.weight", "0.bias")}
    assert found.problems == (
        "rules[1].masks: 'none' matches no floating tensor; integers need their exact name",
    )
    alone = secateur.check_spec(client, MODEL, secateur.grouped([group], 2))
    assert (alone.rules[0].candidates, alone.rules[0].pruned) == (8, 2)


def test_solvers_and_calibrated_rules(client: secateur.Client, files: dict[str, str]) -> None:
    rules = secateur.wanda("*", 0.5, files["statistics"]) + secateur.refit("*", files["statistics"])
    found = secateur.check_spec(client, TENSORS, rules)
    assert not found.problems
    assert found.rules[0].pruned == (128 + 32) // 2
    assert found.rules[1].tensors == {"0.weight": ("0.weight",), "2.weight": ("2.weight",)}
    assert found.unnamed == ("conv.weight", "0.bias")


def test_a_model_on_the_server(client: secateur.Client) -> None:
    checkpoint = client.upload(MODEL)
    spec = secateur.l1_unstructured(["*.weight", "steps"], 0.5)
    found = secateur.check_spec(client, checkpoint, spec)
    here = secateur.check_spec(client, MODEL, spec)
    assert (found.rules, found.unnamed) == (here.rules, here.unnamed)
    wrong = secateur.check_spec(client, checkpoint, secateur.l1_unstructured(["y*", "stepz"], 0.5))
    assert len(wrong.problems) == 1
    client.delete(checkpoint)


def test_zeros_may_count_as_pruned(client: secateur.Client) -> None:
    half = secateur.l1_unstructured("0.weight", 0.5)
    dense = client.prune(MODEL, half).state_dict("dense")
    checks = [secateur.check_spec(client, dense, half, prior) for prior in ("masks", "zeros")]
    assert [check.rules[0].pruned for check in checks] == [64, 32]


def test_wrong_arguments(client: secateur.Client) -> None:
    spec = secateur.lamp("*", 0.5)
    wrong: list[tuple[Any, Any, Any]] = [(None, MODEL, spec), (client, 7, spec), (client, MODEL, 7)]
    for arguments in wrong:
        with pytest.raises(secateur.SecateurError):
            secateur.check_spec(*arguments)

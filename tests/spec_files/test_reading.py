"""Files of specs: YAML and JSON, the lines of errors, and what `save` writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

import secateur
from secateur import InvalidSpec, Spec
from tests.spec_files.rules import TENSORS, valid_rules

TEXT = """\
# A comment.
rules:
  - method: l1_unstructured  # another one
    tensors: "conv*.weight"
    amount: 0.25
  - method: select
    tensors:
      - 0.weight
      - 2.weight
    amount: 1e-1
    granularity:
      n_m: {n: 2,
            m: 4}
    guard_rails:
      per_tensor:
        "2.*": {max_sparsity: 0.5}
"""


def read(folder: Path, text: str, tensors: Any = None, name: str = "spec.yaml") -> Spec:
    path = folder / name
    path.write_text(text)
    return secateur.read_spec(path, tensors)


def test_yaml_and_json_are_the_same_spec(tmp_path: Path) -> None:
    n_m = secateur.n_m(2, 4)
    rails = secateur.guard_rails(per_tensor={"2.*": secateur.rail(max_sparsity=0.5)})
    expected = secateur.l1_unstructured("conv*.weight", 0.25) + secateur.select(
        ["0.weight", "2.weight"], 0.1, granularity=n_m, guard_rails=rails
    )
    assert read(tmp_path, TEXT) == expected
    table = {"$schema": "spec.schema.json", **YAML(typ="safe").load(TEXT)}
    assert read(tmp_path, json.dumps(table), name="spec.json") == expected


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("0.25", "1.25", r":5: rules\[0\]\.amount: 1\.25 is outside \[0, 1\]$"),
        ("amount: 0.25", "amuont: 0.25", r":5: .*'amuont' is not .*; did you mean 'amount'\?$"),
        ("amount: 0.25", "", r":3: rules\[0\]\.l1_unstructured: 'amount' is missing$"),
        ("method: select", "method: selct", r":6: .*'selct' is none of .*did you mean 'select'\?$"),
        ("- 2.weight", "- 2", r":7: rules\[1\]\.tensors: .* is not a name, a glob, or a list$"),
        ("m: 4", "k: 4", r":13: rules\[1\]\.granularity\.n_m: 'k' is not an argument; "),
        ("n: 2", "n: -2", r":12: rules\[1\]\.granularity\.n_m\.n: -2 is not an int in \[0, "),
        ("0.5}", "x}", r":16: rules\[1\]\.guard_rails\.per_tensor\['2\.\*'\]\.max_sparsity: 'x' "),
        ("amount: 1e-1", "amount: 1\n    amount: 2", r':11: found duplicate key "amount" '),
        ("rules:", "rule:", r":2: rule: is unknown; the nearest is rules$"),
        ("# A comment.", "rulez: 3", r":1: 'rulez' is not a field of a spec; "),
        ("n: 2,", "n: 2", r":13: expected ',' or '}'"),
        ("# A comment.", "x: *y", r":1: found undefined alias 'y'$"),
        ("# A comment.", "\x07", r"spec\.yaml: is not YAML: unacceptable character #x0007"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(InvalidSpec, match=said) as raised:
        read(tmp_path, TEXT.replace(old, new))
    assert str(raised.value).startswith(str(tmp_path / "spec.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{\n", r"spec\.json:2: Expecting property name"),
        ('{"rules": [{"method": "lamp"}]}', r"spec\.json: rules\[0\]\.tensors: is missing; name "),
        ("[" * 100_000, r"spec\.json: maximum recursion depth"),
        ("7", r"spec\.json: 7 is not a mapping with a list of `rules`$"),
    ],
)
def test_errors_of_json(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        read(tmp_path, text, name="spec.json")


def test_yaml_is_that_of_2009(tmp_path: Path, files: dict[str, str]) -> None:
    """In YAML 1.1 2:4 is 124, 1e-1 is text, and `no` is false."""
    rule = "rules: [{method: select, tensors: no, amount: 1e-1, of_all: true}]"
    assert read(tmp_path, rule) == secateur.select("no", 0.1, of_all=True)
    rule = f"{{method: wanda, tensors: '*', n_m: 2:4, statistics: {files['statistics']}}}"
    with pytest.raises(InvalidSpec, match="'2:4' is not a pair such as"):
        read(tmp_path, f"rules: [{rule}]")


def test_an_anchor_is_read_in_both_places(tmp_path: Path) -> None:
    text = "rules:\n- &a {method: lamp, tensors: a, amount: 0.5}\n- {<<: *a, tensors: b}"
    assert read(tmp_path, text) == secateur.lamp("a", 0.5) + secateur.lamp("b", 0.5)


def test_a_rule_may_leave_its_tensors_to_the_caller(tmp_path: Path) -> None:
    text = "rules:\n- {method: lamp, amount: 0.5}\n- {method: lamp, amount: 1, tensors: a}\n"
    expected = secateur.lamp(["x", "y*"], 0.5) + secateur.lamp("a", 1)
    assert read(tmp_path, text, ["x", "y*"]) == expected
    with pytest.raises(InvalidSpec, match=r"spec\.yaml:2: rules\[0\]\.tensors: is missing; "):
        read(tmp_path, text)
    with pytest.raises(InvalidSpec, match=r"spec\.yaml:2: rules\[0\]\.tensors: 7 is not a name"):
        read(tmp_path, text, 7)


def test_a_missing_file_of_statistics_is_named(tmp_path: Path) -> None:
    text = "rules:\n- method: wanda\n  tensors: '*'\n  amount: 1\n  statistics: none.safetensors"
    with pytest.raises(secateur.InvalidStatistics, match=r":5: .*none\.safetensors: No such file"):
        read(tmp_path, text)


def test_scores_come_from_a_file(client: secateur.Client, files: dict[str, str]) -> None:
    scores = {"0.weight": TENSORS["0.weight"] ** 2}
    masks = [
        client.prune(TENSORS, secateur.l1_unstructured("0.weight", 0.5, given)).masks["0.weight"]
        for given in (scores, files["importance_scores"])
    ]
    assert np.array_equal(*masks)
    with pytest.raises(InvalidSpec, match=r"importance_scores: none\.npz: No such file"):
        secateur.l1_unstructured("0.weight", 0.5, "none.npz")


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_what_is_saved_is_read_back(files: dict[str, str], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"spec.{suffix}"
    for rule in valid_rules(files):
        spec = Spec.from_dict({"rules": [rule]})
        spec.save(path)
        assert secateur.read_spec(path) == spec, rule
    whole = Spec.from_dict({"rules": valid_rules(files)})
    assert Spec.from_dict(whole.to_dict()) == whole


@given(names=st.lists(st.text(), min_size=1), suffix=st.sampled_from(["yaml", "json"]))
@example(names=["-", "?", "no", "~", "1", "a: b", "#", "\x85", "\ufeff", "", " a "], suffix="yaml")
def test_any_name_is_saved(
    names: list[str], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"names.{suffix}"
    table = secateur.table(dict.fromkeys(names, 0.5))
    spec = secateur.select(names, table, guard_rails={})
    spec.save(path)
    assert secateur.read_spec(path) == spec


@pytest.mark.parametrize(
    "text",
    [
        *("a: !!omap b", "!!set a: b", "rules: !!set x", "? {a: b}\n: c", "!!timestamp x"),
        *("[" * 600, "rules: &a [*a]", "\ud800", "--- 1\n--- 2", "rules: {? [a] : b}"),
    ],
)
def test_odd_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "spec.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidSpec, match=r"spec\.yaml") as raised:
        secateur.read_spec(tmp_path / "spec.yaml")
    assert len(str(raised.value).splitlines()) == 1


def test_traced_groups_are_saved(client: secateur.Client, tmp_path: Path) -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 4, 5),
    ).eval()
    groups = secateur.groups(module, torch.ones(1, 3, 4, 4))
    spec = secateur.grouped(groups, 3, p=2, align=1)
    spec.save(tmp_path / "spec.yaml")
    again = secateur.read_spec(tmp_path / "spec.yaml")
    assert again == spec
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    found, expected = (client.prune(state, of, "shrunk").state_dict() for of in (again, spec))
    assert found["0.weight"].shape == (5, 3, 3, 3)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_step_of_a_schedule_is_saved(client: secateur.Client, tmp_path: Path) -> None:
    """Its rule has no method of its own, so it is written as a `select`, which ranks the same."""
    step = secateur.l1_unstructured("0.weight", 0.5).at(1, 2, "linear")
    again = Spec.from_dict(step.to_dict())
    found, expected = (client.prune(TENSORS, of).masks["0.weight"] for of in (again, step))
    assert np.array_equal(found, expected)
    assert (~expected).sum() == 32


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (secateur.custom_from_mask({"w": np.ones(3)}), r"^rules\[0\]\.masks: 1 arrays are in mem"),
        (
            secateur.lamp("w", 1) + secateur.l1_unstructured("w", 1, {"w": np.ones(3)}),
            r"^rules\[1\]\.importance_scores: ",
        ),
    ],
)
def test_arrays_in_memory_are_not_saved(spec: Spec, said: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("before")
    with pytest.raises(InvalidSpec, match=said):
        spec.save(path)
    assert path.read_text() == "before"


def test_a_model_is_not_a_spec(tmp_path: Path) -> None:
    """As `secateur spec check MODEL FILE` has the two swapped."""
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"\xff")
    for path, said in ((tmp_path, "is a folder"), (model, "is not text")):
        with pytest.raises(InvalidSpec, match=f"{path.name}: {said}.*; give a spec in YAML or"):
            secateur.read_spec(path)


def test_where_a_spec_cannot_be_saved(tmp_path: Path) -> None:
    spec = secateur.lamp("w", 1)
    with pytest.raises(InvalidSpec, match=r"unknown suffix '\.txt' of a spec; known are \.yaml"):
        spec.save(tmp_path / "spec.txt")
    with pytest.raises(secateur.SecateurError, match="cannot write it: No such file"):
        spec.save(tmp_path / "none/spec.yaml")


def bomb(inner: str) -> str:
    """YAML of ten lines with aliases of aliases, which expand to 9 ** 9 values."""
    levels = [f"&a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return f"[&a0 {inner},{','.join(levels)}]"


@pytest.mark.parametrize("inner", ["[x, x]", "{x: y}"])
@pytest.mark.parametrize(
    "text",
    [
        "rules: {0}",
        "rules: [{{method: {}}}]",
        "rules: [{{method: l1_unstructured, amount: {}}}]",
        "rules: [{{method: l1_unstructured, amount: 0.5, tensors: {}}}]",
        "rules: [{{method: select, amount: 0.5, importance: {}}}]",
        "rules: [{{method: grouped, amount: 0.5, groups: {}}}]",
    ],
)
def test_aliases_that_expand_to_very_many_values(tmp_path: Path, text: str, inner: str) -> None:
    with pytest.raises(InvalidSpec, match="its aliases expand to more than 1,000,000 values"):
        read(tmp_path, text.format(bomb(inner)), "*")


@pytest.mark.parametrize("text", ["&r\nrules: *r\n", "rules: [&r {method: [*r, &s {x: *s}]}]"])
def test_aliases_of_themselves(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSpec, match=r"spec\.yaml"):
        read(tmp_path, text, "*")


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_repeated_key_is_an_error(tmp_path: Path, suffix: str) -> None:
    text = '{"rules": [{"method": "l1_unstructured", "amount": 0.5, "amount": 0.9}]}'
    with pytest.raises(InvalidSpec, match=r"found duplicate key ['\"]amount['\"]"):
        read(tmp_path, text, "*", f"spec{suffix}")

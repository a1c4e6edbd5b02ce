"""Plans and sensitivities, by the client and by the command."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import save_file

import secateur
from secateur import InvalidSpec, cli
from tests.conftest import RunningServer

RNG = np.random.default_rng(3)
MODEL: dict[str, npt.NDArray[Any]] = {
    "conv.weight": RNG.standard_normal((4, 3, 2, 2)).astype(np.float32),
    "fc.weight": RNG.standard_normal((5, 8)).astype(np.float32),
    "fc.bias": RNG.standard_normal(5).astype(np.float32),
    "steps": np.array([3]),
}
SPEC = secateur.global_unstructured("*.weight", 0.5)
AMOUNTS = [0.0, 0.25, 7, 0.9, 1, 1.0]


def magnitudes(names: list[str]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.abs(MODEL[n].astype(np.float64)).ravel() for n in names])


def removed(found: npt.NDArray[np.float64], count: int) -> float:
    """The norm of the lowest `count`, over that of all."""
    energies = np.sort(found) ** 2
    return float(np.sqrt(energies[:count].sum() / energies.sum()))


def count_of(amount: float, units: int) -> int:
    return amount if isinstance(amount, int) else round(amount * units)


def test_a_plan_of_many_amounts(client: secateur.Client) -> None:
    plan = client.plan(MODEL, SPEC, AMOUNTS)
    whole = magnitudes(["conv.weight", "fc.weight"])
    assert [(type(p.amount), p.amount) for p in plan.amounts] == [(type(a), a) for a in AMOUNTS]
    for planned in plan.amounts:
        assert planned.amount is not None
        count = count_of(planned.amount, 88)
        assert (planned.pruned, planned.total, planned.sparsity) == (count, 88, count / 88)
        assert planned.norm_removed == pytest.approx(removed(whole, count))
        assert planned.kept_bytes == 4 * (88 - count)
        (choice,) = planned.choices
        assert choice.pruned == count
        assert choice.threshold == (pytest.approx(np.sort(whole)[count - 1]) if count else None)
        cut = np.sort(whole)[count - 1] if count else -1.0
        for name, tensor in planned.tensors.items():
            own = magnitudes([name])
            assert tensor.pruned == (own <= cut).sum()
            assert tensor.total == own.size
            assert tensor.sparsity == tensor.pruned / tensor.total
            assert tensor.norm_removed == pytest.approx(removed(own, tensor.pruned))


def test_a_plan_without_amounts_is_of_the_specs_own(client: secateur.Client) -> None:
    assert [p.amount for p in client.plan(MODEL, SPEC).amounts] == [0.5]
    (planned,) = client.plan(MODEL, secateur.l1_unstructured("fc.weight", 3)).amounts
    assert (planned.amount, planned.pruned) == (3, 3)
    at = secateur.select("fc.weight", secateur.threshold(0.5))
    (planned,) = client.plan(MODEL, at).amounts
    assert planned.amount is None
    assert planned.pruned == (magnitudes(["fc.weight"]) < 0.5).sum()


def test_rules_before_the_last_are_applied(client: secateur.Client) -> None:
    before = secateur.l1_unstructured("fc.weight", 10)
    plan = client.plan(MODEL, before + secateur.l1_unstructured("fc.weight", 0), [5, 1.0])
    assert [planned.pruned for planned in plan.amounts] == [15, 40]
    own = np.sort(magnitudes(["fc.weight"]))[10:]
    assert plan.amounts[0].norm_removed == pytest.approx(removed(own, 5))
    assert str(plan).startswith(
        "Pruning by the last of 2 rules, after the others: magnitude, each tensor by itself; "
    )


def test_its_bytes_are_those_of_the_answers(client: secateur.Client, tmp_path: Path) -> None:
    plan = client.plan(MODEL, SPEC)
    kept = client.prune(MODEL, SPEC, keep=True).checkpoint
    assert kept is not None
    sizes = []
    for output in ("masks", "reparametrized", "dense"):
        client.download(kept, tmp_path / f"{output}.safetensors", output)
        sizes.append((tmp_path / f"{output}.safetensors").stat().st_size)
    assert [plan.masks_bytes, plan.reparametrized_bytes, plan.dense_bytes] == sizes


def test_sources_of_all_kinds(client: secateur.Client, tmp_path: Path) -> None:
    expected = client.plan(MODEL, SPEC, [0.5]).amounts
    path = tmp_path / "model.safetensors"
    save_file(MODEL, path)
    assert client.plan(path, SPEC, [0.5]).amounts == expected
    assert client.plan(client.upload(MODEL), SPEC, [0.5]).amounts == expected
    tensors = {name: torch.from_numpy(array) for name, array in MODEL.items()}
    assert client.plan(tensors, SPEC, [0.5]).amounts == expected
    with secateur.embedded() as local:
        assert local.plan(path.as_uri(), SPEC, [0.5]).amounts == expected
        shown = local.sensitivity(path.as_uri(), amounts=[0.5])
    assert list(shown.norm_removed) == ["conv.weight", "fc.weight"]


def test_of_a_module_the_parameters_are_planned(client: secateur.Client) -> None:
    module = torch.nn.BatchNorm1d(4)
    (planned,) = client.plan(module, secateur.l1_unstructured("*", 1)).amounts
    assert list(planned.tensors) == ["weight", "bias"]  # and not running_mean


def test_scores_are_sent_with_a_plan(client: secateur.Client) -> None:
    scores = np.arange(40.0).reshape(5, 8)
    spec = secateur.l1_unstructured("fc.weight", 0, importance_scores={"fc.weight": scores})
    (planned,) = client.plan(MODEL, spec, [4]).amounts
    assert planned.choices[0].threshold == 3.0
    own = MODEL["fc.weight"].astype(np.float64) ** 2
    assert planned.norm_removed == pytest.approx(np.sqrt(own.flat[:4].sum() / own.sum()))


@pytest.mark.parametrize(
    ("amounts", "said"),
    [
        ([], "^amounts: at least one"),
        ([0.5, 1.5], r"^amounts\[1\]: 1\.5 "),
        ([-1], r"^amounts\[0\]: -1 "),
        ("0.5", "^amounts: '0.5' "),
        (0.5, r"^amounts: 0\.5 "),
    ],
)
def test_wrong_amounts(client: secateur.Client, amounts: Any, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        client.plan(MODEL, SPEC, amounts)


def test_what_cannot_be_planned(client: secateur.Client) -> None:
    masks = secateur.custom_from_mask({"fc.bias": np.ones(5)})
    with pytest.raises(InvalidSpec, match=r"rules\[1\]"):
        client.plan(MODEL, SPEC + masks)
    with pytest.raises(InvalidSpec, match="is not a Spec; make one"):
        client.plan(MODEL, {"rules": []})  # type: ignore[arg-type]


def test_a_plan_is_shown_as_a_table(client: secateur.Client) -> None:
    plan = client.plan(MODEL, SPEC, [0.25, 1, 1.0])
    rows = secateur.select("fc.weight", 1, secateur.random(1), "rows", "isomorphic")
    assert client.plan(MODEL, rows).method == (
        "random, tensors of like names together; a unit is 1 slice"
    )
    lamp = client.plan(MODEL, secateur.lamp("*.weight", 1)).method
    assert lamp == "magnitude, all tensors together, allocation lamp; a unit is 1 element"
    whole = np.sort(magnitudes(["conv.weight", "fc.weight"]))
    legend, head, first, one, last, note = str(plan).splitlines()
    assert legend.startswith("Pruning by magnitude, all tensors together; a unit is 1 element. ")
    assert legend in plan._repr_html_()
    assert f"A dense file keeps its size, {plan.dense_bytes:,} bytes at every amount" in note
    assert re.split("  +", head) == [
        *("amount", "pruned", "sparsity", "threshold", "norm removed", "bytes of kept values")
    ]
    share = f"{removed(whole, 22):.2%}"
    assert first.split() == ["0.25", "22", "25.00%", f"{whole[21]:.6g}", share, "264"]
    assert one.split()[:2] == ["1", "1"]
    assert last.split()[:3] == ["1.0", "88", "100.00%"]
    assert len({len(line) for line in (head, first, one, last)}) == 1
    of_each = client.plan(MODEL, secateur.l1_unstructured("*.weight", 0.5))
    assert str(of_each).splitlines()[2].split()[3] == "-"  # each tensor has a threshold of its own
    assert plan._repr_html_().count("<tr>") == 4
    assert json.loads(json.dumps(plan.to_dict()))["amounts"][0]["pruned"] == 22


def test_sensitivity_is_of_each_tensor_by_itself(client: secateur.Client) -> None:
    sensitivity = client.sensitivity(MODEL, amounts=[0.5, 3])
    assert list(sensitivity.norm_removed) == ["conv.weight", "fc.weight"]  # biases are not asked
    for name, shares in sensitivity.norm_removed.items():
        own = magnitudes([name])
        half = round(own.size / 2)
        assert shares == pytest.approx([removed(own, half), removed(own, 3)])
    legend, head, _, last = str(sensitivity).splitlines()
    assert legend.startswith("Pruning by magnitude, each tensor by itself; a unit is 1 element. A ")
    assert head.split() == ["tensor", "0.5", "3"]
    assert last.split() == [
        "fc.weight",
        *(f"{share:.2%}" for share in sensitivity.norm_removed["fc.weight"]),
    ]
    assert sensitivity.to_dict()["amounts"] == (0.5, 3)
    assert sensitivity._repr_html_().count("<td>") == 4  # beside the names


def test_sensitivity_of_larger_units(client: secateur.Client) -> None:
    shown = client.sensitivity(MODEL, "fc.weight", [2], granularity="rows", p=2)
    norms = np.sqrt((MODEL["fc.weight"].astype(np.float64) ** 2).sum(1))
    assert shown.norm_removed["fc.weight"] == pytest.approx([removed(norms, 2)])
    assert len(client.sensitivity(MODEL, "fc.*").amounts) == 9


def test_sensitivity_without_matrices(client: secateur.Client) -> None:
    with pytest.raises(InvalidSpec, match="no floating tensor"):
        client.sensitivity({"bias": np.ones(3)})
    many = {f"b{i}": np.ones(3) for i in range(5)}
    with pytest.raises(InvalidSpec, match=r"there are: b0, b1, b2 and 2 more$"):
        client.sensitivity(many)
    with pytest.raises(
        InvalidSpec, match=r"'xyz' .*; the tensors are: 'b0', 'b1', 'b2' and 2 more$"
    ):
        client.sensitivity(many, "xyz")
    with pytest.raises(InvalidSpec, match="integers by their exact names; no floating tensor"):
        client.sensitivity({"steps": np.array([[1, 2]])})


@pytest.fixture
def model(tmp_path: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    path = tmp_path / "model.safetensors"
    save_file(MODEL, path, {"format": "pt"})  # as the client sends tensors
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_command_plan(
    model: Path, client: secateur.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ["--method", "global_unstructured"]
    assert run("plan", model, *method, "--amounts", "0.1,5") == 0
    assert capsys.readouterr().out == f"{client.plan(MODEL, SPEC, [0.1, 5])}\n"
    assert run("plan", model, *method, "--amount", "0.5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["amounts"][0]["pruned"] == 44
    assert run("plan", model, "--method", "n_m_structured", "--amounts", "0.5,1.0") == 0
    expected = client.plan(MODEL, secateur.n_m_structured("*.weight"), [0.5, 1.0])
    assert capsys.readouterr().out == f"{expected}\n"


def test_the_command_plan_of_a_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = model.with_name("spec.json")
    rule = {"method": "select", "tensors": "fc.weight", "amount": 2, "granularity": "rows"}
    spec.write_text(json.dumps({"rules": [rule]}))
    assert run("plan", model, "--spec", spec, "--amounts", "1,3", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["amounts"]
    assert [(p["amount"], p["pruned"]) for p in planned] == [(1, 8), (3, 24)]
    assert run("plan", model, "--spec", spec) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["2", "16"]


def test_the_command_plan_needs_a_model_alone(
    model: Path, client: secateur.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", model) == 0
    amounts = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    names = [name for name, tensor in MODEL.items() if tensor.ndim >= 2]
    spec = secateur.global_unstructured(names, 0.1)
    assert capsys.readouterr().out == f"{client.plan(MODEL, spec, amounts)}\n"


def test_the_command_sensitivity(
    model: Path, client: secateur.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sensitivity", model) == 0
    assert capsys.readouterr().out == f"{client.sensitivity(MODEL)}\n"
    assert run("sensitivity", model, "--amounts", "0.5", "--tensors", "fc.*", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["amounts"] == [0.5]
    assert list(found["norm_removed"]) == ["fc.bias", "fc.weight"]  # as the file has them


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "lamp", "--amounts", "2.5"], "--amounts: '2.5' "),
        (["--method", "lamp", "--amount", "0.5", "--amounts", "0.5,2.5"], "--amounts: '2.5' "),
    ],
)
def test_the_command_says_what_is_wrong(
    model: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("plan", model, *arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_prune_has_the_options_of_the_methods(
    model: Path, client: secateur.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.with_name("out.safetensors")
    n_m = ["--method", "n_m_structured", "--n", "1", "--m", "2", "--dim", "0"]
    assert run("prune", model, "-o", out, *n_m, "--tensors", "conv.*") == 0
    assert client.report(out).tensors["conv.weight"].zeros == 24
    blocks = ["--method", "block_structured", "--rows", "5", "--cols", "4", "--amount", "1"]
    assert run("prune", model, "-o", out, *blocks, "--tensors", "fc.weight") == 0
    assert client.report(out).tensors["fc.weight"].zeros == 20
    assert run("prune", model, "-o", out, "--method", "erk", "--amount", "0.5") == 0
    assert client.report(out, "*.weight").zeros == 44

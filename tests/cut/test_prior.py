"""prior="zeros": zeros count as pruned before the call, as after custom_from_mask(w != 0)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur import cli
from secateur_proto import pruner_pb2 as pb
from tests.conftest import RunningServer
from tests.contract.raw import check_invalid, entry, file, send_file
from tests.reference import (
    Step,
    all_l1,
    assert_same_masks,
    assert_same_tensors,
    by_torch,
    custom,
    distinct,
    identity,
    l1,
    ln,
    torch_masks,
)


def half_zero(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A dense tensor after an earlier pruning: half of it are zeros that kept their signs."""
    values = distinct(shape, dtype, seed=len(shape))
    return torch.where(values.abs() < values.abs().median(), values * 0, values)


MODEL = {
    "conv.weight": half_zero((6, 4, 3, 3)),
    "fc.weight": half_zero((10, 54)),
    "gain": half_zero((40,), torch.float16),
    "full": distinct((8, 8)),
    "bias": half_zero((10,)),
}
NAMES = ["conv.weight", "fc.weight", "gain", "full"]
MATRICES = ["conv.weight", "fc.weight", "full"]
STEPS = {
    "identity": identity(NAMES),
    "l1": l1(NAMES, 0.5),
    "count": l1(NAMES, 7),
    "slices": ln(MATRICES, 0.5, 2, 0),
    "slices of the last dimension": ln(MATRICES, 1, 1, -1),
    "global": all_l1(["conv.weight", "fc.weight", "full"], 0.3),
    "mask": custom({"fc.weight": distinct((10, 54), seed=9) > 0}),
    "two rules": ln(MATRICES, 1, 2, 0) + l1(["fc.weight"], 0.5),
}


def zeros_first(step: Step, names: list[str]) -> Step:
    """Makes a step that masks the zeros first, for torch."""
    return custom({name: MODEL[name] != 0 for name in names}) + step


def named(step: Step, client: secateur.Client) -> list[str]:
    return list(client.prune(MODEL, step.spec, output="none").report.tensors)


def mapping(client: secateur.Client, folder: Path) -> Any:
    return MODEL


def path(client: secateur.Client, folder: Path) -> Any:
    save_file(MODEL, folder / "model.safetensors")
    return folder / "model.safetensors"


def checkpoint(client: secateur.Client, folder: Path) -> Any:
    return client.upload(MODEL)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("source", [mapping, path, checkpoint])
def test_zeros_count_as_an_earlier_mask(
    client: secateur.Client, tmp_path: Path, step: Step, source: Callable[..., Any]
) -> None:
    names = named(step, client)
    expected = by_torch(MODEL, zeros_first(step, names))
    model = source(client, tmp_path)
    pairs = client.prune(model, step.spec, output="reparametrized", prior="zeros")
    assert_same_tensors(pairs.state_dict("reparametrized"), expected.state_dict())
    masks = client.prune(model, step.spec, prior="zeros").masks
    assert_same_masks(masks, torch_masks(MODEL, zeros_first(step, names)))


def test_masks_alone_are_the_default(client: secateur.Client) -> None:
    step = l1(NAMES, 0.5)
    for result in (client.prune(MODEL, step.spec), client.prune(MODEL, step.spec, prior="masks")):
        assert_same_masks(result.masks, torch_masks(MODEL, step))


def test_the_mask_of_a_pair_is_combined_with_its_zeros(client: secateur.Client) -> None:
    """The mask prunes elements that are not zero, and keeps some that are."""
    mask = distinct((10, 54), seed=5) > 0
    pair = {"w_orig": MODEL["fc.weight"], "w_mask": mask.float()}
    found = client.prune(pair, secateur.l1_unstructured("w", 0.5), prior="zeros").masks["w"]
    before = {"w": mask & (MODEL["fc.weight"] != 0)}
    expected = torch_masks({"w": MODEL["fc.weight"]}, custom(before), l1(["w"], 0.5))
    assert torch.equal(found, expected["w"])


def test_zeros_of_a_large_tensor_count_as_an_earlier_mask(client: secateur.Client) -> None:
    """More than one piece, on all cores."""
    weight = torch.randn(1100, 1000, generator=torch.Generator().manual_seed(0)).relu()
    step, first = all_l1(["w"], 0.5), custom({"w": weight != 0})
    found = client.prune({"w": weight}, step.spec, prior="zeros").masks
    assert_same_masks(found, torch_masks({"w": weight}, first, step))


def test_groups_count_a_unit_of_zeros_as_pruned(client: secateur.Client) -> None:
    first, second = distinct((6, 4)), distinct((3, 6), seed=1)
    first[2], second[:, 2] = 0, 0
    group = secateur.group("g", secateur.member("a"), secateur.member("b", dim=1))
    spec = secateur.grouped([group], 1)
    model = {"a": first, "b": second}
    masks = {name: tensor != 0 for name, tensor in model.items()}
    result = client.prune(model, spec, prior="zeros")
    expected = client.prune(model, secateur.custom_from_mask(masks) + spec)
    assert_same_masks(result.masks, expected.masks)
    ((choice,),) = result.report.rules
    assert (choice.candidates, choice.pruned) == (5, 1)
    assert result.report.tensors["a"].zero_slices[0] == 2


def test_tensors_without_a_rule_are_returned_unchanged(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("full", 0.5)
    pairs = client.prune(MODEL, spec, output="reparametrized", prior="zeros").state_dict(
        "reparametrized"
    )
    assert pairs.keys() == {*MODEL, "full_orig", "full_mask"} - {"full"}


def test_a_plan_counts_zeros_as_pruned(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("full", 0.5) + secateur.global_unstructured(MATRICES, 0.5)
    plan = client.plan(MODEL, spec, [0.25, 0.5, 10], prior="zeros")
    result = client.prune(MODEL, spec, prior="zeros")
    ((choice,),) = (result.report.rules[1],)
    assert plan.amounts[1].choices == (choice,)
    pruned = {name: tensor.pruned for name, tensor in result.report.tensors.items()}
    assert {name: tensor.pruned for name, tensor in plan.amounts[1].tensors.items()} == pruned
    without = client.plan(MODEL, spec, [0.25, 0.5, 10])
    assert without.amounts[1].choices[0].candidates > choice.candidates
    sizes = (plan.masks_bytes, plan.reparametrized_bytes, plan.dense_bytes)
    assert sizes == (without.masks_bytes, without.reparametrized_bytes, without.dense_bytes)


def test_a_result_that_is_kept_has_the_zeros_in_its_masks(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("fc.weight", 0.5)
    kept = client.prune(MODEL, spec, keep=True, prior="zeros").checkpoint
    again = client.prune(kept, spec).report.rules[0][0]
    nonzero = int((MODEL["fc.weight"] != 0).sum())
    assert again.candidates == nonzero - round(nonzero * 0.5)


def test_the_commands_have_the_option(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prunes a file, of which half is zero, by half of the rest."""
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(MODEL, model)
    options = ["--server", server.address, "--tensors", "fc.weight", "--prior", "zeros"]
    half = [*options, "--method", "l1_unstructured", "--amount", "0.5"]
    assert cli.main(["prune", str(model), "-o", str(out), *half]) == 0
    expected = torch_masks(MODEL, zeros_first(l1(["fc.weight"], 0.5), ["fc.weight"]))["fc.weight"]
    assert torch.equal(load_file(out)["fc.weight"] != 0, expected)
    capsys.readouterr()
    assert cli.main(["plan", str(model), "--json", *half]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["amounts"]
    assert planned["pruned"] == int((~expected).sum())


@pytest.mark.parametrize("rpc", ["Prune", "Plan"])
def test_an_unknown_value_is_refused(channel: grpc.Channel, rpc: str) -> None:
    data = file({"w": entry("F32", [2], 0, 8)}, b"\0" * 8)
    assert send_file(channel, rpc, data, prior=pb.PRIOR_MASKS) is None
    found = send_file(channel, rpc, data, prior=3)
    check_invalid(found, "INVALID_REQUEST", "header.prior", ["3", "Prior"])


def test_the_client_names_both_values(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("full", 0.5)
    calls: list[Callable[..., object]] = [client.prune, client.plan]
    for call in calls:
        with pytest.raises(secateur.InvalidSpec, match=r"prior: 'none' is none of masks, zeros"):
            call(MODEL, spec, prior="none")

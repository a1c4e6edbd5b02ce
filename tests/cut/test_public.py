"""Masks are those of public implementations, on random and on real weights."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.pruning
from torch import Tensor, nn

from secateur_server.granularity.block import Block
from secateur_server.granularity.group import Group
from secateur_server.granularity.n_m import NM
from secateur_server.importance.magnitude import Magnitude
from secateur_server.state_dict.parameter import Parameter
from tests.definition import applied, grouped, member, rule

sparsifiers: Any = torch.ao.pruning  # torch leaves these untyped

Layers = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def layers(crepe: Path) -> Layers:
    """Weights of consecutive convolutions, and the scales of their batch norms."""
    tensors: dict[str, Tensor] = torch.load(crepe, weights_only=True)
    return [(tensors[f"conv{i}.weight"], tensors[f"conv{i}_BN.weight"]) for i in (3, 4, 5, 6)]


def random_layers(*channels: int) -> Layers:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(b, a, 3, 1, generator=generator), torch.randn(b, generator=generator))
        for a, b in itertools.pairwise(channels)
    ]


def module_of(layers: Layers) -> nn.Sequential:
    """Convolutions with batch norms and ReLU between them."""
    parts: list[nn.Module] = []
    for weight, scale in layers:
        outputs, inputs, height, width = weight.shape
        conv = nn.Conv2d(inputs, outputs, (height, width), bias=False, padding="same")
        norm = nn.BatchNorm2d(outputs)
        conv.weight.data, norm.weight.data = weight.clone(), scale.clone()
        parts += [conv, norm, nn.ReLU()]
    return nn.Sequential(*parts)


def by_torch_pruning(layers: Layers, importance: str, **choices: Any) -> list[Tensor]:
    """Scores the output channels of each convolution but the last with torch-pruning."""
    public = pytest.importorskip("torch_pruning", reason="pip install torch-pruning")
    module = module_of(layers)
    example = torch.zeros(1, layers[0][0].shape[1], 70, 1)
    graph = public.DependencyGraph().build_dependency(module, example_inputs=example)
    scorer = getattr(public.importance, importance)(**choices)
    scores = []
    for place, (weight, _) in enumerate(layers[:-1]):
        conv, every = module[3 * place], list(range(len(weight)))
        group = graph.get_pruning_group(conv, public.prune_conv_out_channels, idxs=every)
        scores.append(scorer(group).detach().double())
    return scores


def lowest_channels(
    layers: Layers, count: int, scored: Sequence[str], **choices: Any
) -> tuple[list[Tensor], float]:
    """Prunes output channels of all convolutions but the last.

    A channel is a filter, its scale, and the input of the next convolution.

    Args:
        layers: The convolutions.
        count: How many channels to prune.
        scored: Which parts of a channel count for its score.
        choices: Of the rule.

    Returns:
        Which channels are kept, for each convolution, and the threshold.
    """
    model, groups = {}, []
    for place, (weight, scale) in enumerate(layers):
        model[f"{place}.conv"], model[f"{place}.bn"] = Parameter(weight), Parameter(scale)
    for place in range(len(layers) - 1):
        parts = {
            "conv": member(f"{place}.conv"),
            "bn": member(f"{place}.bn", is_scored="bn" in scored),
            "next": member(f"{place + 1}.conv", 1, is_scored="next" in scored),
        }
        if "conv" not in scored:
            parts["conv"] = member(f"{place}.conv", is_scored=False)
        groups.append(Group(f"channels{place}", tuple(parts.values())))
    masks, (choice,) = grouped(model, groups, amount=count, **choices)
    assert choice.pruned == count
    assert choice.threshold is not None
    return [masks[f"{place}.bn"] for place in range(len(layers) - 1)], choice.threshold


def assert_lowest(kept: Sequence[Tensor], scores: Sequence[Tensor]) -> None:
    """Checks that the pruned channels have the lowest scores of all."""
    mask, of_all = torch.cat(list(kept)), torch.cat(list(scores))
    expected = torch.ones(len(of_all), dtype=torch.bool)
    expected[of_all.argsort()[: int((~mask).sum())]] = False
    assert torch.equal(mask, expected)


SOURCES = pytest.mark.parametrize("source", ["random", "real"])


def chosen(source: str, layers: Layers) -> Layers:
    return layers if source == "real" else random_layers(6, 20, 12, 30)


@SOURCES
@pytest.mark.parametrize("p", [1, 2, 3])
def test_filters_are_those_of_torch_pruning(source: str, layers: Layers, p: int) -> None:
    """It sums |w|^p without a root or a mean, which has the same order for filters of one size."""
    pair = chosen(source, layers)[-2:]
    (scores,) = by_torch_pruning(
        pair, "GroupMagnitudeImportance", p=p, group_reduction="first", normalizer=None
    )
    kept, threshold = lowest_channels(pair, 7, ["conv"], importance=Magnitude(float(p)))
    assert_lowest(kept, [scores])
    elements = pair[0][0][0].numel()
    assert threshold**p * elements == pytest.approx(float(scores.sort().values[6]), rel=1e-5)


@SOURCES
@pytest.mark.parametrize("combination", ["mean", "sum", "max"])
def test_filters_with_their_consumers_are_those_of_torch_pruning(
    source: str, layers: Layers, combination: str
) -> None:
    """Members have one size, and p is 1 for sums and means: here the root precedes the mean."""
    pair = layers[:2] if source == "real" else random_layers(12, 20, 12)
    p = 2 if combination == "max" else 1
    (scores,) = by_torch_pruning(
        pair,
        "GroupMagnitudeImportance",
        p=p,
        group_reduction=combination,
        normalizer=None,
        target_types=[nn.Conv2d],
    )
    kept, threshold = lowest_channels(
        pair, 7, ["conv", "next"], importance=Magnitude(float(p)), combination=combination
    )
    assert_lowest(kept, [scores])
    elements = pair[0][0][0].numel()
    assert threshold**p * elements == pytest.approx(float(scores.sort().values[6]), rel=1e-5)


@SOURCES
def test_normalized_channels_of_several_layers_are_those_of_torch_pruning(
    source: str, layers: Layers
) -> None:
    """Scores are divided by their mean over the layer."""
    some = chosen(source, layers)
    scores = by_torch_pruning(
        some, "GroupMagnitudeImportance", p=1, group_reduction="first", normalizer="mean"
    )
    kept, threshold = lowest_channels(some, 15, ["conv"], normalization="mean")
    assert_lowest(kept, scores)
    assert threshold == pytest.approx(float(torch.cat(scores).sort().values[14]), rel=1e-5)


@SOURCES
def test_channels_by_batch_norm_scales_are_those_of_torch_pruning(
    source: str, layers: Layers
) -> None:
    some = chosen(source, layers)
    scores = by_torch_pruning(some, "BNScaleImportance", normalizer=None)
    kept, threshold = lowest_channels(some, 15, ["bn"])
    assert_lowest(kept, scores)
    assert threshold == pytest.approx(float(torch.cat(scores).sort().values[14]), rel=1e-6)


@SOURCES
def test_channels_by_lamp_are_those_of_torch_pruning(source: str, layers: Layers) -> None:
    some = chosen(source, layers)
    scores = by_torch_pruning(some, "LAMPImportance", p=2, group_reduction="first")
    kept, _ = lowest_channels(some, 15, ["conv"], importance=Magnitude(2.0), allocation="lamp")
    assert_lowest(kept, scores)


def by_sparsifier(weight: Tensor, level: float, block: tuple[int, int], zeros: int) -> Tensor:
    """Returns the mask of torch.ao.pruning's WeightNormSparsifier for a 2-D weight."""
    linear: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    sparsifier = sparsifiers.WeightNormSparsifier(level, block, zeros)
    sparsifier.prepare(nn.Sequential(linear), [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    mask: Tensor = linear.parametrizations.weight[0].mask
    return mask != 0


def matrix(source: str, layers: Layers) -> Tensor:
    if source == "real":
        return layers[-1][0].flatten(1)
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(1))


@SOURCES
@pytest.mark.parametrize("block", [(1, 4), (4, 4), (4, 1), (8, 2)])
@pytest.mark.parametrize("level", [0.25, 0.61])
def test_blocks_are_those_of_torchs_sparsifier(
    source: str, layers: Layers, block: tuple[int, int], level: float
) -> None:
    weight = matrix(source, layers)
    choices = {"granularity": Block(block, as_matrix=True), "importance": Magnitude(2.0)}
    masks, (choice,) = applied({"w": Parameter(weight)}, rule(["w"], level, **choices))
    assert torch.equal(masks["w"], by_sparsifier(weight, level, block, math.prod(block)))
    assert choice.pruned == round(level * weight.numel() / math.prod(block))


@SOURCES
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_m_masks_are_those_of_torchs_sparsifier(
    source: str, layers: Layers, n: int, m: int
) -> None:
    weight = matrix(source, layers)
    masks, _ = applied({"w": Parameter(weight)}, rule(["w"], 1.0, granularity=NM(n, m, 1)))
    assert torch.equal(masks["w"], by_sparsifier(weight, 1.0, (1, m), m - n))

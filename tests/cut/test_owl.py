"""OWL against the formula of its authors' code, and its limits."""

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.spec import INPUTS, Rule, Spec
from secateur_proto import spec_pb2 as pb
from secateur_server.cut.allocation.owl import divided, fractions_by_owl
from secateur_server.cut.plan import plan
from secateur_server.importance.activation import Activation
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.definition import applied, rule
from tests.masks import packed


def reference(metrics: Sequence[Tensor], sparsity: float) -> list[float]:
    """The sparsity of each layer, as lib/prune_all.py of luuyin/OWL computes it.

    That is check_outlier_mean with Hyper_m 5, and prune_wanda_outlier with Lamda 0.08.
    """
    ratios = []
    for metric in metrics:
        limit = torch.mean(metric) * 5
        ratios.append(float((metric > limit).sum().item()) / metric.numel() * 100)
    found = np.array(ratios)
    found = (found - found.min()) * (1 / (found.max() - found.min()) * 0.08 * 2)
    found = found - np.mean(found) + (1 - sparsity)
    return [1 - float(density) for density in found]


def model_of(layers: int, prior: bool = False) -> tuple[dict[str, Parameter], dict[str, Tensor]]:
    """Layers of equal sizes, with more outliers the further on they are."""
    numbers = torch.Generator().manual_seed(1)
    model, extras = {}, {}
    for layer in range(layers):
        for part in ("q", "out"):
            name = f"model.layers.{layer}.{part}.weight"
            weight = torch.randn(24, 32, generator=numbers)
            weight[torch.rand(24, 32, generator=numbers) < 0.01 * layer] *= 12
            kept = torch.rand(24, 32, generator=numbers) < 0.7
            model[name] = Parameter(weight, packed(kept) if prior else None)
            extras[f"in.{name}"] = torch.rand(32, generator=numbers) + 0.5
    return model, extras


def activation(names: Sequence[str]) -> Activation:
    return Activation("activation", 1.0, {name: f"in.{name}" for name in names}, {}, False)


@pytest.mark.parametrize("scope", ["row", "tensor"])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_layers_have_the_sparsities_of_the_authors(scope: str, sparsity: float) -> None:
    model, extras = model_of(4)
    names = list(model)
    selection = rule(names, sparsity, scope=scope, allocation="owl", importance=activation(names))
    metrics = [
        torch.cat(
            [
                (model[n].weight.abs() * extras[f"in.{n}"]).flatten()
                for n in names
                if f".{layer}." in n
            ]
        )
        for layer in range(4)
    ]
    expected = [f for f in reference(metrics, sparsity) for _ in ("q", "out")]
    found = fractions_by_owl(RequestContext(), selection, model, extras)
    assert list(found.values()) == pytest.approx(expected, abs=1e-12)
    masks, _ = applied(model, selection, **extras)
    for name, fraction in found.items():
        pruned = (~masks[name]).sum(1)
        if scope == "row":
            assert set(pruned.tolist()) == {round(fraction * 32)}
        else:
            assert int(pruned.sum()) == round(fraction * 24 * 32)
    outcomes = plan(RequestContext(), selection, [Fraction(sparsity)], model, extras)
    removed = {name: outcomes[0].removed[name].elements for name in names}
    assert removed == {name: int((~mask).sum()) for name, mask in masks.items()}


def test_magnitudes_and_unpruned_elements_decide_too() -> None:
    model, _ = model_of(3, prior=True)
    found = fractions_by_owl(
        RequestContext(), rule(list(model), 0.5, scope="row", allocation="owl"), model, {}
    )
    flags = {
        name: parameter.mask.flags(0, 24 * 32)
        for name, parameter in model.items()
        if parameter.mask
    }
    layers = [
        torch.cat([model[n].weight.flatten()[flags[n]].abs() for n in model if f".{i}." in n])
        for i in range(3)
    ]
    ratios = [float((of > 5 * of.double().mean()).double().mean()) for of in layers]
    fractions = divided(ratios, [len(of) for of in layers], 0.5)
    assert list(found.values()) == pytest.approx([f for f in fractions for _ in range(2)])
    kept = sum(f * len(of) for f, of in zip(fractions, layers, strict=True))
    assert kept == pytest.approx(0.5 * sum(map(len, layers)))


@examples(100)
@given(
    layers=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 10_000)), min_size=1, max_size=6),
    fraction=st.floats(0, 1),
)
def test_fractions_fall_with_outliers_and_have_the_mean_that_is_asked_for(
    layers: list[tuple[float, int]], fraction: float
) -> None:
    outliers, elements = zip(*layers, strict=True)
    found = divided(outliers, elements, fraction)
    assert all(0 <= f <= 1 for f in found)
    total = sum(elements)
    if total:
        pruned = sum(f * n for f, n in zip(found, elements, strict=True))
        assert pruned == pytest.approx(fraction * total, abs=1e-6 * total)
    filled = sorted((o, f) for o, f, n in zip(outliers, found, elements, strict=True) if n)
    assert all(a[1] >= b[1] - 1e-12 for a, b in itertools.pairwise(filled))
    assert not filled or filled[0][1] - filled[-1][1] <= 0.16 + 1e-12


def test_layers_without_differences_are_pruned_alike() -> None:
    assert divided([0.25, 0.25], [3, 5], 0.3) == [0.3, 0.3]
    model = {"fc.weight": Parameter(torch.rand(4, 5)), "empty.weight": Parameter(torch.rand(0, 5))}
    selection = rule(list(model), 0.5, scope="tensor", allocation="owl")
    assert set(fractions_by_owl(RequestContext(), selection, model, {}).values()) == {0.5}
    masks, _ = applied(model, selection)
    assert int(masks["fc.weight"].sum()) == 10


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"granularity": "rows"}, "OWL needs GRANULARITY_ELEMENT; use another allocation"),
        ({"scope": "global"}, "OWL needs SCOPE_PER_ROW or SCOPE_PER_TENSOR"),
        ({"amount": 3}, "OWL needs a fraction"),
        ({"importance": "random"}, "OWL cannot be used with random importance; use another"),
    ],
    ids=str,
)
def test_other_rules_have_no_owl(
    client: secateur.Client, choices: dict[str, object], message: str
) -> None:
    given = {"tensors": "*", "amount": 0.5, "scope": "tensor", "allocation": "owl", **choices}
    spec = secateur.select(**given)  # type: ignore[arg-type]
    path = f"spec.rules[0].selection.allocation: {message}"
    with pytest.raises(secateur.InvalidSpec, match=re.escape(path)):
        client.prune({"w": np.ones((4, 4), np.float32)}, spec)


def test_scores_that_are_too_large_are_refused(client: secateur.Client) -> None:
    weights = {f"{i}.w": np.full((2, 2), np.inf if i else 1, np.float32) for i in range(2)}
    spec = secateur.select("*", 0.5, scope="row", allocation="owl")
    with pytest.raises(secateur.InvalidSpec, match=r"'1\.w' has scores that are too large for OWL"):
        client.prune(weights, spec)


def test_a_call_with_factors_divides_by_owl(client: secateur.Client) -> None:
    model, extras = model_of(3)
    names = list(model)
    selection = pb.Selection(
        tensors=names,
        activation=pb.Activation(),
        granularity=pb.GRANULARITY_ELEMENT,
        scope=pb.SCOPE_PER_ROW,
        fraction=0.5,
        allocation=pb.ALLOCATION_OWL,
    )
    arrays = {name: extras[f"in.{name}"].numpy() for name in names}
    spec = Spec((Rule(pb.Rule(selection=selection), {INPUTS: arrays}),))
    weights = {name: parameter.weight for name, parameter in model.items()}
    found = client.prune(weights, spec)
    masks, _ = applied(
        model,
        rule(names, 0.5, scope="row", allocation="owl", importance=activation(names)),
        **extras,
    )
    assert all(torch.equal(found.masks[name], mask) for name, mask in masks.items())
    assert sorted(found.report.tensors) == sorted(names)

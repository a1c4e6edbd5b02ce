"""Activation-aware importance against scores that plain loops compute."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur_server.granularity.block import Block
from secateur_server.granularity.group import Group
from secateur_server.granularity.n_m import NM
from secateur_server.granularity.slice import Slice
from secateur_server.importance.activation import Activation
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.cut.test_rows import lowest_of_rows
from tests.definition import DTYPES, applied, grouped, kept_of, member, rule, without
from tests.masks import packed

some = examples(60)
Doubles = np.ndarray[Any, np.dtype[np.float64]]


def activation(
    inputs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
    p: float = 1.0,
    is_relative: bool = False,
) -> Activation:
    return Activation("activation", p, inputs or {"w": "in"}, outputs or {}, is_relative)


def whole(factors: Tensor, shape: Sequence[int], is_of_inputs: bool) -> Doubles:
    """Factors of a weight's shape, filled in by a loop."""
    found = np.empty(tuple(shape))
    for at in np.ndindex(*shape):
        index = at
        if factors.ndim == 1 and len(shape) > 1:
            groups = len(factors) // shape[1] if is_of_inputs else 1
            group = at[0] // (shape[0] // groups)
            index = (group * shape[1] + at[1],) if is_of_inputs else (at[0],)
        else:
            index = tuple(0 if n == 1 else i for i, n in zip(at, factors.shape, strict=True))
        found[at] = float(factors[index])
    return found


def scores_of(
    weight: Tensor, kept: Tensor, importance: Activation, extras: Mapping[str, Tensor]
) -> Doubles:
    """The scores by the formula, in float64."""
    values = np.abs(weight.double().numpy())
    if importance.is_relative:
        unpruned = np.where(kept.numpy(), values, 0.0)
        columns = unpruned.reshape(len(values), -1).sum(0).reshape(values[0].shape)
        rows = unpruned.reshape(len(values), -1).sum(1)
        shares = np.zeros_like(values)
        for at in np.ndindex(*values.shape):
            for total in (rows[at[0]], columns[at[1:]]):
                shares[at] += values[at] / total if total else 0.0
        values = shares
    values = values**importance.p
    for names, is_of_inputs in ((importance.inputs, True), (importance.outputs, False)):
        if "w" in names:
            values = values * whole(extras[names["w"]], weight.shape, is_of_inputs)
    wide = weight.dtype == torch.float64
    return np.asarray(values if wide else values.astype(np.float32), np.float64)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Parameter, Activation, dict[str, Tensor]]:
    """Draws a weight of few values, factors of every shape, and a formula that is exact."""
    shape = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    numbers = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    weight = torch.from_numpy(numbers.integers(-4, 5, shape) / 4).to(draw(st.sampled_from(DTYPES)))
    groups = draw(st.sampled_from([g for g in range(1, shape[0] + 1) if shape[0] % g == 0]))
    sizes = [draw(st.sampled_from([1, size])) for size in shape]
    vector = draw(st.booleans())
    extras = {"in": [groups * shape[1]] if vector else sizes}
    if has_outputs := draw(st.booleans()):
        extras["out"] = [shape[0]] if draw(st.booleans()) else sizes
    dtype = draw(st.sampled_from(DTYPES))
    uploaded = {
        name: torch.from_numpy(numbers.integers(0, 4, size) / 2).to(dtype)
        for name, size in extras.items()
    }
    importance = activation(
        outputs={"w": "out"} if has_outputs else {}, p=draw(st.sampled_from([1.0, 2.0]))
    )
    kept = torch.from_numpy(numbers.random(shape) < draw(st.sampled_from([0.6, 1.0])))
    return Parameter(weight, None if kept.all() else packed(kept)), importance, uploaded


@some
@given(case=cases(), fraction=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_rows_lose_the_lowest_scores(
    case: tuple[Parameter, Activation, dict[str, Tensor]], fraction: float
) -> None:
    parameter, importance, extras = case
    selection = rule(["w"], fraction, scope="row", importance=importance)
    masks, _ = applied({"w": parameter}, selection, **extras)
    weight, kept = parameter.weight, kept_of(parameter)
    scores = torch.from_numpy(scores_of(weight, kept, importance, extras))
    rows = len(weight)
    expected = lowest_of_rows(scores.view(rows, -1), kept.view(rows, -1), fraction, False)
    assert torch.equal(masks["w"], expected.view(weight.shape))


@some
@given(case=cases(), fraction=st.floats(0, 1), scope=st.sampled_from(["tensor", "global"]))
def test_tensors_lose_the_lowest_scores(
    case: tuple[Parameter, Activation, dict[str, Tensor]], fraction: float, scope: str
) -> None:
    parameter, importance, extras = case
    selection = rule(["w"], fraction, scope=scope, importance=importance)
    masks, (choice,) = applied({"w": parameter}, selection, **extras)
    kept = kept_of(parameter)
    scores = scores_of(parameter.weight, kept, importance, extras).reshape(-1)
    order = sorted(kept.flatten().nonzero().flatten().tolist(), key=lambda i: (scores[i], i))
    pruned = order[: round(fraction * len(order))]
    assert torch.equal(masks["w"], without(parameter, pruned))
    assert choice.threshold == (scores[pruned[-1]] if pruned else None)


def random_case(
    shape: tuple[int, ...] = (12, 16), dtype: torch.dtype = torch.float32, prior: float = 0.8
) -> tuple[Parameter, dict[str, Tensor]]:
    numbers = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=numbers).to(dtype)
    kept = torch.rand(shape, generator=numbers) < prior
    factors = {
        "in": torch.rand(shape[1], generator=numbers) + 0.1,
        "out": torch.rand(shape[0], generator=numbers) + 0.1,
    }
    return Parameter(weight, None if prior == 1 else packed(kept)), factors


FORMULAS = {
    "Wanda": activation(),
    "of both": activation(outputs={"w": "out"}),
    "cubes": activation(p=3.0),
    "root": activation(p=0.7),
    "RIA": activation(is_relative=True),
    "RIA of both, squared": activation(outputs={"w": "out"}, p=2.0, is_relative=True),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("formula", FORMULAS)
def test_scores_are_those_of_the_formula(formula: str, dtype: torch.dtype) -> None:
    parameter, extras = random_case(dtype=torch.float32, prior=0.8)
    parameter = parameter._replace(weight=(parameter.weight * 3).to(dtype))
    importance, kept = FORMULAS[formula], kept_of(parameter)
    found = importance.products(RequestContext(), "w", parameter, extras).store(RequestContext())
    expected = scores_of(parameter.weight.float(), kept, importance, extras).reshape(-1)
    if dtype == torch.float64:
        expected = scores_of(parameter.weight, kept, importance, extras).reshape(-1)
        assert found.dtype == torch.float64
    np.testing.assert_allclose(found.abs().double().numpy(), expected, rtol=1e-6)


def test_larger_units_have_the_mean_of_their_elements() -> None:
    parameter, extras = random_case()
    kept = kept_of(parameter)
    scores = scores_of(parameter.weight, kept, FORMULAS["of both"], extras) * kept.numpy()
    units = {
        "rows": (Slice(0), scores.mean(1)),
        "columns": (Slice(1), scores.mean(0)),
        "blocks": (Block((3, 4), True), scores.reshape(4, 3, 4, 4).mean((1, 3)).reshape(-1)),
    }
    for name, (granularity, means) in units.items():
        for scope, half in itertools.product(("tensor", "global"), (0.5, len(means) // 3)):
            selection = rule(
                ["w"], half, scope=scope, granularity=granularity, importance=FORMULAS["of both"]
            )
            masks, (choice,) = applied({"w": parameter}, selection, **extras)
            count = choice.pruned
            assert choice.threshold == pytest.approx(np.sort(means)[count - 1], rel=1e-6), name
            values = masks["w"].numpy().astype(float)
            if name == "blocks":
                left = values.reshape(4, 3, 4, 4).sum((1, 3)).reshape(-1)
            else:
                left = values.sum(1 if name == "rows" else 0)
            assert set((left == 0).nonzero()[0]) >= set(np.argsort(means)[:count]), name


@pytest.mark.parametrize("formula", ["Wanda", "RIA"])
def test_n_m_keeps_the_largest_scores_of_each_group(formula: str) -> None:
    parameter, extras = random_case(prior=1)
    weight = parameter.weight
    scores = scores_of(weight, kept_of(parameter), FORMULAS[formula], extras)
    choices: dict[str, Any] = {"granularity": NM(2, 4, 1), "importance": FORMULAS[formula]}
    masks, _ = applied({"w": parameter}, rule(["w"], 1.0, **choices), **extras)
    lowest = np.argsort(scores.reshape(12, 4, 4), axis=2)[:, :, :2]
    kept = np.ones((12, 4, 4), bool)
    np.put_along_axis(kept, lowest, False, 2)
    assert np.array_equal(masks["w"].numpy(), kept.reshape(12, 16))
    masks, _ = applied({"w": parameter}, rule(["w"], 0.5, **choices), **extras)
    lost = np.sort(scores.reshape(12, 4, 4), axis=2)[:, :, :2].mean(2).reshape(-1)
    pruned = np.argsort(lost)[:24]
    kept.reshape(48, 4)[np.setdiff1d(np.arange(48), pruned)] = True
    assert np.array_equal(masks["w"].numpy(), kept.reshape(12, 16))


def test_units_of_groups_have_the_means_of_their_members() -> None:
    numbers = torch.Generator().manual_seed(3)
    model = {
        "w": Parameter(torch.randn(6, 5, generator=numbers)),
        "next": Parameter(torch.randn(4, 6, generator=numbers)),
    }
    extras = {"in": torch.rand(5, generator=numbers), "in2": torch.rand(6, generator=numbers)}
    importance = activation({"w": "in", "next": "in2"})
    group = Group("g", (member("w", 0), member("next", 1)))
    scores = [
        (model["w"].weight.abs() * extras["in"]).double().mean(1),
        (model["next"].weight.abs() * extras["in2"]).double().mean(0),
    ]
    for combination, expected in (("mean", sum(scores) / 2), ("sum", sum(scores))):
        masks, (choice,) = grouped(
            model, [group], importance=importance, amount=2, combination=combination, extras=extras
        )
        pruned = torch.as_tensor(expected).argsort()[:2]
        assert set((~masks["w"].any(1)).nonzero().flatten().tolist()) == set(pruned.tolist())
        assert torch.equal(~masks["next"].any(0), ~masks["w"].any(1))
        assert choice.threshold == pytest.approx(float(torch.as_tensor(expected).sort()[0][1]))

"""FLAP's scores and its compensation of biases, against loops over inputs and columns."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import secateur
from tests.shrinking.tiny_transformers import inputs, tiny

Doubles = npt.NDArray[np.float64]


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 3)).double()


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(7, 5, dtype=torch.float64, generator=generator) for _ in range(count)]


HIDDEN = secateur.group(
    "hidden", secateur.member("0.weight"), secateur.member("0.bias"), secateur.member("2.weight", 1)
)


def naive(rows: Iterable[Iterable[float]], weight: Any, columns: list[list[int]]) -> list[float]:
    """The score of units: `rows` are inputs of a matrix `weight`, [out, in]."""
    listed = [list(row) for row in rows]
    scores = []
    for unit in columns:
        score = 0.0
        for column in unit:
            values = [row[column] for row in listed]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            score += variance * sum(float(row[column]) ** 2 for row in weight)
        scores.append(score)
    return scores


def test_the_units_of_an_mlp() -> None:
    model = mlp()
    found = secateur.flap(model, secateur.calibrate(model, batches()), [HIDDEN])
    with torch.no_grad():
        rows = torch.cat([model[1](model[0](batch)) for batch in batches()]).tolist()
    expected = naive(rows, model[2].weight.tolist(), [[unit] for unit in range(6)])
    np.testing.assert_allclose(found["hidden"], expected, rtol=1e-10)
    joined = secateur.flap(model, secateur.calibrate(model, [torch.cat(batches())]), [HIDDEN])
    np.testing.assert_allclose(found["hidden"], joined["hidden"], rtol=1e-12)


def test_channels_that_a_flat_layer_reads() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    images = [torch.randn(5, 2, 4, 4) for _ in range(2)]
    groups = secateur.groups(model, images[0])
    found = secateur.flap(model, secateur.calibrate(model, images), groups)
    with torch.no_grad():
        rows = torch.cat([model[:3](batch) for batch in images]).tolist()
    units = [list(range(4 * unit, 4 * unit + 4)) for unit in range(3)]
    expected = naive(rows, model[3].weight.tolist(), units)
    np.testing.assert_allclose(found[groups[0].name], expected, rtol=1e-5)


def test_channels_that_two_convolutions_read() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict(
        {"a": nn.Conv2d(2, 4, 1), "b": nn.Conv2d(4, 3, 3), "c": nn.Conv2d(4, 5, 1)}
    )
    rng = np.random.default_rng(0)
    moments = rng.random((2, 4)) + np.array([[0], [9]])
    layer = secateur.LayerStatistics(10, *moments[::-1] * 10)
    statistics = secateur.Statistics({"b.weight": layer, "c.weight": layer})
    names = [("a.weight", 0), ("b.weight", 1), ("c.weight", -3)]
    group = secateur.group("g", *(secateur.member(name, dim) for name, dim in names))
    found = secateur.flap(model, statistics, [group])["g"]
    variance = moments[1] - moments[0] ** 2
    for unit in range(4):
        norm = sum(float(model[n].weight.detach()[:, unit].square().sum()) for n in "bc")
        assert found[unit] == pytest.approx(variance[unit] * norm)
    unscored = [secateur.member("b.weight", 1), secateur.member("c.weight", 1, scored=False)]
    alone = secateur.flap(model, statistics, [secateur.group("g", *unscored)])["g"]
    only_b = [float(model["b"].weight.detach()[:, unit].square().sum()) for unit in range(4)]
    np.testing.assert_allclose(alone, variance * only_b, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_transformers(name: str) -> None:
    model = tiny(name)
    statistics = secateur.calibrate(model, [inputs(model)])
    config = model.config.to_dict() | {"model_type": name}
    groups = secateur.transformer_groups(config, source=model)
    scores = secateur.flap(model, statistics, groups)
    assert list(scores) == [group.name for group in groups]
    tensors = dict(model.named_parameters())
    for group in groups:
        reader = group.members[-1].message
        weight = tensors[reader.tensor].detach()
        weight = weight if reader.dim else weight.T
        variance = statistics[reader.tensor].variance
        assert variance is not None
        each = variance * weight.square().sum(0).numpy()
        part = each[reader.offset : reader.offset + reader.stride * reader.units]
        np.testing.assert_allclose(scores[group.name], part.reshape(reader.units, -1).sum(1))


def test_the_lowest_scores_are_pruned(client: secateur.Client) -> None:
    model = mlp()
    scores = secateur.flap(model, secateur.calibrate(model, batches()), [HIDDEN])
    spec = secateur.grouped([HIDDEN], 2, importance_scores=scores, normalization="z_score")
    kept = client.prune(model, spec).masks["0.bias"].numpy()
    assert set(np.flatnonzero(~kept)) == set(np.argsort(scores["hidden"])[:2])


def test_dtypes_pairs_and_other_names() -> None:
    model = mlp()
    statistics = secateur.calibrate(model, batches())
    exact = secateur.flap(model, statistics, [HIDDEN])["hidden"]
    half = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    np.testing.assert_allclose(
        secateur.flap(half, statistics, [HIDDEN])["hidden"], exact, rtol=0.02
    )
    mask = torch.arange(6).expand(4, 6) != 3
    prune.custom_from_mask(model[2], "weight", mask)  # type: ignore[no-untyped-call]
    pruned = secateur.flap(model, statistics, [HIDDEN])["hidden"]
    assert pruned[3] == 0
    np.testing.assert_array_equal(np.delete(pruned, 3), np.delete(exact, 3))


def test_the_mean_output_is_kept(client: secateur.Client) -> None:
    model = mlp()
    statistics = secateur.calibrate(model, batches())
    scores = secateur.flap(model, statistics, [HIDDEN])
    spec = secateur.grouped([HIDDEN], 3, importance_scores=scores, align=1)
    masks = client.prune(model, spec).masks
    repaired = secateur.compensated(model, masks, statistics)
    assert list(repaired) == list(model.state_dict())
    changed = [n for n, t in repaired.items() if not torch.equal(t, model.state_dict()[n])]
    assert changed == ["2.bias"]
    result = client.prune(repaired, spec, output="shrunk")
    small = mlp()
    small[0], small[2] = nn.Linear(5, 3).double(), nn.Linear(3, 4).double()
    small.load_state_dict(result.state_dict())
    data = torch.cat(batches())
    with torch.no_grad():
        np.testing.assert_allclose(small(data).mean(0), model(data).mean(0), rtol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(4, 6, 1), nn.Conv1d(4, 6, 1, groups=2), nn.Conv2d(4, 6, 3, padding=0)],
    ids=str,
)
def test_the_mean_output_of_convolutions(layer: Any) -> None:
    size = [8] * (1 if isinstance(layer, nn.Conv1d) else 2)
    images = torch.rand(4, 1, *[1] * len(size)).expand(4, 4, *size) + torch.arange(4.0)[
        :, None
    ].view(1, 4, *[1] * len(size))  # constant in each image, so that its borders have the mean too
    statistics = secateur.calibrate(layer, [images])
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = layer(images).mean([0, *range(2, 2 + len(size))])
    layer.load_state_dict(secateur.compensated(layer, {"weight": mask}, statistics))
    layer.weight.data *= mask
    pruned = layer(images).mean([0, *range(2, 2 + len(size))])
    np.testing.assert_allclose(pruned.detach(), whole.detach(), rtol=1e-4)


def test_what_is_not_compensated_is_left() -> None:
    layer: Any = nn.ConvTranspose1d(4, 4, 3)
    statistics = secateur.calibrate(layer, [torch.rand(2, 4, 8)])
    mask = {"weight": torch.zeros(4, 4, 3, dtype=torch.bool)}
    same = secateur.compensated(layer, mask, statistics)
    assert torch.equal(same["bias"], layer.bias)
    without_bias = {"weight": np.ones((2, 2), np.float32)}
    statistics = secateur.calibrate(nn.Linear(2, 2), [torch.rand(3, 2)])
    same = secateur.compensated(without_bias, {"weight": np.zeros((2, 2), bool)}, statistics)
    np.testing.assert_array_equal(same["weight"], without_bias["weight"])


def statistics_of(**parts: Any) -> secateur.Statistics:
    layer = {"count": 2, "sum_squares": np.ones(6), "sum": np.zeros(6), **parts}
    return secateur.Statistics({"2.weight": secateur.LayerStatistics(**layer)})


READER = secateur.member("2.weight", 1)
WRONG = {
    "are wrong": ([HIDDEN], "abc", "statistics: 'abc' is not a Statistics"),
    "lack the reader": ([HIDDEN], secateur.Statistics({}), "no weight that reads its units"),
    "have no sum": ([HIDDEN], statistics_of(sum=None), "2.weight: its statistics have no sum"),
    "of another": (
        [HIDDEN],
        statistics_of(sum_squares=np.ones(5), sum=None),
        "2.weight: has 6 inputs, and its statistics have 5",
    ),
    "no groups": ([], statistics_of(), "groups: is empty"),
    "one name": ([HIDDEN, HIDDEN], statistics_of(), "two groups have the name 'hidden'"),
    "no tensor": (
        [secateur.group("g", secateur.member("x"), READER)],
        statistics_of(),
        "g: x: the model has no tensor",
    ),
    "dim": ([secateur.group("g", secateur.member("2.weight", 2))], statistics_of(), "dim 2 is"),
    "slices": (
        [secateur.group("g", secateur.member("2.weight", 1, units=7))],
        statistics_of(),
        r"g: 2.weight: slice 6 is outside \[0, 6\)",
    ),
    "units": (
        [secateur.group("g", secateur.member("2.bias"), READER)],
        statistics_of(),
        "different numbers of units: 4 of 2.bias, 6 of 2.weight",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong: str) -> None:
    groups, statistics, message = WRONG[wrong]
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.flap(mlp(), statistics, groups)  # type: ignore[arg-type]


def test_wrong_masks() -> None:
    with pytest.raises(secateur.InvalidSpec, match=r"2.weight: has shape \[3\], not \[4, 6\]"):
        secateur.compensated(mlp(), {"2.weight": np.ones(3)}, statistics_of())
    wrong = statistics_of(sum_squares=np.ones(5), sum=None)
    with pytest.raises(secateur.InvalidStatistics, match="has 6 inputs, and its statistics have 5"):
        secateur.compensated(mlp(), {"2.weight": np.ones((4, 6))}, wrong)
